//! Where a VMM runs: as a user of its own, in namespaces of its own, with nothing of the host but what it needs.
//!
//! A thread enters new mount, process, IPC, UTS and (empty) network namespaces, builds a root of its own out of bind
//! mounts, forbids itself and what it starts any new privilege, and starts the VMM; then it ends. So no code runs
//! between fork and exec, and this process itself stays as it was. What the VMM may use of the host's network, a tap
//! device, it is handed open as its standard input.
//!
//! Once the VMM has loaded what it needs, [`strip`] takes the host's libraries away again: then its own directory and
//! a few devices are all it could open.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::OFlags;

use super::cgroup::{VmCgroup, joining};

/// No device, no set-user-ID program and nothing to execute.
const HARMLESS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
/// Descriptors a VMM may have open.
const MOST_FILES: u64 = 1024;
/// The shell that limits itself before it becomes the VMM; it has to be in the jail. Nobody else can: limits are those
/// of a process, and to change another user's takes a capability (CAP_SYS_RESOURCE) that a container's root lacks.
pub(super) const SHELL: &str = "/bin/sh";
/// Bytes in a unit of the shell's `ulimit -f`.
const FILE_UNIT: u64 = 512;

/// The user that VMMs run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmmUser {
    /// Its number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
}

impl Default for VmmUser {
    /// 65520, which neither Debian nor systemd gives to anybody: a user that owns nothing else.
    fn default() -> Self {
        Self { uid: 65520, gid: 65520 }
    }
}

/// A piece of the host that shows up in the jail.
#[derive(Clone, Debug)]
pub(super) struct Bind {
    pub(super) what: Source,
    /// Where, from the jail's root.
    pub(super) at: PathBuf,
    pub(super) kind: BindKind,
}

/// By name, or a file that was opened by that name: no other will do.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Path(PathBuf),
    File(PathBuf, Arc<File>),
}

/// What may be done with it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BindKind {
    /// Programs and libraries, to be read and executed until [`strip`]; left out if the host has none.
    Program,
    /// To be read.
    ReadOnly,
    /// To be read and written.
    Writable,
    /// A device, which is the VMM's own there; left out if the host has none.
    Device,
}

/// A VMM to be started.
#[derive(Debug)]
pub(super) struct Jail {
    /// An empty directory of root's, to build the jail's root on.
    pub(super) root: PathBuf,
    pub(super) binds: Vec<Bind>,
    pub(super) user: VmmUser,
    /// The host's CPUs it may run on; `None`: all.
    pub(super) cpus: Option<Vec<u32>>,
    /// The largest file it may write, in bytes.
    pub(super) largest_file: u64,
    /// From the jail's root, as is the directory it starts in.
    pub(super) program: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Its standard input; `None`: nothing.
    pub(super) input: Option<Arc<OwnedFd>>,
    /// Where its standard output and errors go.
    pub(super) console: File,
    /// It begins there (see [`VmCgroup::enter`]).
    pub(super) cgroup: Option<VmCgroup>,
}

/// A step that failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) step: String,
    pub(super) source: io::Error,
}

fn failed<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Failed {
    let step = step.into();
    move |error| Failed { step, source: error.into() }
}

// === impl Jail ===

impl Jail {
    /// Starts the VMM; its process on the host. If the caller stops waiting, the VMM is killed.
    pub(super) async fn start(self) -> Result<i32, Failed> {
        on_thread(move || self.start_here(), kill).await
    }

    /// On a thread that ends with it.
    fn start_here(self) -> Result<i32, Failed> {
        let apart = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET;
        // While the host's cgroups are to be seen.
        let list = self.cgroup.as_ref().map_or(Ok(None), VmCgroup::enter).map_err(failed("enter the cgroup"))?;
        unshare(apart).map_err(failed("make namespaces"))?;
        self.build().map_err(|(step, source)| Failed { step, source })?;
        nix::sys::prctl::set_no_new_privs().map_err(failed("forbid new privileges"))?;
        if let Some(cpus) = &self.cpus {
            pin(cpus).map_err(failed(format!("pin to CPUs {cpus:?}")))?;
        }
        fs::metadata(&self.program)
            .and_then(|_| self.spawn(list))
            .map_err(failed(format!("run {}", self.program.display())))
    }

    /// With the list of its cgroup's processes it joins that by itself.
    fn spawn(&self, list: Option<File>) -> io::Result<i32> {
        let input = match &self.input {
            Some(device) => Stdio::from(device.try_clone()?),
            None => Stdio::from(File::open("/dev/null")?),
        };
        let largest = self.largest_file.div_ceil(FILE_UNIT);
        let (join, output) = joining(list, Stdio::from(self.console.try_clone()?));
        let limited =
            format!("{join} ulimit -c 0 && ulimit -n {MOST_FILES} && ulimit -f {largest} && exec \"$0\" \"$@\"");
        let child = Command::new(SHELL)
            .args(["-c", &limited])
            .arg(&self.program)
            .args(&self.arguments)
            .env_clear()
            .current_dir(&self.directory)
            .stdin(input)
            .stdout(output)
            .stderr(self.console.try_clone()?)
            .gid(self.user.gid)
            .uid(self.user.uid)
            .process_group(0)
            .spawn()?;
        // Whoever waits for it does so by its pidfd.
        i32::try_from(child.id()).map_err(io::Error::other)
    }

    /// Makes the root and enters it.
    fn build(&self) -> Result<(), (String, io::Error)> {
        let at = |step: &str, path: &Path| {
            let step = format!("{step} {}", path.display());
            move |errno: nix::errno::Errno| (step, io::Error::from(errno))
        };
        let none = None::<&str>;
        let root = self.root.as_path();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(at("part from", Path::new("/")))?;
        let options = Some("size=64k,nr_inodes=256,mode=755");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("jail"), root, Some("tmpfs"), flags, options).map_err(at("mount a root on", root))?;
        for bind in &self.binds {
            bind.mount(root, self.user).map_err(|error| (format!("show {} to the VMM", bind.at.display()), error))?;
        }
        let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
        mount(none, root, none, sealed, none).map_err(at("seal", root))?;
        nix::unistd::chdir(root).map_err(at("enter", root))?;
        // Both names may be one: the old root then lies on top of the new one, and is taken off again.
        nix::unistd::pivot_root(".", ".").map_err(at("make a root of", root))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(at("leave what was above", root))?;
        nix::unistd::chdir("/").map_err(at("enter", Path::new("/")))
    }
}

impl Bind {
    fn mount(&self, root: &Path, user: VmmUser) -> io::Result<()> {
        let found;
        let source = match &self.what {
            Source::Path(path) => path.clone(),
            Source::File(path, file) => {
                found = find_again(path, file)?;
                PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()))
            }
        };
        let seen = match fs::metadata(&source) {
            Ok(seen) => seen,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.kind.may_be_missing() => return Ok(()),
            Err(error) => return Err(error),
        };
        let target = root.join(self.at.strip_prefix("/").unwrap_or(&self.at));
        let mut directories = DirBuilder::new();
        directories.recursive(true).mode(0o755);
        if seen.is_dir() {
            directories.create(&target)?;
        } else {
            directories.create(target.parent().unwrap_or(root))?;
        }
        if self.kind == BindKind::Device && seen.file_type().is_char_device() {
            mknod(&target, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, seen.rdev())?;
            return std::os::unix::fs::chown(&target, Some(user.uid), Some(user.gid));
        }
        if seen.is_file() {
            // Never open: a child that is started meanwhile would keep it so for a moment, and the root could not be sealed.
            mknod(&target, SFlag::S_IFREG, Mode::S_IRUSR | Mode::S_IRGRP | Mode::S_IROTH, 0)?;
        }
        let none = None::<&str>;
        mount(Some(&source), &target, none, MsFlags::MS_BIND, none)?;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | self.kind.flags();
        Ok(mount(none, &target, none, flags, none)?)
    }
}

/// The file by that name, through the mounts of the namespace we are in now: those it was opened through are of another.
fn find_again(path: &Path, file: &File) -> io::Result<File> {
    let found = File::from(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty())?);
    let (there, wanted) = (found.metadata()?, file.metadata()?);
    if (there.dev(), there.ino()) == (wanted.dev(), wanted.ino()) {
        return Ok(found);
    }
    Err(io::Error::other("another file has taken its place"))
}

impl BindKind {
    fn may_be_missing(self) -> bool {
        matches!(self, Self::Program | Self::Device)
    }

    fn flags(self) -> MsFlags {
        match self {
            Self::Program => MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Self::ReadOnly => MsFlags::MS_RDONLY | HARMLESS,
            Self::Writable | Self::Device => HARMLESS,
        }
    }
}

/// Takes these places of a VMM's jail away from it. What it has mapped or opened it keeps.
pub(super) async fn strip(pid: i32, places: Vec<PathBuf>) -> Result<(), Failed> {
    let work = move || {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt")).map_err(failed("find the VMM's mounts"))?;
        // A thread may only enter if it shares its idea of a root with no other.
        unshare(CloneFlags::CLONE_FS).map_err(failed("part from the other threads"))?;
        setns(&namespace, CloneFlags::CLONE_NEWNS).map_err(failed("enter the VMM's mounts"))?;
        // The jail's root, from where we are now.
        for place in places {
            match umount2(&place, MntFlags::MNT_DETACH) {
                // Not on this host, or taken away before.
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(errno) => return Err(failed(format!("take {} from the VMM", place.display()))(errno)),
            }
        }
        Ok(())
    };
    on_thread(work, drop).await
}

/// Kills a child, and waits for its end, which is there at once.
fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    if nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok() {
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

fn pin(cpus: &[u32]) -> nix::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(usize::try_from(*cpu).unwrap_or(usize::MAX))?;
    }
    // Of this thread, and so of what it starts.
    sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
}

/// Runs the work on a thread that ends with it, so that whatever it has entered is left for good. What it made for a
/// caller that has gone is undone.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failed> + Send + 'static,
    undo: impl FnOnce(T) + Send + 'static,
) -> Result<T, Failed> {
    let unclaimed = |done: Result<T, Failed>| drop(done.map(undo));
    let answered = crate::thread::begin("jail", work, unclaimed).map_err(failed("start a thread"))?;
    let ended = || Failed { step: "finish the jail".to_owned(), source: io::Error::other("its thread ended early") };
    answered.await.map_err(|_| ended())?
}

#[cfg(test)]
mod tests;
