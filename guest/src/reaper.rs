//! Children: every process that ends without a parent becomes one of process 1.
//!
//! One lock covers "start a process and note its id" and "collect the dead", so no end is missed, and no signal goes to an
//! id that has been given to somebody else.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// In which PID namespace a process is started.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PidNamespace<'a> {
    /// A new one, whose process 1 it is.
    New,
    /// That of the process behind this pidfd.
    Of(BorrowedFd<'a>),
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its id in the guest.
    pub(crate) pid: i32,
    /// Refers to it and no other.
    pub(crate) pidfd: std::os::fd::OwnedFd,
    /// Its exit code (128 + signal for a killed process) once it has ended.
    pub(crate) exit: oneshot::Receiver<i32>,
}

/// Collects the dead.
#[derive(Debug, Default)]
pub(crate) struct Reaper(Mutex<HashMap<i32, oneshot::Sender<i32>>>);

impl Reaper {
    /// Starts a process in a PID namespace. Its threads being what they are, the namespace is taken by a thread that ends
    /// with it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn spawn(&self, command: &mut Command, namespace: PidNamespace<'_>) -> io::Result<Child> {
        let mut waiting = self.lock();
        let spawn = || {
            match namespace {
                PidNamespace::New => unshare(CloneFlags::CLONE_NEWPID)?,
                PidNamespace::Of(pidfd) => setns(pidfd, CloneFlags::CLONE_NEWPID)?,
            }
            command.spawn()
        };
        let child = thread::scope(|scope| scope.spawn(spawn).join());
        let child = child.map_err(|_| io::Error::other("the starting thread panicked"))??;
        let pid = child.id().cast_signed();
        let raw = rustix::process::Pid::from_raw(pid).ok_or(Errno::ESRCH)?;
        // Not reaped yet, for that needs the lock: the id is still its own.
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        let (told, exit) = oneshot::channel();
        waiting.insert(pid, told);
        Ok(Child { pid, pidfd, exit })
    }

    /// Signals a process that was started here, or its process group. Nothing happens once it has ended.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn signal(&self, pid: i32, group: bool, signal: Signal) -> io::Result<()> {
        let waiting = self.lock();
        if !waiting.contains_key(&pid) {
            return Ok(());
        }
        match kill(Pid::from_raw(if group { -pid } else { pid }), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Collects for ever. It must begin before the first process is started.
    ///
    /// # Errors
    /// The signal cannot be listened for.
    pub(crate) async fn run(&self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.collect();
            ended.recv().await;
        }
    }

    fn collect(&self) {
        let mut waiting = self.lock();
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) | Ok(_) => continue,
                Err(_) => return,
            };
            if let Some(told) = waiting.remove(&pid.as_raw()) {
                // Nobody may be waiting any more.
                let _ = told.send(code);
            }
        }
    }

    /// Takes a test's own child for one that was started here.
    #[cfg(test)]
    pub(crate) fn adopt(&self, pid: i32) {
        self.lock().insert(pid, oneshot::channel().0);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<i32>>> {
        // A map of ids is never half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
