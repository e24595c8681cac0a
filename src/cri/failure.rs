//! What failures are to a CRI client: codes on which it decides, and words for people.

use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

use crate::network::NetworkError;
use crate::runtime::{Kind, RuntimeError};
use crate::telemetry::chain;

/// Bytes of a status message: it travels in a header, and those are bounded.
const LONGEST_MESSAGE: usize = 4 << 10;

/// Why the CRI cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// Another process serves it.
    #[error("{0} is in use: another process listens there; end it, or pass another socket")]
    InUse(PathBuf),
    /// The root directory is another process's.
    #[error("{0} is in use: another `lambdalet cri` has it; pass another --root-dir")]
    Locked(PathBuf),
    /// A file, directory or socket cannot be made, read or written.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The streaming server's address.
    #[error("failed to listen on {address} for streams")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The Pod network.
    #[error("failed to set up the network of the sandboxes")]
    Network(#[from] NetworkError),
    /// What is there already cannot be listed.
    #[error("failed to list what runs already")]
    Runtime(#[from] RuntimeError),
    /// gRPC.
    #[error("failed to serve gRPC")]
    Serve(#[source] tonic::transport::Error),
}

impl CriError {
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}

/// The code of a failed verb.
fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::Invalid => Code::InvalidArgument,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unsupported => Code::Unimplemented,
        Kind::Unauthorized => Code::Unauthenticated,
        Kind::Internal => Code::Internal,
    }
}

/// A status whose message fits a header.
pub(super) fn status(code: Code, message: &str) -> Status {
    let end = (0..=message.len().min(LONGEST_MESSAGE)).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    Status::new(code, &message[..end])
}

impl From<RuntimeError> for Status {
    fn from(error: RuntimeError) -> Self {
        status(code(error.kind()), &chain(&error))
    }
}

impl From<CriError> for Status {
    fn from(error: CriError) -> Self {
        let code = match &error {
            CriError::Runtime(error) => code(error.kind()),
            CriError::Network(NetworkError::Exhausted { .. }) => Code::ResourceExhausted,
            _ => Code::Internal,
        };
        status(code, &chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_its_class_and_its_cause() {
        let error = RuntimeError::new(Kind::NotFound, "no sandbox x").with_source(io::Error::other("gone"));
        let status = Status::from(error);
        assert_eq!((status.code(), status.message()), (Code::NotFound, "no sandbox x: gone"));
    }

    #[test]
    fn a_message_fits_a_header() {
        let long = Status::from(RuntimeError::new(Kind::Internal, "ä".repeat(LONGEST_MESSAGE)));
        assert!(long.message().len() <= LONGEST_MESSAGE && long.message().len() > LONGEST_MESSAGE - 2);
    }
}
