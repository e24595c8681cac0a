//! Firecracker's jailer (docs/jailer.md): its arguments, and the directory that a jailed Firecracker sees.
//!
//! The jail is prepared before the jailer enters it: a kernel, an initramfs and disks are put there as second names of
//! the same files, so nothing is copied; where that is not possible, from another file system, they are copied.
//!
//! Each start has a root of its own. The jailer makes devices and its pid file only where nothing is, as Firecracker does its
//! sockets; and before it enters the root the jailer writes there as root, by the program's name.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;

use super::API_SOCKET;
use crate::file;
use crate::runtime::microvm::machine::directory::{LOG_FIFO, METRICS_FIFO};
use crate::runtime::microvm::machine::jail::VmmUser;
use crate::runtime::microvm::machine::{Asset, MachineError, Result, VmDir};

/// The jailer's limit on identifiers.
const LONGEST_ID: usize = 64;

/// Where the jailer makes the root of this machine: it names it after the program and the machine.
pub(super) fn root(dir: &VmDir, program: &Path) -> PathBuf {
    let program = program.file_name().unwrap_or_default();
    dir.path().join("jail").join(program).join(dir.id().as_str()).join("root")
}

/// Where another process of root's finds what is open here.
pub(super) fn path_of(open: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd())
}

/// With the largest file that the VMM may make, in bytes, and the network namespace that it enters.
///
/// # Errors
/// [`MachineError::Invalid`] if the jailer would refuse the machine's id.
pub(super) fn arguments(
    dir: &VmDir,
    program: &Path,
    user: VmmUser,
    largest_file: u64,
    namespace: Option<String>,
) -> Result<Vec<String>> {
    let id = dir.id().as_str();
    if id.len() > LONGEST_ID || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        let reason = "Firecracker's jailer takes letters, digits and '-', 64 at the most".to_owned();
        return Err(MachineError::Invalid { what: format!("machine id {id:?}"), reason });
    }
    let base = dir.path().join("jail");
    let text = |path: &Path| path.display().to_string();
    let pairs = [
        ("--id", id.to_owned()),
        ("--exec-file", text(program)),
        ("--uid", user.uid.to_string()),
        ("--gid", user.gid.to_string()),
        ("--chroot-base-dir", text(&base)),
        ("--resource-limit", "no-file=1024".to_owned()),
        ("--resource-limit", format!("fsize={largest_file}")),
    ];
    let mut arguments: Vec<String> = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
    arguments.extend(namespace.into_iter().flat_map(|namespace| ["--netns".to_owned(), namespace]));
    arguments.extend(["--new-pid-ns", "--", "--api-sock", API_SOCKET].map(str::to_owned));
    Ok(arguments)
}

/// Makes the jail's root, empty and for the VMM's user, in the place of what is there. No link that a VMM before has left is
/// followed.
pub(super) fn make_root(root: &Path, user: VmmUser) -> Result<()> {
    file::remove_tree(root).map_err(MachineError::file("remove", root))?;
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(root).map_err(MachineError::file("make", root))?;
    std::os::unix::fs::chown(root, Some(user.uid), Some(user.gid)).map_err(MachineError::file("give away", root))
}

/// Shows an open file in the jail under this name, in the place of what is there.
pub(super) fn show(asset: &Asset, root: &Path, name: &str) -> Result<()> {
    show_file(asset.file(), root, name).map_err(MachineError::file("show to the VMM", asset.path()))
}

/// Makes Firecracker's pipes, and shows them in the jail: there and in the machine's directory, which is not the VMM's, they
/// are the same.
pub(super) fn make_fifos(dir: &VmDir, root: &Path, user: VmmUser) -> Result<()> {
    for (path, name) in [(dir.log_fifo(), LOG_FIFO), (dir.metrics_fifo(), METRICS_FIFO)] {
        let make = || -> io::Result<()> {
            let shown = root.join(name);
            file::remove(&path)?;
            file::remove(&shown)?;
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid))?;
            fs::hard_link(&path, &shown)
        };
        make().map_err(MachineError::file("make", &path))?;
    }
    Ok(())
}

/// Listens on a socket in the jail that is the VMM's.
pub(super) fn listen(root: &Path, name: &str, user: VmmUser) -> io::Result<UnixListener> {
    let path = root.join(name);
    file::remove(&path)?;
    // By the directory's descriptor: the path of a socket has 107 bytes at the most.
    let directory = File::open(root)?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))?;
    std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid))?;
    Ok(listener)
}

/// Makes a file of zeroes in the jail, in the place of what is there.
pub(super) fn make_blank(root: &Path, name: &str, size: u64) -> Result<()> {
    let path = root.join(name);
    let make = || -> io::Result<()> {
        file::remove(&path)?;
        // Not through a link that a VMM before has left: there is none any more.
        File::create_new(&path)?.set_len(size)
    };
    make().map_err(MachineError::file("make", &path))
}

fn show_file(file: &File, root: &Path, name: &str) -> io::Result<()> {
    let target = root.join(name);
    file::remove(&target)?;
    // By its descriptor, so that it is the file which was looked at.
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = rustix::fs::AtFlags::SYMLINK_FOLLOW;
    match rustix::fs::linkat(rustix::fs::CWD, open.as_str(), rustix::fs::CWD, &target, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::XDEV) => fs::copy(open, &target).map(drop),
        Err(errno) => Err(errno.into()),
    }
}

/// The process that the jailer left behind in a namespace of its own, as it says.
pub(super) fn pid(root: &Path, program: &Path) -> Option<i32> {
    let name = format!("{}.pid", program.file_name()?.to_str()?);
    fs::read_to_string(root.join(name)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::runtime::microvm::machine::{VmDirs, VmId};

    fn dir(base: &Path, id: &str) -> VmDir {
        VmDirs::new(base, "default").unwrap().of(&VmId::new(id).unwrap())
    }

    #[test]
    fn the_jailer_is_told_this() {
        let program = Path::new("/usr/bin/firecracker");
        let user = VmmUser { uid: 7, gid: 8 };
        let dir = dir(Path::new("/run/vms"), "one");
        let told = |namespace: Option<String>| arguments(&dir, program, user, 4096, namespace).unwrap().join(" ");
        assert!(told(None).contains(" --resource-limit fsize=4096 --new-pid-ns -- "), "{}", told(None));
        assert_eq!(
            told(Some("/proc/1/fd/2".to_owned())),
            "--id one --exec-file /usr/bin/firecracker --uid 7 --gid 8 --chroot-base-dir /run/vms/default/one/jail \
             --resource-limit no-file=1024 --resource-limit fsize=4096 --netns /proc/1/fd/2 --new-pid-ns -- \
             --api-sock firecracker.sock"
        );
        assert_eq!(root(&dir, program), Path::new("/run/vms/default/one/jail/firecracker/one/root"));
    }

    #[test]
    fn ids_that_the_jailer_refuses_are_refused_before() {
        for id in ["a.b", "a_b", &"x".repeat(65)] {
            assert!(
                arguments(&dir(Path::new("/r"), id), Path::new("/f"), VmmUser::default(), 1, None).is_err(),
                "{id}"
            );
        }
    }

    #[test]
    fn a_file_shows_up_as_the_same_file() {
        let base = tempfile::tempdir().unwrap();
        let file = base.path().join("kernel");
        fs::write(&file, "kernel").unwrap();
        let root = base.path().join("root");
        let own = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        make_root(&root, own).unwrap();
        fs::write(root.join("k"), "stale").unwrap();
        show(&Asset::open(&file).unwrap(), &root, "k").unwrap();
        assert_eq!(fs::metadata(root.join("k")).unwrap().ino(), fs::metadata(&file).unwrap().ino());
        show(&Asset::open(Path::new("/proc/version")).unwrap(), &root, "v").unwrap();
        assert!(fs::read_to_string(root.join("v")).unwrap().starts_with("Linux"));
        assert_eq!(pid(&root, Path::new("/usr/bin/firecracker")), None);
        fs::write(root.join("firecracker.pid"), "42\n").unwrap();
        assert_eq!(pid(&root, Path::new("/usr/bin/firecracker")), Some(42));
    }
}
