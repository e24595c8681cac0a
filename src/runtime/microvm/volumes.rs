//! Pure: what becomes of a mount, since a guest shares no directory with its host.
//!
//! | the host's path lies | the guest gets |
//! |---|---|
//! | in the node's directory of files from the API (configMap, secret, projected, downwardAPI) | a copy, pushed anew when it changes |
//! | in the node's directory of Pods, as an `emptyDir` | an empty directory of its own: on its scratch disk, or in its memory |
//! | there, as a plain file (`/etc/hosts`, a termination log) | a copy; one that may be written is copied back when the container ends |
//! | beneath a directory that the operator opted in | a copy made once, read-only |
//! | elsewhere | nothing: the container is refused |

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::runtime::types::{Mount, MountPropagation};

/// The directory of a Pod's volumes that holds its emptyDirs, as a kubelet names it.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";
/// The directory of a Pod where parts of volumes are bound to, as a kubelet names it.
const SUB_PATHS: &str = "volume-subpaths";

/// Where the node keeps what it makes for Pods.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Below this are the files that come from the API: `<uid>/<kind>/<volume>`.
    pub files: PathBuf,
    /// Below this are the Pods' own: `<uid>/volumes/kubernetes.io~empty-dir/<volume>`, `<uid>/…`.
    pub pods: PathBuf,
    /// Host paths beneath these may be copied, for reading (`--microvm-host-paths`; none by default).
    pub host_paths: Vec<PathBuf>,
}

/// What a guest gets for a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Volume {
    /// Copies of the files below this directory, or of this file; where the node made them, again when they change.
    Copied(PathBuf),
    /// A copy of this file, that is copied back once the container has ended.
    Returned(PathBuf),
    /// An empty directory of the sandbox; the host's has its size and its medium.
    Empty(PathBuf),
}

impl Places {
    /// Whether what lies there is the node's own, which changes it as the API does. What an operator shares is copied once.
    pub(super) fn renews(&self, path: &Path) -> bool {
        below(path, &self.files) || below(path, &self.pods)
    }

    /// The directory that a path of [`of_mount`] lies in, out of which nothing is copied; `None` if it is shared no more.
    pub(super) fn base(&self, path: &Path) -> Option<&Path> {
        let all = [&self.files, &self.pods].into_iter().chain(&self.host_paths).map(PathBuf::as_path);
        all.into_iter().find(|base| !base.as_os_str().is_empty() && path.starts_with(base))
    }
}

impl Volume {
    /// Where it is on the host; this is what the containers of a sandbox share a volume by.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Copied(path) | Self::Returned(path) | Self::Empty(path) => path,
        }
    }

    /// Its name in the guest: the same for the same path, of letters that an id may have.
    pub(super) fn name(&self) -> String {
        let digest = super::image::digest_of(self.path().as_os_str().as_encoded_bytes());
        let hex = digest.trim_start_matches("sha256:");
        let kind = match self {
            Self::Copied(_) => "files",
            Self::Returned(_) => "file",
            Self::Empty(_) => "empty",
        };
        format!("{kind}-{}", &hex[..24])
    }
}

/// What becomes of a mount.
///
/// # Errors
/// Why a guest cannot have it, in words for the Pod's user.
pub(super) fn of_mount(mount: &Mount, places: &Places) -> Result<Volume, String> {
    let path = &mount.host_path;
    let plain = path.is_absolute() && path.components().all(|part| !matches!(part, Component::ParentDir));
    if !plain {
        return Err(format!("host path {} is not plain", path.display()));
    }
    if mount.propagation != MountPropagation::Private {
        return Err("mounts do not travel between a host and a microVM (mountPropagation)".to_owned());
    }
    if below(path, &places.files) {
        return Ok(Volume::Copied(path.clone()));
    }
    if let Some(rest) = path.strip_prefix(&places.pods).ok().filter(|_| !places.pods.as_os_str().is_empty()) {
        let parts: Vec<_> = rest.iter().collect();
        return match parts.as_slice() {
            [_, volumes, kind, _] if *volumes == "volumes" && *kind == EMPTY_DIRS => Ok(Volume::Empty(path.clone())),
            // What is bound there is part of another volume, which a copy would not be.
            [_, subpaths, ..] if *subpaths == SUB_PATHS => {
                Err("a part of a volume that was bound on the host is not for a microVM".to_owned())
            }
            [_, _, ..] if mount.read_only => Ok(Volume::Copied(path.clone())),
            [_, _, ..] => Ok(Volume::Returned(path.clone())),
            _ => Err(format!("{} is a Pod's directory as a whole", path.display())),
        };
    }
    if !places.host_paths.iter().any(|allowed| path == allowed || below(path, allowed)) {
        return Err(format!("host path {} is not shared with microVMs (--microvm-host-paths)", path.display()));
    }
    if !mount.read_only {
        return Err(format!("host path {} can be had for reading only in a microVM", path.display()));
    }
    Ok(Volume::Copied(path.clone()))
}

fn below(path: &Path, directory: &Path) -> bool {
    !directory.as_os_str().is_empty() && path != directory && path.starts_with(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places { files: "/r/secrets".into(), pods: "/r/pods".into(), host_paths: vec!["/srv/data".into()] }
    }

    fn mount(path: &str, read_only: bool) -> Mount {
        let propagation = MountPropagation::Private;
        Mount { host_path: path.into(), container_path: "/m".into(), read_only, propagation, ..Mount::default() }
    }

    #[test]
    fn what_the_node_made_is_copied_or_made_anew_and_what_is_the_hosts_is_refused() {
        let of = |path: &str, read_only| of_mount(&mount(path, read_only), &places());
        let copied = |path: &str| Ok(Volume::Copied(path.into()));
        let map = "/r/secrets/u/kubernetes.io~configmap/c";
        assert_eq!(of(map, true), copied(map));
        assert_eq!(of(map, false), copied(map));
        let empty = "/r/pods/u/volumes/kubernetes.io~empty-dir/e";
        assert_eq!(of(empty, false), Ok(Volume::Empty(empty.into())));
        assert_eq!(of("/r/pods/u/etc-hosts", true), copied("/r/pods/u/etc-hosts"));
        let log = "/r/pods/u/containers/c/0";
        assert_eq!(of(log, false), Ok(Volume::Returned(log.into())));
        assert_eq!(of("/srv/data/x", true), copied("/srv/data/x"));
        for (path, read_only) in [
            ("/", true),
            ("/etc", true),
            ("/srv/data/x", false),
            ("/srv/database", true),
            ("/r/secrets", true),
            ("/r/pods", true),
            ("/r/pods/u", true),
            ("/r/pods/u/volume-subpaths/v/c/0", false),
            ("/r/secrets/../../etc", true),
            ("relative", true),
            ("/var/run/docker.sock", false),
        ] {
            assert!(of(path, read_only).is_err(), "{path}");
        }
        let shared = Mount { propagation: MountPropagation::HostToContainer, ..mount(map, true) };
        assert!(of_mount(&shared, &places()).is_err());
        assert_eq!(places().base(Path::new("/srv/data/x")), Some(Path::new("/srv/data")));
        assert_eq!(places().base(Path::new(log)), Some(Path::new("/r/pods")));
        assert_eq!(places().base(Path::new("/srv/database")), None);
        assert_eq!(Places::default().base(Path::new("/etc")), None);
        for (path, renewed) in [(map, true), ("/r/pods/u/etc-hosts", true), ("/srv/data/x", false), ("/srv", false)] {
            assert_eq!(places().renews(Path::new(path)), renewed, "{path}");
        }
        assert!(!Places::default().renews(Path::new("/etc")));
        // Nothing is opted in by an empty path.
        assert!(of_mount(&mount("/etc", true), &Places::default()).is_err());
    }

    #[test]
    fn a_volume_has_one_name_for_all_containers() {
        let volume = |path: &str| Volume::Empty(path.into()).name();
        assert_eq!(volume("/a"), volume("/a"));
        assert_ne!(volume("/a"), volume("/b"));
        assert!(volume("/a").bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    }
}
