//! Pods as microVMs: each sandbox is a virtual machine, and its containers run in a kernel of their own.
//!
//! ```text
//! driver (sandbox, container) --verbs--> vm::Vm      one VM: machine on the host, agent in the guest (host; fake: in memory)
//!   |-- machine      one VMM process each: QEMU or Firecracker, its directory, its jail, templates it is restored from
//!   |-- agent        client of the agent in a guest, over one stream of bytes
//!   |-- checkpoint   what is remembered of a sandbox; a new process finds its VMs again by it
//!   |-- image        a reference becomes a read-only block image, one for all VMs; slots: where it lies in a VM
//!   |-- vmms         which VMMs this host can run, and what is missing for the others
//!   |-- logs         fetched from the guest by offset (fetch) into bounded files of the host
//!   '-- volumes      what becomes of a mount, since nothing is shared with a guest; copy: the files it gets
//! ```
//! The VM outlives this process, its containers' logs wait in it, and what the guest says is bounded before it gets here.

pub mod agent;
mod checkpoint;
mod container;
mod copy;
pub mod fake;
mod fetch;
pub mod host;
pub mod image;
mod limits;
pub mod logs;
pub mod machine;
mod refresh;
mod sandbox;
mod slots;
mod stats;
pub mod vm;
pub mod vmms;
pub mod volumes;

use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::{self, BoxStream};
use tokio::sync::broadcast;
use tokio::time::timeout;

use self::checkpoint::{Phase, SandboxRecord};
use self::image::Blocks;
use self::logs::LogLimits;
use self::sandbox::{ANSWER, Sandbox};
use self::vm::Vms;
use self::volumes::Places;
use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime, blocking, locked};
use crate::telemetry::chain;
use crate::turns::Turns;

/// Events a slow subscriber may be behind; one that is further behind is cut off, lists and subscribes again.
const EVENTS_BEHIND: usize = 1024;

/// How the driver works.
#[derive(Clone, Debug)]
pub struct MicrovmOptions {
    /// Owner of every sandbox made: a short word that no other node on this host has.
    pub owner: String,
    /// Where checkpoints and logs are: `<root-dir>/microvm`.
    pub root: PathBuf,
    /// Which host paths a guest gets something of.
    pub places: Places,
    /// How much is kept of a container's log.
    pub logs: LogLimits,
}

/// Runs Pods as microVMs.
pub struct MicrovmRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    options: MicrovmOptions,
    vms: Arc<dyn Vms>,
    images: Arc<dyn Blocks>,
    sandboxes: Mutex<HashMap<String, Arc<Sandbox>>>,
    /// One run of a sandbox of one Pod and attempt at a time.
    turns: Turns<String>,
    events: broadcast::Sender<RuntimeEvent>,
}

impl MicrovmRuntime {
    /// Finds the sandboxes that an earlier process of this owner left, takes those over whose VM still runs, and writes down
    /// the end of the others. Dropped while it does, it lets go of those it has.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the directory cannot be read. A single checkpoint that makes no sense is left where it is, told
    /// in the log, and not listed; a sandbox that cannot be taken over is told there too, and listed as not ready.
    pub async fn open(options: MicrovmOptions, vms: Arc<dyn Vms>, images: Arc<dyn Blocks>) -> Result<Self> {
        let (root, owner) = (options.root.join("sandboxes"), options.owner.clone());
        let tried = format!("failed to read the sandboxes in {}", root.display());
        let host = Arc::clone(&vms);
        let (records, strays) = blocking(tried, move || {
            std::fs::create_dir_all(&root)?;
            // Before the sandboxes: each is written down before it has a VM, by whichever process.
            let (mut records, mut strays) = (Vec::new(), host.left());
            for entry in std::fs::read_dir(&root)? {
                let directory = entry?.path();
                // A checkpoint that is lost still has its VM.
                strays.retain(|id| directory.file_name().is_none_or(|name| name != id.as_str()));
                match SandboxRecord::load(&directory, &owner) {
                    Ok(record) => records.extend(record.map(|record| (directory, record))),
                    Err(error) => {
                        tracing::error!(path = %directory.display(), error = chain(&error), "a sandbox's checkpoint is lost");
                    }
                }
            }
            Ok((records, strays))
        })
        .await?;
        vms.end_all(strays);
        let events = broadcast::Sender::new(EVENTS_BEHIND);
        let (sandboxes, turns) = (Mutex::default(), Turns::default());
        let runtime = Self { inner: Arc::new(Inner { options, vms, images, sandboxes, turns, events }) };
        let adopted = records.into_iter().map(|(directory, record)| {
            let (inner, sandbox) = (&runtime.inner, Arc::new(Sandbox::new(directory, record)));
            locked(&inner.sandboxes).insert(sandbox.id.clone(), Arc::clone(&sandbox));
            async move {
                if let Err(error) = inner.adopt(&sandbox).await {
                    tracing::error!(sandbox = sandbox.id, error = chain(&error), "failed to take over a sandbox");
                }
            }
        });
        // All at once: a guest that is silent holds up no other.
        join_all(adopted).await;
        Ok(runtime)
    }
}

impl Drop for MicrovmRuntime {
    /// The VMs go on; nobody looks after them until the next process does. The tasks that did hold what is dropped here.
    fn drop(&mut self) {
        for sandbox in self.sandboxes(None) {
            sandbox.let_go();
        }
    }
}

impl Inner {
    /// Takes over what an earlier process left of a sandbox.
    async fn adopt(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let (phase, containers) = {
            let record = sandbox.record();
            let containers = record.containers.iter();
            let containers = containers.map(|(id, one)| (id.clone(), one.started.is_some() && one.ended.is_none()));
            (record.phase, containers.collect::<Vec<_>>())
        };
        let vm = match phase {
            Phase::Running => self.vms.find(&sandbox.id).await?,
            Phase::Making | Phase::Ended => None,
        };
        let Some(vm) = vm else {
            for (id, _) in containers {
                self.open_log(sandbox, &id, false).await?;
            }
            // Of one half made only a removal comes.
            return self.end(sandbox).await;
        };
        let images: Vec<_> = sandbox.record().slots.images().collect();
        for image in images {
            // The VM has the file open, so it goes on even if the image is lost; then it only cannot be kept.
            match self.images.block(&image).await {
                Ok(block) => drop(locked(&sandbox.blocks).insert(image, block)),
                Err(error) => {
                    tracing::warn!(image = %image, error = chain(&error), "an image in use is not in the store")
                }
            }
        }
        self.attend(sandbox, Arc::clone(&vm));
        // One that was started as the earlier process ended may not be noted yet: the guest knows.
        let guests = sandbox.guests().await;
        for (id, runs) in containers {
            let was_started = guests.iter().any(|guest| guest.id == id && guest.state != ContainerState::Created);
            let ended = sandbox.record().containers.get(&id).is_some_and(|one| one.ended.is_some());
            self.open_log(sandbox, &id, (runs || was_started) && !ended).await?;
            if ended && let Some(log) = locked(&sandbox.logs).get(&id) {
                log.book.close();
            }
        }
        // What happened meanwhile is known before anyone asks, if the guest says it in time. Cancel-safe: who attends it
        // looks again.
        let _ = timeout(ANSWER, self.look(sandbox)).await;
        Ok(())
    }
}

#[async_trait]
impl SandboxRuntime for MicrovmRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        // `QEMU 7.2.22 (Debian …) with KVM`: people see this in a column of `kubectl get nodes`.
        let told = self.inner.vms.check().await?;
        let words: Vec<String> = told.split_whitespace().take(2).map(str::to_lowercase).collect();
        Ok(RuntimeVersion { name: "microvm".into(), version: words.join("-") })
    }

    async fn ready(&self) -> Result<()> {
        self.inner.vms.check().await.map(drop)
    }

    async fn close(&self) {
        self.inner.vms.close().await;
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        self.run(config).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        match self.sandbox(id.as_str()) {
            Some(sandbox) => self.stop_sandbox(&sandbox).await,
            None => Ok(()),
        }
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        match self.sandbox(id.as_str()) {
            Some(sandbox) => self.remove_sandbox(&sandbox).await,
            None => Ok(()),
        }
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.sandbox_status(id)
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        Ok(self.list_sandboxes(pod_uid))
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
        Ok(self.list(pod_uid).await)
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.status(id).await
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        self.read_log(id, options).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        let vm = self.running(id).await?;
        if self.status(id).await?.frozen {
            // It would start, and never get any further.
            return Err(RuntimeError::new(Kind::Invalid, format!("failed to execute a command in {id}: it is paused")));
        }
        vm.exec(id.as_str(), request).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        self.running(id).await?.attach(id.as_str(), request).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let failed = |kind, what| RuntimeError::new(kind, format!("failed to connect to port {port} of {id}: {what}"));
        let sandbox = self.sandbox(id.as_str()).ok_or_else(|| failed(Kind::NotFound, "there is no such sandbox"))?;
        let vm = sandbox.vm().ok_or_else(|| failed(Kind::Invalid, "its microVM has ended"))?;
        vm.port_forward(port).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        self.running(id).await?.set_frozen(id.as_str(), true).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        self.running(id).await?.set_frozen(id.as_str(), false).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.limit(id, resources).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        self.limit_sandbox(id, resources).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        Ok(self.read_stats(scope).await)
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        let events = self.inner.events.subscribe();
        // Whoever is too far behind lists and subscribes again.
        let next =
            |mut events: broadcast::Receiver<RuntimeEvent>| async move { Some((events.recv().await.ok()?, events)) };
        Ok(stream::unfold(events, next).boxed())
    }
}

#[async_trait]
impl ImageStore for MicrovmRuntime {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.inner.images.pull_image(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.inner.images.image_status(reference).await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.inner.images.list_images().await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.inner.images.image_fs_info().await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        let of_sandbox = |sandbox: &Arc<Sandbox>| {
            let record = sandbox.record();
            record.containers.values().filter(|container| container.uses(id)).count()
        };
        let users: usize = self.sandboxes(None).iter().map(of_sandbox).sum();
        if users > 0 {
            let text = format!("failed to remove image {id}: {users} containers use it");
            return Err(RuntimeError::new(Kind::AlreadyExists, text));
        }
        self.inner.images.remove_image(id).await
    }
}

#[cfg(test)]
mod tests;
