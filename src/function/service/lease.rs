//! How the front gets its environments from a pool.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::{Answer, Service};
use crate::function::front::{Environment, Lease, Leases, Leaves, Outcome, Reason as Refusal, TryAgain};
use crate::function::pool_state::{self, CallId, Event, Exit, Reason};
use crate::function::protocol::Protocol;

/// The door between the front and a pool.
pub struct Door(pub Arc<Service>);

/// A call that waits, as the pool knows it.
pub(super) struct Caller {
    pub(super) answer: oneshot::Sender<Answer>,
    /// Since when.
    pub(super) since: Instant,
}

/// A lease on its way to its caller. One that nobody takes was not used.
pub(super) struct Granted(Option<Lease>);

impl Granted {
    pub(super) fn new(lease: Lease) -> Self {
        Self(Some(lease))
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(lease) = self.0.take() {
            lease.finish(Outcome::CutOff { begun: false });
        }
    }
}

/// A call that waits. Dropped, its client has left.
struct Waiting<'a> {
    service: &'a Arc<Service>,
    call: CallId,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered {
            // Its place goes with this. A lease that is there already has gone with its receiver, and fed the pool.
            self.service.feed(Event::ClientGone { call: self.call });
        }
    }
}

impl Leases for Door {
    async fn lease(&self) -> Result<Lease, TryAgain> {
        let service = &self.0;
        let call = service.new_call();
        let (sender, answer) = oneshot::channel();
        service.inner().waiting.insert(call, Caller { answer: sender, since: Instant::now() });
        let mut waiting = Waiting { service, call, answered: false };
        service.feed(Event::CallArrived { call });
        let answer = answer.await;
        waiting.answered = true;
        match answer {
            Ok(Ok(mut granted)) => granted.0.take().ok_or_else(gone),
            Ok(Err(refusal)) => Err(refusal),
            Err(_) => Err(gone()),
        }
    }
}

impl Service {
    /// What a granted call gets.
    pub(super) fn grant(
        self: &Arc<Self>,
        call: CallId,
        environment: Option<Arc<Environment>>,
    ) -> Result<Granted, TryAgain> {
        let environment = environment.ok_or_else(gone)?;
        let service = Arc::downgrade(self);
        let lease = Lease::new(environment, move |outcome| {
            if let Some(service) = service.upgrade() {
                service.call_ended(call, &outcome);
            }
        });
        Ok(Granted::new(lease))
    }

    fn call_ended(self: &Arc<Self>, call: CallId, outcome: &Outcome) {
        self.feed(match outcome.leaves() {
            Leaves::Idle => Event::CallEnded { call, reuse: true },
            // A plain server was told to stop by the closing of the connection; RIE cannot be told.
            Leaves::Unknown => Event::CallEnded { call, reuse: self.protocol() == Protocol::Http },
            Leaves::Broken => Event::CallLost { call },
        });
    }
}

/// What a call is told that the pool turned away. `crash` is the last one, if nothing has served since.
pub(super) fn refusal(try_again: &pool_state::TryAgain, crash: Option<&Exit>) -> TryAgain {
    let crashes = || crash.map_or_else(String::new, |exit| format!(": {exit}"));
    let reason = match try_again.reason {
        Reason::QueueFull => Refusal::QueueFull,
        Reason::Busy => Refusal::Deadline,
        Reason::Starting => Refusal::CannotStart("what was starting did not become ready in time".to_owned()),
        Reason::NoCapacity => Refusal::CannotStart("the node has no capacity for a replica".to_owned()),
        Reason::CrashLoop => Refusal::CannotStart(format!("its environments crash{}", crashes())),
        Reason::ShuttingDown => Refusal::ShuttingDown,
    };
    TryAgain { reason, retry_after: try_again.retry_after }
}

pub(super) fn gone() -> TryAgain {
    TryAgain { reason: Refusal::ShuttingDown, retry_after: std::time::Duration::from_secs(1) }
}
