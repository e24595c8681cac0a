//! Files that a machine is made of: kernel and initramfs.
//!
//! What a Pod names must lie beneath one of the node's asset directories. The kernel itself holds the look-up to that
//! (`openat2` with `RESOLVE_BENEATH`), so neither `..` nor a link leads out, whatever changes while it looks. From then
//! on the open file is used and never its name.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::error::{MachineError, Result};

/// An open, regular file that is only read.
#[derive(Clone, Debug)]
pub struct Asset {
    path: PathBuf,
    file: Arc<File>,
}

/// The directories beneath which a Pod may name files; none unless the node was told some.
#[derive(Clone, Debug, Default)]
pub struct AssetDirs(Vec<PathBuf>);

// === impl Asset ===

impl Asset {
    /// A file that the node itself names.
    ///
    /// # Errors
    /// [`MachineError::File`] if it cannot be opened, [`MachineError::Refused`] if it is no regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let file = opened.map_err(|errno| MachineError::file("open", path)(errno.into()))?;
        Self::of(path, File::from(file))
    }

    /// The file of that name right in a directory that a VMM may write to; a link is none.
    pub(super) fn open_beneath(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let opened = File::open(dir).and_then(|dir| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            Ok(openat2(&dir, name, flags, Mode::empty(), resolve)?)
        });
        Self::of(&path, File::from(opened.map_err(MachineError::file("open", &path))?))
    }

    fn of(path: &Path, file: File) -> Result<Self> {
        let metadata = file.metadata().map_err(MachineError::file("look at", path))?;
        if !metadata.is_file() {
            return Err(refused(path, "it is not a regular file"));
        }
        Ok(Self { path: path.to_owned(), file: Arc::new(file) })
    }

    /// As it was named; for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn shared_file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Changes whenever the file is replaced or written: device, inode, size and time of change.
    pub fn identity(&self) -> io::Result<String> {
        let seen = self.file.metadata()?;
        Ok(format!("{}:{}:{}:{}.{}", seen.dev(), seen.ino(), seen.size(), seen.mtime(), seen.mtime_nsec()))
    }
}

// === impl AssetDirs ===

impl AssetDirs {
    /// These directories, as absolute paths.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self(dirs)
    }

    /// A file that a Pod names by its absolute path.
    ///
    /// # Errors
    /// [`MachineError::Refused`] if no directory was allowed, it lies beneath none of them, a link leads out, or it is
    /// no regular file; [`MachineError::File`] if it cannot be opened.
    pub fn open(&self, path: &Path) -> Result<Asset> {
        if self.0.is_empty() {
            return Err(refused(path, "this node allows no files of Pods (--vm-asset-dirs)"));
        }
        let below = self.0.iter().find_map(|dir| Some((dir, path.strip_prefix(dir).ok()?)));
        let Some((dir, relative)) = below.filter(|(_, relative)| !relative.as_os_str().is_empty()) else {
            return Err(refused(path, "it does not lie beneath a directory of --vm-asset-dirs"));
        };
        let opened = File::open(dir).map_err(MachineError::file("open", dir))?;
        match open_beneath(&opened, relative) {
            Ok(file) => Asset::of(path, file),
            // The kernel's words for a path that would leave the directory, and for a link it was told not to follow.
            Err(error) if matches!(error.raw_os_error(), Some(EXDEV | ELOOP)) => {
                Err(refused(path, "it leads out of its directory of --vm-asset-dirs"))
            }
            Err(error) => Err(MachineError::file("open", path)(error)),
        }
    }
}

const EXDEV: i32 = nix::errno::Errno::EXDEV as i32;
const ELOOP: i32 = nix::errno::Errno::ELOOP as i32;

fn open_beneath(dir: &File, relative: &Path) -> io::Result<File> {
    // Not to wait for a writer if it is a FIFO; a regular file does not mind.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    Ok(File::from(openat2(dir, relative, flags, Mode::empty(), resolve)?))
}

fn refused(path: &Path, reason: &str) -> MachineError {
    MachineError::Refused { path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Place {
        _temporary: tempfile::TempDir,
        allowed: PathBuf,
        dirs: AssetDirs,
    }

    fn place() -> Place {
        let temporary = tempfile::tempdir().unwrap();
        let allowed = temporary.path().join("allowed");
        fs::create_dir_all(allowed.join("kernels")).unwrap();
        fs::create_dir(temporary.path().join("allowed-not")).unwrap();
        fs::write(allowed.join("kernels/vmlinux"), "kernel").unwrap();
        fs::write(temporary.path().join("secret"), "secret").unwrap();
        fs::write(temporary.path().join("allowed-not/secret"), "secret").unwrap();
        let dirs = AssetDirs::new(vec![allowed.clone()]);
        Place { _temporary: temporary, allowed, dirs }
    }

    fn reason(result: Result<Asset>) -> String {
        match result {
            Err(MachineError::Refused { reason, .. }) => reason,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_file_beneath_is_opened_also_by_a_link_that_stays_there() {
        let place = place();
        symlink("kernels/vmlinux", place.allowed.join("current")).unwrap();
        symlink("kernels", place.allowed.join("k")).unwrap();
        for name in ["kernels/vmlinux", "current", "k/vmlinux", "kernels/../kernels/vmlinux"] {
            let asset = place.dirs.open(&place.allowed.join(name)).unwrap();
            assert_eq!(io::read_to_string(asset.file()).unwrap(), "kernel", "{name}");
        }
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let place = place();
        symlink("../secret", place.allowed.join("up")).unwrap();
        symlink(place.allowed.join("../secret"), place.allowed.join("absolute")).unwrap();
        symlink("..", place.allowed.join("kernels/parent")).unwrap();
        symlink("/proc/self/root", place.allowed.join("magic")).unwrap();
        for name in
            ["../secret", "up", "absolute", "kernels/../../secret", "kernels/parent/../secret", "magic/etc/passwd"]
        {
            let reason = reason(place.dirs.open(&place.allowed.join(name)));
            assert!(reason.contains("leads out"), "{name}: {reason}");
        }
        for path in ["/etc/passwd", "etc/passwd", ""] {
            assert!(reason(place.dirs.open(Path::new(path))).contains("not lie beneath"), "{path}");
        }
        let sibling = place.allowed.with_file_name("allowed-not").join("secret");
        assert!(reason(place.dirs.open(&sibling)).contains("not lie beneath"));
        assert!(reason(place.dirs.open(&place.allowed)).contains("not lie beneath"));
    }

    #[test]
    fn only_regular_files_are_taken_and_none_without_a_directory() {
        let place = place();
        nix::unistd::mkfifo(&place.allowed.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(reason(place.dirs.open(&place.allowed.join("fifo"))).contains("regular"));
        assert!(reason(place.dirs.open(&place.allowed.join("kernels"))).contains("regular"));
        assert!(reason(AssetDirs::default().open(&place.allowed.join("kernels/vmlinux"))).contains("allows no files"));
        let missing = place.dirs.open(&place.allowed.join("missing"));
        assert!(matches!(missing, Err(MachineError::File { .. })), "{missing:?}");
    }

    #[test]
    fn another_file_is_another_asset() {
        let place = place();
        let path = place.allowed.join("kernels/vmlinux");
        let before = place.dirs.open(&path).unwrap();
        fs::rename(&path, place.allowed.join("old")).unwrap();
        fs::write(&path, "kernel").unwrap();
        let after = Asset::open(&path).unwrap();
        assert_ne!(before.identity().unwrap(), after.identity().unwrap());
    }
}
