//! The short way of a warm call, which is what a busy pool sees most: it takes an idle environment and gives it back, and
//! nothing else has to be looked at. What is decided is what the long way would decide.

use std::time::Instant;

use super::replica::{Phase, State};
use super::{Action, CallId, Event, Pool};

impl Pool {
    /// Takes the event in if it is a plain one; `false`: nothing was done.
    pub(super) fn handle_plain(&mut self, event: &Event, now: Instant, actions: &mut Vec<Action>) -> bool {
        let early = self.due.is_none_or(|due| now < due);
        // Crashes and losses wait for calls that end; visitors and a drain for anything.
        let calm = self.drain.is_none() && self.owed == 0 && self.visits.is_empty() && self.crash.is_none();
        if !(self.settled && early && calm && self.waiting.is_empty()) {
            return false;
        }
        match *event {
            Event::CallArrived { call } => {
                let best = self.best_environment();
                best.inspect(|id| self.grant(call, *id, now, actions)).is_some()
            }
            Event::CallEnded { call, reuse: true } => self.plain_end(call, now, actions),
            _ => false,
        }
    }

    /// Ends a call after which its environment stays as it is.
    fn plain_end(&mut self, call: CallId, now: Instant, actions: &mut Vec<Action>) -> bool {
        let Some(id) = self.running.get(&call).map(|running| running.environment) else { return false };
        let Some(replica) = self.replicas.get(&id.replica) else { return false };
        let stays = replica.phase == Phase::Ready && replica.environments.len() <= self.settings.environments as usize;
        if !stays || replica.environments.get(&id.ordinal).is_none_or(|e| e.state != State::Ready) {
            return false;
        }
        self.call_ended(call, true, now, actions);
        // The environment may be idle from now on.
        let idle = now + self.settings.idle_timeout;
        let freeze = self.settings.freeze_after.map(|after| now + after);
        self.due = [self.due, Some(idle), freeze].into_iter().flatten().min();
        true
    }
}
