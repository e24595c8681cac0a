//! The verbs of images.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use tonic::{Code, Status};

use super::core::Core;
use super::failure::status;
use super::translate::invalid;
use super::{filter, tell};
use crate::runtime::Kind;
use crate::runtime::types::RegistryAuth;

/// The credentials of a request; none if it has none.
///
/// # Errors
/// Credentials in a form that is not understood.
fn credentials(auth: Option<v1::AuthConfig>) -> Result<Vec<RegistryAuth>, Status> {
    let Some(auth) = auth else { return Ok(Vec::new()) };
    if !auth.username.is_empty() || !auth.password.is_empty() {
        return Ok(vec![RegistryAuth { username: auth.username, password: auth.password }]);
    }
    if !auth.auth.is_empty() {
        let wrong = || invalid("the field auth is not the base64 of a user, a colon and a password");
        let text = STANDARD.decode(auth.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let text = text.ok_or_else(wrong)?;
        let (username, password) = text.split_once(':').ok_or_else(wrong)?;
        let password = password.trim_end_matches('\0');
        return Ok(vec![RegistryAuth { username: username.to_owned(), password: password.to_owned() }]);
    }
    if !auth.identity_token.is_empty() || !auth.registry_token.is_empty() {
        return Err(status(Code::Unimplemented, "lambdalet does not log in to registries with tokens"));
    }
    Ok(Vec::new())
}

fn name(spec: Option<v1::ImageSpec>) -> Result<String, Status> {
    let name = spec.unwrap_or_default().image;
    if name.is_empty() { Err(invalid("the request names no image")) } else { Ok(name) }
}

impl Core {
    /// Fetches an image; the answer is its id.
    pub(super) async fn pull_image(&self, request: v1::PullImageRequest) -> Result<String, Status> {
        let auths = credentials(request.auth)?;
        let id = self.runtime.pull_image(&name(request.image)?, &auths).await?;
        Ok(id.to_string())
    }

    /// The image, if it is present.
    pub(super) async fn image_status(
        &self,
        spec: Option<v1::ImageSpec>,
        verbose: bool,
    ) -> Result<v1::ImageStatusResponse, Status> {
        let found = self.runtime.image_status(&name(spec)?).await?;
        let info = found.as_ref().filter(|_| verbose).map(tell::image_info);
        let info: HashMap<_, _> = info.unwrap_or_default();
        Ok(v1::ImageStatusResponse { image: found.as_ref().map(tell::image), info })
    }

    /// The images that a client wants. A name is understood as when one is pulled.
    pub(super) async fn list_images(&self, wanted: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>, Status> {
        let name = wanted.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        if !name.is_empty() {
            let found = match self.runtime.image_status(&name).await {
                Err(error) if matches!(error.kind(), Kind::Invalid | Kind::NotFound) => None,
                found => found?,
            };
            return Ok(found.iter().map(tell::image).collect());
        }
        let found = self.runtime.list_images().await?;
        Ok(found.iter().map(tell::image).filter(|image| filter::image(image, &name)).collect())
    }

    /// Removes an image. One that is gone is Ok.
    pub(super) async fn remove_image(&self, spec: Option<v1::ImageSpec>) -> Result<(), Status> {
        let Some(image) = self.runtime.image_status(&name(spec)?).await? else { return Ok(()) };
        match self.runtime.remove_image(&image.id).await {
            Err(error) if error.kind() == Kind::AlreadyExists => {
                Err(status(Code::FailedPrecondition, &crate::telemetry::chain(&error)))
            }
            done => Ok(done?),
        }
    }

    /// Where images and writable layers are, and what they take.
    pub(super) async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, Status> {
        let found = self.runtime.image_fs_info().await?;
        let usage = v1::FilesystemUsage {
            timestamp: tell::nanoseconds(Some(Timestamp::now())),
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: found.path.to_string_lossy().into_owned() }),
            used_bytes: found.used.map(|value| v1::UInt64Value { value }),
            inodes_used: None,
        };
        Ok(v1::ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(username: &str, password: &str, auth: &str, token: &str) -> v1::AuthConfig {
        v1::AuthConfig {
            username: username.into(),
            password: password.into(),
            auth: auth.into(),
            identity_token: token.into(),
            ..Default::default()
        }
    }

    #[test]
    fn credentials_come_as_two_fields_or_as_one() {
        let pair = |name: &str, password: &str| RegistryAuth { username: name.into(), password: password.into() };
        assert_eq!(credentials(None).unwrap(), []);
        assert_eq!(credentials(Some(auth("", "", "", ""))).unwrap(), []);
        assert_eq!(credentials(Some(auth("u", "p", "", ""))).unwrap(), [pair("u", "p")]);
        assert_eq!(credentials(Some(auth("", "", "dTpwOnE=", ""))).unwrap(), [pair("u", "p:q")]);
        assert_eq!(credentials(Some(auth("", "", "dQ==", ""))).unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(credentials(Some(auth("", "", "", "t"))).unwrap_err().code(), Code::Unimplemented);
    }
}
