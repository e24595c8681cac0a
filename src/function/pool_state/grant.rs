//! Calls and visitors: in, to an environment, and out.

use std::time::Instant;

use super::replica::{Phase, Replica, State, each};
use super::{Action, CallId, EnvironmentId, Exit, Pool, RETRY_SOON, Reason, Running, TryAgain};

impl Pool {
    pub(super) fn call_arrived(&mut self, call: CallId, now: Instant, actions: &mut Vec<Action>) {
        let refused = if self.drain.is_some() {
            Reason::ShuttingDown
        } else {
            self.waiting.push_back((call, now));
            // Who came before goes first, and may leave a place.
            if self.waiting.len() > self.settings.queue_length as usize {
                self.hand_out(now, actions);
            }
            if self.waiting.len() <= self.settings.queue_length as usize || self.waiting.pop_back().is_none() {
                return;
            }
            Reason::QueueFull
        };
        actions.push(Action::Refuse { call, try_again: TryAgain { reason: refused, retry_after: RETRY_SOON } });
    }

    /// Gives the waiting calls, first come first, to the environments that have room.
    pub(super) fn hand_out(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while let Some((call, _)) = self.waiting.front().copied() {
            let Some(id) = self.best_environment() else { return };
            self.waiting.pop_front();
            self.grant(call, id, now, actions);
        }
    }

    pub(super) fn grant(&mut self, call: CallId, id: EnvironmentId, now: Instant, actions: &mut Vec<Action>) {
        self.running.insert(call, Running { environment: id, client_gone: false });
        if let Some(environment) = self.environment_mut(id) {
            environment.calls.push(call);
            environment.used = now;
        }
        actions.push(Action::Grant { call, environment: id });
    }

    /// Of those with room: in a replica that is in use, then used last, then the youngest.
    pub(super) fn best_environment(&self) -> Option<EnvironmentId> {
        let calls = self.settings.calls;
        let mut best = None;
        for (id, replica) in self.replicas.iter().filter(|(_, replica)| replica.phase == Phase::Ready) {
            let in_use = replica.calls() > 0;
            for (ordinal, environment) in replica.environments.iter().filter(|(_, e)| e.has_room(calls)) {
                let id = EnvironmentId { replica: *id, ordinal: *ordinal };
                best = best.max(Some((in_use, environment.used, id)));
            }
        }
        best.map(|(_, _, id)| id)
    }

    /// A call ended with its environment, as far as anybody can tell.
    pub(super) fn call_lost(&mut self, call: CallId, now: Instant, actions: &mut Vec<Action>) {
        let id = self.running.get(&call).map(|running| running.environment);
        if let Some(environment) = id.and_then(|id| self.environment_mut(id)) {
            environment.broke.get_or_insert(now);
        }
        self.call_ended(call, false, now, actions);
    }

    pub(super) fn call_ended(&mut self, call: CallId, reuse: bool, now: Instant, actions: &mut Vec<Action>) {
        let Some(Running { environment: id, .. }) = self.running.remove(&call) else { return };
        let Some(environment) = self.environment_mut(id) else { return };
        environment.calls.retain(|other| *other != call);
        environment.used = now;
        let started = environment.started;
        // One that must not be reused takes no more calls, and goes when its last one has ended.
        let spent = !reuse && environment.state == State::Ready;
        if spent {
            environment.state = State::Spent;
        }
        if environment.calls.is_empty() && environment.state == State::Spent {
            environment.state = State::Stopping;
            actions.push(Action::StopEnvironment { environment: id });
        }
        if spent && self.replicas.get(&id.replica).is_some_and(Replica::is_kept) {
            self.owed += 1;
        }
        if reuse && self.backoff.served(started) {
            self.crash = None;
        }
    }

    pub(super) fn client_gone(&mut self, call: CallId) {
        if let Some(running) = self.running.get_mut(&call) {
            running.client_gone = true;
        } else if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == call) {
            self.waiting.remove(at);
        }
    }

    /// Ends calls whose environment is gone.
    pub(super) fn fail_calls(&mut self, calls: &[CallId], exit: &Exit, actions: &mut Vec<Action>) {
        for call in calls {
            if self.running.remove(call).is_some_and(|running| !running.client_gone) {
                actions.push(Action::FailCall { call: *call, exit: exit.clone() });
            }
        }
    }

    /// Visitors enter the environment that has been ready longest, busy or not.
    pub(super) fn let_visitors_in(&mut self, actions: &mut Vec<Action>) {
        if self.visits.values().all(|visit| visit.environment.is_some()) {
            return;
        }
        let ready = each(&self.replicas).filter(|(_, r, e)| r.phase == Phase::Ready && e.state == State::Ready);
        let Some((_, id)) = ready.map(|(id, _, environment)| (environment.ready, id)).min() else { return };
        for (visit, place) in self.visits.iter_mut().filter(|(_, visit)| visit.environment.is_none()) {
            place.environment = Some(id);
            actions.push(Action::Enter { visit: *visit, environment: id });
        }
    }
}
