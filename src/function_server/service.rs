//! The calls of `functionserver.Function`, and the life of each replica they start.
//!
//! ```text
//! call --wish--> task: create --answer--> call (still there? yes) --> READY --> until it ends or is released
//!                        |                     '- no: released
//!                        '- refused: the reason goes to the call
//! ```
//! What was begun is carried to its end by a task of its own, whatever becomes of the call: so a client that vanishes, or
//! a deadline, leaves no half made machine, and a replica that nobody was told of is released. A release that fails is
//! tried again until there is nothing left to release.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use lambdalet_proto::functionserver::function_server::Function;
use lambdalet_proto::functionserver::{CreateReply, CreateRequest, ReleaseRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::manager::{News, Reports};
use super::replicas::{Reason, Refusal, Replica, ReplicaWish, Replicas, Supply, TryAgain};
use super::{Limits, request, status};
use crate::retry::Retry;
use crate::runtime::locked;
use crate::telemetry::chain;

/// For a caller that met too many others, or one that is at the same replica.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// The service; clones are one.
#[derive(Clone)]
pub(super) struct Service(Arc<Inner>);

struct Inner {
    supply: watch::Receiver<Supply>,
    limits: Limits,
    creating: Arc<Semaphore>,
    releasing: Arc<Semaphore>,
    tasks: TaskTracker,
    /// Whoever watches a replica lets go of it; the replica goes on.
    ending: CancellationToken,
    /// Replicas that are being released, by whoever came first.
    releases: Mutex<HashSet<String>>,
    reports: Option<Reports>,
}

/// A replica for whoever asked for it.
struct Made {
    reply: CreateReply,
    /// Sent once the answer is on its way. Dropped instead, nobody knows of the replica.
    taken: oneshot::Sender<()>,
}

// === impl Service ===

impl Service {
    pub(super) fn new(supply: watch::Receiver<Supply>, limits: Limits, reports: Option<Reports>) -> Self {
        Self(Arc::new(Inner {
            supply,
            creating: Arc::new(Semaphore::new(limits.creating)),
            releasing: Arc::new(Semaphore::new(limits.releasing)),
            limits,
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
            releases: Mutex::default(),
            reports,
        }))
    }

    /// Watches the replicas that an earlier process left, once it is known where replicas come from. Cancel-safe.
    pub(super) async fn adopt(&self) {
        let mut supply = self.0.supply.clone();
        let ready = supply.wait_for(|supply| matches!(supply, Supply::Ready(_))).await.is_ok();
        // If not, whoever would have told is gone: there will be none.
        let Some(replicas) = self.0.replicas().ok().filter(|_| ready) else { return std::future::pending().await };
        let adopted = replicas.adopted();
        for replica in adopted {
            info!(replica = replica.id, address = %replica.address, "goes on with a replica of an earlier process");
            self.0.tasks.spawn(Arc::clone(&self.0).attend(Arc::clone(&replicas), replica.id, replica.ended));
        }
        std::future::pending().await
    }

    /// Releases a replica because the resource manager says so.
    pub(super) fn destroy(&self, id: String) {
        let inner = Arc::clone(&self.0);
        self.0.tasks.spawn(async move {
            if let Ok(replicas) = inner.replicas() {
                inner.release(replicas.as_ref(), &id, |_| {}).await;
            }
        });
    }

    /// Takes no new work, and waits for what was begun, but lets replicas run: the next process finds them.
    pub(super) async fn end(&self, patience: Duration) {
        self.0.creating.close();
        self.0.releasing.close();
        self.0.ending.cancel();
        self.0.tasks.close();
        if timeout(patience, self.0.tasks.wait()).await.is_err() {
            warn!(left = self.0.tasks.len(), "replicas were being started or ended, and are left as they are");
        }
    }
}

#[async_trait]
impl Function for Service {
    async fn create_replica(&self, request: Request<CreateRequest>) -> Result<Response<CreateReply>, Status> {
        let patience = status::patience(request.metadata(), self.0.limits.create);
        let wish = request::read(request.into_inner()).map_err(|refusal| status::of(&refusal))?;
        let replicas = self.0.replicas().map_err(|refusal| status::of(&refusal))?;
        let place = place(&self.0.creating).map_err(|refusal| status::of(&refusal))?;
        let (told, made) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        self.0.tasks.spawn(inner.create(replicas, wish, place, told));
        let Made { reply, taken } = answer(patience, "start a replica", made).await?;
        // If this fails, the task is gone, and that is told by its panic.
        let _ = taken.send(());
        Ok(Response::new(reply))
    }

    async fn release_vm_setup(&self, request: Request<ReleaseRequest>) -> Result<Response<()>, Status> {
        let patience = status::patience(request.metadata(), self.0.limits.release);
        let place = place(&self.0.releasing).map_err(|refusal| status::of(&refusal))?;
        let replicas = self.0.replicas().map_err(|refusal| status::of(&refusal))?;
        let (told, released) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        self.0.tasks.spawn(async move {
            let id = request.into_inner().vmid;
            let answer = move |outcome| {
                drop(place);
                // Whoever asked may be gone.
                let _ = told.send(outcome);
            };
            inner.release(replicas.as_ref(), &id, answer).await;
        });
        answer(patience, "release a replica", released).await.map(Response::new)
    }
}

/// What a task has to say, if it says it in time.
async fn answer<T>(patience: Duration, doing: &str, told: oneshot::Receiver<Result<T, Refusal>>) -> Result<T, Status> {
    match timeout(patience, told).await {
        Ok(Ok(outcome)) => outcome.map_err(|refusal| status::of(&refusal)),
        Ok(Err(_)) => Err(Status::internal(format!("failed to {doing}: see the node's log"))),
        Err(_) => Err(Status::deadline_exceeded(format!("failed to {doing} within {patience:?}"))),
    }
}

/// A place among the calls of one kind.
fn place(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Refusal> {
    let refused = |reason| Refusal::TryAgain(TryAgain { reason, retry_after: RETRY_SOON });
    Arc::clone(places).try_acquire_owned().map_err(|error| match error {
        tokio::sync::TryAcquireError::NoPermits => refused(Reason::Calls),
        tokio::sync::TryAcquireError::Closed => refused(Reason::Ending),
    })
}

// === impl Inner ===

impl Inner {
    fn replicas(&self) -> Result<Arc<dyn Replicas>, Refusal> {
        match &*self.supply.borrow() {
            Supply::Ready(replicas) => Ok(Arc::clone(replicas)),
            Supply::Missing(what) => Err(Refusal::Missing(what.clone())),
        }
    }

    /// Starts a replica, hands it over and stays with it.
    async fn create(
        self: Arc<Self>,
        replicas: Arc<dyn Replicas>,
        wish: ReplicaWish,
        place: OwnedSemaphorePermit,
        told: oneshot::Sender<Result<Made, Refusal>>,
    ) {
        let Replica { id, address, ended } = match replicas.create(&wish).await {
            Ok(replica) => replica,
            Err(refusal) => {
                if let Refusal::Failed { .. } = refusal {
                    warn!(error = chain(&refusal), ?wish, "a replica did not start");
                }
                // Whoever asked may be gone, and nothing is there to be released.
                let _ = told.send(Err(refusal));
                return;
            }
        };
        let (taken, kept) = oneshot::channel();
        let made = Made { reply: CreateReply { ip: address.to_string(), vmid: id.clone() }, taken };
        if told.send(Ok(made)).is_err() || kept.await.is_err() {
            info!(replica = id, "nobody waits any more for a replica that was started: it is released");
            self.release(replicas.as_ref(), &id, |_| drop(place)).await;
            return;
        }
        drop(place);
        info!(replica = id, %address, "a replica runs");
        self.report(&id, News::Ready);
        self.attend(replicas, id, ended).await;
    }

    /// Stays with a replica until it ends. If it does by itself its setup is given back, and the manager told.
    async fn attend(self: Arc<Self>, replicas: Arc<dyn Replicas>, id: String, ended: BoxFuture<'static, ()>) {
        tokio::select! {
            // Cancel-safe: the replica goes on, and the next process watches it.
            () = self.ending.cancelled() => return,
            // Cancel-safe: that it has ended stays so.
            () = ended => {}
        }
        // If not, it was released: that is how it ended, and no news.
        if self.release(replicas.as_ref(), &id, |_| {}).await {
            warn!(replica = id, "a replica has ended by itself");
            self.report(&id, News::Finished);
        }
    }

    /// Releases a replica, and goes on after a failure until it is gone; `told` hears what came of the first attempt.
    /// Whether this has released it: not if it was not there, if somebody else is at it, or at the end of this process.
    async fn release(&self, replicas: &dyn Replicas, id: &str, told: impl FnOnce(Result<(), Refusal>) + Send) -> bool {
        if !locked(&self.releases).insert(id.to_owned()) {
            // It is not gone yet: a caller that was told so would forget what the node still has.
            told(Err(Refusal::TryAgain(TryAgain { reason: Reason::Releasing, retry_after: RETRY_SOON })));
            return false;
        }
        let first = replicas.release(id).await;
        let (released, failure) = match &first {
            Ok(()) => (true, None),
            Err(Refusal::NotAssigned) => (false, None),
            Err(failure) => (false, Some(chain(failure))),
        };
        let Some(failure) = failure else {
            // Before it is told: whoever hears of it and asks again is to hear that nobody has that setup.
            locked(&self.releases).remove(id);
            told(first);
            return released;
        };
        told(first);
        let released = self.release_in_the_end(replicas, id, failure).await;
        locked(&self.releases).remove(id);
        released
    }

    /// Tries again until it is gone, or this process ends; whether it is gone.
    async fn release_in_the_end(&self, replicas: &dyn Replicas, id: &str, failure: String) -> bool {
        let mut retry = Retry::new("release a replica");
        let mut pause = retry.failed(failure);
        loop {
            tokio::select! {
                // Cancel-safe: the next process finds what is left.
                () = self.ending.cancelled() => return false,
                // Cancel-safe: it only waits.
                () = sleep(pause) => {}
            }
            match replicas.release(id).await {
                // If it is not there, only something that it left behind could not be removed.
                Ok(()) | Err(Refusal::NotAssigned) => {
                    retry.succeeded();
                    return true;
                }
                Err(failure) => pause = retry.failed(chain(&failure)),
            }
        }
    }

    fn report(&self, id: &str, news: News) {
        if let Some(reports) = &self.reports {
            reports.send(id, news);
        }
    }
}
