//! Pure: the body of `/stats/summary`, a `Summary` of the API `stats/v1alpha1`. What is not known is left out.

use jiff::Timestamp;
use serde::Serialize;

use super::Snapshot;
use super::space::{Space, VolumeSpace};
use crate::node::machine::{Extent, Load};
use crate::runtime::stats::{ContainerStats, DiskUsage, Interface, SandboxStats, Usage};

/// The node, besides what it uses.
pub(super) struct Host<'a> {
    pub(super) name: &'a str,
    pub(super) load: Option<Load>,
    /// `None` where only CPU and memory are asked for.
    pub(super) space: Option<&'a Space>,
}

#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    node: Node<'a>,
    pods: Vec<Pod<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node<'a> {
    node_name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<Network<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fs: Option<FileSystem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runtime: Option<Runtime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rlimit: Option<ProcessLimit>,
}

/// Where images are, and where containers write.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Runtime {
    image_fs: FileSystem,
    container_fs: FileSystem,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pod<'a> {
    pod_ref: PodReference<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<String>,
    containers: Vec<Container<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<Network<'a>>,
    #[serde(rename = "volume", skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<Volume<'a>>,
    #[serde(rename = "ephemeral-storage", skip_serializing_if = "Option::is_none")]
    ephemeral_storage: Option<FileSystem>,
    #[serde(rename = "process_stats", skip_serializing_if = "Option::is_none")]
    processes: Option<Processes>,
}

#[derive(Debug, Serialize)]
struct Volume<'a> {
    name: &'a str,
    #[serde(flatten)]
    fs: FileSystem,
}

#[derive(Debug, Serialize)]
struct PodReference<'a> {
    name: &'a str,
    namespace: &'a str,
    uid: &'a str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Container<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rootfs: Option<FileSystem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logs: Option<FileSystem>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cpu {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage_nano_cores: Option<u64>,
    usage_core_nano_seconds: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_bytes: Option<u64>,
    usage_bytes: u64,
    working_set_bytes: u64,
    rss_bytes: u64,
    page_faults: u64,
    major_page_faults: u64,
}

#[derive(Debug, Serialize)]
struct Network<'a> {
    time: String,
    /// The default interface: the first.
    #[serde(flatten)]
    default: Option<Counters<'a>>,
    interfaces: Vec<Counters<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Counters<'a> {
    name: &'a str,
    rx_bytes: u64,
    rx_errors: u64,
    tx_bytes: u64,
    tx_errors: u64,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct FileSystem {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capacity_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    used_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes_free: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes_used: Option<u64>,
}

#[derive(Debug, Serialize)]
struct ProcessLimit {
    time: String,
    maxpid: u64,
    curproc: u64,
}

#[derive(Debug, Serialize)]
struct Processes {
    process_count: u64,
}

/// The summary of what was read.
pub(super) fn summary<'a>(snapshot: &'a Snapshot, host: &Host<'a>) -> Summary<'a> {
    let available = host.load.map(|load| load.memory_available);
    let node = Node {
        node_name: host.name,
        cpu: cpu(snapshot, "/", &snapshot.node),
        memory: memory(&snapshot.node, available),
        network: host.space.map(|_| network(snapshot.time, &snapshot.network)),
        fs: host.space.and_then(|space| Some(node_fs(snapshot, space.node?))),
        runtime: host.space.and_then(|space| runtime(snapshot, space)),
        rlimit: host.load.filter(|_| host.space.is_some()).map(|load| ProcessLimit {
            time: second(snapshot.time),
            maxpid: load.pids,
            curproc: load.pids.saturating_sub(load.pids_available),
        }),
    };
    Summary { node, pods: snapshot.pods.iter().map(|pod| pod_summary(snapshot, host.space, pod)).collect() }
}

fn pod_summary<'a>(snapshot: &'a Snapshot, space: Option<&'a Space>, pod: &'a SandboxStats) -> Pod<'a> {
    let volumes = space.and_then(|space| space.volumes.get(&pod.pod.uid)).map(Vec::as_slice).unwrap_or_default();
    let written = pod.containers.iter().flat_map(|container| [container.writable_layer, container.log]).flatten();
    let local = volumes.iter().filter(|volume| volume.on_disk).map(|volume| volume.usage);
    let ephemeral = sum(written.chain(local));
    let (node, images) = (space.and_then(|space| space.node), space.and_then(|space| space.images));
    Pod {
        pod_ref: PodReference { name: &pod.pod.name, namespace: &pod.pod.namespace, uid: &pod.pod.uid },
        start_time: pod.started_at.map(second),
        containers: pod.containers.iter().map(|container| container_summary(snapshot, images, container)).collect(),
        cpu: cpu(snapshot, &pod.cgroup, &pod.usage),
        memory: memory(&pod.usage, left_to(&pod.usage)),
        network: pod.network.as_deref().map(|interfaces| network(pod.usage.time, interfaces)),
        volumes: volumes.iter().map(volume).collect(),
        ephemeral_storage: ephemeral.map(|usage| disk(usage, node)),
        processes: pod.usage.tasks.map(|process_count| Processes { process_count }),
    }
}

fn volume(volume: &VolumeSpace) -> Volume<'_> {
    Volume { name: &volume.name, fs: disk(volume.usage, Some(volume.around)) }
}

fn sum(usages: impl Iterator<Item = DiskUsage>) -> Option<DiskUsage> {
    usages.reduce(DiskUsage::plus)
}

fn container_summary<'a>(snapshot: &Snapshot, images: Option<Extent>, container: &'a ContainerStats) -> Container<'a> {
    Container {
        name: &container.name,
        start_time: container.started_at.map(second),
        cpu: cpu(snapshot, &container.cgroup, &container.usage),
        memory: memory(&container.usage, left_to(&container.usage)),
        rootfs: container.writable_layer.map(|usage| disk(usage, images)),
        logs: container.log.map(|usage| disk(usage, images)),
    }
}

/// As the API writes times: to the second.
fn second(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn cpu(snapshot: &Snapshot, cgroup: &str, usage: &Usage) -> Option<Cpu> {
    Some(Cpu {
        time: second(usage.time),
        usage_nano_cores: snapshot.rates.get(cgroup).copied(),
        usage_core_nano_seconds: usage.cpu?.total,
    })
}

/// What a limit leaves; nothing is said where there is none.
fn left_to(usage: &Usage) -> Option<u64> {
    Some(usage.limits?.memory?.saturating_sub(usage.memory?.working_set))
}

fn memory(usage: &Usage, available_bytes: Option<u64>) -> Option<Memory> {
    let memory = usage.memory?;
    Some(Memory {
        time: second(usage.time),
        available_bytes,
        usage_bytes: memory.usage,
        working_set_bytes: memory.working_set,
        rss_bytes: memory.rss,
        page_faults: memory.page_faults,
        major_page_faults: memory.major_page_faults,
    })
}

fn network(time: Timestamp, interfaces: &[Interface]) -> Network<'_> {
    Network {
        time: second(time),
        default: interfaces.first().map(Counters::of),
        interfaces: interfaces.iter().map(Counters::of).collect(),
    }
}

impl<'a> Counters<'a> {
    fn of(interface: &'a Interface) -> Self {
        let (received, sent) = (interface.received, interface.sent);
        Self {
            name: &interface.name,
            rx_bytes: received.bytes,
            rx_errors: received.errors,
            tx_bytes: sent.bytes,
            tx_errors: sent.errors,
        }
    }
}

/// What files take, on the file system they are on.
fn disk(usage: DiskUsage, around: Option<Extent>) -> FileSystem {
    FileSystem { used_bytes: Some(usage.bytes), inodes_used: Some(usage.inodes), ..file_system(usage.time, around) }
}

fn file_system(time: Timestamp, extent: Option<Extent>) -> FileSystem {
    FileSystem {
        time: second(time),
        available_bytes: extent.map(|extent| extent.bytes_free),
        capacity_bytes: extent.map(|extent| extent.bytes),
        inodes_free: extent.map(|extent| extent.inodes_free),
        inodes: extent.map(|extent| extent.inodes),
        ..FileSystem::default()
    }
}

fn node_fs(snapshot: &Snapshot, extent: Extent) -> FileSystem {
    FileSystem {
        used_bytes: Some(extent.bytes.saturating_sub(extent.bytes_free)),
        inodes_used: Some(extent.inodes.saturating_sub(extent.inodes_free)),
        ..file_system(snapshot.time, Some(extent))
    }
}

/// Images and what containers write are on one file system.
fn runtime(snapshot: &Snapshot, space: &Space) -> Option<Runtime> {
    let around = Some(space.images?);
    let containers = snapshot.pods.iter().flat_map(|pod| &pod.containers);
    let written = sum(containers.filter_map(|container| container.writable_layer));
    Some(Runtime {
        image_fs: FileSystem { used_bytes: space.image_bytes, ..file_system(snapshot.time, around) },
        container_fs: written.map_or_else(|| file_system(snapshot.time, around), |usage| disk(usage, around)),
    })
}
