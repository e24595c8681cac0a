//! Sandboxes: a VM, what is remembered of it, and who looks after it.
//!
//! ```text
//! record (Making) -> launch -> record (Running) = ready
//! kill -> record (Ended) = stopped;   destroy -> directory removed = gone
//! ```
//! The record is the first thing made and the last thing removed, so that whatever a crash interrupts is still listed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::checkpoint::{Ended, Phase, SandboxRecord, nanoseconds};
use super::image::BlockImage;
use super::logs::LogBook;
use super::vm::{GuestState, Vm};
use super::{Inner, MicrovmRuntime, refresh};
use crate::runtime::types::{
    ContainerState, EventKind, ImageId, NamespaceMode, RuntimeEvent, SandboxConfig, SandboxId, SandboxState,
    SandboxStatus,
};
use crate::runtime::{Kind, Result, RuntimeError, blocking, locked};
use crate::telemetry::chain;

/// How long the ends of logs may take to come once containers have exited: of all that one look finds.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long a guest may take to say what there is, before it is done without: others wait for the answer too.
pub(super) const ANSWER: Duration = Duration::from_secs(2);
/// How long a guest may take to end its containers, before it is ended itself.
const FAREWELL: Duration = Duration::from_secs(10);
/// Pause before a guest that cannot be asked is asked again.
const AGAIN: Duration = Duration::from_millis(500);
/// A guest may tell of changes as fast as it likes: after a look at it there is a moment of rest, ...
const BREATH: Duration = Duration::from_millis(5);
/// ... and so many of them lead to one look.
const AT_ONCE: usize = 256;
/// Most of a file that is copied back (a termination message has 4 KiB).
const LONGEST_RETURNED: u32 = 64 << 10;

/// A sandbox that this process knows.
pub(super) struct Sandbox {
    pub(super) id: String,
    pub(super) directory: PathBuf,
    record: Mutex<SandboxRecord>,
    vm: Mutex<Option<Arc<dyn Vm>>>,
    /// Whoever changes what containers there are has the turn.
    pub(super) turn: AsyncMutex<()>,
    /// One writes the record down at a time, so that an older state never comes after a newer one.
    writing: Arc<AsyncMutex<()>>,
    /// One look at the guest at a time, so that each change is told once.
    looking: AsyncMutex<()>,
    /// One opens a log at a time, so that there is one book of each.
    pub(super) opening: AsyncMutex<()>,
    pub(super) logs: Mutex<HashMap<String, Log>>,
    /// The images behind its slots, which cannot be removed meanwhile.
    pub(super) blocks: Mutex<HashMap<ImageId, BlockImage>>,
    tasks: Mutex<JoinSet<()>>,
}

/// A container's log, and whether all of it was fetched.
#[derive(Clone)]
pub(super) struct Log {
    pub(super) book: Arc<LogBook>,
    pub(super) whole: watch::Receiver<bool>,
    /// Whether it is fetched, or was: once is enough.
    pub(super) fetched: bool,
}

impl Sandbox {
    pub(super) fn new(directory: PathBuf, record: SandboxRecord) -> Self {
        Self {
            id: record.id.clone(),
            directory,
            record: Mutex::new(record),
            vm: Mutex::default(),
            turn: AsyncMutex::default(),
            writing: Arc::default(),
            looking: AsyncMutex::default(),
            opening: AsyncMutex::default(),
            logs: Mutex::default(),
            blocks: Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    pub(super) fn record(&self) -> MutexGuard<'_, SandboxRecord> {
        locked(&self.record)
    }

    /// The VM while it runs.
    pub(super) fn vm(&self) -> Option<Arc<dyn Vm>> {
        locked(&self.vm).clone()
    }

    /// Changes the record, and writes it down.
    pub(super) async fn change<T>(&self, change: impl FnOnce(&mut SandboxRecord) -> T) -> Result<T> {
        let value = change(&mut self.record());
        let turn = Arc::clone(&self.writing).lock_owned().await;
        let (record, directory) = (self.record().clone(), self.directory.clone());
        let save = move || {
            // Whoever waits may be gone by now; the turn ends with the work.
            let _turn = turn;
            record.save(&directory)
        };
        blocking(format!("failed to write down sandbox {}", self.id), save).await?;
        Ok(value)
    }

    /// Runs a task until the sandbox is dropped.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = locked(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Ends the tasks that look after it.
    pub(super) fn let_go(&self) {
        locked(&self.tasks).abort_all();
    }

    fn status(&self) -> SandboxStatus {
        let vm = self.vm();
        let record = self.record();
        let ready = record.phase == Phase::Running && vm.is_some();
        SandboxStatus {
            id: self.id.as_str().into(),
            pod: record.pod(),
            attempt: record.attempt,
            state: if ready { SandboxState::Ready } else { SandboxState::NotReady },
            created_at: record.created_at(),
            addresses: record.address.into_iter().collect(),
            pid: vm.map(|vm| vm.pid()),
        }
    }

    /// What the guest says of its containers; nothing if it does not say so soon.
    pub(super) async fn guests(&self) -> Vec<GuestState> {
        // Cancel-safe: it only asks.
        match timeout(ANSWER, self.ask()).await {
            Ok(guests) => guests.unwrap_or_default(),
            Err(_) => {
                tracing::debug!(sandbox = self.id, "the guest does not say in time what there is");
                Vec::new()
            }
        }
    }

    /// The same, for as long as a guest may take; `None` if it cannot be asked.
    async fn ask(&self) -> Option<Vec<GuestState>> {
        let listed = self.vm()?.list().await;
        listed
            .inspect_err(|error| tracing::debug!(sandbox = self.id, error = chain(error), "the guest cannot be asked"))
            .ok()
    }
}

impl MicrovmRuntime {
    pub(super) fn sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        locked(&self.inner.sandboxes).get(id).cloned()
    }

    pub(super) fn sandboxes(&self, pod_uid: Option<&str>) -> Vec<Arc<Sandbox>> {
        let sandboxes = locked(&self.inner.sandboxes);
        let of_pod = |sandbox: &&Arc<Sandbox>| pod_uid.is_none_or(|uid| sandbox.record().uid() == uid);
        sandboxes.values().filter(of_pod).cloned().collect()
    }

    pub(super) async fn run(&self, config: &SandboxConfig) -> Result<SandboxId> {
        let tried = || format!("failed to run a sandbox of {}", config.pod);
        let _turn = self.inner.turns.turn(&format!("{}/{}", config.pod.uid, config.attempt)).await;
        let same = |sandbox: &Arc<Sandbox>| sandbox.record().attempt == config.attempt;
        for sandbox in self.sandboxes(Some(&config.pod.uid)).into_iter().filter(same) {
            if sandbox.status().state == SandboxState::Ready {
                return Ok(sandbox.id.as_str().into());
            }
            self.remove_sandbox(&sandbox).await?;
        }
        if config.network.addresses().is_empty() {
            let text =
                format!("{}: a microVM has no part in the host's network, nor in one that CNI plugins make", tried());
            return Err(RuntimeError::new(Kind::Unsupported, text));
        }
        if [config.ipc, config.pid].contains(&NamespaceMode::Node) {
            let text = format!("{}: a microVM has no part in the host's processes or their IPC", tried());
            return Err(RuntimeError::new(Kind::Unsupported, text));
        }
        let sandbox = self.begin(config).await?;
        match self.inner.vms.launch(&sandbox.id, config).await {
            Ok(vm) => self.inner.attend(&sandbox, vm),
            Err(error) => {
                self.remove_sandbox(&sandbox).await?;
                return Err(error);
            }
        }
        sandbox.change(|record| record.phase = Phase::Running).await?;
        self.inner.tell(&sandbox, EventKind::Started);
        Ok(sandbox.id.as_str().into())
    }

    /// A sandbox of which nothing is there yet but its record.
    async fn begin(&self, config: &SandboxConfig) -> Result<Arc<Sandbox>> {
        // Nothing is waited for until it is listed.
        let id = self.inner.vms.name(config);
        let record = SandboxRecord::new(id.clone(), &self.inner.options.owner, config, self.inner.vms.slots());
        let directory = self.inner.directory(&id);
        let (saved, place) = (record.clone(), directory.clone());
        let sandbox = Arc::new(Sandbox::new(directory, record));
        // Listed from here on, so that it is removed by whoever comes after this was given up.
        locked(&self.inner.sandboxes).insert(id.clone(), Arc::clone(&sandbox));
        let written = blocking(format!("failed to write down sandbox {id}"), move || {
            std::fs::create_dir_all(&place)?;
            saved.save(&place)
        });
        if let Err(error) = written.await {
            // Of one that waited.
            self.inner.vms.destroy(&id).await?;
            locked(&self.inner.sandboxes).remove(&id);
            return Err(error);
        }
        Ok(sandbox)
    }

    pub(super) async fn stop_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let vm = match sandbox.vm() {
            Some(vm) => Some(vm),
            // One that could not be taken over at the start may run all the same.
            None if sandbox.record().phase == Phase::Running => self.inner.vms.find(&sandbox.id).await?,
            None => None,
        };
        if let Some(vm) = vm {
            // What is said until the end is part of the log.
            let farewell = async {
                let running: Vec<_> = sandbox.record().containers.keys().cloned().collect();
                for id in &running {
                    let _ = vm.set_frozen(id, false).await;
                    let _ = vm.signal(id, "SIGKILL", true).await;
                }
                self.inner.look(sandbox).await;
            };
            // Cancel-safe: what was not seen by then has ended with the VM.
            if timeout(FAREWELL, farewell).await.is_err() {
                tracing::warn!(sandbox = sandbox.id, "a guest did not end its containers in time");
            }
            vm.kill().await?;
        }
        self.inner.end(sandbox).await
    }

    pub(super) async fn remove_sandbox(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        self.stop_sandbox(sandbox).await?;
        self.inner.vms.destroy(&sandbox.id).await?;
        sandbox.let_go();
        locked(&sandbox.blocks).clear();
        let directory = sandbox.directory.clone();
        blocking(format!("failed to remove sandbox {}", sandbox.id), move || {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
        .await?;
        locked(&self.inner.sandboxes).remove(&sandbox.id);
        self.inner.tell(sandbox, EventKind::Removed);
        Ok(())
    }

    pub(super) fn sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no sandbox {id}"));
        self.sandbox(id.as_str()).map(|sandbox| sandbox.status()).ok_or_else(absent)
    }

    pub(super) fn list_sandboxes(&self, pod_uid: Option<&str>) -> Vec<SandboxStatus> {
        self.sandboxes(pod_uid).iter().map(|sandbox| sandbox.status()).collect()
    }
}

impl Inner {
    pub(super) fn directory(&self, id: &str) -> PathBuf {
        self.options.root.join("sandboxes").join(id)
    }

    pub(super) fn tell(&self, sandbox: &Sandbox, kind: EventKind) {
        let pod_uid = sandbox.record().uid().to_owned();
        // Nobody listening is fine.
        let _ = self.events.send(RuntimeEvent { pod_uid, kind });
    }

    /// Looks after a sandbox whose VM runs: writes down what happens in it, and its end.
    pub(super) fn attend(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: Arc<dyn Vm>) {
        *locked(&sandbox.vm) = Some(Arc::clone(&vm));
        // The tasks must not keep the sandbox that owns them.
        let (inner, weak, watched) = (Arc::clone(self), Arc::downgrade(sandbox), Arc::clone(&vm));
        sandbox.spawn(async move {
            watched.exited().await;
            let Some(sandbox) = weak.upgrade() else { return };
            if let Err(error) = inner.end(&sandbox).await {
                tracing::warn!(
                    sandbox = sandbox.id,
                    error = chain(&error),
                    "failed to write down the end of a microVM"
                );
            }
        });
        let places = self.options.places.clone();
        sandbox.spawn(refresh::follow(Arc::downgrade(sandbox), Arc::clone(&vm), places));
        let (inner, weak) = (Arc::clone(self), Arc::downgrade(sandbox));
        sandbox.spawn(async move {
            loop {
                let changes = vm.changes().await;
                // What happened before is seen by looking.
                let Some(sandbox) = weak.upgrade().filter(|sandbox| sandbox.vm().is_some()) else { return };
                // What this look does not see nobody tells again.
                let seen = inner.look(&sandbox).await;
                drop(sandbox);
                if seen && let Ok(mut changes) = changes {
                    while changes.next().await.is_some() {
                        // One look sees all that is told by now.
                        (0..AT_ONCE).take_while(|_| changes.next().now_or_never().flatten().is_some()).for_each(drop);
                        let Some(sandbox) = weak.upgrade() else { return };
                        let seen = inner.look(&sandbox).await;
                        drop(sandbox);
                        if !seen {
                            break;
                        }
                        sleep(BREATH).await;
                    }
                }
                sleep(AGAIN).await;
            }
        });
    }

    /// Compares what the guest says with what is written down; writes down, and tells, what is new. Whether the guest
    /// could be asked.
    pub(super) async fn look(&self, sandbox: &Arc<Sandbox>) -> bool {
        let _looking = sandbox.looking.lock().await;
        let Some(guests) = sandbox.ask().await else { return false };
        let until = Instant::now() + LAST_WORDS;
        for guest in &guests {
            let Some((started, ended)) = known(sandbox, &guest.id) else { continue };
            if let (false, Some(at)) = (started, guest.started_at) {
                // First, for of what is noted nobody looks after the log. Whoever started it may have been gone before.
                if let Err(error) = self.open_log(sandbox, &guest.id, true).await {
                    tracing::warn!(container = guest.id, error = chain(&error), "its log is not fetched");
                }
                let noted = sandbox.change(|record| {
                    if let Some(container) = record.containers.get_mut(&guest.id) {
                        container.started = Some(nanoseconds(at));
                    }
                });
                if let Err(error) = noted.await {
                    tracing::warn!(container = guest.id, error = chain(&error), "failed to write down its start");
                }
                self.tell(sandbox, EventKind::Started);
            }
            if guest.state == ContainerState::Exited && !ended {
                self.container_ended(sandbox, guest, until).await;
            }
        }
        true
    }

    /// Writes down the end of a container, once its last words are here or it is too late for them.
    async fn container_ended(&self, sandbox: &Arc<Sandbox>, guest: &GuestState, until: Instant) {
        let log = locked(&sandbox.logs).get(&guest.id).cloned();
        if let Some(mut log) = log
            && timeout_at(until, log.whole.wait_for(|whole| *whole)).await.is_err()
        {
            tracing::warn!(container = guest.id, "the end of its log did not come in time");
        }
        give_back(sandbox, &guest.id).await;
        let ended = sandbox.change(|record| {
            if let Some(container) = record.containers.get_mut(&guest.id) {
                container.ended = Some(Ended::of(guest));
            }
        });
        if let Err(error) = ended.await {
            tracing::warn!(container = guest.id, error = chain(&error), "failed to write down its end");
        }
        if guest.oom_killed {
            self.tell(sandbox, EventKind::OutOfMemory);
        }
        self.tell(sandbox, EventKind::Exited);
    }

    /// The VM has ended, and with it whatever ran.
    pub(super) async fn end(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let _looking = sandbox.looking.lock().await;
        *locked(&sandbox.vm) = None;
        let (before, lost) = {
            let record = sandbox.record();
            let running = record.containers.iter().filter(|(_, one)| one.started.is_some() && one.ended.is_none());
            (record.phase, running.map(|(id, _)| id.clone()).collect::<Vec<_>>())
        };
        if before == Phase::Ended {
            return Ok(());
        }
        if before == Phase::Making {
            // Perhaps it is not written down at all, and what is half made counts as ended by a later process too.
            sandbox.record().phase = Phase::Ended;
            return Ok(());
        }
        sandbox
            .change(|record| {
                record.phase = Phase::Ended;
                for id in &lost {
                    if let Some(container) = record.containers.get_mut(id) {
                        container.ended = Some(Ended::with_vm());
                    }
                }
            })
            .await?;
        locked(&sandbox.logs).values().for_each(|log| log.book.close());
        locked(&sandbox.blocks).clear();
        for _ in lost {
            self.tell(sandbox, EventKind::Exited);
        }
        self.tell(sandbox, EventKind::Exited);
        Ok(())
    }
}

/// Whether the container was started, and has ended, as far as is written down.
fn known(sandbox: &Sandbox, id: &str) -> Option<(bool, bool)> {
    let record = sandbox.record();
    let container = record.containers.get(id)?;
    Some((container.started.is_some(), container.ended.is_some()))
}

/// Copies the files of a container that the host wants to read.
async fn give_back(sandbox: &Sandbox, id: &str) {
    let Some(vm) = sandbox.vm() else { return };
    let returned = sandbox.record().containers.get(id).map(|one| one.returned.clone()).unwrap_or_default();
    for (volume, path) in returned {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let read = vm.read_file(&volume, &file, LONGEST_RETURNED).await;
        let written = match read {
            Ok(Some(bytes)) => tokio::fs::write(&path, bytes).await,
            Ok(None) => Ok(()),
            Err(error) => Err(std::io::Error::other(error)),
        };
        if let Err(error) = written {
            tracing::warn!(container = id, path = %path.display(), error = chain(&error), "failed to copy a file back");
        }
    }
}
