//! What is started again after its end, and when a Pod has run to its own: pure.
//!
//! The first rule of a container that names its exit code decides, then the container's own policy, then the Pod's
//! ("Individual container restart policy and rules", Kubernetes documentation; KEP-5307).

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerRestartRule, Pod, PodSpec};

use crate::pod::observed::Observed;
use crate::pod::probes::Health;
use crate::pod::qos::is_sidecar;
use crate::runtime::types::{ContainerState, ContainerStatus};

/// The action of a rule that restarts every container of the Pod, init containers included (KEP-5532).
const RESTART_ALL: &str = "RestartAllContainers";

/// `spec.restartPolicy`, `Always` if unset.
pub fn restart_policy(spec: &PodSpec) -> &str {
    spec.restart_policy.as_deref().unwrap_or("Always")
}

/// The policy that holds for one container.
fn policy<'a>(spec: &'a PodSpec, container: &'a Container) -> &'a str {
    container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(spec))
}

/// Whether a container that is killed for its health is started again, its rules aside.
pub fn restarts_on_failure(spec: &PodSpec, container: &Container) -> bool {
    policy(spec, container) != "Never"
}

/// Whether the attempt is of another image than the spec names by now. Of what a container is, a kubelet looks at nothing
/// else: it is all that the API lets be changed and that does not change what runs already. Init containers that end by
/// themselves are left alone.
pub fn is_outdated(spec: &PodSpec, status: &ContainerStatus) -> bool {
    let mut lasting = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)).chain(&spec.containers);
    let named =
        lasting.find(|container| container.name == status.name).and_then(|container| container.image.as_deref());
    named.is_some_and(|image| image != status.image_ref)
}

/// Whether an exited container is started again. An init container that succeeded is not, whatever the policy.
pub(super) fn restarts(spec: &PodSpec, container: &Container, status: &ContainerStatus, health: &Health) -> bool {
    if health.is_replaced(&status.id) {
        return true;
    }
    if health.has_killed(&status.id) && restarts_on_failure(spec, container) {
        return true;
    }
    let code = status.exit_code;
    let init = spec.init_containers.iter().flatten().any(|c| c.name == container.name);
    if init && is_sidecar(container) {
        return true;
    }
    if init && code == 0 {
        return false;
    }
    if container.restart_policy_rules.iter().flatten().any(|rule| applies(rule, code)) {
        return true;
    }
    match policy(spec, container) {
        "Never" => false,
        "OnFailure" => code != 0,
        _ => true,
    }
}

/// Whether one of the container's rules restarts every container of the Pod after that exit code.
fn restarts_all(container: &Container, code: i32) -> bool {
    let first = container.restart_policy_rules.iter().flatten().find(|rule| applies(rule, code));
    first.is_some_and(|rule| rule.action == RESTART_ALL)
}

/// Whether the spec has a rule that restarts every container.
pub fn may_restart_all(spec: &PodSpec) -> bool {
    let rules = lasting(spec).flat_map(|container| container.restart_policy_rules.iter().flatten());
    rules.into_iter().any(|rule| rule.action == RESTART_ALL)
}

fn lasting(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers)
}

/// When a rule last had every container of the Pod begin anew: what was made before does not count any more.
pub(super) fn reset_at(spec: &PodSpec, observed: &Observed) -> Option<Timestamp> {
    let ruled = lasting(spec).filter(|container| container.restart_policy_rules.is_some());
    let ends = ruled.flat_map(|container| {
        let attempts = observed.attempts(&container.name).iter();
        let asked = attempts.filter(|s| s.state == ContainerState::Exited && restarts_all(container, s.exit_code));
        asked.map(|s| s.finished_at.unwrap_or(s.created_at))
    });
    ends.max()
}

/// The newest attempt of a container in the present sandbox, unless a rule has done away with it.
pub(super) fn present<'a>(spec: &PodSpec, observed: &'a Observed, name: &str) -> Option<&'a ContainerStatus> {
    observed.current(name).filter(|status| counts(spec, observed, status))
}

/// Whether the attempt was made after the last moment at which everything began anew.
pub(super) fn counts(spec: &PodSpec, observed: &Observed, status: &ContainerStatus) -> bool {
    reset_at(spec, observed).is_none_or(|reset| status.created_at > reset)
}

/// Whether what a rule has done away with still runs.
pub fn is_resetting(spec: &PodSpec, observed: &Observed) -> bool {
    let of_pod = |name: &str| lasting(spec).any(|container| container.name == name);
    observed.running().any(|status| of_pod(&status.name) && !counts(spec, observed, status))
}

/// Whether the rule restarts after that exit code.
fn applies(rule: &ContainerRestartRule, code: i32) -> bool {
    let known = matches!(rule.action.as_str(), "Restart" | RESTART_ALL);
    let Some(codes) = rule.exit_codes.as_ref().filter(|_| known) else { return false };
    let named = codes.values.iter().flatten().any(|value| *value == code);
    match codes.operator.as_str() {
        "In" => named,
        "NotIn" => !named,
        _ => false,
    }
}

/// Whether an exited container of this Pod is started again.
pub fn would_restart(pod: &Pod, status: &ContainerStatus, health: &Health) -> bool {
    let Some(spec) = &pod.spec else { return false };
    lasting(spec).find(|c| c.name == status.name).is_some_and(|container| restarts(spec, container, status, health))
}

/// How a Pod ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// Every container ended with code 0.
    Succeeded,
    /// At least one did not, and none is restarted.
    Failed,
}

/// Whether the Pod has run to its end: nothing of it is started again. Sidecars neither hold it up nor count.
pub fn finished(spec: &PodSpec, observed: &Observed, health: &Health) -> Option<Finish> {
    let ended = |c: &Container| {
        let exited = observed.latest(&c.name).filter(|s| s.state == ContainerState::Exited);
        exited.filter(|s| !restarts(spec, c, s, health) && counts(spec, observed, s)).map(|s| s.exit_code)
    };
    if spec.init_containers.iter().flatten().filter_map(ended).any(|code| code != 0) {
        return Some(Finish::Failed);
    }
    let ends: Option<Vec<i32>> = spec.containers.iter().map(ended).collect();
    let ends = ends.filter(|ends| !ends.is_empty())?;
    Some(if ends.iter().all(|code| *code == 0) { Finish::Succeeded } else { Finish::Failed })
}
