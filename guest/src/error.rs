//! What a verb can fail with, and how the node is told.

use std::fmt::Write as _;
use std::io;

use tonic::{Code, Status};

/// Result of a verb.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed verb: what was tried, on what, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Error {
    code: Code,
    message: String,
    #[source]
    source: Option<io::Error>,
}

impl Error {
    /// Refuses with the node's own fault.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { code: Code::InvalidArgument, message: message.into(), source: None }
    }

    /// The named thing is not there.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self { code: Code::NotFound, message: message.into(), source: None }
    }

    /// Something is in a state in which this cannot be done.
    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self { code: Code::FailedPrecondition, message: message.into(), source: None }
    }

    /// The named thing is in use.
    pub(crate) fn in_use(message: impl Into<String>) -> Self {
        Self { code: Code::AlreadyExists, message: message.into(), source: None }
    }

    /// The kernel refused.
    pub(crate) fn failed(message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let code = match source.kind() {
            io::ErrorKind::InvalidInput => Code::InvalidArgument,
            io::ErrorKind::NotFound => Code::NotFound,
            io::ErrorKind::StorageFull => Code::ResourceExhausted,
            _ => Code::Internal,
        };
        Self { code, message: message.into(), source: Some(source) }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut message = error.message;
        if let Some(source) = error.source {
            // Writing to a string does not fail.
            let _ = write!(message, ": {source}");
        }
        Status::new(error.code, message)
    }
}

/// Adds to a failed system call what it was for.
pub(crate) trait Tried<T> {
    /// `tried` begins with "failed to".
    fn tried(self, tried: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Tried<T> for std::result::Result<T, E> {
    fn tried(self, tried: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::failed(tried(), error))
    }
}
