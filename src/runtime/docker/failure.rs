//! Docker's errors as ours: the class from the status code and, where Docker says "500" to everything, from its words.

use std::fmt::Display;

use bollard::errors::Error;

use crate::runtime::{Kind, RuntimeError};

/// Wraps a failure of Docker's API. `tried` begins the message: "failed to start container x".
pub(super) fn failed(tried: impl Display, error: Error) -> RuntimeError {
    match error {
        Error::DockerResponseServerError { status_code, message } => {
            RuntimeError::new(of_status(status_code), format!("{tried}: {}", message.trim()))
        }
        Error::DockerStreamError { error } => RuntimeError::new(Kind::Internal, format!("{tried}: {}", error.trim())),
        other => RuntimeError::new(of_transport(&other), tried.to_string()).with_source(other),
    }
}

/// Docker's words, if the daemon answered at all.
pub(super) fn words(error: &Error) -> Option<&str> {
    match error {
        Error::DockerResponseServerError { message, .. } => Some(message),
        Error::DockerStreamError { error } => Some(error),
        _ => None,
    }
}

/// The HTTP status Docker answered with.
pub(super) fn status(error: &Error) -> Option<u16> {
    match error {
        Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// Whether the named object does not exist.
pub(super) fn is_absent(error: &Error) -> bool {
    status(error) == Some(404)
}

/// Class of a status code of Docker's API.
pub(super) fn of_status(status: u16) -> Kind {
    match status {
        400 => Kind::Invalid,
        401 | 403 => Kind::Unauthorized,
        404 => Kind::NotFound,
        409 => Kind::AlreadyExists,
        501 => Kind::Unsupported,
        502..=504 => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

fn of_transport(error: &Error) -> Kind {
    match error {
        Error::RequestTimeoutError
        | Error::IOError { .. }
        | Error::HyperResponseError { .. }
        | Error::HyperLegacyError { .. }
        | Error::SocketNotFoundError(_) => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

/// Class of a failed pull from Docker's words: the daemon passes on what the registry said, mostly as a 500 or inside
/// the progress stream.
pub(super) fn of_pull(words: &str) -> Kind {
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
            assert_eq!(of_pull(words), kind, "{words}");
        }
    }

    #[test]
    fn the_message_has_dockers_words_once() {
        let error = Error::DockerResponseServerError { status_code: 404, message: "No such container: x\n".into() };
        let failure = failed("failed to inspect x", error);
        assert_eq!(crate::telemetry::chain(&failure), "failed to inspect x: No such container: x");
        assert_eq!(failure.kind(), Kind::NotFound);
    }
}
