//! Volumes made of files: configMap, secret, downwardAPI and projected, the last of which contains the others.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ConfigMapProjection, DownwardAPIProjection, Pod, ProjectedVolumeSource, SecretProjection,
    ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::payload::{self, DEFAULT_MODE, Payload, Selection};
use super::{
    VolumeError, VolumeManager, atomic, blocking, component, group, host_error, mounts, places, refused, token,
};
use crate::pod::PodContext;
use crate::pod::inputs::objects::{Kind, ObjectName, Uses};

/// How often the content of configMap and secret volumes is compared with the API, should a change not have been told;
/// the kubelet's sync period.
pub(super) const CONTENT_PERIOD: Duration = Duration::from_secs(60);
/// Least wait between two renewals, should a token arrive that is already old.
pub(super) const LEAST_PERIOD: Duration = Duration::from_secs(10);
/// Mode of a token for which the Pod's user is known.
const PRIVATE_TOKEN_MODE: i32 = 0o600;

/// How long what a volume shows is good for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// At most so long; `None` is for ever, until the Pod changes.
    pub period: Option<Duration>,
    /// Until one of these is another than it was.
    pub uses: Uses,
}

impl Freshness {
    /// That of both together.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.period = [self.period, other.period].into_iter().flatten().min();
        self.uses.extend(other.uses);
        self
    }

    fn of_token(period: Duration) -> Self {
        Self { period: Some(period), uses: Uses::new() }
    }

    /// That of an object, which may not exist.
    fn of_object(kind: Kind, (namespace, name): (&str, &str), found: Option<(&ObjectMeta, Option<bool>)>) -> Self {
        if found.is_some_and(|(_, immutable)| immutable == Some(true)) {
            return Self::default();
        }
        let name = ObjectName { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let version = found.and_then(|(metadata, _)| metadata.resource_version.clone());
        Self { period: Some(CONTENT_PERIOD), uses: Uses::from([(name, version)]) }
    }
}

impl VolumeManager {
    /// Writes the files of a volume; where they are, and how long they are good for.
    pub(super) async fn write_files(
        &self,
        ctx: PodContext<'_>,
        uid: &str,
        volume: &Volume,
        files: &Files,
    ) -> Result<(PathBuf, Freshness), VolumeError> {
        let dir = places::files(&self.root, uid, files.kind, component(&volume.name)?);
        let mut payload = Payload::new();
        let mut fresh = Freshness::default();
        let sources = files.projected.sources.iter().flatten();
        let parts = sources.map(|source| self.project(ctx, &dir, volume, (&files.projected, source)));
        for (part, good_for) in try_join_all(parts).await? {
            payload.extend(part);
            fresh = fresh.and(good_for);
        }
        payload::check_conflicts(&payload).map_err(|message| refused(volume, message))?;
        let (secrets, group) = (self.secrets(), group(ctx.pod));
        blocking(move || {
            if !mounts::is_tmpfs(&secrets) {
                let source = io::Error::other("it is not a tmpfs, and secrets are never written to disk");
                return Err(host_error("write below", &secrets, source));
            }
            atomic::write(&dir, &payload, group).map_err(|source| host_error("write volume", &dir, source))?;
            Ok((dir, fresh))
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
    ) -> Result<(Payload, Freshness), VolumeError> {
        let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or("default");
        let mode = parent.default_mode.unwrap_or(DEFAULT_MODE);
        let refuse = |message| refused(volume, message);
        let object = |source| VolumeError::Object { volume: volume.name.clone(), source };
        if let Some(map) = &source.config_map {
            let found = self.objects.config_map(namespace, &map.name).await.map_err(object)?;
            let known = found.as_ref().map(|found| (&found.metadata, found.immutable));
            let fresh = Freshness::of_object(Kind::ConfigMap, (namespace, &map.name), known);
            let selection = Selection {
                items: map.items.as_deref(),
                mode,
                user: parent.default_user,
                optional: map.optional.unwrap_or(false),
            };
            let files = payload::of_config_map(&map.name, found.as_deref(), &selection).map_err(refuse)?;
            return Ok((files, fresh));
        }
        if let Some(secret) = &source.secret {
            let found = self.objects.secret(namespace, &secret.name).await.map_err(object)?;
            let known = found.as_ref().map(|found| (&found.metadata, found.immutable));
            let fresh = Freshness::of_object(Kind::Secret, (namespace, &secret.name), known);
            let selection = Selection {
                items: secret.items.as_deref(),
                mode,
                user: parent.default_user,
                optional: secret.optional.unwrap_or(false),
            };
            let files = payload::of_secret(&secret.name, found.as_deref(), &selection).map_err(refuse)?;
            return Ok((files, fresh));
        }
        if let Some(fields) = &source.downward_api {
            let items = fields.items.as_deref().unwrap_or_default();
            let files = payload::of_downward(&ctx, items, mode, parent.default_user).map_err(refuse)?;
            return Ok((files, Freshness::default()));
        }
        if let Some(token) = &source.service_account_token {
            let (bytes, period) = self.token(ctx.pod, dir, volume, token).await?;
            let user = token.user.or(parent.default_user).or_else(|| payload::token_user(ctx.pod));
            let mode = if user.is_some() || group(ctx.pod).is_some() { PRIVATE_TOKEN_MODE } else { mode };
            let path = payload::checked_path(&token.path).map_err(refuse)?;
            let file = payload::file(bytes, mode, user).map_err(refuse)?;
            return Ok((Payload::from([(path, file)]), Freshness::of_token(period)));
        }
        let kind = format!("projected {}", first_field(source, &[]));
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

/// A volume made of files: every kind of them as the one that contains the others.
pub(super) struct Files {
    pub(super) kind: &'static str,
    projected: ProjectedVolumeSource,
}

/// `None` for a volume that is a directory.
pub(super) fn files_of(volume: &Volume) -> Result<Option<Files>, VolumeError> {
    let one = |kind, mode, user, source: VolumeProjection| {
        let projected = ProjectedVolumeSource { default_mode: mode, default_user: user, sources: Some(vec![source]) };
        Ok(Some(Files { kind, projected }))
    };
    if let Some(map) = &volume.config_map {
        let projection =
            ConfigMapProjection { items: map.items.clone(), name: map.name.clone(), optional: map.optional };
        let source = VolumeProjection { config_map: Some(projection), ..Default::default() };
        return one("configmap", map.default_mode, map.default_user, source);
    }
    if let Some(secret) = &volume.secret {
        let projection = SecretProjection {
            items: secret.items.clone(),
            name: secret.secret_name.clone().unwrap_or_default(),
            optional: secret.optional,
        };
        let source = VolumeProjection { secret: Some(projection), ..Default::default() };
        return one("secret", secret.default_mode, secret.default_user, source);
    }
    if let Some(fields) = &volume.downward_api {
        let projection = DownwardAPIProjection { items: fields.items.clone() };
        let source = VolumeProjection { downward_api: Some(projection), ..Default::default() };
        return one("downward-api", fields.default_mode, fields.default_user, source);
    }
    if let Some(projected) = &volume.projected {
        return Ok(Some(Files { kind: "projected", projected: projected.clone() }));
    }
    let kind = first_field(volume, &["name"]);
    if kind.is_empty() || matches!(kind.as_str(), "emptyDir" | "ephemeral" | "hostPath" | "persistentVolumeClaim") {
        return Ok(None);
    }
    Err(VolumeError::Unsupported { volume: volume.name.clone(), kind })
}

/// The field that is set besides those `known`, under its name in the API.
pub(super) fn first_field(object: &impl serde::Serialize, known: &[&str]) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    let fields = value.as_object().into_iter().flat_map(|fields| fields.keys());
    fields.into_iter().find(|key| !known.contains(&key.as_str())).cloned().unwrap_or_default()
}
