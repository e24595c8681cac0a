//! The Pod's volumes on the host.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>   emptyDir: a directory, or a tmpfs of its own
//! <root>/secrets/                                            one tmpfs of the node, mode 0700
//! <root>/secrets/<uid>/kubernetes.io~<type>/<name>           configMap, secret, downwardAPI, projected
//! <root>/pods/<uid>/volume-subpaths/...                      parts of volumes, bound for a container
//! <root>/image-volumes/<digest>                              the files of an image ([`images`])
//! ```
//!
//! What comes from the API is only ever written to memory. The directories are the memory of this room too: what a Pod
//! has on disk is found again by its UID, and everything here may be repeated.

mod atomic;
mod claims;
mod host;
pub mod images;
mod mounts;
mod payload;
pub mod places;
mod projection;
mod sub_path;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, Volume};
use kube::Client;

use super::PodContext;
use super::inputs::downward;
use super::inputs::following::{Following, Watches};
use super::inputs::objects::{ObjectError, Objects, Uses};
use images::ImageVolumes;
pub use projection::Freshness;
use projection::files_of;
pub use sub_path::sub_paths;

/// Where a volume is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedVolume {
    /// Absolute path, there when [`VolumeManager::set_up`] returns.
    pub host_path: PathBuf,
    /// Whether containers must not write to it whatever their volumeMount says.
    pub read_only: bool,
}

/// A volume could not be made or removed. The event's reason is `FailedMount`.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// This node has no such volumes; trying again cannot help.
    #[error("volume {volume:?} has type {kind}, which this node does not support")]
    Unsupported {
        /// The volume's name.
        volume: String,
        /// Its type, as the field of the Pod spec is called.
        kind: String,
    },
    /// Something the volume names is missing or wrong.
    #[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
    Refused {
        /// The volume's name.
        volume: String,
        /// What is missing or wrong.
        message: String,
    },
    /// An object could not be read.
    #[error("MountVolume.SetUp failed for volume {volume:?}")]
    Object {
        /// The volume's name.
        volume: String,
        /// Which, and why.
        #[source]
        source: ObjectError,
    },
    /// A claim, or the volume behind it, could not be read.
    #[error("MountVolume.SetUp failed for volume {volume:?} : failed to get {what}")]
    Claim {
        /// The volume's name.
        volume: String,
        /// Which object.
        what: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// No token could be had.
    #[error("MountVolume.SetUp failed for volume {volume:?} : failed to fetch token")]
    Token {
        /// The volume's name.
        volume: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// A `subPath` that cannot be had.
    #[error("{message}")]
    SubPath {
        /// Which, and as much of why as its user may know.
        message: String,
    },
    /// The host refused.
    #[error("failed to {action} {path}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A Pod UID or volume name that is no single path component. The API server allows none such.
    #[error("{name:?} cannot be the name of a directory")]
    BadName {
        /// The name.
        name: String,
    },
}

/// Makes, refreshes and removes the volumes of Pods.
///
/// Needs root (mounts, ownership), and the rights to `get` the ConfigMaps and Secrets that Pods name and to `create`
/// `serviceaccounts/token`. Calls for one Pod must not overlap; calls for different Pods may.
pub struct VolumeManager {
    client: Client,
    objects: Arc<Objects>,
    watches: Watches,
    images: Arc<ImageVolumes>,
    root: PathBuf,
}

/// The volumes of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetUp {
    /// Where each is, by name.
    pub volumes: BTreeMap<String, MountedVolume>,
    /// The objects they show, and which version of each.
    pub uses: Uses,
}

// === impl VolumeManager ===

impl VolumeManager {
    /// Keeps volumes under `root` (`--root-dir`; a relative one counts from the working directory).
    pub fn new(client: Client, objects: Arc<Objects>, root: &Path) -> Self {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let watches = Watches::new(client.clone(), Arc::clone(&objects));
        let images = Arc::new(ImageVolumes::of_root(&root));
        Self { client, objects, watches, images, root }
    }

    /// The images that volumes show. Those volumes are not made by [`VolumeManager::set_up`]: an image is fetched for the
    /// container that mounts it.
    pub fn images(&self) -> &Arc<ImageVolumes> {
        &self.images
    }

    /// Mounts the tmpfs for what comes from the API, unless an earlier run has. To be called once before the rest.
    ///
    /// # Errors
    /// The directory cannot be made or mounted (this needs root).
    pub async fn prepare(&self) -> Result<(), VolumeError> {
        let (pods, secrets) = (self.pods(), self.secrets());
        blocking(move || {
            make_dir(&pods, 0o750)?;
            make_dir(&secrets, 0o700)?;
            let failed = |source| host_error("mount a tmpfs at", &secrets, source);
            if mounts::is_mount_point(&secrets).map_err(failed)? && mounts::is_tmpfs(&secrets) {
                return Ok(());
            }
            // Kernels before 6.4 know no "noswap".
            mounts::mount_tmpfs(&secrets, "mode=0700,noswap")
                .or_else(|_| mounts::mount_tmpfs(&secrets, "mode=0700"))
                .map_err(failed)
        })
        .await
    }

    /// Makes every volume that a container of the Pod mounts, or finds it made.
    ///
    /// # Errors
    /// The first volume that cannot be made; those made stay, and [`VolumeManager::tear_down`] removes them.
    pub async fn set_up(&self, ctx: PodContext<'_>) -> Result<SetUp, VolumeError> {
        let uid = component(ctx.key)?;
        let mounted = mounted_names(ctx.pod);
        let made = |volume: &&Volume| mounted.contains(volume.name.as_str()) && volume.image.is_none();
        let volumes = volumes(ctx.pod).filter(made);
        let mut done = SetUp::default();
        for (name, volume, fresh) in try_join_all(volumes.map(|volume| self.set_up_one(ctx, uid, volume))).await? {
            done.volumes.insert(name, volume);
            done.uses.extend(fresh.uses);
        }
        Ok(done)
    }

    /// From now on `following` hears of changes to these objects, and of no others.
    pub fn follow(&self, following: &mut Following, uses: Uses) {
        self.watches.follow(following, uses);
    }

    /// Renews tokens and writes what has changed in ConfigMaps, Secrets and the Pod's own fields; returns how long the
    /// volumes are good for now.
    ///
    /// # Errors
    /// As [`VolumeManager::set_up`]; the content stays as it was.
    pub async fn refresh(&self, ctx: PodContext<'_>) -> Result<Freshness, VolumeError> {
        let uid = component(ctx.key)?;
        let mounted = mounted_names(ctx.pod);
        let mut fresh = Freshness::default();
        let made = |volume: &&Volume| mounted.contains(volume.name.as_str()) && volume.image.is_none();
        for volume in volumes(ctx.pod).filter(made) {
            if let Some(files) = files_of(volume)? {
                fresh = fresh.and(self.write_files(ctx, uid, volume, &files).await?.1);
            }
        }
        Ok(fresh)
    }

    /// Unmounts and removes everything the Pod has on this host; Ok if there is nothing. Links are not followed.
    ///
    /// # Errors
    /// Something could not be unmounted or removed; what is left is found again by [`VolumeManager::uids`].
    pub async fn tear_down(&self, uid: &str) -> Result<(), VolumeError> {
        let uid = component(uid)?;
        let places = [self.secrets().join(uid), self.pods().join(uid)];
        blocking(move || {
            let remove =
                |place: &PathBuf| mounts::remove_tree(place).map_err(|source| host_error("remove", place, source));
            places.iter().map(remove).fold(Ok(()), Result::and)
        })
        .await
    }

    /// Unmounts what [`VolumeManager::prepare`] mounted; for a node that leaves this host with every Pod ended.
    ///
    /// # Errors
    /// Something still uses it.
    pub async fn close(&self) -> Result<(), VolumeError> {
        let secrets = self.secrets();
        blocking(move || mounts::remove_tree(&secrets).map_err(|source| host_error("remove", &secrets, source))).await
    }

    /// The UIDs of Pods that have something on this host.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub async fn uids(&self) -> Result<BTreeSet<String>, VolumeError> {
        let places = [self.pods(), self.secrets()];
        blocking(move || {
            let mut uids = BTreeSet::new();
            for place in places {
                let failed = |source| host_error("read directory", &place, source);
                let entries = match fs::read_dir(&place) {
                    Ok(entries) => entries,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(failed(error)),
                };
                for entry in entries {
                    uids.insert(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
                }
            }
            Ok(uids)
        })
        .await
    }

    fn pods(&self) -> PathBuf {
        places::pods(&self.root)
    }

    fn secrets(&self) -> PathBuf {
        places::secrets(&self.root)
    }

    async fn set_up_one(
        &self,
        ctx: PodContext<'_>,
        uid: &str,
        volume: &Volume,
    ) -> Result<(String, MountedVolume, Freshness), VolumeError> {
        let name = component(&volume.name)?.to_owned();
        if let Some(source) = volume.host_path.clone() {
            let host_path = PathBuf::from(&source.path);
            let checked = blocking(move || Ok(host::host_path(&source))).await?;
            checked.map_err(|message| refused(volume, message))?;
            return Ok((name, MountedVolume { host_path, read_only: false }, Freshness::default()));
        }
        if let Some(claimed) = self.claimed(ctx, volume).await? {
            return Ok((name, claimed, Freshness::default()));
        }
        if let Some(files) = files_of(volume)? {
            let (host_path, fresh) = self.write_files(ctx, uid, volume, &files).await?;
            return Ok((name, MountedVolume { host_path, read_only: true }, fresh));
        }
        let source = volume.empty_dir.clone().unwrap_or_default();
        let host_path = self.empty_dir(ctx, uid, volume, source).await?;
        Ok((name, MountedVolume { host_path, read_only: false }, Freshness::default()))
    }

    async fn empty_dir(
        &self,
        ctx: PodContext<'_>,
        uid: &str,
        volume: &Volume,
        source: EmptyDirVolumeSource,
    ) -> Result<PathBuf, VolumeError> {
        let medium = source.medium.as_deref().unwrap_or_default();
        if !matches!(medium, "" | "Memory") {
            let kind = format!("emptyDir with medium {medium}");
            return Err(VolumeError::Unsupported { volume: volume.name.clone(), kind });
        }
        let memory = downward::memory_limit(&ctx).map_err(|message| refused(volume, message))?;
        let group = group(ctx.pod);
        let dir = places::empty_dir(&self.root, uid, &volume.name);
        blocking(move || {
            host::empty_dir(&dir, &source, memory, group)
                .map_err(|source| host_error("make emptyDir", &dir, source))
                .map(|()| dir)
        })
        .await
    }
}

// === What a volume is ===

fn volumes(pod: &Pod) -> impl Iterator<Item = &Volume> {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten())
}

/// Volumes that no container mounts are not made, as the kubelet does not make them.
fn mounted_names(pod: &Pod) -> BTreeSet<&str> {
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mounts = containers.flat_map(|container| container.volume_mounts.iter().flatten());
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    mounts
        .chain(ephemeral.flat_map(|container| container.volume_mounts.iter().flatten()))
        .map(|mount| mount.name.as_str())
        .collect()
}

fn group(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    context.fs_group.and_then(|group| u32::try_from(group).ok())
}

/// A name that is exactly one component of a path.
fn component(name: &str) -> Result<&str, VolumeError> {
    if name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(VolumeError::BadName { name: name.to_owned() });
    }
    Ok(name)
}

fn refused(volume: &Volume, message: String) -> VolumeError {
    VolumeError::Refused { volume: volume.name.clone(), message }
}

fn host_error(action: &'static str, path: &Path, source: io::Error) -> VolumeError {
    VolumeError::Host { action, path: path.to_owned(), source }
}

fn make_dir(dir: &Path, mode: u32) -> Result<(), VolumeError> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(dir);
    made.map_err(|source| host_error("make directory", dir, source))
}

/// Runs file system work off the event loop. It goes on to its end if the caller stops waiting.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|source| host_error("work on", Path::new("volumes"), io::Error::other(source)))?
}

#[cfg(test)]
mod tests;
