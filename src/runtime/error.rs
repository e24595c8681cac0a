//! What a runtime verb can fail with.

use std::error::Error as StdError;

/// Result of a runtime verb.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// The class of a failure, on which callers decide (the text is for people).
///
/// The names follow the gRPC codes that CRI v1 prescribes for its verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The named sandbox, container or image does not exist.
    NotFound,
    /// An object of that name exists already and differs from what was asked.
    AlreadyExists,
    /// The request itself is wrong (a command that does not exist, a bad user); a retry cannot help.
    Invalid,
    /// The runtime cannot be reached or is shutting down; a retry may help.
    Unavailable,
    /// This runtime cannot do what was asked, on this host or at all.
    Unsupported,
    /// Credentials for a registry are missing or were refused.
    Unauthorized,
    /// Anything else.
    Internal,
}

/// A failed runtime verb: what was tried, on what, and why it failed.
///
/// `Display` gives what was tried and the runtime's own words, never the source's text; print the whole chain with
/// [`crate::telemetry::chain`].
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RuntimeError {
    kind: Kind,
    message: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl RuntimeError {
    /// A failure without an underlying cause.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The same failure with its cause kept for the chain.
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The class of this failure.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the named thing does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind == Kind::NotFound
    }
}
