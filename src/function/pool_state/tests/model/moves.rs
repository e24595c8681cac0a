//! What happens next, by chance.

use proptest::sample::Index;

use super::super::exit;
use super::*;
use crate::function::protocol::Protocol;

/// What happens next. Indices choose among what there is at that moment; where there is nothing, nothing happens.
#[derive(Clone, Debug)]
pub(super) enum Move {
    Wait(u64),
    Call,
    End {
        at: Index,
        reuse: bool,
    },
    Breaks(Index),
    ClientGoes(Index),
    Visit,
    VisitEnds(Index),
    Starts(Index),
    Denied(Index),
    ReplicaFails(Index),
    ReplicaStops(Index),
    Ready(Index),
    Probed(Index, bool),
    Dies(Index),
    EnvironmentStops(Index),
    CapacityFreed,
    GiveBack(Index),
    Change(Settings),
    Outdated,
    Drain(u64),
    /// News of what never was, or is long gone.
    Late(u8, u64, u32),
}

impl World {
    pub(super) fn advance(&mut self, millis: u64) {
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

    pub(super) fn open_calls(&self, waiting_too: bool) -> Vec<CallId> {
        let open = |call: &Call| match call.place {
            Place::Waiting => waiting_too,
            Place::Running(_) => true,
            Place::Done => false,
        };
        self.calls.iter().filter(|(_, call)| open(call)).map(|(id, _)| *id).collect()
    }

    pub(super) fn replicas_in(&self, phases: &[Phase]) -> Vec<ReplicaId> {
        self.replicas.iter().filter(|(_, r)| phases.contains(&r.phase)).map(|(id, _)| *id).collect()
    }

    pub(super) fn environments_in(&self, states: &[State]) -> Vec<EnvironmentId> {
        self.environments.iter().filter(|(_, e)| states.contains(&e.state)).map(|(id, _)| *id).collect()
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn event(&mut self, next: Move) -> Option<Event> {
        use Phase as P;
        use State as S;
        // Also one that is being stopped may be heard to have ended.
        let mortal = [S::Starting, S::Ready, S::Frozen, S::Thawing, S::Unknown, S::Stopping];
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
            Move::Breaks(at) => Event::CallLost { call: call(at, self.open_calls(false))? },
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
            Move::Probed(at, ready) => {
                let environment = environment(at, self.environments_in(&[S::Ready, S::Frozen, S::Thawing]))?;
                Event::EnvironmentProbed { environment, ready }
            }
            Move::Dies(at) => {
                let environment = environment(at, self.environments_in(&mortal))?;
                Event::EnvironmentDied { environment, exit: exit() }
            }
            Move::EnvironmentStops(at) => Event::EnvironmentStopped {
                environment: environment(at, self.environments_in(&[S::Stopping, S::Dead]))?,
            },
            Move::CapacityFreed => Event::CapacityFreed,
            Move::GiveBack(at) => Event::GiveBack { replica: replica(at, self.replicas_in(&[P::Starting, P::Ready]))? },
            Move::Change(settings) => Event::SettingsChanged(settings),
            Move::Outdated => Event::Outdated,
            Move::Drain(millis) => Event::Drain { until: self.now + Duration::from_millis(millis) },
            Move::Late(kind, id, ordinal) => self.late(kind, id, ordinal)?,
        })
    }

    /// News of something that does not exist: it must change nothing.
    pub(super) fn late(&self, kind: u8, id: u64, ordinal: u32) -> Option<Event> {
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

    pub(super) fn play(&mut self, next: Move) {
        if let Some(event) = self.event(next) {
            self.tell(event);
        }
    }
}

prop_compose! {
    pub(super) fn settings()(
        min in 0_u32..4,
        more in 0_u32..4,
        environments in 1_u32..4,
        calls in prop_oneof![3 => Just(1_u32), 1 => 2_u32..4],
        idle in prop_oneof![1_000_u64..5_000, 30_000_u64..400_000],
        freeze in prop::option::of(10_u64..3_000),
        queue_length in 1_u32..8,
        queue in prop_oneof![100_u64..3_000, 10_000_u64..60_000],
        warm_up in any::<bool>(),
        reserve in 0_u32..4,
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
            reserve,
            ..Settings::of(Protocol::Rie)
        }
    }
}

pub(super) fn moves() -> impl Strategy<Value = Move> {
    let at = any::<Index>;
    prop_oneof![
        6 => prop_oneof![0_u64..20, 0_u64..2_000, 0_u64..400_000].prop_map(Move::Wait),
        16 => Just(Move::Call),
        12 => (at(), prop::bool::weighted(0.9)).prop_map(|(at, reuse)| Move::End { at, reuse }),
        2 => at().prop_map(Move::Breaks),
        2 => at().prop_map(Move::ClientGoes),
        1 => Just(Move::Visit),
        1 => at().prop_map(Move::VisitEnds),
        8 => at().prop_map(Move::Starts),
        1 => at().prop_map(Move::Denied),
        1 => at().prop_map(Move::ReplicaFails),
        4 => at().prop_map(Move::ReplicaStops),
        12 => at().prop_map(Move::Ready),
        3 => at().prop_map(Move::Dies),
        4 => (any::<Index>(), any::<bool>()).prop_map(|(at, ready)| Move::Probed(at, ready)),
        3 => at().prop_map(Move::EnvironmentStops),
        1 => Just(Move::CapacityFreed),
        1 => at().prop_map(Move::GiveBack),
        1 => settings().prop_map(Move::Change),
        1 => Just(Move::Outdated),
        1 => (0_u8..6, 0_u64..12, 0_u32..4).prop_map(|(kind, id, ordinal)| Move::Late(kind, id, ordinal)),
    ]
}

pub(super) fn found() -> impl Strategy<Value = Vec<(u64, Vec<Found>)>> {
    let found = prop_oneof![Just(Found::Idle), Just(Found::Frozen), Just(Found::Unknown)];
    prop::collection::vec((0_u64..6, prop::collection::vec(found, 0..3)), 0..3)
}
