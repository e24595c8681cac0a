//! What a pool looks like from outside: for the Pod's condition and status, metrics, and `lambdalet functions`.

use std::fmt;
use std::time::Instant;

use super::replica::{Phase, State, each};
use super::{Exit, Pool, ReplicaId};

/// A pool in numbers. Written out it is the text of the Pod condition `lambdalet.dev/Replicas`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Replicas that exist: starting, ready, draining and stopping.
    pub replicas: usize,
    /// Of those, the ones that start.
    pub starting: usize,
    /// Of those, the ones with an environment that takes calls.
    pub ready: usize,
    /// Of those, the ones that take no new call: draining or stopping.
    pub leaving: usize,
    /// As the labels say.
    pub min: usize,
    /// As the labels say.
    pub max: usize,
    /// Environments that start.
    pub launching: usize,
    /// Environments that run, frozen ones included.
    pub environments: usize,
    /// Of those, the ones with a call.
    pub busy: usize,
    /// Of those, the ones whose only calls have lost their client.
    pub tainted: usize,
    /// Of those, the ones that are frozen.
    pub frozen: usize,
    /// Calls that run, those whose client is gone included.
    pub running: usize,
    /// Calls that wait.
    pub queued: usize,
    /// Environments that have crashed, ever: the Pod's restart count.
    pub crashes: u64,
    /// The last crash, until something that was started later has served a call.
    pub crash: Option<Crash>,
    /// The node has no capacity for a replica that is wanted.
    pub limited: bool,
    /// The Pod is being deleted.
    pub draining: bool,
}

/// A crash that still matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// What happened.
    pub exit: Exit,
    /// Nothing is started before: the Pod is in `CrashLoopBackOff`. `None`: it was restarted at once.
    pub until: Option<Instant>,
}

impl Summary {
    /// Whether the Pod is Ready, as far as its replicas go.
    pub fn is_ready(&self) -> bool {
        !self.draining && self.ready >= self.min && self.crash.as_ref().is_none_or(|crash| crash.until.is_none())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { replicas, max, environments, busy, queued, .. } = self;
        write!(f, "{replicas}/{max} replicas, {environments} environments, {busy} busy, {queued} queued")
    }
}

impl Pool {
    /// The pool in numbers.
    pub fn summary(&self, now: Instant) -> Summary {
        let mut summary = Summary {
            replicas: self.replicas.len(),
            min: self.settings.min as usize,
            max: self.settings.max as usize,
            running: self.running.len(),
            queued: self.waiting.len(),
            crashes: self.crashes,
            crash: self.crash.clone().map(|exit| Crash { exit, until: self.backoff.holds(now) }),
            limited: self.denied.is_some_and(|until| until > now),
            draining: self.drain.is_some(),
            ..Summary::default()
        };
        for replica in self.replicas.values() {
            summary.starting += usize::from(replica.phase == Phase::Starting);
            summary.leaving += usize::from(!replica.is_kept());
            let takes = |state| matches!(state, State::Ready | State::Frozen | State::Thawing);
            let mut environments = replica.environments.values();
            let ready = replica.phase == Phase::Ready && environments.any(|e| takes(e.state) && !e.unready);
            summary.ready += usize::from(ready);
        }
        for (_, _, environment) in each(&self.replicas) {
            let runs = !matches!(environment.state, State::Cold | State::Starting | State::Stopping);
            let gone = |call| self.running.get(call).is_some_and(|running| running.client_gone);
            let busy = !environment.calls.is_empty();
            summary.launching += usize::from(environment.state == State::Starting);
            summary.environments += usize::from(runs);
            summary.busy += usize::from(busy);
            summary.tainted += usize::from(busy && environment.calls.iter().all(gone));
            summary.frozen += usize::from(environment.state == State::Frozen);
        }
        summary
    }

    /// The last crash, until something that was started later has served a call.
    pub fn last_crash(&self) -> Option<&Exit> {
        self.crash.as_ref()
    }

    /// Since when a replica has had nothing to do, for the node's ledger; `None`: it has, or nobody knows it.
    pub fn idle_since(&self, replica: ReplicaId) -> Option<Instant> {
        self.replicas.get(&replica).filter(|_| self.is_unvisited(replica))?.idle_since()
    }
}
