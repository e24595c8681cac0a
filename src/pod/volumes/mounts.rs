//! The mounts that volumes need, and the removal of a Pod's directories.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// This thread's view; `self` would be that of the process's first thread.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// Whether files at this path are kept in memory only.
pub(super) fn is_tmpfs(path: &Path) -> bool {
    statfs(path).is_ok_and(|statistics| statistics.filesystem_type() == TMPFS_MAGIC)
}

/// Whether something is mounted exactly there.
pub(super) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let path = fs::canonicalize(path)?;
    Ok(mount_points()?.contains(&path))
}

/// Mounts a tmpfs; `options` as for mount(8).
pub(super) fn mount_tmpfs(target: &Path, options: &str) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(options))?)
}

/// Unmounts what is mounted at or below `dir`, then removes `dir` with everything in it. Links are removed, not
/// followed. Nothing is removed while something is still mounted there, so no foreign file system is emptied. Ok if
/// there is no such directory.
pub(super) fn remove_tree(dir: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dir) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return fs::remove_file(dir),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let real = fs::canonicalize(dir)?;
    let below = |points: Vec<PathBuf>| points.into_iter().filter(|point| point.starts_with(&real)).collect::<Vec<_>>();
    // In the order they were made, so the last must go first.
    for point in below(mount_points()?).iter().rev() {
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    if let Some(left) = below(mount_points()?).first() {
        return Err(io::Error::other(format!("{} is still mounted", left.display())));
    }
    match fs::remove_dir_all(&real) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Every place where something is mounted, in the order it was.
pub(super) fn mount_points() -> io::Result<Vec<PathBuf>> {
    Ok(parse_mount_points(&fs::read(MOUNTINFO)?))
}

/// The fifth field of each line of proc_pid_mountinfo(5).
fn parse_mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    points.map(|point| PathBuf::from(std::ffi::OsString::from_vec(unescaped(point)))).collect()
}

/// Blanks, tabs, newlines and backslashes are written as three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *byte == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                plain.push(code);
                rest = &after[3..];
            }
            None => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::tests::in_a_mount_namespace;
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let text =
            b"36 35 98:0 / /a\\040b\\134c rw,noatime shared:1 - tmpfs tmpfs rw\n37 36 0:1 / /x\\9 rw - ext4 d rw\n\n";
        assert_eq!(parse_mount_points(text), [PathBuf::from("/a b\\c"), PathBuf::from("/x\\9")]);
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "1").unwrap();
        let pod = root.path().join("pod");
        fs::create_dir_all(pod.join("volumes")).unwrap();
        symlink(&outside, pod.join("volumes/link")).unwrap();
        remove_tree(&pod).unwrap();
        remove_tree(&pod).unwrap();
        assert!(!pod.exists() && outside.join("precious").exists());
        symlink(&outside, &pod).unwrap();
        remove_tree(&pod).unwrap();
        assert!(fs::symlink_metadata(&pod).is_err() && outside.join("precious").exists());
    }

    #[test]
    fn what_is_mounted_below_is_unmounted_first() {
        in_a_mount_namespace(|| {
            let root = tempfile::tempdir().unwrap();
            let outside = root.path().join("outside");
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("precious"), "1").unwrap();
            let pod = root.path().join("pod dir");
            let inner = pod.join("a/b");
            fs::create_dir_all(&inner).unwrap();
            mount_tmpfs(&inner, "size=1m").unwrap();
            assert!(is_tmpfs(&inner) && is_mount_point(&inner).unwrap());
            fs::create_dir(inner.join("bind")).unwrap();
            let bind = inner.join("bind");
            mount(Some(&outside), &bind, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            remove_tree(&pod).unwrap();
            assert!(!pod.exists() && outside.join("precious").exists());
        });
    }
}
