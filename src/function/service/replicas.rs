//! What makes replicas and environments, as a pool sees it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};

use crate::function::pool_state::{EnvironmentId, Exit, Found, ReplicaId};

/// Makes and removes what a pool asks for.
///
/// Calls for one replica or environment never overlap, except that the future of a start is dropped when its stop is
/// asked for: what it had made is then the stop's to remove.
#[async_trait]
pub trait Replicas: Send + Sync + 'static {
    /// Makes a replica without environments.
    ///
    /// # Errors
    /// [`NotStarted::Denied`] if the node has no capacity to lend, [`NotStarted::Failed`] for anything else; nothing is
    /// left behind then.
    async fn start_replica(&self, replica: ReplicaId) -> Result<(), NotStarted>;

    /// Removes a replica, or what there is of it; tries until that is done. Its environments are gone before.
    async fn stop_replica(&self, replica: ReplicaId);

    /// Starts an environment of a replica that has started; returns when its processes run.
    ///
    /// # Errors
    /// Why it does not.
    async fn start_environment(&self, environment: EnvironmentId) -> Result<Started, Exit>;

    /// Ends an environment's processes and removes what there is of it; tries until that is done.
    async fn stop_environment(&self, environment: EnvironmentId);

    /// Stops the processes of an idle environment from running, without ending them. Where that is not possible they
    /// go on; a call thaws it all the same.
    async fn freeze(&self, environment: EnvironmentId);

    /// Lets them run again.
    ///
    /// # Errors
    /// What has become of it.
    async fn thaw(&self, environment: EnvironmentId) -> Result<(), Exit>;

    /// Whether an environment that runs may have calls, whenever that changes; it may to begin with. Ends with it.
    fn readiness(&self, environment: EnvironmentId) -> BoxStream<'static, bool> {
        // Whoever does not ask has nothing to tell.
        let _ = environment;
        stream::pending().boxed()
    }

    /// Has an environment ready for the moment it is asked for: made, and not started. It may be of a replica that does
    /// not exist yet. Once it is there, or cannot be, this returns; dropped half-way, it is asked for again or
    /// dismissed. What is started all the same meanwhile is started, and prepared no more.
    async fn prepare(&self, environment: EnvironmentId);

    /// Removes what is prepared and not among these any more, or not as it would be made now. Not dropped half-way.
    async fn dismiss_all_but(&self, kept: &BTreeSet<EnvironmentId>);

    /// Whether a replica has been idle, and since when, for the node's ledger.
    fn set_idle(&self, replica: ReplicaId, since: Option<Instant>);
}

/// An environment whose processes run.
pub struct Started {
    /// Where it is, or will be, listening.
    pub address: SocketAddr,
    /// How it ends, when it does.
    pub ended: BoxFuture<'static, Exit>,
    /// Whether it had been prepared.
    pub prepared: bool,
}

/// Why there is no replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotStarted {
    /// The node has no capacity to lend.
    Denied,
    /// It could not be made.
    Failed(Exit),
}

/// An environment found running after a restart of this process.
pub struct Adopted {
    /// Which.
    pub environment: EnvironmentId,
    /// Where it listens.
    pub address: SocketAddr,
    /// How it ends, when it does.
    pub ended: BoxFuture<'static, Exit>,
    /// How it was found.
    pub found: Found,
    /// Resolves when it is known to serve nothing; not asked of a frozen one.
    pub idle: BoxFuture<'static, ()>,
}
