//! Phases, conditions and reasons, by example.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, PodCondition, PodReadinessGate};
use proptest::prelude::*;

use super::*;
use crate::pod::probes::machine::Results;
use crate::runtime::types::{ContainerStatus, PodRef, SandboxState, SandboxStatus};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn reference() -> PodRef {
    PodRef { uid: "u".into(), namespace: "ns".into(), name: "p".into() }
}

fn pod(policy: &str, init: &[&str], main: &[&str]) -> Pod {
    let container =
        |name: &&str| Container { name: (*name).to_owned(), image: Some("i:1".into()), ..Container::default() };
    let spec = PodSpec {
        restart_policy: Some(policy.into()),
        init_containers: Some(init.iter().map(container).collect()),
        containers: main.iter().map(container).collect(),
        ..PodSpec::default()
    };
    let mut pod = Pod { spec: Some(spec), ..Pod::default() };
    pod.metadata.uid = Some("u".into());
    pod.metadata.generation = Some(3);
    pod
}

fn attempt(name: &str, number: u32, state: ContainerState, exit_code: i32) -> ContainerStatus {
    ContainerStatus {
        id: format!("{name}-{number}").into(),
        sandbox: "s".into(),
        pod: reference(),
        name: name.into(),
        attempt: number,
        state,
        created_at: at(0),
        started_at: Some(at(1)),
        finished_at: (state == ContainerState::Exited).then(|| at(2)),
        frozen: false,
        exit_code,
        oom_killed: false,
        message: String::new(),
        image: "sha256:1".into(),
        image_ref: "i:1".into(),
        pid: None,
        resources: None,
        annotations: BTreeMap::new(),
    }
}

/// A Pod's situation, with the parts most tests do not care about filled in.
struct Case {
    pod: Pod,
    observed: Observed,
    waiting: BTreeMap<String, Trouble>,
    messages: BTreeMap<ContainerId, String>,
    health: Health,
    ended: Option<Trouble>,
    terminal: bool,
    told: Option<PodStatus>,
}

impl Case {
    fn new(pod: Pod, attempts: Vec<ContainerStatus>) -> Self {
        let sandbox = SandboxStatus {
            id: "s".into(),
            pod: reference(),
            attempt: 0,
            state: SandboxState::Ready,
            created_at: at(0),
            addresses: Vec::new(),
            pid: None,
        };
        let observed = Observed::new(vec![sandbox], attempts);
        let (waiting, messages) = (BTreeMap::new(), BTreeMap::new());
        Self { pod, observed, waiting, messages, health: Health::default(), ended: None, terminal: false, told: None }
    }

    fn status(&self) -> PodStatus {
        pod_status(&StatusInput {
            pod: &self.pod,
            told: self.told.as_ref(),
            observed: &self.observed,
            ready_to_start: true,
            addresses: &[IpAddr::from([10, 0, 0, 2])],
            host_addresses: &[IpAddr::from([192, 0, 2, 1])],
            waiting: &self.waiting,
            messages: &self.messages,
            health: &self.health,
            ended: self.ended.as_ref(),
            terminal: self.terminal,
            notes: &[],
            cpu_quota: true,
            unready: false,
            replicas: None,
            runtime_name: "docker",
            start_time: at(0),
            now: at(10),
        })
    }
}

fn phase_of(case: &Case) -> String {
    case.status().phase.unwrap()
}

fn condition(status: &PodStatus, type_: &str) -> PodCondition {
    status.conditions.iter().flatten().find(|c| c.type_ == type_).cloned().unwrap()
}

#[test]
fn the_phase_follows_the_containers() {
    use ContainerState::{Exited, Running};
    for (policy, attempts, expected) in [
        ("Always", vec![], "Pending"),
        ("Always", vec![attempt("a", 0, Running, 0)], "Pending"),
        ("Always", vec![attempt("a", 0, Running, 0), attempt("b", 0, Running, 0)], "Running"),
        ("Always", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Exited, 1)], "Running"),
        ("Never", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Running, 0)], "Running"),
        ("Never", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Exited, 0)], "Succeeded"),
        ("Never", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Exited, 1)], "Failed"),
        ("OnFailure", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Exited, 1)], "Running"),
        ("OnFailure", vec![attempt("a", 0, Exited, 0), attempt("b", 0, Exited, 0)], "Succeeded"),
    ] {
        let text = format!("{policy} {attempts:?}");
        assert_eq!(phase_of(&Case::new(pod(policy, &[], &["a", "b"]), attempts)), expected, "{text}");
    }
}

#[test]
fn a_pod_that_has_ended_stays_ended() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    case.pod.status = Some(PodStatus { phase: Some("Failed".into()), ..PodStatus::default() });
    assert_eq!(phase_of(&case), "Failed");
}

#[test]
fn init_containers_keep_the_pod_pending_and_name_themselves() {
    let case = Case::new(pod("Always", &["i"], &["a"]), vec![attempt("i", 0, ContainerState::Running, 0)]);
    let status = case.status();
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let initialized = condition(&status, "Initialized");
    assert_eq!(
        (initialized.status.as_str(), initialized.reason.as_deref()),
        ("False", Some("ContainersNotInitialized"))
    );
    assert_eq!(initialized.message.as_deref(), Some("containers with incomplete status: [i]"));
    let waiting = status.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("PodInitializing"));
}

#[test]
fn a_crash_loop_shows_the_wait_and_how_the_last_run_ended() {
    let attempts = vec![attempt("a", 1, ContainerState::Exited, 1), attempt("a", 2, ContainerState::Exited, 3)];
    let mut case = Case::new(pod("Always", &[], &["a"]), attempts);
    case.waiting.insert("a".into(), crash_loop("a", &reference(), Duration::from_secs(80)));
    let status = case.status();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let container = &status.container_statuses.unwrap()[0];
    let waiting = container.state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(waiting.message.as_deref(), Some("back-off 1m20s restarting failed container=a pod=p_ns(u)"));
    assert_eq!(container.last_state.clone().unwrap().terminated.unwrap().exit_code, 3);
    assert_eq!(container.restart_count, 2);
}

#[test]
fn why_a_container_ended_is_told() {
    let oom = ContainerStatus { oom_killed: true, ..attempt("a", 0, ContainerState::Exited, 137) };
    let unstartable = ContainerStatus {
        message: "no such file".into(),
        started_at: None,
        ..attempt("a", 0, ContainerState::Exited, 128)
    };
    for (status, reason) in [
        (oom, "OOMKilled"),
        (unstartable, "StartError"),
        (attempt("a", 0, ContainerState::Exited, 0), "Completed"),
        (attempt("a", 0, ContainerState::Exited, 1), "Error"),
    ] {
        let case = Case::new(pod("Never", &[], &["a"]), vec![status]);
        let state = case.status().container_statuses.unwrap()[0].state.clone().unwrap().terminated.unwrap();
        assert_eq!(state.reason.as_deref(), Some(reason));
    }
}

#[test]
fn the_termination_message_is_passed_on() {
    let mut case = Case::new(pod("Never", &[], &["a"]), vec![attempt("a", 0, ContainerState::Exited, 1)]);
    case.messages.insert("a-0".into(), "out of cheese".into());
    let state = case.status().container_statuses.unwrap()[0].state.clone().unwrap().terminated.unwrap();
    assert_eq!(state.message.as_deref(), Some("out of cheese"));
}

#[test]
fn a_rejected_pod_is_failed_with_the_reason() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![]);
    case.ended = Some(Trouble::new("OutOfcpu", "Pod was rejected: …"));
    case.terminal = true;
    let status = case.status();
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("OutOfcpu")));
    assert_eq!(condition(&status, "Ready").reason.as_deref(), Some("PodFailed"));
}

#[test]
fn a_container_that_was_lost_is_said_to_be_unknown_when_the_pod_ends() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    case.pod.status = Some(case.status());
    case.observed = Observed::default();
    case.terminal = true;
    let state = case.status().container_statuses.unwrap()[0].state.clone().unwrap().terminated.unwrap();
    assert_eq!((state.reason.as_deref(), state.exit_code), (Some("ContainerStatusUnknown"), 137));
}

#[test]
fn readiness_gates_hold_ready_back_but_not_containers_ready() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    case.pod.spec.as_mut().unwrap().readiness_gates = Some(vec![PodReadinessGate { condition_type: "x/y".into() }]);
    let status = case.status();
    assert_eq!(condition(&status, "ContainersReady").status, "True");
    assert_eq!(condition(&status, "Ready").status, "False");
    let message = |status: &PodStatus| condition(status, "Ready").message.unwrap();
    assert_eq!(message(&status), "corresponding condition of pod readiness gate \"x/y\" does not exist.");
    let gate = |status: &str| PodCondition { type_: "x/y".into(), status: status.into(), ..PodCondition::default() };
    case.pod.status = Some(PodStatus { conditions: Some(vec![gate("False")]), ..PodStatus::default() });
    assert_eq!(message(&case.status()), "the status of pod readiness gate \"x/y\" is not \"True\", but False");
    case.pod.status = Some(PodStatus { conditions: Some(vec![gate("True")]), ..PodStatus::default() });
    assert_eq!(condition(&case.status(), "Ready").status, "True");
}

#[test]
fn started_and_ready_are_what_probes_say() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    for (started, ready, told) in [(false, true, false), (true, false, false), (true, true, true)] {
        case.health.put("a-0".into(), Results { started, ready, failed: None });
        let container = case.status().container_statuses.unwrap().remove(0);
        assert_eq!((container.started, container.ready), (Some(started), told));
        assert_eq!(condition(&case.status(), "Ready").status, if told { "True" } else { "False" });
    }
    case.observed = Observed::new(vec![], vec![attempt("a", 0, ContainerState::Exited, 1)]);
    let container = case.status().container_statuses.unwrap().remove(0);
    assert_eq!((container.started, container.ready), (Some(false), false), "whatever was found before");
}

#[test]
fn a_sidecar_counts_for_readiness_and_initialises_by_having_started() {
    use ContainerState::Running;
    let mut case = Case::new(pod("Always", &["s"], &["a"]), vec![attempt("s", 0, Running, 0)]);
    case.pod.spec.as_mut().unwrap().init_containers.as_mut().unwrap()[0].restart_policy = Some("Always".into());
    case.health.put("s-0".into(), Results { started: false, ready: true, failed: None });
    let text = "containers with incomplete status: [s]";
    assert_eq!(condition(&case.status(), "Initialized").message.as_deref(), Some(text));
    assert_eq!(phase_of(&case), "Pending");
    case.health.put("s-0".into(), Results { started: true, ready: false, failed: None });
    case.observed.put_container(attempt("a", 0, Running, 0));
    let status = case.status();
    assert_eq!((condition(&status, "Initialized").status.as_str(), phase_of(&case).as_str()), ("True", "Running"));
    let text = "containers with unready status: [s]";
    assert_eq!(condition(&status, "ContainersReady").message.as_deref(), Some(text));
}

#[test]
fn a_status_is_the_same_until_the_api_server_shows_it() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    let dated = |status: &PodStatus, second| {
        let mut status = status.clone();
        status.conditions.as_mut().unwrap().iter_mut().for_each(|c| c.last_transition_time = Some(Time(at(second))));
        status
    };
    let told = dated(&case.status(), 5);
    // It still shows the one before, or the one before that.
    for shown in [None, Some(dated(&told, 4)), Some(told.clone())] {
        (case.pod.status, case.told) = (shown, Some(told.clone()));
        assert_eq!(case.status(), told);
    }
}

#[test]
fn a_condition_keeps_its_transition_time_until_it_changes() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    let mut before = case.status();
    before.conditions.as_mut().unwrap().iter_mut().for_each(|c| c.last_transition_time = Some(Time(at(-100))));
    case.pod.status = Some(before);
    assert_eq!(condition(&case.status(), "Ready").last_transition_time, Some(Time(at(-100))));
    case.observed = Observed::new(vec![], vec![attempt("a", 0, ContainerState::Exited, 1)]);
    assert_eq!(condition(&case.status(), "Ready").last_transition_time, Some(Time(at(10))));
}

#[test]
fn a_foreign_writer_is_noticed() {
    let mut case = Case::new(pod("Always", &[], &["a"]), vec![attempt("a", 0, ContainerState::Running, 0)]);
    let computed = case.status();
    let mut reported = computed.clone();
    case.pod.status = Some(reported.clone());
    assert!(same_as_reported(&case.pod, &computed));
    let conditions = reported.conditions.as_mut().unwrap();
    conditions.iter_mut().filter(|c| c.type_ == "Ready").for_each(|c| c.status = "False".into());
    case.pod.status = Some(reported);
    assert!(!same_as_reported(&case.pod, &computed));
}

proptest! {
    #[test]
    fn every_status_is_whole_and_consistent(
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        states in prop::collection::vec((0u8..4, 0i32..3), 1..4),
        terminal in any::<bool>(),
    ) {
        let names = ["a", "b", "c"];
        let attempts: Vec<_> = states.iter().zip(names).filter_map(|((state, code), name)| match state {
            0 => None,
            1 => Some(attempt(name, 0, ContainerState::Created, 0)),
            2 if !terminal => Some(attempt(name, 0, ContainerState::Running, 0)),
            _ => Some(attempt(name, 0, ContainerState::Exited, *code)),
        }).collect();
        let mut case = Case::new(pod(policy, &[], &names[..states.len()]), attempts);
        case.terminal = terminal;
        let status = case.status();
        let phase = status.phase.clone().unwrap();
        if terminal {
            prop_assert!(phase == "Succeeded" || phase == "Failed");
        }
        let ready = condition(&status, "Ready").status == "True";
        let containers = status.container_statuses.clone().unwrap();
        prop_assert_eq!(ready, containers.iter().all(|c| c.ready) && phase == "Running");
        for container in containers {
            let state = container.state.unwrap();
            let set = [state.waiting.is_some(), state.running.is_some(), state.terminated.is_some()];
            prop_assert_eq!(set.iter().filter(|s| **s).count(), 1);
        }
        prop_assert!(status.conditions.unwrap().iter().all(|c| c.observed_generation == Some(3)));
    }
}
