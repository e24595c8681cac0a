//! What the front asks of whoever owns the environments: one of them per call, and back again.
//!
//! ```text
//! Leases::lease --wait--> Lease --call--> Lease::finish(Outcome) --> the closure given to Lease::new
//!      '--> TryAgain (429 or 503)   '--dropped--> Outcome::Dropped ----^
//! ```

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::wire::Wire;

/// Where leases come from: the pool of a function, or a fake.
pub trait Leases: Send + Sync + 'static {
    /// Waits for an environment that may take one more call; queueing and its bounds are the implementor's.
    ///
    /// Cancel-safe: dropped, because the client left, it must give up its place, and a lease that was already granted
    /// comes back as [`Outcome::Dropped`] by itself.
    ///
    /// # Errors
    /// [`TryAgain`] if there is none to be had: it is the client's answer.
    fn lease(&self) -> impl Future<Output = Result<Lease, TryAgain>> + Send;
}

/// Why a call gets no environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The function's queue is full. 429.
    QueueFull,
    /// It waited as long as a call may wait. 429.
    Deadline,
    /// No replica can start, and why. 503.
    CannotStart(String),
    /// The runtime in the environment did not ask for another call. 503.
    Unready,
    /// The Pod or the node is ending. 503.
    ShuttingDown,
}

/// No environment now; another attempt later may get one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no environment is available: {reason}")]
pub struct TryAgain {
    /// Why not.
    pub reason: Reason,
    /// When it makes sense to try again; said in whole seconds, rounded up, at least one.
    pub retry_after: Duration,
}

/// An environment that ended, or is not to be waited for any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct LeaseLost {
    /// What the caller is told, such as `exit status 137 (OOMKilled)`.
    pub reason: Arc<str>,
}

/// How a lease ended; said exactly once for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The environment's answer was read to its end.
    Answered,
    /// So it was, but the client had left before.
    ClientGone,
    /// The request was not sent to its end: the client left or stalled while sending, or sent too much. The connection
    /// to the environment is closed.
    CutOff {
        /// It was on the path of the Lambda RIE, which begins a call only when it has the whole request.
        begun: bool,
    },
    /// The connection broke before the end of the answer, or the environment was lost.
    Lost(Arc<str>),
    /// It could not be connected to; nothing of the request was sent.
    Unreachable(Arc<str>),
    /// Nobody knows: the lease was dropped, by a deadline of the drain or a panic.
    Dropped,
}

/// What an [`Outcome`] says of the environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// It does nothing and may take the next call.
    Idle,
    /// It may still be at it: no further call, where it serves one at a time, until it is known to be idle.
    Unknown,
    /// It does not answer.
    Broken,
}

/// The right to one call in an environment.
pub struct Lease {
    environment: Arc<Environment>,
    ended: Option<Box<dyn FnOnce(Outcome) + Send>>,
}

/// An environment as the front sees it: where it is, the connections kept to it, and whether it is lost. The pool
/// makes one when the environment can be connected to, and gives it to each [`Lease`].
pub struct Environment {
    address: SocketAddr,
    /// At most as many as there were calls at once; the one used last is at the end.
    kept: Mutex<Vec<(Wire, Instant)>>,
    lost: OnceLock<LeaseLost>,
    gone: CancellationToken,
}

// === impl Reason, TryAgain ===

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull => f.write_str("too many calls are waiting"),
            Self::Deadline => f.write_str("none became free in time"),
            Self::CannotStart(why) => write!(f, "none can start: {why}"),
            Self::Unready => f.write_str("its runtime asked for no other call in time"),
            Self::ShuttingDown => f.write_str("the function is shutting down"),
        }
    }
}

impl TryAgain {
    /// The client is to slow down (429), rather than told of a fault (503).
    pub fn is_busy(&self) -> bool {
        match self.reason {
            Reason::QueueFull | Reason::Deadline => true,
            Reason::CannotStart(_) | Reason::Unready | Reason::ShuttingDown => false,
        }
    }

    /// Value of `Retry-After` (RFC 9110, 10.2.3), in seconds.
    pub fn retry_after_seconds(&self) -> u64 {
        let whole = self.retry_after.as_secs();
        (whole + u64::from(self.retry_after.subsec_nanos() > 0)).max(1)
    }
}

// === impl Outcome ===

impl Outcome {
    /// What is known of the environment now.
    pub fn leaves(&self) -> Leaves {
        match self {
            Self::Answered | Self::ClientGone | Self::CutOff { begun: false } => Leaves::Idle,
            Self::CutOff { begun: true } | Self::Dropped => Leaves::Unknown,
            Self::Lost(_) | Self::Unreachable(_) => Leaves::Broken,
        }
    }
}

// === impl Lease ===

impl Lease {
    /// `ended` is called exactly once, from any thread, also in a destructor: it must neither block nor panic.
    pub fn new(environment: Arc<Environment>, ended: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self { environment, ended: Some(Box::new(ended)) }
    }

    /// Where the call goes.
    pub fn environment(&self) -> &Arc<Environment> {
        &self.environment
    }

    /// Gives it back. Dropping it instead is [`Outcome::Dropped`].
    pub fn finish(mut self, outcome: Outcome) {
        if let Some(ended) = self.ended.take() {
            ended(outcome);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            ended(Outcome::Dropped);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("environment", &self.environment.address).finish_non_exhaustive()
    }
}

// === impl Environment ===

impl Environment {
    /// An environment that listens on `address`.
    pub fn new(address: SocketAddr) -> Arc<Self> {
        let (kept, lost, gone) = (Mutex::default(), OnceLock::new(), CancellationToken::new());
        Arc::new(Self { address, kept, lost, gone })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// It ended, or its calls are to be given up: each is answered 502 with `reason`, or reset if its answer has begun.
    /// Only the first reason counts.
    pub fn lose(&self, reason: impl Into<Arc<str>>) {
        let _ = self.lost.set(LeaseLost { reason: reason.into() });
        self.gone.cancel();
        self.kept().clear();
    }

    /// Resolves when the environment is lost.
    pub async fn lost(&self) -> LeaseLost {
        self.gone.cancelled().await;
        self.why_lost()
    }

    /// The same as a future of its own, without the reason.
    pub(super) fn gone(&self) -> WaitForCancellationFutureOwned {
        self.gone.clone().cancelled_owned()
    }

    /// Only after [`Environment::gone`].
    pub(super) fn why_lost(&self) -> LeaseLost {
        self.lost.get().cloned().unwrap_or_else(|| LeaseLost { reason: "the environment ended".into() })
    }

    /// A connection that was used less than `fresh` ago, if there is one.
    pub(super) fn take(&self, fresh: Duration) -> Option<Wire> {
        let mut kept = self.kept();
        let (wire, since) = kept.pop()?;
        if since.elapsed() < fresh {
            return Some(wire);
        }
        // Those below it are older still.
        kept.clear();
        None
    }

    /// Keeps a connection that is idle.
    pub(super) fn keep(&self, wire: Wire) {
        if !self.gone.is_cancelled() {
            self.kept().push((wire, Instant::now()));
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(Wire, Instant)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").field("address", &self.address).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> (Lease, Arc<Mutex<Vec<Outcome>>>) {
        let said = Arc::new(Mutex::new(Vec::new()));
        let hears = said.clone();
        let lease = Lease::new(Environment::new(([127, 0, 0, 1], 1).into()), move |outcome| {
            hears.lock().unwrap().push(outcome);
        });
        (lease, said)
    }

    #[test]
    fn each_lease_ends_exactly_once() {
        let (finished, said) = lease();
        finished.finish(Outcome::Answered);
        assert_eq!(*said.lock().unwrap(), [Outcome::Answered]);
        let (dropped, said) = lease();
        drop(dropped);
        assert_eq!(*said.lock().unwrap(), [Outcome::Dropped]);
    }

    #[test]
    fn retry_after_is_whole_seconds_and_never_zero() {
        let seconds = |milliseconds| {
            let retry_after = Duration::from_millis(milliseconds);
            TryAgain { reason: Reason::QueueFull, retry_after }.retry_after_seconds()
        };
        assert_eq!([0, 1, 1000, 1001, 2500].map(seconds), [1, 1, 1, 2, 3]);
    }

    #[tokio::test]
    async fn the_first_reason_of_a_loss_is_the_one_that_is_told() {
        let environment = Environment::new(([127, 0, 0, 1], 1).into());
        environment.lose("exit status 1");
        environment.lose("removed");
        assert_eq!(&*environment.lost().await.reason, "exit status 1");
    }
}
