//! Images: pull, status, list, remove.

use std::collections::HashMap;

use futures::{StreamExt, TryStreamExt, stream};
use lambdalet_proto::cri::v1;
use serde::Deserialize;

use super::CriRuntime;
use super::client::{ask, failed, unless_absent};
use super::sandbox::CALLS_IN_FLIGHT;
use crate::runtime::reference::parse;
use crate::runtime::registry::{of_words, others_may_succeed, tries};
use crate::runtime::types::{Image, ImageId, RegistryAuth};
use crate::runtime::{Kind, Result, RuntimeError};

/// The part of a verbose status that is read: the image's own config, as OCI has it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Info {
    image_spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    config: Config,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Config {
    user: String,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

impl CriRuntime {
    pub(super) async fn pull(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        let parsed = parse(reference)?;
        let mut refused = RuntimeError::new(Kind::Internal, format!("failed to pull image {reference}"));
        for auth in tries(auths) {
            match self.pull_with(&parsed.whole(), auth).await {
                Ok(id) => return Ok(id),
                Err(error) if others_may_succeed(&error) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    /// As long as it takes: the runtime gives a pull up that makes no progress.
    async fn pull_with(&self, name: &str, auth: Option<&RegistryAuth>) -> Result<ImageId> {
        let request = v1::PullImageRequest {
            image: Some(spec(name)),
            auth: auth.map(|auth| v1::AuthConfig {
                username: auth.username.clone(),
                password: auth.password.clone(),
                ..v1::AuthConfig::default()
            }),
            sandbox_config: None,
        };
        match self.client.images.clone().pull_image(request).await {
            Ok(answer) => Ok(answer.into_inner().image_ref.into()),
            Err(status) => {
                let error = failed(&format!("failed to pull image {name}"), &status);
                // Of a class of their own are only the plainest failures.
                let kind = if error.kind() == Kind::Internal { of_words(status.message()) } else { error.kind() };
                Err(RuntimeError::new(kind, error.to_string()))
            }
        }
    }

    pub(super) async fn image(&self, reference: &str) -> Result<Option<Image>> {
        let name = if reference.starts_with("sha256:") { reference.to_owned() } else { parse(reference)?.whole() };
        let request = v1::ImageStatusRequest { image: Some(spec(&name)), verbose: true };
        let tried = || format!("failed to look at image {name}");
        match ask!(self.client.images, image_status(request), tried).await {
            Ok(answer) => Ok(answer.image.map(|image| described(image, &answer.info))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn images(&self) -> Result<Vec<Image>> {
        let request = v1::ListImagesRequest { filter: None };
        let listed = ask!(self.client.images, list_images(request), || "failed to list images".to_owned()).await?;
        let images = listed.images.into_iter().map(|image| async move { self.image(&image.id).await });
        let images = stream::iter(images).buffer_unordered(CALLS_IN_FLIGHT);
        images.try_filter_map(|image| async move { Ok(image) }).try_collect().await
    }

    pub(super) async fn delete_image(&self, id: &ImageId) -> Result<()> {
        let tried = || format!("failed to remove image {id}");
        // Its own sandboxes are made of it; not every runtime refuses this by itself.
        let request = v1::ImageStatusRequest { image: Some(spec(id.as_str())), verbose: false };
        let known = ask!(self.client.images, image_status(request), tried).await?.image;
        if known.is_some_and(|image| image.pinned) {
            return Err(RuntimeError::new(Kind::AlreadyExists, format!("{}: the runtime has pinned it", tried())));
        }
        // A runtime would take the image from under a stopped container.
        let everything = v1::ListContainersRequest { filter: None };
        let containers = ask!(self.client.runtime, list_containers(everything), tried).await?.containers;
        let uses = |container: &&v1::Container| {
            let named = container.image.as_ref().map_or("", |image| &image.image);
            [&container.image_id, &container.image_ref, named].contains(&id.as_str())
        };
        let users = containers.iter().filter(uses).count();
        if users > 0 {
            return Err(RuntimeError::new(Kind::AlreadyExists, format!("{}: {users} containers use it", tried())));
        }
        let request = v1::RemoveImageRequest { image: Some(spec(id.as_str())) };
        unless_absent(ask!(self.client.images, remove_image(request), tried).await.map(drop))
    }
}

fn spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), ..v1::ImageSpec::default() }
}

fn described(image: v1::Image, info: &HashMap<String, String>) -> Image {
    let told = info.get("info").and_then(|info| serde_json::from_str::<Info>(info).ok());
    let Config { user, env, entrypoint, cmd } = told.unwrap_or_default().image_spec.config;
    // Without the runtime's own word the user is told by CRI in two parts.
    let user = match (user.is_empty(), image.uid) {
        (false, _) => user,
        (true, Some(uid)) if uid.value != 0 => uid.value.to_string(),
        (true, _) => image.username,
    };
    Image {
        id: image.id.into(),
        tags: image.repo_tags,
        digests: image.repo_digests,
        size: image.size,
        user,
        entrypoint: entrypoint.unwrap_or_default(),
        command: cmd.unwrap_or_default(),
        environment: env.unwrap_or_default(),
        pinned: image.pinned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_described_by_its_own_config() {
        let info = r#"{"chainID":"sha256:2","imageSpec":{"architecture":"amd64","config":{"User":"www:33",
            "Env":["A=1"],"Cmd":["sh"],"Entrypoint":null}}}"#;
        let info = HashMap::from([("info".to_owned(), info.to_owned())]);
        let image =
            v1::Image { id: "sha256:1".to_owned(), size: 7, username: "www".to_owned(), ..v1::Image::default() };
        let told = described(image.clone(), &info);
        assert_eq!((told.user.as_str(), told.command.as_slice()), ("www:33", ["sh".to_owned()].as_slice()));
        assert_eq!((told.environment.len(), told.entrypoint.len(), told.size), (1, 0, 7));
        assert_eq!(described(image.clone(), &HashMap::new()).user, "www");
        let numbered = v1::Image { uid: Some(v1::Int64Value { value: 12 }), ..image };
        assert_eq!(described(numbered, &HashMap::new()).user, "12");
    }
}
