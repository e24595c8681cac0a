//! Reads files of this host for a guest: bounded in number and size, links kept within their directory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use rustix::fs::{AtFlags, Dir, DirEntry, FileType, Mode, OFlags, ResolveFlags, openat2, statat};
use rustix::io::Errno;

use super::vm::{GuestFile, GuestVolume, Layout, VolumeKind};
use super::volumes::Places;

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

/// What volume an emptyDir of the host stands for: of its medium and size, for whom it was made.
pub(super) fn empty_volume(path: &Path) -> io::Result<GuestVolume> {
    let (found, around) = (fs::metadata(path)?, statfs(path)?);
    let kind = match around.filesystem_type() {
        TMPFS_MAGIC => VolumeKind::Memory(around.blocks() * u64::try_from(around.block_size()).unwrap_or(0)),
        _ => VolumeKind::Scratch,
    };
    Ok(GuestVolume { kind, mode: found.mode() & 0o7777, gid: found.gid() })
}

/// [`read`] beneath the directory by which the path is shared.
///
/// # Errors
/// As that; and a path that is shared no more.
pub(super) fn read_shared(places: &Places, path: &Path) -> io::Result<Copied> {
    let base = places.base(path).ok_or_else(|| refused(path, "it is not shared with microVMs any more"))?;
    read(base, path)
}

/// The files at a path: of a directory, as they are now, or the one file. Nothing is opened but beneath `base`: a link on the
/// way that leads out of it is an error, whoever laid it and whenever. Links further down are followed nowhere.
///
/// # Errors
/// More than the bounds; something that is neither file nor directory.
fn read(base: &Path, path: &Path) -> io::Result<Copied> {
    let mut reading = Reading { files: Vec::new(), bytes: 0 };
    let below = path.strip_prefix(base).map_err(|_| refused(path, "it is not where files are copied from"))?;
    let found = open_beneath(&File::open(base)?, below, ResolveFlags::empty())?;
    if !found.metadata()?.is_dir() {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        reading.file(found, path, name.clone())?;
        return Ok(Copied { layout: Layout::Plain, files: reading.files, file: name });
    }
    let is_atomic = statat(&found, DATA, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    // One directory of files, whatever the link is turned to meanwhile.
    let root = match is_atomic {
        true => open_beneath(&found, Path::new(DATA), ResolveFlags::empty())?,
        false => found,
    };
    let (mut open, mut directories) = (vec![PathBuf::new()], 0);
    while let Some(below) = open.pop() {
        directories += 1;
        if directories > MOST_FILES {
            return Err(refused(path, &format!("a microVM takes {MOST_FILES} directories in a volume, not more")));
        }
        let directory = open_beneath(&root, &below, ResolveFlags::NO_SYMLINKS)?;
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let inside = below.join(OsStr::from_bytes(entry.file_name().to_bytes()));
            match kind(&directory, &entry)? {
                FileType::Directory if !matches!(entry.file_name().to_bytes(), b"." | b"..") => open.push(inside),
                FileType::RegularFile => {
                    let name = inside.to_str().ok_or_else(|| refused(&inside, "its name is no text"))?.to_owned();
                    reading.file(open_beneath(&root, &inside, ResolveFlags::NO_SYMLINKS)?, &inside, name)?;
                }
                _ => {}
            }
        }
    }
    let layout = if is_atomic { Layout::Atomic } else { Layout::Plain };
    Ok(Copied { layout, files: reading.files, file: String::new() })
}

/// Opens what lies there, without waiting for anybody if it is a FIFO.
fn open_beneath(directory: &File, path: &Path, also: ResolveFlags) -> io::Result<File> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | also;
    match openat2(directory, path, flags, Mode::empty(), how) {
        Ok(file) => Ok(File::from(file)),
        Err(Errno::XDEV | Errno::LOOP) => Err(refused(path, "a link leads out of it")),
        Err(errno) => Err(errno.into()),
    }
}

/// Of an entry itself, and not of what it points to.
fn kind(directory: &File, entry: &DirEntry) -> io::Result<FileType> {
    match entry.file_type() {
        FileType::Unknown => {
            let found = statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(FileType::from_raw_mode(found.st_mode))
        }
        known => Ok(known),
    }
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
    fn file(&mut self, file: File, path: &Path, name: String) -> io::Result<()> {
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
        let mut copied = read(root, root).unwrap();
        copied.files.sort_by(|a, b| a.path.cmp(&b.path));
        let names: Vec<_> = copied.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!((copied.layout, names.as_slice()), (Layout::Atomic, ["other", "sub/key"].as_slice()));
        let one = read(root, &root.join("..2026/other")).unwrap();
        assert_eq!(
            (one.layout, one.file.as_str(), one.files[0].bytes.as_ref()),
            (Layout::Plain, "other", b"o".as_slice())
        );
        assert_eq!(read(root, &root.join("..2026")).unwrap().files.len(), 2);
        fs::remove_file(root.join("..data")).unwrap();
        symlink("/etc", root.join("..data")).unwrap();
        assert!(read(root, root).unwrap_err().to_string().contains("leads out"));
        assert!(read(root, &root.join("absent")).is_err());
    }

    #[test]
    fn nothing_is_copied_from_elsewhere_by_a_link_or_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (shared, secret) = (folder.path().join("shared"), folder.path().join("secret"));
        fs::create_dir_all(shared.join("own")).unwrap();
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("key"), "secret").unwrap();
        fs::write(shared.join("own/file"), "own").unwrap();
        symlink("../secret", shared.join("up")).unwrap();
        symlink(&secret, shared.join("absolute")).unwrap();
        symlink("own", shared.join("within")).unwrap();
        nix::unistd::mkfifo(&shared.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for bad in ["up", "up/key", "absolute", "absolute/key", "within/../../secret/key", "fifo"] {
            assert!(read(&shared, &shared.join(bad)).is_err(), "{bad}");
        }
        assert!(read(&shared, &secret).is_err());
        assert_eq!(read(&shared, &shared.join("within/file")).unwrap().files[0].bytes.as_ref(), b"own");
        let names: Vec<_> = read(&shared, &shared).unwrap().files.into_iter().map(|file| file.path).collect();
        assert_eq!(names, ["own/file"]);
    }

    #[test]
    fn what_is_too_large_is_refused_with_the_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("large")).unwrap();
        file.set_len(MOST_BYTES).unwrap();
        assert!(read(folder.path(), folder.path()).is_ok());
        fs::write(folder.path().join("more"), "x").unwrap();
        assert!(read(folder.path(), folder.path()).unwrap_err().to_string().contains("not more"));
    }
}
