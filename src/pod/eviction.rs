//! Eviction: when the node runs short of memory, disk or process ids, Pods have to go, and so has a Pod that outgrows its
//! own limit of disk. Pure but for [`manager`].
//!
//! ```text
//! observations --Judge--> what is short, for long enough --rank--> the one Pod to go next --Orders--> its worker
//! ```
//! Rules, order and texts are the kubelet's (Kubernetes documentation, "Node-pressure Eviction").

pub mod manager;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use tokio::sync::watch;

use super::qos::{self, CRITICAL_PRIORITY};
use super::static_pods::{is_static, mirrored};
use super::status::Trouble;
use crate::config::values::Threshold;
use crate::quantity::Quantity;

/// The reason of an evicted Pod.
pub const REASON: &str = "Evicted";
/// The condition of a Pod that the node ends for others' sake.
pub const DISRUPTION: &str = "DisruptionTarget";
/// How long the processes of a Pod have that is evicted at once.
pub const IMMEDIATELY: Duration = Duration::from_secs(1);

/// What can be short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// Bytes of memory; the first to be relieved.
    Memory,
    /// Bytes of the file system with the root directory.
    Disk,
    /// Inodes of it.
    Inodes,
    /// Process ids.
    Pids,
}

impl Signal {
    /// By its name in a configuration.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "memory.available" => Some(Self::Memory),
            "nodefs.available" => Some(Self::Disk),
            "nodefs.inodesFree" => Some(Self::Inodes),
            "pid.available" => Some(Self::Pids),
            _ => None,
        }
    }

    /// What messages call it.
    pub fn resource(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Inodes => "inodes",
            Self::Pids => "pids",
        }
    }
}

/// When a signal means that Pods have to go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// Of what.
    pub signal: Signal,
    /// Below so much.
    pub threshold: Threshold,
    /// For so long; none for a hard limit.
    pub grace: Duration,
    /// Once below, until there is so much more than the threshold.
    pub reclaim: Option<Threshold>,
}

impl Limit {
    fn is_hard(&self) -> bool {
        self.grace.is_zero()
    }

    fn is_met(&self, seen: Observation, with_reclaim: bool) -> bool {
        let more = self.reclaim.filter(|_| with_reclaim).map_or(0, |reclaim| reclaim.of(seen.capacity));
        // A file system without inodes to count has no shortage of them.
        seen.capacity > 0 && seen.available < self.threshold.of(seen.capacity).saturating_add(more)
    }
}

/// What there is of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What is left.
    pub available: u64,
    /// All of it.
    pub capacity: u64,
}

/// What has to be relieved.
#[derive(Clone, Debug, PartialEq)]
pub struct Shortage {
    /// Of what.
    pub signal: Signal,
    /// Whether there is no time to lose.
    pub hard: bool,
    /// The threshold that was crossed, and what there was then.
    pub threshold: u64,
    /// See `threshold`.
    pub available: u64,
}

/// Says what is short, given what was short before.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    limits: Vec<Limit>,
    /// Since when each limit is crossed.
    since: Vec<Option<Timestamp>>,
    /// Which limits led to an eviction and are not relieved yet.
    unresolved: Vec<bool>,
}

impl Judge {
    /// One for these limits.
    pub fn new(limits: Vec<Limit>) -> Self {
        let (since, unresolved) = (vec![None; limits.len()], vec![false; limits.len()]);
        Self { limits, since, unresolved }
    }

    /// What is below a limit, for however long.
    pub fn crossed(&self) -> Vec<Signal> {
        let crossed = self.limits.iter().zip(&self.since).filter(|(_, since)| since.is_some());
        crossed.map(|(limit, _)| limit.signal).collect()
    }

    /// What has to be relieved now, the most urgent first: memory before all, then the others, hard limits before soft.
    pub fn judge(&mut self, seen: &BTreeMap<Signal, Observation>, now: Timestamp) -> Option<Shortage> {
        let mut due = Vec::new();
        for (at, limit) in self.limits.iter().enumerate() {
            let Some(observation) = seen.get(&limit.signal).copied() else { continue };
            let met = limit.is_met(observation, self.unresolved[at]);
            self.since[at] = met.then(|| self.since[at].unwrap_or(now));
            let long_enough =
                self.since[at].is_some_and(|since| now.duration_since(since).unsigned_abs() >= limit.grace);
            self.unresolved[at] = long_enough;
            if long_enough {
                let threshold = limit.threshold.of(observation.capacity);
                let (signal, hard) = (limit.signal, limit.is_hard());
                due.push(Shortage { signal, hard, threshold, available: observation.available });
            }
        }
        due.into_iter().min_by_key(|shortage| (shortage.signal, !shortage.hard))
    }
}

/// What a Pod uses, in bytes, inodes and processes; `None` where that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Working set.
    pub memory: Option<u64>,
    /// Written layers, logs and volumes on disk.
    pub disk: Option<u64>,
    /// Files of them.
    pub inodes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

impl Use {
    fn of(&self, signal: Signal) -> Option<u64> {
        match signal {
            Signal::Memory => self.memory,
            Signal::Disk => self.disk,
            Signal::Inodes => self.inodes,
            Signal::Pids => self.pids,
        }
    }
}

/// The Pods in the order in which they are to go: first those that use more than they requested, then the less important,
/// then those that use most beyond their request. One of which nothing is known goes first.
pub fn rank<'a>(pods: &'a [(PodSpec, Use)], signal: Signal) -> Vec<usize> {
    let key = |(spec, used): &'a (PodSpec, Use)| {
        let request = request(spec, signal);
        let used = used.of(signal);
        // Neither process ids nor inodes can be requested.
        let exceeds = signal != Signal::Pids && used.is_none_or(|used| i128::from(used) > request);
        let beyond = used.map_or(i128::MAX, |used| i128::from(used) - request);
        (Reverse(used.is_none()), Reverse(exceeds), spec.priority.unwrap_or(0), Reverse(beyond))
    };
    let mut order: Vec<usize> = (0..pods.len()).collect();
    order.sort_by_key(|at| key(&pods[*at]));
    order
}

fn request(spec: &PodSpec, signal: Signal) -> i128 {
    let amount = |name: &str| qos::pod_requests(spec).get(name).map_or(0, |amount| i128::from(amount.value()));
    match signal {
        Signal::Memory => amount("memory"),
        Signal::Disk => amount("ephemeral-storage"),
        Signal::Inodes | Signal::Pids => 0,
    }
}

/// What one container uses of what is short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerUse {
    /// Its name.
    pub name: String,
    /// Bytes of its working set.
    pub memory: Option<u64>,
    /// Bytes of its written layer and log.
    pub disk: Option<u64>,
}

/// Why the Pod was evicted, for its status.
pub fn message(shortage: &Shortage, spec: &PodSpec, containers: &[ContainerUse]) -> String {
    let resource = shortage.signal.resource();
    let amount = |number: u64| quantity(number, shortage.signal);
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        amount(shortage.threshold),
        amount(shortage.available)
    );
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    for container in all {
        let Some(used) = containers.iter().find(|used| used.name == container.name) else { continue };
        let used = match shortage.signal {
            Signal::Memory => used.memory,
            Signal::Disk => used.disk,
            Signal::Inodes | Signal::Pids => None,
        };
        let requests = qos::list(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()));
        let request = requests.get(resource).copied().unwrap_or_default();
        if let Some(used) = used.filter(|used| i128::from(*used) > i128::from(request.value())) {
            text += &format!(
                "Container {} was using {}, request is {request}, has larger consumption of {resource}. ",
                container.name,
                amount(used)
            );
        }
    }
    text
}

/// Bytes as Kubernetes writes them, in whole kibibytes where they are.
fn quantity(number: u64, signal: Signal) -> String {
    match signal {
        Signal::Memory | Signal::Disk if number > 0 && number.is_multiple_of(1024) => format!("{}Ki", number / 1024),
        _ => number.to_string(),
    }
}

/// Which limit of its own the Pod has outgrown, in the words of its status. `volumes` are bytes of emptyDir volumes by
/// name, `used` is what all of the Pod takes on disk.
pub fn outgrown(
    spec: &PodSpec,
    used: Option<u64>,
    containers: &[ContainerUse],
    volumes: &BTreeMap<String, u64>,
) -> Option<String> {
    let over = |used: u64, limit: Quantity| !limit.is_zero() && i128::from(used) > i128::from(limit.value());
    for volume in spec.volumes.iter().flatten() {
        let limit = volume.empty_dir.as_ref().and_then(|dir| dir.size_limit.as_ref());
        let Some(limit) = limit.and_then(|limit| limit.0.parse::<Quantity>().ok()) else { continue };
        if volumes.get(&volume.name).is_some_and(|used| over(*used, limit)) {
            return Some(format!("Usage of EmptyDir volume {:?} exceeds the limit \"{limit}\". ", volume.name));
        }
    }
    let limit = qos::pod_limits(spec).get("ephemeral-storage").copied();
    if let Some(limit) = limit.filter(|limit| used.is_some_and(|used| over(used, *limit))) {
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    spec.containers.iter().find_map(|container| {
        let limits = qos::list(container.resources.as_ref().and_then(|resources| resources.limits.as_ref()));
        let limit = limits.get("ephemeral-storage").copied()?;
        let used = containers.iter().find(|used| used.name == container.name)?.disk?;
        let text = || format!("Container {} exceeded its local ephemeral storage limit \"{limit}\". ", container.name);
        over(used, limit).then(text)
    })
}

/// Whether the Pod limits what of it lies on disk, so that it has to be measured.
pub fn limits_disk(spec: &PodSpec) -> bool {
    let mut volumes = spec.volumes.iter().flatten().filter_map(|volume| volume.empty_dir.as_ref());
    volumes.any(|dir| dir.size_limit.is_some()) || qos::pod_limits(spec).contains_key("ephemeral-storage")
}

/// Whether the node keeps the Pod whatever happens: it is critical to the node or its cluster, or nobody would place it
/// anywhere else.
pub fn is_critical(pod: &Pod) -> bool {
    let important =
        pod.spec.as_ref().and_then(|spec| spec.priority).is_some_and(|priority| priority >= CRITICAL_PRIORITY);
    important || is_static(pod) || mirrored(pod).is_some()
}

/// Pods that have to end, by UID: written by the manager, taken by their workers.
#[derive(Debug, Default)]
pub struct Orders {
    orders: Mutex<HashMap<String, Order>>,
    given: watch::Sender<u64>,
}

/// A Pod has to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Reason and message of its status.
    pub trouble: Trouble,
    /// How long its processes have at most.
    pub grace: Duration,
    /// What for.
    pub end: End,
    /// What its condition says if it ends for others' sake, so that its controller does not blame it.
    pub disruption: Option<String>,
}

/// What a Pod ends for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// To make room: it is told so by an event, and nothing of it stays on the node.
    ForRoom,
    /// With the node: its containers stay for their logs.
    WithNode,
}

impl Orders {
    /// Orders the Pod to end.
    pub fn give(&self, uid: &str, order: Order) {
        self.orders().insert(uid.to_owned(), order);
        self.given.send_modify(|times| *times += 1);
    }

    /// The order for this Pod, once.
    pub fn take(&self, uid: &str) -> Option<Order> {
        self.orders().remove(uid)
    }

    /// Whether the Pod has one that it has not taken yet.
    pub fn has(&self, uid: &str) -> bool {
        self.orders().contains_key(uid)
    }

    /// The Pods that have not taken theirs yet.
    pub fn open(&self) -> Vec<String> {
        self.orders().keys().cloned().collect()
    }

    /// Changes with each order.
    pub fn given(&self) -> watch::Receiver<u64> {
        self.given.subscribe()
    }

    fn orders(&self) -> std::sync::MutexGuard<'_, HashMap<String, Order>> {
        // An entry is written whole.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
