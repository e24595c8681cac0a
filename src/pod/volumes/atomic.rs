//! Writes the files of a volume so that a reader sees the old content or the new one, never a mixture.
//!
//! ```text
//! volume/
//!   ..2026_11_21_07_00_00.123/   the content
//!   ..data -> ..2026_11_21_07_00_00.123
//!   name   -> ..data/name        what the container opens
//! ```
//!
//! An update writes a second directory and swings `..data` over to it by one rename. The names are those of the
//! Kubernetes volume contract; programs watch `..data`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::payload::{FileContent, Payload};

const DATA: &str = "..data";
const DATA_NEXT: &str = "..data_tmp";
/// Bits a group gets on files of a volume with an fsGroup: these volumes are read-only.
const GROUP_FILE: u32 = 0o440;
/// Bits of directories of a volume with an fsGroup: new entries inherit the group.
const GROUP_DIR: u32 = 0o2550;

/// Makes the volume at `dir` (made if missing) contain exactly `payload`; true if that changed anything. With a
/// `group`, everything belongs to it and is readable by it.
pub(super) fn write(dir: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    make_dir(dir)?;
    let current = current(dir)?;
    let wanted = with_group(payload, group);
    if let Some(current) = &current
        && read(&dir.join(current))? == wanted
    {
        clean(dir, Some(current), &wanted)?;
        return Ok(false);
    }
    let next = new_name(dir)?;
    let content = dir.join(&next);
    make_dir(&content)?;
    for (path, file) in &wanted {
        write_file(&content, path, file, group)?;
    }
    if let Some(group) = group {
        own_dirs(&content, group)?;
        own_dir(dir, group)?;
    }
    let link = dir.join(DATA_NEXT);
    remove(&link)?;
    symlink(&next, &link)?;
    fs::rename(&link, dir.join(DATA))?;
    clean(dir, Some(&next), &wanted)?;
    Ok(true)
}

/// A file of the volume as the container sees it.
pub(super) fn read_file(dir: &Path, path: &str) -> io::Result<Option<Vec<u8>>> {
    match fs::read(dir.join(DATA).join(path)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn with_group(payload: &Payload, group: Option<u32>) -> Payload {
    let mut payload = payload.clone();
    if group.is_some() {
        payload.values_mut().for_each(|file| file.mode |= GROUP_FILE);
    }
    payload
}

/// Name of the directory that `..data` points to, if it is one of ours.
fn current(dir: &Path) -> io::Result<Option<String>> {
    match fs::read_link(dir.join(DATA)) {
        Ok(target) => {
            let name = target.to_string_lossy().into_owned();
            Ok((name.starts_with("..") && !name.contains('/') && name != "..").then_some(name))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is there now, in the form of a payload. What cannot be ours reads as an empty name and so differs.
fn read(content: &Path) -> io::Result<Payload> {
    let mut found = Payload::new();
    let mut pending = vec![(content.to_owned(), String::new())];
    while let Some((dir, prefix)) = pending.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(not_ours()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                pending.push((entry.path(), format!("{path}/")));
            } else if metadata.is_file() {
                let user = Some(metadata.uid()).filter(|uid| *uid != 0);
                let file = FileContent { bytes: fs::read(entry.path())?, mode: metadata.mode() & 0o777, user };
                found.insert(path, file);
            } else {
                return Ok(not_ours());
            }
        }
    }
    Ok(found)
}

fn not_ours() -> Payload {
    Payload::from([(String::new(), FileContent { bytes: Vec::new(), mode: 0, user: None })])
}

fn new_name(dir: &Path) -> io::Result<String> {
    let now = Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S").to_string();
    // Two updates within a second, or a clock set back, must not meet.
    (0_u32..10_000)
        .map(|number| format!("{now}.{number:04}"))
        .find(|name| !dir.join(name).exists())
        .ok_or_else(|| io::Error::other("too many updates within a second"))
}

fn make_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    // Whatever the umask says.
    let mode = fs::symlink_metadata(dir)?.mode();
    if mode & 0o755 != 0o755 {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode | 0o755))?;
    }
    Ok(())
}

fn write_file(content: &Path, path: &str, file: &FileContent, group: Option<u32>) -> io::Result<()> {
    let target = content.join(path);
    if let Some(parent) = target.parent() {
        make_dir(parent)?;
    }
    fs::write(&target, &file.bytes)?;
    if file.user.is_some() || group.is_some() {
        lchown(&target, file.user, group)?;
    }
    fs::set_permissions(&target, fs::Permissions::from_mode(file.mode))
}

fn own_dirs(dir: &Path, group: u32) -> io::Result<()> {
    own_dir(dir, group)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            own_dirs(&entry.path(), group)?;
        }
    }
    Ok(())
}

fn own_dir(dir: &Path, group: u32) -> io::Result<()> {
    lchown(dir, None, Some(group))?;
    let mode = fs::symlink_metadata(dir)?.mode();
    fs::set_permissions(dir, fs::Permissions::from_mode(mode | GROUP_DIR))
}

/// Makes the links that containers open, and removes those of former content together with that content, also what a
/// crash has left.
fn clean(dir: &Path, current: Option<&str>, payload: &Payload) -> io::Result<()> {
    let tops: BTreeSet<&str> = payload.keys().filter_map(|path| path.split('/').next()).collect();
    for top in &tops {
        let (link, target) = (dir.join(top), PathBuf::from(DATA).join(top));
        if fs::read_link(&link).ok().as_ref() != Some(&target) {
            remove(&link)?;
            symlink(target, link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name != DATA && Some(&*name) != current && !tops.contains(&*name) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a file, a link (not what it points to) or a directory; Ok if there is none.
fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        let file = |text: &str| FileContent { bytes: text.into(), mode: 0o644, user: None };
        files.iter().map(|(path, text)| ((*path).to_owned(), file(text))).collect()
    }

    fn seen(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| !name.starts_with("..")).collect();
        names.sort();
        names
    }

    #[test]
    fn content_appears_changes_and_goes() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("v");
        assert!(write(&dir, &payload(&[("a", "1"), ("d/e", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.join("d/e")).unwrap(), "2");
        let data = fs::read_link(dir.join(DATA)).unwrap();
        assert!(!write(&dir, &payload(&[("a", "1"), ("d/e", "2")]), None).unwrap());
        assert_eq!(fs::read_link(dir.join(DATA)).unwrap(), data);
        assert!(write(&dir, &payload(&[("a", "3"), ("b", "4")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert_eq!(seen(&dir), ["a", "b"]);
        assert!(write(&dir, &Payload::new(), None).unwrap());
        assert!(seen(&dir).is_empty());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    }

    #[test]
    fn a_changed_mode_is_a_change_and_umask_does_not_matter() {
        let root = tempfile::tempdir().unwrap();
        let mut wanted = payload(&[("a", "1")]);
        write(root.path(), &wanted, None).unwrap();
        wanted.get_mut("a").unwrap().mode = 0o666;
        assert!(write(root.path(), &wanted, None).unwrap());
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().mode() & 0o777, 0o666);
    }

    #[test]
    fn leftovers_of_a_crash_are_cleaned_away() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        write(dir, &payload(&[("a", "1")]), None).unwrap();
        fs::create_dir(dir.join("..2020_01_01_00_00_00.0000")).unwrap();
        symlink("..nowhere", dir.join(DATA_NEXT)).unwrap();
        symlink("/etc", dir.join("foreign")).unwrap();
        assert!(!write(dir, &payload(&[("a", "1")]), None).unwrap());
        assert_eq!(fs::read_dir(dir).unwrap().count(), 3);
        assert!(Path::new("/etc/passwd").exists());
        // A link that points nowhere, as if the content had been lost.
        fs::remove_dir_all(dir.join(current(dir).unwrap().unwrap())).unwrap();
        assert!(write(dir, &payload(&[("a", "1")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
    }

    #[test]
    fn a_group_may_read_everything() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root to change groups");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let mut wanted = payload(&[("d/e", "2")]);
        wanted.get_mut("d/e").unwrap().mode = 0o400;
        wanted.get_mut("d/e").unwrap().user = Some(1234);
        assert!(write(root.path(), &wanted, Some(4321)).unwrap());
        assert!(!write(root.path(), &wanted, Some(4321)).unwrap());
        let file = fs::metadata(root.path().join("d/e")).unwrap();
        assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (1234, 4321, 0o440));
        let dir = fs::metadata(root.path().join("d")).unwrap();
        assert_eq!((dir.gid(), dir.mode() & 0o2550), (4321, 0o2550));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_sequence_ends_in_the_last_content(
            contents in proptest::collection::vec(proptest::collection::btree_map("[a-c]", "[x-z]{0,2}", 0..4), 1..5),
        ) {
            let root = tempfile::tempdir().unwrap();
            for content in &contents {
                let files: Vec<_> = content.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
                write(root.path(), &payload(&files), None).unwrap();
                for (path, text) in &files {
                    prop_assert_eq!(&fs::read_to_string(root.path().join(path)).unwrap(), text);
                }
                prop_assert_eq!(seen(root.path()), content.keys().cloned().collect::<Vec<_>>());
            }
        }
    }
}
