//! The end of Pods, asked for in every way and at every moment.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{DeleteParams, Preconditions};
use kube::runtime::watcher::watch_object;
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::harness::http::get;
use crate::harness::node::output;
use crate::harness::pods::{
    STAY, busybox, container, exit_code, is_ready, pod_ip, restarts, sleeper, status, terminated, waits_for,
};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_shared_node};

/// Deletes a Pod and returns it as it was last seen before its object went away, and how long that took.
async fn last_seen(t: &Case, name: &str, grace: Option<u32>) -> (Pod, Duration) {
    use futures::StreamExt as _;
    let mut changes = std::pin::pin!(watch_object(t.api::<Pod>(), name));
    let mut last = changes.next().await.unwrap().unwrap();
    let began = Instant::now();
    t.delete(name, grace).await;
    let gone = async {
        while let Some(change) = changes.next().await {
            match change.unwrap() {
                Some(pod) => last = Some(pod),
                None => return,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap_or_else(|_| panic!("{name} stays"));
    (last.unwrap(), began.elapsed())
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_heeds_sigterm_ends_with_its_own_code_and_at_once() {
    on_shared_node(async |t| {
        t.pod("polite", json!({"containers": [busybox("trap 'exit 7' TERM; while true; do sleep 3600 & wait; done")]}))
            .await;
        t.running("polite").await;
        let (pod, took) = last_seen(t, "polite", None).await;
        assert_eq!(exit_code(&pod, "main"), Some(7), "the final status is written before the object goes");
        assert!(took < Duration::from_secs(10), "its grace is 30 s, but it took {took:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_ignores_sigterm_is_killed_when_its_grace_is_over() {
    on_shared_node(async |t| {
        let spec = json!({"terminationGracePeriodSeconds": 3, "containers": [busybox("trap '' TERM; while true; do sleep 1; done")]});
        t.pod("stubborn", spec).await;
        t.running("stubborn").await;
        let (pod, took) = last_seen(t, "stubborn", None).await;
        assert_eq!(exit_code(&pod, "main"), Some(137), "killed");
        assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(20), "{took:?} for a grace of 3 s");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn all_containers_share_one_grace_period() {
    on_shared_node(async |t| {
        let deaf = "trap '' TERM; while true; do sleep 1; done";
        let containers = json!([container("a", deaf), container("b", deaf), container("c", deaf)]);
        t.pod("three", json!({"terminationGracePeriodSeconds": 6, "containers": containers})).await;
        t.running("three").await;
        let (_, took) = last_seen(t, "three", None).await;
        assert!(took < Duration::from_secs(16), "6 s each would be 18: {took:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_grace_in_the_request_wins_over_the_specs() {
    on_shared_node(async |t| {
        let spec = json!({"terminationGracePeriodSeconds": 300, "containers": [busybox("trap '' TERM; while true; do sleep 1; done")]});
        t.pod("long", spec).await;
        t.running("long").await;
        let (pod, took) = last_seen(t, "long", Some(2)).await;
        assert_eq!(exit_code(&pod, "main"), Some(137));
        assert!(took < Duration::from_secs(60), "{took:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_second_deletion_with_less_grace_is_heeded() {
    on_shared_node(async |t| {
        let spec = json!({"terminationGracePeriodSeconds": 300, "containers": [busybox("trap '' TERM; while true; do sleep 1; done")]});
        t.pod("long", spec).await;
        t.running("long").await;
        t.delete("long", None).await;
        t.event("long", "Killing").await;
        let began = Instant::now();
        t.delete("long", Some(1)).await;
        t.gone("long", Duration::from_secs(60)).await;
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_forced_deletion_removes_the_object_at_once_and_the_containers_soon() {
    on_shared_node(async |t| {
        t.pod("forced", json!({"containers": [busybox("trap '' TERM; while true; do sleep 1; done")]})).await;
        t.running("forced").await;
        let began = Instant::now();
        t.delete("forced", Some(0)).await;
        t.gone("forced", SOON).await;
        t.nothing_remains().await;
        assert!(began.elapsed() < Duration::from_secs(25), "its grace was 30 s: {:?}", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_made_anew_under_the_same_name_at_once_lives() {
    on_shared_node(async |t| {
        let mut uids = Vec::new();
        for round in 0..5 {
            let pod = t.pod("again", sleeper()).await;
            uids.push(pod.uid().unwrap());
            let running = t.running("again").await;
            assert_eq!(running.uid(), pod.uid(), "round {round}");
            if round < 4 {
                t.delete("again", Some(0)).await;
            }
        }
        t.pod("other", sleeper()).await;
        t.running("other").await;
        let pod = t.api::<Pod>().get("again").await.unwrap();
        assert!(is_ready(&pod) && pod.uid().as_ref() == uids.last(), "what ended the earlier ones left it alone");
        assert_eq!(restarts(&pod, "main"), 0);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_address_is_not_given_to_another_pod_while_it_cools_down() {
    on_shared_node(async |t| {
        t.pod("before", sleeper()).await;
        let address = pod_ip(&t.running("before").await).to_owned();
        t.delete("before", Some(0)).await;
        t.gone("before", SOON).await;
        for number in 0..5 {
            t.pod(&format!("after-{number}"), sleeper()).await;
        }
        for number in 0..5 {
            let pod = t.running(&format!("after-{number}")).await;
            assert_ne!(pod_ip(&pod), address);
        }
        let nobody = get(&format!("{address}:8080"), "/").await.unwrap_err();
        assert!(nobody.starts_with("connecting to"), "somebody answers at a dead address: {nobody}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn deleting_a_namespace_ends_all_of_its_pods() {
    on_shared_node(async |t| {
        for name in ["one", "two", "three"] {
            let mut spec = sleeper();
            spec["terminationGracePeriodSeconds"] = json!(2);
            t.pod(name, spec).await;
        }
        for name in ["one", "two", "three"] {
            t.running(name).await;
        }
        let namespaces: Api<Namespace> = Api::all(t.client.clone());
        namespaces.delete(&t.namespace, &DeleteParams::default()).await.unwrap();
        for name in ["one", "two", "three"] {
            t.gone(name, SOON).await;
        }
        t.nothing_remains().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_during_an_image_pull_is_not_held_up_by_it() {
    on_shared_node(async |t| {
        // Nobody answers there, so the pull takes until some deadline of the daemon's.
        let main = json!({"name": "main", "image": "192.0.2.254:5000/nothing/here:1"});
        t.pod("pulling", json!({"containers": [main]})).await;
        t.event("pulling", "Pulling").await;
        let began = Instant::now();
        t.delete("pulling", None).await;
        t.gone("pulling", SOON).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_during_a_crash_loop_is_not_held_up_by_it() {
    on_shared_node(async |t| {
        t.pod("crash", json!({"containers": [busybox("exit 1")]})).await;
        t.until("crash", "in CrashLoopBackOff", |p| waits_for(p, "main") == Some("CrashLoopBackOff")).await;
        let (pod, took) = last_seen(t, "crash", None).await;
        assert!(took < Duration::from_secs(9), "its back-off is 10 s and more: {took:?}");
        assert_eq!(terminated(&pod, "main").map(|t| t.exit_code), Some(1), "its last end is its final state");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_during_an_init_container_starts_nothing_else() {
    on_shared_node(async |t| {
        let spec = json!({"initContainers": [container("setup", STAY)], "containers": [busybox(STAY)]});
        t.pod("early", spec).await;
        let busy = |p: &Pod| status(p, "setup").is_some_and(|s| s.state.as_ref().unwrap().running.is_some());
        t.until("early", "in its init container", busy).await;
        let (pod, took) = last_seen(t, "early", None).await;
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(exit_code(&pod, "setup"), Some(0), "it heeds SIGTERM");
        assert!(status(&pod, "main").unwrap().container_id.is_none(), "it was never made");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_right_after_the_creation_leaves_nothing() {
    on_shared_node(async |t| {
        for round in 0..8 {
            let name = format!("brief-{round}");
            t.pod(&name, sleeper()).await;
            // Each round meets the node a little later in the Pod's start.
            let moment = Duration::from_millis(40 * round);
            tokio::time::sleep(moment).await;
            t.delete(&name, Some(1)).await;
        }
        for round in 0..8 {
            t.gone(&format!("brief-{round}"), SOON).await;
        }
        t.nothing_remains().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_that_has_ended_keeps_its_logs_until_it_is_deleted() {
    on_shared_node(async |t| {
        t.run_pod("done", json!({"containers": [busybox("echo remembered")]})).await;
        assert_eq!(t.log("done", "main").await, "remembered\n");
        t.delete("done", None).await;
        t.gone("done", Duration::from_secs(10)).await;
        t.nothing_remains().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_ended_pod_gives_up_its_network_and_volumes() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"a": "1"})).await;
        let volumes = json!([{"name": "v", "configMap": {"name": "settings"}}]);
        let pod = t.run_pod("done", json!({"volumes": volumes, "containers": [busybox("true")]})).await;
        let uid = pod.uid().unwrap();
        poll("without its volumes", SOON, async || {
            let secrets = t.node.root.join("secrets").join(&uid);
            if secrets.exists() { Err(format!("{} exists", secrets.display())) } else { Ok(()) }
        })
        .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_meant_for_an_earlier_pod_does_not_hit_the_present_one() {
    on_shared_node(async |t| {
        let first = t.pod("name", sleeper()).await;
        t.running("name").await;
        t.delete("name", Some(0)).await;
        t.gone("name", SOON).await;
        t.pod("name", sleeper()).await;
        t.running("name").await;
        let preconditions = Preconditions { uid: first.uid(), resource_version: None };
        let stale = DeleteParams::default().preconditions(preconditions);
        let refused = t.api::<Pod>().delete("name", &stale).await.unwrap_err();
        assert!(matches!(&refused, kube::Error::Api(status) if status.code == 409), "{refused}");
        nothing_happens_to(t, "name").await;
    });
}

/// The clean-up of an earlier Pod of this name is over, and this one still runs untouched.
async fn nothing_happens_to(t: &Case, name: &str) {
    let pod = t.api::<Pod>().get(name).await.unwrap();
    let uid = pod.uid().unwrap();
    poll("only one Pod of this name on the host", SOON, async || {
        let label = format!("label=lambdalet.dev/pod-namespace={}", t.namespace);
        let format = "{{.Label \"lambdalet.dev/pod-uid\"}}";
        let uids = output("docker", &["ps", "-a", "--filter", &label, "--format", format]);
        if uids.lines().all(|line| line == uid) { Ok(()) } else { Err(uids) }
    })
    .await;
    assert!(is_ready(&t.api::<Pod>().get(name).await.unwrap()));
}
