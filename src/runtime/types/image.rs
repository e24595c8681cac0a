//! Images, and who may fetch them.

use std::fmt;

use super::ImageId;

/// One image in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Content address.
    pub id: ImageId,
    /// `repository:tag` names.
    pub tags: Vec<String>,
    /// `repository@sha256:…` names.
    pub digests: Vec<String>,
    /// Bytes on disk.
    pub size: u64,
    /// The image's USER, as written (`1000`, `1000:1000`, `www-data`, or empty for root).
    pub user: String,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub command: Vec<String>,
    /// ENV, as `NAME=value`.
    pub environment: Vec<String>,
    /// The runtime itself needs it, for the processes that hold sandboxes: no collection of garbage may remove it.
    pub pinned: bool,
}

impl Image {
    /// One of which nothing is known but its id.
    pub fn new(id: impl Into<ImageId>) -> Self {
        Self {
            id: id.into(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 0,
            user: String::new(),
            entrypoint: Vec::new(),
            command: Vec::new(),
            environment: Vec::new(),
            pinned: false,
        }
    }
}

/// Credentials for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

impl fmt::Debug for RegistryAuth {
    // A password must not reach a log by way of {:?}.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth").field("username", &self.username).finish_non_exhaustive()
    }
}
