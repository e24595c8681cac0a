//! What the function server asks of the node: replicas, one at a time. This is its seam; [`pooled`](super::pooled) makes
//! them of microVMs, tests of nothing.

use std::error::Error as StdError;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;

/// Makes replicas and ends them.
#[async_trait]
pub trait Replicas: Send + Sync + 'static {
    /// Starts one replica. The server carries this to its end even if nobody waits any more, and releases what came of it.
    ///
    /// # Errors
    /// Nothing of it is left then.
    async fn create(&self, wish: &ReplicaWish) -> Result<Replica, Refusal>;

    /// Ends a replica and gives its setup back; also carried to its end.
    ///
    /// # Errors
    /// [`Refusal::NotAssigned`] for one that is not there, or that is being released or was. After any other error it may
    /// still be there, with all that it takes: whoever was told so tries again, until this is the answer.
    async fn release(&self, id: &str) -> Result<(), Refusal>;

    /// Replicas that an earlier process of this node started and that still run; asked for once.
    fn adopted(&self) -> Vec<Replica> {
        Vec::new()
    }
}

/// A replica that runs.
pub struct Replica {
    /// Its id (`vmid`).
    pub id: String,
    /// Where it is reached.
    pub address: IpAddr,
    /// Returns once it has ended, by itself or because it was released.
    pub ended: BoxFuture<'static, ()>,
}

/// What is asked for, checked as far as values go.
#[derive(Clone, PartialEq, Eq)]
pub struct ReplicaWish {
    /// `kernelImagePath`: an absolute path.
    pub kernel: PathBuf,
    /// `initrdPath`: an absolute path.
    pub initrd: PathBuf,
    /// `kernelArgs`: one line; may be empty.
    pub kernel_args: String,
    /// `imageName`, below `imageStoragePrefix` if it is relative: an absolute path.
    pub image: Option<PathBuf>,
    /// `inetDev`: an interface of this host.
    pub inet_dev: Option<String>,
    /// `nameServer`.
    pub name_server: IpAddr,
    /// `cpu`: virtual CPUs.
    pub cpus: u32,
    /// `mem`, in bytes; whole MiB.
    pub memory: u64,
}

/// Why there is no replica, or none was released.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A field has a value that cannot be.
    #[error("{field}: {reason}")]
    Invalid {
        /// As the protocol names it.
        field: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Nobody has that setup.
    #[error("VM setup is not assigned")]
    NotAssigned,
    /// Not now.
    #[error(transparent)]
    TryAgain(#[from] TryAgain),
    /// This node cannot make replicas, and why.
    #[error("{0}")]
    Missing(String),
    /// It was tried and failed.
    #[error("failed to {tried}")]
    Failed {
        /// What was tried.
        tried: String,
        /// Why it failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Not now, but later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}; try again in {} s", retry_after.as_secs())]
pub struct TryAgain {
    /// Why not now.
    pub reason: Reason,
    /// The earliest time at which it makes sense, from now.
    pub retry_after: Duration,
}

/// Why not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// As many replicas run as may.
    Replicas,
    /// The others have the memory.
    Memory,
    /// No address of the node's range is free.
    Address,
    /// As many calls are under way as may be at once.
    Calls,
    /// The replica is still being released.
    Releasing,
    /// The node is ending.
    Ending,
}

/// Where replicas come from now.
#[derive(Clone)]
pub enum Supply {
    /// From nowhere, and what is missing.
    Missing(String),
    /// From here.
    Ready(Arc<dyn Replicas>),
}

// === impl ReplicaWish ===

impl fmt::Debug for ReplicaWish {
    /// Without the kernel arguments: a function's secrets are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicaWish")
            .field("kernel", &self.kernel)
            .field("initrd", &self.initrd)
            .field("image", &self.image)
            .field("cpus", &self.cpus)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

// === impl Refusal ===

impl Refusal {
    /// A field with a bad value.
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    /// Something that was tried on a replica.
    pub(super) fn failed(tried: &str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Failed { tried: tried.to_owned(), source: source.into() }
    }
}

// === impl Reason ===

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replicas => "as many replicas run as this node allows",
            Self::Memory => "the replicas that run have the memory this node has for them",
            Self::Address => "no address of this node's range is free",
            Self::Calls => "too many calls are under way",
            Self::Releasing => "the replica is still being released",
            Self::Ending => "the node is ending",
        })
    }
}
