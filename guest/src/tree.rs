//! Trees of files that a workload has made: measured, and removed, however deep they are.
//!
//! A bounded number of directories is open at once. The outer ones are closed on the way down, and found through `..` on
//! the way up, where each must be the very one that was left. No link is followed, and no path is put together: neither
//! the limit of descriptors nor that of a path ends a walk.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::path::Arg;

/// Directories above the one that is read which stay open.
const OPEN: usize = 64;

/// Bytes in whole blocks and files of a tree; what vanishes meanwhile does not count.
pub(crate) fn usage(path: &Path) -> (u64, u64) {
    let (mut bytes, mut inodes) = (0, 0);
    let count = |directory: BorrowedFd<'_>, name: &CStr, _: bool| {
        if let Ok(found) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            bytes += u64::try_from(found.st_blocks).unwrap_or(0) * 512;
            inodes += 1;
        }
        Ok(())
    };
    // Where it cannot go on, what was seen counts.
    let _ = open(CWD, path).and_then(|root| Walk::new(root, false)?.run(count));
    (bytes, inodes)
}

/// Removes a tree, or whatever else is there. Nothing is fine.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    take(path, |directory, name| unlinkat(directory, name, AtFlags::empty()))
}

/// Removes cgroups: directories whose files go with them.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn remove_cgroups(path: &Path) -> io::Result<()> {
    take(path, |_, _| Ok(()))
}

fn take(path: &Path, mut file: impl FnMut(BorrowedFd<'_>, &CStr) -> Result<(), Errno>) -> io::Result<()> {
    let one = |directory: BorrowedFd<'_>, name: &CStr, is_directory: bool| {
        gone(if is_directory { unlinkat(directory, name, AtFlags::REMOVEDIR) } else { file(directory, name) })
    };
    match open(CWD, path) {
        Ok(root) => Walk::new(root, true)?.run(one)?,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(gone(unlinkat(CWD, path, AtFlags::empty()))?),
        Err(error) => return Err(error.into()),
    }
    Ok(gone(unlinkat(CWD, path, AtFlags::REMOVEDIR))?)
}

/// What somebody else has removed is removed.
fn gone(removed: Result<(), Errno>) -> Result<(), Errno> {
    if removed == Err(Errno::NOENT) { Ok(()) } else { removed }
}

fn open(at: impl AsFd, name: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

/// Tells a directory from every other that is there.
fn id(directory: impl AsFd) -> Result<(u64, u64), Errno> {
    fstat(directory).map(|found| (found.st_dev, found.st_ino))
}

/// A walk over a tree.
struct Walk {
    /// What is told of is taken away, so that a directory which was closed is read from its beginning.
    takes: bool,
    current: Level,
    /// Those above it, the outermost first; above these the closed ones.
    open: VecDeque<Level>,
    closed: Vec<Closed>,
}

/// A directory that is being read.
struct Level {
    directory: Dir,
    name: CString,
    /// The position after the last entry that was read.
    at: i64,
}

/// A directory that is to be read further.
struct Closed {
    id: (u64, u64),
    name: CString,
    at: i64,
}

impl Walk {
    fn new(root: OwnedFd, takes: bool) -> Result<Self, Errno> {
        let current = Level::new(root, CString::default())?;
        Ok(Self { takes, current, open: VecDeque::new(), closed: Vec::new() })
    }

    /// Tells of everything below the root: where it is, its name, whether it is a directory; of a directory after all that
    /// is in it, and at once of one that cannot be opened.
    fn run(mut self, mut visit: impl FnMut(BorrowedFd<'_>, &CStr, bool) -> Result<(), Errno>) -> Result<(), Errno> {
        loop {
            let Some(entry) = self.current.directory.read().transpose()? else {
                let Some(left) = self.up()? else { return Ok(()) };
                visit(self.current.directory.fd()?, &left, true)?;
                continue;
            };
            let (name, kind) = (entry.file_name(), entry.file_type());
            if name == c"." || name == c".." {
                continue;
            }
            if !self.takes {
                self.current.at = entry.offset();
            }
            let directory = self.current.directory.fd()?;
            let below = match kind {
                // Not every file system says what is what.
                FileType::Directory | FileType::Unknown => open(directory, name).ok(),
                _ => None,
            };
            match below {
                Some(below) => self.down(Level::new(below, name.to_owned())?)?,
                None => visit(directory, name, kind == FileType::Directory)?,
            }
        }
    }

    fn down(&mut self, below: Level) -> Result<(), Errno> {
        self.open.push_back(mem::replace(&mut self.current, below));
        if self.open.len() > OPEN
            && let Some(Level { directory, name, at }) = self.open.pop_front()
        {
            self.closed.push(Closed { id: id(directory.fd()?)?, name, at });
        }
        Ok(())
    }

    /// The name of the directory that was left; none at the root.
    fn up(&mut self) -> Result<Option<CString>, Errno> {
        let above = match self.open.pop_back() {
            Some(level) => level,
            None => match self.closed.pop() {
                Some(closed) => closed.reopen(&self.current)?,
                None => return Ok(None),
            },
        };
        Ok(Some(mem::replace(&mut self.current, above).name))
    }
}

impl Level {
    fn new(directory: OwnedFd, name: CString) -> Result<Self, Errno> {
        Ok(Self { directory: Dir::new(directory)?, name, at: 0 })
    }
}

impl Closed {
    fn reopen(self, below: &Level) -> Result<Level, Errno> {
        let directory = open(below.directory.fd()?, c"..")?;
        if id(&directory)? != self.id {
            // Somebody has moved what is below: this way may lead out of the tree.
            return Err(Errno::STALE);
        }
        let mut directory = Dir::new(directory)?;
        directory.seek(self.at)?;
        Ok(Level { directory, name: self.name, at: self.at })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use rustix::fs::mkdirat;

    use super::*;

    /// Deeper than descriptors, and a path, would reach.
    const DEPTH: usize = 3000;

    /// A tree with something on either side of the way down.
    fn deep(root: &Path, files: &[&CStr]) {
        // As in the guest.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(1024), hard).unwrap();
        fs::create_dir(root).unwrap();
        let mut directory = open(CWD, root).unwrap();
        let all = Mode::from_raw_mode(0o700);
        for _ in 0..DEPTH {
            for file in files {
                openat(&directory, *file, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, all).unwrap();
            }
            for name in [c"down", c"empty"] {
                mkdirat(&directory, name, all).unwrap();
            }
            directory = open(&directory, c"down").unwrap();
        }
    }

    #[test]
    fn a_tree_of_any_depth_is_counted_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        deep(&root, &[c"a", c"z"]);
        assert_eq!(usage(&root).1, 4 * DEPTH as u64);
        remove(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(usage(&root), (0, 0));
        deep(&root, &[]);
        remove_cgroups(&root).unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn what_is_in_files_counts_in_blocks() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("below")).unwrap();
        let empty = usage(directory.path()).0;
        fs::write(directory.path().join("below/file"), vec![1; 100_000]).unwrap();
        let (bytes, inodes) = usage(directory.path());
        assert!(bytes >= empty + 100_000 && inodes == 2, "{bytes} bytes in {inodes} files");
    }

    #[test]
    fn a_link_is_removed_and_not_what_it_leads_to() {
        let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let kept = other.path().join("kept");
        fs::write(&kept, "kept").unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("below")).unwrap();
        symlink(other.path(), root.join("link")).unwrap();
        symlink(other.path(), root.join("below/link")).unwrap();
        assert_eq!(usage(&root).1, 3);
        remove(&root).unwrap();
        symlink(other.path(), &root).unwrap();
        assert_eq!(usage(&root), (0, 0));
        remove(&root).unwrap();
        // Once more is fine.
        remove(&root).unwrap();
        assert!(root.symlink_metadata().is_err() && kept.exists());
    }

    #[test]
    fn a_tree_that_is_moved_away_does_not_lead_out() {
        let directory = tempfile::tempdir().unwrap();
        let (root, other) = (directory.path().join("root"), directory.path().join("other"));
        fs::create_dir_all(root.join("below")).unwrap();
        fs::create_dir(&other).unwrap();
        let closed = Closed { id: id(open(CWD, &root).unwrap()).unwrap(), name: CString::default(), at: 0 };
        fs::rename(root.join("below"), other.join("below")).unwrap();
        let below = Level::new(open(CWD, other.join("below")).unwrap(), c"below".to_owned()).unwrap();
        assert_eq!(closed.reopen(&below).err(), Some(Errno::STALE));
    }
}
