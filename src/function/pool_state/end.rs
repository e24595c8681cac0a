//! Deadlines: of waiting calls and visitors, of a drain, and when the pool wants to be looked at again.

use std::time::{Duration, Instant};

use super::replica::{State, each};
use super::{Action, CAPACITY_RETRY, Exit, Pool, RETRY_SOON, Reason, TryAgain, Why};

impl Pool {
    /// When [`super::Event::Tick`] is due; `None`: only an event can change anything. After calls it may be earlier than
    /// anything happens, which costs a tick.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.due
    }

    /// When time alone changes something, after `now`.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let timeout = self.settings.queue_timeout;
        let calls = self.waiting.front().map(|(_, since)| *since + timeout);
        let visitors = self.visits.values().filter(|visit| visit.environment.is_none()).map(|v| v.since + timeout);
        let starts = [self.backoff.holds(now), self.denied].into_iter().flatten();
        let starts = starts.filter(|at| *at > now).min().filter(|_| self.wants_start());
        let idle = self.idle().map(|(since, _)| since + self.settings.idle_timeout);
        let idle = idle.min().filter(|_| self.kept() > self.minimum());
        let freeze = self.freezable().map(|(at, _)| at).min();
        let drain = self.drain.filter(|_| !self.is_drained());
        let all = [calls, visitors.min(), starts, idle, freeze, drain];
        all.into_iter().flatten().filter(|at| *at > now).min()
    }

    /// Whether a drain is over: nothing waits, nothing runs, nothing is left to stop.
    pub fn is_drained(&self) -> bool {
        self.drain.is_some() && self.replicas.is_empty() && self.waiting.is_empty() && self.running.is_empty()
    }

    /// Refuses who has waited too long, and ends a drain whose time is up.
    pub(super) fn expire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let over = self.drain.is_some_and(|until| until <= now);
        let timeout = self.settings.queue_timeout;
        if self.waiting.front().is_some_and(|(_, since)| over || *since + timeout <= now) {
            let try_again = self.why_not(now);
            self.refuse_first(try_again, actions, |since| over || since + timeout <= now);
        }
        let draining = self.drain.is_some();
        self.refuse_visitors(now, actions, |since| draining || since + timeout <= now);
        if over {
            self.end_everything(actions);
        }
    }

    /// After a crash, turns those away who could not be served before their time is up.
    pub(super) fn refuse_the_hopeless(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(until) = self.backoff.holds(now) else { return };
        let lost = |state| matches!(state, State::Stopping | State::Spent);
        if each(&self.replicas).any(|(_, replica, e)| replica.is_kept() && !lost(e.state)) {
            return;
        }
        let timeout = self.settings.queue_timeout;
        let try_again = TryAgain { reason: Reason::CrashLoop, retry_after: at_least_a_second(until - now) };
        self.refuse_first(try_again, actions, |since| since + timeout <= until);
        self.refuse_visitors(now, actions, |since| since + timeout <= until);
    }

    /// Refuses from the head of the queue, where those are who came first, as long as they are late.
    fn refuse_first(&mut self, try_again: TryAgain, actions: &mut Vec<Action>, late: impl Fn(Instant) -> bool) {
        while let Some((call, since)) = self.waiting.front().copied()
            && late(since)
        {
            self.waiting.pop_front();
            actions.push(Action::Refuse { call, try_again });
        }
    }

    fn refuse_visitors(&mut self, now: Instant, actions: &mut Vec<Action>, late: impl Fn(Instant) -> bool) {
        if self.visits.is_empty() {
            return;
        }
        let try_again = self.why_not(now);
        self.visits.retain(|visit, place| {
            let refused = place.environment.is_none() && late(place.since);
            if refused {
                actions.push(Action::RefuseVisit { visit: *visit, try_again });
            }
            !refused
        });
    }

    /// What keeps those waiting who wait now.
    fn why_not(&self, now: Instant) -> TryAgain {
        let serves = |state| matches!(state, State::Ready | State::Spent | State::Unknown);
        let again = |reason, retry_after| TryAgain { reason, retry_after };
        if self.drain.is_some() {
            again(Reason::ShuttingDown, RETRY_SOON)
        } else if each(&self.replicas).any(|(_, _, environment)| serves(environment.state)) {
            again(Reason::Busy, RETRY_SOON)
        } else if let Some(until) = self.backoff.holds(now) {
            again(Reason::CrashLoop, at_least_a_second(until - now))
        } else if self.denied.is_some_and(|until| until > now) {
            again(Reason::NoCapacity, CAPACITY_RETRY)
        } else if self.crash.is_some() {
            // Another is on its way, but what became of the last one says more than that it is late.
            again(Reason::CrashLoop, RETRY_SOON)
        } else {
            again(Reason::Starting, RETRY_SOON)
        }
    }

    /// The grace period is over.
    fn end_everything(&mut self, actions: &mut Vec<Action>) {
        let exit = Exit {
            code: None,
            reason: "GracePeriodExceeded".to_owned(),
            message: "the Pod was deleted and the call did not end within its grace period".to_owned(),
        };
        let mut calls: Vec<_> = self.running.keys().copied().collect();
        calls.sort_unstable();
        self.fail_calls(&calls, &exit, actions);
        let left: Vec<_> = self.replicas.iter().filter(|(_, r)| r.phase != super::Phase::Stopping).collect();
        let left: Vec<_> = left.into_iter().map(|(id, _)| *id).collect();
        left.into_iter().for_each(|id| self.stop(id, Why::Drained, actions));
    }
}

fn at_least_a_second(wait: Duration) -> Duration {
    wait.max(Duration::from_secs(1))
}
