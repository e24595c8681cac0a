//! The file system of a workload: a mount namespace whose root is the container's own.
//!
//! Sources are taken hold of first, outside; then the root is changed, and what is mounted after that is looked up inside.
//! So a link in the image, or in a volume, leads nowhere else: `/proc -> /../../etc` is the container's own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;

use lambdalet_proto::agent::v1::{ContainerSpec, Mount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, fchdir, pivot_root};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{Failure, Plan};

/// Device nodes of every container, as in the OCI runtime specification.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Links in /dev, from the same document.
const LINKS: [(&str, &str); 5] = [
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];
/// What a container must not see, for it is the whole kernel's; the set that other runtimes mask.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// What a container may only read.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Size of a /dev/shm that is not shared.
const SHM: &str = "mode=1777,size=64m";
/// A directory of every root, over which nothing is mounted.
const EMPTY: &str = "/tmp";
const NONE: Option<&str> = None;

/// Enters the namespaces of a container that runs.
pub(super) fn join(process: &OwnedFd) -> io::Result<()> {
    setns(process, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWIPC)?;
    chdir("/")?;
    Ok(())
}

/// Leaves every file system for an empty one.
pub(super) fn leave() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("tmpfs"), EMPTY, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0"))?;
    enter(EMPTY)
}

/// Makes the namespaces of a new container, and its root this process' own.
pub(super) fn make(plan: &Plan, spec: &ContainerSpec) -> Result<(), Failure> {
    namespaces(spec).map_err(|error| Failure::at("make namespaces", error))?;
    let sources = Sources::open(plan, spec)?;
    enter(&plan.root).map_err(|error| Failure::at("enter the root file system", error))?;
    system(spec, &sources).map_err(|error| Failure::at("mount the system's directories", error))?;
    for (source, mount) in sources.volumes.iter().zip(&spec.mounts) {
        let path = &mount.container_path;
        place(source, mount).map_err(|error| Failure::at(&format!("mount a volume at {path}"), error))?;
    }
    confine(spec).map_err(|error| Failure::at("confine the file system", error))
}

fn namespaces(spec: &ContainerSpec) -> io::Result<()> {
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    if !spec.shared_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    unshare(flags)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    Ok(())
}

/// Mounts that hang nowhere yet.
struct Sources {
    devices: Vec<(&'static str, OwnedFd)>,
    volumes: Vec<OwnedFd>,
    shared_memory: Option<OwnedFd>,
}

impl Sources {
    fn open(plan: &Plan, spec: &ContainerSpec) -> Result<Self, Failure> {
        let device = |name: &'static str| {
            open_path(&format!("/dev/{name}")).and_then(|fd| detached(fd.as_fd())).map(|fd| (name, fd))
        };
        let devices = DEVICES.into_iter().map(device).collect::<io::Result<_>>();
        let devices = devices.map_err(|error| Failure::at("take the devices", error))?;
        let volume = |(source, mount): (&String, &Mount)| {
            let found =
                open_path(source).and_then(|volume| below(volume, &mount.sub_path)).and_then(|fd| detached(fd.as_fd()));
            let of = if mount.image.is_empty() { ("volume", &mount.volume) } else { ("image", &mount.image) };
            found.map_err(|error| Failure::at(&format!("find {:?} in {} {}", mount.sub_path, of.0, of.1), error))
        };
        let volumes = plan.sources.iter().zip(&spec.mounts).map(volume).collect::<Result<_, _>>()?;
        let shared_memory = spec.shared_ipc.then(|| open_path(&plan.shared_memory).and_then(|fd| detached(fd.as_fd())));
        let shared_memory =
            shared_memory.transpose().map_err(|error| Failure::at("take the Pod's shared memory", error))?;
        Ok(Self { devices, volumes, shared_memory })
    }
}

fn open_path(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// A path in a volume; no link leads out of it. Directories that are not there are made with the mode of the volume, as the
/// kubelet does.
fn below(volume: OwnedFd, sub_path: &str) -> io::Result<OwnedFd> {
    let open = |from: BorrowedFd<'_>, path: &Path| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        openat2(from, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    };
    let sub_path = Path::new(sub_path.trim_matches('/'));
    if sub_path.as_os_str().is_empty() {
        return Ok(volume);
    }
    match open(volume.as_fd(), sub_path) {
        Err(rustix::io::Errno::NOENT) => {}
        found => return Ok(found?),
    }
    let mode = Mode::from_raw_mode(fstat(&volume)?.st_mode & 0o7777);
    let mut at = volume;
    for part in sub_path.iter().map(Path::new) {
        at = match open(at.as_fd(), part) {
            Err(rustix::io::Errno::NOENT) => match mkdirat(&at, part, Mode::RWXU) {
                // Another container that starts has made it meanwhile.
                Err(rustix::io::Errno::EXIST) => open(at.as_fd(), part)?,
                made => {
                    made?;
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let made = openat2(&at, part, flags, Mode::empty(), ResolveFlags::BENEATH)?;
                    // Whatever the umask is.
                    fchmod(&made, mode)?;
                    made
                }
            },
            found => found?,
        };
    }
    Ok(at)
}

/// A copy of a mount (or of a part of it) that hangs nowhere.
fn detached(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(fd, "", flags)?)
}

/// Changes the root; the old one is gone then.
fn enter(root: &str) -> io::Result<()> {
    let old = open_path("/")?;
    chdir(root)?;
    // Both the same: the new root is put over the old, which is taken away from below it.
    pivot_root(".", ".")?;
    fchdir(&old)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}

/// /proc, /dev and /sys.
fn system(spec: &ContainerSpec, sources: &Sources) -> io::Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at("proc", "/proc", quiet, NONE)?;
    // Nodes that a container makes here do not open; those below are mounts of their own.
    mount_at("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755,size=64k"))?;
    for (name, device) in &sources.devices {
        let path = format!("/dev/{name}");
        File::create(&path)?;
        hang(device, &path)?;
    }
    mount_at(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("newinstance,ptmxmode=0666,mode=0620,gid=5"),
    )?;
    for (link, target) in LINKS {
        symlink(target, link)?;
    }
    match &sources.shared_memory {
        Some(shared) => {
            fs::create_dir("/dev/shm")?;
            hang(shared, "/dev/shm")?;
        }
        None => mount_at("tmpfs", "/dev/shm", quiet, Some(SHM))?,
    }
    // Not every kernel has it.
    let _ = mount_at("mqueue", "/dev/mqueue", quiet, NONE);
    let sys = if spec.privileged { quiet } else { quiet | MsFlags::MS_RDONLY };
    mount_at("sysfs", "/sys", sys, NONE)?;
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), sys, NONE)?;
    Ok(())
}

fn mount_at(kind: &str, path: &str, flags: MsFlags, options: Option<&str>) -> io::Result<()> {
    fs::create_dir_all(path)?;
    mount(Some(kind), path, Some(kind), flags, options)?;
    Ok(())
}

fn hang(source: &OwnedFd, path: &str) -> io::Result<()> {
    Ok(move_mount(
        source,
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )?)
}

/// Hangs a volume at a path, which is made if missing.
fn place(source: &OwnedFd, mounted: &Mount) -> io::Result<()> {
    let path = mounted.container_path.as_str();
    if FileType::from_raw_mode(fstat(source)?.st_mode) == FileType::Directory {
        fs::create_dir_all(path)?;
    } else if !Path::new(path).exists() {
        if let Some(parent) = Path::new(path).parent() {
            fs::create_dir_all(parent)?;
        }
        File::create(path)?;
    }
    hang(source, path)?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NODEV;
    if mounted.read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    if !mounted.image.is_empty() {
        flags |= MsFlags::MS_NOEXEC;
    }
    mount(NONE, path, NONE, flags, NONE)?;
    Ok(())
}

/// Hides what is the kernel's, and closes the root if the spec says so.
fn confine(spec: &ContainerSpec) -> io::Result<()> {
    if !spec.privileged && !spec.unmasked_proc {
        MASKED.iter().filter(|path| Path::new(path).exists()).try_for_each(|path| mask(Path::new(path)))?;
        for path in READ_ONLY.iter().filter(|path| Path::new(path).exists()) {
            mount(Some(*path), *path, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
            mount(NONE, *path, NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, NONE)?;
        }
    }
    if spec.read_only_rootfs {
        mount(NONE, "/", NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NODEV, NONE)?;
    }
    Ok(())
}

fn mask(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0"))?;
    } else {
        mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE)?;
    }
    Ok(())
}
