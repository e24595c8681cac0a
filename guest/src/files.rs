//! Files that the node puts into volumes, and reads back.
//!
//! ```text
//! volume/key      -> ..data/key        what a container opens
//! volume/..data   -> ..0000000007      replaced by one rename
//! volume/..0000000007/key              the files of one push
//! ```
//! That is how a kubelet writes configMap and secret volumes, so programs that watch `..data` work as they do elsewhere.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lambdalet_proto::agent::v1::{FileLayout, PushFilesRequest};
use lambdalet_proto::{MAX_FILES, MAX_PUSHED};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::error::{Error, Result, Tried};
use crate::guest::Guest;
use crate::tree;

/// The link that is replaced.
const DATA: &str = "..data";
/// Its successor, before it takes its place.
const NEXT: &str = "..data_tmp";
/// Most bytes that are read back.
const MAX_READ: u32 = 64 << 10;

/// Counts pushes, so that each has a directory of its own.
static PUSHES: AtomicU64 = AtomicU64::new(0);

/// Files of one push, as far as they have come.
#[derive(Debug)]
pub(crate) struct Push {
    layout: FileLayout,
    volume: PathBuf,
    /// Where they are gathered: the next `..data`.
    gathered: PathBuf,
    current: Option<File>,
    files: BTreeSet<PathBuf>,
    bytes: usize,
}

impl Guest {
    /// Begins a push.
    ///
    /// # Errors
    /// The volume is not there, or is not one for files.
    pub(crate) fn begin_push(&self, first: &PushFilesRequest) -> Result<Push> {
        let name = &first.volume;
        let pushed = self.volumes().get(name).map(|made| (made.path.clone(), made.pushed));
        let (volume, pushed) = pushed.ok_or_else(|| Error::not_found(format!("there is no volume {name:?}")))?;
        if !pushed {
            return Err(Error::invalid(format!("volume {name} is not for files")));
        }
        Push::begin(volume, first.layout()).tried(|| format!("failed to write to volume {name}"))
    }

    /// The end of a file in a volume.
    ///
    /// # Errors
    /// There is none, or it is no plain file of that volume.
    pub(crate) fn read_file(&self, volume: &str, path: &str, limit: u32) -> Result<Bytes> {
        let root = self.volume(volume)?;
        check_path(path)?;
        read_below(&root, path, limit.min(MAX_READ)).tried(|| format!("failed to read {path} of volume {volume}"))
    }
}

impl Push {
    fn begin(volume: PathBuf, layout: FileLayout) -> io::Result<Self> {
        let number = PUSHES.fetch_add(1, Ordering::Relaxed);
        let gathered = volume.join(format!("..{number:010}"));
        fs::create_dir(&gathered)?;
        fs::set_permissions(&gathered, fs::Permissions::from_mode(0o755))?;
        Ok(Self { layout, volume, gathered, current: None, files: BTreeSet::new(), bytes: 0 })
    }

    /// Adds a file, or bytes to the last.
    ///
    /// # Errors
    /// A path that leads out, or more than a volume holds.
    pub(crate) fn add(&mut self, request: &PushFilesRequest) -> Result<()> {
        self.bytes += request.data.len();
        if self.bytes > MAX_PUSHED || self.files.len() > MAX_FILES {
            return Err(Error::invalid(format!("more than {MAX_FILES} files or {MAX_PUSHED} bytes")));
        }
        if !request.path.is_empty() {
            check_path(&request.path)?;
            self.current = None;
            self.files.insert(PathBuf::from(&request.path));
            self.current = self.create(request).tried(|| format!("failed to write {}", request.path))?;
        }
        match &mut self.current {
            Some(file) => file.write_all(&request.data).tried(|| "failed to write a file".to_owned()),
            None if request.data.is_empty() => Ok(()),
            None => Err(Error::invalid("bytes of no file")),
        }
    }

    fn create(&self, request: &PushFilesRequest) -> io::Result<Option<File>> {
        let path = self.gathered.join(&request.path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        if !request.link.is_empty() {
            symlink(&request.link, &path)?;
            return Ok(None);
        }
        let file = File::create_new(&path)?;
        chown(&path, Some(request.uid), Some(request.gid))?;
        file.set_permissions(fs::Permissions::from_mode(request.mode & 0o7777))?;
        Ok(Some(file))
    }

    /// Makes the files visible, all at once, and takes away those that were before.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.current = None;
        let finished = match self.layout {
            FileLayout::Atomic => self.exchange(),
            FileLayout::Plain => self.replace(),
        };
        finished.tried(|| format!("failed to show the files of {}", self.volume.display()))
    }

    fn exchange(&self) -> io::Result<()> {
        let name = self.gathered.file_name().unwrap_or_default();
        let (data, next) = (self.volume.join(DATA), self.volume.join(NEXT));
        let before = fs::read_link(&data).ok().filter(|before| is_push(before));
        let _ = fs::remove_file(&next);
        symlink(name, &next)?;
        fs::rename(&next, &data)?;
        let wanted: BTreeSet<&Path> = self.files.iter().filter_map(|path| path.iter().next()).map(Path::new).collect();
        for top in &wanted {
            let link = self.volume.join(top);
            if fs::symlink_metadata(&link).is_err() {
                symlink(Path::new(DATA).join(top), &link)?;
            }
        }
        for entry in fs::read_dir(&self.volume)?.flatten() {
            let name = entry.file_name();
            if !wanted.contains(Path::new(&name)) && !name.to_string_lossy().starts_with("..") {
                fs::remove_file(entry.path())?;
            }
        }
        match before {
            Some(before) => tree::remove(&self.volume.join(before)),
            None => Ok(()),
        }
    }

    /// Each file by a rename: who has one mounted by itself keeps the one it has.
    fn replace(&self) -> io::Result<()> {
        for path in &self.files {
            let to = self.volume.join(path);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            let from = self.gathered.join(path);
            match fs::metadata(&to) {
                // Somebody may have mounted the file itself, which a rename would not reach.
                Ok(there) if there.is_file() && !from.is_symlink() => {
                    let bytes = fs::read(&from)?;
                    let kept = fs::metadata(&from)?;
                    fs::write(&to, bytes)?;
                    fs::set_permissions(&to, kept.permissions())?;
                }
                _ => fs::rename(&from, &to)?,
            }
        }
        self.sweep(&self.volume, Path::new(""))?;
        tree::remove(&self.gathered)
    }

    /// Takes away files that are not among the pushed.
    fn sweep(&self, directory: &Path, below: &Path) -> io::Result<()> {
        for entry in fs::read_dir(directory)?.flatten() {
            let name = below.join(entry.file_name());
            if entry.path() == self.gathered {
                continue;
            }
            if entry.file_type()?.is_dir() {
                self.sweep(&entry.path(), &name)?;
                // One that still holds files stays.
                let _ = fs::remove_dir(entry.path());
            } else if !self.files.contains(&name) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        // A push that was not finished leaves nothing; a finished one is what ..data points to.
        let shown = fs::read_link(self.volume.join(DATA)).is_ok_and(|data| self.volume.join(data) == self.gathered);
        if !shown {
            let _ = tree::remove(&self.gathered);
        }
    }
}

/// Whether this is the name of a push's directory, and not where somebody else has turned the link to.
fn is_push(name: &Path) -> bool {
    let digits = name.to_str().and_then(|name| name.strip_prefix(".."));
    digits.is_some_and(|digits| digits.len() >= 10 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Relative, without `..` and empty parts, and with no first part that is ours.
fn check_path(path: &str) -> Result<()> {
    let good =
        |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255 && !part.contains('\0');
    if path.len() <= 4096 && path.split('/').all(good) && !path.starts_with("..") {
        return Ok(());
    }
    Err(Error::invalid(format!("{path:?} is no path in a volume")))
}

fn read_below(root: &Path, path: &str, limit: u32) -> io::Result<Bytes> {
    let root = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut file = File::from(openat2(&root, path, flags, Mode::empty(), resolve)?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.seek(SeekFrom::Start(metadata.len().saturating_sub(u64::from(limit))))?;
    let mut bytes = Vec::new();
    file.take(u64::from(limit)).read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, data: &str) -> PushFilesRequest {
        let data = Bytes::copy_from_slice(data.as_bytes());
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        PushFilesRequest { path: path.into(), mode: 0o640, data, uid, gid, ..PushFilesRequest::default() }
    }

    fn push(volume: &Path, layout: FileLayout, files: &[PushFilesRequest]) -> Result<()> {
        let mut push = Push::begin(volume.to_owned(), layout).unwrap();
        files.iter().try_for_each(|file| push.add(file))?;
        push.finish()
    }

    fn names(volume: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(volume).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_push_replaces_all_files_by_one_rename() {
        let volume = tempfile::tempdir().unwrap();
        let volume = volume.path();
        push(volume, FileLayout::Atomic, &[file("a", "1"), file("dir/b", "2")]).unwrap();
        let data = fs::read_link(volume.join(DATA)).unwrap();
        assert_eq!(fs::read_link(volume.join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::read_to_string(volume.join("dir/b")).unwrap(), "2");
        assert_eq!(fs::metadata(volume.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        push(volume, FileLayout::Atomic, &[file("a", "3"), file("c", "4")]).unwrap();
        assert_ne!(fs::read_link(volume.join(DATA)).unwrap(), data);
        assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "3");
        let data = fs::read_link(volume.join(DATA)).unwrap().into_os_string().into_string().unwrap();
        assert_eq!(names(volume), [data.as_str(), DATA, "a", "c"]);
    }

    #[test]
    fn a_file_that_is_mounted_by_itself_changes_in_place() {
        use std::os::unix::fs::MetadataExt;
        let volume = tempfile::tempdir().unwrap();
        let volume = volume.path();
        push(volume, FileLayout::Plain, &[file("hosts", "1"), file("x/old", "1")]).unwrap();
        let inode = fs::metadata(volume.join("hosts")).unwrap().ino();
        push(volume, FileLayout::Plain, &[file("hosts", "2")]).unwrap();
        assert_eq!(fs::read_to_string(volume.join("hosts")).unwrap(), "2");
        assert_eq!(fs::metadata(volume.join("hosts")).unwrap().ino(), inode);
        assert_eq!(names(volume), ["hosts"]);
    }

    #[test]
    fn paths_stay_in_the_volume_and_a_refused_push_leaves_nothing() {
        let volume = tempfile::tempdir().unwrap();
        for path in ["/etc/passwd", "../x", "a/../../x", "a//b", "..data", "a/.", "\0"] {
            assert!(
                push(volume.path(), FileLayout::Atomic, &[file("good", "1"), file(path, "2")]).is_err(),
                "{path:?}"
            );
            assert_eq!(names(volume.path()), Vec::<String>::new());
        }
        let long = "x".repeat(1 << 20);
        let long = [&[file("a", &long)][..], &vec![file("", &long); 16]].concat();
        assert!(push(volume.path(), FileLayout::Atomic, &long).is_err());
    }

    #[test]
    fn a_link_that_was_turned_elsewhere_takes_nothing_along() {
        let (volume, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (volume, other) = (volume.path(), other.path());
        fs::write(other.join("kept"), "kept").unwrap();
        for target in [other, Path::new("../"), Path::new("..0000000000/..")] {
            let _ = fs::remove_file(volume.join(DATA));
            symlink(target, volume.join(DATA)).unwrap();
            push(volume, FileLayout::Atomic, &[file("a", "1")]).unwrap();
            assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "1");
        }
        assert!(other.join("kept").exists());
    }

    #[test]
    fn what_is_read_back_is_the_end_of_a_plain_file_of_the_volume() {
        let volume = tempfile::tempdir().unwrap();
        let volume = volume.path();
        fs::write(volume.join("message"), "0123456789").unwrap();
        symlink("/etc/passwd", volume.join("out")).unwrap();
        fs::create_dir(volume.join("dir")).unwrap();
        assert_eq!(read_below(volume, "message", 4).unwrap(), "6789");
        assert_eq!(read_below(volume, "message", 100).unwrap(), "0123456789");
        assert_eq!(read_below(volume, "none", 4).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(read_below(volume, "out", 4).is_err() && read_below(volume, "dir", 4).is_err());
    }
}
