//! Images: pull with credentials, status, list, remove.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use bollard::models::ImageInspect;
use bollard::query_parameters::{ListContainersOptionsBuilder, ListImagesOptions, RemoveImageOptionsBuilder};
use futures::{StreamExt, TryStreamExt, stream};
use hyper::Method;
use oci_client::Reference;
use serde::Deserialize;

use super::container::INSPECTS_IN_FLIGHT;
use super::failure::{self, failed, is_absent, status as http_status};
use super::{DockerRuntime, http, pause, plain_registry};
use crate::runtime::reference::parse;
use crate::runtime::registry::{of_words, others_may_succeed, tries};
use crate::runtime::types::{Image, ImageId, RegistryAuth};
use crate::runtime::{Kind, Result, RuntimeError};

/// One step of a pull, of which only a failure matters.
#[derive(Debug, Deserialize)]
struct Progress {
    #[serde(default)]
    error: Option<String>,
}

/// What Docker is asked for: with a digest the tag says nothing.
fn whole(reference: &Reference) -> String {
    let name = format!("{}/{}", reference.registry(), reference.repository());
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => format!("{name}@{digest}"),
        (None, tag) => format!("{name}:{}", tag.unwrap_or("latest")),
    }
}

impl DockerRuntime {
    pub(super) async fn pull(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        let parsed = parse(reference)?;
        let plain = self.options.insecure_registries.iter().any(|host| host == parsed.registry());
        let mut refused = RuntimeError::new(Kind::Internal, format!("failed to pull image {reference}"));
        for auth in tries(auths) {
            let pulled = if plain {
                plain_registry::pull(self, &parsed, auth).await
            } else {
                self.pull_by_daemon(&parsed, auth).await
            };
            match pulled {
                Ok(id) => return Ok(id),
                Err(error) if others_may_succeed(&error) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    async fn pull_by_daemon(&self, reference: &Reference, auth: Option<&RegistryAuth>) -> Result<ImageId> {
        let name = whole(reference);
        let tried = format!("failed to pull image {name}");
        let credentials = auth.map(|auth| {
            let body = serde_json::json!({ "username": auth.username, "password": auth.password,
                "serveraddress": reference.registry() });
            URL_SAFE.encode(body.to_string())
        });
        let target = format!("/images/create?fromImage={}", http::query_value(&name));
        let classed = |error: RuntimeError| match error.kind() {
            Kind::Unavailable => error,
            _ => RuntimeError::new(of_words(&error.to_string()), error.to_string()),
        };
        let body = http::request(&self.options.socket, &tried, Method::POST, &target, credentials.as_deref())
            .await
            .map_err(classed)?;
        let mut steps = http::json_lines::<Progress>(body, "failed to read a pull's progress");
        while let Some(step) = steps.try_next().await? {
            if let Some(words) = step.error {
                return Err(RuntimeError::new(of_words(&words), format!("{tried}: {words}")));
            }
        }
        let image = self.inspect_image(&name).await?;
        let gone = || RuntimeError::new(Kind::Internal, format!("{tried}: it is not there after the pull"));
        Ok(image.ok_or_else(gone)?.id)
    }

    pub(super) async fn image(&self, reference: &str) -> Result<Option<Image>> {
        if reference.starts_with("sha256:") {
            return self.inspect_image(reference).await;
        }
        let parsed = parse(reference)?;
        if let Some(image) = self.inspect_image(&whole(&parsed)).await? {
            return Ok(Some(image));
        }
        match plain_registry::stand_in(&parsed) {
            Some(name) => self.inspect_image(&name).await,
            None => Ok(None),
        }
    }

    pub(super) async fn inspect_image(&self, name: &str) -> Result<Option<Image>> {
        match self.docker.inspect_image(name).await {
            Ok(image) => {
                let image = described(image);
                Ok(Some(Image { pinned: self.holds_sandboxes(&image), ..image }))
            }
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(failed(format!("failed to inspect image {name}"), error)),
        }
    }

    fn holds_sandboxes(&self, image: &Image) -> bool {
        let own = pause::reference();
        let name = self.options.sandbox_image.as_ref().unwrap_or(&own);
        let Ok(wanted) = parse(name) else { return false };
        let names = [Some(whole(&wanted)), plain_registry::stand_in(&wanted)];
        // Docker's names are without its defaults, an operator's perhaps with them.
        let known = image.tags.iter().chain(&image.digests).filter_map(|name| parse(name).ok());
        known.map(|known| Some(whole(&known))).any(|known| names.contains(&known))
    }

    pub(super) async fn images(&self) -> Result<Vec<Image>> {
        let listed = self.docker.list_images(None::<ListImagesOptions>).await;
        let listed = listed.map_err(|error| failed("failed to list images", error))?;
        stream::iter(listed)
            .map(|summary| async move { self.inspect_image(&summary.id).await })
            .buffer_unordered(INSPECTS_IN_FLIGHT)
            .try_filter_map(|image| async move { Ok(image) })
            .try_collect()
            .await
    }

    pub(super) async fn delete_image(&self, id: &ImageId) -> Result<()> {
        let tried = || format!("failed to remove image {id}");
        // Docker would let a forced removal take the image from under a stopped container.
        let filter = std::collections::HashMap::from([("ancestor".to_owned(), vec![id.to_string()])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filter).build();
        let users = match self.docker.list_containers(Some(options)).await {
            Ok(users) => users,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(failed(tried(), error)),
        };
        if !users.is_empty() {
            let text = format!("{}: {} containers use it", tried(), users.len());
            return Err(RuntimeError::new(Kind::AlreadyExists, text));
        }
        // By force, since an image of several names is not removed by id without.
        let options = RemoveImageOptionsBuilder::new().force(true).build();
        match self.docker.remove_image(id.as_str(), Some(options), None).await {
            Ok(_) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) if http_status(&error) == Some(409) => {
                let words = failure::words(&error).unwrap_or_default();
                Err(RuntimeError::new(Kind::AlreadyExists, format!("{}: {words}", tried())))
            }
            Err(error) => Err(failed(tried(), error)),
        }
    }
}

/// The image, from Docker's description of it.
pub(in crate::runtime) fn described(image: ImageInspect) -> Image {
    let named = |names: Option<Vec<String>>| {
        names.unwrap_or_default().into_iter().filter(|name| !name.contains("<none>")).collect()
    };
    let config = image.config.unwrap_or_default();
    Image {
        id: ImageId::from(image.id.unwrap_or_default()),
        tags: named(image.repo_tags),
        digests: named(image.repo_digests),
        size: image.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        user: config.user.unwrap_or_default(),
        entrypoint: config.entrypoint.unwrap_or_default(),
        command: config.cmd.unwrap_or_default(),
        environment: config.env.unwrap_or_default(),
        pinned: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_gets_dockers_defaults() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (written, meant) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("user/app:1", "docker.io/user/app:1".to_owned()),
            ("localhost:5000/a", "localhost:5000/a:latest".to_owned()),
            (&format!("r.io/a:1@{digest}"), format!("r.io/a@{digest}")),
        ] {
            assert_eq!(whole(&parse(written).unwrap()), meant);
        }
    }
}
