//! One container: made, started, ended, removed. Its own lock orders what is asked of it; its state is told to whoever
//! waits.
//!
//! ```text
//! create: overlay mounted, cgroup made --> start: stage becomes the workload --> end: cgroup killed, log closed --> remove
//! ```

mod start;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use lambdalet_proto::agent::v1::{ContainerSpec, ContainerState, EventKind, Mount, Phase, Resources};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use tokio::sync::watch;

use crate::clock;
use crate::error::{Error, Result, Tried};
use crate::fd::FdStream;
use crate::guest::Guest;
use crate::log::Log;
use crate::tree;

/// How long a log may take to end after its container.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) spec: ContainerSpec,
    pub(crate) log: Arc<Log>,
    state: watch::Sender<State>,
    /// Orders start, freeze and remove.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// Its standard input, or its terminal, while somebody may write to it.
    pub(crate) stdin: Mutex<Option<FdStream>>,
    /// Its terminal.
    pub(crate) terminal: OnceLock<FdStream>,
}

/// Where in its life a container is.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    phase: Phase,
    pid: i32,
    created_ns: u64,
    started_ns: u64,
    finished_ns: u64,
    exit_code: i32,
    oom_killed: bool,
    frozen: bool,
    message: String,
    /// It is being removed: nobody will hear of it again.
    removed: bool,
    pidfd: Option<Arc<std::os::fd::OwnedFd>>,
}

impl Container {
    /// A handle on its first process while it runs.
    pub(crate) fn process(&self) -> Option<Arc<std::os::fd::OwnedFd>> {
        let state = self.state.borrow();
        if state.phase == Phase::Running { state.pidfd.clone() } else { None }
    }

    /// Whether it runs.
    pub(crate) fn runs(&self) -> bool {
        self.state.borrow().phase == Phase::Running
    }

    /// As the node is told.
    pub(crate) fn told(&self) -> ContainerState {
        let state = self.state.borrow();
        ContainerState {
            id: self.spec.id.clone(),
            phase: state.phase.into(),
            pid: state.pid.unsigned_abs(),
            created_ns: state.created_ns,
            started_ns: state.started_ns,
            finished_ns: state.finished_ns,
            exit_code: state.exit_code,
            oom_killed: state.oom_killed,
            frozen: state.frozen,
            message: state.message.clone(),
            annotations: self.spec.annotations.clone(),
        }
    }

    /// Waits until it has exited. Cancel-safe.
    ///
    /// # Errors
    /// It was removed meanwhile.
    pub(crate) async fn exited(&self) -> Result<ContainerState> {
        let mut state = self.state.subscribe();
        let ended = state.wait_for(|state| state.phase == Phase::Exited || state.removed).await;
        let exited = ended.is_ok_and(|state| state.phase == Phase::Exited);
        if exited { Ok(self.told()) } else { Err(Error::not_found(format!("container {} was removed", self.spec.id))) }
    }
}

impl Guest {
    /// Makes a container: its overlay and its cgroup. One of the same id is left as it is.
    ///
    /// # Errors
    /// An unknown image or volume, or what the kernel refused; nothing is left then.
    pub(crate) fn create_container(&self, spec: ContainerSpec) -> Result<()> {
        let id = spec.id.clone();
        let tried = || format!("failed to create container {id}");
        check(&spec)?;
        if self.containers().contains_key(&id) {
            return Ok(());
        }
        let lower = self.image(&spec.image)?;
        for mount in &spec.mounts {
            self.source(mount)?;
        }
        let directory = self.paths.container(&id);
        let made = self.make_container(spec, &lower, &directory);
        match made {
            Ok(container) => {
                self.watch_container(&id);
                self.containers().insert(id, Arc::new(container));
                Ok(())
            }
            Err(error) => {
                let _ = self.unmake_container(&id);
                Err(error).tried(tried)
            }
        }
    }

    /// Where the volume or the image of a mount is.
    fn source(&self, mount: &Mount) -> Result<PathBuf> {
        if mount.image.is_empty() { self.volume(&mount.volume) } else { self.image(&mount.image) }
    }

    fn make_container(&self, spec: ContainerSpec, lower: &Path, directory: &Path) -> io::Result<Container> {
        let (upper, work, root) = (directory.join("upper"), directory.join("work"), self.paths.root(&spec.id));
        for made in [&upper, &work, &root] {
            fs::create_dir_all(made)?;
        }
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        // Device nodes that a container makes do not open; those of its /dev are mounted one by one.
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()))?;
        self.cgroups.create(&spec.id, &spec.resources.unwrap_or_default())?;
        let log = Arc::new(Log::new(directory.join("log"), spec.log_limit)?);
        let state = State { created_ns: clock::now_ns(), ..State::default() };
        Ok(Container {
            spec,
            log,
            state: watch::Sender::new(state),
            turn: tokio::sync::Mutex::default(),
            stdin: Mutex::default(),
            terminal: OnceLock::new(),
        })
    }

    /// Takes away what makes a container, as far as it is there.
    fn unmake_container(&self, id: &str) -> io::Result<()> {
        self.cgroups.remove(id)?;
        let root = self.paths.root(id);
        if root.exists() {
            // What is no mount needs no unmounting.
            let _ = umount2(&root, MntFlags::MNT_DETACH);
            fs::remove_dir(&root)?;
        }
        tree::remove(&self.paths.container(id))
    }

    /// The container of that id.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| Error::not_found(format!("there is no container {id}")))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// An unknown container or signal.
    pub(crate) fn signal_container(&self, id: &str, name: &str, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let signal = signal(name).ok_or_else(|| Error::invalid(format!("there is no signal {name}")))?;
        let pid = container.state.borrow().pid;
        if !container.runs() {
            return Ok(());
        }
        if all && signal == Signal::SIGKILL {
            self.cgroups.kill(id);
            return Ok(());
        }
        if all {
            return self.signal_all(id, signal).tried(|| format!("failed to signal container {id}"));
        }
        self.reaper.signal(pid, false, signal).tried(|| format!("failed to signal container {id}"))
    }

    fn signal_all(&self, id: &str, signal: Signal) -> io::Result<()> {
        let pids = fs::read_to_string(self.cgroups.path(id).join("cgroup.procs"))?;
        for pid in pids.lines().filter_map(|line| line.parse().ok()) {
            // It may have ended since.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
        Ok(())
    }

    /// Freezes or thaws.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) fn freeze_container(&self, id: &str, frozen: bool) -> Result<()> {
        let container = self.container(id)?;
        let _turn = container.turn.blocking_lock();
        if !container.runs() {
            return Err(Error::state(format!("container {id} does not run")));
        }
        self.cgroups.freeze(id, frozen).tried(|| format!("failed to freeze or thaw container {id}"))?;
        container.state.send_modify(|state| state.frozen = frozen);
        Ok(())
    }

    /// Gives other limits.
    ///
    /// # Errors
    /// Limits that the kernel refuses.
    pub(crate) fn update_container(&self, id: &str, resources: &Resources) -> Result<()> {
        self.container(id)?;
        self.cgroups.update(id, resources).tried(|| format!("failed to update container {id}"))
    }

    /// Removes a container with all it has, killing it first. An unknown one is fine.
    ///
    /// # Errors
    /// What the kernel refused; the container is still there then.
    pub(crate) fn remove_container(&self, id: &str) -> Result<()> {
        let Ok(container) = self.container(id) else { return Ok(()) };
        let _turn = container.turn.blocking_lock();
        self.unmake_container(id).tried(|| format!("failed to remove container {id}"))?;
        container.log.close();
        container.state.send_modify(|state| state.removed = true);
        if self.containers().remove(id).is_some() {
            self.events.tell(id, EventKind::Removed, 0);
        }
        Ok(())
    }

    /// Every container.
    pub(crate) fn list_containers(&self) -> Vec<ContainerState> {
        self.containers().values().map(|container| container.told()).collect()
    }

    /// Notes that a container's process has ended: nothing of it runs on, all it wrote is kept.
    async fn ended(&self, container: &Container, code: i32) {
        let id = &container.spec.id;
        self.cgroups.kill(id);
        let mut progress = container.log.progress();
        // Cancel-safe: only looks.
        let _ = tokio::time::timeout(LAST_WORDS, progress.wait_for(|progress| progress.closed)).await;
        container.log.close();
        *container.stdin.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let oom_killed = self.cgroups.oom_kills(id) > 0;
        container.state.send_modify(|state| {
            state.phase = Phase::Exited;
            state.finished_ns = clock::now_ns();
            state.exit_code = code;
            state.oom_killed = oom_killed;
            state.frozen = false;
            state.pid = 0;
            state.pidfd = None;
        });
        self.events.tell(id, EventKind::Exited, code);
    }
}

/// What can be seen to be wrong before anything is made.
fn check(spec: &ContainerSpec) -> Result<()> {
    check_name("container", &spec.id)?;
    if spec.args.is_empty() {
        return Err(Error::invalid(format!("container {} has no command", spec.id)));
    }
    let nul = |text: &String| text.contains('\0');
    if spec.args.iter().chain(&spec.env).any(nul) {
        return Err(Error::invalid(format!("container {} has a NUL byte in its command or environment", spec.id)));
    }
    if let Some(mount) = spec.mounts.iter().find(|mount| !mount.container_path.starts_with('/')) {
        return Err(Error::invalid(format!("container {}: {} is not absolute", spec.id, mount.container_path)));
    }
    Ok(())
}

/// A name that is also a directory's.
///
/// # Errors
/// It is empty, too long, or has other letters.
pub(crate) fn check_name(of: &str, name: &str) -> Result<()> {
    let letters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if letters && !name.is_empty() && name.len() <= 128 && !name.starts_with('.') {
        return Ok(());
    }
    Err(Error::invalid(format!("{name:?} cannot be the name of a {of}")))
}

/// `SIGTERM`, `TERM` or `15`.
fn signal(name: &str) -> Option<Signal> {
    if let Ok(number) = name.parse::<i32>() {
        return Signal::try_from(number).ok();
    }
    let full = if name.starts_with("SIG") { name.to_owned() } else { format!("SIG{name}") };
    full.parse().ok()
}

/// Containers by id.
pub(crate) type Containers = BTreeMap<String, Arc<Container>>;

/// Where a container's files are.
pub(crate) fn directory(scratch: &Path, id: &str) -> PathBuf {
    scratch.join("containers").join(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_three_spellings() {
        assert_eq!(["SIGTERM", "TERM", "15"].map(signal), [Some(Signal::SIGTERM); 3]);
        assert_eq!(["SIGNOT", "0", "999", ""].map(signal), [None; 4]);
    }

    #[test]
    fn names_stay_below_their_directory() {
        assert!(check_name("container", "web-1_a.b").is_ok());
        for name in ["", ".", "..", "a/b", "a b", &"x".repeat(129)] {
            assert!(check_name("container", name).is_err(), "{name}");
        }
    }
}
