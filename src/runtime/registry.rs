//! How this process speaks to registries itself, for the drivers that leave nothing or not everything of that to a daemon.

use std::time::Duration;

use oci_client::Client;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth as OciAuth;

use super::types::RegistryAuth;
use super::{Kind, RuntimeError};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an answer may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A client for one pull: it keeps the tokens it is given by registry, and not by user. The registries in `insecure`
/// (`host:port`) are spoken to in plain HTTP.
pub(super) fn client(insecure: &[String]) -> Client {
    Client::new(ClientConfig {
        protocol: ClientProtocol::HttpsExcept(insecure.to_vec()),
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        ..ClientConfig::default()
    })
}

/// The credentials as the client wants them.
pub(super) fn credentials(auth: Option<&RegistryAuth>) -> OciAuth {
    auth.map_or(OciAuth::Anonymous, |auth| OciAuth::Basic(auth.username.clone(), auth.password.clone()))
}

/// The credentials to try, in order; anonymously if there are none.
pub(super) fn tries(auths: &[RegistryAuth]) -> Vec<Option<&RegistryAuth>> {
    if auths.is_empty() { vec![None] } else { auths.iter().map(Some).collect() }
}

/// Whether other credentials may succeed: a registry hides what the user may not see.
pub(super) fn others_may_succeed(error: &RuntimeError) -> bool {
    matches!(error.kind(), Kind::Unauthorized | Kind::NotFound)
}

/// A registry's refusal. `tried` begins the message.
pub(super) fn refused(tried: &str, error: OciDistributionError) -> RuntimeError {
    use OciDistributionError as E;
    let kind = match &error {
        E::AuthenticationFailure(_) | E::UnauthorizedError { .. } => Kind::Unauthorized,
        E::ImageManifestNotFoundError(_) => Kind::NotFound,
        E::ServerError { code, .. } => of_status(*code),
        E::RegistryError { envelope, .. } => match envelope.errors.first().map(|error| &error.code) {
            Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => Kind::Unauthorized,
            Some(
                OciErrorCode::ManifestUnknown
                | OciErrorCode::NameUnknown
                | OciErrorCode::NotFound
                | OciErrorCode::BlobUnknown
                | OciErrorCode::ManifestBlobUnknown,
            ) => Kind::NotFound,
            Some(OciErrorCode::NameInvalid) => Kind::Invalid,
            _ => Kind::Internal,
        },
        E::RequestError(_) => Kind::Unavailable,
        _ => Kind::Internal,
    };
    RuntimeError::new(kind, tried).with_source(error)
}

/// Class of an HTTP status that came without the registry's own code.
fn of_status(status: u16) -> Kind {
    match status {
        400 => Kind::Invalid,
        401 | 403 => Kind::Unauthorized,
        404 => Kind::NotFound,
        500.. => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

/// Class of a failed pull from an engine's words: Docker passes on what the registry said as a 500 or inside the progress
/// stream, containerd as an error of no class.
pub(super) fn of_words(words: &str) -> Kind {
    let words = words.to_ascii_lowercase();
    let says = |any: &[&str]| any.iter().any(|part| words.contains(part));
    if says(&["invalid reference format", "invalid repository name", "repository name must be lowercase"]) {
        Kind::Invalid
    } else if says(&[
        "unauthorized",
        "access denied",
        "denied:",
        "authentication required",
        "no basic auth",
        "forbidden",
    ]) {
        Kind::Unauthorized
    } else if says(&["manifest unknown", "name unknown", "not found", "no matching manifest"]) {
        Kind::NotFound
    } else if says(&[
        "connection refused",
        "no such host",
        "timeout",
        "deadline exceeded",
        "connection reset",
        "server misbehaving",
        "unreachable",
        "http response to https client",
        "certificate",
        "eof",
        "service unavailable",
        "toomanyrequests",
    ]) {
        Kind::Unavailable
    } else {
        Kind::Internal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pull_is_classed_by_the_registrys_words() {
        for (words, kind) in [
            ("manifest for busybox:nope not found: manifest unknown: manifest unknown", Kind::NotFound),
            ("pull access denied for x, repository does not exist or may require 'docker login'", Kind::Unauthorized),
            ("Get \"https://r:5000/v2/\": dial tcp 10.0.0.1:5000: connect: connection refused", Kind::Unavailable),
            ("Get \"https://r/v2/\": http: server gave HTTP response to HTTPS client", Kind::Unavailable),
            ("invalid reference format", Kind::Invalid),
            ("something new", Kind::Internal),
        ] {
            assert_eq!(of_words(words), kind, "{words}");
        }
    }
}
