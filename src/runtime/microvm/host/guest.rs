//! One microVM of this host: its machine, and the session with its agent.

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use lambdalet_proto::agent::v1::{self, FileLayout};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout_at};

use super::told;
use crate::runtime::microvm::agent::spec::{ImageFacts, container_spec, resources};
use crate::runtime::microvm::agent::{Agent, PushedContent, PushedFile, said};
use crate::runtime::microvm::machine::{Machine, MachineError, slot_name};
use crate::runtime::microvm::vm::{
    GuestContainer, GuestFile, GuestMount, GuestState, GuestStats, GuestVolume, Layout, LogBatch, MountSource, Vm,
    VolumeKind,
};
use crate::runtime::session::{AttachRequest, Duplex, ExecRequest, Session};
use crate::runtime::stats::StatsScope;
use crate::runtime::types::{ImageId, Resources};
use crate::runtime::{Kind, Result, RuntimeError};

/// How long a guest that runs may take to open a session.
const SESSION_PATIENCE: Duration = Duration::from_secs(30);
/// One that did not is not waited for again so soon.
const SILENCE: Duration = Duration::from_secs(5);
/// How much of a console is shown with an error, in bytes.
const SHOWN: u64 = 1000;
/// The file system of images.
const FILESYSTEM: &str = "erofs";

/// A machine of this host, and its guest.
pub(super) struct HostVm {
    machine: Box<dyn Machine>,
    /// A machine has room for one session at a time.
    line: AsyncMutex<Line>,
}

#[derive(Default)]
struct Line {
    session: Option<Agent>,
    /// When the guest was last waited for in vain.
    silent: Option<Instant>,
}

impl HostVm {
    pub(super) fn new(machine: Box<dyn Machine>) -> Self {
        Self { machine, line: AsyncMutex::default() }
    }

    async fn agent(&self) -> Result<Agent> {
        self.agent_within(SESSION_PATIENCE).await
    }

    /// The open session, or a new one once that has ended; with what others wait for it, within `patience`. Dropped while it
    /// waits, it leaves none.
    pub(super) async fn agent_within(&self, patience: Duration) -> Result<Agent> {
        let until = Instant::now() + patience;
        let silent = || {
            let id = self.machine.dir().id();
            RuntimeError::new(Kind::Unavailable, format!("the guest of microVM {id} does not answer"))
        };
        // Cancel-safe: who stops waiting has no lock.
        let mut line = timeout_at(until, self.line.lock()).await.map_err(|_| silent())?;
        if let Some(agent) = line.session.take() {
            if agent.ended().now_or_never().is_none() {
                line.session = Some(agent.clone());
                return Ok(agent);
            }
            agent.close();
        }
        if line.silent.is_some_and(|at| at.elapsed() < SILENCE) {
            return Err(silent());
        }
        // Cancel-safe, as each part of it.
        let connected = timeout_at(until, self.connect(patience)).await.unwrap_or_else(|_| Err(silent()));
        line.silent = Some(Instant::now()).filter(|now| connected.is_err() && *now >= until);
        let agent = connected?;
        line.session = Some(agent.clone());
        Ok(agent)
    }

    async fn connect(&self, patience: Duration) -> Result<Agent> {
        let id = self.machine.dir().id();
        let tried = || format!("failed to reach the guest of microVM {id}");
        let lost = |error: MachineError| RuntimeError::new(Kind::Unavailable, tried()).with_source(error);
        let stream = self.machine.agent().await.map_err(lost)?;
        // Both are cancel-safe: a session that is dropped is none, and an end is told again.
        let (agent, hello) = tokio::select! {
            connected = Agent::connect(stream, patience) => connected?,
            exit = self.machine.exited() => {
                let said = self.machine.dir().console_tail(SHOWN);
                let text = format!("{}: it has ended ({exit:?}): {}", tried(), said.trim());
                return Err(RuntimeError::new(Kind::Unavailable, text));
            }
        };
        let said::Hello { kernel_release, agent_version, machine_id, .. } = hello;
        tracing::debug!(machine = %id, kernel = kernel_release, agent = agent_version, machine_id, "a guest answers");
        Ok(agent)
    }

    /// Weighs the Pod's CPU time on the host, where that is said.
    pub(super) fn weigh(&self, limits: &Resources) -> Result<()> {
        let shares = limits.cpu_shares.and_then(|shares| u64::try_from(shares).ok()).filter(|shares| *shares > 0);
        let id = self.machine.dir().id();
        let failed = |error: MachineError| error.during(format!("failed to weigh microVM {id}"));
        shares.map_or(Ok(()), |shares| self.machine.weigh(shares).map_err(failed))
    }

    /// Sets the guest's clock, and says by how much it was behind, in nanoseconds.
    pub(super) async fn set_clock(&self) -> Result<i64> {
        self.agent().await?.sync_time(rand::random::<[u8; 32]>().to_vec()).await
    }

    /// Ends the session, for a template to be made of the machine: it is to hold nobody's.
    pub(super) async fn hang_up(&self) {
        if let Some(agent) = self.line.lock().await.session.take() {
            agent.close();
        }
    }

    pub(super) fn machine(&self) -> &dyn Machine {
        self.machine.as_ref()
    }
}

/// What an image is called in a guest, whose names have no colon.
fn image_name(image: &ImageId) -> String {
    image.as_str().replace(':', "-")
}

fn mounted(mount: GuestMount) -> v1::Mount {
    let GuestMount { source, part, container_path, read_only } = mount;
    let (volume, image) = match source {
        MountSource::Volume(name) => (name, String::new()),
        MountSource::Image(image) => (String::new(), image_name(&image)),
    };
    v1::Mount { volume, sub_path: part, container_path, read_only, image }
}

fn pushed(file: GuestFile) -> PushedFile {
    PushedFile { path: file.path, mode: file.mode, owner: file.owner, content: PushedContent::File(file.bytes) }
}

#[async_trait]
impl Vm for HostVm {
    fn pid(&self) -> i32 {
        self.machine.pid()
    }

    async fn put_image(&self, slot: u8, image: &ImageId, path: &Path) -> Result<()> {
        let (agent, name) = (self.agent().await?, image_name(image));
        // This image or another is mounted there if an earlier process got as far and no further; the guest must not use the
        // slot meanwhile.
        agent.unmount_image(&slot_name(slot), &name).await?;
        let failed = |error: MachineError| error.during(format!("failed to put image {image} into slot {slot}"));
        self.machine.put_image(slot, path).await.map_err(failed)?;
        let mounted = agent.mount_image(&slot_name(slot), &name, FILESYSTEM).await;
        if mounted.is_err() {
            // The first error says what is wrong; an image left in the slot is replaced by the next.
            let _ = self.machine.take_image(slot).await;
        }
        mounted
    }

    async fn take_image(&self, slot: u8, image: &ImageId) -> Result<()> {
        self.agent().await?.unmount_image(&slot_name(slot), &image_name(image)).await?;
        let failed = |error: MachineError| error.during(format!("failed to take image {image} out of slot {slot}"));
        self.machine.take_image(slot).await.map_err(failed)
    }

    async fn make_volume(&self, name: &str, volume: GuestVolume) -> Result<()> {
        let GuestVolume { kind, mode, gid } = volume;
        let kind = match kind {
            VolumeKind::Memory(bytes) => v1::volume::Kind::Memory(bytes),
            VolumeKind::Scratch => v1::volume::Kind::Scratch(v1::Empty {}),
            VolumeKind::Pushed => v1::volume::Kind::Pushed(v1::Empty {}),
        };
        let volume = v1::Volume { name: name.to_owned(), kind: Some(kind), mode, gid };
        self.agent().await?.make_volume(volume).await
    }

    async fn push_files(&self, name: &str, layout: Layout, files: Vec<GuestFile>) -> Result<()> {
        let layout = match layout {
            Layout::Atomic => FileLayout::Atomic,
            Layout::Plain => FileLayout::Plain,
        };
        let files: Vec<_> = files.into_iter().map(pushed).collect();
        self.agent().await?.push_files(name, layout, &files).await
    }

    async fn read_file(&self, name: &str, path: &str, limit: u32) -> Result<Option<Bytes>> {
        self.agent().await?.read_file(name, path, limit).await
    }

    async fn create(&self, container: GuestContainer) -> Result<()> {
        let GuestContainer { id, config, image, mounts } = container;
        let name = image_name(&config.image);
        let facts = ImageFacts {
            name: &name,
            user: &image.user,
            working_dir: &image.working_dir,
            stop_signal: &image.stop_signal,
        };
        let spec = container_spec(&id, facts, &config, mounts.into_iter().map(mounted).collect())?;
        self.agent().await?.create_container(spec).await
    }

    async fn start(&self, id: &str) -> Result<()> {
        self.agent().await?.start(id).await
    }

    async fn signal(&self, id: &str, signal: &str, all: bool) -> Result<()> {
        self.agent().await?.signal(id, signal, all).await
    }

    async fn limit(&self, id: &str, limits: &Resources) -> Result<()> {
        self.agent().await?.update(id, resources(limits)).await
    }

    async fn limit_all(&self, limits: &Resources) -> Result<()> {
        self.weigh(limits)?;
        let (agent, limits) = (self.agent().await?, resources(limits));
        let memory = agent.stats(false).await?.memory_total;
        if limits.memory_bytes > memory {
            let text = format!("a microVM of {memory} bytes of memory does not grow to {}", limits.memory_bytes);
            return Err(RuntimeError::new(Kind::Unsupported, text));
        }
        // What is not named in it stays as it is.
        agent.configure(v1::ConfigureRequest { resources: Some(limits), ..v1::ConfigureRequest::default() }).await
    }

    async fn wait(&self, id: &str) -> Result<()> {
        self.agent().await?.wait(id).await.map(drop)
    }

    async fn remove(&self, id: &str) -> Result<()> {
        self.agent().await?.remove(id).await
    }

    async fn list(&self) -> Result<Vec<GuestState>> {
        Ok(self.agent().await?.list().await?.into_iter().map(told::state).collect())
    }

    async fn set_frozen(&self, id: &str, frozen: bool) -> Result<()> {
        let agent = self.agent().await?;
        if frozen { agent.freeze(id).await } else { agent.thaw(id).await }
    }

    async fn logs(&self, id: &str, offset: u64) -> Result<BoxStream<'static, Result<LogBatch>>> {
        Ok(self.agent().await?.logs(id, offset, true).await?.map_ok(told::log).boxed())
    }

    async fn changes(&self) -> Result<BoxStream<'static, ()>> {
        Ok(self.agent().await?.events().await?.map(|_| ()).boxed())
    }

    async fn stats(&self, scope: StatsScope) -> Result<GuestStats> {
        let stats = self.agent().await?.stats(scope > StatsScope::CpuAndMemory).await?;
        Ok(told::stats(stats, scope))
    }

    async fn exec(&self, id: &str, request: &ExecRequest) -> Result<Session> {
        self.agent().await?.exec(id, request).await
    }

    async fn attach(&self, id: &str, request: &AttachRequest) -> Result<Session> {
        self.agent().await?.attach(id, request).await
    }

    async fn port_forward(&self, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.agent().await?.port_forward(port).await
    }

    async fn kill(&self) -> Result<()> {
        let id = self.machine.dir().id();
        self.machine.kill().await.map_err(|error| error.during(format!("failed to end microVM {id}")))
    }

    async fn exited(&self) {
        self.machine.exited().await;
    }
}
