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
            let limits =
                [&settings.eviction_hard, &settings.eviction_soft].into_iter().filter_map(|set| set.get(signal));
            limits.into_iter().any(|threshold| available < threshold.of(capacity))
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

/// What API servers may rely on (KEP-5328), in order: exec, attach and port-forward over WebSocket with v5 and the SPDY
/// tunnel (KEP-4006), so that an API server since 1.36 passes them on as they are; in-place resize of `spec.resources`
/// and of init containers, which it refuses for nodes that do not declare it; a rule that restarts all containers.
const DECLARED_FEATURES: [&str; 4] = [
    "ExtendWebSocketsToKubelet",
    "InPlacePodLevelResourcesVerticalScaling",
    "InPlacePodVerticalScalingInitContainers",
    "RestartAllContainersOnContainerExits",
];

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
        runtime_handlers: Some(runtime_handlers(&settings.runtime_handlers)),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(false) }),
        declared_features: Some(DECLARED_FEATURES.map(str::to_owned).to_vec()),
        ..NodeStatus::default()
    }
}

/// What Pods may ask of the node.
pub fn facts(inputs: &Inputs<'_>) -> NodeFacts {
    NodeFacts {
        name: inputs.settings.name.clone(),
        addresses: inputs.addresses.to_vec(),
        capacity: capacity(inputs.settings, inputs.machine),
        allocatable: allocatable(inputs.settings, inputs.machine),
    }
}

fn api_quantities(amounts: BTreeMap<String, Quantity>) -> BTreeMap<String, ApiQuantity> {
    amounts.into_iter().map(|(name, amount)| (name, amount.into())).collect()
}

/// Bytes in whole kibibytes, as kubelet reports them.
fn kibibytes(bytes: u64) -> Quantity {
    Quantity::from_units(i64::try_from(bytes & !1023).unwrap_or(i64::MAX))
}

/// What the node has.
pub fn capacity(settings: &NodeSettings, machine: &Machine) -> BTreeMap<String, Quantity> {
    let mut capacity = BTreeMap::from([
        ("cpu".to_owned(), Quantity::from_units(machine.cpus.into())),
        ("memory".to_owned(), kibibytes(machine.memory)),
        ("ephemeral-storage".to_owned(), kibibytes(machine.storage)),
        ("pods".to_owned(), Quantity::from_units(settings.max_pods.into())),
    ]);
    capacity.extend(machine.hugepages.iter().map(|(name, amount)| (name.clone(), kibibytes(*amount))));
    capacity
}

/// What Pods may use: capacity less the reservations, less the hard eviction thresholds, and for memory less huge pages
/// (kubelet's Node Allocatable). Never below zero.
pub fn allocatable(settings: &NodeSettings, machine: &Machine) -> BTreeMap<String, Quantity> {
    let reserved = |name: &str| -> Quantity {
        [&settings.system_reserved, &settings.kube_reserved].iter().filter_map(|list| list.0.get(name).copied()).sum()
    };
    let threshold = |signal: &str, capacity: u64| {
        kibibytes(settings.eviction_hard.get(signal).map_or(0, |threshold| threshold.of(capacity)))
    };
    let mut allocatable = capacity(settings, machine);
    for (name, amount) in &mut allocatable {
        let kept = match name.as_str() {
            "cpu" => reserved("cpu"),
            "memory" => {
                let huge = kibibytes(machine.hugepages.values().sum());
                reserved("memory") + threshold("memory.available", machine.memory) + huge
            }
            "ephemeral-storage" => reserved("ephemeral-storage") + threshold("nodefs.available", machine.storage),
            _ => Quantity::ZERO,
        };
        *amount = (*amount - kept).max(Quantity::ZERO);
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

/// The handlers a RuntimeClass may name: none (the node's own choice) and the drivers' names.
fn runtime_handlers(drivers: &[String]) -> Vec<NodeRuntimeHandler> {
    let features = NodeRuntimeHandlerFeatures { recursive_read_only_mounts: Some(false), user_namespaces: Some(false) };
    std::iter::once("")
        .chain(drivers.iter().map(String::as_str))
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
        (_, true) => (false, "KubeletNotReady", "node is shutting down".to_owned()),
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::values::{NodeTaint, Reserved, Threshold};

    const GI: u64 = 1 << 30;

    fn machine() -> Machine {
        Machine {
            cpus: 4,
            memory: 16 * GI,
            storage: 100 * GI,
            inodes: 1000,
            machine_id: "m".to_owned(),
            boot_id: "b".to_owned(),
            kernel: "6.1.0".to_owned(),
            os_image: "Debian 12".to_owned(),
            ..Machine::default()
        }
    }

    fn load() -> Load {
        Load { memory_available: 8 * GI, storage_available: 50 * GI, inodes_free: 500, pids: 1000, pids_available: 900 }
    }

    fn settings() -> NodeSettings {
        NodeSettings { name: "n1".to_owned(), ..NodeSettings::default() }
    }

    fn runtime() -> RuntimeFacts {
        let version = RuntimeVersion { name: "docker".to_owned(), version: "20.10.24".to_owned() };
        RuntimeFacts { version: Some(version), images: Vec::new(), health: Ok(()) }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Owned inputs, a healthy node unless a test changes something.
    struct World {
        settings: NodeSettings,
        machine: Machine,
        runtime: RuntimeFacts,
        pressure: Pressure,
        draining: bool,
        previous: Vec<NodeCondition>,
        now: Timestamp,
    }

    impl World {
        fn node(&self) -> Node {
            node(&Inputs {
                settings: &self.settings,
                addresses: &["10.0.0.5".parse().unwrap()],
                machine: &self.machine,
                runtime: &self.runtime,
                pressure: self.pressure,
                draining: self.draining,
                previous: &self.previous,
                now: self.now,
            })
        }
    }

    fn node_with(change: impl FnOnce(&mut World)) -> Node {
        let mut world = World {
            settings: settings(),
            machine: machine(),
            runtime: runtime(),
            pressure: Pressure::default(),
            draining: false,
            previous: Vec::new(),
            now: at(1000),
        };
        change(&mut world);
        world.node()
    }

    fn status_with(change: impl FnOnce(&mut World)) -> NodeStatus {
        node_with(change).status.unwrap()
    }

    fn condition_of(status: &NodeStatus, type_: &str) -> (String, String) {
        let condition = status.conditions.as_ref().unwrap().iter().find(|condition| condition.type_ == type_).unwrap();
        (condition.status.clone(), condition.reason.clone().unwrap())
    }

    #[test]
    fn a_healthy_node_reads_as_a_kubelet_does() {
        let status = status_with(|_| {});
        let types: Vec<_> = status.conditions.as_ref().unwrap().iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(types, ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]);
        for (type_, value, reason) in [
            ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            ("PIDPressure", "False", "KubeletHasSufficientPID"),
            ("Ready", "True", "KubeletReady"),
        ] {
            assert_eq!(condition_of(&status, type_), (value.to_owned(), reason.to_owned()));
        }
        let info = status.node_info.unwrap();
        assert_eq!(info.container_runtime_version, "docker://20.10.24");
        assert!(info.kubelet_version.starts_with("v1.36.0+lambdalet."), "{}", info.kubelet_version);
        assert_eq!(status.daemon_endpoints.unwrap().kubelet_endpoint.unwrap().port, 10250);
        let addresses: Vec<_> = status.addresses.unwrap().into_iter().map(|a| (a.type_, a.address)).collect();
        assert_eq!(
            addresses,
            [("InternalIP".to_owned(), "10.0.0.5".to_owned()), ("Hostname".to_owned(), "n1".to_owned())]
        );
        assert_eq!(status.declared_features.unwrap(), DECLARED_FEATURES);
    }

    #[test]
    fn each_shortage_is_its_own_condition() {
        let status = status_with(|world| world.pressure.memory = true);
        assert_eq!(condition_of(&status, "MemoryPressure").1, "KubeletHasInsufficientMemory");
        assert_eq!(condition_of(&status, "DiskPressure").0, "False");
        let status = status_with(|world| world.pressure.disk = true);
        assert_eq!(condition_of(&status, "DiskPressure"), ("True".to_owned(), "KubeletHasDiskPressure".to_owned()));
        let status = status_with(|world| world.pressure.pids = true);
        assert_eq!(condition_of(&status, "PIDPressure"), ("True".to_owned(), "KubeletHasInsufficientPID".to_owned()));
        assert_eq!(condition_of(&status, "Ready").0, "True", "pressure alone does not make a node unready");
    }

    #[test]
    fn a_runtime_that_is_down_makes_the_node_unready_with_its_words() {
        let down = RuntimeFacts { health: Err("container runtime is down: no socket".to_owned()), ..runtime() };
        let status = status_with(|world| world.runtime = down);
        let ready = status.conditions.unwrap().into_iter().find(|condition| condition.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("KubeletNotReady")));
        assert_eq!(ready.message.as_deref(), Some("container runtime is down: no socket"));
        let long = RuntimeFacts { health: Err("\u{e9}".repeat(3000)), ..runtime() };
        let status = status_with(|world| world.runtime = long);
        assert!(status.conditions.unwrap()[3].message.as_ref().unwrap().len() <= MAX_MESSAGE);
    }

    #[test]
    fn a_draining_node_is_not_ready() {
        let status = status_with(|world| world.draining = true);
        assert_eq!(condition_of(&status, "Ready"), ("False".to_owned(), "KubeletNotReady".to_owned()));
    }

    #[test]
    fn a_runtime_that_never_answered_is_named_without_a_version() {
        let silent = RuntimeFacts { version: None, ..runtime() };
        let status = status_with(|world| world.runtime = silent);
        assert_eq!(status.node_info.unwrap().container_runtime_version, "docker://Unknown");
    }

    #[test]
    fn transition_times_hold_until_the_status_changes() {
        let before = status_with(|_| {}).conditions.unwrap();
        let later = status_with(|world| {
            world.previous = before;
            world.now = at(2000);
            world.pressure.disk = true;
        });
        for condition in later.conditions.unwrap() {
            let expected = if condition.type_ == "DiskPressure" { 2000 } else { 1000 };
            assert_eq!(condition.last_transition_time.unwrap().0, at(expected), "{}", condition.type_);
            assert_eq!(condition.last_heartbeat_time.unwrap().0, at(2000));
        }
    }

    #[test]
    fn allocatable_is_what_is_left_after_reservations_thresholds_and_huge_pages() {
        let machine = Machine { hugepages: BTreeMap::from([("hugepages-2Mi".to_owned(), GI)]), ..machine() };
        let settings = NodeSettings {
            system_reserved: "cpu=250m,memory=1Gi".parse().unwrap(),
            kube_reserved: "cpu=250m,memory=1Gi,ephemeral-storage=10Gi".parse().unwrap(),
            ..settings()
        };
        let left = api_quantities(allocatable(&settings, &machine));
        assert_eq!(left["cpu"].0, "3500m");
        assert_eq!(left["memory"].0, format!("{}Mi", 13 * 1024 - 100));
        assert_eq!(left["ephemeral-storage"].0, "80Gi");
        assert_eq!(left["pods"].0, "110");
        assert_eq!(left["hugepages-2Mi"].0, "1Gi");
        let whole = api_quantities(capacity(&settings, &machine));
        assert_eq!((whole["cpu"].0.as_str(), whole["memory"].0.as_str()), ("4", "16Gi"));
    }

    #[test]
    fn reserving_more_than_there_is_leaves_nothing() {
        let settings = NodeSettings { system_reserved: "cpu=100,memory=1Ti".parse().unwrap(), ..settings() };
        let left = allocatable(&settings, &machine());
        assert!(left["cpu"].is_zero() && left["memory"].is_zero());
    }

    #[test]
    fn pressure_follows_the_thresholds() {
        let (settings, machine) = (settings(), machine());
        assert_eq!(Pressure::of(&settings, &machine, &load()), Pressure::default());
        let short = Load { memory_available: 50 << 20, ..load() };
        assert!(Pressure::of(&settings, &machine, &short).memory);
        let short = Load { storage_available: 9 * GI, ..load() };
        assert!(Pressure::of(&settings, &machine, &short).disk);
        let short = Load { inodes_free: 49, ..load() };
        assert!(Pressure::of(&settings, &machine, &short).disk);
        let none = Machine { inodes: 0, ..machine.clone() };
        assert!(!Pressure::of(&settings, &none, &Load { inodes_free: 0, ..load() }).disk);
        let short = Load { pids_available: 1, ..load() };
        assert!(!Pressure::of(&settings, &machine, &short).pids, "kubelet has no default threshold for process ids");
        let mut strict = settings;
        strict.eviction_hard.insert("pid.available".to_owned(), Threshold::Percent(10.0));
        assert!(Pressure::of(&strict, &machine, &short).pids);
    }

    #[test]
    fn a_pressure_stays_up_for_its_transition_period() {
        let (mut memory, hold) = (PressureMemory::default(), Duration::from_secs(300));
        let short = Pressure { memory: true, ..Pressure::default() };
        assert!(!memory.observe(Pressure::default(), hold, at(0)).memory);
        assert!(memory.observe(short, hold, at(10)).memory);
        assert!(memory.observe(Pressure::default(), hold, at(309)).memory);
        assert!(!memory.observe(Pressure::default(), hold, at(310)).memory);
        assert!(!memory.observe(Pressure::default(), hold, at(311)).disk);
    }

    #[test]
    fn labels_and_taints_are_those_told_besides_those_of_every_node() {
        let mut settings = settings();
        settings.name = format!("{}.example", "a".repeat(62));
        settings.labels.insert("type".to_owned(), "virtual-kubelet".to_owned());
        settings.taints = vec!["dedicated=x:NoSchedule".parse::<NodeTaint>().unwrap()];
        let node = node_with(|world| world.settings = settings);
        let labels = node.metadata.labels.unwrap();
        assert_eq!(labels["kubernetes.io/hostname"], "a".repeat(62), "cut to a valid label value");
        assert_eq!(labels["kubernetes.io/os"], "linux");
        assert_eq!(labels["beta.kubernetes.io/arch"], labels["kubernetes.io/arch"]);
        assert_eq!(labels["type"], "virtual-kubelet");
        let taints = node.spec.unwrap().taints.unwrap();
        assert_eq!((taints[0].key.as_str(), taints[0].effect.as_str()), ("dedicated", "NoSchedule"));
    }

    #[test]
    fn the_largest_fifty_named_images_are_listed() {
        let image = |number: u64| Image {
            tags: if number == 100 { Vec::new() } else { vec![format!("i:{number}")] },
            size: number,
            ..Image::new(format!("sha256:{number}"))
        };
        let many = RuntimeFacts { images: (1..=100).map(image).collect(), ..runtime() };
        let listed = status_with(|world| world.runtime = many).images.unwrap();
        assert_eq!(listed.len(), 50);
        assert_eq!(listed[0].size_bytes, Some(99), "an image without a name is of no use to anybody");
        assert_eq!(listed[0].names, Some(vec!["i:99".to_owned()]));
    }

    proptest! {
        #[test]
        fn allocatable_is_never_more_than_capacity(
            memory in 0_u64..1 << 50, storage in 0_u64..1 << 50, cpus in 1_u32..512,
            reserved in 0_i64..1 << 50, percent in 0.0..100.0_f64,
        ) {
            let machine = Machine { cpus, memory, storage, ..machine() };
            let mut settings = settings();
            settings.kube_reserved = Reserved(BTreeMap::from([("memory".to_owned(), Quantity::from_units(reserved))]));
            settings.eviction_hard.insert("nodefs.available".to_owned(), Threshold::Percent(percent));
            let (whole, left) = (capacity(&settings, &machine), allocatable(&settings, &machine));
            for (name, amount) in left {
                prop_assert!(amount >= Quantity::ZERO && amount <= whole[&name], "{name}");
            }
        }
    }
}
