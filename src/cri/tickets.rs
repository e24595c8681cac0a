//! Tickets for streams: each is good once, and not for long.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::kubelet_api::streaming::plain::{Tickets, Work};

/// How long a ticket is good.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// Tickets that nobody has used yet.
const MOST: usize = 1000;
/// Bytes of randomness in one.
const BYTES: usize = 16;

/// All tickets that are good.
#[derive(Debug, Default)]
pub(super) struct Desk {
    given: Mutex<HashMap<String, (Instant, Work)>>,
}

impl Desk {
    /// A ticket, or `None` if too many were given and not used.
    pub(super) fn give(&self, work: Work, now: Instant) -> Option<String> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.retain(|_, (end, _)| *end > now);
        if given.len() >= MOST {
            return None;
        }
        let ticket: String = rand::random::<[u8; BYTES]>().iter().map(|byte| format!("{byte:02x}")).collect();
        given.insert(ticket.clone(), (now + GOOD_FOR, work));
        Some(ticket)
    }

    fn redeem(&self, ticket: &str, now: Instant) -> Option<Work> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.remove(ticket).filter(|(end, _)| *end > now).map(|(_, work)| work)
    }
}

impl Tickets for Desk {
    fn take(&self, ticket: &str) -> Option<Work> {
        self.redeem(ticket, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work::PortForward("s".into(), Vec::new())
    }

    #[test]
    fn a_ticket_is_good_once_and_for_a_minute() {
        let (desk, now) = (Desk::default(), Instant::now());
        let (first, second) = (desk.give(work(), now).unwrap(), desk.give(work(), now).unwrap());
        assert!(first.len() == 2 * BYTES && first != second);
        assert!(desk.redeem(&first, now).is_some());
        assert!(desk.redeem(&first, now).is_none());
        assert!(desk.redeem(&second, now + GOOD_FOR).is_none());
        assert!(desk.redeem("", now).is_none());
    }

    #[test]
    fn tickets_that_nobody_uses_are_bounded_and_go_by_themselves() {
        let (desk, now) = (Desk::default(), Instant::now());
        for _ in 0..MOST {
            desk.give(work(), now).unwrap();
        }
        assert!(desk.give(work(), now).is_none());
        assert!(desk.give(work(), now + GOOD_FOR).is_some());
    }
}
