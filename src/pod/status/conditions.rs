//! The Pod's conditions.

use k8s_openapi::api::core::v1::{ContainerStatus as ApiContainerStatus, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::StatusInput;
use crate::pod::plan;

/// The conditions this node writes.
pub(super) const TYPES: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// The condition of a function Pod that tells its replicas.
pub(super) const REPLICAS: &str = "lambdalet.dev/Replicas";

/// Whether a condition holds, and if not why.
struct Verdict {
    holds: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Self {
        Self { holds: true, reason: None, message: None }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { holds: false, reason: Some(reason), message }
    }
}

/// Every condition this node writes; one whose status did not change keeps its transition time.
pub(super) fn all(
    input: &StatusInput<'_>,
    phase: &str,
    init: &[ApiContainerStatus],
    main: &[ApiContainerStatus],
) -> Vec<PodCondition> {
    let containers = containers_ready(phase, main);
    let ready = match (&containers.holds, unmet_gates(input)) {
        (true, unmet) if !unmet.is_empty() => {
            let text = format!("corresponding condition of pod readiness gate {unmet:?} does not exist.");
            Verdict::no("ReadinessGatesNotReady", Some(text))
        }
        _ => Verdict { holds: containers.holds, reason: containers.reason, message: containers.message.clone() },
    };
    let started = if input.ready_to_start { Verdict::yes() } else { Verdict { reason: None, ..Verdict::no("", None) } };
    let verdicts = [started, initialized(input, phase, init), ready, containers, Verdict::yes()];
    let mut list: Vec<_> =
        TYPES.iter().zip(verdicts).map(|(type_, verdict)| condition(input, type_, verdict)).collect();
    if let Some((holds, text)) = input.replicas {
        list.push(condition(input, REPLICAS, Verdict { holds, reason: None, message: Some(text.to_owned()) }));
    }
    list
}

fn condition(input: &StatusInput<'_>, type_: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    let before = input.pod.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == type_);
    let kept = before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(kept.unwrap_or(Time(input.now))),
        observed_generation: input.pod.metadata.generation,
        ..PodCondition::default()
    }
}

fn initialized(input: &StatusInput<'_>, phase: &str, init: &[ApiContainerStatus]) -> Verdict {
    let done = input.pod.spec.as_ref().is_none_or(|spec| plan::initialized(spec, input.observed));
    if phase == "Succeeded" {
        return Verdict { reason: Some("PodCompleted"), ..Verdict::yes() };
    }
    if done || init.is_empty() {
        return Verdict::yes();
    }
    let names = names(init);
    if names.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotInitialized", Some(format!("containers with incomplete status: [{names}]")))
}

fn containers_ready(phase: &str, main: &[ApiContainerStatus]) -> Verdict {
    match phase {
        "Succeeded" => Verdict::no("PodCompleted", None),
        "Failed" => Verdict::no("PodFailed", None),
        _ => {
            let names = names(main);
            if names.is_empty() {
                return Verdict::yes();
            }
            Verdict::no("ContainersNotReady", Some(format!("containers with unready status: [{names}]")))
        }
    }
}

/// Names of the containers that are not ready, as Go prints a list.
fn names(statuses: &[ApiContainerStatus]) -> String {
    statuses.iter().filter(|s| !s.ready).map(|s| s.name.as_str()).collect::<Vec<_>>().join(" ")
}

/// Readiness gates that nobody has set to True.
fn unmet_gates(input: &StatusInput<'_>) -> Vec<String> {
    let gates = input.pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten());
    let met = |type_: &str| {
        let mut conditions = input.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions.any(|c| c.type_ == type_ && c.status == "True")
    };
    gates.filter(|g| !met(&g.condition_type)).map(|g| g.condition_type.clone()).collect()
}
