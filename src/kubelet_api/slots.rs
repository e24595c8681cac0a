//! The bound on connections, and who gives way when it is reached.
//!
//! A client that connects and then stalls must not keep others out. So when all places are taken, the oldest connection
//! that never had a request let through gives way; only when every place belongs to a client that proved its right is
//! a newcomer told so, in HTTP, by one of a few places kept for that.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Places for telling newcomers that there is no place.
const REFUSING: usize = 32;

/// All places.
#[derive(Debug)]
pub(super) struct Slots {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// By age.
    open: BTreeMap<u64, Arc<State>>,
    refusing: usize,
}

#[derive(Debug, Default)]
struct State {
    proven: AtomicBool,
    evicted: CancellationToken,
}

/// What becomes of a new connection.
#[derive(Debug)]
pub(super) enum Admission {
    /// It is served; `evicted` if another gave way to it.
    Serve { slot: Slot, evicted: bool },
    /// It is told that there is no place.
    Refuse(Refusing),
    /// It is closed at once.
    Close,
}

impl Slots {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, inner: Mutex::default() })
    }

    pub(super) fn admit(self: &Arc<Self>) -> Admission {
        let mut inner = self.lock();
        let mut evicted = false;
        if inner.open.len() >= self.limit {
            let stalled = inner.open.iter().find(|(_, state)| !state.proven.load(Ordering::Relaxed));
            let Some(id) = stalled.map(|(id, _)| *id) else {
                return self.refuse(&mut inner);
            };
            if let Some(state) = inner.open.remove(&id) {
                state.evicted.cancel();
            }
            evicted = true;
        }
        let id = inner.next;
        inner.next += 1;
        let state = Arc::new(State::default());
        inner.open.insert(id, state.clone());
        Admission::Serve { slot: Slot { slots: self.clone(), id, state }, evicted }
    }

    fn refuse(self: &Arc<Self>, inner: &mut Inner) -> Admission {
        if inner.refusing >= REFUSING {
            return Admission::Close;
        }
        inner.refusing += 1;
        Admission::Refuse(Refusing(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, given back on drop.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    id: u64,
    state: Arc<State>,
}

impl Slot {
    /// Resolves when this connection must give way.
    pub(super) async fn evicted(&self) {
        self.state.evicted.cancelled().await;
    }

    /// A handle for saying that the client proved its right.
    pub(super) fn proof(&self) -> Proof {
        Proof(self.state.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().open.remove(&self.id);
    }
}

/// See [`Slot::proof`].
#[derive(Debug)]
pub(super) struct Proof(Arc<State>);

impl Proof {
    pub(super) fn mark(&self) {
        self.0.proven.store(true, Ordering::Relaxed);
    }
}

/// The place of a connection that is being told there is none, given back on drop.
#[derive(Debug)]
pub(super) struct Refusing(Arc<Slots>);

impl Drop for Refusing {
    fn drop(&mut self) {
        self.0.lock().refusing -= 1;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn served(admission: Admission) -> Slot {
        match admission {
            Admission::Serve { slot, .. } => slot,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_oldest_unproven_connection_gives_way() {
        let slots = Slots::new(3);
        let all: Vec<_> = (0..3).map(|_| served(slots.admit())).collect();
        all[0].proof().mark();
        let Admission::Serve { slot, evicted } = slots.admit() else { panic!("refused") };
        assert!(evicted);
        assert!(all[0].evicted().now_or_never().is_none());
        assert!(all[1].evicted().now_or_never().is_some());
        assert!(all[2].evicted().now_or_never().is_none());
        assert!(slot.evicted().now_or_never().is_none());
        assert_eq!(slots.lock().open.len(), 3);
        drop(all);
        assert_eq!(slots.lock().open.len(), 1);
    }

    #[test]
    fn proven_connections_stay_and_a_newcomer_is_told() {
        let slots = Slots::new(1);
        let slot = served(slots.admit());
        slot.proof().mark();
        let told: Vec<_> = (0..REFUSING).map(|_| slots.admit()).collect();
        assert!(told.iter().all(|admission| matches!(admission, Admission::Refuse(_))));
        assert!(matches!(slots.admit(), Admission::Close));
        drop(told);
        assert!(matches!(slots.admit(), Admission::Refuse(_)));
        drop(slot);
        served(slots.admit());
    }
}
