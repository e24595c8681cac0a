//! The nouns of the runtime seam: no Kubernetes type and no driver type appears here.

mod image;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

pub use super::attached::SandboxNetwork;
pub use image::{Image, RegistryAuth};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as the driver wrote it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl<T: Into<Arc<str>>> From<T> for $name {
            fn from(id: T) -> Self {
                Self(id.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A sandbox: the environment (network, IPC, cgroup parent) that the containers of one Pod share.
    SandboxId
);
id!(
    /// One attempt of one container.
    ContainerId
);
id!(
    /// The content address of an image (`sha256:…`), equal on every node that holds the same image.
    ImageId
);

/// Whose sandbox or container this is. The UID is the identity; the names are for people and log lines.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which namespace of a kind the containers of a sandbox use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NamespaceMode {
    /// One for all containers of the sandbox.
    Pod,
    /// Each container its own.
    #[default]
    Container,
    /// The host's.
    Node,
}

/// What the machine of a sandbox is started from where that is not the node's own. Drivers without machines do not look at
/// it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineFiles {
    /// An uncompressed kernel; as whoever asks for the sandbox names it, so the driver checks where it lies.
    pub kernel: Option<PathBuf>,
    /// An initramfs whose `/init` is the agent; likewise.
    pub initramfs: Option<PathBuf>,
    /// Added to the kernel's arguments.
    pub kernel_args: Vec<String>,
}

/// What a sandbox is made from.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// The Pod it is for.
    pub pod: PodRef,
    /// Which driver runs it (`docker`, `microvm`), where there are several; `None` for the node's own.
    pub handler: Option<String>,
    /// How many sandboxes this Pod had before (0 for the first); part of the sandbox's name.
    pub attempt: u32,
    /// Host name of every container in it, at most 63 bytes.
    pub hostname: String,
    /// Its network.
    pub network: SandboxNetwork,
    /// [`NamespaceMode::Pod`] (shared by all containers) or [`NamespaceMode::Node`].
    pub ipc: NamespaceMode,
    /// PID namespace of the containers.
    pub pid: NamespaceMode,
    /// Kernel parameters of the sandbox's namespaces, name to value.
    pub sysctls: BTreeMap<String, String>,
    /// The cgroup below which everything of this sandbox lives, as a path from the cgroup root
    /// (`/lambdalet-1a2b3c4d/burstable/pod<uid>`).
    pub cgroup_parent: String,
    /// Limits of that cgroup: the Pod's sum, where every container has one.
    pub resources: Resources,
    /// What its machine is started from, if it has one.
    pub machine: MachineFiles,
}

/// What one attempt of a container is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerConfig {
    /// The Pod it belongs to.
    pub pod: PodRef,
    /// The container's name in the Pod.
    pub name: String,
    /// How often it was started before (0 for the first).
    pub attempt: u32,
    /// The image to run; it must be present.
    pub image: ImageId,
    /// The reference the user wrote (`busybox:1.36`), for people.
    pub image_ref: String,
    /// Replaces the image's ENTRYPOINT if not empty (and then the image's CMD is not used).
    pub command: Vec<String>,
    /// Replaces the image's CMD if not empty.
    pub args: Vec<String>,
    /// Replaces the image's WORKDIR if set.
    pub working_dir: Option<String>,
    /// Environment in order; a later entry of the same name wins. Added to the image's own.
    pub env: Vec<(String, String)>,
    /// Bind mounts, in order.
    pub mounts: Vec<Mount>,
    /// Keep stdin open for an attach.
    pub stdin: bool,
    /// Close stdin when the first attached client leaves.
    pub stdin_once: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// cgroup limits.
    pub resources: Resources,
    /// Rights.
    pub security: Security,
    /// The sandbox's [`SandboxConfig::cgroup_parent`].
    pub cgroup_parent: String,
    /// [`SandboxConfig::pid`].
    pub pid: NamespaceMode,
    /// A running container of the same sandbox whose PID namespace it joins; [`ContainerConfig::pid`] does not count then
    /// (CRI's `NamespaceMode.TARGET`). It ends when that container ends.
    pub pid_target: Option<ContainerId>,
    /// [`SandboxConfig::ipc`].
    pub ipc: NamespaceMode,
    /// Signal that asks the process to end (`SIGTERM`); `None` is the image's STOPSIGNAL, or SIGTERM.
    pub stop_signal: Option<String>,
    /// What the caller wants to read back after a restart (at most a few hundred bytes each).
    pub annotations: BTreeMap<String, String>,
}

impl ContainerConfig {
    /// The first attempt of a container that runs `command` and asks for nothing else: no mounts, no input, no limits, the
    /// sandbox's IPC namespace and a PID namespace of its own.
    pub fn new(pod: PodRef, name: impl Into<String>, image: ImageId, command: Vec<String>) -> Self {
        Self {
            pod,
            name: name.into(),
            attempt: 0,
            image_ref: image.as_str().to_owned(),
            image,
            command,
            args: Vec::new(),
            working_dir: None,
            env: Vec::new(),
            mounts: Vec::new(),
            stdin: false,
            stdin_once: false,
            tty: false,
            resources: Resources::default(),
            security: Security::default(),
            cgroup_parent: String::new(),
            pid: NamespaceMode::Container,
            pid_target: None,
            ipc: NamespaceMode::Pod,
            stop_signal: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// One host path made visible inside a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Absolute path on the host; it must exist.
    pub host_path: PathBuf,
    /// A file or directory below it that is shown in its place, made as a directory if it is missing; empty: none. Only for
    /// drivers that share no directory with the host: the others are given the part's own path.
    pub sub_path: String,
    /// An image that is shown in place of a host path, to be read only. Only for the same drivers.
    pub image: Option<ImageId>,
    /// Absolute path in the container; made if missing.
    pub container_path: String,
    /// Refuse writes.
    pub read_only: bool,
    /// How mounts made later travel between host and container.
    pub propagation: MountPropagation,
}

/// Mount propagation of a [`Mount`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountPropagation {
    /// None, in either direction (rprivate).
    #[default]
    Private,
    /// The container sees mounts the host makes later (rslave).
    HostToContainer,
    /// Both ways (rshared); privileged containers only.
    Bidirectional,
}

/// cgroup limits; `None` leaves the runtime's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Resources {
    /// Relative CPU weight, cgroup v1 scale (2 to 262144, 1024 is one core).
    pub cpu_shares: Option<i64>,
    /// CPU time per period in microseconds.
    pub cpu_quota: Option<i64>,
    /// The period in microseconds (100000 by custom).
    pub cpu_period: Option<i64>,
    /// Bytes.
    pub memory_limit: Option<i64>,
    /// -1000 (never killed first) to 1000. A host that may not lower it goes without.
    pub oom_score_adj: Option<i64>,
    /// Most processes and threads at once.
    pub pids_limit: Option<i64>,
}

/// Rights of a container's process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// Numeric user; `None` is the image's.
    pub run_as_user: Option<i64>,
    /// Numeric primary group; `None` is the image's.
    pub run_as_group: Option<i64>,
    /// More groups.
    pub supplemental_groups: Vec<i64>,
    /// All capabilities and devices, no confinement.
    pub privileged: bool,
    /// Capabilities added to the runtime's default set (`NET_ADMIN`, `ALL`).
    pub add_capabilities: Vec<String>,
    /// Capabilities taken from it.
    pub drop_capabilities: Vec<String>,
    /// Mount the root file system read-only.
    pub read_only_rootfs: bool,
    /// Forbid gaining rights by execve (`allowPrivilegeEscalation: false`).
    pub no_new_privileges: bool,
    /// System-call filter.
    pub seccomp: Profile,
    /// AppArmor profile.
    pub apparmor: Profile,
    /// Show `/proc` whole (`procMount: Unmasked`).
    pub unmasked_proc: bool,
}

/// A confinement profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// The runtime's own.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A profile on the node: for seccomp the file's absolute path, for AppArmor the loaded profile's name.
    Localhost(String),
}

/// Whether a sandbox is usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxState {
    /// Its network is up and containers can be created in it.
    Ready,
    /// It is stopped, half made, or its holder process died: only good for removal.
    NotReady,
}

/// One sandbox as the runtime sees it.
#[derive(Clone, Debug)]
pub struct SandboxStatus {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub pod: PodRef,
    /// [`SandboxConfig::attempt`].
    pub attempt: u32,
    /// Usable or not.
    pub state: SandboxState,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its addresses, at most one of each family, the first one first; none on the host's network.
    pub addresses: Vec<IpAddr>,
    /// Process that holds the namespaces, on the host; `None` if not running.
    pub pid: Option<i32>,
}

impl SandboxStatus {
    /// Its first address; `None` on the host's network.
    pub fn address(&self) -> Option<IpAddr> {
        self.addresses.first().copied()
    }
}

/// Where in its life a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended, or it could not be started.
    Exited,
}

/// One attempt of one container as the runtime sees it.
#[derive(Clone, Debug)]
pub struct ContainerStatus {
    /// Its id.
    pub id: ContainerId,
    /// The sandbox it lives in.
    pub sandbox: SandboxId,
    /// Whose it is.
    pub pod: PodRef,
    /// The container's name in the Pod.
    pub name: String,
    /// [`ContainerConfig::attempt`].
    pub attempt: u32,
    /// Where in its life it is.
    pub state: ContainerState,
    /// Whether it is frozen ([`pause_container`](super::SandboxRuntime::pause_container)); its state is running then.
    pub frozen: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its process started.
    pub started_at: Option<Timestamp>,
    /// When its process ended.
    pub finished_at: Option<Timestamp>,
    /// Exit code (128 + signal for a killed process); only meaningful once exited.
    pub exit_code: i32,
    /// Whether the kernel killed it for want of memory.
    pub oom_killed: bool,
    /// The runtime's own words for a failed start, else empty.
    pub message: String,
    /// The image it runs.
    pub image: ImageId,
    /// The reference the user wrote.
    pub image_ref: String,
    /// Its first process on the host while running.
    pub pid: Option<i32>,
    /// The limits it has now, as far as the driver tells them.
    pub resources: Option<Resources>,
    /// [`ContainerConfig::annotations`].
    pub annotations: BTreeMap<String, String>,
}

/// Name and version of what runs the containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// `docker`, `fake`, …; the scheme of container ids in Pod status.
    pub name: String,
    /// Its version (`20.10.24`).
    pub version: String,
}

/// How an engine names the cgroup that a sandbox's containers are in, for whoever makes that cgroup itself
/// (`cgroupDriver` of a KubeletConfiguration).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// By its path: `/kubepods/burstable/pod1`.
    Cgroupfs,
    /// As a slice of systemd: `kubepods-burstable-pod1.slice`.
    Systemd,
}

/// Which lines of a container's log are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Stay and deliver what comes later, until the container is removed or has exited and all is delivered.
    pub follow: bool,
    /// Only the last so many lines; `Some(0)` delivers nothing old.
    pub tail: Option<u64>,
    /// Only lines written at or after this moment.
    pub since: Option<Timestamp>,
}

/// The stream a piece of log was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogSource {
    /// Standard output (everything, for a container with a terminal).
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of log: a whole line with its newline, or part of a long line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogChunk {
    /// Where it was written.
    pub source: LogSource,
    /// When it was written; on a part that continues a line, that part's own time.
    pub time: Timestamp,
    /// Whether this begins a line; false for the second and later parts of one.
    pub line_start: bool,
    /// The bytes, the newline included where the line ends.
    pub bytes: bytes::Bytes,
}

/// Something that happened to a sandbox or container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// The Pod it happened to.
    pub pod_uid: String,
    /// What happened.
    pub kind: EventKind,
}

/// What a [`RuntimeEvent`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A process started.
    Started,
    /// A process ended.
    Exited,
    /// The kernel killed a process for want of memory.
    OutOfMemory,
    /// A sandbox or container was removed.
    Removed,
}

/// How long a stop may take before the process is killed.
pub type Grace = Duration;
