//! What is thawed or started, and when.

use std::cmp::Reverse;
use std::time::Instant;

use super::replica::{Phase, Replica, State, each};
use super::{Action, EnvironmentId, Pool, ReplicaId};

impl Pool {
    /// Starts what waiting calls, visitors, replacements and the minimum lack.
    pub(super) fn grow(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.drain.is_some() {
            // What was lost is replaced for those to come, and nobody will.
            self.owed = 0;
        }
        while self.calls_lack() && (self.thaw(actions) || self.start_environment(now, actions)) {}
        while self.losses_lack() && self.start_environment(now, actions) {}
        while self.kept() < self.minimum() && self.start_replica(now, actions) {}
        self.fill_the_least(now, actions);
        if !self.losses_lack() || self.backoff.holds(now).is_some() {
            self.owed = 0;
        }
    }

    /// Of no more replicas than the minimum none stays empty.
    pub(super) fn fill_the_least(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.kept() > self.minimum() {
            return;
        }
        let empty = |(_, replica): &(&ReplicaId, &Replica)| replica.phase == Phase::Ready && replica.is_empty();
        let empty: Vec<_> = self.replicas.iter().filter(empty).map(|(id, _)| *id).collect();
        for id in empty {
            self.start_environment_in(id, now, actions);
        }
    }

    /// Whether fewer environments are coming than calls and visitors wait for.
    fn calls_lack(&self) -> bool {
        let calls = self.waiting.len().div_ceil(self.settings.calls.max(1) as usize);
        let visitors = usize::from(self.visits.values().any(|visit| visit.environment.is_none()));
        calls.max(visitors) > self.coming()
    }

    /// Whether fewer environments are coming, or there to spare, than were lost.
    fn losses_lack(&self) -> bool {
        let spare = |replica: &Replica| {
            let quiet = replica.environments.values().filter(|e| e.is_idle() || e.state == State::Frozen);
            if replica.is_kept() { quiet.count() } else { 0 }
        };
        self.owed > 0 && self.owed > self.coming() + self.replicas.values().map(spare).sum::<usize>()
    }

    pub(super) fn coming(&self) -> usize {
        self.replicas.values().map(Replica::coming).sum()
    }

    /// Whether anything is wanted that a back-off or a want of capacity may be holding up.
    pub(super) fn wants_start(&self) -> bool {
        let below = self.kept() < self.minimum();
        let empty = || self.replicas.values().any(|replica| replica.phase == Phase::Ready && replica.is_empty());
        below || self.calls_lack() || self.losses_lack() || (self.kept() <= self.minimum() && empty())
    }

    /// No-ops are for environments that no call waits for.
    pub(super) fn warms_up(&self) -> bool {
        self.settings.warm_up && self.waiting.is_empty()
    }

    /// Thaws one, chosen as for a call.
    fn thaw(&mut self, actions: &mut Vec<Action>) -> bool {
        let frozen = each(&self.replicas).filter(|(_, r, e)| r.phase == Phase::Ready && e.state == State::Frozen);
        let best = frozen.map(|(id, replica, environment)| (replica.calls() > 0, environment.used, id)).max();
        let Some((_, _, id)) = best else { return false };
        if let Some(environment) = self.environment_mut(id) {
            environment.state = State::Thawing;
        }
        actions.push(Action::ThawEnvironment { environment: id });
        true
    }

    /// Adds an environment to the fullest replica that has room for it, or to a new replica.
    fn start_environment(&mut self, now: Instant, actions: &mut Vec<Action>) -> bool {
        let most = self.settings.environments as usize;
        let room = |(_, replica): &(&ReplicaId, &Replica)| replica.is_kept() && replica.environments.len() < most;
        let fullest = self.replicas.iter().filter(room).max_by_key(|(id, r)| (r.environments.len(), Reverse(**id)));
        match fullest.map(|(id, _)| *id) {
            Some(id) => self.start_environment_in(id, now, actions),
            None => self.start_replica(now, actions),
        }
    }

    fn start_environment_in(&mut self, id: ReplicaId, now: Instant, actions: &mut Vec<Action>) -> bool {
        let warm_up = self.warms_up();
        let most = self.settings.environments as usize;
        if self.backoff.holds(now).is_some() {
            return false;
        }
        let room = |replica: &&mut Replica| replica.is_kept() && replica.environments.len() < most;
        let Some(replica) = self.replicas.get_mut(&id).filter(room) else { return false };
        if replica.phase == Phase::Starting {
            replica.add(State::Cold, now);
        } else {
            let environment = EnvironmentId { replica: id, ordinal: replica.add(State::Starting, now) };
            actions.push(Action::StartEnvironment { environment, warm_up });
        }
        true
    }

    /// Starts a replica, and an environment as soon as it is there.
    fn start_replica(&mut self, now: Instant, actions: &mut Vec<Action>) -> bool {
        let denied = self.denied.is_some_and(|until| until > now);
        if denied || self.backoff.holds(now).is_some() || self.replicas.len() >= self.settings.max as usize {
            return false;
        }
        let id = ReplicaId(self.next_replica);
        self.next_replica += 1;
        let mut replica = Replica::new(Phase::Starting, now);
        replica.add(State::Cold, now);
        self.replicas.insert(id, replica);
        actions.push(Action::StartReplica { replica: id });
        true
    }
}
