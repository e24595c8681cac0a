//! The Pod's volumes on the host.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>   emptyDir: a directory, or a tmpfs of its own
//! <root>/secrets/                                            one tmpfs of the node, mode 0700
//! <root>/secrets/<uid>/kubernetes.io~<type>/<name>           configMap, secret, downwardAPI, projected
//! ```
//!
//! What comes from the API is only ever written to memory. The directories are the memory of this room too: what a Pod
//! has on disk is found again by its UID, and everything here may be repeated.

mod atomic;
mod host;
mod mounts;
mod payload;
pub mod places;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, Pod, ProjectedVolumeSource, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use kube::Client;

use super::PodContext;
use super::inputs::downward;
use super::inputs::objects::{ObjectError, Objects};
use payload::{DEFAULT_MODE, Payload, Selection};

/// How often the content of configMap and secret volumes is compared with the API; the kubelet's sync period.
const CONTENT_PERIOD: Duration = Duration::from_secs(60);
/// Least wait between two renewals, should a token arrive that is already old.
const LEAST_PERIOD: Duration = Duration::from_secs(10);
/// Mode of a token for which the Pod's user is known.
const PRIVATE_TOKEN_MODE: i32 = 0o600;

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
    /// No token could be had.
    #[error("MountVolume.SetUp failed for volume {volume:?} : failed to fetch token")]
    Token {
        /// The volume's name.
        volume: String,
        /// Why.
        #[source]
        source: kube::Error,
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
    root: PathBuf,
}

// === impl VolumeManager ===

impl VolumeManager {
    /// Keeps volumes under `root` (`--root-dir`; a relative one counts from the working directory).
    pub fn new(client: Client, objects: Arc<Objects>, root: &Path) -> Self {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        Self { client, objects, root }
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

    /// Makes every volume that a container of the Pod mounts, or finds it made. By volume name.
    ///
    /// # Errors
    /// The first volume that cannot be made; those made stay, and [`VolumeManager::tear_down`] removes them.
    pub async fn set_up(&self, ctx: PodContext<'_>) -> Result<BTreeMap<String, MountedVolume>, VolumeError> {
        let uid = component(ctx.key)?;
        let mounted = mounted_names(ctx.pod);
        let volumes = volumes(ctx.pod).filter(|volume| mounted.contains(volume.name.as_str()));
        let made = try_join_all(volumes.map(|volume| self.set_up_one(ctx, uid, volume))).await?;
        Ok(made.into_iter().collect())
    }

    /// Renews tokens and writes what has changed in ConfigMaps, Secrets and the Pod's own fields; returns how long the
    /// volumes are good for now, `None` for ever (until the Pod changes).
    ///
    /// # Errors
    /// As [`VolumeManager::set_up`]; the content stays as it was.
    pub async fn refresh(&self, ctx: PodContext<'_>) -> Result<Option<Duration>, VolumeError> {
        let uid = component(ctx.key)?;
        let mounted = mounted_names(ctx.pod);
        let mut next: Option<Duration> = None;
        for volume in volumes(ctx.pod).filter(|volume| mounted.contains(volume.name.as_str())) {
            if let Some(files) = files_of(volume)? {
                let period = self.write_files(ctx, uid, volume, &files).await?.1;
                next = [next, period].into_iter().flatten().min();
            }
        }
        Ok(next)
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
    ) -> Result<(String, MountedVolume), VolumeError> {
        let name = component(&volume.name)?.to_owned();
        if let Some(source) = volume.host_path.clone() {
            let host_path = PathBuf::from(&source.path);
            let checked = blocking(move || Ok(host::host_path(&source))).await?;
            checked.map_err(|message| refused(volume, message))?;
            return Ok((name, MountedVolume { host_path, read_only: false }));
        }
        if let Some(files) = files_of(volume)? {
            let (host_path, _) = self.write_files(ctx, uid, volume, &files).await?;
            return Ok((name, MountedVolume { host_path, read_only: true }));
        }
        let source = volume.empty_dir.clone().unwrap_or_default();
        let host_path = self.empty_dir(ctx, uid, volume, source).await?;
        Ok((name, MountedVolume { host_path, read_only: false }))
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

    /// Writes the files of a volume; where they are, and how long they are good for.
    async fn write_files(
        &self,
        ctx: PodContext<'_>,
        uid: &str,
        volume: &Volume,
        files: &Files,
    ) -> Result<(PathBuf, Option<Duration>), VolumeError> {
        let dir = places::files(&self.root, uid, files.kind, component(&volume.name)?);
        let mut payload = Payload::new();
        let mut next: Option<Duration> = None;
        for projection in files.projected.sources.iter().flatten() {
            let (part, period) = self.project(ctx, &dir, volume, (&files.projected, projection)).await?;
            payload.extend(part);
            next = [next, period].into_iter().flatten().min();
        }
        payload::check_conflicts(&payload).map_err(|message| refused(volume, message))?;
        let (secrets, group) = (self.secrets(), group(ctx.pod));
        blocking(move || {
            if !mounts::is_tmpfs(&secrets) {
                let source = io::Error::other("it is not a tmpfs, and secrets are never written to disk");
                return Err(host_error("write below", &secrets, source));
            }
            atomic::write(&dir, &payload, group).map_err(|source| host_error("write volume", &dir, source))?;
            Ok((dir, next))
        })
        .await
    }

    /// The files of one source of a volume.
    async fn project(
        &self,
        ctx: PodContext<'_>,
        dir: &Path,
        volume: &Volume,
        (parent, source): (&ProjectedVolumeSource, &VolumeProjection),
    ) -> Result<(Payload, Option<Duration>), VolumeError> {
        let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or("default");
        let mode = parent.default_mode.unwrap_or(DEFAULT_MODE);
        let refuse = |message| refused(volume, message);
        let object = |source| VolumeError::Object { volume: volume.name.clone(), source };
        if let Some(map) = &source.config_map {
            let found = self.objects.config_map(namespace, &map.name).await.map_err(object)?;
            let fixed = found.as_ref().is_some_and(|found| found.immutable == Some(true));
            let selection = Selection {
                items: map.items.as_deref(),
                mode,
                user: parent.default_user,
                optional: map.optional.unwrap_or(false),
            };
            let files = payload::of_config_map(&map.name, found.as_deref(), &selection).map_err(refuse)?;
            return Ok((files, (!fixed).then_some(CONTENT_PERIOD)));
        }
        if let Some(secret) = &source.secret {
            let found = self.objects.secret(namespace, &secret.name).await.map_err(object)?;
            let fixed = found.as_ref().is_some_and(|found| found.immutable == Some(true));
            let selection = Selection {
                items: secret.items.as_deref(),
                mode,
                user: parent.default_user,
                optional: secret.optional.unwrap_or(false),
            };
            let files = payload::of_secret(&secret.name, found.as_deref(), &selection).map_err(refuse)?;
            return Ok((files, (!fixed).then_some(CONTENT_PERIOD)));
        }
        if let Some(fields) = &source.downward_api {
            let items = fields.items.as_deref().unwrap_or_default();
            let files = payload::of_downward(&ctx, items, mode, parent.default_user).map_err(refuse)?;
            return Ok((files, None));
        }
        if let Some(token) = &source.service_account_token {
            let (bytes, period) = self.token(ctx.pod, dir, volume, token).await?;
            let user = token.user.or(parent.default_user).or_else(|| payload::token_user(ctx.pod));
            let mode = if user.is_some() || group(ctx.pod).is_some() { PRIVATE_TOKEN_MODE } else { mode };
            let path = payload::checked_path(&token.path).map_err(refuse)?;
            let file = payload::file(bytes, mode, user).map_err(refuse)?;
            return Ok((Payload::from([(path, file)]), Some(period)));
        }
        let kind = format!("projected {}", first_field(source, ""));
        Err(VolumeError::Unsupported { volume: volume.name.clone(), kind })
    }

    /// The token that is there while it is fresh, else a new one; and how long it stays fresh.
    async fn token(
        &self,
        pod: &Pod,
        dir: &Path,
        volume: &Volume,
        projection: &ServiceAccountTokenProjection,
    ) -> Result<(Vec<u8>, Duration), VolumeError> {
        let path = payload::checked_path(&projection.path).map_err(|message| refused(volume, message))?;
        let present = atomic::read_file(dir, &path).map_err(|source| host_error("read", &dir.join(&path), source))?;
        if let Some(present) = present {
            let left = token::Claims::of(&present).map(|claims| claims.fresh_for(Timestamp::now()));
            if let Some(left) = left.filter(|left| !left.is_zero()) {
                return Ok((present, left));
            }
        }
        let fetched = token::request(&self.client, pod, projection).await;
        let token = fetched.map_err(|source| VolumeError::Token { volume: volume.name.clone(), source })?.into_bytes();
        let fresh = token::Claims::of(&token).map(|claims| claims.fresh_for(Timestamp::now()));
        Ok((token, fresh.unwrap_or(CONTENT_PERIOD).max(LEAST_PERIOD)))
    }
}

// === What a volume is ===

/// A volume made of files: every kind of them as the one that contains the others.
struct Files {
    kind: &'static str,
    projected: ProjectedVolumeSource,
}

/// `None` for a volume that is a directory.
fn files_of(volume: &Volume) -> Result<Option<Files>, VolumeError> {
    let one = |kind, mode, user, source: VolumeProjection| {
        let projected = ProjectedVolumeSource { default_mode: mode, default_user: user, sources: Some(vec![source]) };
        Ok(Some(Files { kind, projected }))
    };
    if let Some(map) = &volume.config_map {
        let projection = k8s_openapi::api::core::v1::ConfigMapProjection {
            items: map.items.clone(),
            name: map.name.clone(),
            optional: map.optional,
        };
        let source = VolumeProjection { config_map: Some(projection), ..Default::default() };
        return one("configmap", map.default_mode, map.default_user, source);
    }
    if let Some(secret) = &volume.secret {
        let projection = k8s_openapi::api::core::v1::SecretProjection {
            items: secret.items.clone(),
            name: secret.secret_name.clone().unwrap_or_default(),
            optional: secret.optional,
        };
        let source = VolumeProjection { secret: Some(projection), ..Default::default() };
        return one("secret", secret.default_mode, secret.default_user, source);
    }
    if let Some(fields) = &volume.downward_api {
        let projection = k8s_openapi::api::core::v1::DownwardAPIProjection { items: fields.items.clone() };
        let source = VolumeProjection { downward_api: Some(projection), ..Default::default() };
        return one("downward-api", fields.default_mode, fields.default_user, source);
    }
    if let Some(projected) = &volume.projected {
        return Ok(Some(Files { kind: "projected", projected: projected.clone() }));
    }
    let kind = first_field(volume, "name");
    if kind.is_empty() || matches!(kind.as_str(), "emptyDir" | "hostPath") {
        return Ok(None);
    }
    Err(VolumeError::Unsupported { volume: volume.name.clone(), kind })
}

/// The field that is set besides `known`, under its name in the API.
fn first_field(object: &impl serde::Serialize, known: &str) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    value.as_object().and_then(|fields| fields.keys().find(|key| *key != known)).cloned().unwrap_or_default()
}

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
