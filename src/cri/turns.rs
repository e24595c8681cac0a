//! One client at a time for each thing that clients may be at odds about.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use super::shelf::Key;

/// Who works on what. There are as many entries as calls that work or wait.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>,
}

impl Turns {
    /// Waits for a turn at a Pod's sandboxes: they share its address.
    pub(super) async fn at_sandboxes(&self, uid: &str) -> OwnedMutexGuard<()> {
        self.at(&Key { uid: uid.to_owned(), container: String::new(), attempt: 0 }).await
    }

    /// Waits for a turn, until the guard is dropped. Cancel-safe: who stops waiting is out of the line.
    pub(super) async fn at(&self, key: &Key) -> OwnedMutexGuard<()> {
        let turn = {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(taken.entry(key.clone()).or_default())
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn turns_at_one_thing_are_taken_one_after_the_other_and_leave_nothing() {
        let turns = Turns::default();
        let first = turns.at_sandboxes("a").await;
        assert!(turns.at_sandboxes("a").now_or_never().is_none());
        let other = turns.at_sandboxes("b").now_or_never().expect("another Pod waits for nobody");
        drop(first);
        let again = turns.at_sandboxes("a").now_or_never().expect("the first is done");
        drop((other, again));
        let _last = turns.at_sandboxes("c").await;
        assert_eq!(turns.taken.lock().unwrap().len(), 1);
    }
}
