//! Pods as sandboxes and containers of another runtime that speaks CRI v1: containerd, CRI-O.
//!
//! ```text
//! sandbox    RunPodSandbox; its process and cgroup are in the verbose status              (sandbox, info)
//! container  CreateContainer, with the sandbox's config told again                        (container, spec)
//! cgroup     one per Pod above its containers, made here                                  (runtime::cgroup)
//! cable      from the sandbox's empty network namespace to the node's bridge              (trait Cable)
//! streams    a SPDY connection to the runtime's streaming server                          (exec, attach, streams)
//! ports      sockets made inside the sandbox's network namespace                          (runtime::loopback)
//! logs       files that the runtime writes, read and rotated here                         (logs, rotate)
//! figures    the kernel's files, not the runtime                                          (stats)
//! memory     labels and annotations; nothing else survives a restart of this process      (runtime::labels)
//! ```
//! The runtime's own network set-up (CNI) is asked for nothing: it is given a plug-in that answers with the address the
//! node allotted, and the cable is plugged in afterwards. So Pods of all drivers are on one network.

mod attach;
mod client;
mod container;
mod events;
mod exec;
mod image;
mod info;
mod leaders;
mod limits;
mod logs;
mod rotate;
mod sandbox;
mod spec;
mod stats;
mod streams;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use lambdalet_proto::cri::v1;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::client::ask;
pub use self::client::{CriClient, explained};
use self::info::Places;
use self::logs::LogFiles;
use super::cgroup::Cgroups;
use super::creates::Creates;
use super::disk::Disk;
use super::keepers::Keepers;
pub(crate) use super::labels::ADDRESS as ADDRESS_ANNOTATION;
use super::oom::Verdicts;
use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::usage::Trees;
use super::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime, blocking, loopback};
use crate::network::Cable;
use crate::network::inside::Sockets;
use crate::turns::Turns;

/// How to use a CRI runtime.
#[derive(Clone, Debug)]
pub struct CriOptions {
    /// Its socket, as `unix:///run/containerd/containerd.sock`.
    pub endpoint: String,
    /// Owner of every object made: a short word (`[a-zA-Z0-9_.-]`) that no other node on this host has.
    pub owner: String,
    /// Where the logs of containers are kept; the runtime writes there too.
    pub logs: PathBuf,
    /// Bytes at which a container's log file is rotated.
    pub log_max_size: u64,
    /// Log files kept per container, at least 1.
    pub log_max_files: u32,
    /// Starts in flight at once. More cost no less time in all, and much more for each.
    pub starts_in_flight: usize,
    /// Where the tasks go that look after execs: whoever ends this process waits for them.
    pub keepers: Keepers,
}

impl CriOptions {
    /// The defaults: containerd's usual socket, logs as a kubelet keeps them (5 files of 10 MiB), twice as many starts in
    /// flight as there are cores.
    pub fn new(owner: impl Into<String>, logs: PathBuf) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            endpoint: "unix:///run/containerd/containerd.sock".into(),
            owner: owner.into(),
            logs,
            log_max_size: 10 << 20,
            log_max_files: 5,
            starts_in_flight: 2 * cores,
            keepers: Keepers::default(),
        }
    }
}

/// Runs Pods on one CRI runtime.
pub struct CriRuntime {
    client: CriClient,
    options: CriOptions,
    cable: Arc<dyn Cable>,
    cgroups: Cgroups,
    logs: LogFiles,
    creates: Creates,
    starts: Semaphore,
    /// Sandboxes that have their cable, as far as this process knows. After a restart each is plugged again when it is
    /// first looked at, which changes nothing where the cable is in place.
    plugged: Mutex<HashSet<String>>,
    /// Sandboxes of ours by id, as last seen: the UID and the cgroup of the Pod of each, which are left if somebody else
    /// removes it.
    known: Mutex<HashMap<String, (String, String)>>,
    /// Sandboxes that are being stopped, and by how many: whoever looks at one does not wait for its end.
    halting: Mutex<HashMap<String, usize>>,
    /// One at a time plugs a sandbox in or stops it, or starts an exec in a container; or, by the UID, runs a Pod's sandbox
    /// or removes what one left.
    turns: Turns<String>,
    /// Containers that this process made and has not tried to start, each with the UID of its Pod: of these it need not ask
    /// in which state they are.
    unstarted: Mutex<HashMap<String, String>>,
    places: Arc<Places>,
    verdicts: Verdicts,
    sockets: Sockets,
    trees: Trees,
    disk: Arc<Disk>,
    /// Ends with this value.
    _tasks: JoinSet<()>,
}

impl CriRuntime {
    /// Connects to the runtime and learns how it limits resources.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if it does not answer, [`Kind::Unsupported`] if it does not speak CRI v1, [`Kind::Invalid`]
    /// for an endpoint that is no socket's URL.
    pub async fn connect(options: CriOptions, cable: Arc<dyn Cable>) -> Result<Self> {
        let (client, _version) = CriClient::connect(&options.endpoint).await?;
        let tried = || "failed to ask for the container runtime's configuration".to_owned();
        let systemd = match ask!(client.runtime, runtime_config(v1::RuntimeConfigRequest {}), tried).await {
            Ok(config) => config.linux.is_some_and(|linux| linux.cgroup_driver() == v1::CgroupDriver::Systemd),
            // Before containerd 2.0 and CRI-O 1.28, which made cgroups themselves unless they were told otherwise.
            Err(error) if error.kind() == Kind::Unsupported => false,
            Err(error) => return Err(error),
        };
        let logs = LogFiles::new(options.logs.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(rotate::run(client.clone(), logs.clone(), options.clone()));
        let made = Self {
            cgroups: Cgroups::of_host(systemd),
            logs,
            creates: Creates::default(),
            starts: Semaphore::new(options.starts_in_flight.max(1)),
            plugged: Mutex::default(),
            known: Mutex::default(),
            turns: Turns::default(),
            halting: Mutex::default(),
            unstarted: Mutex::default(),
            places: Arc::default(),
            verdicts: Verdicts::default(),
            sockets: Sockets::default(),
            trees: Trees::of_host(),
            disk: Arc::default(),
            _tasks: tasks,
            client,
            options,
            cable,
        };
        // What cannot be removed is in nobody's way.
        if let Err(error) = made.leave_logs().await {
            tracing::warn!(error = crate::telemetry::chain(&error), "logs of Pods that are gone may be left");
        }
        Ok(made)
    }

    /// Removes the logs of Pods whose sandboxes somebody removed while no process was there to see it.
    async fn leave_logs(&self) -> Result<()> {
        let uids = self.see_sandboxes(&[]).await?.into_iter().map(|seen| seen.facts.pod.uid).collect();
        let (logs, shown) = (self.logs.clone(), self.options.logs.display());
        blocking(format!("failed to remove what is left of logs in {shown}"), move || logs.leave_all_but(&uids)).await
    }

    fn owner(&self) -> &str {
        &self.options.owner
    }
}

#[async_trait]
impl SandboxRuntime for CriRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        let request = v1::VersionRequest { version: "v1".to_owned() };
        let tried = || "failed to ask for the container runtime's version".to_owned();
        let answer = ask!(self.client.runtime, version(request), tried).await?;
        Ok(RuntimeVersion { name: answer.runtime_name, version: answer.runtime_version })
    }

    async fn ready(&self) -> Result<()> {
        match self.client.unmet().await?.first() {
            None => Ok(()),
            Some(condition) => Err(RuntimeError::new(Kind::Unavailable, explained(condition))),
        }
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        Ok(self.cgroups.driver())
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
        self.remove(id).await
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
        let tried = loopback::tried(id, port);
        let status = self.sandbox_status(id).await?;
        let stopped = || RuntimeError::new(Kind::Invalid, format!("{tried}: the sandbox does not run"));
        loopback::connect(&self.sockets, status.pid.ok_or_else(stopped)?, port, &tried).await
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
impl ImageStore for CriRuntime {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.pull(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.image(reference).await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.images().await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.image_fs().await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.delete_image(id).await
    }
}
