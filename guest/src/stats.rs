//! What is used, read from the kernel's files when it is asked.

use std::fs;

use lambdalet_proto::agent::v1::{ContainerUsage, FsUsage, InterfaceUsage, StatsReply};

use crate::clock;
use crate::guest::Guest;
use crate::tree;

/// Bytes, packets, errors and dropped: columns of /proc/net/dev, for either direction (proc_pid_net(5)).
const RECEIVED: [usize; 4] = [0, 1, 2, 3];
const SENT: [usize; 4] = [8, 9, 10, 11];

impl Guest {
    /// All statistics; with `disk` the writable layers are walked.
    pub(crate) fn stats(&self, disk: bool) -> StatsReply {
        let running: Vec<_> = self.containers().values().filter(|container| container.runs()).cloned().collect();
        let usage = |container: &crate::container::Container| {
            let id = &container.spec.id;
            let upper = self.paths.container(id).join("upper");
            let (layer_bytes, layer_inodes) = if disk { tree::usage(&upper) } else { (0, 0) };
            let usage = Some(self.cgroups.usage(Some(id)));
            ContainerUsage { id: id.clone(), usage, log_bytes: container.log.size(), layer_bytes, layer_inodes }
        };
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        StatsReply {
            time_ns: clock::now_ns(),
            pod: Some(self.cgroups.usage(None)),
            containers: running.iter().map(|container| usage(container)).collect(),
            interfaces: interfaces(&fs::read_to_string("/proc/net/dev").unwrap_or_default()),
            scratch: scratch(&self.scratch()),
            memory_total: kibibytes(&memory, "MemTotal:"),
            memory_available: kibibytes(&memory, "MemAvailable:"),
        }
    }
}

/// Bytes of memory and CPUs of the guest.
pub(crate) fn size() -> (u64, u32) {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    (kibibytes(&memory, "MemTotal:"), cpus)
}

fn kibibytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn interfaces(text: &str) -> Vec<InterfaceUsage> {
    let read = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map_while(|number| number.parse().ok()).collect();
        let pick =
            |columns: [usize; 4]| columns.iter().map(|at| counters.get(*at).copied()).collect::<Option<Vec<_>>>();
        Some(InterfaceUsage { name: name.trim().to_owned(), received: pick(RECEIVED)?, sent: pick(SENT)? })
    };
    text.lines().filter_map(read).filter(|interface| interface.name != "lo").collect()
}

fn scratch(path: &std::path::Path) -> Option<FsUsage> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(FsUsage {
        bytes: found.f_blocks * found.f_frsize,
        available: found.f_bavail * found.f_frsize,
        inodes: found.f_files,
        inodes_free: found.f_ffree,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_interfaces_are_read_by_column() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n    \
                    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";
        let read = interfaces(text);
        let wanted = InterfaceUsage { name: "eth0".into(), received: vec![10, 2, 3, 4], sent: vec![50, 6, 7, 8] };
        assert_eq!(read, [wanted]);
    }

    #[test]
    fn memory_is_in_bytes() {
        assert_eq!(kibibytes("MemTotal:  2 kB\nMemAvailable: 1 kB\n", "MemAvailable:"), 1024);
    }
}
