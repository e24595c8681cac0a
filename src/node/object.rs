//! The Node object as a pure function of what is told, measured and observed.
//!
//! Reasons and field meanings are those of the Kubernetes Node reference (`v1.NodeStatus`) and of kubelet, so that
//! `kubectl describe node`, schedulers and alerts read this node as they read any other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use super::machine::{Load, Machine, architecture};
use super::{Health, NodeFacts};
use crate::config::NodeSettings;
use crate::quantity::Quantity;
use crate::runtime::types::{Image, RuntimeVersion};

/// `status.nodeInfo.kubeletVersion`: the kubelet whose behaviour this node shows, with its own version as build metadata.
///
/// Semver ignores what follows the `+`, so skew checks and feature checks see 1.36.0 itself and not something older,
/// as they would with a pre-release (`-`) suffix.
pub const KUBELET_VERSION: &str = concat!("v1.36.0+lambdalet.", env!("CARGO_PKG_VERSION"));

/// Most images listed in the status, the largest first, as a kubelet's nodeStatusMaxImages.
const MAX_IMAGES: usize = 50;

/// Most names listed per image, as kubelet.
const MAX_IMAGE_NAMES: usize = 5;

/// Most bytes of a condition's message; a runtime's error can be long, and the status is sent often.
const MAX_MESSAGE: usize = 1024;

/// What the runtime tells about itself.
#[derive(Clone, Debug)]
pub struct RuntimeFacts {
    /// Its name and version, once it answered.
    pub version: Option<RuntimeVersion>,
    /// Images present.
    pub images: Vec<Image>,
    /// Whether Pods can be run.
    pub health: Health,
}

/// Everything the object is computed from.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// What the node was told.
    pub settings: &'a NodeSettings,
    /// Its addresses, the primary first.
    pub addresses: &'a [IpAddr],
    /// What the host is.
    pub machine: &'a Machine,
    /// What the runtime says.
    pub runtime: &'a RuntimeFacts,
    /// Which resources are under pressure.
    pub pressure: Pressure,
    /// The node is draining before its end.
    pub draining: bool,
    /// The conditions on the API server, whose transition times hold where nothing changed.
    pub previous: &'a [NodeCondition],
    /// Now.
    pub now: Timestamp,
}

/// Which resources are short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Memory.
    pub memory: bool,
    /// Disk space or inodes.
    pub disk: bool,
    /// Process ids.
    pub pids: bool,
}

impl Pressure {
    /// What is short now.
    pub fn of(settings: &NodeSettings, machine: &Machine, load: &Load) -> Self {
        let below = |signal: &str, available: u64, capacity: u64| {
            settings.eviction_hard.get(signal).is_some_and(|threshold| available < threshold.of(capacity))
        };
        Self {
            memory: below("memory.available", load.memory_available, machine.memory),
            // A file system without an inode count (btrfs) has no shortage of them.
            disk: below("nodefs.available", load.storage_available, machine.storage)
                || machine.inodes > 0 && below("nodefs.inodesFree", load.inodes_free, machine.inodes),
            pids: below("pid.available", load.pids_available, load.pids),
        }
    }
}

/// Keeps a pressure up for a while after it was last seen, so that the node does not flap at a threshold (kubelet's
/// evictionPressureTransitionPeriod).
#[derive(Clone, Copy, Debug, Default)]
pub struct PressureMemory {
    memory: Option<Timestamp>,
    disk: Option<Timestamp>,
    pids: Option<Timestamp>,
}

impl PressureMemory {
    /// Takes in what is short now and returns what counts as short.
    pub fn observe(&mut self, seen: Pressure, hold: Duration, now: Timestamp) -> Pressure {
        let held = |last: &mut Option<Timestamp>, seen: bool| {
            if seen {
                *last = Some(now);
            }
            last.is_some_and(|last| seen || now.duration_since(last).unsigned_abs() < hold)
        };
        Pressure {
            memory: held(&mut self.memory, seen.memory),
            disk: held(&mut self.disk, seen.disk),
            pids: held(&mut self.pids, seen.pids),
        }
    }
}

/// The object to register.
pub fn node(inputs: &Inputs<'_>) -> Node {
    let taints = inputs.settings.taints.iter().map(|taint| Taint {
        key: taint.key.clone(),
        value: (!taint.value.is_empty()).then(|| taint.value.clone()),
        effect: taint.effect.as_str().to_owned(),
        time_added: None,
    });
    let taints: Vec<Taint> = taints.collect();
    Node {
        metadata: ObjectMeta {
            name: Some(inputs.settings.name.clone()),
            labels: Some(labels(inputs.settings)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec { taints: (!taints.is_empty()).then_some(taints), ..NodeSpec::default() }),
        status: Some(status(inputs)),
    }
}

/// The labels this node keeps right: those of every node, and those it was told.
pub fn labels(settings: &NodeSettings) -> BTreeMap<String, String> {
    let (os, arch) = (std::env::consts::OS, architecture());
    // A node name may be longer than a label value.
    let cut = &settings.name[..settings.name.len().min(63)];
    let hostname = cut.trim_end_matches(['-', '.']);
    let mut labels: BTreeMap<String, String> = [
        ("beta.kubernetes.io/arch", arch),
        ("beta.kubernetes.io/os", os),
        ("kubernetes.io/arch", arch),
        ("kubernetes.io/hostname", hostname),
        ("kubernetes.io/os", os),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect();
    labels.extend(settings.labels.clone());
    labels
}

/// The whole status.
pub fn status(inputs: &Inputs<'_>) -> NodeStatus {
    let Inputs { settings, machine, runtime, .. } = inputs;
    NodeStatus {
        addresses: Some(addresses(inputs)),
        capacity: Some(api_quantities(capacity(settings, machine))),
        allocatable: Some(api_quantities(allocatable(settings, machine))),
        conditions: Some(conditions(inputs)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(settings.port) }),
        }),
        images: Some(images(&runtime.images)),
        node_info: Some(node_info(inputs)),
        runtime_handlers: Some(runtime_handlers(&settings.runtime_name)),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(false) }),
        ..NodeStatus::default()
    }
}

/// What Pods may ask of the node.
pub fn facts(inputs: &Inputs<'_>) -> NodeFacts {
    let allocatable = allocatable(inputs.settings, inputs.machine);
    NodeFacts {
        name: inputs.settings.name.clone(),
        addresses: inputs.addresses.to_vec(),
        allocatable: allocatable.into_iter().map(|(name, amount)| (name, amount.quantity())).collect(),
    }
}

/// An amount in the unit its resource is reported in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Thousandths of a core.
    Millicores(i64),
    /// Bytes, reported in kibibytes, rounded down.
    Bytes(i64),
    /// Things.
    Count(i64),
}

impl Amount {
    /// The same as a number.
    pub fn quantity(self) -> Quantity {
        match self {
            Self::Millicores(millis) => Quantity::from_millis(millis),
            Self::Bytes(units) | Self::Count(units) => Quantity::from_units(units),
        }
    }
}

fn api_quantities(amounts: BTreeMap<String, Amount>) -> BTreeMap<String, ApiQuantity> {
    let text = |amount| match amount {
        Amount::Millicores(millis) if millis % 1000 == 0 => (millis / 1000).to_string(),
        Amount::Millicores(millis) => format!("{millis}m"),
        Amount::Bytes(0) => "0".to_owned(),
        Amount::Bytes(bytes) => format!("{}Ki", bytes >> 10),
        Amount::Count(count) => count.to_string(),
    };
    amounts.into_iter().map(|(name, amount)| (name, ApiQuantity(text(amount)))).collect()
}

fn bytes(amount: u64) -> Amount {
    Amount::Bytes(i64::try_from(amount).unwrap_or(i64::MAX))
}

/// What the node has.
pub fn capacity(settings: &NodeSettings, machine: &Machine) -> BTreeMap<String, Amount> {
    let mut capacity = BTreeMap::from([
        ("cpu".to_owned(), Amount::Millicores(i64::from(machine.cpus) * 1000)),
        ("memory".to_owned(), bytes(machine.memory)),
        ("ephemeral-storage".to_owned(), bytes(machine.storage)),
        ("pods".to_owned(), Amount::Count(i64::from(settings.max_pods))),
    ]);
    capacity.extend(machine.hugepages.iter().map(|(name, amount)| (name.clone(), bytes(*amount))));
    capacity
}

/// What Pods may use: capacity less the reservations, less the hard eviction thresholds, and for memory less huge pages
/// (kubelet's Node Allocatable). Never below zero.
pub fn allocatable(settings: &NodeSettings, machine: &Machine) -> BTreeMap<String, Amount> {
    let reserved = |name: &str, per_unit: i128| -> i64 {
        let lists = [&settings.system_reserved, &settings.kube_reserved];
        let nanos: i128 = lists.iter().filter_map(|list| list.0.get(name)).map(|quantity| quantity.nanos()).sum();
        i64::try_from(nanos * per_unit / 1_000_000_000).unwrap_or(i64::MAX)
    };
    let threshold = |signal: &str, capacity: u64| -> i64 {
        let threshold = settings.eviction_hard.get(signal).map_or(0, |threshold| threshold.of(capacity));
        i64::try_from(threshold).unwrap_or(i64::MAX)
    };
    let huge: u64 = machine.hugepages.values().sum();
    let less = |amount: i64, parts: &[i64]| parts.iter().fold(amount, |left, part| left.saturating_sub(*part)).max(0);
    let mut allocatable = capacity(settings, machine);
    for (name, amount) in &mut allocatable {
        match (name.as_str(), amount) {
            ("cpu", Amount::Millicores(millis)) => *millis = less(*millis, &[reserved("cpu", 1000)]),
            ("memory", Amount::Bytes(bytes)) => {
                let huge = i64::try_from(huge).unwrap_or(i64::MAX);
                *bytes = less(*bytes, &[reserved("memory", 1), threshold("memory.available", machine.memory), huge]);
            }
            ("ephemeral-storage", Amount::Bytes(bytes)) => {
                let kept = threshold("nodefs.available", machine.storage);
                *bytes = less(*bytes, &[reserved("ephemeral-storage", 1), kept]);
            }
            _ => {}
        }
    }
    allocatable
}

fn addresses(inputs: &Inputs<'_>) -> Vec<NodeAddress> {
    let internal = inputs.addresses.iter().map(|ip| ("InternalIP", ip.to_string()));
    internal
        .chain([("Hostname", inputs.settings.name.clone())])
        .map(|(type_, address)| NodeAddress { type_: type_.to_owned(), address })
        .collect()
}

fn node_info(inputs: &Inputs<'_>) -> NodeSystemInfo {
    let Inputs { machine, runtime, settings, .. } = inputs;
    let container_runtime_version = match &runtime.version {
        Some(RuntimeVersion { name, version }) => format!("{name}://{version}"),
        None => format!("{}://Unknown", settings.runtime_name),
    };
    NodeSystemInfo {
        architecture: architecture().to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version,
        kernel_version: machine.kernel.clone(),
        // Deprecated, and false on a node without a kube-proxy of its own.
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: std::env::consts::OS.to_owned(),
        os_image: machine.os_image.clone(),
        running_in_user_namespace: None,
        swap: None,
        system_uuid: machine.system_uuid.clone(),
    }
}

/// The handlers a RuntimeClass may name: none (the node's own choice) and the driver's name.
fn runtime_handlers(runtime: &str) -> Vec<NodeRuntimeHandler> {
    let features = NodeRuntimeHandlerFeatures { recursive_read_only_mounts: Some(false), user_namespaces: Some(false) };
    ["", runtime]
        .into_iter()
        .map(|name| NodeRuntimeHandler { name: Some(name.to_owned()), features: Some(features.clone()) })
        .collect()
}

/// The largest images, in an order that does not change while they do not.
fn images(images: &[Image]) -> Vec<ContainerImage> {
    let mut images: Vec<&Image> =
        images.iter().filter(|image| !image.tags.is_empty() || !image.digests.is_empty()).collect();
    images.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    images
        .into_iter()
        .take(MAX_IMAGES)
        .map(|image| ContainerImage {
            names: Some(image.digests.iter().chain(&image.tags).take(MAX_IMAGE_NAMES).cloned().collect()),
            size_bytes: Some(i64::try_from(image.size).unwrap_or(i64::MAX)),
        })
        .collect()
}

/// The four conditions in kubelet's order.
fn conditions(inputs: &Inputs<'_>) -> Vec<NodeCondition> {
    let Inputs { pressure, runtime, .. } = inputs;
    let pick = |short: bool, when_short: (&'static str, &'static str), otherwise: (&'static str, &'static str)| {
        let (reason, message) = if short { when_short } else { otherwise };
        (short, reason, message.to_owned())
    };
    let memory = pick(
        pressure.memory,
        ("KubeletHasInsufficientMemory", "available memory is below the hard eviction threshold"),
        ("KubeletHasSufficientMemory", "enough memory is available"),
    );
    let disk = pick(
        pressure.disk,
        ("KubeletHasDiskPressure", "free space or inodes of the root directory are below the hard eviction threshold"),
        ("KubeletHasNoDiskPressure", "enough disk space and inodes are free"),
    );
    let pids = pick(
        pressure.pids,
        ("KubeletHasInsufficientPID", "free process ids are below the hard eviction threshold"),
        ("KubeletHasSufficientPID", "enough process ids are free"),
    );
    let ready = match (&runtime.health, inputs.draining) {
        (_, true) => (false, "KubeletNotReady", "the node is shutting down and its Pods are being ended".to_owned()),
        (Err(problem), false) => (false, "KubeletNotReady", problem.clone()),
        (Ok(()), false) => (true, "KubeletReady", "Pods can be run".to_owned()),
    };
    [("MemoryPressure", memory), ("DiskPressure", disk), ("PIDPressure", pids), ("Ready", ready)]
        .into_iter()
        .map(|(type_, (holds, reason, message))| condition(inputs, type_, holds, (reason, message)))
        .collect()
}

fn condition(inputs: &Inputs<'_>, type_: &str, holds: bool, (reason, mut message): (&str, String)) -> NodeCondition {
    let status = if holds { "True" } else { "False" };
    let kept = inputs
        .previous
        .iter()
        .find(|previous| previous.type_ == type_ && previous.status == status)
        .and_then(|previous| previous.last_transition_time.clone());
    // The API keeps whole seconds; what it cannot keep would look like a change.
    let now = Timestamp::from_second(inputs.now.as_second()).unwrap_or(inputs.now);
    let end = (0..=MAX_MESSAGE.min(message.len())).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    message.truncate(end);
    NodeCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(kept.unwrap_or(Time(now))),
    }
}
