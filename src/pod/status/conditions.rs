//! The Pod's conditions.

use k8s_openapi::api::core::v1::{ContainerStatus as ApiContainerStatus, PodCondition, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::StatusInput;
use crate::pod::plan;
use crate::pod::qos::is_sidecar;
use crate::pod::resize::Note;

/// The conditions this node writes.
pub(super) const TYPES: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// The condition of a Pod with a rule that restarts every container: it holds while what ran before ends.
const RESTARTING: &str = "AllContainersRestarting";

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
    let sidecars = init.iter().filter(|status| is_one_of_sidecars(input, status));
    let containers = containers_ready(phase, sidecars.chain(main));
    let ready = match (&containers.holds, unmet_gates(input)) {
        (true, unmet) if !unmet.is_empty() => Verdict::no("ReadinessGatesNotReady", Some(unmet.join(", "))),
        _ => Verdict { holds: containers.holds, reason: containers.reason, message: containers.message.clone() },
    };
    let started = if input.ready_to_start { Verdict::yes() } else { Verdict { reason: None, ..Verdict::no("", None) } };
    let verdicts = [started, initialized(input, phase, init), ready, containers, Verdict::yes()];
    let mut list: Vec<_> =
        TYPES.iter().zip(verdicts).map(|(type_, verdict)| condition(input, type_, verdict)).collect();
    if let Some(spec) = input.pod.spec.as_ref().filter(|spec| plan::may_restart_all(spec)) {
        list.push(condition(input, RESTARTING, restarting(input, spec)));
    }
    if let Some((holds, text)) = input.replicas {
        list.push(condition(input, REPLICAS, Verdict { holds, reason: None, message: Some(text.to_owned()) }));
    }
    list.extend(input.notes.iter().map(|note| noted(input, note)));
    list
}

fn restarting(input: &StatusInput<'_>, spec: &PodSpec) -> Verdict {
    if !plan::is_resetting(spec, input.observed) {
        return Verdict { holds: false, reason: None, message: None };
    }
    let text = "container exited with restart policy rule".to_owned();
    Verdict { holds: true, reason: Some("RestartAllContainersStarted"), message: Some(text) }
}

fn noted(input: &StatusInput<'_>, note: &Note) -> PodCondition {
    let trouble = note.trouble.clone();
    let (reason, message) = trouble.map_or((None, None), |trouble| (Some(trouble.reason), Some(trouble.message)));
    let plain = condition(input, note.type_, Verdict::yes());
    PodCondition { reason, message, observed_generation: note.generation, ..plain }
}

fn condition(input: &StatusInput<'_>, type_: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    // What was told last comes first. The other follows behind by what is under way: a status made of that would differ from
    // the one told, and be told, for ever.
    let statuses = input.told.into_iter().chain(&input.pod.status);
    let before = statuses.flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == type_);
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
    let done = input.pod.spec.as_ref().is_none_or(|spec| plan::initialized(spec, input.observed, input.health));
    if phase == "Succeeded" {
        return Verdict { reason: Some("PodCompleted"), ..Verdict::yes() };
    }
    if done || init.is_empty() {
        return Verdict::yes();
    }
    let unfinished = |status: &&ApiContainerStatus| match is_one_of_sidecars(input, status) {
        true => status.started != Some(true),
        false => !status.ready,
    };
    let names = names(init.iter().filter(unfinished));
    if names.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotInitialized", Some(format!("containers with incomplete status: [{names}]")))
}

fn is_one_of_sidecars(input: &StatusInput<'_>, status: &ApiContainerStatus) -> bool {
    let mut init = input.pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    init.any(|container| container.name == status.name && is_sidecar(container))
}

/// Of sidecars and main containers.
fn containers_ready<'a>(phase: &str, lasting: impl Iterator<Item = &'a ApiContainerStatus>) -> Verdict {
    match phase {
        "Succeeded" => Verdict::no("PodCompleted", None),
        "Failed" => Verdict::no("PodFailed", None),
        _ => {
            let names = names(lasting.filter(|status| !status.ready));
            if names.is_empty() {
                return Verdict::yes();
            }
            Verdict::no("ContainersNotReady", Some(format!("containers with unready status: [{names}]")))
        }
    }
}

/// Names of containers, as Go prints a list.
fn names<'a>(statuses: impl Iterator<Item = &'a ApiContainerStatus>) -> String {
    statuses.map(|s| s.name.as_str()).collect::<Vec<_>>().join(" ")
}

/// What keeps each readiness gate closed that nobody has set to True.
fn unmet_gates(input: &StatusInput<'_>) -> Vec<String> {
    let gates = input.pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten()).map(|gate| &gate.condition_type);
    let unmet = gates.filter_map(|gate| {
        let mut conditions = input.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        match conditions.find(|c| c.type_ == *gate).map(|c| c.status.as_str()) {
            None => Some(format!("corresponding condition of pod readiness gate {gate:?} does not exist.")),
            Some("True") => None,
            Some(status) => Some(format!("the status of pod readiness gate {gate:?} is not \"True\", but {status}")),
        }
    });
    unmet.collect()
}
