//! Pods as Docker containers.
//!
//! ```text
//! sandbox    a container of one tiny process that holds the network, IPC and UTS namespaces (sandbox, pause)
//! container  joins them by NetworkMode/IpcMode "container:<id>"                           (container, spec)
//! cgroup     one per Pod above its containers, made here                                  (runtime::cgroup)
//! cable      from the sandbox's empty network namespace to the node's bridge              (trait Cable)
//! streams    hijacked connections to the daemon, their frames read here                   (exec, attach, wire, process)
//! ports      sockets made inside the sandbox's network namespace                          (forward)
//! figures    the kernel's files, not the daemon                                           (stats)
//! memory     Docker's labels; nothing else survives a restart of this process             (runtime::labels)
//! ```
//! A Docker container id is the id of the sandbox or container. Names are deterministic, so what a verb left half done
//! is found by the next one through the name being taken.

mod attach;
mod capabilities;
mod container;
mod events;
mod exec;
mod failure;
mod freeze;
mod http;
pub(super) mod image;
mod io;
mod left;
mod limits;
mod pause;
mod plain_registry;
mod records;
mod sandbox;
mod spec;
mod stats;
mod wire;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bollard::models::SystemInfoCgroupDriverEnum;
use bollard::{API_DEFAULT_VERSION, Docker};
use futures::stream::BoxStream;
use tokio::sync::Semaphore;

use self::failure::failed;
use self::stats::Statistics;
use super::cgroup::Cgroups;
use super::creates::Creates;
use super::keepers::Keepers;
use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::{ImageStore, Result, SandboxRuntime, labels, oom, process};
use crate::network::inside::Sockets;
use crate::network::{Cable, NetworkError};

/// Seconds until Docker must have begun to answer. No verb that waits (stop, logs, events) is a single request that is
/// silent for long, so only a stuck daemon reaches it; a start under heavy load may take tens of seconds.
const ANSWER_TIMEOUT: u64 = 240;
/// API versions from this on end the last part of a long log line with its newline themselves.
const API_WITH_WHOLE_LINES: (usize, usize) = (1, 42);

/// Leaves sandboxes without a network of their own; for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCable;

#[async_trait]
impl Cable for NoCable {
    async fn plug(&self, _pid: i32, _sandbox: &str, _addresses: &[IpAddr]) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn unplug(&self, _sandbox: &str) -> Result<(), NetworkError> {
        Ok(())
    }
}

/// How to use a Docker daemon.
#[derive(Clone, Debug)]
pub struct DockerOptions {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Owner of every object made: a short word (`[a-zA-Z0-9_.-]`) that no other node on this host has.
    pub owner: String,
    /// Size at which a container's log file is rotated, as Docker writes sizes.
    pub log_max_size: String,
    /// Log files kept per container.
    pub log_max_files: u32,
    /// Image for the process that holds a sandbox, with its command; `None` is the one carried in this binary.
    pub sandbox_image: Option<String>,
    /// Registries (`host:port`) that are spoken to in plain HTTP, by this process instead of the daemon.
    pub insecure_registries: Vec<String>,
    /// Starts in flight at once. More cost no less time in all, and much more for each.
    pub starts_in_flight: usize,
    /// Kills and removals in flight at once.
    pub removals_in_flight: usize,
    /// Where the tasks go that look after execs: whoever ends this process waits for them.
    pub keepers: Keepers,
}

impl DockerOptions {
    /// The defaults: Docker's usual socket, logs as a kubelet keeps them (5 files of 10 MiB), twice as many starts and
    /// removals in flight as there are cores.
    pub fn new(owner: impl Into<String>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            socket: "/var/run/docker.sock".into(),
            owner: owner.into(),
            log_max_size: "10m".into(),
            log_max_files: 5,
            sandbox_image: None,
            insecure_registries: Vec::new(),
            starts_in_flight: 2 * cores,
            removals_in_flight: 2 * cores,
            keepers: Keepers::default(),
        }
    }
}

/// Runs Pods on one Docker daemon.
pub struct DockerRuntime {
    docker: Docker,
    options: DockerOptions,
    cable: Arc<dyn Cable>,
    cgroups: Cgroups,
    oom_floor: Option<i64>,
    held: Option<capabilities::Held>,
    verdicts: oom::Verdicts,
    /// Whether this daemon leaves out the newline that ends a line longer than one log record.
    restores_newlines: bool,
    creates: Creates,
    starts: Semaphore,
    removals: Semaphore,
    network: Mutex<NetworkBook>,
    /// Containers that this process made and has not tried to start: of these it need not ask in which state they are.
    unstarted: Mutex<HashSet<String>>,
    keepers: Keepers,
    sockets: Sockets,
    statistics: Statistics,
}

/// Which sandboxes have their cable, as far as this process knows. After a restart the book is empty and each running
/// sandbox is plugged again (which changes nothing where the cable is in place) when it is first looked at.
#[derive(Debug, Default)]
struct NetworkBook {
    /// Being made right now: running perhaps, usable not yet.
    making: HashSet<String>,
    /// With the addresses they have.
    plugged: HashMap<String, Vec<IpAddr>>,
}

impl DockerRuntime {
    /// Connects to the daemon, learns what it and the host can do, and ends the execs that an earlier process of this
    /// owner left running.
    ///
    /// # Errors
    /// [`Kind::Unavailable`](super::Kind::Unavailable) if it does not answer.
    pub async fn connect(options: DockerOptions, cable: Arc<dyn Cable>) -> Result<Self> {
        let tried = || format!("failed to connect to Docker at {}", options.socket.display());
        let socket = options.socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&socket, ANSWER_TIMEOUT, API_DEFAULT_VERSION)
            .map_err(|error| failed(tried(), error))?;
        let docker = docker.negotiate_version().await.map_err(|error| failed(tried(), error))?;
        let info = docker.info().await.map_err(|error| failed(tried(), error))?;
        let systemd = info.cgroup_driver == Some(SystemInfoCgroupDriverEnum::SYSTEMD);
        let version = docker.client_version();
        let daemon = http::peer_pid(&options.socket).await.unwrap_or_else(std::process::id).cast_signed();
        let runtime = Self {
            oom_floor: capabilities::floor(daemon),
            held: capabilities::held(daemon),
            verdicts: oom::Verdicts::default(),
            restores_newlines: (version.major_version, version.minor_version) < API_WITH_WHOLE_LINES,
            cgroups: Cgroups::of_host(systemd),
            creates: Creates::default(),
            starts: Semaphore::new(options.starts_in_flight.max(1)),
            removals: Semaphore::new(options.removals_in_flight.max(1)),
            network: Mutex::default(),
            unstarted: Mutex::default(),
            keepers: options.keepers.clone(),
            sockets: Sockets::default(),
            statistics: Statistics::new(info.docker_root_dir.unwrap_or_else(|| "/var/lib/docker".to_owned()).into()),
            docker,
            options,
            cable,
        };
        runtime.end_left_execs().await;
        Ok(runtime)
    }

    fn owner(&self) -> &str {
        &self.options.owner
    }

    fn network_book(&self) -> std::sync::MutexGuard<'_, NetworkBook> {
        // Two sets of ids are never half changed, so a panic elsewhere does not spoil them.
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unstarted(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        // As above.
        self.unstarted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SandboxRuntime for DockerRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        let version = self.docker.version().await.map_err(|error| failed("failed to ask Docker's version", error))?;
        Ok(RuntimeVersion { name: "docker".into(), version: version.version.unwrap_or_default() })
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        Ok(self.cgroups.driver())
    }

    async fn ready(&self) -> Result<()> {
        self.docker.ping().await.map(drop).map_err(|error| failed("Docker does not answer", error))
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        self.run_sandbox(config).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.stop_sandbox(id).await
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.remove_sandbox(id).await
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.sandbox_status(id).await
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        self.list_sandboxes(pod_uid).await
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        self.create(sandbox, config).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        self.start(id).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        self.stop(id, grace).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.remove(id.as_str()).await
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        self.list(pod_uid).await
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.status(id).await
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        self.read_logs(id, options).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        self.run_exec(id, request).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        self.join_streams(id, request).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.connect_inside(id, port).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        self.set_frozen(id, true).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        self.set_frozen(id, false).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.set_limits(id, resources).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        self.set_sandbox_limits(id, resources).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        self.read_stats(scope).await
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        self.subscribe().await
    }
}

#[async_trait]
impl ImageStore for DockerRuntime {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.pull(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.image(reference).await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.statistics.image_fs().await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.images().await
    }

    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        super::microvm::image::plain::unpacked(&self.options.socket, id, into).await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.delete_image(id).await
    }
}
