//! The bound on connections, and who gives way when it is reached.
//!
//! A client that connects and then stalls or idles must not keep others out. So when all places are taken, the oldest
//! connection that never had a request let through gives way, else the one on which nothing has been under way for
//! longest. Only when every place belongs to a client that is being served is a newcomer told so, in HTTP, by one of a
//! few places kept for that.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Places for telling newcomers that there is no place.
const REFUSING: usize = 32;
/// The share of all places in which newcomers may prove themselves before they give way to each other: without, those
/// that come at the same time would, while others only idle.
const NEWCOMERS: usize = 32;

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
    open: BTreeMap<u64, Place>,
    refusing: usize,
}

/// A connection.
#[derive(Debug)]
struct Place {
    proven: bool,
    /// Requests that are being answered, and streams.
    under_way: usize,
    /// Since when nothing is under way, in the order in which connections came and work ended.
    since: u64,
    evicted: CancellationToken,
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whose place a newcomer gets, of this many.
    fn gives_way(&self, limit: usize) -> Option<u64> {
        let strangers = || self.open.iter().filter(|(_, place)| !place.proven);
        let idle = self.open.iter().filter(|(_, place)| place.proven && place.under_way == 0);
        let (stranger, idle) = (strangers().next(), idle.min_by_key(|(_, place)| place.since));
        let few = strangers().count() < limit / NEWCOMERS;
        let chosen = if few { idle.or(stranger) } else { stranger.or(idle) };
        chosen.map(|(id, _)| *id)
    }
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
        let full = inner.open.len() >= self.limit;
        if full {
            let Some(id) = inner.gives_way(self.limit) else {
                return self.refuse(&mut inner);
            };
            if let Some(place) = inner.open.remove(&id) {
                place.evicted.cancel();
            }
        }
        let (id, evicted) = (inner.tick(), CancellationToken::new());
        inner.open.insert(id, Place { proven: false, under_way: 0, since: id, evicted: evicted.clone() });
        Admission::Serve { slot: Slot { slots: self.clone(), id, evicted }, evicted: full }
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

    /// Notes something of a connection, unless it gave way already.
    fn note(&self, id: u64, note: impl FnOnce(&mut Place)) {
        if let Some(place) = self.lock().open.get_mut(&id) {
            note(place);
        }
    }
}

/// A connection's place, given back on drop.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    id: u64,
    evicted: CancellationToken,
}

impl Slot {
    /// Resolves when this connection must give way.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// A handle for saying that the client proved its right.
    pub(super) fn proof(&self) -> Proof {
        Proof(self.slots.clone(), self.id)
    }

    /// Something is under way on this connection: a client that proved its right does not give way meanwhile.
    pub(super) fn work(&self) -> Work {
        self.slots.note(self.id, |place| place.under_way += 1);
        Work(self.slots.clone(), self.id)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().open.remove(&self.id);
    }
}

/// See [`Slot::proof`].
#[derive(Debug)]
pub(super) struct Proof(Arc<Slots>, u64);

impl Proof {
    pub(super) fn mark(&self) {
        self.0.note(self.1, |place| place.proven = true);
    }
}

/// See [`Slot::work`]; it ends on drop.
#[derive(Debug)]
pub(super) struct Work(Arc<Slots>, u64);

impl Drop for Work {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        let now = inner.tick();
        if let Some(place) = inner.open.get_mut(&self.1) {
            (place.under_way, place.since) = (place.under_way - 1, now);
        }
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

    fn gave_way(slots: &[Slot]) -> Vec<bool> {
        slots.iter().map(|slot| slot.evicted().now_or_never().is_some()).collect()
    }

    #[test]
    fn the_oldest_unproven_connection_gives_way() {
        let slots = Slots::new(3);
        let all: Vec<_> = (0..3).map(|_| served(slots.admit())).collect();
        all[0].proof().mark();
        // What a stranger asks for keeps no place.
        let _refused = all[1].work();
        let Admission::Serve { slot, evicted } = slots.admit() else { panic!("refused") };
        assert!(evicted);
        assert_eq!(gave_way(&all), [false, true, false]);
        assert!(slot.evicted().now_or_never().is_none());
        assert_eq!(slots.lock().open.len(), 3);
        drop(all);
        assert_eq!(slots.lock().open.len(), 1);
    }

    #[test]
    fn of_proven_connections_the_one_that_idled_longest_gives_way() {
        let slots = Slots::new(3);
        let mut all: Vec<_> = (0..3).map(|_| served(slots.admit())).collect();
        all.iter().for_each(|slot| slot.proof().mark());
        let busy = all[2].work();
        drop(all[0].work());
        let mut newcomer = || {
            let slot = served(slots.admit());
            slot.proof().mark();
            all.push(slot);
            gave_way(&all)
        };
        assert_eq!(newcomer(), [false, true, false, false]);
        assert_eq!(newcomer(), [true, true, false, false, false]);
        drop(busy);
        assert_eq!(newcomer(), [true, true, false, true, false, false]);
    }

    #[test]
    fn newcomers_do_not_give_way_to_each_other_while_others_idle() {
        let slots = Slots::new(2 * NEWCOMERS);
        let idle: Vec<_> = (0..2 * NEWCOMERS).map(|_| served(slots.admit())).collect();
        idle.iter().for_each(|slot| slot.proof().mark());
        let newcomers: Vec<_> = (0..3).map(|_| served(slots.admit())).collect();
        assert_eq!(gave_way(&newcomers), [true, false, false]);
        assert_eq!(gave_way(&idle[..3]), [true, true, false]);
    }

    #[test]
    fn connections_that_are_served_stay_and_a_newcomer_is_told() {
        let slots = Slots::new(1);
        let slot = served(slots.admit());
        slot.proof().mark();
        let _work = slot.work();
        let told: Vec<_> = (0..REFUSING).map(|_| slots.admit()).collect();
        assert!(told.iter().all(|admission| matches!(admission, Admission::Refuse(_))));
        assert!(matches!(slots.admit(), Admission::Close));
        drop(told);
        assert!(matches!(slots.admit(), Admission::Refuse(_)));
        drop(slot);
        served(slots.admit());
    }
}
