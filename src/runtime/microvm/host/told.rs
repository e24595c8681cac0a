//! Pure: what a guest says, checked by then, in the driver's terms.

use lambdalet_proto::agent::v1;

use crate::runtime::microvm::agent::said;
use crate::runtime::microvm::vm::{GuestState, GuestStats, LogBatch};
use crate::runtime::stats::{CpuUsage, DiskUsage, Interface, MemoryUsage, StatsScope, Traffic, Usage};
use crate::runtime::types::{ContainerState, LogChunk, LogSource};

pub(super) fn state(container: said::Container) -> GuestState {
    let state = match container.phase {
        said::Phase::Created => ContainerState::Created,
        said::Phase::Running => ContainerState::Running,
        said::Phase::Exited => ContainerState::Exited,
    };
    GuestState {
        id: container.id,
        state,
        frozen: container.frozen,
        // A message says why it could not be started.
        started_at: container.started_at.filter(|_| container.message.is_empty()),
        finished_at: container.finished_at,
        exit_code: container.exit_code,
        oom_killed: container.oom_killed,
        message: container.message,
    }
}

pub(super) fn log(batch: said::LogBatch) -> LogBatch {
    let chunk = |record: said::LogRecord| LogChunk {
        source: if record.stderr { LogSource::Stderr } else { LogSource::Stdout },
        time: record.time,
        line_start: record.line_start,
        bytes: record.bytes,
    };
    LogBatch { chunks: batch.records.into_iter().map(chunk).collect(), next: batch.next, lost: batch.lost }
}

pub(super) fn stats(stats: said::Stats, scope: StatsScope) -> GuestStats {
    let everything = scope > StatsScope::CpuAndMemory;
    let time = stats.time;
    let used = |usage: v1::Usage| Usage {
        time,
        cpu: Some(cpu(&usage)),
        memory: Some(memory(&usage)),
        tasks: everything.then_some(usage.tasks),
        limits: None,
    };
    let container = |one: v1::ContainerUsage| {
        let layer = DiskUsage { time, bytes: one.layer_bytes, inodes: one.layer_inodes };
        (one.id, used(one.usage.unwrap_or_default()), everything.then_some(layer))
    };
    let volume = |one: v1::VolumeUsage| (one.name, DiskUsage { time, bytes: one.bytes, inodes: one.inodes });
    let volumes = stats.volumes.into_iter().filter(|_| everything);
    GuestStats {
        volumes: volumes.map(volume).collect(),
        usage: used(stats.pod),
        network: everything.then(|| stats.interfaces.into_iter().map(interface).collect()),
        containers: stats.containers.into_iter().map(container).collect(),
    }
}

fn cpu(usage: &v1::Usage) -> CpuUsage {
    CpuUsage {
        total: usage.cpu_ns,
        user: usage.cpu_user_ns,
        system: usage.cpu_system_ns,
        periods: usage.cpu_periods,
        throttled_periods: usage.cpu_throttled_periods,
        throttled: usage.cpu_throttled_ns,
    }
}

fn memory(usage: &v1::Usage) -> MemoryUsage {
    MemoryUsage {
        usage: usage.memory,
        // Read at two moments, and by somebody who may lie.
        working_set: usage.memory.saturating_sub(usage.memory_inactive_file),
        rss: usage.memory_anon,
        cache: usage.memory_file,
        mapped_file: usage.memory_mapped,
        swap: 0,
        max_usage: usage.memory_peak,
        failures: usage.memory_failures,
        page_faults: usage.page_faults,
        major_page_faults: usage.major_page_faults,
    }
}

fn interface(one: v1::InterfaceUsage) -> Interface {
    Interface { name: one.name, received: traffic(&one.received), sent: traffic(&one.sent) }
}

fn traffic(counters: &[u64]) -> Traffic {
    let at = |place: usize| counters.get(place).copied().unwrap_or(0);
    Traffic { bytes: at(0), packets: at(1), errors: at(2), dropped: at(3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_started_never_started() {
        let time = jiff::Timestamp::UNIX_EPOCH;
        let said = |message: &str| said::Container {
            id: "c".into(),
            phase: said::Phase::Exited,
            pid: None,
            created_at: time,
            started_at: Some(time),
            finished_at: Some(time),
            exit_code: 127,
            oom_killed: false,
            frozen: false,
            message: message.into(),
            annotations: Default::default(),
        };
        assert_eq!(state(said("no such file")).started_at, None);
        assert_eq!(state(said("")).started_at, Some(time));
    }

    #[test]
    fn what_is_dear_is_told_only_if_everything_was_asked_for() {
        let usage = v1::Usage { memory: 10, memory_inactive_file: 20, tasks: 3, ..v1::Usage::default() };
        let one = v1::ContainerUsage { id: "c".into(), usage: Some(usage), layer_bytes: 7, ..Default::default() };
        let interface = v1::InterfaceUsage { name: "eth0".into(), received: vec![1, 2, 3, 4], sent: vec![5] };
        let said = said::Stats {
            time: jiff::Timestamp::UNIX_EPOCH,
            pod: usage,
            containers: vec![one],
            interfaces: vec![interface],
            volumes: vec![v1::VolumeUsage { name: "v".into(), bytes: 9, inodes: 2 }],
            scratch: None,
            memory_total: 0,
            memory_available: 0,
        };
        let all = stats(said.clone(), StatsScope::All);
        assert_eq!((all.usage.tasks, all.usage.memory.unwrap().working_set), (Some(3), 0));
        assert_eq!(all.containers[0].2.unwrap().bytes, 7);
        let volume = DiskUsage { time: jiff::Timestamp::UNIX_EPOCH, bytes: 9, inodes: 2 };
        assert_eq!(all.volumes, [("v".to_owned(), volume)]);
        let network = all.network.unwrap();
        assert_eq!((network[0].received.dropped, network[0].sent), (4, Traffic { bytes: 5, ..Traffic::default() }));
        let brief = stats(said, StatsScope::CpuAndMemory);
        assert_eq!((brief.network, brief.usage.tasks, brief.containers[0].2), (None, None, None));
        assert!(brief.volumes.is_empty());
    }

    #[test]
    fn what_a_guest_has_dropped_of_a_log_is_told() {
        let said = said::LogBatch { records: Vec::new(), next: 30, lost: 20 };
        assert_eq!(log(said), LogBatch { chunks: Vec::new(), next: 30, lost: 20 });
    }
}
