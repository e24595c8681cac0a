//! The socket that clients connect to: for root alone, and for one process at a time.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};
use rustix::fs::{FlockOperation, flock};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;
use tracing::warn;

use super::failure::CriError;
use crate::file;
use crate::telemetry::chain;

/// Who may connect.
const MODE: u32 = 0o600;
/// After an accept that failed: long enough to let some files be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket; its file goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens at `path`. What a process that was killed left there is replaced.
    ///
    /// # Errors
    /// [`CriError::InUse`] if somebody answers there.
    pub(super) async fn bind(path: &Path) -> Result<Self, CriError> {
        let failed = CriError::file;
        if UnixStream::connect(path).await.is_ok() {
            return Err(CriError::InUse(path.to_owned()));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed("make", folder))?;
        }
        // Under another name until nobody else may connect.
        let aside = path.with_extension(format!("{}.new", std::process::id()));
        file::remove(&aside).map_err(failed("remove", &aside))?;
        let listener = UnixListener::bind(&aside).map_err(failed("listen on", &aside))?;
        let ready = || {
            fs::set_permissions(&aside, fs::Permissions::from_mode(MODE))?;
            fs::rename(&aside, path)?;
            inode(path)
        };
        let inode = ready().map_err(failed("listen on", path))?;
        Ok(Self { listener, path: path.to_owned(), inode })
    }

    /// The clients that connect, one after the other.
    pub(super) fn incoming(&self) -> impl Stream<Item = io::Result<UnixStream>> {
        stream::unfold(
            &self.listener,
            |listener| async move { Some((paused(listener.accept().await).await, listener)) },
        )
        .map(|accepted| accepted.map(|(client, _)| client))
    }
}

/// What was accepted; a failure after a pause, for gRPC's server asks again at once.
async fn paused<T>(accepted: io::Result<T>) -> io::Result<T> {
    if let Err(cause) = &accepted {
        warn!(error = chain(cause), "failed to accept a CRI client");
        sleep(ACCEPT_PAUSE).await;
    }
    accepted
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another process may have taken the name.
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::symlink_metadata(path)?.ino())
}

/// Takes a root directory for this process, until the file is dropped.
///
/// # Errors
/// [`CriError::Locked`] if another has it.
pub(super) fn lock(root: &Path) -> Result<File, CriError> {
    fs::create_dir_all(root).map_err(CriError::file("make", root))?;
    let path = root.join("lock");
    let file = File::create(&path).map_err(CriError::file("make", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(CriError::Locked(root.to_owned())),
        Err(error) => Err(CriError::file("lock", path)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_its_owner_and_for_one_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("cri.sock");
        let socket = Socket::bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        assert!(matches!(Socket::bind(&path).await, Err(CriError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cri.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = Socket::bind(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn the_next_client_is_awaited_a_moment_after_one_could_not_be_accepted() {
        let began = std::time::Instant::now();
        paused(Ok(())).await.unwrap();
        assert!(began.elapsed() < ACCEPT_PAUSE);
        paused::<()>(Err(rustix::io::Errno::MFILE.into())).await.unwrap_err();
        assert!(began.elapsed() >= ACCEPT_PAUSE);
    }

    #[test]
    fn a_root_directory_has_one_process() {
        let root = tempfile::tempdir().unwrap();
        let held = lock(root.path()).unwrap();
        assert!(matches!(lock(root.path()), Err(CriError::Locked(_))));
        drop(held);
        lock(root.path()).unwrap();
    }
}
