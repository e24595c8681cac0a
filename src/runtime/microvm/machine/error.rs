//! What a machine can fail with.

use std::io;
use std::path::{Path, PathBuf};

use super::{VmExit, VmId};
use crate::runtime::{Kind, RuntimeError};

/// Result of whatever is done with machines.
pub type Result<T, E = MachineError> = std::result::Result<T, E>;

/// What a machine can fail with.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file or directory of the host.
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
    /// A file that may not be used, or is not what it should be.
    #[error("{path} cannot be used: {reason}")]
    Refused {
        /// The file as it was named.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A value that no machine can have.
    #[error("{what} is not possible: {reason}")]
    Invalid {
        /// The value, with its name.
        what: String,
        /// Why not.
        reason: String,
    },
    /// The VMM's jail could not be made, or the VMM not be started in it.
    #[error("failed to {action} for machine {id}")]
    Start {
        /// The step.
        action: String,
        /// The machine.
        id: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The VMM ended before it worked.
    #[error("{vmm} of machine {id} ended ({exit:?}): {said}")]
    Ended {
        /// Which VMM.
        vmm: &'static str,
        /// The machine.
        id: String,
        /// How.
        exit: VmExit,
        /// The end of what it wrote.
        said: String,
    },
    /// A socket of the VMM could not be reached, or broke.
    #[error("failed to {action} {socket}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket.
        socket: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The VMM refused a request.
    #[error("{vmm} refused {request}: {message}")]
    Api {
        /// Which VMM.
        vmm: &'static str,
        /// What was asked of it.
        request: String,
        /// Its words.
        message: String,
    },
    /// Something did not happen in time.
    #[error("{what} of machine {id} took more than {seconds} s")]
    Late {
        /// What was waited for.
        what: String,
        /// The machine.
        id: String,
        /// How long.
        seconds: u64,
    },
    /// The machine has no such slot.
    #[error("machine {id} has no slot image{slot}, only {slots}")]
    NoSlot {
        /// The machine.
        id: String,
        /// The slot asked for.
        slot: u8,
        /// How many there are.
        slots: u8,
    },
    /// A template does not fit what is to be made of it.
    #[error("template {template} does not fit: {what}")]
    Mismatch {
        /// The template's directory.
        template: PathBuf,
        /// What differs.
        what: String,
    },
    /// This manager, or this machine, cannot do that.
    #[error("{vmm} cannot {what}")]
    Unsupported {
        /// Which VMM.
        vmm: &'static str,
        /// What was asked.
        what: String,
    },
    /// A setup was given back that nobody has.
    #[error("VM setup is not assigned")]
    NotAssigned,
}

impl MachineError {
    /// Makes the error of an action on a file.
    pub(super) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    /// Makes the error of a step of a machine's start.
    pub(super) fn start(action: &str, id: &VmId) -> impl FnOnce(io::Error) -> Self {
        let (action, id) = (action.to_owned(), id.to_string());
        move |source| Self::Start { action, id, source }
    }

    /// The class of this failure for callers of the runtime.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Refused { .. } | Self::Invalid { .. } | Self::NoSlot { .. } => Kind::Invalid,
            Self::NotAssigned => Kind::NotFound,
            Self::Unsupported { .. } => Kind::Unsupported,
            Self::File { .. }
            | Self::Start { .. }
            | Self::Ended { .. }
            | Self::Socket { .. }
            | Self::Api { .. }
            | Self::Late { .. }
            | Self::Mismatch { .. } => Kind::Internal,
        }
    }

    /// As a failed verb of the runtime, which says what was tried.
    pub fn during(self, tried: impl Into<String>) -> RuntimeError {
        RuntimeError::new(self.kind(), tried).with_source(self)
    }
}
