//! Volumes that are directories of the host: `hostPath` and `emptyDir`.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, chownat, fstat, openat};
use rustix::io::Errno;

use super::mounts;
use crate::quantity::Quantity;

/// An emptyDir belongs to whoever the containers run as.
const EMPTY_DIR_MODE: u32 = 0o777;
/// One in memory is sticky besides, as a fresh tmpfs is.
const MEMORY_DIR_MODE: u32 = 0o1777;
/// What a group gets on an emptyDir with an fsGroup: it may write, and new files inherit it.
const GROUP_DIR: u32 = 0o2770;

/// Checks a hostPath, making it where its type says so.
///
/// # Errors
/// In the kubelet's words.
pub(super) fn host_path(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("hostPath {:?} must be absolute and without \"..\"", source.path));
    }
    let metadata = || fs::metadata(path);
    let check = |holds: fn(&fs::Metadata) -> bool, what: &str| match metadata() {
        Ok(found) if holds(&found) => Ok(()),
        _ => Err(format!("hostPath type check failed: {} is not {what}", source.path)),
    };
    let failed = |error: io::Error| format!("failed to make hostPath {}: {error}", source.path);
    match source.type_.as_deref().unwrap_or_default() {
        // Unchecked: whatever is there, and a directory if nothing is, as container runtimes do.
        "" => match metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_dir(path).map_err(failed),
            _ => Ok(()),
        },
        "DirectoryOrCreate" => {
            if metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                make_dir(path).map_err(failed)?;
            }
            check(fs::Metadata::is_dir, "a directory")
        }
        "Directory" => check(fs::Metadata::is_dir, "a directory"),
        "FileOrCreate" => {
            if metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                make_file(path).map_err(failed)?;
            }
            check(fs::Metadata::is_file, "a file")
        }
        "File" => check(fs::Metadata::is_file, "a file"),
        "Socket" => check(|found| found.file_type().is_socket(), "a socket file"),
        "CharDevice" => check(|found| found.file_type().is_char_device(), "a character device"),
        "BlockDevice" => check(|found| found.file_type().is_block_device(), "a block device"),
        other => Err(format!("{other:?} is an invalid volume type")),
    }
}

/// Makes an emptyDir, or finds the one made before: a restart must not touch what a Pod wrote, nor the mode it gave it.
pub(super) fn empty_dir(
    dir: &Path,
    source: &EmptyDirVolumeSource,
    memory: Option<Quantity>,
    group: Option<u32>,
) -> io::Result<()> {
    let in_memory = source.medium.as_deref() == Some("Memory");
    let usual = if in_memory { MEMORY_DIR_MODE } else { EMPTY_DIR_MODE };
    let mode = source.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(usual);
    let mode = if group.is_some() { mode | GROUP_DIR } else { mode };
    if in_memory {
        make_dir(dir)?;
        if mounts::is_mount_point(dir)? {
            return Ok(());
        }
        let size = memory_size(source, memory).map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))?;
        let size = size.map(|bytes| format!(",size={bytes}")).unwrap_or_default();
        let group = group.map(|group| format!(",gid={group}")).unwrap_or_default();
        return mounts::mount_tmpfs(dir, &format!("mode={mode:o}{size}{group}"));
    }
    if dir.is_dir() {
        return Ok(());
    }
    // Made beside its place and renamed, so that what has the name also has its mode and owner.
    let mut beside = dir.as_os_str().to_owned();
    beside.push(".new");
    make_dir(Path::new(&beside))?;
    lchown(&beside, None, group)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(mode))?;
    fs::rename(&beside, dir)
}

/// Gives everything at and below `dir` to the group: it may read and write files, enter directories, and what is made
/// there later inherits it. Other Pods may be at work in there, so nothing is looked up twice and no link is followed.
pub(super) fn own_tree(dir: &Path, group: u32) -> io::Result<()> {
    let root = openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    own(&root, group)?;
    let mut pending = vec![root];
    while let Some(parent) = pending.pop() {
        for entry in Dir::read_from(&parent)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let child = match openat(&parent, name, flags, Mode::empty()) {
                Err(Errno::NOENT) => continue,
                child => child?,
            };
            own(&child, group)?;
            if FileType::from_raw_mode(fstat(&child)?.st_mode) == FileType::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                pending.push(openat(&child, ".", flags, Mode::empty())?);
            }
        }
    }
    Ok(())
}

fn own(file: &OwnedFd, group: u32) -> io::Result<()> {
    let metadata = fstat(file)?;
    let kind = FileType::from_raw_mode(metadata.st_mode);
    let wanted = match kind {
        FileType::Symlink => None,
        FileType::Directory => Some(metadata.st_mode | 0o2770),
        _ => Some(metadata.st_mode | 0o660),
    };
    if metadata.st_gid != group {
        chownat(file, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
    }
    // A file that is open by its path only has no other name.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match wanted.map(|mode| mode & 0o7777) {
        Some(mode) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
        None => Ok(()),
    }
}

/// The least of what the volume, the Pod and the node allow, in bytes.
fn memory_size(source: &EmptyDirVolumeSource, memory: Option<Quantity>) -> Result<Option<i64>, String> {
    let limit = source.size_limit.as_ref().map(Quantity::try_from).transpose().map_err(|error| error.to_string())?;
    let limit = limit.filter(|limit| !limit.is_zero());
    Ok([limit, memory.filter(|memory| !memory.is_zero())].into_iter().flatten().min().map(Quantity::value))
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn make_file(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    OpenOptions::new().write(true).create_new(true).mode(0o644).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::super::tests::in_a_mount_namespace;
    use super::*;

    fn check(path: &Path, kind: &str) -> Result<(), String> {
        host_path(&HostPathVolumeSource { path: path.display().to_string(), type_: Some(kind.to_owned()) })
    }

    #[test]
    fn every_type_is_checked_and_the_creating_ones_create() {
        let root = tempfile::tempdir().unwrap();
        let (dir, file, socket) = (root.path().join("d"), root.path().join("x/f"), root.path().join("s"));
        let _listener = UnixListener::bind(&socket).unwrap();
        let message = |path: &Path, what| format!("hostPath type check failed: {} is not {what}", path.display());
        for (path, kind, what) in [
            (&dir, "Directory", "a directory"),
            (&file, "File", "a file"),
            (&file, "Socket", "a socket file"),
            (&file, "CharDevice", "a character device"),
            (&file, "BlockDevice", "a block device"),
        ] {
            assert_eq!(check(path, kind).unwrap_err(), message(path, what));
        }
        check(&dir, "DirectoryOrCreate").unwrap();
        check(&file, "FileOrCreate").unwrap();
        check(&dir, "Directory").unwrap();
        check(&file, "File").unwrap();
        check(&socket, "Socket").unwrap();
        check(Path::new("/dev/null"), "CharDevice").unwrap();
        assert_eq!(check(&dir, "File").unwrap_err(), message(&dir, "a file"));
        assert_eq!(check(&file, "DirectoryOrCreate").unwrap_err(), message(&file, "a directory"));
        check(&root.path().join("new"), "").unwrap();
        assert!(root.path().join("new").is_dir());
        assert!(check(&dir, "Nonsense").is_err());
        assert!(check(Path::new("/a/../b"), "").is_err());
        assert!(check(Path::new("a"), "").is_err());
    }

    #[test]
    fn an_empty_dir_keeps_its_content() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        empty_dir(&dir, &EmptyDirVolumeSource::default(), None, None).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o777);
        fs::write(dir.join("f"), "1").unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        empty_dir(&dir, &EmptyDirVolumeSource::default(), None, None).unwrap();
        assert!(dir.join("f").exists());
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn a_tree_becomes_the_groups_and_links_lead_nowhere() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root to change groups");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let (volume, outside) = (root.path().join("v"), root.path().join("outside"));
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::write(volume.join("a/b/f"), "1").unwrap();
        fs::set_permissions(volume.join("a/b/f"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&outside, "1").unwrap();
        std::os::unix::fs::symlink(&outside, volume.join("link")).unwrap();
        let before = fs::metadata(&outside).unwrap();
        own_tree(&volume, 4321).unwrap();
        own_tree(&volume, 4321).unwrap();
        let seen = |path: &str| fs::symlink_metadata(volume.join(path)).map(|m| (m.gid(), m.mode() & 0o7777)).unwrap();
        assert_eq!(seen(""), (4321, 0o2775));
        assert_eq!(seen("a/b"), (4321, 0o2775));
        assert_eq!(seen("a/b/f"), (4321, 0o660));
        assert_eq!(seen("link").0, 4321);
        let after = fs::metadata(&outside).unwrap();
        assert_eq!((before.gid(), before.mode()), (after.gid(), after.mode()));
    }

    #[test]
    fn a_memory_dir_is_a_tmpfs_of_the_least_size() {
        in_a_mount_namespace(|| {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("m");
            let source: EmptyDirVolumeSource =
                serde_json::from_value(json!({"medium": "Memory", "sizeLimit": "8Mi"})).unwrap();
            for _ in 0..2 {
                empty_dir(&dir, &source, Some("1Mi".parse().unwrap()), Some(4321)).unwrap();
            }
            let size = nix::sys::statfs::statfs(&dir).unwrap();
            assert_eq!(size.blocks() * u64::try_from(size.block_size()).unwrap(), 1 << 20);
            let metadata = fs::metadata(&dir).unwrap();
            assert_eq!((metadata.gid(), metadata.mode() & 0o7777), (4321, 0o3777));
            mounts::remove_tree(&dir).unwrap();
        });
    }

    #[test]
    fn memory_is_bounded_by_what_is_known() {
        let source = |limit| serde_json::from_value(json!({"medium": "Memory", "sizeLimit": limit})).unwrap();
        assert_eq!(memory_size(&source(Some("2Ki")), None), Ok(Some(2048)));
        assert_eq!(memory_size(&source(Some("2Ki")), Some(Quantity::from_units(5))), Ok(Some(5)));
        assert_eq!(memory_size(&source(None), None), Ok(None));
        assert!(memory_size(&source(Some("2Kib")), None).is_err());
    }
}
