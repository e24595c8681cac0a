//! MicroVMs in memory: each guest is a sandbox of a [`FakeRuntime`], so the driver is tested without a hypervisor.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::image::{BlockImage, Blocks, ImageConfig};
use super::vm::{
    GuestContainer, GuestFile, GuestState, GuestStats, GuestVolume, Layout, LogBatch, Vm, Vms, VolumeKind,
};
use crate::runtime::fake::FakeRuntime;
use crate::runtime::session::{AttachRequest, Duplex, ExecRequest, Session};
use crate::runtime::stats::{DiskUsage, StatsScope};
use crate::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ImageId, LogOptions, PodRef, Resources, SandboxConfig, SandboxId,
};
use crate::runtime::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime, locked};

/// As many as the machines have.
const SLOTS: u8 = 8;
/// How often an end is looked for.
const PAUSE: Duration = Duration::from_millis(2);
/// How long a process has to heed a signal that it heeds.
const MOMENT: Duration = Duration::from_millis(50);
const PID: i32 = 4242;

/// A host whose VMs are in memory. They outlive a driver, as real ones do; clones share them.
#[derive(Clone, Default)]
pub struct FakeVms {
    /// What the guests are made of; its knobs work on them.
    pub engine: FakeRuntime,
    running: Arc<Mutex<HashMap<String, Arc<FakeVm>>>>,
    stuck: Arc<AtomicBool>,
    manners: Arc<Mutex<Manners>>,
}

/// What guests do to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manners {
    /// What they are asked.
    #[default]
    Good,
    /// They answer nothing.
    Silent,
    /// They take signals, and nothing ends.
    Endless,
    /// They say that what was killed has ended, and go on listing it.
    Lying,
    /// They start what they are asked to, and never say so.
    Absent,
}

/// One of them.
pub struct FakeVm {
    engine: FakeRuntime,
    id: String,
    sandbox: SandboxId,
    containers: Mutex<BTreeMap<String, ContainerId>>,
    images: Mutex<BTreeMap<u8, ImageId>>,
    volumes: Mutex<BTreeMap<String, GuestVolume>>,
    ended: watch::Sender<bool>,
    stuck: Arc<AtomicBool>,
    manners: Arc<Mutex<Manners>>,
}

impl FakeVms {
    /// No VM yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every VM as if its VMM had been killed.
    pub async fn kill_all(&self) {
        let all: Vec<_> = locked(&self.running).values().cloned().collect();
        for vm in all {
            vm.end();
        }
    }

    /// Whether VMMs that are killed do not end, as ones that wait for a dead disk.
    pub fn hold(&self, stuck: bool) {
        self.stuck.store(stuck, Ordering::SeqCst);
    }

    /// What guests do from now on.
    pub fn behave(&self, manners: Manners) {
        *locked(&self.manners) = manners;
    }

    /// The volumes of all, by name.
    pub fn volumes(&self) -> BTreeMap<String, GuestVolume> {
        locked(&self.running).values().flat_map(|vm| locked(&vm.volumes).clone()).collect()
    }

    /// How many there are, running or not.
    pub fn count(&self) -> usize {
        locked(&self.running).len()
    }
}

impl FakeVm {
    /// Its guest's manners; of a silent one nothing is heard until the VM ends.
    async fn manners(&self) -> Result<Manners> {
        let manners = *locked(&self.manners);
        if manners == Manners::Silent {
            self.exited().await;
            return Err(RuntimeError::new(Kind::Unavailable, "the guest has ended"));
        }
        Ok(manners)
    }

    /// From here on nobody answers.
    fn end(&self) {
        self.ended.send_replace(true);
        self.engine.kill_sandbox(&self.sandbox);
    }

    fn try_end(&self) -> Result<()> {
        if self.stuck.load(Ordering::SeqCst) {
            return Err(RuntimeError::new(Kind::Internal, format!("failed to end microVM {}", self.id)));
        }
        self.end();
        Ok(())
    }
}

#[async_trait]
impl Vms for FakeVms {
    async fn check(&self) -> Result<String> {
        Ok("fake".to_owned())
    }

    fn slots(&self) -> u8 {
        SLOTS
    }

    async fn launch(&self, id: &str, config: &SandboxConfig) -> Result<Arc<dyn Vm>> {
        let pod = PodRef { uid: id.to_owned(), ..config.pod.clone() };
        let sandbox = self.engine.run_pod_sandbox(&SandboxConfig { pod, ..config.clone() }).await?;
        let vm = Arc::new(FakeVm {
            engine: self.engine.clone(),
            id: id.to_owned(),
            sandbox,
            containers: Mutex::default(),
            images: Mutex::default(),
            volumes: Mutex::default(),
            ended: watch::Sender::new(false),
            stuck: Arc::clone(&self.stuck),
            manners: Arc::clone(&self.manners),
        });
        locked(&self.running).insert(id.to_owned(), Arc::clone(&vm));
        Ok(vm)
    }

    async fn find(&self, id: &str) -> Result<Option<Arc<dyn Vm>>> {
        let found = locked(&self.running).get(id).cloned().filter(|vm| !*vm.ended.borrow());
        Ok(found.map(|vm| vm as Arc<dyn Vm>))
    }

    async fn destroy(&self, id: &str) -> Result<()> {
        let vm = locked(&self.running).get(id).cloned();
        if let Some(vm) = vm {
            vm.try_end()?;
            self.engine.remove_pod_sandbox(&vm.sandbox).await?;
            locked(&self.running).remove(id);
        }
        Ok(())
    }
}

impl FakeVm {
    fn container(&self, id: &str) -> Result<ContainerId> {
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no container {id} in the guest"));
        locked(&self.containers).get(id).cloned().ok_or_else(absent)
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn pid(&self) -> i32 {
        PID
    }

    async fn put_image(&self, slot: u8, image: &ImageId, _path: &Path) -> Result<()> {
        locked(&self.images).insert(slot, image.clone());
        Ok(())
    }

    async fn take_image(&self, slot: u8, _image: &ImageId) -> Result<()> {
        locked(&self.images).remove(&slot);
        Ok(())
    }

    async fn make_volume(&self, name: &str, volume: GuestVolume) -> Result<()> {
        locked(&self.volumes).insert(name.to_owned(), volume);
        Ok(())
    }

    async fn push_files(&self, _name: &str, _layout: Layout, _files: Vec<GuestFile>) -> Result<()> {
        Ok(())
    }

    async fn read_file(&self, _name: &str, _path: &str, _limit: u32) -> Result<Option<Bytes>> {
        Ok(None)
    }

    async fn create(&self, container: GuestContainer) -> Result<()> {
        if !locked(&self.images).values().any(|image| *image == container.config.image) {
            return Err(RuntimeError::new(Kind::NotFound, "the image lies behind no slot"));
        }
        let pid_target = match &container.config.pid_target {
            Some(target) => Some(self.container(target.as_str())?),
            None => None,
        };
        let pod = PodRef { uid: self.id.clone(), ..container.config.pod.clone() };
        let config =
            ContainerConfig { pod, name: container.id.clone(), attempt: 0, pid_target, ..container.config.clone() };
        let made = self.engine.create_container(&self.sandbox, &config).await?;
        locked(&self.containers).insert(container.id, made);
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<()> {
        let manners = self.manners().await?;
        self.engine.start_container(&self.container(id)?).await?;
        if manners == Manners::Absent { std::future::pending().await } else { Ok(()) }
    }

    async fn signal(&self, id: &str, signal: &str, _all: bool) -> Result<()> {
        if matches!(self.manners().await?, Manners::Endless | Manners::Lying) {
            return Ok(());
        }
        let container = self.container(id)?;
        if signal == "SIGKILL" {
            return self.engine.stop_container(&container, Duration::ZERO).await;
        }
        // Whoever does not heed it within a moment does not heed it.
        match timeout(MOMENT, self.engine.stop_container(&container, Duration::from_secs(3600))).await {
            Ok(stopped) => stopped,
            Err(_) => Ok(()),
        }
    }

    async fn limit(&self, id: &str, limits: &Resources) -> Result<()> {
        self.engine.update_container_resources(&self.container(id)?, limits).await
    }

    async fn limit_all(&self, limits: &Resources) -> Result<()> {
        self.engine.update_pod_sandbox_resources(&self.sandbox, limits).await
    }

    async fn wait(&self, id: &str) -> Result<()> {
        if self.manners().await? == Manners::Lying {
            return Ok(());
        }
        let container = self.container(id)?;
        while self.engine.container_status(&container).await?.state != ContainerState::Exited {
            sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let container = locked(&self.containers).remove(id);
        match container {
            Some(container) => self.engine.remove_container(&container).await,
            None => Ok(()),
        }
    }

    async fn list(&self) -> Result<Vec<GuestState>> {
        if *self.ended.borrow() {
            return Err(RuntimeError::new(Kind::Unavailable, "the guest has ended"));
        }
        self.manners().await?;
        let containers = locked(&self.containers).clone();
        let mut list = Vec::new();
        for (id, container) in containers {
            // One that is removed meanwhile is not listed.
            let Ok(status) = self.engine.container_status(&container).await else { continue };
            list.push(GuestState {
                id,
                state: status.state,
                frozen: status.frozen,
                started_at: status.started_at,
                finished_at: status.finished_at,
                exit_code: status.exit_code,
                oom_killed: status.oom_killed,
                message: status.message,
            });
        }
        Ok(list)
    }

    async fn set_frozen(&self, id: &str, frozen: bool) -> Result<()> {
        self.manners().await?;
        let container = self.container(id)?;
        match frozen {
            true => self.engine.pause_container(&container).await,
            false => self.engine.unpause_container(&container).await,
        }
    }

    async fn logs(&self, id: &str, offset: u64) -> Result<BoxStream<'static, Result<LogBatch>>> {
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let chunks = self.engine.logs(&self.container(id)?, &options).await?;
        let numbered = chunks.enumerate().map(|(at, chunk)| chunk.map(|chunk| (at as u64, chunk)));
        let wanted = numbered.try_filter(move |(at, _)| futures::future::ready(*at >= offset));
        Ok(wanted.map_ok(|(at, chunk)| LogBatch { chunks: vec![chunk], next: at + 1, lost: 0 }).boxed())
    }

    async fn changes(&self) -> Result<BoxStream<'static, ()>> {
        let id = self.id.clone();
        let events = self.engine.events().await?;
        Ok(events.filter_map(move |event| futures::future::ready((event.pod_uid == id).then_some(()))).boxed())
    }

    async fn stats(&self, scope: StatsScope) -> Result<GuestStats> {
        self.manners().await?;
        let all = self.engine.list_pod_sandbox_stats(scope).await?;
        let own = all.into_iter().find(|stats| stats.id == self.sandbox);
        let own = own.ok_or_else(|| RuntimeError::new(Kind::Unavailable, "the guest has ended"))?;
        let containers = own.containers.into_iter().map(|one| (one.name, one.usage, one.writable_layer));
        let volumes = locked(&self.volumes).clone().into_iter().filter(|(_, volume)| volume.kind != VolumeKind::Pushed);
        // As an empty directory has.
        let usage = DiskUsage { time: own.usage.time, bytes: 4096, inodes: 1 };
        let volumes = volumes.filter(|_| scope > StatsScope::CpuAndMemory).map(|(name, _)| (name, usage)).collect();
        Ok(GuestStats { usage: own.usage, network: own.network, containers: containers.collect(), volumes })
    }

    async fn exec(&self, id: &str, request: &ExecRequest) -> Result<Session> {
        self.engine.exec(&self.container(id)?, request).await
    }

    async fn attach(&self, id: &str, request: &AttachRequest) -> Result<Session> {
        self.engine.attach(&self.container(id)?, request).await
    }

    async fn port_forward(&self, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.engine.port_forward(&self.sandbox, port).await
    }

    async fn kill(&self) -> Result<()> {
        self.try_end()
    }

    async fn exited(&self) {
        // The sender is this VM's own.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

/// Its images are files that nobody reads.
#[async_trait]
impl Blocks for FakeRuntime {
    async fn block(&self, id: &ImageId) -> Result<BlockImage> {
        match self.image_status(id.as_str()).await? {
            Some(_) => Ok(BlockImage::unpinned("/dev/null".into(), ImageConfig::default())),
            None => Err(RuntimeError::new(Kind::NotFound, format!("there is no image {id}"))),
        }
    }
}
