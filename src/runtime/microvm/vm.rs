//! What the driver asks of a microVM: the machine on this host and the agent in it, taken together.
//!
//! [`host`](super::host) has those of this host's machines, [`fake`](super::fake) those in memory.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use jiff::Timestamp;

use super::image::ImageConfig;
use crate::runtime::Result;
use crate::runtime::session::{AttachRequest, Duplex, ExecRequest, Session};
use crate::runtime::stats::{DiskUsage, Interface, StatsScope, Usage};
use crate::runtime::types::{ContainerConfig, ContainerState, ImageId, LogChunk, Resources, SandboxConfig};

/// An id that no VM has.
pub(super) fn fresh_name() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Starts microVMs, and finds those that an earlier process left.
#[async_trait]
pub trait Vms: Send + Sync + 'static {
    /// Name and version of what runs them, for people.
    ///
    /// # Errors
    /// Why none can be run on this host now.
    async fn check(&self) -> Result<String>;

    /// How many images one VM can have at a time.
    fn slots(&self) -> u8;

    /// By which id the VM of such a sandbox is to be launched: that of one that waits for it, or a fresh one. Whoever was told
    /// it launches by it, or destroys it.
    fn name(&self, _config: &SandboxConfig) -> String {
        fresh_name()
    }

    /// The ids of those that an earlier process left, or anything of them. To be called before any is launched.
    fn left(&self) -> Vec<String> {
        Vec::new()
    }

    /// Ends, behind the caller, VMs that an earlier process had made for nobody.
    fn end_all(&self, _ids: Vec<String>) {}

    /// Ends those that this process has made for nobody, and makes no more.
    async fn close(&self) {}

    /// Starts a VM of this id, its agent configured and its network up.
    ///
    /// # Errors
    /// What is left is removed by [`destroy`](Self::destroy).
    async fn launch(&self, id: &str, config: &SandboxConfig) -> Result<Arc<dyn Vm>>;

    /// The VM of that id, if it runs.
    async fn find(&self, id: &str) -> Result<Option<Arc<dyn Vm>>>;

    /// Ends the VM if it runs, and removes all there is of it on the host. Removing what is not there is Ok.
    ///
    /// # Errors
    /// What could not be removed; what is needed to find the VM again stays, and it can be tried again.
    async fn destroy(&self, id: &str) -> Result<()>;
}

/// One microVM. Ids of containers are the driver's. A lost session with the agent is opened again by the next call.
#[async_trait]
pub trait Vm: Send + Sync + 'static {
    /// The VMM's process.
    fn pid(&self) -> i32;

    /// Puts an image behind a slot and lets the guest mount it. An image that an earlier process left there, and no
    /// container uses, gives way.
    async fn put_image(&self, slot: u8, image: &ImageId, path: &Path) -> Result<()>;

    /// Takes an image, which no container uses any more, out of its slot.
    async fn take_image(&self, slot: u8, image: &ImageId) -> Result<()>;

    /// Makes a volume. One of that name is fine.
    async fn make_volume(&self, name: &str, volume: GuestVolume) -> Result<()>;

    /// Makes these the files of a volume made for that, all at once.
    async fn push_files(&self, name: &str, layout: Layout, files: Vec<GuestFile>) -> Result<()>;

    /// The end of a file of a volume; `None` if there is none.
    async fn read_file(&self, name: &str, path: &str, limit: u32) -> Result<Option<Bytes>>;

    /// Makes a container. One of that id is left as it is.
    async fn create(&self, container: GuestContainer) -> Result<()>;

    /// Starts a container.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::runtime::Kind::Invalid) if it cannot be executed; it has exited then.
    async fn start(&self, id: &str) -> Result<()>;

    /// Sends a signal to a container's first process, or to all. One that does not run is fine.
    async fn signal(&self, id: &str, signal: &str, all: bool) -> Result<()>;

    /// Gives a container these limits.
    async fn limit(&self, id: &str, limits: &Resources) -> Result<()>;

    /// Gives all containers together these limits.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::runtime::Kind::Unsupported) for more memory than the guest has.
    async fn limit_all(&self, limits: &Resources) -> Result<()>;

    /// Waits until a container has exited. Cancel-safe.
    async fn wait(&self, id: &str) -> Result<()>;

    /// Removes a container, killing it first. An unknown one is fine.
    async fn remove(&self, id: &str) -> Result<()>;

    /// Every container.
    async fn list(&self) -> Result<Vec<GuestState>>;

    /// Freezes a container, or thaws it.
    async fn set_frozen(&self, id: &str, frozen: bool) -> Result<()>;

    /// A container's log from an offset on, until it has exited and all is told.
    async fn logs(&self, id: &str, offset: u64) -> Result<BoxStream<'static, Result<LogBatch>>>;

    /// An item whenever something happened to a container; it ends with the session.
    async fn changes(&self) -> Result<BoxStream<'static, ()>>;

    /// What it all uses.
    async fn stats(&self, scope: StatsScope) -> Result<GuestStats>;

    /// As [`SandboxRuntime::exec`](crate::runtime::SandboxRuntime::exec).
    async fn exec(&self, id: &str, request: &ExecRequest) -> Result<Session>;

    /// As [`SandboxRuntime::attach`](crate::runtime::SandboxRuntime::attach).
    async fn attach(&self, id: &str, request: &AttachRequest) -> Result<Session>;

    /// As [`SandboxRuntime::port_forward`](crate::runtime::SandboxRuntime::port_forward).
    async fn port_forward(&self, port: u16) -> Result<Pin<Box<dyn Duplex>>>;

    /// Ends the VM at once.
    ///
    /// # Errors
    /// [`Kind::Internal`](crate::runtime::Kind::Internal) if it has not ended in time; it can be tried again.
    async fn kill(&self) -> Result<()>;

    /// Returns once it has ended. Cancel-safe.
    async fn exited(&self);
}

/// A volume for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestVolume {
    /// Where it lives.
    pub kind: VolumeKind,
    /// Permission bits of its root; 0: anybody may do anything.
    pub mode: u32,
    /// Group of its root.
    pub gid: u32,
}

/// Where a volume of a guest lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeKind {
    /// In memory; at most so many bytes, 0 for the guest's own limit.
    Memory(u64),
    /// On the scratch disk.
    Scratch,
    /// In memory, filled by [`Vm::push_files`].
    Pushed,
}

/// How pushed files lie in their volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As a kubelet writes configMaps: one link is turned from the old files to the new ones.
    Atomic,
    /// Each by itself.
    Plain,
}

/// A file for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Below the volume, without `..`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// User and group.
    pub owner: (u32, u32),
    /// Its content.
    pub bytes: Bytes,
}

/// A volume, or a file of it, made visible in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestMount {
    /// What is shown.
    pub source: MountSource,
    /// A file or directory in it, made as a directory if missing; empty for all of it.
    pub part: String,
    /// Where, in the container.
    pub container_path: String,
    /// Refuse writes.
    pub read_only: bool,
}

/// What a [`GuestMount`] shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountSource {
    /// The volume of this name.
    Volume(String),
    /// An image that was put behind a slot.
    Image(ImageId),
}

/// A container for a guest.
#[derive(Clone, Debug)]
pub struct GuestContainer {
    /// The driver's id of it.
    pub id: String,
    /// As the caller wants it; `command` is the whole command, `env` holds the image's too, `mounts` are not for the guest.
    pub config: ContainerConfig,
    /// What the image says.
    pub image: ImageConfig,
    /// What it sees of the sandbox's volumes.
    pub mounts: Vec<GuestMount>,
}

/// A container as the guest tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// The driver's id of it.
    pub id: String,
    /// Where in its life it is.
    pub state: ContainerState,
    /// Whether it is frozen.
    pub frozen: bool,
    /// When its process started.
    pub started_at: Option<Timestamp>,
    /// When that ended.
    pub finished_at: Option<Timestamp>,
    /// Once exited.
    pub exit_code: i32,
    /// Whether the guest's kernel killed it for want of memory.
    pub oom_killed: bool,
    /// Why it did not start.
    pub message: String,
}

/// Pieces of a container's log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogBatch {
    /// In order.
    pub chunks: Vec<LogChunk>,
    /// Where the next batch begins.
    pub next: u64,
    /// Bytes before these that the guest has dropped, since it keeps so much of a log and no more.
    pub lost: u64,
}

/// What a guest uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// All of it.
    pub usage: Usage,
    /// Its interfaces, if they were asked for.
    pub network: Option<Vec<Interface>>,
    /// Its running containers, by id: what they use, and what they wrote.
    pub containers: Vec<(String, Usage, Option<DiskUsage>)>,
    /// Its volumes on the scratch disk, by name, if they were asked for.
    pub volumes: Vec<(String, DiskUsage)>,
}
