//! The network namespaces that plugins work in, kept open by a mount each.
//!
//! A sandbox's process may be killed at any time, and its namespace would go with it: what plugins have on the host for it
//! (rules that they find by the addresses inside) could then not be taken away. So the namespace stays until they have.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::file;
use crate::network::NetworkError;
use crate::network::netlink::Netlink;

/// The namespaces of one node.
#[derive(Clone, Debug)]
pub(super) struct Namespaces {
    dir: PathBuf,
}

impl Namespaces {
    /// Those below `dir`, which need not exist.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Keeps the network namespace of process `pid` for the sandbox, and sets its loopback interface up. Where it is. To
    /// be called on a thread that ends with it.
    pub(super) fn keep(&self, sandbox: &str, pid: i32) -> Result<PathBuf, NetworkError> {
        let outside = |source| NetworkError::Namespace { pid, source };
        // Held open from here on: the process may end and its number be reused.
        let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(outside)?;
        let own = fs::metadata("/proc/thread-self/ns/net").map_err(outside)?;
        if namespace.metadata().map_err(outside)?.ino() == own.ino() {
            return Err(outside(io::Error::other("it has no network namespace of its own")));
        }
        self.let_go(sandbox)?;
        let path = self.dir.join(sandbox);
        let failed = |action, source| NetworkError::File { action, path: path.clone(), source };
        fs::create_dir_all(&self.dir).map_err(|source| failed("make the directory of", source))?;
        File::create(&path).map_err(|source| failed("make", source))?;
        let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        mount(Some(source.as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| failed("mount a network namespace at", errno.into()))?;
        raise_loopback(&namespace).map_err(outside)?;
        Ok(path)
    }

    /// Where the sandbox's namespace is, if it is still kept; after a restart of the host it is not.
    pub(super) fn find(&self, sandbox: &str) -> Option<PathBuf> {
        let path = self.dir.join(sandbox);
        is_namespace(&path).then_some(path)
    }

    /// The namespace may go.
    pub(super) fn let_go(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.dir.join(sandbox);
        let failed = |action, source| NetworkError::File { action, path: path.clone(), source };
        while is_namespace(&path) {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|errno| failed("unmount", errno.into()))?;
        }
        file::remove(&path).map_err(|error| failed("remove", error))
    }
}

/// Whether a namespace is mounted there: all of them are on one file system of the kernel's.
fn is_namespace(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|found| found.dev());
    device(path).is_some_and(|found| Some(found) == device(Path::new("/proc/self/ns/net")))
}

/// No plugin of a Pod's network does it; a kubelet's runtime has always done it too.
fn raise_loopback(namespace: &File) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let mut inside = Netlink::open()?;
    match inside.link("lo")? {
        Some(loopback) => inside.set_up(loopback.index),
        None => Ok(()),
    }
}
