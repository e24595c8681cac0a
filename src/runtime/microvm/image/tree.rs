//! The directory tree that layers are written into, by operations that cannot leave it.
//!
//! Every path is resolved by the kernel below an open directory, as if that were the root (`openat2`,
//! RESOLVE_IN_ROOT): `..` stops there, and links, absolute ones too, lead within. The last name of a path is never
//! followed. What is written is bounded in number, size and depth.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT, fchmod, fstat,
    futimens, mkdirat, openat, openat2, statat, unlinkat,
};
use rustix::io::Errno;

use super::archive::Mtime;

/// Deepest nesting of directories: far beyond any image, and well below what walks over it later can bear.
const DEEPEST: u32 = 200;
/// How a directory is opened here. Not by O_PATH, since it is also read and changed through this.
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// How often the kernel is asked again for a path that it could not resolve undisturbed.
const MOST_TRIES: u32 = 1000;
/// Of a directory that no layer says anything about.
const DEFAULT_MODE: Mode = Mode::from_raw_mode(0o755);

/// What is to be remembered of a directory until all is written.
#[derive(Clone, Copy, Debug)]
struct Directory {
    depth: u32,
    mtime: Mtime,
}

/// Components of a path.
pub(super) type Parts<'p> = [&'p [u8]];

/// A tree of files, empty at first.
pub(super) struct Tree {
    root: OwnedFd,
    /// By inode number: a directory's time can be set only once nothing is made in it any more.
    directories: HashMap<u64, Directory>,
    /// Most directories made: a path makes its parents too, which are no entries of a layer.
    most: u64,
    /// The directory used last, by its path: most entries lie beside the one before.
    last: Option<(Vec<u8>, OwnedFd)>,
}

impl Tree {
    /// The tree at an empty directory of ours, in which at most so many others are made.
    pub(super) fn at(path: &Path, most: u64) -> io::Result<Self> {
        let root = openat(CWD, path, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
        fchmod(&root, DEFAULT_MODE)?;
        let directory = Directory { depth: 0, mtime: Mtime::default() };
        Ok(Self { directories: HashMap::from([(fstat(&root)?.st_ino, directory)]), root, most, last: None })
    }

    /// A directory that is there, links followed within the tree.
    pub(super) fn open(&self, parts: &Parts<'_>) -> io::Result<OwnedFd> {
        self.resolve(&parts.join(&b'/'), ResolveFlags::IN_ROOT)
    }

    /// A directory that is there, and not by way of a link.
    pub(super) fn open_plain(&self, parts: &Parts<'_>) -> io::Result<OwnedFd> {
        self.resolve(&parts.join(&b'/'), ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
    }

    fn resolve(&self, path: &[u8], how: ResolveFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let how = how | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let mut tries = 0;
        loop {
            match openat2(&self.root, path, DIRECTORY, Mode::empty(), how) {
                // Something on this host was renamed or mounted while the kernel followed a "..".
                Err(Errno::AGAIN) if tries < MOST_TRIES => tries += 1,
                opened => return Ok(opened?),
            }
        }
    }

    /// A directory, made with its parents where it is missing: whatever else has its name gives way, as it would under
    /// an overlay.
    pub(super) fn make(&mut self, parts: &Parts<'_>) -> io::Result<OwnedFd> {
        let path = parts.join(&b'/');
        if let Some((last, opened)) = &self.last
            && *last == path
        {
            return opened.try_clone();
        }
        let opened = match self.open(parts) {
            Err(error) if is_missing(&error) => self.make_each(parts)?,
            opened => opened?,
        };
        self.last = Some((path, opened.try_clone()?));
        Ok(opened)
    }

    fn make_each(&mut self, parts: &Parts<'_>) -> io::Result<OwnedFd> {
        let mut parent = self.open(&[])?;
        for end in 1..=parts.len() {
            let below = match self.open(&parts[..end]) {
                Err(error) if is_missing(&error) => self.make_below(&parent, parts[end - 1])?,
                below => below?,
            };
            parent = below;
        }
        Ok(parent)
    }

    /// A new directory, in place of whatever has this name.
    pub(super) fn make_below(&mut self, parent: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
        self.remove(parent, name)?;
        let depth = self.directories.get(&fstat(parent)?.st_ino).map_or(DEEPEST, |directory| directory.depth) + 1;
        if depth > DEEPEST {
            return Err(io::Error::other(format!("it lies more than {DEEPEST} directories deep")));
        }
        if self.directories.len() as u64 > self.most {
            return Err(io::Error::other(format!("it has more than {} directories", self.most)));
        }
        mkdirat(parent, name, DEFAULT_MODE)?;
        let made = open_below(parent, name)?;
        // The process has a umask.
        fchmod(&made, DEFAULT_MODE)?;
        self.directories.insert(fstat(&made)?.st_ino, Directory { depth, mtime: Mtime::default() });
        Ok(made)
    }

    /// Notes the time that a directory is to have in the end.
    pub(super) fn note_mtime(&mut self, directory: &OwnedFd, mtime: Mtime) -> io::Result<()> {
        if let Some(directory) = self.directories.get_mut(&fstat(directory)?.st_ino) {
            directory.mtime = mtime;
        }
        Ok(())
    }

    /// Removes what has this name, and everything in it. Ok if there is nothing.
    pub(super) fn remove(&mut self, parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
        let Some(found) = status(parent, name)? else { return Ok(()) };
        let kind = FileType::from_raw_mode(found.st_mode);
        if kind == FileType::Directory || kind == FileType::Symlink {
            // The directory used last may have lain there, or been found by this link.
            self.last = None;
        }
        remove(parent, name, kind)
    }

    /// Removes everything in a directory.
    pub(super) fn clear(&mut self, directory: &OwnedFd) -> io::Result<()> {
        self.last = None;
        clear(directory)
    }

    /// Gives every directory its time; nothing may be written after this.
    pub(super) fn settle(self) -> io::Result<()> {
        settle(&self.root, &self.directories)
    }
}

/// What has this name, itself and not what it points to.
pub(super) fn status(parent: &OwnedFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => Ok(Some(status)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// A directory that has this name, and no link to one.
pub(super) fn open_below(parent: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    Ok(openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
}

/// The times of a file that was last changed then.
pub(super) fn times(mtime: Mtime) -> Timestamps {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: time }
}

/// A file to write into, that was not there.
pub(super) fn create(parent: &OwnedFd, name: &[u8]) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Nothing there, or no directory; a link that leads nowhere, too.
fn is_missing(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR))
}

fn remove(parent: &OwnedFd, name: &[u8], kind: FileType) -> io::Result<()> {
    if kind != FileType::Directory {
        return Ok(unlinkat(parent, name, AtFlags::empty())?);
    }
    clear(&open_below(parent, name)?)?;
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

fn clear(directory: &OwnedFd) -> io::Result<()> {
    each(directory, |name, kind| remove(directory, name, kind))
}

fn settle(directory: &OwnedFd, known: &HashMap<u64, Directory>) -> io::Result<()> {
    each(directory, |name, kind| match kind {
        FileType::Directory => settle(&open_below(directory, name)?, known),
        _ => Ok(()),
    })?;
    let mtime = known.get(&fstat(directory)?.st_ino).map(|directory| directory.mtime).unwrap_or_default();
    Ok(futimens(directory, &times(mtime))?)
}

/// Calls with the name and kind of everything in a directory. The nesting is bounded ([`DEEPEST`]), so calls may nest.
fn each(directory: &OwnedFd, mut call: impl FnMut(&[u8], FileType) -> io::Result<()>) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => match status(directory, name)? {
                Some(found) => FileType::from_raw_mode(found.st_mode),
                None => continue,
            },
            kind => kind,
        };
        call(name, kind)?;
    }
    Ok(())
}
