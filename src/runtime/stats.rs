//! What sandboxes and containers use, in CRI's terms (`ListPodSandboxStats`): counters since the start, and levels now.
//! What the host does not tell is `None`, never zero.

use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::types::{ContainerId, PodRef, SandboxId};

/// How much is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StatsScope {
    /// CPU and memory: cheap enough for every few seconds.
    CpuAndMemory,
    /// What containers use, with their files, and how much memory they may use; nothing of their Pods.
    Containers,
    /// What else is used: network, file systems, processes; and how much memory may be.
    Usage,
    /// Every limit too, how often it was met, and the most that was used. A driver may tell so much where less is asked.
    All,
}

impl StatsScope {
    /// Whether it asks what Pods use beside what their containers do.
    pub(super) fn includes_pods(self) -> bool {
        self != Self::Containers
    }
}

/// CPU time of a cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// All of it, in nanoseconds.
    pub total: u64,
    /// In user mode, in nanoseconds.
    pub user: u64,
    /// In the kernel, in nanoseconds.
    pub system: u64,
    /// Enforcement periods that have passed, if there is a quota.
    pub periods: u64,
    /// Of them, those in which it was held back.
    pub throttled_periods: u64,
    /// How long it was held back, in nanoseconds.
    pub throttled: u64,
}

/// Memory of a cgroup, in bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// All that is charged to it, the page cache too.
    pub usage: u64,
    /// Without the cache that has not been touched lately: what cannot be had back without cost.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Swapped out.
    pub swap: u64,
    /// The most there was; 0 where the kernel does not keep it.
    pub max_usage: u64,
    /// How often the limit was hit.
    pub failures: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Of them, those that read from disk.
    pub major_page_faults: u64,
}

/// Limits of a cgroup; `None` is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Weight, in the units of cgroup v1 (1024 is one core's worth).
    pub cpu_shares: Option<u64>,
    /// Microseconds of CPU time per period.
    pub cpu_quota: Option<u64>,
    /// The period in microseconds.
    pub cpu_period: Option<u64>,
    /// Bytes of memory.
    pub memory: Option<u64>,
}

/// What a cgroup uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// When it was read.
    pub time: Timestamp,
    /// CPU.
    pub cpu: Option<CpuUsage>,
    /// Memory.
    pub memory: Option<MemoryUsage>,
    /// Processes and threads ([`StatsScope::Usage`]).
    pub tasks: Option<u64>,
    /// Its limits ([`StatsScope::All`]; that of memory, [`StatsScope::Containers`]).
    pub limits: Option<Limits>,
}

/// Counters of one direction of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Packets with an error.
    pub errors: u64,
    /// Packets dropped.
    pub dropped: u64,
}

/// Counters of one network interface, as seen from inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// `eth0`.
    pub name: String,
    /// Towards the sandbox.
    pub received: Traffic,
    /// From it.
    pub sent: Traffic,
}

/// Space that files take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// When it was measured: walking a tree is dear, so this may be a minute ago.
    pub time: Timestamp,
    /// Bytes, in whole blocks.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

impl DiskUsage {
    /// Both together, as old as the older of them.
    pub fn plus(self, other: Self) -> Self {
        let (bytes, inodes) = (self.bytes.saturating_add(other.bytes), self.inodes.saturating_add(other.inodes));
        Self { time: self.time.min(other.time), bytes, inodes }
    }

    /// What a directory of the host holds, with what sandboxes hold of the volumes that it stands for.
    pub fn with_sandboxes(self, sandboxes: &[SandboxStats], directory: &Path) -> Self {
        let volumes = sandboxes.iter().flat_map(|sandbox| &sandbox.volumes);
        volumes.filter(|(of, _)| of == directory).fold(self, |sum, (_, usage)| sum.plus(*usage))
    }
}

/// Where images are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageFs {
    /// A directory on that file system.
    pub path: PathBuf,
    /// Bytes of all image layers, each counted once; `None` where the engine does not keep that figure.
    pub used: Option<u64>,
}

/// One running container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerStats {
    /// Its id.
    pub id: ContainerId,
    /// Its name in the Pod.
    pub name: String,
    /// Which attempt.
    pub attempt: u32,
    /// The reference the user wrote.
    pub image_ref: String,
    /// When its process started.
    pub started_at: Option<Timestamp>,
    /// Its cgroup, as a path from the root; empty where it has none.
    pub cgroup: String,
    /// What it uses.
    pub usage: Usage,
    /// Files it wrote outside its volumes ([`StatsScope::Containers`], and not before they were measured for the first time).
    pub writable_layer: Option<DiskUsage>,
    /// Its log (likewise).
    pub log: Option<DiskUsage>,
}

/// One ready sandbox and what runs in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxStats {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub pod: PodRef,
    /// When it was started.
    pub started_at: Option<Timestamp>,
    /// The cgroup of all of it, as a path from the root; empty where it has none.
    pub cgroup: String,
    /// What all of it uses.
    pub usage: Usage,
    /// Its interfaces without loopback ([`StatsScope::Usage`]); `None` on the host's network.
    pub network: Option<Vec<Interface>>,
    /// Its running containers, in no order.
    pub containers: Vec<ContainerStats>,
    /// What its volumes hold where that is not to be found on the host, by the directory on the host that stands for each
    /// ([`StatsScope::Usage`]).
    pub volumes: Vec<(PathBuf, DiskUsage)>,
}
