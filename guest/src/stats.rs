//! What is used, read from the kernel's files when it is asked.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use lambdalet_proto::agent::v1::{ContainerUsage, FsUsage, InterfaceUsage, StatsReply, VolumeUsage};

use crate::clock;
use crate::guest::Guest;
use crate::tree;

/// Bytes, packets, errors and dropped: columns of /proc/net/dev, for either direction (proc_pid_net(5)).
const RECEIVED: [usize; 4] = [0, 1, 2, 3];
const SENT: [usize; 4] = [8, 9, 10, 11];

/// What a walk through the scratch disk has found.
#[derive(Debug, Default)]
struct Walked {
    /// Bytes and files of each container's writable layer.
    layers: HashMap<String, (u64, u64)>,
    volumes: Vec<VolumeUsage>,
}

/// The walks through the scratch disk: one at a time. The node gives up on a long one and asks again while it goes on, and
/// more of them would only make each longer.
#[derive(Debug, Default)]
pub(crate) struct Walks {
    /// Whoever walks holds it.
    turn: Mutex<()>,
    last: Mutex<Arc<Walked>>,
}

impl Walks {
    /// Walks, or has what was found last while another does: nothing, before the first is done.
    fn walk(&self, walk: impl FnOnce() -> Walked) -> Arc<Walked> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            // There is nothing behind it that a panic could have left half done.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return Arc::clone(&last()),
        };
        let found = Arc::new(walk());
        *last() = Arc::clone(&found);
        found
    }
}

impl Guest {
    /// All statistics; with `disk` the writable layers and the volumes on the scratch disk are walked, unless that is being
    /// done: then they are what the walk before found.
    pub(crate) fn stats(&self, disk: bool) -> StatsReply {
        let running: Vec<_> = self.containers().values().filter(|container| container.runs()).cloned().collect();
        let ids = running.iter().map(|container| container.spec.id.as_str());
        let walked = if disk { self.walks.walk(|| self.walk(ids)) } else { Arc::default() };
        let usage = |container: &crate::container::Container| {
            let id = &container.spec.id;
            let (layer_bytes, layer_inodes) = walked.layers.get(id).copied().unwrap_or_default();
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
            volumes: walked.volumes.clone(),
        }
    }

    fn walk<'a>(&self, containers: impl Iterator<Item = &'a str>) -> Walked {
        let layer = |id: &str| (id.to_owned(), tree::usage(&self.paths.container(id).join("upper")));
        let layers = containers.map(layer).collect();
        // Found first: a walk may be long, and others need the list meanwhile.
        let volumes = self.scratch_volumes();
        let volume = |(name, path): (String, std::path::PathBuf)| {
            let (bytes, inodes) = tree::usage(&path);
            VolumeUsage { name, bytes, inodes }
        };
        Walked { layers, volumes: volumes.into_iter().map(volume).collect() }
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
    fn who_asks_during_a_walk_has_what_the_one_before_found() {
        let found =
            |bytes| Walked { volumes: vec![VolumeUsage { name: "v".into(), bytes, inodes: 1 }], ..Walked::default() };
        let walks = Walks::default();
        let bytes = |walked: &Walked| walked.volumes.iter().map(|volume| volume.bytes).collect::<Vec<_>>();
        let first = walks.walk(|| {
            assert!(walks.walk(|| panic!("two walk")).volumes.is_empty(), "nothing is known yet");
            found(1)
        });
        let second = walks.walk(|| {
            assert_eq!(bytes(&walks.walk(|| panic!("two walk"))), vec![1]);
            found(2)
        });
        assert_eq!((bytes(&first), bytes(&second)), (vec![1], vec![2]));
    }

    #[test]
    fn memory_is_in_bytes() {
        assert_eq!(kibibytes("MemTotal:  2 kB\nMemAvailable: 1 kB\n", "MemAvailable:"), 1024);
    }
}
