//! The pool of one function as a value: events go in, actions come out, and nothing here waits, locks or reads a clock.
//!
//! ```text
//! front --CallArrived--> [ waiting: one bounded FIFO ] --Grant--> environment --CallEnded--> idle | replaced
//!                           | deadline, full, drain                   | died
//!                           '--> Refuse(TryAgain)                     '--> FailCall(exit)
//! ```
//! The owner of a pool carries the actions out and tells what became of them; it calls [`Pool::handle`] with
//! [`Event::Tick`] at [`Pool::next_deadline`]. After every event the whole state is looked at anew, in this order:
//!
//! 1. what has waited too long is refused, and a drain whose time is up ends (`end`);
//! 2. replicas beyond the maximum drain (`shrink`);
//! 3. waiting calls are handed out (`grant`);
//! 4. what calls and the minimum still lack is thawed or started (`grow`);
//! 5. replicas that are idle too long, empty or drained stop (`shrink`);
//! 6. idle environments are frozen (`shrink`);
//! 7. what would be started next is told, for whoever can have it ready (`reserve`).
//!
//! The rules:
//!
//! * Calls are granted in the order of their arrival. Each gets an answer once: a grant or a refusal; and after a grant
//!   perhaps a failure.
//! * An environment is chosen among those of replicas that serve a call already, so that the others can become idle;
//!   among equals the one used last. (With one environment per replica that is: the one used last.)
//! * A waiting call starts something unless as many environments are starting as calls wait: first a frozen one thaws,
//!   then a replica gets one more environment, the fullest first, then a replica starts, up to the maximum, which
//!   counts replicas that are starting and stopping.
//! * A replica that was idle for the idle timeout is removed, the longest idle first, never below the minimum, never
//!   one that holds a call or a visitor.
//! * After a crash starts wait (the kubelet's back-off); calls that could not be served in time are refused at once.
//! * An environment that broke off a call is stopped at once; should it turn out to have ended by itself, that is a
//!   crash, of the moment at which it broke.

mod backoff;
mod end;
mod grant;
mod grow;
mod messages;
mod plain;
mod replica;
mod reserve;
mod shrink;
mod summary;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::backoff::Backoff;
pub use self::messages::{
    Action, CallId, EnvironmentId, Event, Exit, Found, Reason, ReplicaId, Reserve, TryAgain, VisitId, Why,
};
use self::replica::{Environment, Phase, Replica, State};
pub use self::summary::{Crash, Summary};
use super::settings::Settings;

/// How long a pool waits before it asks again for capacity that it was denied, should nobody tell it of any.
const CAPACITY_RETRY: Duration = Duration::from_secs(5);
/// When a call that met a full queue, a busy pool or a drain is worth another try.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// The pool of one function. Begins empty: [`Pool::adopt`] what was found running, then let it [`Event::Tick`] once.
#[derive(Clone, Debug)]
pub struct Pool {
    settings: Settings,
    replicas: BTreeMap<ReplicaId, Replica>,
    /// In the order of arrival, each with its moment.
    waiting: VecDeque<(CallId, Instant)>,
    /// Granted and not ended.
    running: HashMap<CallId, Running>,
    visits: BTreeMap<VisitId, Visit>,
    next_replica: u64,
    backoff: Backoff,
    /// The last crash, until something serves again.
    crash: Option<Exit>,
    /// Environments that crashed, ever.
    crashes: u64,
    /// No capacity is asked for until then.
    denied: Option<Instant>,
    /// Environments lost under a call (died, or not fit for another) and not replaced yet: where there was work there
    /// will be more. Forgotten while starts wait.
    owed: usize,
    /// The pool drains, and is to be empty by then.
    drain: Option<Instant>,
    /// What would be started next.
    reserve: Arc<Reserve>,
    /// Everything has been looked at since the pool was made, and time alone changes nothing before `due`.
    settled: bool,
    due: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    environment: EnvironmentId,
    client_gone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Visit {
    since: Instant,
    environment: Option<EnvironmentId>,
}

impl Pool {
    /// An empty pool.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            replicas: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: HashMap::new(),
            visits: BTreeMap::new(),
            next_replica: 0,
            backoff: Backoff::default(),
            crash: None,
            crashes: 0,
            denied: None,
            owed: 0,
            drain: None,
            reserve: Arc::default(),
            settled: false,
            due: None,
        }
    }

    /// What it goes by now.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes in a replica that was found running after a restart of the node agent: its environments by their numbers,
    /// and how each was found. To be called for all of them before the first event; nothing is done until then.
    pub fn adopt(&mut self, id: ReplicaId, environments: &[(u32, Found)], now: Instant) {
        self.next_replica = self.next_replica.max(id.0.saturating_add(1));
        if self.replicas.contains_key(&id) {
            return;
        }
        let mut replica = Replica::new(Phase::Ready, now);
        for (ordinal, found) in environments {
            let state = match found {
                Found::Idle => State::Ready,
                Found::Frozen => State::Frozen,
                Found::Unknown => State::Unknown,
            };
            replica.insert(*ordinal, state, now);
        }
        self.replicas.insert(id, replica);
    }

    /// Takes an event in and says what is to be done. `now` never goes back.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.handle_plain(&event, now, &mut actions) {
            self.take_in(event, now, &mut actions);
            self.decide(now, &mut actions);
        }
        actions
    }

    /// Looks at everything anew.
    fn decide(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.expire(now, actions);
        self.shrink_to_maximum(actions);
        self.hand_out(now, actions);
        self.let_visitors_in(actions);
        self.grow(now, actions);
        self.refuse_the_hopeless(now, actions);
        self.retire(now, actions);
        // One that went may have left the minimum, with another that is as empty.
        self.fill_the_least(now, actions);
        self.freeze(now, actions);
        self.plan_reserve(now);
        self.due = self.deadline(now);
        self.settled = true;
    }

    fn take_in(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::CallArrived { call } => self.call_arrived(call, now, actions),
            Event::CallEnded { call, reuse } => self.call_ended(call, reuse, now, actions),
            Event::CallLost { call } => self.call_lost(call, now, actions),
            Event::ClientGone { call } => self.client_gone(call),
            Event::VisitArrived { visit } => {
                self.visits.insert(visit, Visit { since: now, environment: None });
            }
            Event::VisitEnded { visit } => {
                self.visits.remove(&visit);
            }
            Event::ReplicaStarted { replica } => self.replica_started(replica, now, actions),
            Event::ReplicaDenied { replica } => self.replica_denied(replica, now),
            Event::ReplicaFailed { replica, exit } => self.replica_failed(replica, exit, now, actions),
            Event::ReplicaStopped { replica } => self.replica_stopped(replica),
            Event::EnvironmentReady { environment } => self.environment_ready(environment, now),
            Event::EnvironmentProbed { environment, ready } => {
                if let Some(environment) = self.environment_mut(environment) {
                    environment.unready = !ready;
                }
            }
            Event::EnvironmentDied { environment, exit } => {
                self.environment_died(environment, exit, now, actions);
            }
            Event::EnvironmentStopped { environment } => self.environment_stopped(environment),
            Event::CapacityFreed => self.denied = None,
            Event::GiveBack { replica } => self.drain_replica(replica, Why::GivenBack),
            Event::SettingsChanged(settings) => self.settings = settings,
            Event::Outdated => self.begin_anew(),
            Event::Drain { until } => self.drain = Some(self.drain.map_or(until, |before| before.min(until))),
            Event::Tick => {}
        }
    }

    fn replica_started(&mut self, id: ReplicaId, now: Instant, actions: &mut Vec<Action>) {
        let warm_up = self.warms_up();
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.phase == Phase::Starting) else {
            return;
        };
        replica.phase = Phase::Ready;
        for (ordinal, environment) in replica.environments.iter_mut().filter(|(_, e)| e.state == State::Cold) {
            environment.state = State::Starting;
            environment.started = now;
            let environment = EnvironmentId { replica: id, ordinal: *ordinal };
            actions.push(Action::StartEnvironment { environment, warm_up });
        }
    }

    fn replica_denied(&mut self, id: ReplicaId, now: Instant) {
        let Some(replica) = self.replicas.get(&id) else { return };
        match replica.phase {
            Phase::Starting => {
                self.replicas.remove(&id);
                self.denied = Some(now + CAPACITY_RETRY);
                self.owed = 0;
            }
            // It was to be stopped while it asked: there is nothing to stop.
            Phase::Stopping => self.replica_stopped(id),
            Phase::Ready | Phase::Draining(_) => {}
        }
    }

    fn replica_stopped(&mut self, id: ReplicaId) {
        if self.replicas.get(&id).is_some_and(|replica| replica.phase == Phase::Stopping) {
            self.replicas.remove(&id);
            // Its capacity is free again, if nobody else was quicker.
            self.denied = None;
        }
    }

    fn replica_failed(&mut self, id: ReplicaId, exit: Exit, now: Instant, actions: &mut Vec<Action>) {
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.phase != Phase::Stopping) else {
            return;
        };
        if replica.is_kept() {
            self.owed += replica.environments.values().filter(|e| !e.calls.is_empty()).count();
        }
        let tried = replica.environments.values().filter(|e| e.state != State::Cold).map(|e| e.started);
        let started = tried.fold(replica.started, Instant::max);
        let environments = std::mem::take(&mut replica.environments);
        environments.values().for_each(|e| self.fail_calls(&e.calls, &exit, actions));
        self.stop(id, Why::Failed, actions);
        self.note_crash(started, exit, now);
    }

    fn environment_ready(&mut self, id: EnvironmentId, now: Instant) {
        if let Some(environment) = self.environment_mut(id)
            && matches!(environment.state, State::Starting | State::Thawing | State::Unknown)
        {
            environment.state = State::Ready;
            environment.used = now;
            environment.ready.get_or_insert(now);
        }
    }

    fn environment_died(&mut self, id: EnvironmentId, exit: Exit, now: Instant, actions: &mut Vec<Action>) {
        let Some(replica) = self.replicas.get_mut(&id.replica) else { return };
        let Some(environment) = replica.environments.get_mut(&id.ordinal) else { return };
        if environment.state == State::Stopping {
            // It stays until it is stopped. It ended because of that, unless it broke off a call before.
            let started = environment.started;
            if let Some(broke) = environment.broke.take() {
                self.note_crash(started, exit, broke);
            }
            return;
        }
        let Some(environment) = replica.environments.remove(&id.ordinal) else { return };
        self.owed += usize::from(replica.is_kept() && !environment.calls.is_empty());
        self.fail_calls(&environment.calls, &exit, actions);
        actions.push(Action::StopEnvironment { environment: id });
        if environment.state != State::Unknown {
            self.note_crash(environment.started, exit, environment.broke.unwrap_or(now));
        }
    }

    fn environment_stopped(&mut self, id: EnvironmentId) {
        if let Some(replica) = self.replicas.get_mut(&id.replica)
            && replica.environments.get(&id.ordinal).is_some_and(|e| e.state == State::Stopping)
        {
            replica.environments.remove(&id.ordinal);
        }
    }

    /// Something that was started then crashed at a moment that may lie a little back: what has replaced it since is no
    /// part of this crash.
    fn note_crash(&mut self, started: Instant, exit: Exit, at: Instant) {
        self.crashes = self.crashes.saturating_add(1);
        self.crash = Some(exit);
        self.backoff.crashed(started, at);
    }

    /// Every replica drains; [`Pool::grow`] makes others as there is room for them.
    fn begin_anew(&mut self) {
        let there: Vec<_> = self.replicas.keys().copied().collect();
        there.into_iter().for_each(|id| self.drain_replica(id, Why::Outdated));
        (self.backoff, self.crash) = (Backoff::default(), None);
    }

    fn environment_mut(&mut self, id: EnvironmentId) -> Option<&mut Environment> {
        self.replicas.get_mut(&id.replica)?.environments.get_mut(&id.ordinal)
    }

    /// Whether an environment broke off a call, and how it ended is not known.
    pub fn broke(&self, id: EnvironmentId) -> bool {
        let environment = self.replicas.get(&id.replica).and_then(|replica| replica.environments.get(&id.ordinal));
        environment.is_some_and(|environment| environment.broke.is_some())
    }

    /// Where a visitor is.
    pub fn visited(&self, visit: VisitId) -> Option<EnvironmentId> {
        self.visits.get(&visit)?.environment
    }

    /// Replicas that start or are ready.
    fn kept(&self) -> usize {
        self.replicas.values().filter(|replica| replica.is_kept()).count()
    }

    /// Replicas that stay without calls.
    fn minimum(&self) -> usize {
        if self.drain.is_some() { 0 } else { self.settings.min as usize }
    }
}

#[cfg(test)]
mod tests;
