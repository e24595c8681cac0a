//! What is wrong with a layer, or with writing it out.

use std::io;

/// Why a layer could not be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayerError {
    /// Its bytes cannot be read, or cannot be decompressed.
    #[error("failed to read it")]
    Read(#[source] io::Error),
    /// It is no tar archive, or a damaged one.
    #[error("it is not a whole tar archive: {0}")]
    Malformed(&'static str),
    /// It holds something that no layer may hold.
    #[error("its entry {path:?} {why}")]
    Refused {
        /// The path as the archive has it.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is more of something than is taken.
    #[error("it has more than {limit} {what}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The most that is taken.
        limit: u64,
    },
    /// The file system refused an entry.
    #[error("failed to write its entry {path:?}")]
    Write {
        /// The path as the archive has it.
        path: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// It is not the layer that the image's config names.
    #[error("its content is {found}, and the image's config names {wanted}")]
    Digest {
        /// The config's `diff_id`.
        wanted: String,
        /// The content's.
        found: String,
    },
    /// Nobody waits for it any more.
    #[error("it is no longer wanted")]
    Cancelled,
}

impl LayerError {
    /// A refused entry.
    pub(super) fn refused(path: &[u8], why: &'static str) -> Self {
        Self::Refused { path: shown(path), why }
    }

    /// An entry that the file system refused.
    pub(super) fn write(path: &[u8], source: impl Into<io::Error>) -> Self {
        Self::Write { path: shown(path), source: source.into() }
    }
}

/// Longest part of a path that is told, in bytes: the archive chose it.
const LONGEST_SHOWN: usize = 200;

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(LONGEST_SHOWN)]).into_owned()
}
