//! Reads files of this host for a guest: bounded in number and size, links kept within their directory.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::vm::{GuestFile, Layout, VolumeKind};

/// Most files of a volume, and their bytes: what a guest takes.
const MOST_FILES: usize = 4096;
const MOST_BYTES: u64 = 16 << 20;
/// The link that a kubelet turns to new files.
const DATA: &str = "..data";

/// A volume's files.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) layout: Layout,
    pub(super) files: Vec<GuestFile>,
    /// Its name, if the volume is of one file only.
    pub(super) file: String,
}

/// What kind of volume an emptyDir of the host stands for.
pub(super) fn empty_kind(path: &Path) -> io::Result<VolumeKind> {
    let found = statfs(path)?;
    if found.filesystem_type() != TMPFS_MAGIC {
        return Ok(VolumeKind::Scratch);
    }
    let size = found.blocks() * u64::try_from(found.block_size()).unwrap_or(0);
    Ok(VolumeKind::Memory(size))
}

/// The files at a path: of a directory, as they are now, or the one file.
///
/// # Errors
/// More than the bounds; something that is neither file nor directory.
pub(super) fn read(path: &Path) -> io::Result<Copied> {
    let mut reading = Reading { files: Vec::new(), bytes: 0 };
    if !fs::metadata(path)?.is_dir() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        reading.file(path, name.clone())?;
        return Ok(Copied { layout: Layout::Plain, files: reading.files, file: name });
    }
    let is_atomic = fs::symlink_metadata(path.join(DATA)).is_ok();
    // One directory of files, whatever the link is turned to meanwhile.
    let root = if is_atomic { fs::canonicalize(path.join(DATA))? } else { path.to_owned() };
    if is_atomic && !root.starts_with(fs::canonicalize(path)?) {
        return Err(refused(path, "its ..data leads out of it"));
    }
    let mut open = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        for entry in fs::read_dir(root.join(&below))? {
            let entry = entry?;
            let inside = below.join(entry.file_name());
            // Links are followed nowhere, so nothing but this directory is copied.
            let kind = entry.file_type()?;
            if kind.is_dir() {
                open.push(inside);
            } else if kind.is_file() {
                let name = inside.to_str().ok_or_else(|| refused(&inside, "its name is no text"))?.to_owned();
                reading.file(&root.join(&inside), name)?;
            }
        }
    }
    let layout = if is_atomic { Layout::Atomic } else { Layout::Plain };
    Ok(Copied { layout, files: reading.files, file: String::new() })
}

/// Changes when the files at a path do: the link of a directory that has one, or the file itself.
pub(super) fn fingerprint(path: &Path) -> io::Result<String> {
    if let Ok(target) = fs::read_link(path.join(DATA)) {
        return Ok(target.display().to_string());
    }
    let found = fs::metadata(path)?;
    Ok(format!("{}:{}:{}:{}.{}", found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

struct Reading {
    files: Vec<GuestFile>,
    bytes: u64,
}

impl Reading {
    fn file(&mut self, path: &Path, name: String) -> io::Result<()> {
        let file = fs::File::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(refused(path, "it is no file"));
        }
        let mut bytes = Vec::new();
        file.take(MOST_BYTES + 1 - self.bytes).read_to_end(&mut bytes)?;
        self.bytes += bytes.len() as u64;
        if self.bytes > MOST_BYTES || self.files.len() >= MOST_FILES {
            let text = format!("a microVM takes {MOST_FILES} files and {MOST_BYTES} bytes in a volume, not more");
            return Err(refused(path, &text));
        }
        let owner = (found.uid(), found.gid());
        let mode = found.permissions().mode() & 0o7777;
        self.files.push(GuestFile { path: name, mode, owner, bytes: Bytes::from(bytes) });
        Ok(())
    }
}

fn refused(path: &Path, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_are_read_as_they_are_now_and_links_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("..2026/sub")).unwrap();
        fs::write(root.join("..2026/sub/key"), "value").unwrap();
        fs::write(root.join("..2026/other"), "o").unwrap();
        symlink("/etc/passwd", root.join("..2026/out")).unwrap();
        symlink("..2026", root.join("..data")).unwrap();
        symlink("..data/other", root.join("other")).unwrap();
        let mut copied = read(root).unwrap();
        copied.files.sort_by(|a, b| a.path.cmp(&b.path));
        let names: Vec<_> = copied.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!((copied.layout, names.as_slice()), (Layout::Atomic, ["other", "sub/key"].as_slice()));
        let one = read(&root.join("..2026/other")).unwrap();
        assert_eq!(
            (one.layout, one.file.as_str(), one.files[0].bytes.as_ref()),
            (Layout::Plain, "other", b"o".as_slice())
        );
        assert_eq!(read(&root.join("..2026")).unwrap().files.len(), 2);
        fs::remove_file(root.join("..data")).unwrap();
        symlink("/etc", root.join("..data")).unwrap();
        assert!(read(root).unwrap_err().to_string().contains("leads out"));
        assert!(read(&root.join("absent")).is_err());
    }

    #[test]
    fn what_is_too_large_is_refused_with_the_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("large")).unwrap();
        file.set_len(MOST_BYTES).unwrap();
        assert!(read(folder.path()).is_ok());
        fs::write(folder.path().join("more"), "x").unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("not more"));
    }
}
