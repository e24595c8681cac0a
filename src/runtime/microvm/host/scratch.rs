//! The disk that a guest's containers write to: an empty file system, made once and copied for each machine.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use tokio::process::Command;

use crate::file;
use crate::runtime::{Kind, Result, RuntimeError};

/// Without a journal: what is on it is of no use to anybody after its machine has ended. It never grows, and the room to do
/// so would be most of what is copied for each machine.
const OPTIONS: [&str; 6] = ["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"];

/// Makes an empty file system of `size` bytes at `path`, in the place of what is there. It takes some hundred KiB of the
/// host's disk until it is written to.
///
/// # Errors
/// [`Kind::Unsupported`] without `mkfs.ext4`; [`Kind::Internal`] if it fails.
pub(super) async fn make_blank(path: PathBuf, size: u64) -> Result<PathBuf> {
    let tried = || format!("failed to make an empty disk {}", path.display());
    let failed = |error| RuntimeError::new(Kind::Internal, tried()).with_source(error);
    let fresh = path.with_extension("new");
    let place = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(place).and_then(|()| File::create(&fresh)?.set_len(size)).map_err(failed)?;
    let made = Command::new("mkfs.ext4").args(OPTIONS).arg(&fresh).kill_on_drop(true).output().await;
    let output = made.map_err(|error| {
        RuntimeError::new(Kind::Unsupported, format!("{}: mkfs.ext4 cannot be run", tried())).with_source(error)
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(RuntimeError::new(Kind::Internal, format!("{}: {}", tried(), said.trim())));
    }
    fs::rename(&fresh, &path).map_err(failed)?;
    Ok(path)
}

/// Copies the parts of a file that have bytes; the new one is root's alone, and in the place of what is there.
///
/// # Errors
/// The kernel's.
pub(super) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    file::remove(to)?;
    let from = File::open(from)?;
    let size = from.metadata()?.len();
    // New: whatever a VMM put there before is not written to.
    let mut to = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    to.set_len(size)?;
    let mut at = 0;
    loop {
        let begin = match seek(&from, SeekFrom::Data(at)) {
            // Only a hole follows.
            Err(Errno::NXIO) => return Ok(()),
            begin => begin?,
        };
        let end = seek(&from, SeekFrom::Hole(begin))?;
        seek(&from, SeekFrom::Start(begin))?;
        seek(&to, SeekFrom::Start(begin))?;
        io::copy(&mut io::Read::take(&from, end - begin), &mut to)?;
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        let mut file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 4] {
            file.seek(io::SeekFrom::Start(at)).unwrap();
            file.write_all(b"data").unwrap();
        }
        fs::write(&to, "what was there").unwrap();
        copy(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20, "{:?}", fs::metadata(&to));
        File::create(&from).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().len(), 0);
    }
}
