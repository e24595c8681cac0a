//! What is stopped or frozen, and when.

use std::cmp::Reverse;
use std::time::Instant;

use super::replica::{Phase, Replica, State, each};
use super::{Action, EnvironmentId, Pool, ReplicaId, Why};

impl Pool {
    /// Brings the pool below what the labels allow now: idle ones first, then those that are starting, then the one
    /// with the fewest calls, which ends them first.
    pub(super) fn shrink_to_maximum(&mut self, actions: &mut Vec<Action>) {
        while self.kept() > self.settings.max as usize {
            let cost = |replica: &Replica, id: ReplicaId| {
                let idle = replica.idle_since();
                (idle.is_none(), idle, replica.phase == Phase::Ready, replica.calls(), Reverse(id))
            };
            let kept = self.replicas.iter().filter(|(_, replica)| replica.is_kept());
            let Some((_, id)) = kept.map(|(id, replica)| (cost(replica, *id), *id)).min() else { return };
            self.drain_replica(id, Why::Surplus);
        }
        let most = self.settings.environments as usize;
        for (id, replica) in self.replicas.iter_mut().filter(|(_, replica)| replica.is_kept()) {
            while let Some(ordinal) = surplus(replica, most) {
                let environment = EnvironmentId { replica: *id, ordinal };
                if replica.stop_environment(ordinal) {
                    actions.push(Action::StopEnvironment { environment });
                }
            }
        }
    }

    /// A replica takes no more calls; [`Pool::retire`] stops it once it has none.
    pub(super) fn drain_replica(&mut self, id: ReplicaId, why: Why) {
        if let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.is_kept()) {
            replica.phase = Phase::Draining(why);
        }
    }

    /// Stops the replicas that have no more to do.
    pub(super) fn retire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let drained: Vec<_> =
            self.replicas.iter().filter_map(|(id, replica)| Some((*id, self.done(replica)?))).collect();
        drained.into_iter().for_each(|(id, why)| self.stop(id, why, actions));
        while self.kept() > self.minimum() {
            let Some((id, why)) = self.first_to_go(now) else { return };
            self.stop(id, why, actions);
        }
    }

    /// Why the replica is to be stopped whatever the minimum says, if it is.
    fn done(&self, replica: &Replica) -> Option<Why> {
        let in_use = |e: &super::Environment| !e.calls.is_empty() || e.state == State::Unknown;
        if replica.environments.values().any(in_use) {
            return None;
        }
        match replica.phase {
            Phase::Draining(why) => Some(why),
            Phase::Starting | Phase::Ready => (self.drain.is_some() && self.waiting.is_empty()).then_some(Why::Drained),
            Phase::Stopping => None,
        }
    }

    /// One that nothing can run in, or else the one that has been idle longest, if that is too long.
    fn first_to_go(&self, now: Instant) -> Option<(ReplicaId, Why)> {
        let empty = |(_, replica): &(&ReplicaId, &Replica)| replica.phase == Phase::Ready && replica.is_empty();
        if self.waiting.is_empty()
            && self.owed == 0
            && let Some((id, _)) = self.replicas.iter().find(empty)
        {
            return Some((*id, Why::Empty));
        }
        let (since, id) = self.idle().min()?;
        (since + self.settings.idle_timeout <= now).then_some((id, Why::Idle))
    }

    /// Idle replicas that nobody visits, each with the moment since when.
    pub(super) fn idle(&self) -> impl Iterator<Item = (Instant, ReplicaId)> {
        let idle = self.replicas.iter().filter_map(|(id, replica)| Some((replica.idle_since()?, *id)));
        idle.filter(|(_, id)| self.is_unvisited(*id))
    }

    pub(super) fn is_unvisited(&self, id: ReplicaId) -> bool {
        self.visits.values().all(|visit| visit.environment.is_none_or(|environment| environment.replica != id))
    }

    /// The pool's last word on a replica. Nothing runs in it.
    pub(super) fn stop(&mut self, id: ReplicaId, why: Why, actions: &mut Vec<Action>) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.phase = Phase::Stopping;
            replica.environments.clear();
            actions.push(Action::StopReplica { replica: id, why });
        }
    }

    /// Freezes what has been idle long enough.
    pub(super) fn freeze(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let freezable: Vec<_> = self.freezable().filter(|(at, _)| *at <= now).map(|(_, id)| id).collect();
        for id in freezable {
            if let Some(environment) = self.environment_mut(id) {
                environment.state = State::Frozen;
            }
            actions.push(Action::FreezeEnvironment { environment: id });
        }
    }

    /// Idle environments that nobody visits, with the moment at which they are to be frozen.
    pub(super) fn freezable(&self) -> impl Iterator<Item = (Instant, EnvironmentId)> {
        let after = self.settings.freeze_after.filter(|_| self.drain.is_none());
        let idle = each(&self.replicas).filter(|(_, r, e)| r.phase == Phase::Ready && e.is_idle());
        let unvisited = |id: &EnvironmentId| self.visits.values().all(|visit| visit.environment != Some(*id));
        let idle = idle.filter_map(move |(id, _, environment)| Some((environment.used + after?, id)));
        idle.filter(move |(_, id)| unvisited(id))
    }
}

/// An environment beyond the given number that can go now, the one unused longest.
fn surplus(replica: &Replica, most: usize) -> Option<u32> {
    let here = || replica.environments.iter().filter(|(_, e)| e.state != State::Stopping);
    if here().count() <= most {
        return None;
    }
    let quiet = here().filter(|(_, e)| e.is_quiet() || matches!(e.state, State::Frozen | State::Cold));
    quiet.map(|(ordinal, environment)| (environment.used, *ordinal)).min().map(|(_, ordinal)| ordinal)
}
