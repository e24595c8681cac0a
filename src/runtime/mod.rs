//! The one seam: what the node asks of whatever runs its Pods.
//!
//! The verbs, their names and their rules are those of CRI v1. Above this trait nobody knows what a sandbox is made
//! of; below it nobody knows what a Kubernetes Pod is. Drivers:
//!
//! * [`docker`]: a sandbox is a small container that holds the namespaces, members join it;
//! * [`handler`]: several drivers side by side, chosen per sandbox;
//! * [`microvm`]: a sandbox is a virtual machine (in memory only so far: no flag chooses it);
//! * [`cri`]: the sandboxes and containers of another runtime, such as containerd, which is spoken to in CRI v1;
//! * [`fake`]: in memory, with fault knobs, for tests and `--runtime fake`.
//!
//! The runtime is the memory of the node: after a restart everything is found again by listing. So each verb is
//! idempotent (see its text), and a driver keeps [`types::PodRef`], container name and attempt with the object itself.

mod attached;
mod blocking;
mod cgroup;
mod creates;
pub mod cri;
pub mod disk;
pub mod docker;
pub mod error;
pub mod fake;
pub mod handler;
pub mod keepers;
#[cfg(test)]
mod kernel_v2;
mod labels;
pub mod late;
mod loopback;
pub mod microvm;
mod oom;
mod process;
mod reference;
mod registry;
mod running;
pub mod session;
pub mod stats;
pub mod traced;
pub mod types;
pub mod usage;
pub mod verb;

use std::path::Path;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::stream::BoxStream;
use tokio::sync::{Semaphore, SemaphorePermit};

use blocking::blocking;
pub use cgroup::{remove_cgroup_root, remove_empty_cgroup_root};
pub use error::{Kind, Result, RuntimeError};
use session::{AttachRequest, Duplex, ExecRequest, Session};
use stats::{ImageFs, SandboxStats, StatsScope};
use types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};

/// Runs Pods: sandboxes and the containers in them.
///
/// Cancel safety: dropping the future of a verb leaves either the state before or the state after it, or an object that
/// the `list` verbs show and the `remove` verbs remove. Nothing else is left behind.
#[async_trait]
pub trait SandboxRuntime: Send + Sync + 'static {
    /// Name and version of the engine below.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if it does not answer.
    async fn version(&self) -> Result<RuntimeVersion>;

    /// Whether new Pods can be run now; cheap enough to be asked every ten seconds.
    ///
    /// # Errors
    /// What keeps it from running Pods, in words for the node's Ready condition.
    async fn ready(&self) -> Result<()>;

    /// How the engine names cgroups. [`SandboxConfig::cgroup_parent`] is a path with either.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if it was never reached.
    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        Ok(CgroupDriver::Cgroupfs)
    }

    /// Ends what was made ahead of time for sandboxes to come, and makes no more: the process is about to end. Sandboxes go on.
    async fn close(&self) {}

    /// Makes and starts a sandbox, its network up. A sandbox of the same Pod and attempt that is already ready is
    /// returned as it is; a half-made one is removed first.
    ///
    /// # Errors
    /// Nothing is left behind on an error, unless the engine itself went away.
    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId>;

    /// Kills whatever still runs in the sandbox and takes its network down. Stopping a stopped or unknown sandbox is Ok.
    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()>;

    /// Removes the sandbox and every container in it, running or not. Removing an unknown sandbox is Ok.
    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()>;

    /// The sandbox now.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none of that id.
    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus>;

    /// Every sandbox of this owner, or those of one Pod.
    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>>;

    /// Makes a container in a ready sandbox, not started. One of the same Pod, name and attempt that is there already
    /// is returned as it is.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown sandbox, image or target container, [`Kind::Invalid`] for a config the engine
    /// refuses, and for a target that does not run.
    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId>;

    /// Starts a created container. Starting a running one is Ok.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if its command cannot be executed: the container is then exited with code 128 (127 where the
    /// command was not found) and the reason in its message.
    async fn start_container(&self, id: &ContainerId) -> Result<()>;

    /// Sends the stop signal, waits up to `grace`, kills. Returns once the process has ended. Stopping an exited or
    /// unknown container is Ok.
    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()>;

    /// Removes a container, killing it first if it runs; its log goes with it. Removing an unknown one is Ok.
    async fn remove_container(&self, id: &ContainerId) -> Result<()>;

    /// Every container of this owner, or those of one Pod, in no order.
    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>>;

    /// The container now.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none of that id.
    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus>;

    /// The container's log as a stream that ends when all is delivered.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none of that id.
    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>>;

    /// Runs a command in a running container.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run or a command that
    /// cannot be executed there.
    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session>;

    /// Joins the streams of a running container's own process. Its exit code is the container's.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run.
    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session>;

    /// Connects to a TCP port on the loopback address of the sandbox's network.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown sandbox, [`Kind::Invalid`] where nothing listens on the port.
    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>>;

    /// Freezes a running container: its processes get no time until they are thawed, and keep their memory and
    /// connections. Freezing a frozen one is Ok; its state stays running, and it can be stopped and removed as it is.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run.
    async fn pause_container(&self, id: &ContainerId) -> Result<()>;

    /// Thaws a frozen container. Thawing one that is not frozen is Ok.
    ///
    /// # Errors
    /// As [`pause_container`](Self::pause_container).
    async fn unpause_container(&self, id: &ContainerId) -> Result<()>;

    /// Gives a container that has not exited other limits, without a restart; `None` leaves one as it is, and the OOM
    /// score stays whatever is asked.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that has exited or limits the engine
    /// refuses, [`Kind::Unsupported`] if the driver cannot do it.
    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()>;

    /// Gives a sandbox as a whole other limits ([`SandboxConfig::resources`]); `None` leaves one as it is.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown sandbox, [`Kind::Unsupported`] if the driver cannot do it.
    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()>;

    /// What every ready sandbox of this owner and its running containers use, in no order; CRI's ListPodSandboxStats.
    /// Cheap enough to be asked every few seconds: it reads the host's files and asks the engine nothing about each.
    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>>;

    /// What happens from now on to objects of this owner. The stream ends when the engine goes away; the caller
    /// subscribes again and lists, since what happened in between is not told.
    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>>;
}

/// Holds images.
#[async_trait]
pub trait ImageStore: Send + Sync + 'static {
    /// Fetches an image, trying each of `auths` in order (anonymously if there is none).
    ///
    /// # Errors
    /// [`Kind::NotFound`] if the registry has no such image, [`Kind::Unauthorized`] if it wants other credentials,
    /// [`Kind::Invalid`] if the reference does not parse, [`Kind::Unavailable`] if the registry cannot be reached.
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId>;

    /// The image, by reference or id, if present.
    async fn image_status(&self, reference: &str) -> Result<Option<Image>>;

    /// Every image present.
    async fn list_images(&self) -> Result<Vec<Image>>;

    /// Where images are and what they take there; CRI's ImageFsInfo.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if they are not on a file system of this host.
    async fn image_fs_info(&self) -> Result<ImageFs>;

    /// Unpacks the files of an image into the directory `into`, which is made; beside it lies what is needed meanwhile.
    /// (CRI's way is a mount of the image by CreateContainer; here the caller keeps such directories, for many.)
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is no such image, [`Kind::Unsupported`] if the driver cannot do it. What was made is
    /// left for the caller to remove.
    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        let (_, why) = (into, format!("this runtime does not give the files of images, so not those of {id}"));
        Err(RuntimeError::new(Kind::Unsupported, why))
    }

    /// Removes an image. Removing an unknown one is Ok.
    ///
    /// # Errors
    /// [`Kind::AlreadyExists`] if a container still uses it.
    async fn remove_image(&self, id: &ImageId) -> Result<()>;
}

/// Waits for a turn at something that only so many may do at once. The drivers' semaphores live as long as they do and are
/// never closed.
async fn turn(semaphore: &Semaphore) -> Result<SemaphorePermit<'_>> {
    semaphore.acquire().await.map_err(|error| RuntimeError::new(Kind::Unavailable, "shutting down").with_source(error))
}

/// Locks what is never half changed, so that a panic elsewhere does not spoil it.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A driver that is both.
pub trait Runtime: SandboxRuntime + ImageStore {}
impl<T: SandboxRuntime + ImageStore> Runtime for T {}
