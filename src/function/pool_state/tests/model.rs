//! The rules on random sequences of events, against a model that knows only what went in and what came out.
//!
//! [`World`] is the owner of a pool as it should be: it starts, stops and freezes what it is told, at random speed and
//! with random failures, and holds every action against the rules at the moment it is given. It looks into the pool for
//! one thing only, whether a replica is draining, which no action says.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use self::moves::{Move, found, moves, settings};
use super::super::{self as pool, Action, CallId, EnvironmentId, Event, Found, Pool, ReplicaId, VisitId, Why};
use crate::function::settings::Settings;

mod account;
mod always;
mod facts;
mod moves;
mod orders;
mod reserve;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Running(EnvironmentId),
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    place: Place,
    since: Instant,
    client_gone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Ready,
    Stopping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Frozen,
    Thawing,
    Unknown,
    Stopping,
    /// Ended by itself; its remains are being removed.
    Dead,
}

#[derive(Clone, Copy, Debug)]
struct Environment {
    state: State,
    started: Instant,
    used: Instant,
    ready: Option<Instant>,
    spent: bool,
    unready: bool,
    /// Since when it is known not to answer, and not how it ended.
    broke: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Replica {
    phase: Phase,
    started: Instant,
    sent_away: bool,
    failed: bool,
}

impl Environment {
    fn new(state: State, now: Instant) -> Self {
        Self { state, started: now, used: now, ready: None, spent: false, unready: false, broke: None }
    }

    fn is_gone(&self) -> bool {
        matches!(self.state, State::Stopping | State::Dead)
    }

    /// Whether nothing more is to be heard of it.
    fn is_silent(&self) -> bool {
        self.is_gone() && self.broke.is_none()
    }
}

struct World {
    pool: Pool,
    settings: Settings,
    now: Instant,
    calls: BTreeMap<CallId, Call>,
    queue: VecDeque<CallId>,
    visits: BTreeMap<VisitId, (Instant, Option<EnvironmentId>)>,
    replicas: BTreeMap<ReplicaId, Replica>,
    environments: BTreeMap<EnvironmentId, Environment>,
    /// Every id that was ever given out.
    used_ids: BTreeSet<EnvironmentId>,
    next: u64,
    denied: Option<Instant>,
    drain: Option<Instant>,
    /// Ever.
    crashed: u64,
    /// In a row.
    crashes: u32,
    last_crash: Option<Instant>,
    hold: Option<Instant>,
    /// Environments lost under a call: so many may be started though nobody waits. (That they are, other tests say.)
    owed: usize,
}

impl World {
    fn new(settings: Settings, found: &[(u64, Vec<Found>)]) -> Self {
        let now = Instant::now();
        let mut world = Self {
            pool: Pool::new(settings),
            settings,
            now,
            calls: BTreeMap::new(),
            queue: VecDeque::new(),
            visits: BTreeMap::new(),
            replicas: BTreeMap::new(),
            environments: BTreeMap::new(),
            used_ids: BTreeSet::new(),
            next: 0,
            denied: None,
            drain: None,
            crashed: 0,
            crashes: 0,
            last_crash: None,
            hold: None,
            owed: 0,
        };
        for (id, environments) in found {
            world.adopt(ReplicaId(*id), environments);
        }
        world.tell(Event::Tick);
        world
    }

    fn adopt(&mut self, replica: ReplicaId, found: &[Found]) {
        if self.replicas.contains_key(&replica) {
            return;
        }
        let now = self.now;
        let numbered: Vec<_> = (3..).zip(found.iter().copied()).collect();
        self.pool.adopt(replica, &numbered, now);
        let phase = Phase::Ready;
        self.replicas.insert(replica, Replica { phase, started: now, sent_away: false, failed: false });
        for (ordinal, found) in numbered {
            let id = EnvironmentId { replica, ordinal };
            let (state, ready) = match found {
                Found::Idle => (State::Ready, Some(now)),
                Found::Frozen => (State::Frozen, Some(now)),
                Found::Unknown => (State::Unknown, None),
            };
            self.used_ids.insert(id);
            self.environments.insert(id, Environment { ready, ..Environment::new(state, now) });
        }
    }

    fn tell(&mut self, event: Event) {
        let queued = self.queue.len();
        self.note(&event);
        if self.drain.is_some() {
            self.owed = 0;
        }
        let (kept, draining) = (self.kept(), self.surplus());
        let before = self.pool.clone();
        let mut long_way = self.pool.clone();
        let actions = self.pool.handle(event.clone(), self.now);
        let mut same = Vec::new();
        long_way.take_in(event.clone(), self.now, &mut same);
        long_way.decide(self.now, &mut same);
        assert_eq!(actions, same, "a warm call's short way decides what the long way does");
        assert_eq!(self.pool.summary(self.now), long_way.summary(self.now));
        for action in &actions {
            self.obey(action, &actions);
        }
        let drained = |id: &ReplicaId| actions.contains(&Action::StopReplica { replica: *id, why: Why::Surplus });
        let stopped = self.replicas.keys().filter(|id| drained(id) && !draining.contains(id)).count();
        let more: Vec<_> = self.surplus().difference(&draining).copied().collect();
        let too_many = kept.saturating_sub(self.settings.max as usize);
        assert_eq!(more.len() + stopped, too_many, "as many go as are too many");
        let idle = !self.idle().is_empty();
        // Calls that waited may have taken the places since.
        let took = actions.iter().any(|action| matches!(action, Action::Grant { .. } | Action::StartReplica { .. }));
        assert!(more.is_empty() || took || !idle, "a busy one goes although an idle one could");
        if self.held() || self.drain.is_some() {
            self.owed = 0;
        }
        if !matches!(event, Event::SettingsChanged(_)) {
            assert!(self.queue.len() <= queued.max(self.settings.queue_length as usize), "the queue is bounded");
        }
        self.check_state();
        self.check_time();
        self.check_reserve(&event, &before);
    }

    /// Ends the pool in good order and holds the last account.
    fn end(mut self) {
        for (environment, _) in self.environments.clone() {
            self.tell(Event::EnvironmentProbed { environment, ready: true });
        }
        self.tell(Event::Drain { until: self.now + Duration::from_secs(3600) });
        for _ in 0..1_000 {
            for replica in self.replicas_in(&[Phase::Starting]) {
                self.tell(Event::ReplicaStarted { replica });
            }
            for environment in self.environments_in(&[State::Starting, State::Thawing, State::Unknown]) {
                // Others may have stopped it.
                if self.environments.contains_key(&environment) {
                    self.tell(Event::EnvironmentReady { environment });
                }
            }
            for call in self.open_calls(false) {
                self.tell(Event::CallEnded { call, reuse: true });
            }
            for environment in self.environments_in(&[State::Stopping, State::Dead]) {
                self.tell(Event::EnvironmentStopped { environment });
            }
            for replica in self.replicas_in(&[Phase::Stopping]) {
                self.tell(Event::ReplicaStopped { replica });
            }
            if self.pool.is_drained() {
                break;
            }
            self.advance(250);
        }
        assert!(self.pool.is_drained(), "the pool does not come to an end: {:?}", self.pool);
        assert!(self.calls.values().all(|call| call.place == Place::Done), "a call was never answered");
        assert_eq!(self.pool.next_deadline(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn every_rule_holds_whatever_happens(
        settings in settings(),
        found in found(),
        moves in prop::collection::vec(moves(), 0..150),
    ) {
        let mut world = World::new(settings, &found);
        moves.into_iter().for_each(|next| world.play(next));
        world.end();
    }

    #[test]
    fn a_drain_at_any_moment_keeps_the_rules(
        settings in settings(),
        before in prop::collection::vec(moves(), 0..60),
        grace in prop_oneof![0_u64..3_000, 0_u64..60_000],
        after in prop::collection::vec(moves(), 0..60),
    ) {
        let mut world = World::new(settings, &[]);
        before.into_iter().for_each(|next| world.play(next));
        world.play(Move::Drain(grace));
        after.into_iter().for_each(|next| world.play(next));
        world.advance(grace);
        prop_assert!(world.calls.values().all(|call| call.place == Place::Done));
        world.end();
    }
}
