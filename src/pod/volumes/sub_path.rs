//! `subPath` and `subPathExpr`: a part of a volume, bound to a place of its own for one container.
//!
//! What a container may write it may also turn into a symbolic link, at any moment, and lead the node anywhere with it.
//! So a path is resolved once, by the kernel, which refuses to leave the volume (openat2(2), `RESOLVE_BENEATH`; Linux 5.6
//! or newer), and what was opened is what is mounted, by its file descriptor. Links within the volume are followed.
//!
//! ```text
//! <root>/pods/<uid>/volume-subpaths/<volume>/<container>/<n>   the n-th entry of the container's volumeMounts
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, VolumeMount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;

use super::{VolumeError, VolumeManager, blocking, component, host_error, mounts, places};
use crate::pod::inputs::expand::expand;

/// The kernel gives up with EAGAIN where something is renamed while it resolves ".." of a link.
const TRIES: u32 = 16;

impl VolumeManager {
    /// Makes and binds the parts of volumes that a container mounts; where they are, by place in `volumeMounts`. What
    /// is missing becomes a directory with the mode of its volume. Parts that are bound already stay, unless another
    /// file has the name by now. [`VolumeManager::tear_down`] of `key` removes them.
    ///
    /// # Errors
    /// A path that is wrong or leads out of its volume, in the kubelet's words; or the host refuses.
    pub async fn bind_sub_paths(
        &self,
        key: &str,
        container: &Container,
        volumes: &BTreeMap<String, (PathBuf, bool)>,
        env: &[(String, String)],
    ) -> Result<BTreeMap<usize, PathBuf>, VolumeError> {
        let mut bound = BTreeMap::new();
        for (at, wanted) in container.volume_mounts.iter().flatten().enumerate() {
            let refused = |message| VolumeError::SubPath { message };
            let Some(path) = sub_path(wanted, env).map_err(refused)? else { continue };
            // What is not there is told by whoever looks for it.
            let Some((volume, _)) = volumes.get(&wanted.name).cloned() else { continue };
            let parts = [component(&wanted.name)?, component(&container.name)?];
            let target = places::sub_path(&self.root, component(key)?, parts, at);
            let (place, fixed) = (target.clone(), self.images.holds(&volume));
            let work = move || bind(&volume, &path, fixed, &target).map_err(|e| host_error("bind", &target, e));
            if let Err(error) = blocking(move || Ok(work())).await? {
                // The user learns no more: it could tell of the host's files.
                tracing::debug!(volume = wanted.name, error = crate::telemetry::chain(&error), "a subPath failed");
                let (volume, container) = (&wanted.name, &container.name);
                let what = format!("failed to prepare subPath for volumeMount {volume:?} of container {container:?}");
                return Err(refused(what));
            }
            bound.insert(at, place);
        }
        Ok(bound)
    }
}

/// The parts of volumes that a container mounts, by place in `volumeMounts`, where nothing can be bound for it: its driver
/// resolves them.
///
/// # Errors
/// A path that is wrong, in the kubelet's words.
pub fn sub_paths(container: &Container, env: &[(String, String)]) -> Result<BTreeMap<usize, String>, VolumeError> {
    let part = |(at, wanted)| sub_path(wanted, env).map(|path| path.map(|path| (at, path))).transpose();
    let mounts = container.volume_mounts.iter().flatten().enumerate();
    mounts.filter_map(part).collect::<Result<_, _>>().map_err(|message| VolumeError::SubPath { message })
}

/// The part of the volume that is asked for, if not all of it.
fn sub_path(wanted: &VolumeMount, env: &[(String, String)]) -> Result<Option<String>, String> {
    let path = match wanted.sub_path_expr.as_deref().filter(|expression| !expression.is_empty()) {
        Some(expression) => expanded(expression, env)?,
        None => wanted.sub_path.clone().unwrap_or_default(),
    };
    if path.starts_with('/') {
        return Err(format!("error SubPath `{path}` must not be an absolute path"));
    }
    if Path::new(&path).components().any(|part| part == Component::ParentDir) {
        return Err(format!("unable to provision SubPath `{path}`: must not contain '..'"));
    }
    Ok((!path.is_empty()).then_some(path))
}

/// Unlike in a command, every variable must be known.
fn expanded(expression: &str, env: &[(String, String)]) -> Result<String, String> {
    let missing = RefCell::new(None);
    let path = expand(expression, |name| {
        let found = env.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        if found.is_none() {
            missing.borrow_mut().get_or_insert_with(|| name.to_owned());
        }
        found
    });
    match missing.into_inner() {
        Some(name) => Err(format!("missing value for {name:?}")),
        None => Ok(path),
    }
}

/// Nothing is made in a volume whose content is `fixed`.
fn bind(volume: &Path, path: &str, fixed: bool, target: &Path) -> io::Result<()> {
    // The volume's own path is the node's, or the host's in the case of a hostPath, and its links are followed.
    let root = openat(CWD, volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let opened = match open_beneath(&root, Path::new(path), OFlags::PATH) {
        Err(Errno::NOENT) if !fixed => make_beneath(&root, Path::new(path))?,
        opened => opened?,
    };
    mount_at(&opened, target)
}

fn open_beneath(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut tries = 0;
    loop {
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < TRIES => tries += 1,
            done => return done,
        }
    }
}

/// Makes what is missing of a path, one directory after the other, each in the one that was opened before.
fn make_beneath(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(fstat(root)?.st_mode & 0o7777);
    let directory = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut prefix = PathBuf::new();
    let mut current = root.try_clone()?;
    for part in path.components() {
        prefix.push(part);
        current = match open_beneath(root, &prefix, directory) {
            Err(Errno::NOENT) => {
                match mkdirat(&current, part.as_os_str(), Mode::RWXU) {
                    // Another container of the Pod, or a link that leads nowhere; the next line tells them apart.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let made = open_beneath(&current, Path::new(part.as_os_str()), directory | OFlags::NOFOLLOW)?;
                fchmod(&made, mode)?;
                made
            }
            opened => opened?,
        };
    }
    Ok(current)
}

/// Mounts what is open, unless it is what is mounted there.
fn mount_at(opened: &OwnedFd, target: &Path) -> io::Result<()> {
    let wanted = fstat(opened)?;
    if target.exists() && mounts::is_mount_point(target)? {
        let present = fs::metadata(target)?;
        if (present.dev(), present.ino()) == (wanted.st_dev, wanted.st_ino) {
            return Ok(());
        }
        umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    make_target(target, FileType::from_raw_mode(wanted.st_mode) == FileType::Directory)?;
    let source = format!("/proc/thread-self/fd/{}", opened.as_fd().as_raw_fd());
    Ok(mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// A directory can only be mounted on a directory, and anything else on a file.
fn make_target(target: &Path, directory: bool) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        Ok(there) if there.is_dir() == directory => return Ok(()),
        Ok(there) if there.is_dir() => fs::remove_dir(target)?,
        Ok(_) => fs::remove_file(target)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if directory {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(target).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::super::tests::in_a_mount_namespace;
    use super::*;

    /// How long two threads may take to meet on a busy machine.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn wanted(value: serde_json::Value, env: &[(&str, &str)]) -> Result<Option<String>, String> {
        let env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        sub_path(&serde_json::from_value(value).unwrap(), &env)
    }

    #[test]
    fn a_path_is_relative_without_steps_back_and_of_known_variables() {
        assert_eq!(wanted(json!({"name": "v"}), &[]), Ok(None));
        assert_eq!(wanted(json!({"name": "v", "subPath": "a/b"}), &[]), Ok(Some("a/b".into())));
        let expression = json!({"name": "v", "subPathExpr": "$(A)/x"});
        assert_eq!(wanted(expression.clone(), &[("A", "1"), ("A", "2")]), Ok(Some("2/x".into())));
        assert_eq!(wanted(expression.clone(), &[]).unwrap_err(), "missing value for \"A\"");
        assert_eq!(
            wanted(expression.clone(), &[("A", "")]).unwrap_err(),
            "error SubPath `/x` must not be an absolute path"
        );
        assert!(wanted(expression, &[("A", "..")]).unwrap_err().contains("must not contain '..'"));
        assert_eq!(wanted(json!({"name": "v", "subPathExpr": "$(A)"}), &[("A", "")]), Ok(None));
        assert_eq!(wanted(json!({"name": "v", "subPath": "..a"}), &[]), Ok(Some("..a".into())));
    }

    #[test]
    fn parts_go_by_the_place_of_their_mount() {
        let container: Container = serde_json::from_value(json!({"name": "c", "volumeMounts": [
            {"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/b", "subPath": "x"},
            {"name": "v", "mountPath": "/c", "subPathExpr": "$(A)/y"},
        ]}))
        .unwrap();
        let parts = sub_paths(&container, &[("A".to_owned(), "1".to_owned())]).unwrap();
        assert_eq!(parts, BTreeMap::from([(1, "x".to_owned()), (2, "1/y".to_owned())]));
        assert!(matches!(sub_paths(&container, &[]), Err(VolumeError::SubPath { .. })));
    }

    struct Volume {
        dir: tempfile::TempDir,
        fixed: bool,
    }

    impl Volume {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("v")).unwrap();
            fs::create_dir(dir.path().join("outside")).unwrap();
            fs::write(dir.path().join("outside/secret"), "secret").unwrap();
            Self { dir, fixed: false }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn bind(&self, path: &str) -> io::Result<PathBuf> {
            let target = self.path("pod/volume-subpaths/v/c/0");
            bind(&self.path("v"), path, self.fixed, &target).map(|()| target)
        }
    }

    #[test]
    fn a_missing_path_becomes_directories_with_the_volumes_mode() {
        in_a_mount_namespace(|| {
            let volume = Volume::new();
            fs::set_permissions(volume.path("v"), fs::Permissions::from_mode(0o2777)).unwrap();
            let target = volume.bind("a/b").unwrap();
            fs::write(target.join("f"), "1").unwrap();
            assert_eq!(fs::read_to_string(volume.path("v/a/b/f")).unwrap(), "1");
            assert_eq!(fs::metadata(volume.path("v/a")).unwrap().mode() & 0o7777, 0o2777);
            assert_eq!(fs::metadata(volume.path("v/a/b")).unwrap().mode() & 0o7777, 0o2777);
            mounts::remove_tree(&volume.path("pod")).unwrap();
            assert!(volume.path("v/a/b/f").exists(), "what was bound is not emptied");
        });
    }

    #[test]
    fn in_a_volume_whose_content_is_fixed_nothing_is_made() {
        in_a_mount_namespace(|| {
            let volume = Volume { fixed: true, ..Volume::new() };
            assert!(volume.bind("a").is_err() && !volume.path("v/a").exists());
            fs::write(volume.path("v/f"), "1").unwrap();
            assert_eq!(fs::read_to_string(volume.bind("f").unwrap()).unwrap(), "1");
        });
    }

    #[test]
    fn links_are_followed_within_the_volume_and_never_out_of_it() {
        in_a_mount_namespace(|| {
            let volume = Volume::new();
            fs::create_dir(volume.path("v/real")).unwrap();
            fs::write(volume.path("v/real/f"), "1").unwrap();
            symlink("real", volume.path("v/within")).unwrap();
            symlink("../outside", volume.path("v/up")).unwrap();
            symlink(volume.path("outside"), volume.path("v/absolute")).unwrap();
            symlink("/nowhere", volume.path("v/dangling")).unwrap();
            let target = volume.bind("within/f").unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "1");
            for path in
                ["up", "up/secret", "up/new", "absolute", "absolute/secret", "absolute/new", "dangling", "dangling/x"]
            {
                assert!(volume.bind(path).is_err(), "{path} leads out of the volume");
            }
            assert!(!volume.path("outside/new").exists() && !Path::new("/nowhere").exists());
        });
    }

    #[test]
    fn a_file_that_was_replaced_is_bound_anew_and_one_that_was_not_stays() {
        in_a_mount_namespace(|| {
            let volume = Volume::new();
            fs::write(volume.path("v/f"), "old").unwrap();
            let target = volume.bind("f").unwrap();
            let before = mounts::mount_points().unwrap().len();
            volume.bind("f").unwrap();
            assert_eq!(mounts::mount_points().unwrap().len(), before);
            fs::remove_file(volume.path("v/f")).unwrap();
            fs::create_dir(volume.path("v/f")).unwrap();
            fs::write(volume.path("v/f/g"), "new").unwrap();
            volume.bind("f").unwrap();
            assert_eq!(fs::read_to_string(target.join("g")).unwrap(), "new");
            assert_eq!(mounts::mount_points().unwrap().len(), before);
        });
    }

    #[test]
    fn a_link_swapped_in_at_any_moment_never_shows_what_is_outside() {
        in_a_mount_namespace(|| {
            let volume = Volume::new();
            fs::create_dir_all(volume.path("v/d")).unwrap();
            fs::write(volume.path("v/d/secret"), "harmless").unwrap();
            symlink("../outside", volume.path("v/link")).unwrap();
            let (a, b) = (volume.path("v/d"), volume.path("v/link"));
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let exchange = rustix::fs::RenameFlags::EXCHANGE;
                        rustix::fs::renameat_with(CWD, &a, CWD, &b, exchange).unwrap();
                    }
                });
                let (mut shown, mut refused, begun) = (0, 0, Instant::now());
                while (shown < 20 || refused < 20) && begun.elapsed() < PATIENCE {
                    // Either name may be the link just then; that is refused, and nothing is mounted.
                    match volume.bind("d/secret") {
                        Ok(target) => {
                            assert_eq!(fs::read_to_string(&target).unwrap(), "harmless");
                            shown += 1;
                        }
                        Err(_) => refused += 1,
                    }
                }
                done.store(true, Ordering::Relaxed);
                assert!(shown > 0 && refused > 0, "never met: {shown} times the directory, {refused} times the link");
            });
        });
    }
}
