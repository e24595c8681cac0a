//! What the API server is told of a Pod: pure, from what the runtime holds.
//!
//! Phase, conditions and container states follow the Kubernetes API convention documents ("Pod Lifecycle",
//! "PodStatus v1 core"); reasons and messages are the ones a kubelet writes, since people and controllers match them.

mod conditions;
mod containers;
mod ephemeral;
pub(super) mod function;

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerStatus as ApiContainerStatus, HostIP, Pod, PodIP, PodSpec, PodStatus, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub(super) use self::containers::crash_loop;
pub(super) use self::function::Shown;
use super::observed::Observed;
use super::plan::{self, Finish};
use super::probes::Health;
use super::qos::{self, ResourceList, qos_class};
use super::resize::Note;
use crate::runtime::types::{ContainerId, ContainerState};

/// Why something is not as it should be: a reason in CamelCase and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// `ErrImagePull`, `CreateContainerConfigError`, `Evicted`, …
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Trouble {
    /// From a reason and a message.
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }
}

/// Everything a status is computed from.
#[derive(Clone, Copy, Debug)]
pub struct StatusInput<'a> {
    /// The Pod, with the status that the API server was last seen to have.
    pub pod: &'a Pod,
    /// The status that it was told last, which it may not show yet.
    pub told: Option<&'a PodStatus>,
    /// What the runtime holds.
    pub observed: &'a Observed,
    /// Whether volumes and sandbox are there and were not given back.
    pub ready_to_start: bool,
    /// The Pod's addresses, also after its sandbox is gone.
    pub addresses: &'a [IpAddr],
    /// The node's addresses, the primary first.
    pub host_addresses: &'a [IpAddr],
    /// Why a container waits, where that is not plain creation.
    pub waiting: &'a BTreeMap<String, Trouble>,
    /// What containers left at their terminationMessagePath.
    pub messages: &'a BTreeMap<ContainerId, String>,
    /// What probes say.
    pub health: &'a Health,
    /// Why the Pod was ended by this node (rejected, past its deadline, evicted).
    pub ended: Option<&'a Trouble>,
    /// Every process has ended and none will start again.
    pub terminal: bool,
    /// The scheme of container ids (`docker`).
    pub runtime_name: &'a str,
    /// Conditions that are there only while they hold.
    pub notes: &'a [Note],
    /// Whether CPU limits are enforced.
    pub cpu_quota: bool,
    /// Running containers are not ready.
    pub unready: bool,
    /// The condition `lambdalet.dev/Replicas` of a function Pod: whether it holds, and its text.
    pub replicas: Option<(bool, &'a str)>,
    /// When this node first saw the Pod.
    pub start_time: Timestamp,
    /// Now.
    pub now: Timestamp,
}

/// The status to publish.
pub fn pod_status(input: &StatusInput<'_>) -> PodStatus {
    let empty = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&empty);
    let init_statuses: Vec<_> =
        spec.init_containers.iter().flatten().map(|c| containers::status(input, c, true)).collect();
    let statuses: Vec<_> = spec.containers.iter().map(|c| containers::status(input, c, false)).collect();
    let ephemeral: Vec<_> = super::ephemeral::all(spec).map(|c| ephemeral::status(input, c)).collect();
    let phase = phase(input, spec, &statuses);
    let conditions = conditions::all(input, phase, &init_statuses, &statuses);
    let previous = input.pod.status.as_ref();
    let on_host_network = spec.host_network == Some(true);
    let addresses = if on_host_network { input.host_addresses } else { input.addresses };
    PodStatus {
        phase: Some(phase.to_owned()),
        reason: input.ended.map(|t| t.reason.clone()),
        message: input.ended.map(|t| t.message.clone()),
        conditions: Some(conditions),
        host_ip: input.host_addresses.first().map(ToString::to_string),
        host_ips: Some(input.host_addresses.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: addresses.first().map(ToString::to_string),
        pod_ips: (!addresses.is_empty()).then(|| addresses.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        qos_class: Some(qos_class(spec).to_owned()),
        allocated_resources: api_list(qos::pod_requests(spec)),
        resources: resources(spec),
        start_time: Some(previous.and_then(|s| s.start_time.clone()).unwrap_or(Time(input.start_time))),
        observed_generation: input.pod.metadata.generation,
        init_container_statuses: Some(init_statuses).filter(|list| !list.is_empty()),
        container_statuses: Some(statuses),
        ephemeral_container_statuses: Some(ephemeral).filter(|list| !list.is_empty()),
        ..PodStatus::default()
    }
}

/// What the Pod as a whole was granted.
fn resources(spec: &PodSpec) -> Option<ResourceRequirements> {
    let (requests, limits) = (api_list(qos::pod_requests(spec)), api_list(qos::pod_limits(spec)));
    (requests.is_some() || limits.is_some()).then_some(ResourceRequirements { requests, limits, claims: None })
}

fn api_list(list: ResourceList) -> Option<BTreeMap<String, ApiQuantity>> {
    (!list.is_empty()).then(|| list.into_iter().map(|(name, amount)| (name, amount.into())).collect())
}

/// The phase, as the kubelet derives it from container states.
fn phase(input: &StatusInput<'_>, spec: &PodSpec, statuses: &[ApiContainerStatus]) -> &'static str {
    if let Some(reported @ ("Succeeded" | "Failed")) = reported_phase(input.pod) {
        // A Pod that has ended stays ended: controllers have acted on it.
        return if reported == "Succeeded" { "Succeeded" } else { "Failed" };
    }
    if input.ended.is_some() {
        return if input.terminal { "Failed" } else { running_or_pending(input, spec, statuses) };
    }
    // A function goes on whatever its restart policy says. Where an ephemeral container still runs, a Pod has ended once
    // that has been ended too: nothing of a terminal Pod runs.
    let over = input.replicas.is_none() && input.observed.running().next().is_none();
    match plan::finished(spec, input.observed, input.health).filter(|_| over) {
        Some(Finish::Succeeded) => return "Succeeded",
        Some(Finish::Failed) => return "Failed",
        None => {}
    }
    if input.terminal {
        let clean = |s: &ApiContainerStatus| {
            s.state.as_ref().and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0)
        };
        return if statuses.iter().all(clean) { "Succeeded" } else { "Failed" };
    }
    running_or_pending(input, spec, statuses)
}

fn running_or_pending(input: &StatusInput<'_>, spec: &PodSpec, statuses: &[ApiContainerStatus]) -> &'static str {
    let never_started = |s: &ApiContainerStatus| {
        s.state.as_ref().is_none_or(|s| s.waiting.is_some())
            && s.last_state.as_ref().is_none_or(|s| s.terminated.is_none())
    };
    let waits_for_init = !plan::initialized(spec, input.observed, input.health)
        && spec.init_containers.as_ref().is_some_and(|list| !list.is_empty());
    if waits_for_init || statuses.iter().any(never_started) { "Pending" } else { "Running" }
}

/// `status.phase` as the API server has it.
pub fn reported_phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

/// Whether the API server already knows that the Pod has ended.
pub fn is_terminal(pod: &Pod) -> bool {
    matches!(reported_phase(pod), Some("Succeeded" | "Failed"))
}

/// Whether what the API server holds says the same as what was computed here, as far as this node decides it.
///
/// Another writer (the node controller marks Pods not ready while a node is silent) makes them differ, and then ours is
/// written again.
pub fn same_as_reported(pod: &Pod, computed: &PodStatus) -> bool {
    let Some(reported) = &pod.status else { return false };
    let ours = |status: &PodStatus| -> Vec<(String, String)> {
        let owned = status.conditions.iter().flatten().filter(|c| conditions::TYPES.contains(&c.type_.as_str()));
        let mut list: Vec<_> = owned.map(|c| (c.type_.clone(), c.status.clone())).collect();
        list.sort();
        list
    };
    reported.phase == computed.phase
        && reported.pod_ip == computed.pod_ip
        && ours(reported) == ours(computed)
        && reported.container_statuses.as_ref().map(Vec::len) == computed.container_statuses.as_ref().map(Vec::len)
        && reported.ephemeral_container_statuses.as_ref().map(Vec::len)
            == computed.ephemeral_container_statuses.as_ref().map(Vec::len)
}

/// The status without how busy the replicas of a function are; how many there are stays.
pub(super) fn without_load(status: &PodStatus) -> PodStatus {
    let mut status = status.clone();
    let replicas = status.conditions.iter_mut().flatten().filter(|condition| condition.type_ == conditions::REPLICAS);
    for text in replicas.filter_map(|condition| condition.message.as_mut()) {
        *text = text.split(", ").take(2).collect::<Vec<_>>().join(", ");
    }
    status
}

/// Whether a container is up.
fn is_running(state: ContainerState) -> bool {
    state == ContainerState::Running
}

#[cfg(test)]
mod tests;
