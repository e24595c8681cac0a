//! What the rules speak of.

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;

impl World {
    pub(super) fn calls_in(&self, id: EnvironmentId) -> usize {
        self.calls.values().filter(|call| call.place == Place::Running(id)).count()
    }

    pub(super) fn within(&self, replica: ReplicaId) -> impl Iterator<Item = (EnvironmentId, &Environment)> {
        self.environments.iter().filter(move |(id, _)| id.replica == replica).map(|(id, e)| (*id, e))
    }

    pub(super) fn calls_in_replica(&self, replica: ReplicaId) -> usize {
        self.within(replica).map(|(id, _)| self.calls_in(id)).sum()
    }

    pub(super) fn drains(&self, id: ReplicaId) -> bool {
        let draining = |replica: &pool::Replica| matches!(replica.phase, pool::Phase::Draining(_));
        self.replicas[&id].sent_away || self.pool.replicas.get(&id).is_some_and(draining)
    }

    /// Whether a replica stays: neither draining nor stopping, nor about to be by an action that is yet to be read.
    pub(super) fn is_kept(&self, id: ReplicaId) -> bool {
        let goes = self.pool.replicas.get(&id).is_none_or(|replica| !replica.is_kept());
        self.replicas[&id].phase != Phase::Stopping && !self.drains(id) && !goes
    }

    pub(super) fn kept(&self) -> usize {
        self.replicas.keys().filter(|id| self.is_kept(**id)).count()
    }

    /// Replicas that go because labels allow fewer. No action says so while they have calls, only the pool knows.
    pub(super) fn surplus(&self) -> BTreeSet<ReplicaId> {
        let surplus = |replica: &pool::Replica| replica.phase == pool::Phase::Draining(Why::Surplus);
        self.pool.replicas.iter().filter(|(_, replica)| surplus(replica)).map(|(id, _)| *id).collect()
    }

    pub(super) fn min(&self) -> usize {
        if self.drain.is_some() { 0 } else { self.settings.min as usize }
    }

    /// Environments that could take a call right now, by the order in which they should.
    pub(super) fn with_room(&self) -> BTreeSet<(bool, Instant, EnvironmentId)> {
        let room = |(id, e): &(&EnvironmentId, &Environment)| {
            let ready = self.replicas.get(&id.replica).is_some_and(|r| r.phase == Phase::Ready);
            let takes = e.state == State::Ready && !e.spent && !e.unready && ready && self.is_kept(id.replica);
            takes && self.calls_in(**id) < self.settings.calls as usize
        };
        let open = self.environments.iter().filter(room);
        open.map(|(id, e)| (self.calls_in_replica(id.replica) > 0, e.used, *id)).collect()
    }

    /// Environments on their way. A replica that starts brings those the pool plans for it.
    pub(super) fn coming(&self) -> usize {
        let coming = |(id, e): &(&EnvironmentId, &Environment)| {
            matches!(e.state, State::Starting | State::Thawing) && self.is_kept(id.replica)
        };
        let planned = |id: &ReplicaId| self.pool.replicas.get(id).map_or(0, |replica| replica.environments.len());
        let starting = self.replicas.iter().filter(|(id, r)| r.phase == Phase::Starting && self.is_kept(**id));
        self.environments.iter().filter(coming).count() + starting.map(|(id, _)| planned(id)).sum::<usize>()
    }

    pub(super) fn wanted(&self) -> usize {
        let visitors = usize::from(self.visits.values().any(|(_, place)| place.is_none()));
        self.queue.len().div_ceil(self.settings.calls as usize).max(visitors)
    }

    /// Whether something is to be started for who waits.
    pub(super) fn lacks(&self) -> bool {
        self.coming() < self.wanted()
    }

    pub(super) fn held(&self) -> bool {
        self.hold.is_some_and(|until| until > self.now)
    }

    pub(super) fn is_denied(&self) -> bool {
        self.denied.is_some_and(|until| until > self.now)
    }

    pub(super) fn visited(&self, replica: ReplicaId) -> bool {
        self.visits.values().any(|(_, place)| place.is_some_and(|id| id.replica == replica))
    }

    /// Replicas with nothing to do, with the moment since when.
    pub(super) fn idle(&self) -> BTreeSet<(Instant, ReplicaId)> {
        let quiet = |id: EnvironmentId, e: &Environment| match e.state {
            State::Ready | State::Frozen => self.calls_in(id) == 0,
            State::Stopping | State::Dead => e.is_silent(),
            State::Starting | State::Thawing | State::Unknown => false,
        };
        let ready = self.replicas.iter().filter(|(id, r)| r.phase == Phase::Ready && !self.drains(**id));
        let idle = ready.filter(|(id, _)| !self.visited(**id) && self.within(**id).all(|(id, e)| quiet(id, e)));
        let used = |id: ReplicaId| self.within(id).filter(|(_, e)| !e.is_gone()).map(|(_, e)| e.used);
        idle.map(|(id, r)| (used(*id).max().map_or(r.started, |used| used.max(r.started)), *id)).collect()
    }

    pub(super) fn has_nothing(&self, id: ReplicaId) -> bool {
        self.within(id).all(|(_, e)| e.is_silent())
    }
}
