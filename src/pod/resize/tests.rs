//! Resizes by example, and the order of their steps for any.

use proptest::prelude::*;

use super::*;
use crate::runtime::types::{PodRef, SandboxState, SandboxStatus};

const MI: i64 = 1 << 20;

fn pod(value: Value) -> Pod {
    serde_json::from_value(value).unwrap()
}

fn spec(resources: &Value) -> PodSpec {
    serde_json::from_value(json!({ "containers": [{ "name": "c", "resources": resources }] })).unwrap()
}

fn burst(cpu: &str, memory: &str) -> Value {
    json!({ "requests": { "cpu": "100m", "memory": "10Mi" }, "limits": { "cpu": cpu, "memory": memory } })
}

fn host() -> Host {
    Host { cgroup_root: "l".into(), seccomp_root: "/s".into(), memory: 1 << 30, cpu_quota: true, pids_limit: None }
}

fn attempt(number: u32, state: ContainerState, made_of: &PodSpec) -> ContainerStatus {
    let container = &made_of.containers[0];
    ContainerStatus {
        id: format!("c-{number}").into(),
        sandbox: "s".into(),
        pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() },
        name: "c".into(),
        attempt: number,
        state,
        frozen: false,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        started_at: None,
        finished_at: None,
        exit_code: 0,
        oom_killed: false,
        message: String::new(),
        image: "sha256:1".into(),
        image_ref: "i".into(),
        pid: None,
        resources: Some(qos::container_resources(made_of, container, host().memory, true)),
        annotations: remembered(made_of, container),
    }
}

fn observed(attempts: Vec<ContainerStatus>) -> Observed {
    let sandbox = SandboxStatus {
        id: "s".into(),
        pod: attempts[0].pod.clone(),
        attempt: 0,
        state: SandboxState::Ready,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        addresses: Vec::new(),
        pid: None,
    };
    Observed::new(vec![sandbox], attempts)
}

#[test]
fn a_container_is_changed_only_where_its_limits_differ() {
    let before = spec(&burst("500m", "64Mi"));
    let running = observed(vec![attempt(0, ContainerState::Running, &before)]);
    assert_eq!(changes(&before, &running, &host()), []);
    let after = spec(&burst("1", "64Mi"));
    let [Change::Update { to, from, .. }] = &changes(&after, &running, &host())[..] else { panic!("one update") };
    assert_eq!((from.cpu_quota, to.cpu_quota, to.memory_limit), (Some(50_000), Some(100_000), Some(64 * MI)));
    let ended = observed(vec![attempt(0, ContainerState::Exited, &before)]);
    assert_eq!(changes(&after, &ended, &host()), [], "its next attempt is made with them");
    let mut mute = attempt(0, ContainerState::Running, &before);
    mute.resources = None;
    assert_eq!(changes(&after, &observed(vec![mute]), &host()), [], "of limits nobody tells nothing is known");
}

#[test]
fn a_policy_asks_for_a_restart_also_where_only_the_request_changes() {
    let with_policy = |memory: &str, cpu: &str| -> PodSpec {
        serde_json::from_value(json!({ "containers": [{ "name": "c",
            "resources": { "requests": { "memory": memory, "cpu": cpu } },
            "resizePolicy": [{ "resourceName": "memory", "restartPolicy": "RestartContainer" },
                             { "resourceName": "cpu", "restartPolicy": "NotRequired" }] }] }))
        .unwrap()
    };
    let before = with_policy("10Mi", "1");
    let first = attempt(0, ContainerState::Running, &before);
    let running = observed(vec![first.clone()]);
    let cpu = changes(&with_policy("10240Ki", "2"), &running, &host());
    assert!(matches!(&cpu[..], [Change::Update { .. }]), "{cpu:?}");
    let after = with_policy("20Mi", "1");
    let replace = [Change::Replace { id: "c-0".into(), name: "c".into(), attempt: 1 }];
    assert_eq!(changes(&after, &running, &host()), replace);
    let made = observed(vec![first, attempt(1, ContainerState::Created, &after)]);
    assert_eq!(changes(&after, &made, &host()), replace, "the old one has to go");
    let started = observed(vec![attempt(1, ContainerState::Running, &after)]);
    assert_eq!(changes(&after, &started, &host()), []);
}

#[test]
fn what_was_allocated_is_told_apart_from_what_is_wanted() {
    let before = spec(&burst("500m", "64Mi"));
    let granted = Allocation::of(&before);
    assert!(granted.is_of(&spec(&burst("0.5", "65536Ki"))), "the same amounts");
    let wanted = spec(&burst("1", "64Mi"));
    assert!(!granted.is_of(&wanted));
    assert_eq!(granted.over(&wanted), before);
    assert!(Allocation::of(&wanted).is_of(&wanted));
}

#[test]
fn what_the_api_server_was_told_is_what_was_allocated() {
    let resources = burst("500m", "64Mi");
    let status = json!({ "name": "c", "containerID": "docker://1", "image": "", "imageID": "", "ready": true,
        "restartCount": 0, "allocatedResources": resources["requests"], "resources": resources });
    let whole = json!({ "requests": { "memory": "100Mi" }, "limits": { "cpu": "2" } });
    let mut before = pod(json!({
        "spec": { "containers": [{ "name": "c", "resources": burst("1", "64Mi") }], "resources": whole,
                  "overhead": { "memory": "10Mi" } },
        "status": { "containerStatuses": [status], "allocatedResources": { "cpu": "1", "memory": "90Mi" },
                    "resources": { "limits": { "cpu": "2", "memory": "1Gi" } } },
    }));
    let granted = Allocation::reported(&before).unwrap();
    assert_eq!(granted.containers["c"].limits, spec(&resources).containers[0].resources.clone().unwrap().limits);
    let expected = json!({ "requests": { "memory": "80Mi" }, "limits": { "cpu": "2" } });
    assert!(same(granted.pod.as_ref(), Some(&serde_json::from_value(expected).unwrap())), "{:?}", granted.pod);
    before.status.as_mut().unwrap().container_statuses.as_mut().unwrap()[0].container_id = None;
    assert_eq!(Allocation::reported(&before), None, "it has not run");
}

#[test]
fn memory_that_is_in_use_is_not_taken() {
    let step = |container, from, to, usage| MemoryStep { container, from, to, usage };
    assert_eq!(too_low(&[step(None, Some(10), Some(20), None), step(Some("c"), Some(5), Some(4), Some(3))]), None);
    let text =
        "cannot decrease memory limits: attempting to set container \"c\" memory limit (4) below current usage (4)";
    assert_eq!(too_low(&[step(Some("c"), Some(5), Some(4), Some(4))]).as_deref(), Some(text));
    let both = too_low(&[step(None, None, Some(4), Some(9)), step(Some("c"), Some(5), Some(4), None)]).unwrap();
    assert!(both.contains("pod memory limit (4)") && both.contains("missing container \"c\""), "{both}");
}

#[test]
fn the_status_tells_the_limits_that_are_in_effect() {
    let (before, after) = (spec(&burst("500m", "64Mi")), spec(&burst("1", "128Mi")));
    let number = |spec: &PodSpec| qos::container_resources(spec, &spec.containers[0], 1 << 30, true);
    let allocated = after.containers[0].resources.clone().unwrap();
    let told = in_effect(&allocated, &number(&after), Some(&number(&before)));
    assert!(same(Some(&told), before.containers[0].resources.as_ref()), "{told:?}");
    assert_eq!(in_effect(&allocated, &number(&after), Some(&number(&after))), allocated);
    assert_eq!(in_effect(&allocated, &number(&after), None), allocated);
}

#[test]
fn an_event_says_what_is_asked_for() {
    let pod = pod(json!({ "spec": { "containers": [{ "name": "c", "resources": { "limits": { "cpu": "1" } } }] } }));
    let text = told("Pod resize Deferred", &pod, Some(3), Some("no room"));
    let (what, summary) = text.split_once(": ").unwrap();
    assert_eq!(what, "Pod resize Deferred");
    let expected = json!({ "containers": [{ "name": "c", "resources": { "limits": { "cpu": "1" } } }],
        "generation": 3, "error": "no room" });
    assert_eq!(serde_json::from_str::<Value>(summary).unwrap(), expected);
}

fn limits() -> impl Strategy<Value = (i64, i64)> {
    (1i64..20, 1i64..20)
}

proptest! {
    #[test]
    fn no_container_is_ever_promised_more_than_its_pod(
        containers in prop::collection::vec((limits(), limits()), 1..5),
    ) {
        let of = |(memory, quota): (i64, i64)| Resources {
            memory_limit: Some(memory), cpu_quota: Some(quota), cpu_period: Some(100_000), cpu_shares: Some(quota),
            ..Resources::default()
        };
        let sum = |each: Vec<(i64, i64)>| of(each.into_iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)));
        let (now, wanted): (Vec<_>, Vec<_>) = containers.iter().copied().unzip();
        let (now, wanted) = (sum(now), sum(wanted));
        let updates: Vec<_> = containers.iter().enumerate().map(|(at, (from, to))| Change::Update {
            id: at.to_string().into(), name: at.to_string(), from: of(*from), to: of(*to),
        }).collect();
        let mut pod = now.clone();
        let mut each: Vec<_> = containers.iter().map(|(from, _)| of(*from)).collect();
        let put = |target: &mut Resources, more: &Resources| {
            target.memory_limit = more.memory_limit.or(target.memory_limit);
            target.cpu_quota = more.cpu_quota.or(target.cpu_quota);
            target.cpu_shares = more.cpu_shares.or(target.cpu_shares);
        };
        for operation in operations(&now, &wanted, &updates) {
            match operation {
                Operation::Pod(more) => {
                    prop_assert!(more.cpu_quota.is_none() || more.cpu_period.is_some());
                    put(&mut pod, &more);
                }
                Operation::Container(id, more) => put(&mut each[id.as_str().parse::<usize>().unwrap()], &more),
            }
            for one in &each {
                prop_assert!(one.memory_limit <= pod.memory_limit && one.cpu_quota <= pod.cpu_quota);
            }
        }
        prop_assert_eq!(pod, wanted);
        for (one, (_, to)) in each.iter().zip(&containers) {
            prop_assert_eq!(one, &of(*to));
        }
    }

    #[test]
    fn what_is_granted_is_what_the_spec_then_says(cpu in 1i64..5000, memory in 1i64..1000, other in 1i64..5000) {
        let one = spec(&burst(&format!("{cpu}m"), &format!("{memory}Mi")));
        let two = spec(&burst(&format!("{other}m"), &format!("{memory}Mi")));
        let granted = Allocation::of(&one);
        prop_assert_eq!(granted.is_of(&two), cpu == other);
        prop_assert!(granted.is_of(&granted.over(&two)));
    }
}
