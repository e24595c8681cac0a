//! An in-memory runtime with fault knobs: for tests, and shipped as `--runtime fake`.
//!
//! It obeys the contract of the seam (the same suite runs against it and the real ones) and runs nothing: what a
//! container does is read from its command (see the table in `program`), and one with a real image's command runs until
//! it is stopped. Knobs make the next call of a verb fail, hang or panic, end containers, kill sandboxes and emit events.

mod faults;
mod log;
mod process;
mod program;
mod state;
mod streams;

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use sha2::{Digest, Sha256};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::faults::Faults;
pub use self::faults::Hold;
use self::process::Process;
use self::program::Program;
use self::state::{KILLED, State};
use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope, Usage};
use super::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, EventKind, Grace, Image, ImageId, LogChunk,
    LogOptions, LogSource, Mount, RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId,
    SandboxStatus,
};
use super::verb::Verb;
use super::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime, locked, reference};

/// Events a slow subscriber may be behind; one that is further behind is cut off, as by a daemon that went away.
const EVENTS_BEHIND: usize = 1024;
/// Exit code of a process that SIGTERM ended.
const TERMINATED: i32 = 143;

/// The runtime. Clones share everything.
#[derive(Clone, Debug)]
pub struct FakeRuntime {
    shared: Arc<Shared>,
    programs: Arc<Mutex<JoinSet<()>>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    faults: Faults,
    start_delay: Mutex<Duration>,
    events: Mutex<broadcast::Sender<RuntimeEvent>>,
    /// Changes with everything that followers of logs and waiters for an end want to know.
    changed: watch::Sender<u64>,
}

impl Default for FakeRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeRuntime {
    /// An empty one: no sandbox, no image, starts at once.
    pub fn new() -> Self {
        let shared = Shared {
            state: Mutex::default(),
            faults: Faults::default(),
            start_delay: Mutex::default(),
            events: Mutex::new(broadcast::Sender::new(EVENTS_BEHIND)),
            changed: watch::Sender::new(0),
        };
        Self { shared: Arc::new(shared), programs: Arc::default() }
    }

    /// How long starting a sandbox or a container takes from now on.
    pub fn set_start_delay(&self, delay: Duration) {
        *locked(&self.shared.start_delay) = delay;
    }

    /// The next call of `verb` fails with `error` and does nothing. Asked for several times: one call after the other.
    pub fn fail_next(&self, verb: Verb, error: RuntimeError) {
        self.shared.faults.fail(verb, error);
    }

    /// The next call of `verb` panics: a bug in whoever called it, as far as that one's task can tell.
    pub fn panic_next(&self, verb: Verb) {
        self.shared.faults.panic(verb);
    }

    /// The next call of `verb` hangs, before it does anything, until the [`Hold`] is dropped.
    pub fn hang_next(&self, verb: Verb) -> Hold {
        self.shared.faults.hang(verb)
    }

    /// The next start of a container is done at once, yet answered only when the [`Hold`] is dropped.
    pub fn answer_next_start_late(&self) -> Hold {
        self.shared.faults.late(Verb::StartContainer)
    }

    /// The next reader of a log gets nothing of it and its end, as an engine may answer while a container ends.
    pub fn cut_next_log(&self) {
        self.shared.faults.cut(Verb::Logs);
    }

    /// How often `verb` was called.
    pub fn calls(&self, verb: Verb) -> u64 {
        self.shared.faults.calls(verb)
    }

    /// Ends a running container with this code, as if by itself.
    pub fn exit_container(&self, id: &ContainerId, exit_code: i32) {
        self.shared.end(id, exit_code, false);
    }

    /// Ends a running container as the kernel does for want of memory.
    pub fn oom_kill_container(&self, id: &ContainerId) {
        self.shared.end(id, KILLED, true);
    }

    /// Ends a sandbox and what runs in it, as if its holder had died.
    pub fn kill_sandbox(&self, id: &SandboxId) {
        self.shared.stop_sandbox(id);
    }

    /// Writes to a container's log, newlines and all.
    pub fn append_log(&self, id: &ContainerId, source: LogSource, bytes: &[u8]) {
        self.shared.append_log(id, source, bytes);
    }

    /// What a container's statistics say it uses from now on.
    pub fn set_usage(&self, id: &ContainerId, usage: Usage) {
        if let Some(container) = locked(&self.shared.state).containers.get_mut(id) {
            container.usage = usage;
        }
    }

    /// Tells subscribers this event.
    pub fn emit(&self, event: RuntimeEvent) {
        // Nobody listening is fine.
        let _ = locked(&self.shared.events).send(event);
    }

    /// Ends every event stream, as a daemon that restarts does.
    pub fn end_events(&self) {
        *locked(&self.shared.events) = broadcast::Sender::new(EVENTS_BEHIND);
    }

    /// What a container was made to see of the host; nothing if there is no such container.
    pub fn mounts(&self, id: &ContainerId) -> Vec<Mount> {
        locked(&self.shared.state).containers.get(id).map(|c| c.config.mounts.clone()).unwrap_or_default()
    }

    /// Puts an image into the store without a pull.
    pub fn add_image(&self, reference: &str) -> ImageId {
        self.shared.add_image(reference, false)
    }

    /// The same, as if it had been pulled: a registry has it too.
    pub fn add_pulled_image(&self, reference: &str) -> ImageId {
        self.shared.add_image(reference, true)
    }

    /// Lets an image be one that sandboxes are held by.
    pub fn pin_image(&self, id: &ImageId) {
        locked(&self.shared.state).images.entry(id.clone()).and_modify(|image| image.pinned = true);
    }
}

impl Shared {
    fn touch(&self) {
        self.changed.send_modify(|changes| *changes += 1);
    }

    fn tell(&self, pod_uid: &str, kind: EventKind) {
        let event = RuntimeEvent { pod_uid: pod_uid.to_owned(), kind };
        let _ = locked(&self.events).send(event);
        self.touch();
    }

    fn pod_of(&self, id: &ContainerId) -> Option<String> {
        locked(&self.state).containers.get(id).map(|container| container.status.pod.uid.clone())
    }

    fn end(&self, id: &ContainerId, exit_code: i32, oom: bool) {
        let pod = self.pod_of(id).unwrap_or_default();
        if locked(&self.state).end(id, exit_code, oom) {
            if oom {
                self.tell(&pod, EventKind::OutOfMemory);
            }
            self.tell(&pod, EventKind::Exited);
            // The kernel ends what is left in a PID namespace whose first process has ended.
            let joined = locked(&self.state).joined_to(id);
            joined.iter().for_each(|id| self.end(id, KILLED, false));
        }
    }

    fn stop_sandbox(&self, id: &SandboxId) {
        let mut state = locked(&self.state);
        let pod = state.sandboxes.get(id).map(|sandbox| sandbox.pod.uid.clone()).unwrap_or_default();
        let (stopped, members) = state.stop_sandbox(id);
        drop(state);
        for _ in 0..members.len() + usize::from(stopped) {
            self.tell(&pod, EventKind::Exited);
        }
    }

    fn append_log(&self, id: &ContainerId, source: LogSource, bytes: &[u8]) {
        if let Some(container) = locked(&self.state).containers.get_mut(id) {
            container.log.append(source, bytes);
        }
        self.touch();
    }

    fn add_image(&self, reference: &str, pulled: bool) -> ImageId {
        let digest = Sha256::digest(reference).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let id = ImageId::from(format!("sha256:{digest}"));
        let image = Image {
            tags: vec![reference.to_owned()],
            digests: pulled.then(|| format!("{reference}@{id}")).into_iter().collect(),
            size: 1 << 20,
            ..Image::new(id.clone())
        };
        locked(&self.state).images.insert(id.clone(), image);
        id
    }

    /// Waits until the state is as wanted.
    async fn until(&self, wanted: impl Fn(&State) -> bool) {
        let mut changed = self.changed.subscribe();
        while !wanted(&locked(&self.state)) && changed.changed().await.is_ok() {}
    }
}

impl FakeRuntime {
    async fn enter(&self, verb: Verb) -> Result<()> {
        self.shared.faults.enter(verb).await
    }

    async fn delay_start(&self) {
        let delay = *locked(&self.shared.start_delay);
        if !delay.is_zero() {
            sleep(delay).await;
        }
    }

    /// Runs a program or what belongs to one; it ends with the runtime.
    fn spawn(&self, program: impl Future<Output = ()> + Send + 'static) {
        let mut programs = locked(&self.programs);
        while programs.try_join_next().is_some() {}
        programs.spawn(program);
    }

    /// Begins what a created container does.
    fn begin(&self, id: &ContainerId) -> Result<()> {
        let mut state = locked(&self.shared.state);
        let container = state.container(id)?;
        match container.status.state {
            ContainerState::Running => return Ok(()),
            ContainerState::Exited => {
                return Err(RuntimeError::new(Kind::Invalid, format!("container {id} has exited already")));
            }
            ContainerState::Created => {}
        }
        let pod = container.status.pod.uid.clone();
        match container.program.clone() {
            Program::CannotStart { code, message } => {
                let failure = RuntimeError::new(Kind::Invalid, format!("failed to start container {id}: {message}"));
                let status = &mut container.status;
                status.state = ContainerState::Exited;
                status.exit_code = code;
                status.finished_at = Some(status.created_at);
                status.message = message;
                Err(failure)
            }
            Program::Runs(steps) => {
                state.mark_started(id);
                drop(state);
                self.shared.tell(&pod, EventKind::Started);
                self.spawn(Process::of_container(Arc::clone(&self.shared), id.clone()).live(steps));
                Ok(())
            }
        }
    }
}

#[async_trait]
impl SandboxRuntime for FakeRuntime {
    async fn version(&self) -> Result<RuntimeVersion> {
        self.enter(Verb::Version).await?;
        Ok(RuntimeVersion { name: "fake".into(), version: env!("CARGO_PKG_VERSION").into() })
    }

    async fn ready(&self) -> Result<()> {
        self.enter(Verb::Ready).await
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        self.enter(Verb::RunPodSandbox).await?;
        self.delay_start().await;
        let (id, new) = locked(&self.shared.state).run_sandbox(config);
        if new {
            self.shared.tell(&config.pod.uid, EventKind::Started);
        }
        Ok(id)
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.enter(Verb::StopPodSandbox).await?;
        self.shared.stop_sandbox(id);
        Ok(())
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.enter(Verb::RemovePodSandbox).await?;
        self.shared.stop_sandbox(id);
        let mut state = locked(&self.shared.state);
        let pod = state.sandboxes.get(id).map(|sandbox| sandbox.pod.uid.clone()).unwrap_or_default();
        let removed = state.remove_sandbox(id);
        drop(state);
        for _ in 0..removed {
            self.shared.tell(&pod, EventKind::Removed);
        }
        Ok(())
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.enter(Verb::PodSandboxStatus).await?;
        locked(&self.shared.state).sandbox(id).cloned()
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        self.enter(Verb::ListPodSandboxes).await?;
        let state = locked(&self.shared.state);
        let wanted = |status: &&SandboxStatus| pod_uid.is_none_or(|uid| status.pod.uid == uid);
        Ok(state.sandboxes.values().filter(wanted).cloned().collect())
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        self.enter(Verb::CreateContainer).await?;
        locked(&self.shared.state).create(sandbox, config)
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        self.enter(Verb::StartContainer).await?;
        self.delay_start().await;
        self.begin(id)?;
        self.shared.faults.leave(Verb::StartContainer).await;
        Ok(())
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        self.enter(Verb::StopContainer).await?;
        let stubborn = locked(&self.shared.state).containers.get(id).is_some_and(|container| container.stubborn);
        if !stubborn && !grace.is_zero() {
            self.shared.end(id, TERMINATED, false);
        }
        if timeout(grace, self.shared.ended(id)).await.is_err() {
            self.shared.end(id, KILLED, false);
        }
        Ok(())
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.enter(Verb::RemoveContainer).await?;
        self.shared.end(id, KILLED, false);
        let removed = locked(&self.shared.state).containers.remove(id);
        if let Some(container) = removed {
            self.shared.tell(&container.status.pod.uid, EventKind::Removed);
        }
        Ok(())
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        self.enter(Verb::ListContainers).await?;
        let state = locked(&self.shared.state);
        let wanted = |status: &&ContainerStatus| pod_uid.is_none_or(|uid| status.pod.uid == uid);
        Ok(state.containers.values().map(|container| &container.status).filter(wanted).cloned().collect())
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.enter(Verb::ContainerStatus).await?;
        Ok(locked(&self.shared.state).container(id)?.status.clone())
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        self.enter(Verb::Logs).await?;
        self.read_log(id, options)
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        self.enter(Verb::Exec).await?;
        self.run_exec(id, request)
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        self.enter(Verb::Attach).await?;
        self.join_streams(id, *request)
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.enter(Verb::PortForward).await?;
        self.connect_inside(id, port)
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        self.enter(Verb::PauseContainer).await?;
        locked(&self.shared.state).running(id, "pause")?.status.frozen = true;
        Ok(())
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        self.enter(Verb::UnpauseContainer).await?;
        locked(&self.shared.state).running(id, "unpause")?.status.frozen = false;
        self.shared.touch();
        Ok(())
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.enter(Verb::UpdateContainerResources).await?;
        locked(&self.shared.state).set_limits(id, resources)
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        self.enter(Verb::UpdatePodSandboxResources).await?;
        locked(&self.shared.state).set_sandbox_limits(id, resources)
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        self.enter(Verb::ListPodSandboxStats).await?;
        Ok(locked(&self.shared.state).stats(scope))
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        self.enter(Verb::Events).await?;
        let receiver = locked(&self.shared.events).subscribe();
        let events = stream::unfold(receiver, |mut receiver| async move {
            // Too far behind is the end too: the caller lists.
            receiver.recv().await.ok().map(|event| (event, receiver))
        });
        Ok(events.boxed())
    }
}

#[async_trait]
impl ImageStore for FakeRuntime {
    async fn pull_image(&self, reference: &str, _auths: &[RegistryAuth]) -> Result<ImageId> {
        self.enter(Verb::PullImage).await?;
        reference::parse(reference)?;
        Ok(self.shared.add_image(reference, true))
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.enter(Verb::ImageStatus).await?;
        let state = locked(&self.shared.state);
        let named = |image: &&Image| image.id.as_str() == reference || image.tags.iter().any(|tag| tag == reference);
        Ok(state.images.values().find(named).cloned())
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.enter(Verb::ListImages).await?;
        Ok(locked(&self.shared.state).images.values().cloned().collect())
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.enter(Verb::ImageFsInfo).await?;
        Err(RuntimeError::new(Kind::Unsupported, "images are kept in memory"))
    }

    /// The image's files are its name, in `reference`, and what a container might want to see a part of, in `part/file`.
    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        self.enter(Verb::UnpackImage).await?;
        let reference = locked(&self.shared.state).images.get(id).map(|image| image.tags.join(" "));
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no image {id}"));
        let (reference, into) = (reference.ok_or_else(absent)?, into.to_owned());
        super::blocking(format!("failed to unpack image {id}"), move || {
            std::fs::create_dir_all(into.join("part"))?;
            std::fs::write(into.join("part/file"), "1")?;
            std::fs::write(into.join("reference"), reference)
        })
        .await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.enter(Verb::RemoveImage).await?;
        let mut state = locked(&self.shared.state);
        if state.containers.values().any(|container| container.status.image == *id) {
            return Err(RuntimeError::new(Kind::AlreadyExists, format!("a container uses image {id}")));
        }
        state.images.remove(id);
        Ok(())
    }
}
