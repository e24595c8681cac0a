//! The process of a VMM: its end is told by the kernel, and it stays the same process whatever becomes of its number.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitid,
    waitpid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::cgroup::{Limits, VmCgroup};
use super::directory::Checkpoint;
use super::{MachineError, MachineSpec, Result, VmExit, VmId};
use crate::telemetry::chain;

/// How long a killed VMM may take to be gone: it may be writing to a slow disk, and has its guest's memory to give back.
pub(super) const END_PATIENCE: Duration = Duration::from_secs(20);

/// A process that ran when it was looked at.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    handle: AsyncFd<OwnedFd>,
    /// How it ended; the kernel tells that only once.
    exit: Mutex<Option<VmExit>>,
}

/// A process that is still being started: dropped before it [has](Self::done), the process is killed, for nobody would wait
/// for it any more.
pub(super) struct Starting<'a>(Option<&'a Process>);

impl Starting<'_> {
    pub(super) fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.0 {
            process.kill();
        }
    }
}

// === impl Process ===

impl Process {
    /// The process of that number.
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
        let handle = pidfd_open(number, PidfdFlags::empty())?;
        // Deprecated for types whose descriptor may change under it, which that of an OwnedFd cannot.
        #[allow(deprecated)]
        let handle = AsyncFd::with_interest(handle, Interest::READABLE)?;
        Ok(Self { pid, handle, exit: Mutex::new(None) })
    }

    /// A child that was just started. One that cannot be watched is ended: nobody would know of it.
    pub(super) fn of_child(pid: i32) -> io::Result<Self> {
        Self::open(pid).inspect_err(|_| {
            if let Some(number) = Pid::from_raw(pid) {
                let _ = kill_process(number, Signal::KILL);
                let _ = waitpid(Some(number), WaitOptions::empty());
            }
        })
    }

    /// The process that a checkpoint tells of, if that still runs. What else is in the machine's cgroup is ended with it:
    /// a VMM whose node ended before it was written down, which nobody could reach any more.
    pub(super) async fn take_over(checkpoint: &Checkpoint, cgroup: &VmCgroup) -> io::Result<Option<Self>> {
        let adopted = Self::adopt(checkpoint)?;
        if adopted.is_none() {
            cgroup.end().await?;
        }
        Ok(adopted)
    }

    /// # Errors
    /// Whether it runs is not to be found out.
    fn adopt(checkpoint: &Checkpoint) -> io::Result<Option<Self>> {
        if boot_id()? != checkpoint.boot_id {
            return Ok(None);
        }
        // Opened before it is looked at: what is looked at is then what was opened, or started later.
        let process = match Self::open(checkpoint.pid) {
            Err(error) if is_absent(&error) => return Ok(None),
            process => process?,
        };
        Ok(Some(process).filter(|_| start_time(checkpoint.pid) == Some(checkpoint.start_time)))
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Has it run in the cgroup of `spec`, which is made, and no more in `from`, which is removed. That it is to be looked for
    /// there is written down first: what is left of `from` if this process ends meanwhile is empty.
    pub(super) async fn move_to(&self, from: &VmCgroup, spec: &MachineSpec) -> Result<VmCgroup> {
        let step = |action| MachineError::start(action, spec.dir.id());
        let unknown = || io::Error::other("there is no checkpoint");
        let checkpoint = spec.dir.read_checkpoint().ok_or_else(unknown).map_err(step("leave the cgroup"))?;
        if checkpoint.cgroup_parent == spec.cgroup_parent {
            return Ok(from.clone());
        }
        let to = VmCgroup::of_host(&spec.cgroup_parent, spec.dir.id());
        spec.dir.write_checkpoint(&Checkpoint { cgroup_parent: spec.cgroup_parent.clone(), ..checkpoint })?;
        let (made, left, limits, pid) = (to.clone(), from.clone(), Limits::of(spec), self.pid);
        let join = move || {
            made.make(&limits)?;
            made.join(pid)?;
            // Who works for it; one that has just ended is in neither.
            let others = left.members().into_iter().map(|other| made.join(other));
            others.filter(|joined| !joined.as_ref().is_err_and(is_absent)).collect::<io::Result<()>>()
        };
        // The kernel may take its time.
        let joined = tokio::task::spawn_blocking(join).await;
        joined.map_err(io::Error::other).and_then(|joined| joined).map_err(step("enter the cgroup of its Pod"))?;
        if let Err(error) = from.remove().await {
            // Empty, it does no harm, and goes with the others when the node ends.
            tracing::warn!(machine = %spec.dir.id(), error = chain(&error), "failed to remove the cgroup it waited in");
        }
        Ok(to)
    }

    /// Until more is done to it than to start it.
    pub(super) fn starting(&self) -> Starting<'_> {
        Starting(Some(self))
    }

    /// Sends SIGKILL, if it still runs.
    pub(super) fn kill(&self) {
        // It may have ended since.
        let _ = pidfd_send_signal(self.handle.get_ref(), Signal::KILL);
    }

    /// Kills it, waits for its end, and removes the cgroup of its machine with what is left in it.
    ///
    /// # Errors
    /// [`MachineError::Late`] if it has not ended after `patience`: not even this signal reaches a process that waits for a
    /// disk. [`MachineError::Start`] if its cgroup is still in use. It can be tried again.
    pub(super) async fn end(&self, cgroup: &VmCgroup, id: &VmId, patience: Duration) -> Result<()> {
        self.kill();
        let late = |_| MachineError::Late {
            what: "the end of the killed VMM".to_owned(),
            id: id.to_string(),
            seconds: patience.as_secs(),
        };
        timeout(patience, self.ended()).await.map_err(late)?;
        // With whoever worked for it.
        cgroup.end().await.map_err(MachineError::start("remove the cgroup", id))
    }

    /// Returns once it has ended. Cancel-safe: it only waits, and what the kernel tells once is kept.
    pub(super) async fn ended(&self) -> VmExit {
        loop {
            let mut guard = match self.handle.readable().await {
                Ok(guard) => guard,
                // Only at the end of the runtime itself.
                Err(_) => return VmExit::Unknown,
            };
            if let Some(exit) = self.try_ended() {
                return exit;
            }
            guard.clear_ready();
        }
    }

    /// How it ended, if it has.
    pub(super) fn try_ended(&self) -> Option<VmExit> {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if exit.is_none() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            *exit = match waitid(WaitId::PidFd(self.handle.get_ref().as_fd()), options) {
                Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => VmExit::Code(code),
                    (None, Some(signal)) => VmExit::Signal(signal),
                    (None, None) => VmExit::Unknown,
                }),
                Ok(None) => None,
                // Not our child: whether it has ended is all there is to know.
                Err(_) => self.is_gone().then_some(VmExit::Unknown),
            };
        }
        *exit
    }

    fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.handle.get_ref().as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..))
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// When a living process was started, in clock ticks after the host's boot (field 22 of proc_pid_stat(5)).
pub(super) fn start_time(pid: i32) -> Option<u64> {
    started(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn started(stat: &str) -> Option<u64> {
    // The name before it may hold anything, brackets too.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// What tells this boot of the host from any other.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::runtime::microvm::machine::VmDirs;

    fn checkpoint(pid: i32) -> Checkpoint {
        Checkpoint {
            manager: "qemu".to_owned(),
            pid,
            start_time: start_time(pid).unwrap(),
            boot_id: boot_id().unwrap(),
            image_slots: 0,
            cgroup_parent: String::new(),
        }
    }

    fn sleeper() -> i32 {
        Command::new("sleep").arg("1000").spawn().unwrap().id().try_into().unwrap()
    }

    #[tokio::test]
    async fn a_killed_child_is_told_with_its_signal_however_often_it_is_asked() {
        let process = Process::open(sleeper()).unwrap();
        assert_eq!(process.try_ended(), None);
        process.kill();
        let (first, second) = tokio::join!(process.ended(), process.ended());
        assert_eq!((first, second), (VmExit::Signal(9), VmExit::Signal(9)));
        assert_eq!(process.ended().await, VmExit::Signal(9));
        assert_eq!(start_time(process.pid()), None, "nothing is left in the process table");
    }

    #[tokio::test]
    async fn a_number_used_again_is_not_adopted() {
        let pid = sleeper();
        let known = checkpoint(pid);
        let process = Process::adopt(&known).unwrap().unwrap();
        for other in [
            Checkpoint { start_time: known.start_time + 1, ..known.clone() },
            Checkpoint { boot_id: "another boot".to_owned(), ..known.clone() },
            Checkpoint { pid: i32::MAX, ..known.clone() },
            Checkpoint { pid: 0, start_time: 0, ..known.clone() },
        ] {
            assert!(Process::adopt(&other).unwrap().is_none(), "{other:?}");
        }
        process.kill();
        process.ended().await;
        assert!(Process::adopt(&known).unwrap().is_none());
    }

    #[tokio::test]
    async fn of_a_process_that_is_not_our_child_only_the_end_is_known() {
        let script = "sleep 1000 >/dev/null 2>&1 & echo $!";
        let output = Command::new("sh").args(["-c", script]).output().unwrap();
        let pid = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        let process = Process::adopt(&checkpoint(pid)).unwrap().unwrap();
        assert_eq!(process.try_ended(), None);
        process.kill();
        assert_eq!(process.ended().await, VmExit::Unknown);
    }

    #[tokio::test]
    async fn one_that_no_signal_ends_is_not_waited_for_for_ever() {
        // A frozen process of cgroup v1 does not even take SIGKILL, like one that waits for a dead disk.
        let name = format!("lambdalet-test-{}", VmId::random());
        let freezer = Path::new("/sys/fs/cgroup/freezer");
        if !freezer.join("cgroup.procs").exists() || !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root and the freezer of cgroup v1");
            return;
        }
        let id = VmId::new("one").unwrap();
        let cgroup = VmCgroup::of_host(&name, &id);
        cgroup.make(&Limits::default()).unwrap();
        let process = Process::open(sleeper()).unwrap();
        cgroup.join(process.pid()).unwrap();
        let state = freezer.join(&name).join("vmm-one/freezer.state");
        fs::write(&state, "FROZEN").unwrap();
        let late = process.end(&cgroup, &id, Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(late, MachineError::Late { .. }), "{late:?}");
        assert!(state.exists(), "its cgroup stays as long as it does");
        fs::write(&state, "THAWED").unwrap();
        process.end(&cgroup, &id, END_PATIENCE).await.unwrap();
        process.end(&cgroup, &id, END_PATIENCE).await.unwrap();
        assert!(!state.exists());
        remove_cgroup(&name);
    }

    #[tokio::test]
    async fn one_that_was_not_written_down_in_time_is_ended_by_its_cgroup() {
        let name = format!("lambdalet-test-{}", VmId::random());
        if !Path::new("/sys/fs/cgroup/pids/cgroup.procs").exists() || !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root and cgroup v1");
            return;
        }
        let cgroup = VmCgroup::of_host(&name, &VmId::new("one").unwrap());
        cgroup.make(&Limits::default()).unwrap();
        let process = Process::open(sleeper()).unwrap();
        cgroup.join(process.pid()).unwrap();
        let before = Checkpoint { pid: 0, start_time: 0, ..checkpoint(process.pid()) };
        let reaped = process.ended();
        let (taken, exit) = tokio::join!(Process::take_over(&before, &cgroup), reaped);
        assert!(taken.unwrap().is_none());
        assert_eq!(exit, VmExit::Signal(9));
        assert!(!Path::new("/sys/fs/cgroup/pids").join(&name).join("vmm-one").exists());
        remove_cgroup(&name);
    }

    #[tokio::test]
    async fn one_that_is_moved_is_found_and_ended_where_it_is() {
        let name = format!("lambdalet-test-{}", VmId::random());
        let pids = Path::new("/sys/fs/cgroup/pids");
        if !pids.join("cgroup.procs").exists() || !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root and cgroup v1");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let spec = spec_in(base.path(), &format!("{name}/pod"));
        spec.dir.create(0, 0).unwrap();
        let (id, process) = (spec.dir.id(), Process::open(sleeper()).unwrap());
        let from = VmCgroup::of_host(&name, id);
        from.make(&Limits::of(&spec)).unwrap();
        from.join(process.pid()).unwrap();
        spec.dir.write_checkpoint(&Checkpoint { cgroup_parent: name.clone(), ..checkpoint(process.pid()) }).unwrap();
        let (before, after) = (pids.join(&name).join("vmm-one"), pids.join(&name).join("pod/vmm-one"));
        let to = process.move_to(&from, &spec).await.unwrap();
        assert_eq!(fs::read_to_string(after.join("cgroup.procs")).unwrap().trim(), process.pid().to_string());
        assert_eq!(fs::read_to_string(after.join("pids.max")).unwrap().trim(), "256");
        assert!(!before.exists());
        let known = spec.dir.read_checkpoint().unwrap();
        assert_eq!(known.cgroup_parent, spec.cgroup_parent);
        assert!(process.move_to(&to, &spec).await.is_ok() && after.exists(), "it is there already");
        process.end(&to, id, END_PATIENCE).await.unwrap();
        assert!(!after.exists());
        remove_cgroup(&name);
    }

    /// An empty one, from whichever trees have it.
    fn remove_cgroup(name: &str) {
        for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(tree.path().join(name));
        }
    }

    fn spec_in(base: &Path, cgroup_parent: &str) -> MachineSpec {
        let dir = VmDirs::new(base, "default").unwrap().of(&VmId::new("one").unwrap());
        MachineSpec { dir, cgroup_parent: cgroup_parent.to_owned(), ..crate::runtime::microvm::machine::tests::spec() }
    }

    #[test]
    fn the_start_is_read_behind_whatever_the_name_is() {
        let fields = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(started(&format!("7 (a) b) S {fields}")), Some(4711));
        assert_eq!(started(&format!("7 (a) Z {fields}")), None);
        assert_eq!(started("7 (a"), None);
    }
}
