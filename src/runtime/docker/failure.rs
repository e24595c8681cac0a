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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_dockers_words_once() {
        let error = Error::DockerResponseServerError { status_code: 404, message: "No such container: x\n".into() };
        let failure = failed("failed to inspect x", error);
        assert_eq!(crate::telemetry::chain(&failure), "failed to inspect x: No such container: x");
        assert_eq!(failure.kind(), Kind::NotFound);
    }
}
