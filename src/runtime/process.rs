//! The process of an exec, as the host sees it: its end is told by the kernel, and it can be ended.
//!
//! Neither Docker nor CRI has a verb to end an exec. What is known is the process' number on the host; a pidfd opened from
//! that, and checked against the container's cgroup, stays the same process whatever becomes of the number.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};

/// How long a process may take to end by itself once its client is gone, and the pause between looks. A look goes through
/// all processes of the host, so it is the clock that counts and not the looks.
const HANG_UP_PATIENCE: Duration = Duration::from_millis(400);
const HANG_UP_PAUSE: Duration = Duration::from_millis(20);
/// After that it is killed; one that forks meanwhile is met by the next round.
const KILL_ROUNDS: u32 = 20;
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// A process in a container, running when it was looked at.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    container: String,
    handle: AsyncFd<OwnedFd>,
}

impl Process {
    /// The process `pid` of the container; `None` if it is gone, or not to be seen from here.
    pub(super) fn open(pid: i32, container: &str) -> Option<Self> {
        let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Deprecated for types whose descriptor may change under it, which that of an OwnedFd cannot.
        #[allow(deprecated)]
        let handle = AsyncFd::with_interest(handle, Interest::READABLE).ok()?;
        is_inside(pid, container).then(|| Self { pid, container: container.to_owned(), handle })
    }

    /// Returns once it has ended. Cancel-safe.
    pub(super) async fn ended(&self) {
        // A pidfd becomes readable at the end, and only then; it cannot fail before.
        let _ = self.handle.readable().await;
    }

    /// Sends this process a signal, and nothing if it has ended.
    pub(super) fn send(&self, signal: Signal) {
        if let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) {
            let _ = pidfd_send_signal(self.handle.get_ref(), signal);
        }
    }

    /// Ends the process and what it has started, as the kernel does when a terminal goes away: SIGHUP, and SIGCONT for
    /// what is stopped; after 0.4 seconds SIGKILL for what ignored it.
    ///
    /// What it has started is told by the session: an exec begins one of its own, so a process is spared only if it
    /// left that on purpose, as a daemon does (`setsid`).
    pub(super) async fn hang_up(&self) {
        self.signal(&[Signal::SIGHUP, Signal::SIGCONT]).await;
        let until = Instant::now() + HANG_UP_PATIENCE;
        while Instant::now() < until {
            sleep(HANG_UP_PAUSE).await;
            if self.signal(&[]).await == 0 {
                return;
            }
        }
        for _ in 0..KILL_ROUNDS {
            if self.signal(&[Signal::SIGKILL]).await == 0 {
                return;
            }
            sleep(KILL_PAUSE).await;
        }
        tracing::warn!(
            pid = self.pid,
            container = self.container,
            "the process of an exec that was given up still runs"
        );
    }

    /// Sends the signals to each process of the session; how many there are.
    async fn signal(&self, signals: &'static [Signal]) -> usize {
        let (session, container) = (self.pid, self.container.clone());
        let work = move || {
            let members = members(session, &container);
            for pid in &members {
                for signal in signals {
                    // It may have ended since.
                    let _ = kill(unistd::Pid::from_raw(*pid), *signal);
                }
            }
            members.len()
        };
        tokio::task::spawn_blocking(work).await.unwrap_or(0)
    }
}

/// The living processes of the container that are `leader` or of the session it leads.
fn members(leader: i32, container: &str) -> Vec<i32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let belongs = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let session = living_session(&stat)?;
        Some((session == leader || *pid == leader) && is_inside(*pid, container))
    };
    numbers.filter(|pid| belongs(pid).unwrap_or(false)).collect()
}

/// The session of a process by its `/proc/PID/stat`; `None` if it has ended (a zombie).
fn living_session(stat: &str) -> Option<i32> {
    // The name before it may hold anything, brackets too.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(2)?.parse().ok()
}

fn is_inside(pid: i32, container: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|cgroups| cgroups.contains(container))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_is_read_behind_whatever_the_name_is() {
        assert_eq!(living_session("7 (a) b) R 1 2 3 4 5"), Some(3));
        assert_eq!(living_session("7 (sh) Z 1 2 3 4 5"), None);
        assert_eq!(living_session("7 (sh"), None);
    }

    #[tokio::test]
    async fn only_a_process_of_that_container_is_taken() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(Process::open(own, "no-such-container").is_none());
        assert!(Process::open(0, "").is_none());
        assert!(Process::open(own, "").is_some());
    }
}
