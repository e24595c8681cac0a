//! When a pool may start something again after a crash.

use std::time::{Duration, Instant};

/// The second restart in a row waits this long (the kubelet's value for containers).
pub(super) const INITIAL: Duration = Duration::from_secs(10);
/// No restart waits longer (the kubelet's value).
pub(super) const MAX: Duration = Duration::from_secs(300);

/// The kubelet's crash back-off, for a pool as a whole: the first restart is immediate, the next waits 10 s, each
/// further one twice as long up to 300 s, and 600 quiet seconds forgive everything.
///
/// A pool is many environments, so two things are added. What was started before the last crash that counted says
/// nothing new: a burst of twenty starts of a broken image is one crash. And a call that ends well in something started
/// after the last crash forgives at once: it shows that starting helps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    crashes: u32,
    last: Option<Instant>,
    until: Option<Instant>,
}

impl Backoff {
    /// Something that was started at `started` has crashed.
    pub(super) fn crashed(&mut self, started: Instant, now: Instant) {
        if let Some(last) = self.last {
            if started < last {
                return;
            }
            if now.saturating_duration_since(last) > MAX * 2 {
                self.crashes = 0;
            }
        }
        self.last = Some(now);
        self.until = self.crashes.checked_sub(1).map(|doublings| now + delay(doublings));
        self.crashes = self.crashes.saturating_add(1);
    }

    /// A call ended well in something that was started at `started`. True if that forgives the last crash.
    pub(super) fn served(&mut self, started: Instant) -> bool {
        let forgiven = self.last.is_some_and(|last| started >= last);
        if forgiven {
            *self = Self::default();
        }
        forgiven
    }

    /// Until when nothing is started; `None`: start.
    pub(super) fn holds(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

fn delay(doublings: u32) -> Duration {
    // 10 s doubled five times is beyond the maximum.
    (INITIAL * (1 << doublings.min(5))).min(MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn the_first_restart_is_immediate_and_the_next_ones_double_to_the_maximum() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.crashed(now, now);
        assert_eq!(backoff.holds(now), None);
        for wait in [10, 20, 40, 80, 160, 300, 300] {
            backoff.crashed(now, now);
            assert_eq!(backoff.holds(now), Some(now + seconds(wait)));
            now += seconds(wait);
            assert_eq!(backoff.holds(now), None);
        }
    }

    #[test]
    fn a_burst_that_fails_is_one_crash() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        for n in 1..20 {
            backoff.crashed(start, start + seconds(n));
            assert_eq!(backoff.holds(start + seconds(n)), None);
        }
        backoff.crashed(start + seconds(19), start + seconds(20));
        assert_eq!(backoff.holds(start + seconds(20)), Some(start + seconds(30)));
    }

    #[test]
    fn quiet_or_a_call_served_by_a_later_start_forgives() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        backoff.crashed(start, start);
        backoff.crashed(start + seconds(1), start + seconds(1));
        let mut quiet = backoff;
        quiet.crashed(start + seconds(602), start + seconds(602));
        assert_eq!(quiet.holds(start + seconds(602)), None);
        let mut early = backoff;
        assert!(!early.served(start));
        assert_eq!(early, backoff);
        assert!(backoff.served(start + seconds(10)));
        assert_eq!(backoff, Backoff::default());
    }
}
