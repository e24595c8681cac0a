//! The rules on random sequences of events, against a model that knows only what went in and what came out.
//!
//! [`World`] is the owner of a pool as it should be: it starts, stops and freezes what it is told, at random speed and
//! with random failures, and holds every action against the rules at the moment it is given. It looks into the pool for
//! one thing only, whether a replica is draining, which no action says.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;

use super::super::{
    self as pool, Action, CallId, EnvironmentId, Event, Found, Pool, Reason, ReplicaId, TryAgain, VisitId, Why,
};
use super::exit;
use crate::function::protocol::Protocol;
use crate::function::settings::Settings;

/// What happens next. Indices choose among what there is at that moment; where there is nothing, nothing happens.
#[derive(Clone, Debug)]
enum Move {
    Wait(u64),
    Call,
    End {
        at: Index,
        reuse: bool,
    },
    ClientGoes(Index),
    Visit,
    VisitEnds(Index),
    Starts(Index),
    Denied(Index),
    ReplicaFails(Index),
    ReplicaStops(Index),
    Ready(Index),
    Dies(Index),
    EnvironmentStops(Index),
    CapacityFreed,
    GiveBack(Index),
    Change(Settings),
    Drain(u64),
    /// News of what never was, or is long gone.
    Late(u8, u64, u32),
}

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
}

#[derive(Clone, Copy, Debug)]
struct Replica {
    phase: Phase,
    started: Instant,
    given_back: bool,
    failed: bool,
}

impl Environment {
    fn is_gone(&self) -> bool {
        matches!(self.state, State::Stopping | State::Dead)
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
        self.replicas.insert(replica, Replica { phase, started: now, given_back: false, failed: false });
        for (ordinal, found) in numbered {
            let id = EnvironmentId { replica, ordinal };
            let (state, ready) = match found {
                Found::Idle => (State::Ready, Some(now)),
                Found::Frozen => (State::Frozen, Some(now)),
                Found::Unknown => (State::Unknown, None),
            };
            self.used_ids.insert(id);
            self.environments.insert(id, Environment { state, started: now, used: now, ready, spent: false });
        }
    }

    // === What the rules speak of ===

    fn calls_in(&self, id: EnvironmentId) -> usize {
        self.calls.values().filter(|call| call.place == Place::Running(id)).count()
    }

    fn within(&self, replica: ReplicaId) -> impl Iterator<Item = (EnvironmentId, &Environment)> {
        self.environments.iter().filter(move |(id, _)| id.replica == replica).map(|(id, e)| (*id, e))
    }

    fn calls_in_replica(&self, replica: ReplicaId) -> usize {
        self.within(replica).map(|(id, _)| self.calls_in(id)).sum()
    }

    fn drains(&self, id: ReplicaId) -> bool {
        let draining = |replica: &pool::Replica| matches!(replica.phase, pool::Phase::Draining(_));
        self.replicas[&id].given_back || self.pool.replicas.get(&id).is_some_and(draining)
    }

    /// Whether a replica stays: neither draining nor stopping, nor about to be by an action that is yet to be read.
    fn is_kept(&self, id: ReplicaId) -> bool {
        let goes = self.pool.replicas.get(&id).is_none_or(|replica| !replica.is_kept());
        self.replicas[&id].phase != Phase::Stopping && !self.drains(id) && !goes
    }

    fn kept(&self) -> usize {
        self.replicas.keys().filter(|id| self.is_kept(**id)).count()
    }

    /// Replicas that go because labels allow fewer. No action says so while they have calls, only the pool knows.
    fn surplus(&self) -> BTreeSet<ReplicaId> {
        let surplus = |replica: &pool::Replica| replica.phase == pool::Phase::Draining(Why::Surplus);
        self.pool.replicas.iter().filter(|(_, replica)| surplus(replica)).map(|(id, _)| *id).collect()
    }

    fn min(&self) -> usize {
        if self.drain.is_some() { 0 } else { self.settings.min as usize }
    }

    /// Environments that could take a call right now, by the order in which they should.
    fn with_room(&self) -> BTreeSet<(bool, Instant, EnvironmentId)> {
        let room = |(id, e): &(&EnvironmentId, &Environment)| {
            let ready = self.replicas.get(&id.replica).is_some_and(|r| r.phase == Phase::Ready);
            let takes = e.state == State::Ready && !e.spent && ready && self.is_kept(id.replica);
            takes && self.calls_in(**id) < self.settings.calls as usize
        };
        let open = self.environments.iter().filter(room);
        open.map(|(id, e)| (self.calls_in_replica(id.replica) > 0, e.used, *id)).collect()
    }

    /// Environments on their way. A replica that starts brings those the pool plans for it.
    fn coming(&self) -> usize {
        let coming = |(id, e): &(&EnvironmentId, &Environment)| {
            matches!(e.state, State::Starting | State::Thawing) && self.is_kept(id.replica)
        };
        let planned = |id: &ReplicaId| self.pool.replicas.get(id).map_or(0, |replica| replica.environments.len());
        let starting = self.replicas.iter().filter(|(id, r)| r.phase == Phase::Starting && self.is_kept(**id));
        self.environments.iter().filter(coming).count() + starting.map(|(id, _)| planned(id)).sum::<usize>()
    }

    fn wanted(&self) -> usize {
        let visitors = usize::from(self.visits.values().any(|(_, place)| place.is_none()));
        self.queue.len().div_ceil(self.settings.calls as usize).max(visitors)
    }

    /// Whether something is to be started for who waits.
    fn lacks(&self) -> bool {
        self.coming() < self.wanted()
    }

    fn held(&self) -> bool {
        self.hold.is_some_and(|until| until > self.now)
    }

    fn is_denied(&self) -> bool {
        self.denied.is_some_and(|until| until > self.now)
    }

    fn visited(&self, replica: ReplicaId) -> bool {
        self.visits.values().any(|(_, place)| place.is_some_and(|id| id.replica == replica))
    }

    /// Replicas with nothing to do, with the moment since when.
    fn idle(&self) -> BTreeSet<(Instant, ReplicaId)> {
        let quiet = |id: EnvironmentId, e: &Environment| match e.state {
            State::Ready | State::Frozen => self.calls_in(id) == 0,
            State::Stopping | State::Dead => true,
            State::Starting | State::Thawing | State::Unknown => false,
        };
        let ready = self.replicas.iter().filter(|(id, r)| r.phase == Phase::Ready && !self.drains(**id));
        let idle = ready.filter(|(id, _)| !self.visited(**id) && self.within(**id).all(|(id, e)| quiet(id, e)));
        let used = |id: ReplicaId| self.within(id).filter(|(_, e)| !e.is_gone()).map(|(_, e)| e.used);
        idle.map(|(id, r)| (used(*id).max().map_or(r.started, |used| used.max(r.started)), *id)).collect()
    }

    fn has_nothing(&self, id: ReplicaId) -> bool {
        self.within(id).all(|(_, e)| e.is_gone())
    }

    // === Going in ===

    fn tell(&mut self, event: Event) {
        let queued = self.queue.len();
        self.note(&event);
        if self.drain.is_some() {
            self.owed = 0;
        }
        let (kept, draining) = (self.kept(), self.surplus());
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
    }

    /// The model's own account of an event.
    fn note(&mut self, event: &Event) {
        match event {
            Event::CallArrived { call } => {
                let call_now = Call { place: Place::Waiting, since: self.now, client_gone: false };
                self.calls.insert(*call, call_now);
                self.queue.push_back(*call);
            }
            Event::CallEnded { call, reuse } => self.note_end(*call, *reuse),
            Event::ClientGone { call } => {
                let Some(known) = self.calls.get_mut(call) else { return };
                known.client_gone = true;
                if known.place == Place::Waiting {
                    known.place = Place::Done;
                    self.queue.retain(|waiting| waiting != call);
                }
            }
            Event::VisitArrived { visit } => {
                self.visits.insert(*visit, (self.now, None));
            }
            Event::VisitEnded { visit } => {
                self.visits.remove(visit);
            }
            Event::ReplicaStarted { replica } => {
                if let Some(known) = self.replicas.get_mut(replica).filter(|r| r.phase == Phase::Starting) {
                    known.phase = Phase::Ready;
                }
            }
            Event::ReplicaDenied { replica } => self.note_denied(*replica),
            Event::ReplicaFailed { replica, .. } => self.note_replica_failed(*replica),
            Event::ReplicaStopped { replica } => {
                self.replicas.remove(replica);
                self.denied = None;
            }
            Event::EnvironmentReady { environment } => {
                if let Some(e) = self.environments.get_mut(environment) {
                    e.state = State::Ready;
                    e.used = self.now;
                    e.ready.get_or_insert(self.now);
                }
            }
            Event::EnvironmentDied { environment, .. } => self.note_died(*environment),
            Event::EnvironmentStopped { environment } => {
                self.environments.remove(environment);
            }
            Event::CapacityFreed => self.denied = None,
            Event::GiveBack { replica } => {
                if let Some(known) = self.replicas.get_mut(replica) {
                    known.given_back = true;
                }
            }
            Event::SettingsChanged(settings) => self.settings = *settings,
            Event::Drain { until } => self.drain = Some(self.drain.map_or(*until, |before| before.min(*until))),
            Event::Tick => {}
        }
    }

    fn note_denied(&mut self, replica: ReplicaId) {
        if self.replicas.get(&replica).is_some_and(|r| r.phase == Phase::Starting) {
            self.denied = Some(self.now + Duration::from_secs(5));
            self.owed = 0;
        } else {
            self.denied = None;
        }
        self.replicas.remove(&replica);
    }

    fn note_end(&mut self, call: CallId, reuse: bool) {
        let Some(Place::Running(id)) = self.calls.get(&call).map(|call| call.place) else { return };
        self.calls.get_mut(&call).unwrap().place = Place::Done;
        let kept = self.is_kept(id.replica);
        let environment = self.environments.get_mut(&id).unwrap();
        environment.used = self.now;
        if !reuse && !environment.spent {
            environment.spent = true;
            self.owed += usize::from(kept);
        }
        if reuse && self.last_crash.is_some_and(|crash| environment.started >= crash) {
            (self.crashes, self.last_crash, self.hold) = (0, None, None);
        }
    }

    fn drop_calls_without_client(&mut self, gone: impl Fn(EnvironmentId) -> bool) {
        for call in self.calls.values_mut().filter(|call| call.client_gone) {
            if let Place::Running(id) = call.place
                && gone(id)
            {
                call.place = Place::Done;
            }
        }
    }

    fn note_replica_failed(&mut self, replica: ReplicaId) {
        let busy = self.within(replica).filter(|(id, _)| self.calls_in(*id) > 0).count();
        self.owed += if self.is_kept(replica) { busy } else { 0 };
        let living = self.within(replica).filter(|(_, e)| e.state != State::Dead);
        let started = living.map(|(_, e)| e.started).max();
        let started = started.unwrap_or(self.replicas[&replica].started).max(self.replicas[&replica].started);
        self.note_crash(started);
        self.replicas.get_mut(&replica).unwrap().failed = true;
        self.drop_calls_without_client(|id| id.replica == replica);
    }

    fn note_died(&mut self, id: EnvironmentId) {
        let Some(environment) = self.environments.get(&id).copied() else { return };
        if environment.is_gone() {
            return;
        }
        self.owed += usize::from(self.calls_in(id) > 0 && self.is_kept(id.replica));
        if environment.state != State::Unknown {
            self.note_crash(environment.started);
        }
        self.drop_calls_without_client(|other| other == id);
        self.environments.get_mut(&id).unwrap().state = State::Dead;
    }

    /// The first restart at once, then 10 s, 20 s, ... 300 s; what was started before the last crash is part of it.
    fn note_crash(&mut self, started: Instant) {
        if self.last_crash.is_some_and(|last| started < last) {
            return;
        }
        if self.last_crash.is_some_and(|last| self.now - last > Duration::from_secs(600)) {
            self.crashes = 0;
        }
        let wait = [0, 10, 20, 40, 80, 160, 300][self.crashes.min(6) as usize];
        self.hold = (wait > 0).then(|| self.now + Duration::from_secs(wait));
        self.crashes += 1;
        self.last_crash = Some(self.now);
    }

    // === Coming out ===

    fn obey(&mut self, action: &Action, all: &[Action]) {
        match action {
            Action::StartReplica { replica } => self.obey_start_replica(*replica),
            Action::StopReplica { replica, why } => self.obey_stop_replica(*replica, *why),
            Action::StartEnvironment { environment, warm_up } => self.obey_start(*environment, *warm_up),
            Action::StopEnvironment { environment } => self.obey_stop(*environment),
            Action::FreezeEnvironment { environment } => {
                let e = self.environments[environment];
                assert_eq!((e.state, self.calls_in(*environment)), (State::Ready, 0), "only the idle are frozen");
                assert!(e.used + self.settings.freeze_after.unwrap() <= self.now, "not before its time");
                assert!(self.visits.values().all(|(_, place)| *place != Some(*environment)), "not under a visitor");
                self.environments.get_mut(environment).unwrap().state = State::Frozen;
            }
            Action::ThawEnvironment { environment } => {
                let e = self.environments.get_mut(environment).unwrap();
                assert_eq!(e.state, State::Frozen);
                e.state = State::Thawing;
                assert!(self.coming() <= self.wanted(), "no more are thawed than are wanted");
            }
            Action::Grant { call, environment } => self.obey_grant(*call, *environment),
            Action::Refuse { call, try_again } => self.obey_refuse(*call, *try_again),
            Action::FailCall { call, .. } => {
                let known = self.calls.get_mut(call).unwrap();
                let Place::Running(id) = known.place else { panic!("{call:?} is not running: {known:?}") };
                assert!(!known.client_gone, "nobody is there to be told");
                known.place = Place::Done;
                let ended = self.drain.is_some_and(|until| until <= self.now);
                let dies = Action::StopEnvironment { environment: id };
                let replica = id.replica;
                let fails = Action::StopReplica { replica, why: Why::Failed };
                assert!(ended || all.contains(&dies) || all.contains(&fails), "{call:?} fails without a reason");
            }
            Action::Enter { visit, environment } => {
                let e = self.environments[environment];
                assert!(e.state == State::Ready && self.replicas[&environment.replica].phase == Phase::Ready);
                let open =
                    |id: &EnvironmentId| self.replicas[&id.replica].phase == Phase::Ready && !self.drains(id.replica);
                let ready = self.environments.iter().filter(|(id, e)| e.state == State::Ready && !e.spent && open(id));
                assert_eq!(ready.map(|(id, e)| (e.ready, *id)).min().unwrap().1, *environment, "the oldest");
                assert_eq!(self.visits.insert(*visit, (self.now, Some(*environment))).unwrap().1, None);
            }
            Action::RefuseVisit { visit, .. } => assert_eq!(self.visits.remove(visit).unwrap().1, None),
        }
    }

    fn obey_start_replica(&mut self, id: ReplicaId) {
        assert!(self.used_ids.iter().all(|used| used.replica < id), "numbers are not used twice");
        assert!(self.replicas.len() < self.settings.max as usize, "never above the maximum, starting ones included");
        assert!(!self.held(), "no start while the back-off lasts");
        assert!(!self.is_denied(), "no asking for capacity right after it was denied");
        self.used_ids.insert(EnvironmentId { replica: id, ordinal: 0 });
        let wanted = self.wanted() > 0 || self.owed > 0 || self.kept() < self.min();
        assert!(wanted, "a replica starts although nobody wants it");
        let replica = Replica { phase: Phase::Starting, started: self.now, given_back: false, failed: false };
        self.replicas.insert(id, replica);
        assert!(
            self.coming() <= self.wanted().max(self.owed) || self.kept() <= self.min(),
            "no more starts than are wanted"
        );
    }

    fn obey_start(&mut self, id: EnvironmentId, warm_up: bool) {
        assert_eq!(self.replicas[&id.replica].phase, Phase::Ready, "environments start in replicas that have");
        let there = self.within(id.replica).filter(|(_, e)| e.state != State::Dead).count();
        assert!(there < self.settings.environments as usize, "never more environments than the labels say");
        assert!(id.ordinal == 0 || self.used_ids.insert(id), "numbers are not used twice");
        self.used_ids.insert(id);
        assert!(!warm_up || (self.settings.warm_up && self.queue.is_empty()), "a no-op must not delay a call");
        let now = self.now;
        let environment = Environment { state: State::Starting, started: now, used: now, ready: None, spent: false };
        assert!(self.environments.insert(id, environment).is_none());
    }

    fn obey_stop(&mut self, id: EnvironmentId) {
        assert_eq!(self.calls_in(id), 0, "no environment is stopped under a call");
        let environment = self.environments.get_mut(&id).unwrap();
        assert!(environment.state != State::Stopping, "once");
        if environment.state != State::Dead {
            environment.state = State::Stopping;
        }
    }

    fn obey_stop_replica(&mut self, id: ReplicaId, why: Why) {
        let over = self.drain.is_some_and(|until| until <= self.now);
        if over {
            self.drop_calls_without_client(|_| true);
        }
        assert_eq!(self.calls_in_replica(id), 0, "no replica is stopped under a call");
        assert_ne!(self.replicas[&id].phase, Phase::Stopping, "once");
        let idle = self.idle();
        match why {
            Why::Failed => assert!(self.replicas[&id].failed),
            Why::GivenBack => assert!(self.replicas[&id].given_back),
            Why::Drained => assert!(over || (self.drain.is_some() && self.queue.is_empty())),
            Why::Surplus => {}
            Why::Empty => assert!(self.has_nothing(id) && self.queue.is_empty()),
            Why::Idle => {
                let (since, oldest) = *idle.first().expect("it is idle");
                assert_eq!(oldest, id, "the longest idle first");
                assert!(since + self.settings.idle_timeout <= self.now, "not before its time");
            }
        }
        self.replicas.get_mut(&id).unwrap().phase = Phase::Stopping;
        self.environments.retain(|environment, _| environment.replica != id);
        if matches!(why, Why::Idle | Why::Empty) {
            assert!(self.kept() >= self.min(), "never below the minimum");
        }
    }

    fn obey_grant(&mut self, call: CallId, id: EnvironmentId) {
        assert_eq!(self.queue.pop_front(), Some(call), "first come, first served");
        let best = self.with_room().last().copied().expect("it has room");
        assert_eq!(best.2, id, "those in use first, then the one used last");
        self.environments.get_mut(&id).unwrap().used = self.now;
        let known = self.calls.get_mut(&call).unwrap();
        assert_eq!(known.place, Place::Waiting, "every call is answered once");
        known.place = Place::Running(id);
    }

    fn obey_refuse(&mut self, call: CallId, try_again: TryAgain) {
        assert!(try_again.retry_after >= Duration::from_secs(1));
        let known = self.calls.get_mut(&call).unwrap();
        assert_eq!(known.place, Place::Waiting, "every call is answered once");
        known.place = Place::Done;
        let deadline = known.since + self.settings.queue_timeout;
        let arrived = known.since == self.now && self.queue.back() == Some(&call);
        let late = deadline <= self.now;
        let over = self.drain.is_some_and(|until| until <= self.now);
        match try_again.reason {
            Reason::QueueFull => {
                assert!(arrived && self.queue.len() > self.settings.queue_length as usize);
                self.queue.pop_back();
                return;
            }
            Reason::ShuttingDown => {
                assert!(self.drain.is_some() && (arrived || late || over), "who waits is served still");
                if arrived && !over && !late {
                    self.queue.pop_back();
                    return;
                }
            }
            Reason::CrashLoop => {
                let until = self.hold.filter(|until| *until > self.now).expect("the back-off holds");
                assert!(deadline <= until, "it could have been served in time");
            }
            Reason::Busy | Reason::Starting | Reason::NoCapacity => assert!(late, "not before its time"),
        }
        assert_eq!(self.queue.pop_front(), Some(call), "who came first is refused first");
    }

    // === What always holds ===

    fn check_state(&self) {
        let summary = self.pool.summary(self.now);
        let running = self.calls.values().filter(|call| matches!(call.place, Place::Running(_))).count();
        assert_eq!((summary.queued, summary.running), (self.queue.len(), running));
        assert_eq!(summary.replicas, self.replicas.len());
        for id in self.environments.keys() {
            assert!(
                self.calls_in(*id) <= self.settings.calls as usize || self.was_lowered(),
                "{id} has too many calls"
            );
        }
        assert!(self.queue.is_empty() || self.with_room().is_empty(), "a call waits beside an idle environment");
        if self.coming() < self.wanted() {
            let frozen = |(id, e): (&EnvironmentId, &Environment)| e.state == State::Frozen && self.is_kept(id.replica);
            assert!(!self.environments.iter().any(frozen), "a call waits beside a frozen environment");
        }
        assert!(!self.lacks() || self.cannot_start(true), "something is lacking and nothing is started");
        if self.kept() < self.min() {
            assert!(self.cannot_start(false), "below the minimum, and nothing is started");
        }
        if self.drain.is_some() && self.queue.is_empty() {
            for id in self.replicas.keys().filter(|id| self.replicas[id].phase != Phase::Stopping) {
                let busy = self.calls_in_replica(*id) > 0 || self.within(*id).any(|(_, e)| e.state == State::Unknown);
                assert!(busy, "a drained replica stays");
            }
        }
    }

    /// Whether calls at once were lowered while some ran; then there may be too many for a while.
    fn was_lowered(&self) -> bool {
        self.environments.keys().any(|id| self.calls_in(*id) > self.settings.calls as usize)
    }

    fn cannot_start(&self, in_replicas: bool) -> bool {
        let environments = self.settings.environments as usize;
        let used = |id: ReplicaId| self.pool.replicas.get(&id).map_or(0, |replica| replica.environments.len());
        let room = in_replicas && self.replicas.keys().any(|id| self.is_kept(*id) && used(*id) < environments);
        self.held() || (!room && (self.is_denied() || self.replicas.len() >= self.settings.max as usize))
    }

    /// What time alone must not break, between events: whoever goes by `next_deadline` misses nothing.
    fn check_time(&self) {
        if let Some(call) = self.queue.front() {
            assert!(self.calls[call].since + self.settings.queue_timeout > self.now, "a call waits too long");
        }
        let waiting = self.visits.values().filter(|(_, place)| place.is_none());
        for (since, _) in waiting {
            assert!(*since + self.settings.queue_timeout > self.now, "a visitor waits too long");
        }
        if self.kept() > self.min()
            && let Some((since, _)) = self.idle().first()
        {
            assert!(*since + self.settings.idle_timeout > self.now, "a replica is idle too long");
        }
        if let (Some(after), None) = (self.settings.freeze_after, self.drain) {
            for (id, e) in
                self.environments.iter().filter(|(id, e)| e.state == State::Ready && self.is_kept(id.replica))
            {
                let visited = self.visits.values().any(|(_, place)| *place == Some(*id));
                let idle = self.calls_in(*id) == 0 && !visited;
                assert!(!idle || e.used + after > self.now, "{id} should be frozen");
            }
        }
        if self.drain.is_some_and(|until| until <= self.now) {
            assert!(self.queue.is_empty() && self.calls.values().all(|call| call.place == Place::Done));
            assert!(self.replicas.values().all(|replica| replica.phase == Phase::Stopping), "the grace period is over");
        }
        let starts = self.lacks() && !self.cannot_start(true);
        assert!(!starts && (self.kept() >= self.min() || self.cannot_start(false)), "a start is due");
    }

    // === Moves ===

    fn advance(&mut self, millis: u64) {
        let target = self.now + Duration::from_millis(millis);
        let mut ticks = 0;
        while let Some(at) = self.pool.next_deadline().filter(|at| *at <= target) {
            assert!(at > self.now, "a deadline lies ahead");
            self.now = at;
            self.tell(Event::Tick);
            ticks += 1;
            assert!(ticks < 1000, "the pool keeps waking itself");
        }
        self.now = target;
        self.check_time();
    }

    fn open_calls(&self, waiting_too: bool) -> Vec<CallId> {
        let open = |call: &Call| match call.place {
            Place::Waiting => waiting_too,
            Place::Running(_) => true,
            Place::Done => false,
        };
        self.calls.iter().filter(|(_, call)| open(call)).map(|(id, _)| *id).collect()
    }

    fn replicas_in(&self, phases: &[Phase]) -> Vec<ReplicaId> {
        self.replicas.iter().filter(|(_, r)| phases.contains(&r.phase)).map(|(id, _)| *id).collect()
    }

    fn environments_in(&self, states: &[State]) -> Vec<EnvironmentId> {
        self.environments.iter().filter(|(_, e)| states.contains(&e.state)).map(|(id, _)| *id).collect()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn event(&mut self, next: Move) -> Option<Event> {
        use Phase as P;
        use State as S;
        let alive = [S::Starting, S::Ready, S::Frozen, S::Thawing, S::Unknown];
        let replica = |at: Index, of: Vec<ReplicaId>| (!of.is_empty()).then(|| *at.get(&of));
        let environment = |at: Index, of: Vec<EnvironmentId>| (!of.is_empty()).then(|| *at.get(&of));
        let call = |at: Index, of: Vec<CallId>| (!of.is_empty()).then(|| *at.get(&of));
        Some(match next {
            Move::Wait(millis) => {
                self.advance(millis);
                return None;
            }
            Move::Call => Event::CallArrived { call: CallId(self.number()) },
            Move::End { at, reuse } => Event::CallEnded { call: call(at, self.open_calls(false))?, reuse },
            Move::ClientGoes(at) => Event::ClientGone { call: call(at, self.open_calls(true))? },
            Move::Visit => Event::VisitArrived { visit: VisitId(self.number()) },
            Move::VisitEnds(at) => {
                let visits: Vec<_> = self.visits.keys().copied().collect();
                Event::VisitEnded { visit: *(!visits.is_empty()).then(|| at.get(&visits))? }
            }
            Move::Starts(at) => Event::ReplicaStarted { replica: replica(at, self.replicas_in(&[P::Starting]))? },
            Move::Denied(at) => Event::ReplicaDenied { replica: replica(at, self.replicas_in(&[P::Starting]))? },
            Move::ReplicaFails(at) => {
                Event::ReplicaFailed { replica: replica(at, self.replicas_in(&[P::Starting, P::Ready]))?, exit: exit() }
            }
            Move::ReplicaStops(at) => Event::ReplicaStopped { replica: replica(at, self.replicas_in(&[P::Stopping]))? },
            Move::Ready(at) => {
                let waiting = self.environments_in(&[S::Starting, S::Thawing, S::Unknown]);
                Event::EnvironmentReady { environment: environment(at, waiting)? }
            }
            Move::Dies(at) => {
                let environment = environment(at, self.environments_in(&alive))?;
                Event::EnvironmentDied { environment, exit: exit() }
            }
            Move::EnvironmentStops(at) => Event::EnvironmentStopped {
                environment: environment(at, self.environments_in(&[S::Stopping, S::Dead]))?,
            },
            Move::CapacityFreed => Event::CapacityFreed,
            Move::GiveBack(at) => Event::GiveBack { replica: replica(at, self.replicas_in(&[P::Starting, P::Ready]))? },
            Move::Change(settings) => Event::SettingsChanged(settings),
            Move::Drain(millis) => Event::Drain { until: self.now + Duration::from_millis(millis) },
            Move::Late(kind, id, ordinal) => self.late(kind, id, ordinal)?,
        })
    }

    /// News of something that does not exist: it must change nothing.
    fn late(&self, kind: u8, id: u64, ordinal: u32) -> Option<Event> {
        let (replica, call) = (ReplicaId(id), CallId(id));
        let environment = EnvironmentId { replica, ordinal };
        if kind < 4 {
            let unknown = !self.replicas.contains_key(&replica);
            return unknown.then_some(match kind {
                0 => Event::ReplicaStarted { replica },
                1 => Event::GiveBack { replica },
                2 => Event::EnvironmentReady { environment },
                _ => Event::EnvironmentDied { environment, exit: exit() },
            });
        }
        let done = self.calls.get(&call).is_none_or(|call| call.place == Place::Done);
        done.then_some(if kind == 4 { Event::CallEnded { call, reuse: false } } else { Event::ClientGone { call } })
    }

    fn play(&mut self, next: Move) {
        if let Some(event) = self.event(next) {
            self.tell(event);
        }
    }

    /// Ends the pool in good order and holds the last account.
    fn end(mut self) {
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

prop_compose! {
    fn settings()(
        min in 0_u32..4,
        more in 0_u32..4,
        environments in 1_u32..4,
        calls in prop_oneof![3 => Just(1_u32), 1 => 2_u32..4],
        idle in prop_oneof![1_000_u64..5_000, 30_000_u64..400_000],
        freeze in prop::option::of(10_u64..3_000),
        queue_length in 1_u32..8,
        queue in prop_oneof![100_u64..3_000, 10_000_u64..60_000],
        warm_up in any::<bool>(),
    ) -> Settings {
        Settings {
            min,
            max: (min + more).max(1),
            environments,
            calls,
            idle_timeout: Duration::from_millis(idle),
            freeze_after: freeze.map(Duration::from_millis),
            queue_length,
            queue_timeout: Duration::from_millis(queue),
            warm_up,
            ..Settings::of(Protocol::Rie)
        }
    }
}

fn moves() -> impl Strategy<Value = Move> {
    let at = any::<Index>;
    prop_oneof![
        6 => prop_oneof![0_u64..20, 0_u64..2_000, 0_u64..400_000].prop_map(Move::Wait),
        16 => Just(Move::Call),
        12 => (at(), prop::bool::weighted(0.9)).prop_map(|(at, reuse)| Move::End { at, reuse }),
        2 => at().prop_map(Move::ClientGoes),
        1 => Just(Move::Visit),
        1 => at().prop_map(Move::VisitEnds),
        8 => at().prop_map(Move::Starts),
        1 => at().prop_map(Move::Denied),
        1 => at().prop_map(Move::ReplicaFails),
        4 => at().prop_map(Move::ReplicaStops),
        12 => at().prop_map(Move::Ready),
        2 => at().prop_map(Move::Dies),
        3 => at().prop_map(Move::EnvironmentStops),
        1 => Just(Move::CapacityFreed),
        1 => at().prop_map(Move::GiveBack),
        1 => settings().prop_map(Move::Change),
        1 => (0_u8..6, 0_u64..12, 0_u32..4).prop_map(|(kind, id, ordinal)| Move::Late(kind, id, ordinal)),
    ]
}

fn found() -> impl Strategy<Value = Vec<(u64, Vec<Found>)>> {
    let found = prop_oneof![Just(Found::Idle), Just(Found::Frozen), Just(Found::Unknown)];
    prop::collection::vec((0_u64..6, prop::collection::vec(found, 0..3)), 0..3)
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
