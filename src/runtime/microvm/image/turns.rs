//! One at a time, by name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Hands out turns: whoever holds the one of a name is the only one who does.
#[derive(Debug, Default)]
pub(in crate::runtime::microvm) struct Turns {
    /// Only names that someone has or wants the turn of.
    wanted: Mutex<HashMap<String, Weak<AsyncMutex<()>>>>,
}

impl Turns {
    /// Waits for the turn of a name; it ends when what is returned is dropped. First come, first served.
    pub(in crate::runtime::microvm) async fn turn(&self, name: &str) -> OwnedMutexGuard<()> {
        let turn = {
            // Entries are inserted and removed whole, so a panic elsewhere does not spoil them.
            let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.retain(|_, turn| turn.strong_count() > 0);
            let turn = wanted.get(name).and_then(Weak::upgrade).unwrap_or_default();
            wanted.insert(name.to_owned(), Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_name_has_one_turn_and_nothing_is_kept_of_names_that_nobody_wants() {
        let turns = Turns::default();
        let first = turns.turn("a").await;
        assert!(turns.turn("b").now_or_never().is_some());
        let mut second = Box::pin(turns.turn("a"));
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        drop(second.await);
        drop(turns.turn("c").await);
        assert_eq!(turns.wanted.lock().unwrap().len(), 1);
    }
}
