//! Log lines that strangers can cause, kept to a rate.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Whoever can reach the port can make handshakes fail; the log must not grow with them.
const BURST: u32 = 10;
/// The burst is allowed again after this long.
const WINDOW: Duration = Duration::from_secs(60);

/// Ten lines a minute.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Option<Window>>);

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
}

impl Seldom {
    /// Whether a line may be written at `now`, and whether it is the last one for a while.
    pub(super) fn allow(&self, now: Instant) -> Option<Last> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let current = match &mut *window {
            Some(current) if now.duration_since(current.began) < WINDOW => current,
            other => other.insert(Window { began: now, lines: 0 }),
        };
        current.lines = current.lines.saturating_add(1);
        (current.lines <= BURST).then_some(Last(current.lines == BURST))
    }
}

/// Whether lines of this kind are now left out for the rest of the minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Last(pub(super) bool);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_minute_and_the_tenth_says_so() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        let allowed: Vec<_> = (0..100).filter_map(|_| seldom.allow(now)).collect();
        assert_eq!(allowed.len(), 10);
        assert_eq!(allowed.iter().position(|last| last.0), Some(9));
        assert_eq!(seldom.allow(now + WINDOW), Some(Last(false)));
    }
}
