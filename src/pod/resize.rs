//! In-place resize: what runs is given other limits of CPU and memory. Pure.
//!
//! ```text
//! spec: what is wanted --admission::claims: is there room?--> allocated --changes, operations--> limits in effect
//!                              '--no--> PodResizePending            '--told--> PodResizeInProgress
//! ```
//! Everything but the first question goes by what is allocated. The rules and the texts are the kubelet's (Kubernetes
//! documentation, "Resize CPU and Memory Resources assigned to Containers"; KEP-1287, and KEP-5419 for `spec.resources`).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use serde_json::{Map, Value, json};

use super::observed::Observed;
use super::qos::{self, ResourceList};
use super::status::Trouble;
use super::translate::Host;
use crate::quantity::Quantity;
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus, Resources};

/// The condition of a Pod whose resize has to wait, or can never be.
pub const PENDING: &str = "PodResizePending";
/// The condition of a Pod whose resize is being carried out.
pub const IN_PROGRESS: &str = "PodResizeInProgress";
/// CPU time per period of a core's thousandth, in microseconds, and cgroup weight of a core; as in [`qos`].
const MICROSECONDS_PER_MILLI: i64 = 100;
const SHARES_PER_CORE: i64 = 1024;
/// What a container remembers of the resources it was made with, where its resizePolicy wants a restart for a change.
const REMEMBERED: [(&str, &str); 2] = [("cpu", "restart-for-cpu"), ("memory", "restart-for-memory")];

type ApiList = BTreeMap<String, ApiQuantity>;

/// A condition of a Pod that is there only while it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// [`PENDING`] or [`IN_PROGRESS`].
    pub type_: &'static str,
    /// Reason and message, if there is something to say.
    pub trouble: Option<Trouble>,
    /// The generation of the Pod that it is about.
    pub generation: Option<i64>,
}

/// What a Pod was granted last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Allocation {
    containers: BTreeMap<String, ResourceRequirements>,
    pod: Option<ResourceRequirements>,
}

impl Allocation {
    /// All that the spec asks for.
    pub fn of(spec: &PodSpec) -> Self {
        let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let containers = all.map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect();
        Self { containers, pod: spec.resources.clone() }
    }

    /// What the API server was told of a Pod that ran here before; `None` of any other. A limit is what was in effect:
    /// where that was not yet what had been granted, it is asked for again, and granted again.
    pub fn reported(pod: &Pod) -> Option<Self> {
        let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
        let lists = [&status.init_container_statuses, &status.container_statuses];
        let known = lists.into_iter().flat_map(|list| list.iter().flatten()).filter(|c| c.container_id.is_some());
        let granted = known.filter_map(|container| {
            let effective = container.resources.clone()?;
            let requests = container.allocated_resources.clone().or(effective.requests);
            Some((container.name.clone(), ResourceRequirements { requests, ..effective }))
        });
        let containers: BTreeMap<_, _> = granted.collect();
        if containers.is_empty() {
            return None;
        }
        let overhead = qos::list(spec.overhead.as_ref());
        let limits = status.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        let pod = spec.resources.as_ref().map(|wanted| ResourceRequirements {
            requests: part(wanted.requests.as_ref(), status.allocated_resources.as_ref(), &overhead),
            limits: part(wanted.limits.as_ref(), limits, &overhead),
            claims: wanted.claims.clone(),
        });
        Some(Self { containers, pod })
    }

    /// Whether the spec asks for nothing else.
    pub fn is_of(&self, spec: &PodSpec) -> bool {
        let mut all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        same(self.pod.as_ref(), spec.resources.as_ref())
            && all.all(|c| self.containers.get(&c.name).is_none_or(|granted| same(Some(granted), c.resources.as_ref())))
    }

    /// The spec with what was granted in place of what it asks for.
    pub fn over(&self, spec: &PodSpec) -> PodSpec {
        let mut spec = spec.clone();
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            if let Some(granted) = self.containers.get(&container.name) {
                container.resources = Some(granted.clone());
            }
        }
        spec.resources.clone_from(&self.pod);
        spec
    }
}

/// Those of `told` that are `wanted`, less overhead.
fn part(wanted: Option<&ApiList>, told: Option<&ApiList>, overhead: &ResourceList) -> Option<ApiList> {
    let told = qos::list(told);
    let of = |name: &String| {
        let amount = *told.get(name)? - overhead.get(name).copied().unwrap_or_default();
        Some((name.clone(), ApiQuantity::from(amount)))
    };
    wanted.map(|wanted| wanted.keys().filter_map(of).collect())
}

fn same(one: Option<&ResourceRequirements>, other: Option<&ResourceRequirements>) -> bool {
    let lists = |r: Option<&ResourceRequirements>| {
        (qos::list(r.and_then(|r| r.requests.as_ref())), qos::list(r.and_then(|r| r.limits.as_ref())))
    };
    lists(one) == lists(other)
}

/// What has to be done to one container that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It gets other limits.
    Update {
        /// Its present attempt.
        id: ContainerId,
        /// Its name.
        name: String,
        /// What it has, as far as the runtime tells.
        from: Resources,
        /// What it is to have.
        to: Resources,
    },
    /// Another attempt is made, which is started once this one has ended: so says its resizePolicy.
    Replace {
        /// Its present attempt.
        id: ContainerId,
        /// Its name.
        name: String,
        /// The next attempt's number, or that of one that was made already.
        attempt: u32,
    },
}

impl Change {
    /// The container's name.
    pub fn container(&self) -> &str {
        match self {
            Self::Update { name, .. } | Self::Replace { name, .. } => name,
        }
    }
}

/// What has to be done to the containers that run, the spec being what is allocated. One that does not run gets its
/// limits when it is started.
pub fn changes(spec: &PodSpec, observed: &Observed, host: &Host) -> Vec<Change> {
    let Some(sandbox) = observed.ready_sandbox().map(|sandbox| &sandbox.id) else { return Vec::new() };
    let all = spec.init_containers.iter().flatten().chain(&spec.containers);
    let running = all.filter_map(|container| {
        let attempts = observed.attempts(&container.name);
        let now = attempts.iter().rev().find(|c| c.state == ContainerState::Running && c.sandbox == *sandbox)?;
        change(spec, container, now, attempts.last()?, host)
    });
    running.collect()
}

fn change(
    spec: &PodSpec,
    container: &Container,
    now: &ContainerStatus,
    latest: &ContainerStatus,
    host: &Host,
) -> Option<Change> {
    let (id, name) = (now.id.clone(), container.name.clone());
    if latest.attempt > now.attempt {
        return Some(Change::Replace { id, name, attempt: latest.attempt });
    }
    let remembered = remembered(spec, container);
    if remembered.iter().any(|(key, value)| now.annotations.get(key).is_some_and(|made_with| made_with != value)) {
        return Some(Change::Replace { id, name, attempt: now.attempt + 1 });
    }
    let (from, to) = (now.resources.clone()?, qos::container_resources(spec, container, host.memory, host.cpu_quota));
    let differs = |of: fn(&Resources) -> Option<i64>| of(&to).is_some() && of(&to) != of(&from);
    let any = differs(|r| r.cpu_shares) || differs(|r| r.cpu_quota) || differs(|r| r.memory_limit);
    any.then_some(Change::Update { id, name, from, to })
}

/// What an attempt of the container carries so that a later change of its resources is known to need a restart.
pub fn remembered(spec: &PodSpec, container: &Container) -> BTreeMap<String, String> {
    let requests = qos::list(container.resources.as_ref().and_then(|r| r.requests.as_ref()));
    let limits = qos::container_limits(spec, container);
    let amount = |list: &ResourceList, name: &str| list.get(name).copied().unwrap_or_default();
    let restarts = |resource: &str| {
        let mut policies = container.resize_policy.iter().flatten();
        policies.any(|policy| policy.resource_name == resource && policy.restart_policy == "RestartContainer")
    };
    let kept = REMEMBERED.iter().filter(|(resource, _)| restarts(resource));
    kept.map(|(resource, key)| {
        ((*key).to_owned(), format!("{}/{}", amount(&requests, resource), amount(&limits, resource)))
    })
    .collect()
}

/// One call to the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Other limits of the Pod as a whole.
    Pod(Resources),
    /// Other limits of one container.
    Container(ContainerId, Resources),
}

/// How the limits get from what they are to what they shall be. At no time has a container a limit above the Pod's: the
/// kernel refuses that of CPU time, and of memory it would be an empty promise. So the Pod's grow first and shrink last.
pub fn operations(now: &Resources, wanted: &Resources, updates: &[Change]) -> Vec<Operation> {
    let pick = |grows: bool| {
        let of = |now: Option<i64>, wanted: Option<i64>| {
            // No limit is more than any.
            wanted.filter(|wanted| now != Some(*wanted) && now.is_some_and(|now| *wanted > now) == grows)
        };
        let cpu_quota = of(now.cpu_quota, wanted.cpu_quota);
        Resources {
            cpu_shares: of(now.cpu_shares, wanted.cpu_shares),
            cpu_quota,
            cpu_period: cpu_quota.and(wanted.cpu_period),
            memory_limit: of(now.memory_limit, wanted.memory_limit),
            ..Resources::default()
        }
    };
    let pod = |grows: bool| Some(pick(grows)).filter(|some| *some != Resources::default()).map(Operation::Pod);
    let mut containers: Vec<_> = updates
        .iter()
        .filter_map(|change| match change {
            Change::Update { id, from, to, .. } => {
                // Those that give memory back come first.
                let grows = from.memory_limit.is_some_and(|from| to.memory_limit.is_some_and(|to| to > from));
                Some((grows, Operation::Container(id.clone(), to.clone())))
            }
            Change::Replace { .. } => None,
        })
        .collect();
    containers.sort_by_key(|(grows, _)| *grows);
    pod(true).into_iter().chain(containers.into_iter().map(|(_, operation)| operation)).chain(pod(false)).collect()
}

/// A memory limit that is about to change.
#[derive(Clone, Debug)]
pub struct MemoryStep<'a> {
    /// The container, or `None` for the Pod as a whole.
    pub container: Option<&'a str>,
    /// Bytes now; `None` is no limit.
    pub from: Option<i64>,
    /// Bytes from then on.
    pub to: Option<i64>,
    /// Bytes in use, if that is known.
    pub usage: Option<u64>,
}

/// Why memory limits are not lowered now: what uses more would be killed by it. `None` if they may be.
pub fn too_low(steps: &[MemoryStep<'_>]) -> Option<String> {
    let shrinks = |step: &&MemoryStep<'_>| step.to.is_some_and(|to| step.from.is_none_or(|from| to < from));
    let complaints = steps.iter().filter(shrinks).filter_map(|step| {
        let what = step.container.map_or("pod".to_owned(), |name| format!("container {name:?}"));
        let to = step.to.unwrap_or(0);
        match step.usage {
            None => Some(format!("missing {what} memory usage")),
            Some(usage) if usage >= u64::try_from(to).unwrap_or(0) => {
                Some(format!("attempting to set {what} memory limit ({to}) below current usage ({usage})"))
            }
            Some(_) => None,
        }
    });
    let complaints: Vec<_> = complaints.collect();
    match &complaints[..] {
        [] => None,
        [one] => Some(format!("cannot decrease memory limits: {one}")),
        several => Some(format!("cannot decrease memory limits: [{}]", several.join(", "))),
    }
}

/// What a running container's status says of its resources: what was allocated, but for limits that are not yet in effect.
/// `wanted` are the allocated ones as the runtime counts, `actual` those it tells.
pub fn in_effect(
    allocated: &ResourceRequirements,
    wanted: &Resources,
    actual: Option<&Resources>,
) -> ResourceRequirements {
    let mut told = allocated.clone();
    let Some(actual) = actual else { return told };
    let mut put = |limit: bool, name: &str, amount: Option<Quantity>| {
        let list = if limit { &mut told.limits } else { &mut told.requests };
        if let (Some(list), Some(amount)) = (list, amount) {
            list.insert(name.to_owned(), amount.into());
        }
    };
    if wanted.cpu_quota.is_some() && wanted.cpu_quota != actual.cpu_quota {
        put(true, "cpu", actual.cpu_quota.map(|quota| Quantity::from_millis(quota / MICROSECONDS_PER_MILLI)));
    }
    if wanted.memory_limit.is_some() && wanted.memory_limit != actual.memory_limit {
        put(true, "memory", actual.memory_limit.map(Quantity::from_units));
    }
    if wanted.cpu_shares.is_some() && wanted.cpu_shares != actual.cpu_shares {
        let milli = |shares: i64| Quantity::from_millis((shares * 1000 + SHARES_PER_CORE - 1) / SHARES_PER_CORE);
        put(false, "cpu", actual.cpu_shares.map(milli));
    }
    told
}

/// The text of an event: what it says, and what the spec asks for.
pub fn told(what: &str, pod: &Pod, generation: Option<i64>, error: Option<&str>) -> String {
    let list = |containers: &[Container]| -> Value {
        containers
            .iter()
            .map(|c| json!({ "name": c.name, "resources": c.resources.clone().unwrap_or_default() }))
            .collect()
    };
    let mut summary = Map::new();
    let spec = pod.spec.clone().unwrap_or_default();
    for (name, containers) in
        [("initContainers", spec.init_containers.unwrap_or_default()), ("containers", spec.containers)]
    {
        if !containers.is_empty() {
            summary.insert(name.to_owned(), list(&containers));
        }
    }
    summary.insert("generation".to_owned(), json!(generation.unwrap_or(0)));
    if let Some(error) = error {
        summary.insert("error".to_owned(), json!(error));
    }
    format!("{what}: {}", Value::Object(summary))
}

#[cfg(test)]
mod tests;
