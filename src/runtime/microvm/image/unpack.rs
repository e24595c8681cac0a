//! Applies the layers of an image, in order, to a directory tree; the rules are those of the OCI image specification
//! ("Image Layer Filesystem Changeset").
//!
//! A whiteout hides what lower layers have and never what its own layer brings, wherever in the layer it stands. So each
//! layer above the first is read twice: once for its whiteouts, once for everything else.
//!
//! What a layer may not do: name a path with `..`, link to what is not in the image, bring devices (those below `/dev` are
//! left out, since a container gets a `/dev` of its own; others fail the image), bring attributes of the kernel's own
//! (`trusted.overlay.*` would steer the overlay above it). A symbolic link may point anywhere: it is text until a
//! process in the container follows it, with the container's root as its root.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr, futimens, linkat,
    mknodat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::Limits;
use super::archive::{Archive, Entry, Kind};
use super::error::LayerError;
use super::layer::{self, Blob};
use super::tree::{Tree, create, open_below, status, times};

/// Begins the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// Hides all of its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins the names by which AUFS keeps its own records.
const AUFS: &[u8] = b".wh..wh.";
/// Bytes copied at once.
const CHUNK: usize = 128 << 10;

/// Unpacks `layers`, the lowest first, into the empty directory `root`. `digests` are those of their content without
/// compression (`rootfs.diff_ids` of the image's config). Ends early once `cancelled` is set.
///
/// # Errors
/// The number of the layer, from 0, and what is wrong with it. The tree is then good for nothing.
pub(super) fn unpack(
    layers: &[Blob],
    digests: &[String],
    root: &Path,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<(), (usize, LayerError)> {
    let tree = Tree::at(root, limits.entries).map_err(|error| (0, LayerError::write(b"/", error)))?;
    // Beside the files there are headers and padding, of an empty file they are all; and files that others hide.
    let left = limits.unpacked.saturating_mul(4);
    let mut unpacking = Unpacking { tree, limits, cancelled, entries: 0, bytes: 0, left, chunk: vec![0; CHUNK] };
    for (at, (blob, digest)) in layers.iter().zip(digests).enumerate() {
        unpacking.layer(blob, digest, at > 0).map_err(|error| (at, error))?;
    }
    let last = layers.len().saturating_sub(1);
    unpacking.tree.settle().map_err(|error| (last, LayerError::write(b"/", error)))
}

struct Unpacking<'a> {
    tree: Tree,
    limits: &'a Limits,
    cancelled: &'a AtomicBool,
    entries: u64,
    bytes: u64,
    /// Bytes that may still come out of layers: what is empty but well compressed costs time all the same.
    left: u64,
    chunk: Vec<u8>,
}

impl Unpacking<'_> {
    fn layer(&mut self, blob: &Blob, digest: &str, has_lower: bool) -> Result<(), LayerError> {
        if has_lower {
            let mut archive = Archive::new(layer::open(blob, self.left)?);
            while let Some(entry) = archive.next()? {
                self.go_on()?;
                self.hide(&entry)?;
            }
        }
        let mut content = layer::open(blob, self.left)?;
        let mut archive = Archive::new(&mut content);
        while let Some(entry) = archive.next()? {
            self.go_on()?;
            self.count(&entry)?;
            self.put(&entry, &mut archive)?;
        }
        self.left = content.verify(digest)?;
        Ok(())
    }

    fn go_on(&self) -> Result<(), LayerError> {
        if self.cancelled.load(Ordering::Relaxed) { Err(LayerError::Cancelled) } else { Ok(()) }
    }

    fn count(&mut self, entry: &Entry) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(LayerError::TooMuch { what: "files", limit: self.limits.entries });
        }
        self.bytes = self.bytes.saturating_add(entry.size);
        if self.bytes > self.limits.unpacked {
            return Err(LayerError::TooMuch { what: "bytes of files", limit: self.limits.unpacked });
        }
        Ok(())
    }

    /// The first reading: removes what a whiteout hides.
    fn hide(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let parts = parts(&entry.path)?;
        let Some((name, parent)) = parts.split_last() else { return Ok(()) };
        let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(()) };
        if *name != OPAQUE && name.starts_with(AUFS) {
            return Ok(());
        }
        let failed = |error| LayerError::write(&entry.path, error);
        let directory = match self.tree.open_plain(parent) {
            Ok(directory) => directory,
            // Nothing is there; or a link, which this layer's own directory takes the place of.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) => {
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        if *name == OPAQUE {
            return self.tree.clear(&directory).map_err(failed);
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::refused(&entry.path, "hides no name"));
        }
        self.tree.remove(&directory, hidden).map_err(failed)
    }

    /// The second reading: makes what is no whiteout.
    fn put<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), LayerError> {
        let parts = parts(&entry.path)?;
        let failed = |error: std::io::Error| LayerError::write(&entry.path, error);
        let Some((name, parent)) = parts.split_last() else {
            if entry.kind != Kind::Directory {
                return Err(LayerError::refused(&entry.path, "is the root, and no directory"));
            }
            let root = self.tree.open(&[]).map_err(failed)?;
            return self.finish_directory(&root, entry);
        };
        if name.starts_with(WHITEOUT) {
            return Ok(());
        }
        if entry.kind == Kind::Device {
            let in_dev = parts.first() == Some(&b"dev".as_slice());
            return if in_dev { Ok(()) } else { Err(LayerError::refused(&entry.path, "is a device")) };
        }
        let directory = self.tree.make(parent).map_err(failed)?;
        match entry.kind {
            Kind::File => self.file(&directory, name, entry, archive),
            Kind::Directory => self.directory(&directory, name, entry),
            Kind::Symlink => self.symlink(&directory, name, entry).map_err(failed),
            Kind::HardLink => self.hard_link(&directory, name, entry),
            Kind::Fifo => self.fifo(&directory, name, entry).map_err(failed),
            Kind::Device => Ok(()),
        }
    }

    fn file<R: Read>(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), LayerError> {
        let failed = |error: std::io::Error| LayerError::write(&entry.path, error);
        self.tree.remove(directory, name).map_err(failed)?;
        let mut file = create(directory, name).map_err(failed)?;
        match &entry.extents {
            None => self.copy(archive, &mut file, entry)?,
            Some(extents) => {
                for extent in extents {
                    file.seek(SeekFrom::Start(extent.offset)).map_err(failed)?;
                    let mut piece = archive.by_ref().take(extent.length);
                    self.copy(&mut piece, &mut file, entry)?;
                }
                file.set_len(entry.size).map_err(failed)?;
            }
        }
        finish(&file, entry)?;
        futimens(&file, &times(entry.mtime)).map_err(|errno| failed(errno.into()))
    }

    fn copy(&mut self, from: &mut impl Read, to: &mut File, entry: &Entry) -> Result<(), LayerError> {
        loop {
            self.go_on()?;
            let read = from.read(&mut self.chunk).map_err(LayerError::Read)?;
            if read == 0 {
                return Ok(());
            }
            to.write_all(&self.chunk[..read]).map_err(|error| LayerError::write(&entry.path, error))?;
        }
    }

    fn directory(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), LayerError> {
        let failed = |error: std::io::Error| LayerError::write(&entry.path, error);
        let found = status(parent, name).map_err(failed)?;
        let is_there = found.is_some_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory);
        let directory = if is_there {
            open_below(parent, name).map_err(failed)?
        } else {
            self.tree.make_below(parent, name).map_err(failed)?
        };
        self.finish_directory(&directory, entry)
    }

    fn finish_directory(&mut self, directory: &OwnedFd, entry: &Entry) -> Result<(), LayerError> {
        finish(directory, entry)?;
        self.tree.note_mtime(directory, entry.mtime).map_err(|error| LayerError::write(&entry.path, error))
    }

    fn symlink(&mut self, directory: &OwnedFd, name: &[u8], entry: &Entry) -> std::io::Result<()> {
        self.tree.remove(directory, name)?;
        symlinkat(entry.link.as_slice(), directory, name)?;
        let (uid, gid) = owner(entry);
        chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(utimensat(directory, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// A second name for a file of this image. Its first may lie in a lower layer.
    fn hard_link(&mut self, directory: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), LayerError> {
        let refused = |why| LayerError::refused(&entry.path, why);
        let failed = |error: std::io::Error| LayerError::write(&entry.path, error);
        let target = parts(&entry.link)?;
        let Some((target_name, target_parent)) = target.split_last() else {
            return Err(refused("is a hard link to the root"));
        };
        let absent = "is a hard link to a file that is not there";
        let target_directory = self.tree.open(target_parent).map_err(|_| refused(absent))?;
        let target = status(&target_directory, target_name).map_err(failed)?.ok_or_else(|| refused(absent))?;
        if FileType::from_raw_mode(target.st_mode) == FileType::Directory {
            return Err(refused("is a hard link to a directory"));
        }
        if status(directory, name).map_err(failed)?.is_some_and(|found| found.st_ino == target.st_ino) {
            return Ok(());
        }
        self.tree.remove(directory, name).map_err(failed)?;
        linkat(&target_directory, *target_name, directory, name, AtFlags::empty()).map_err(|errno| match errno {
            // Removing what had the name took the target along.
            Errno::NOENT => refused(absent),
            errno => failed(errno.into()),
        })
    }

    fn fifo(&mut self, directory: &OwnedFd, name: &[u8], entry: &Entry) -> std::io::Result<()> {
        self.tree.remove(directory, name)?;
        mknodat(directory, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let (uid, gid) = owner(entry);
        chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        chmodat(directory, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
        Ok(utimensat(directory, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Owner, rights and attributes of a file or directory, in the order in which none undoes another.
fn finish(file: impl AsFd, entry: &Entry) -> Result<(), LayerError> {
    let failed = |errno: Errno| LayerError::write(&entry.path, errno);
    let (uid, gid) = owner(entry);
    fchown(&file, uid, gid).map_err(failed)?;
    fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(failed)?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_for_the_image(name)) {
        fsetxattr(&file, name.as_slice(), value, XattrFlags::empty()).map_err(failed)?;
    }
    Ok(())
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
}

/// Capabilities of a program, and what users keep. The rest is for the kernel and its file systems: an access list or a
/// security label of another host means nothing here, and overlayfs would obey its own.
fn is_for_the_image(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

/// The components of an entry's path. A leading slash means the image's root, as everything does.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, LayerError> {
    let parts: Vec<_> = path.split(|byte| *byte == b'/').filter(|part| !matches!(part, &b"" | &b".")).collect();
    if parts.contains(&b"..".as_slice()) {
        return Err(LayerError::refused(path, "leads out of its directory"));
    }
    if path.contains(&0) {
        return Err(LayerError::refused(path, "holds a zero byte"));
    }
    Ok(parts)
}

#[cfg(test)]
pub(super) mod tests;
