//! When to try again, and when to say so.

use std::time::{Duration, Instant};

use kube::runtime::utils::Backoff;
use tracing::{info, warn};

/// kubelet's pace of registration attempts.
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(7);

/// A failure that goes on is logged again this often.
const REMINDER: Duration = Duration::from_secs(60);

/// Waits between attempts: doubling, each shortened at random so that many nodes do not come back in step.
#[derive(Debug)]
pub struct Delays {
    next: Duration,
}

impl Default for Delays {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Iterator for Delays {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.next;
        self.next = (delay * 2).min(LONGEST);
        Some(delay.mul_f64(0.5 + rand::random::<f64>() / 2.0))
    }
}

impl Backoff for Delays {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// The failures of one piece of work in a row.
#[derive(Debug)]
pub struct Retry {
    what: &'static str,
    delays: Delays,
    streak: Option<Streak>,
}

#[derive(Debug)]
struct Streak {
    since: Instant,
    logged: Instant,
    text: String,
}

impl Retry {
    /// No failures yet of `what` ("register the node").
    pub fn new(what: &'static str) -> Self {
        Self { what, delays: Delays::default(), streak: None }
    }

    /// Notes a failure, logs it if it is news, and says how long to wait.
    pub fn failed(&mut self, text: String) -> Duration {
        let now = Instant::now();
        let what = self.what;
        match &mut self.streak {
            None => {
                warn!("failed to {what}, trying again: {text}");
                self.streak = Some(Streak { since: now, logged: now, text });
            }
            Some(streak) if streak.text != text || now.duration_since(streak.logged) >= REMINDER => {
                let seconds = now.duration_since(streak.since).as_secs();
                warn!("failed to {what} for {seconds} s, trying again: {text}");
                streak.logged = now;
                streak.text = text;
            }
            Some(_) => {}
        }
        self.delays.next().unwrap_or(LONGEST)
    }

    /// Notes a success, and logs the end of an outage.
    pub fn succeeded(&mut self) {
        self.delays.reset();
        if let Some(streak) = self.streak.take() {
            let seconds = streak.since.elapsed().as_secs();
            info!("succeeded to {} after {seconds} s of failures", self.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_longest_and_start_again_after_a_success() {
        let mut retry = Retry::new("test");
        assert!(retry.failed("x".to_owned()) <= FIRST);
        for _ in 0..10 {
            assert!(retry.failed("x".to_owned()) <= LONGEST);
        }
        assert!(retry.failed("x".to_owned()) >= LONGEST / 2);
        retry.succeeded();
        assert!(retry.failed("x".to_owned()) <= FIRST);
    }
}
