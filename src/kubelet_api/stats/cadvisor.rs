//! Pure: `/metrics/cadvisor`, by the names and labels that dashboards and recording rules query (cAdvisor's "Monitoring
//! with Prometheus").
//!
//! The host is `id="/"` and nothing else; a Pod's own series have its namespace and name, and no container; a
//! container's have all. Network counters are the Pod's.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;

use super::Snapshot;
use super::disks::{ByDevice, Traffic};
use super::exposition::{Exposition, Family, Kind};
use super::fold::pod_uid;
use crate::node::machine::Machine;
use crate::runtime::stats::{CpuUsage, DiskUsage, Interface, Limits, MemoryUsage, Usage};

const NANOSECONDS: f64 = 1e9;
/// What is told of a limit that is not set.
const NO_LIMIT: f64 = 0.0;

/// One cgroup with its labels.
struct Subject<'a> {
    labels: [(&'static str, &'a str); 6],
    usage: Usage,
    started_at: Option<Timestamp>,
    network: &'a [Interface],
    /// Writable layer and log.
    disk: Option<DiskUsage>,
}

type Figure<T> = (&'static str, Kind, &'static str, fn(&T) -> f64);

const CPU: [Figure<CpuUsage>; 2] = [
    ("container_cpu_user_seconds_total", Kind::Counter, "CPU time in user mode, in seconds", |c| {
        c.user as f64 / NANOSECONDS
    }),
    ("container_cpu_system_seconds_total", Kind::Counter, "CPU time in the kernel, in seconds", |c| {
        c.system as f64 / NANOSECONDS
    }),
];

const THROTTLED: [Figure<CpuUsage>; 3] = [
    ("container_cpu_cfs_periods_total", Kind::Counter, "Enforcement periods that have passed", |c| c.periods as f64),
    ("container_cpu_cfs_throttled_periods_total", Kind::Counter, "Periods in which it was held back", |c| {
        c.throttled_periods as f64
    }),
    ("container_cpu_cfs_throttled_seconds_total", Kind::Counter, "How long it was held back", |c| {
        c.throttled as f64 / NANOSECONDS
    }),
];

const MEMORY: [Figure<MemoryUsage>; 8] = [
    ("container_memory_usage_bytes", Kind::Gauge, "Memory in use, cache included", |m| m.usage as f64),
    ("container_memory_working_set_bytes", Kind::Gauge, "Working set", |m| m.working_set as f64),
    ("container_memory_rss", Kind::Gauge, "Anonymous memory in bytes", |m| m.rss as f64),
    ("container_memory_cache", Kind::Gauge, "Page cache in bytes", |m| m.cache as f64),
    ("container_memory_mapped_file", Kind::Gauge, "Mapped files in bytes", |m| m.mapped_file as f64),
    ("container_memory_swap", Kind::Gauge, "Swap in bytes", |m| m.swap as f64),
    ("container_memory_max_usage_bytes", Kind::Gauge, "The most memory there was in use", |m| m.max_usage as f64),
    ("container_memory_failcnt", Kind::Counter, "How often the memory limit was hit", |m| m.failures as f64),
];

const LIMITS: [Figure<Limits>; 2] = [
    ("container_spec_cpu_shares", Kind::Gauge, "CPU weight", |l| l.cpu_shares.map_or(NO_LIMIT, |shares| shares as f64)),
    ("container_spec_memory_limit_bytes", Kind::Gauge, "Memory limit, 0 if there is none", |l| {
        l.memory.map_or(NO_LIMIT, |bytes| bytes as f64)
    }),
];

const QUOTA: [Figure<Limits>; 2] = [
    ("container_spec_cpu_period", Kind::Gauge, "CPU period in microseconds", |l| l.cpu_period.unwrap_or(0) as f64),
    ("container_spec_cpu_quota", Kind::Gauge, "CPU quota in microseconds", |l| l.cpu_quota.unwrap_or(0) as f64),
];

const TRAFFIC: [Figure<Interface>; 8] = [
    ("container_network_receive_bytes_total", Kind::Counter, "Bytes received", |i| i.received.bytes as f64),
    ("container_network_receive_packets_total", Kind::Counter, "Packets received", |i| i.received.packets as f64),
    ("container_network_receive_errors_total", Kind::Counter, "Errors while receiving", |i| i.received.errors as f64),
    ("container_network_receive_packets_dropped_total", Kind::Counter, "Packets dropped while receiving", |i| {
        i.received.dropped as f64
    }),
    ("container_network_transmit_bytes_total", Kind::Counter, "Bytes sent", |i| i.sent.bytes as f64),
    ("container_network_transmit_packets_total", Kind::Counter, "Packets sent", |i| i.sent.packets as f64),
    ("container_network_transmit_errors_total", Kind::Counter, "Errors while sending", |i| i.sent.errors as f64),
    ("container_network_transmit_packets_dropped_total", Kind::Counter, "Packets dropped while sending", |i| {
        i.sent.dropped as f64
    }),
];

const DISKS: [Figure<Traffic>; 4] = [
    ("container_fs_reads_bytes_total", Kind::Counter, "Bytes read from a device", |t| t.bytes_read as f64),
    ("container_fs_reads_total", Kind::Counter, "Reads from a device", |t| t.reads as f64),
    ("container_fs_writes_bytes_total", Kind::Counter, "Bytes written to a device", |t| t.bytes_written as f64),
    ("container_fs_writes_total", Kind::Counter, "Writes to a device", |t| t.writes as f64),
];

/// The cgroups told of, each once.
pub(super) fn cgroups(snapshot: &Snapshot) -> HashSet<String> {
    let ids = subjects(snapshot).into_iter().map(|subject| subject.cgroup().to_owned());
    ids.filter(|id| !id.is_empty()).collect()
}

/// The text; `disks` is by cgroup.
pub(super) fn render(snapshot: &Snapshot, disks: &HashMap<String, ByDevice>, machine: Option<&Machine>) -> String {
    let mut out = Exposition::default();
    let subjects = subjects(snapshot);
    let help = "CPU time used, in seconds";
    let mut family = out.family("container_cpu_usage_seconds_total", Kind::Counter, help);
    for subject in &subjects {
        if let Some(cpu) = subject.usage.cpu {
            subject.add(&mut family, &[("cpu", "total")], cpu.total as f64 / NANOSECONDS);
        }
    }
    figures(&mut out, &CPU, &subjects, |subject| subject.usage.cpu);
    figures(&mut out, &THROTTLED, &subjects, |subject| {
        subject.usage.limits.and_then(|limits| limits.cpu_quota).and(subject.usage.cpu)
    });
    figures(&mut out, &MEMORY, &subjects, |subject| subject.usage.memory);
    failures(&mut out, &subjects);
    figures(&mut out, &LIMITS, &subjects, |subject| subject.usage.limits);
    figures(&mut out, &QUOTA, &subjects, |subject| subject.usage.limits.filter(|limits| limits.cpu_quota.is_some()));
    for (name, kind, help, value) in TRAFFIC {
        let mut family = out.family(name, kind, help);
        for subject in &subjects {
            for interface in subject.network {
                subject.add(&mut family, &[("interface", &interface.name)], value(interface));
            }
        }
    }
    for (name, kind, help, value) in DISKS {
        let mut family = out.family(name, kind, help);
        for subject in &subjects {
            for (device, traffic) in disks.get(subject.cgroup()).into_iter().flatten() {
                subject.add(&mut family, &[("device", device)], value(traffic));
            }
        }
    }
    let disk: [Figure<DiskUsage>; 2] = [
        ("container_fs_usage_bytes", Kind::Gauge, "Bytes of writable layer and log", |d| d.bytes as f64),
        ("container_fs_inodes_used", Kind::Gauge, "Files of writable layer and log", |d| d.inodes as f64),
    ];
    figures(&mut out, &disk, &subjects, |subject| subject.disk);
    let tasks: [Figure<u64>; 1] = [("container_threads", Kind::Gauge, "Processes and threads", |tasks| *tasks as f64)];
    figures(&mut out, &tasks, &subjects, |subject| subject.usage.tasks);
    let times: [Figure<Timestamp>; 1] =
        [("container_start_time_seconds", Kind::Gauge, "Start, in seconds since 1970", |time| time.as_second() as f64)];
    figures(&mut out, &times, &subjects, |subject| subject.started_at);
    let seen: [Figure<Usage>; 1] =
        [("container_last_seen", Kind::Gauge, "When it was last seen", |usage| usage.time.as_second() as f64)];
    figures(&mut out, &seen, &subjects, |subject| Some(subject.usage));
    machine_figures(&mut out, machine);
    out.family("container_scrape_error", Kind::Gauge, "1 if the figures could not be read, 0 otherwise").sample(
        &[],
        0.0,
        None,
    );
    out.finish()
}

fn figures<T>(
    out: &mut Exposition,
    table: &[Figure<T>],
    subjects: &[Subject<'_>],
    of: impl Fn(&Subject<'_>) -> Option<T>,
) {
    for (name, kind, help, value) in table {
        let mut family = out.family(name, *kind, help);
        for subject in subjects {
            if let Some(figure) = of(subject) {
                subject.add(&mut family, &[], value(&figure));
            }
        }
    }
}

fn failures(out: &mut Exposition, subjects: &[Subject<'_>]) {
    let mut family = out.family("container_memory_failures_total", Kind::Counter, "Page faults");
    for subject in subjects {
        let Some(memory) = subject.usage.memory else { continue };
        for (what, count) in [("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)] {
            subject.add(&mut family, &[("failure_type", what), ("scope", "hierarchy")], count as f64);
        }
    }
}

fn machine_figures(out: &mut Exposition, machine: Option<&Machine>) {
    let Some(machine) = machine else { return };
    let labels = [
        ("boot_id", machine.boot_id.as_str()),
        ("machine_id", machine.machine_id.as_str()),
        ("system_uuid", machine.system_uuid.as_str()),
    ];
    out.family("machine_cpu_cores", Kind::Gauge, "Processors").sample(&labels, f64::from(machine.cpus), None);
    out.family("machine_memory_bytes", Kind::Gauge, "Memory").sample(&labels, machine.memory as f64, None);
}

impl Subject<'_> {
    fn cgroup(&self) -> &str {
        self.labels[1].1
    }

    fn add(&self, family: &mut Family<'_>, more: &[(&str, &str)], value: f64) {
        let labels: Vec<_> = self.labels.iter().chain(more).copied().collect();
        family.sample(&labels, value, Some(self.usage.time));
    }
}

fn subjects(snapshot: &Snapshot) -> Vec<Subject<'_>> {
    let node = Subject {
        labels: labels(["", "/", "", "", "", ""]),
        usage: snapshot.node,
        started_at: None,
        network: &snapshot.network,
        disk: None,
    };
    let mut subjects = vec![node];
    // Environments of one replica share its cgroup, which is told once; and what passes the Pod's own interface.
    let mut cgroups = HashSet::new();
    for pod in &snapshot.sandboxes {
        let (namespace, name) = (pod.pod.namespace.as_str(), pod.pod.name.as_str());
        let own = pod.pod.uid == pod_uid(pod);
        if pod.cgroup.is_empty() || cgroups.insert(pod.cgroup.as_str()) {
            subjects.push(Subject {
                labels: labels(["", &pod.cgroup, "", "", namespace, name]),
                usage: pod.usage,
                started_at: pod.started_at,
                network: pod.network.as_deref().filter(|_| own).unwrap_or_default(),
                disk: None,
            });
        }
        for container in &pod.containers {
            let (image, id) = (container.image_ref.as_str(), container.id.as_str());
            subjects.push(Subject {
                labels: labels([&container.name, &container.cgroup, image, id, namespace, name]),
                usage: container.usage,
                started_at: container.started_at,
                network: &[],
                disk: container.writable_layer.map(|layer| with(layer, container.log)),
            });
        }
    }
    subjects
}

fn labels([container, id, image, name, namespace, pod]: [&str; 6]) -> [(&'static str, &str); 6] {
    [("container", container), ("id", id), ("image", image), ("name", name), ("namespace", namespace), ("pod", pod)]
}

fn with(layer: DiskUsage, log: Option<DiskUsage>) -> DiskUsage {
    let log = log.unwrap_or_default();
    DiskUsage { bytes: layer.bytes + log.bytes, inodes: layer.inodes + log.inodes, ..layer }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::stats::{ContainerStats, SandboxStats, StatsScope};
    use crate::runtime::types::{ContainerId, PodRef, SandboxId};

    #[test]
    fn what_a_cgroup_read_and_wrote_is_told_by_device_and_of_no_cgroup_nothing() {
        let container = |name: &str, cgroup: &str| ContainerStats {
            id: ContainerId::from(name),
            name: name.into(),
            attempt: 0,
            image_ref: "i".into(),
            started_at: None,
            cgroup: cgroup.into(),
            usage: Usage::default(),
            writable_layer: None,
            log: None,
        };
        let sandbox = SandboxStats {
            id: SandboxId::from("s"),
            pod: PodRef { uid: "u".into(), namespace: "ns".into(), name: "p".into() },
            started_at: None,
            cgroup: "/l/pod".into(),
            usage: Usage::default(),
            network: None,
            containers: vec![container("c", "/l/pod/c"), container("in-a-guest", "")],
            volumes: Vec::new(),
        };
        let snapshot = Snapshot {
            scope: StatsScope::All,
            time: Timestamp::UNIX_EPOCH,
            node: Usage::default(),
            network: Vec::new(),
            pods: Vec::new(),
            sandboxes: vec![sandbox],
            rates: HashMap::new(),
        };
        assert_eq!(cgroups(&snapshot), ["/", "/l/pod", "/l/pod/c"].map(str::to_owned).into());
        let traffic = Traffic { bytes_read: 1, bytes_written: 2, reads: 3, writes: 4 };
        let disks =
            ["/", "/l/pod/c"].map(|cgroup| (cgroup.to_owned(), ByDevice::from([("/dev/vda".to_owned(), traffic)])));
        let text = render(&snapshot, &HashMap::from(disks), None);
        let told: Vec<_> =
            text.lines().filter(|line| line.starts_with("container_fs_") && line.contains("\"c\"")).collect();
        let labels =
            "{container=\"c\",id=\"/l/pod/c\",image=\"i\",name=\"c\",namespace=\"ns\",pod=\"p\",device=\"/dev/vda\"}";
        let wanted = [("reads_bytes", 1), ("reads", 3), ("writes_bytes", 2), ("writes", 4)];
        assert_eq!(told, wanted.map(|(name, value)| format!("container_fs_{name}_total{labels} {value} 0")));
        assert_eq!(text.matches("device=\"/dev/vda\"").count(), 8);
    }
}
