//! Files of our own on disk: there whole, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// What [`replace`] waits for the disk to have. A crash of this process undoes nothing of a file; a power cut does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Synced {
    /// Nothing: after a power cut there is no use for the file.
    No,
    /// The content before the name is: a power cut leaves the old file or the new one, and never half of one.
    Content,
    /// Both: a power cut leaves the new one.
    Name,
}

/// Puts a file of these bytes in the place of what is there, readable by its owner alone (mode 0600). It is written as
/// `aside` first, which is in the same directory and which nobody else writes at the time.
///
/// # Errors
/// The kernel's; the old file is there still.
pub(crate) fn replace(path: &Path, aside: &Path, bytes: &[u8], synced: Synced) -> io::Result<()> {
    // Not into what somebody left there, who may have it open.
    remove(aside)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(aside)?;
    file.write_all(bytes)?;
    if synced != Synced::No {
        file.sync_data()?;
    }
    fs::rename(aside, path)?;
    match path.parent() {
        Some(directory) if synced == Synced::Name => File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

/// Removes a file or link; that there is none is fine.
///
/// # Errors
/// The kernel's.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Removes a file, or a directory with all that is in it; that there is none is fine.
///
/// # Errors
/// The kernel's.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => remove(path),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_replaced_file_is_whole_and_its_owners_alone() {
        let root = tempfile::tempdir().unwrap();
        let (path, aside) = (root.path().join("a"), root.path().join("a.new"));
        fs::write(&aside, "somebody left this, and may read it").unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o666)).unwrap();
        for (text, synced) in [("one", Synced::No), ("two", Synced::Content), ("three", Synced::Name)] {
            replace(&path, &aside, text.as_bytes(), synced).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(!aside.exists());
        }
    }

    #[test]
    fn a_link_left_aside_is_not_written_through() {
        let root = tempfile::tempdir().unwrap();
        let (path, aside, other) = (root.path().join("a"), root.path().join("a.new"), root.path().join("other"));
        fs::write(&other, "theirs").unwrap();
        symlink(&other, &aside).unwrap();
        replace(&path, &aside, b"ours", Synced::No).unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap(), fs::read_to_string(&other).unwrap()),
            ("ours".into(), "theirs".into())
        );
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        fs::write(&path, "old").unwrap();
        replace(&path, &root.path().join("absent/a.new"), b"new", Synced::No).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    }

    #[test]
    fn what_is_not_there_may_be_removed() {
        let root = tempfile::tempdir().unwrap();
        let (file, tree) = (root.path().join("f"), root.path().join("t"));
        fs::write(&file, "").unwrap();
        fs::create_dir_all(tree.join("in")).unwrap();
        remove(&tree).unwrap_err();
        for _ in 0..2 {
            remove(&file).unwrap();
            remove_tree(&tree).unwrap();
        }
        fs::write(&file, "").unwrap();
        remove_tree(&file).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
