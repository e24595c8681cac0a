//! Pure: what sandboxes and containers use, as CRI's messages.

use lambdalet_proto::cri::v1;

use super::tell::nanoseconds;
use crate::runtime::stats::{ContainerStats, DiskUsage, Interface, SandboxStats, Usage};

/// What every interface of a sandbox is called that leads out of it.
const DEFAULT_INTERFACE: &str = "eth0";

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn cpu(usage: &Usage) -> Option<v1::CpuUsage> {
    let cpu = usage.cpu?;
    Some(v1::CpuUsage {
        timestamp: nanoseconds(Some(usage.time)),
        usage_core_nano_seconds: value(cpu.total),
        // A rate needs two readings; who asks twice can tell.
        usage_nano_cores: None,
        psi: None,
    })
}

fn memory(usage: &Usage) -> Option<v1::MemoryUsage> {
    let memory = usage.memory?;
    let limit = usage.limits.and_then(|limits| limits.memory);
    Some(v1::MemoryUsage {
        timestamp: nanoseconds(Some(usage.time)),
        working_set_bytes: value(memory.working_set),
        available_bytes: limit.and_then(|limit| value(limit.saturating_sub(memory.working_set))),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.rss),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: None,
    })
}

fn swap(usage: &Usage) -> Option<v1::SwapUsage> {
    let memory = usage.memory?;
    let timestamp = nanoseconds(Some(usage.time));
    Some(v1::SwapUsage { timestamp, swap_available_bytes: None, swap_usage_bytes: value(memory.swap) })
}

fn disk(usage: &DiskUsage, mountpoint: &str) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: nanoseconds(Some(usage.time)),
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: mountpoint.to_owned() }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    }
}

/// What a container uses. `kept` is its record, `mountpoint` where writable layers are.
pub(super) fn container(
    stats: &ContainerStats,
    kept: Option<&v1::CreateContainerRequest>,
    mountpoint: &str,
) -> v1::ContainerStats {
    let config = kept.and_then(|kept| kept.config.as_ref());
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: stats.id.to_string(),
            metadata: Some(v1::ContainerMetadata { name: stats.name.clone(), attempt: stats.attempt }),
            labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
            annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        }),
        cpu: cpu(&stats.usage),
        memory: memory(&stats.usage),
        writable_layer: stats.writable_layer.as_ref().map(|usage| disk(usage, mountpoint)),
        swap: swap(&stats.usage),
        io: None,
    }
}

/// What a sandbox uses, with its containers as [`container`] tells them.
pub(super) fn sandbox(
    stats: &SandboxStats,
    about: v1::PodSandboxAttributes,
    containers: Vec<v1::ContainerStats>,
) -> v1::PodSandboxStats {
    let timestamp = nanoseconds(Some(stats.usage.time));
    let linux = v1::LinuxPodSandboxStats {
        cpu: cpu(&stats.usage),
        memory: memory(&stats.usage),
        network: stats.network.as_ref().and_then(|interfaces| network(interfaces, timestamp)),
        process: stats.usage.tasks.map(|tasks| v1::ProcessUsage { timestamp, process_count: value(tasks) }),
        containers,
        io: None,
    };
    v1::PodSandboxStats { attributes: Some(about), linux: Some(linux), windows: None }
}

/// `None` without a default interface, as where the sandbox is about to end: a kubelet takes it for granted, and falls over
/// where it is missing (1.36, `criInterfaceToSummary`).
fn network(interfaces: &[Interface], timestamp: i64) -> Option<v1::NetworkUsage> {
    let (first, others): (Vec<_>, Vec<_>) =
        interfaces.iter().map(interface).partition(|interface| interface.name == DEFAULT_INTERFACE);
    let default_interface = Some(first.into_iter().next()?);
    Some(v1::NetworkUsage { timestamp, default_interface, interfaces: others })
}

fn interface(counters: &Interface) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: counters.name.clone(),
        rx_bytes: value(counters.received.bytes),
        rx_errors: value(counters.received.errors),
        tx_bytes: value(counters.sent.bytes),
        tx_errors: value(counters.sent.errors),
    }
}

/// A metric that [`metrics`] tells: its name, what it is, and whether it only grows.
type Described = (&'static str, &'static str, v1::MetricType);

/// What is told of each container, under the names that cAdvisor gave them.
const OF_CONTAINER: [Described; 6] = [
    ("container_cpu_usage_seconds_total", "CPU time used, in seconds", v1::MetricType::Counter),
    ("container_memory_usage_bytes", "Memory in use, caches included", v1::MetricType::Gauge),
    ("container_memory_working_set_bytes", "Memory that cannot be had back without cost", v1::MetricType::Gauge),
    ("container_memory_rss", "Anonymous memory", v1::MetricType::Gauge),
    ("container_memory_cache", "Page cache", v1::MetricType::Gauge),
    ("container_processes", "Processes and threads", v1::MetricType::Gauge),
];
/// What is told of each interface of a sandbox.
const OF_INTERFACE: [Described; 4] = [
    ("container_network_receive_bytes_total", "Bytes received", v1::MetricType::Counter),
    ("container_network_receive_packets_total", "Packets received", v1::MetricType::Counter),
    ("container_network_transmit_bytes_total", "Bytes sent", v1::MetricType::Counter),
    ("container_network_transmit_packets_total", "Packets sent", v1::MetricType::Counter),
];
/// The labels that all have, in the order of the values.
const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// Every metric that [`metrics`] may tell.
pub(super) fn descriptors() -> Vec<v1::MetricDescriptor> {
    let describe = |described: &Described, more: &[&str]| v1::MetricDescriptor {
        name: described.0.to_owned(),
        help: described.1.to_owned(),
        label_keys: LABELS.iter().chain(more).map(|label| (*label).to_owned()).collect(),
    };
    let containers = OF_CONTAINER.iter().map(|described| describe(described, &[]));
    containers.chain(OF_INTERFACE.iter().map(|described| describe(described, &["interface"]))).collect()
}

/// The metrics of a sandbox and its containers. Those in seconds are in whole ones, since CRI's values are integers.
pub(super) fn metrics(stats: &SandboxStats) -> v1::PodSandboxMetrics {
    let timestamp = nanoseconds(Some(stats.usage.time));
    let pod = |id: &str, image: &str, container: &str| -> Vec<String> {
        let words = [id, id, image, &stats.pod.namespace, &stats.pod.name, container];
        words.iter().map(|word| (*word).to_owned()).collect()
    };
    let mut of_sandbox = of_usage(&stats.usage, &pod(stats.id.as_str(), "", ""));
    for interface in stats.network.iter().flatten() {
        let mut labels = pod(stats.id.as_str(), "", "");
        labels.push(interface.name.clone());
        let (received, sent) = (interface.received, interface.sent);
        let values = [received.bytes, received.packets, sent.bytes, sent.packets];
        of_sandbox
            .extend(OF_INTERFACE.iter().zip(values).map(|(about, figure)| metric(about, timestamp, &labels, figure)));
    }
    let of_container = |container: &ContainerStats| v1::ContainerMetrics {
        container_id: container.id.to_string(),
        metrics: of_usage(&container.usage, &pod(container.id.as_str(), &container.image_ref, &container.name)),
    };
    v1::PodSandboxMetrics {
        pod_sandbox_id: stats.id.to_string(),
        metrics: of_sandbox,
        container_metrics: stats.containers.iter().map(of_container).collect(),
    }
}

fn of_usage(usage: &Usage, labels: &[String]) -> Vec<v1::Metric> {
    let values = [
        usage.cpu.map(|cpu| cpu.total / 1_000_000_000),
        usage.memory.map(|memory| memory.usage),
        usage.memory.map(|memory| memory.working_set),
        usage.memory.map(|memory| memory.rss),
        usage.memory.map(|memory| memory.cache),
        usage.tasks,
    ];
    let timestamp = nanoseconds(Some(usage.time));
    let told = OF_CONTAINER.iter().zip(values).filter_map(|(about, figure)| Some((about, figure?)));
    told.map(|(about, figure)| metric(about, timestamp, labels, figure)).collect()
}

fn metric(about: &Described, timestamp: i64, labels: &[String], figure: u64) -> v1::Metric {
    v1::Metric {
        name: about.0.to_owned(),
        timestamp,
        metric_type: about.2.into(),
        label_values: labels.to_vec(),
        value: value(figure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::stats::{CpuUsage, MemoryUsage, Traffic};
    use crate::runtime::types::PodRef;

    fn stats() -> SandboxStats {
        let usage = Usage {
            cpu: Some(CpuUsage { total: 2_500_000_000, ..Default::default() }),
            memory: Some(MemoryUsage { usage: 9, working_set: 5, ..Default::default() }),
            tasks: Some(3),
            ..Default::default()
        };
        let eth0 = Interface {
            name: "eth0".to_owned(),
            received: Traffic { bytes: 7, ..Default::default() },
            sent: Traffic::default(),
        };
        let container = ContainerStats {
            id: "c".into(),
            name: "main".to_owned(),
            attempt: 0,
            image_ref: "app".to_owned(),
            started_at: None,
            cgroup: String::new(),
            usage: Usage { tasks: None, ..usage },
            writable_layer: None,
            log: None,
        };
        SandboxStats {
            id: "s".into(),
            pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() },
            started_at: None,
            cgroup: String::new(),
            usage,
            network: Some(vec![eth0]),
            containers: vec![container],
            volumes: Vec::new(),
        }
    }

    #[test]
    fn every_metric_is_described_and_has_a_value_for_each_label() {
        let told = metrics(&stats());
        let described = descriptors();
        let all = told.metrics.iter().chain(told.container_metrics.iter().flat_map(|container| &container.metrics));
        for metric in all {
            let about = described.iter().find(|about| about.name == metric.name);
            assert_eq!(about.map(|about| about.label_keys.len()), Some(metric.label_values.len()), "{metric:?}");
        }
        assert_eq!(told.metrics.len(), OF_CONTAINER.len() + OF_INTERFACE.len());
        // Without a count of processes none is told.
        assert_eq!(told.container_metrics[0].metrics.len(), OF_CONTAINER.len() - 1);
    }

    #[test]
    fn what_is_not_known_is_not_told_as_zero() {
        let told = container(&stats().containers[0], None, "/");
        assert!(told.writable_layer.is_none() && told.cpu.as_ref().is_some_and(|cpu| cpu.usage_nano_cores.is_none()));
        let about = v1::PodSandboxAttributes::default();
        let told = sandbox(&stats(), about, vec![told]).linux.unwrap();
        assert_eq!(
            told.network.and_then(|network| network.default_interface).map(|eth0| eth0.name).as_deref(),
            Some("eth0")
        );
        assert_eq!(told.process.and_then(|process| process.process_count).map(|count| count.value), Some(3));
    }

    #[test]
    fn a_network_without_its_default_interface_is_none() {
        let network_of = |interfaces: Option<Vec<Interface>>| {
            let stats = SandboxStats { network: interfaces, ..stats() };
            sandbox(&stats, v1::PodSandboxAttributes::default(), Vec::new()).linux.unwrap().network
        };
        let other = Interface { name: "lo".to_owned(), ..stats().network.unwrap().remove(0) };
        assert!(network_of(stats().network).is_some());
        assert_eq!((network_of(Some(vec![other])), network_of(Some(Vec::new())), network_of(None)), (None, None, None));
    }
}
