//! Replicas and environments as values.
//!
//! ```text
//! replica      Starting --> Ready --> Draining (no new call) --> Stopping --> gone
//! environment  Cold --> Starting --> Ready <--> Frozen           Stopping --> gone
//!              (its replica starts)    ^-- Thawing <-'
//!              Unknown (adopted) ------'
//! ```

use std::collections::BTreeMap;
use std::time::Instant;

use super::messages::{CallId, EnvironmentId, ReplicaId};

/// What its environments share: a cgroup, or a VM.
#[derive(Clone, Debug)]
pub(super) struct Replica {
    pub(super) phase: Phase,
    /// When it was asked for.
    pub(super) started: Instant,
    pub(super) environments: BTreeMap<u32, Environment>,
    next_ordinal: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Ready,
    /// Takes no call; stops when its last one has ended.
    Draining(super::Why),
    Stopping,
}

/// What calls run in.
#[derive(Clone, Debug)]
pub(super) struct Environment {
    pub(super) state: State,
    /// Those running in it, also those whose client is gone.
    pub(super) calls: Vec<CallId>,
    /// When it was asked for.
    pub(super) started: Instant,
    /// When it first took calls.
    pub(super) ready: Option<Instant>,
    /// When it last became ready, or ended a call.
    pub(super) used: Instant,
    /// Its probes have failed: it gets no new call.
    pub(super) unready: bool,
    /// When it first broke off a call; `None`: it did not, or how it ended is known.
    pub(super) broke: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for its replica.
    Cold,
    Starting,
    /// Takes calls: idle or busy.
    Ready,
    Frozen,
    Thawing,
    /// Busy for the last time: one of its calls left it unfit for another.
    Spent,
    /// Adopted, and perhaps in a call that nobody here knows.
    Unknown,
    Stopping,
}

impl Replica {
    pub(super) fn new(phase: Phase, now: Instant) -> Self {
        Self { phase, started: now, environments: BTreeMap::new(), next_ordinal: 0 }
    }

    /// Starting or ready: what `min` and new calls count on.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Ready)
    }

    /// Adds an environment and returns its number.
    pub(super) fn add(&mut self, state: State, now: Instant) -> u32 {
        let ordinal = self.next_ordinal;
        self.insert(ordinal, state, now);
        ordinal
    }

    /// Adds an environment that has a number already.
    pub(super) fn insert(&mut self, ordinal: u32, state: State, now: Instant) {
        self.next_ordinal = self.next_ordinal.max(ordinal.saturating_add(1));
        let ready = matches!(state, State::Ready | State::Frozen).then_some(now);
        let (calls, started, used, unready, broke) = (Vec::new(), now, now, false, None);
        self.environments.insert(ordinal, Environment { state, calls, started, ready, used, unready, broke });
    }

    /// The number that the next environment gets.
    pub(super) fn next_ordinal(&self) -> u32 {
        self.next_ordinal
    }

    /// Marks an environment for removal; one that was never started goes at once. True if there is something to stop.
    pub(super) fn stop_environment(&mut self, ordinal: u32) -> bool {
        match self.environments.get_mut(&ordinal) {
            Some(environment) if environment.state != State::Cold => {
                environment.state = State::Stopping;
                true
            }
            _ => {
                self.environments.remove(&ordinal);
                false
            }
        }
    }

    pub(super) fn calls(&self) -> usize {
        self.environments.values().map(|environment| environment.calls.len()).sum()
    }

    /// Since when it has nothing to do: every environment is idle or frozen. `None`: it is busy, or something in it
    /// starts, thaws, is unknown or may be about to tell of a crash. One without environments is idle since ever.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        if self.phase != Phase::Ready {
            return None;
        }
        let mut since = self.started;
        for environment in self.environments.values() {
            match environment.state {
                State::Ready | State::Frozen if environment.calls.is_empty() => since = since.max(environment.used),
                State::Stopping if environment.broke.is_none() => {}
                _ => return None,
            }
        }
        Some(since)
    }

    /// Whether nothing in it can take a call, now or soon, nor tell of a crash.
    pub(super) fn is_empty(&self) -> bool {
        self.environments.values().all(|e| e.state == State::Stopping && e.broke.is_none())
    }

    /// How many environments it has that can take a call, now or soon.
    pub(super) fn coming(&self) -> usize {
        if !self.is_kept() {
            return 0;
        }
        let coming = |e: &&Environment| matches!(e.state, State::Cold | State::Starting | State::Thawing);
        self.environments.values().filter(coming).count()
    }
}

impl Environment {
    /// Whether it has nothing to do, and could have.
    pub(super) fn is_idle(&self) -> bool {
        self.is_quiet() && !self.unready
    }

    /// Whether it has nothing to do.
    pub(super) fn is_quiet(&self) -> bool {
        self.state == State::Ready && self.calls.is_empty()
    }

    /// Whether one more call may run in it.
    pub(super) fn has_room(&self, calls: u32) -> bool {
        self.state == State::Ready && !self.unready && self.calls.len() < calls as usize
    }
}

/// Every environment of the replicas with its id.
pub(super) fn each(
    replicas: &BTreeMap<ReplicaId, Replica>,
) -> impl Iterator<Item = (EnvironmentId, &Replica, &Environment)> {
    replicas.iter().flat_map(|(id, replica)| {
        let id = *id;
        replica
            .environments
            .iter()
            .map(move |(ordinal, environment)| (EnvironmentId { replica: id, ordinal: *ordinal }, replica, environment))
    })
}
