//! The bound on clients' connections, who gives way when it is reached, and how each is told to end.
//!
//! A connection that only idles must not keep others out: when all places of a function are taken, the one that has
//! idled longest gives way. If none idles, a newcomer is answered 503 and closed, by one of a few places kept for that;
//! beyond those it is closed unanswered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::time::Instant;

/// Places for telling newcomers that there is none.
const REFUSING: usize = 32;

/// The connections of all functions of a node; clones share one bound.
#[derive(Clone, Debug)]
pub struct NodeConnections(Arc<Node>);

#[derive(Debug)]
struct Node {
    limit: usize,
    open: AtomicUsize,
}

/// The connections of one function.
pub(super) struct Places {
    limit: usize,
    node: NodeConnections,
    epoch: Instant,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    open: BTreeMap<u64, Arc<State>>,
    refusing: usize,
    told: Signal,
}

/// What becomes of a new connection.
pub(super) enum Admission {
    /// It is served; `evicted` if another gives way to it.
    Serve { seat: Seat, evicted: bool },
    /// It is told that there is no place.
    Refuse(Refusing),
    /// It is closed at once.
    Close,
}

/// What a connection is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Signal {
    #[default]
    Serve,
    /// Answer the call that is being made, if one is, and end.
    Drain,
    /// End at once.
    Close,
}

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nothing was received since the last answer.
    Idle,
    /// A part of a request head was.
    Head,
    /// A call is being made, or answered.
    Call,
}

/// What the connection, its socket and its place know of each other.
pub(super) struct State {
    epoch: Instant,
    signal: AtomicU8,
    waker: AtomicWaker,
    phase: AtomicU8,
    /// When the phase began, and since when the client takes nothing of what is written (0: it does): milliseconds
    /// since the epoch, and one.
    since: AtomicU64,
    stalled: AtomicU64,
    /// The client is known to have left.
    left: AtomicBool,
}

/// A connection's place, given back on drop.
pub(super) struct Seat {
    places: Arc<Places>,
    id: u64,
    pub(super) state: Arc<State>,
}

/// A place for saying that there is no place, given back on drop.
pub(super) struct Refusing(Arc<Places>);

// === impl NodeConnections ===

impl NodeConnections {
    /// At most `limit` connections of clients to all functions together.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Node { limit, open: AtomicUsize::new(0) }))
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    fn enter(&self) -> bool {
        let enter = |open| (open < self.0.limit).then_some(open + 1);
        self.0.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).is_ok()
    }

    fn leave(&self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Places ===

impl Places {
    pub(super) fn new(limit: usize, node: NodeConnections) -> Arc<Self> {
        Arc::new(Self { limit, node, epoch: Instant::now(), inner: Mutex::default() })
    }

    pub(super) fn admit(self: &Arc<Self>) -> Admission {
        let mut inner = self.lock();
        let mut evicted = false;
        if inner.open.len() >= self.limit || !self.node.enter() {
            let Some(id) = inner.longest_idle() else { return self.refuse(&mut inner) };
            if let Some(state) = inner.open.remove(&id) {
                // Gives way as soon as it is told; until then there is one more than the bound says.
                state.tell(Signal::Drain);
                self.node.leave();
            }
            if !self.node.enter() {
                return self.refuse(&mut inner);
            }
            evicted = true;
        }
        let id = inner.next;
        inner.next += 1;
        let state = Arc::new(State::new(self.epoch, inner.told));
        inner.open.insert(id, state.clone());
        Admission::Serve { seat: Seat { places: self.clone(), id, state }, evicted }
    }

    fn refuse(self: &Arc<Self>, inner: &mut Inner) -> Admission {
        if inner.refusing >= REFUSING {
            return Admission::Close;
        }
        inner.refusing += 1;
        Admission::Refuse(Refusing(self.clone()))
    }

    /// Tells every connection, and those that come.
    pub(super) fn tell(&self, signal: Signal) {
        let mut inner = self.lock();
        inner.told = inner.told.max(signal);
        for state in inner.open.values() {
            state.tell(signal);
        }
    }

    /// Connections without a call.
    pub(super) fn idle(&self) -> usize {
        self.lock().open.values().filter(|state| state.phase() != Phase::Call).count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn longest_idle(&self) -> Option<u64> {
        let idle = self.open.iter().filter(|(_, state)| state.phase() == Phase::Idle && state.stalled().is_none());
        idle.min_by_key(|(_, state)| state.since.load(Ordering::Relaxed)).map(|(id, _)| *id)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // One that gave way is no longer in it.
        if self.places.lock().open.remove(&self.id).is_some() {
            self.places.node.leave();
        }
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.0.lock().refusing -= 1;
    }
}

// === impl State ===

impl State {
    fn new(epoch: Instant, signal: Signal) -> Self {
        let state = Self {
            epoch,
            signal: AtomicU8::new(signal as u8),
            waker: AtomicWaker::new(),
            phase: AtomicU8::new(Phase::Idle as u8),
            since: AtomicU64::new(0),
            stalled: AtomicU64::new(0),
            left: AtomicBool::new(false),
        };
        state.enter(Phase::Idle);
        state
    }

    fn tell(&self, signal: Signal) {
        self.signal.fetch_max(signal as u8, Ordering::Release);
        self.waker.wake();
    }

    /// What it was told, and by whom it is to be woken when it is told more.
    pub(super) fn listen(&self, waker: &std::task::Waker) -> Signal {
        self.waker.register(waker);
        match self.signal.load(Ordering::Acquire) {
            0 => Signal::Serve,
            1 => Signal::Drain,
            _ => Signal::Close,
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.since.store(self.now(), Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            _ => Phase::Call,
        }
    }

    /// The client left; what it called for may go on.
    pub(super) fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    /// When the phase began.
    pub(super) fn since(&self) -> Instant {
        self.instant(self.since.load(Ordering::Relaxed))
    }

    /// Since when the client takes nothing of what is written to it.
    pub(super) fn stalled(&self) -> Option<Instant> {
        Some(self.stalled.load(Ordering::Relaxed)).filter(|at| *at > 0).map(|at| self.instant(at))
    }

    /// A write was taken, or has to wait.
    pub(super) fn wrote(&self, taken: bool) {
        let before = self.stalled.load(Ordering::Relaxed);
        if taken && before != 0 {
            self.stalled.store(0, Ordering::Relaxed);
        } else if !taken && before == 0 {
            self.stalled.store(self.now(), Ordering::Relaxed);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    fn instant(&self, at: u64) -> Instant {
        self.epoch + Duration::from_millis(at.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(places: &Arc<Places>) -> (Seat, bool) {
        match places.admit() {
            Admission::Serve { seat, evicted } => (seat, evicted),
            _ => panic!("there is a place"),
        }
    }

    #[tokio::test]
    async fn the_one_that_idled_longest_gives_way() {
        let places = Places::new(2, NodeConnections::new(8));
        let (busy, _) = seat(&places);
        busy.state.enter(Phase::Call);
        let (idle, evicted) = seat(&places);
        assert!(!evicted);
        idle.state.since.store(0, Ordering::Relaxed);
        let (newest, evicted) = seat(&places);
        assert!(evicted);
        let told = |seat: &Seat| seat.state.listen(std::task::Waker::noop());
        assert_eq!((told(&busy), told(&idle), told(&newest)), (Signal::Serve, Signal::Drain, Signal::Serve));
        newest.state.enter(Phase::Head);
        let Admission::Refuse(refusing) = places.admit() else { panic!("none idles") };
        drop((busy, idle, newest, refusing));
        // One guard: a second one in the same expression would wait for the first.
        let inner = places.lock();
        assert_eq!((places.node.open(), inner.open.len(), inner.refusing), (0, 0, 0));
    }

    #[tokio::test]
    async fn functions_share_the_bound_of_the_node() {
        let node = NodeConnections::new(1);
        let (first, second) = (Places::new(8, node.clone()), Places::new(8, node.clone()));
        let (held, _) = seat(&first);
        assert!(matches!(second.admit(), Admission::Refuse(_)));
        drop(held);
        let (_held, _) = seat(&second);
        assert_eq!(node.open(), 1);
    }

    #[tokio::test]
    async fn refusals_are_bounded_too() {
        let places = Places::new(0, NodeConnections::new(8));
        let held: Vec<_> = (0..REFUSING).map(|_| places.admit()).collect();
        assert!(matches!(places.admit(), Admission::Close));
        drop(held);
        assert!(matches!(places.admit(), Admission::Refuse(_)));
    }
}
