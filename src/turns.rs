//! One at a time, for each thing that several may be at odds about.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Hands out turns: whoever holds the one of a key is the only one who does.
#[derive(Debug)]
pub(crate) struct Turns<K> {
    /// Only keys that someone has or wants the turn of.
    wanted: Mutex<HashMap<K, Weak<AsyncMutex<()>>>>,
}

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self { wanted: Mutex::default() }
    }
}

impl<K: Hash + Eq> Turns<K> {
    /// Waits for the turn of a key; it ends when what is returned is dropped. First come, first served. Cancel-safe: who
    /// stops waiting is out of the line.
    pub(crate) async fn turn<Q>(&self, key: &Q) -> OwnedMutexGuard<()>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        let turn = {
            // Entries are inserted and removed whole, so a panic elsewhere does not spoil them.
            let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.retain(|_, turn| turn.strong_count() > 0);
            let turn = wanted.get(key).and_then(Weak::upgrade).unwrap_or_default();
            wanted.insert(key.to_owned(), Arc::downgrade(&turn));
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
        let turns = Turns::<String>::default();
        let first = turns.turn("a").await;
        assert!(turns.turn("b").now_or_never().is_some());
        let mut second = Box::pin(turns.turn("a"));
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        drop(second.await);
        drop(turns.turn("c").await);
        assert_eq!(turns.wanted.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn turns_at_one_thing_are_taken_one_after_the_other_and_leave_nothing() {
        let turns = Turns::<String>::default();
        let first = turns.turn("a").await;
        assert!(turns.turn("a").now_or_never().is_none());
        let other = turns.turn("b").now_or_never().expect("another waits for nobody");
        drop(first);
        let again = turns.turn("a").now_or_never().expect("the first is done");
        drop((other, again));
        let _last = turns.turn("c").await;
        assert_eq!(turns.wanted.lock().unwrap().len(), 1);
    }
}
