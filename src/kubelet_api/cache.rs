//! A bounded cache of answers that cost a round trip: one question per key in flight, failures never kept.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};

/// A question on its way.
pub(super) type Fetch<V, E> = BoxFuture<'static, Result<Answer<V>, E>>;

/// An answer and how long it may be used.
#[derive(Clone, Debug)]
pub(super) struct Answer<V> {
    /// The answer.
    pub(super) value: V,
    /// For how long.
    pub(super) keep: Duration,
}

enum Entry<V, E> {
    /// Someone is asking. Weak, so that a question nobody waits for any more is dropped and asked anew by the next.
    Asking(WeakShared<Fetch<V, E>>),
    Known {
        value: V,
        until: Instant,
    },
}

/// Answers by key. At most `capacity` are kept; the one that would run out first makes room.
pub(super) struct Cache<K, V, E> {
    entries: Mutex<HashMap<K, Entry<V, E>>>,
    capacity: usize,
}

impl<K, V, E> Cache<K, V, E>
where
    K: Clone + Eq + Hash,
    V: Clone,
    E: Clone,
{
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: Mutex::new(HashMap::new()), capacity }
    }

    /// The answer for `key`, from the cache, from a question already in flight, or from `fetch`.
    pub(super) async fn get(&self, key: K, fetch: impl FnOnce() -> Fetch<V, E>) -> Result<V, E> {
        let asking = match self.look(&key, fetch) {
            Ok(known) => return Ok(known),
            Err(asking) => asking,
        };
        let outcome = asking.clone().await;
        self.settle(key, &asking, &outcome);
        outcome.map(|answer| answer.value)
    }

    fn look(&self, key: &K, fetch: impl FnOnce() -> Fetch<V, E>) -> Result<V, Shared<Fetch<V, E>>> {
        let mut entries = self.lock();
        match entries.get(key) {
            Some(Entry::Known { value, until }) if *until > Instant::now() => return Ok(value.clone()),
            Some(Entry::Asking(weak)) => {
                if let Some(asking) = weak.upgrade() {
                    return Err(asking);
                }
            }
            Some(Entry::Known { .. }) | None => {}
        }
        make_room(&mut entries, self.capacity);
        let asking = fetch().shared();
        if let Some(weak) = asking.downgrade() {
            entries.insert(key.clone(), Entry::Asking(weak));
        }
        Err(asking)
    }

    /// Puts the outcome in the place of the question. Every waiter tries, the first one does it.
    fn settle(&self, key: K, asking: &Shared<Fetch<V, E>>, outcome: &Result<Answer<V>, E>) {
        let mut entries = self.lock();
        let ours = match entries.get(&key) {
            Some(Entry::Asking(weak)) => weak.upgrade().is_some_and(|other| other.ptr_eq(asking)),
            Some(Entry::Known { .. }) | None => false,
        };
        if !ours {
            return;
        }
        match outcome {
            Ok(answer) => {
                let until = Instant::now() + answer.keep;
                entries.insert(key, Entry::Known { value: answer.value.clone(), until });
            }
            Err(_) => {
                entries.remove(&key);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Entry<V, E>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Questions in flight are never dropped here: there are at most as many as there are connections.
fn make_room<K: Clone + Eq + Hash, V, E>(entries: &mut HashMap<K, Entry<V, E>>, capacity: usize) {
    if entries.len() < capacity {
        return;
    }
    let now = Instant::now();
    entries.retain(|_, entry| match entry {
        Entry::Asking(weak) => weak.upgrade().is_some(),
        Entry::Known { until, .. } => *until > now,
    });
    if entries.len() < capacity {
        return;
    }
    let first_to_go = entries
        .iter()
        .filter_map(|(key, entry)| match entry {
            Entry::Known { until, .. } => Some((until, key)),
            Entry::Asking(_) => None,
        })
        .min_by_key(|(until, _)| **until)
        .map(|(_, key)| key.clone());
    if let Some(key) = first_to_go {
        entries.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn counted(
        calls: &Arc<AtomicUsize>,
        outcome: Result<u32, &'static str>,
        keep: Duration,
    ) -> Fetch<u32, &'static str> {
        let calls = calls.clone();
        async move {
            calls.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            outcome.map(|value| Answer { value, keep })
        }
        .boxed()
    }

    #[tokio::test]
    async fn many_callers_ask_once() {
        let (cache, calls) = (Cache::new(8), Arc::new(AtomicUsize::new(0)));
        let all = join_all((0..50).map(|_| cache.get("k", || counted(&calls, Ok(7), LONG)))).await;
        assert!(all.iter().all(|one| *one == Ok(7)));
        assert_eq!(cache.get("k", || counted(&calls, Ok(8), LONG)).await, Ok(7));
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_failure_reaches_all_waiters_and_is_forgotten() {
        let (cache, calls) = (Cache::new(8), Arc::new(AtomicUsize::new(0)));
        let all = join_all((0..5).map(|_| cache.get("k", || counted(&calls, Err("down"), LONG)))).await;
        assert!(all.iter().all(|one| *one == Err("down")));
        assert_eq!(cache.get("k", || counted(&calls, Ok(1), LONG)).await, Ok(1));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn an_answer_runs_out() {
        let (cache, calls) = (Cache::new(8), Arc::new(AtomicUsize::new(0)));
        for wanted in [1, 2] {
            assert_eq!(cache.get("k", || counted(&calls, Ok(wanted), Duration::ZERO)).await, Ok(wanted));
        }
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_does_not_block_the_next() {
        let (cache, calls) = (Cache::new(8), Arc::new(AtomicUsize::new(0)));
        let hang = || futures::future::pending().boxed();
        let gave_up = tokio::time::timeout(Duration::from_millis(10), cache.get("k", hang)).await;
        assert!(gave_up.is_err());
        assert_eq!(cache.get("k", || counted(&calls, Ok(3), LONG)).await, Ok(3));
    }

    #[tokio::test]
    async fn it_never_holds_more_than_its_capacity() {
        let (cache, calls) = (Cache::new(4), Arc::new(AtomicUsize::new(0)));
        for key in 0..20u64 {
            let keep = LONG + Duration::from_secs(key);
            cache.get(key, || counted(&calls, Ok(0), keep)).await.unwrap();
            assert!(cache.lock().len() <= 4);
        }
        // The ones that run out last are still there.
        cache.get(19, || counted(&calls, Ok(0), LONG)).await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 20);
    }
}
