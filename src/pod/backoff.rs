//! When to try again: crash loops, image pulls, and inputs that are not there yet.

use std::time::Duration;

use jiff::Timestamp;

/// First delay of a crash loop and of a failing pull (the kubelet's value).
pub const INITIAL: Duration = Duration::from_secs(10);
/// Longest delay of both (the kubelet's value).
pub const MAX: Duration = Duration::from_secs(300);
/// Delay before a Pod step that failed for want of something (a ConfigMap, a mount, the runtime) is tried again; the
/// kubelet's pod workers use the same.
pub const RETRY: Duration = Duration::from_secs(10);

/// A doubling delay that forgets after two quiet maximum periods.
///
/// The rule is the kubelet's: the first restart of a container is immediate, the second waits 10 s counted from the
/// end of the last run, each further one twice as long up to the maximum; a container that then stays up for twice the
/// maximum starts afresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    last: Option<Last>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Last {
    delay: Duration,
    at: Timestamp,
}

impl Backoff {
    /// The earliest moment of the next try, given when the last one ended. `None`: at once.
    pub fn until(&self, ended: Timestamp, max: Duration) -> Option<Timestamp> {
        let last = self.last?;
        if expired(last.at, ended, max) {
            return None;
        }
        Some(ended + last.delay)
    }

    /// Notes a try made at `now`, which makes the next delay longer.
    pub fn note(&mut self, now: Timestamp, max: Duration) {
        let delay = match self.last {
            Some(last) if !expired(last.at, now, max) => (last.delay * 2).min(max),
            _ => INITIAL.min(max),
        };
        self.last = Some(Last { delay, at: now });
    }

    /// The delay that holds now, for the user's message.
    pub fn delay(&self) -> Duration {
        self.last.map_or(Duration::ZERO, |last| last.delay)
    }
}

fn expired(noted: Timestamp, moment: Timestamp, max: Duration) -> bool {
    moment.duration_since(noted).unsigned_abs() > max * 2 && moment > noted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn the_first_restart_is_immediate_and_the_next_ones_double_to_the_maximum() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until(at(0), MAX), None);
        let mut now = 0;
        for expected in [10, 20, 40, 80, 160, 300, 300] {
            backoff.note(at(now), MAX);
            assert_eq!(backoff.until(at(now), MAX), Some(at(now + expected)));
            now += expected;
        }
    }

    #[test]
    fn a_long_quiet_run_starts_afresh() {
        let mut backoff = Backoff::default();
        backoff.note(at(0), MAX);
        backoff.note(at(10), MAX);
        assert_eq!(backoff.until(at(10 + 601), MAX), None);
        backoff.note(at(700), MAX);
        assert_eq!(backoff.delay(), INITIAL);
    }

    proptest! {
        #[test]
        fn the_delay_stays_within_its_bounds(gaps in prop::collection::vec(0i64..2000, 1..50), max in 1u64..600) {
            let max = Duration::from_secs(max);
            let mut backoff = Backoff::default();
            let mut now = 1_000_000;
            for gap in gaps {
                now += gap;
                backoff.note(at(now), max);
                prop_assert!(backoff.delay() >= INITIAL.min(max) && backoff.delay() <= max);
                prop_assert!(backoff.until(at(now), max).unwrap() >= at(now));
            }
        }
    }
}
