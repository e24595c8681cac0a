//! Which probe of a container is due, and what a row of results means: pure.
//!
//! Times are counted from the container's start.

use std::time::Duration;

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Whether the container has come up; the others wait for it.
    Startup,
    /// Whether it is alive; killed if not.
    Liveness,
    /// Whether it can take calls.
    Readiness,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Startup, Self::Liveness, Self::Readiness];

    /// As events and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// What one try said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Yes.
    Success,
    /// No.
    Failure,
    /// The question could not be asked; nothing follows from that.
    Unknown,
}

/// When a probe is tried, and how many equal results in a row count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Not before that (`initialDelaySeconds`, 0).
    pub delay: Duration,
    /// Time between two tries (`periodSeconds`, 10 s).
    pub period: Duration,
    /// How long one may take (`timeoutSeconds`, 1 s).
    pub timeout: Duration,
    /// `successThreshold`, 1.
    pub successes: u32,
    /// `failureThreshold`, 3.
    pub failures: u32,
    /// Whether a try costs a process in the container.
    pub costly: bool,
}

/// What probes have said so far. The default is that of a container without any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Results {
    /// It has come up.
    pub started: bool,
    /// It can take calls, once it has come up.
    pub ready: bool,
    /// It is to be killed, for this probe.
    pub failed: Option<Kind>,
}

impl Default for Results {
    fn default() -> Self {
        Self { started: true, ready: true, failed: None }
    }
}

/// Whether a result is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// It counts.
    Counts,
    /// It came in the first moments of a container, where failures do not count.
    TooEarly,
}

/// The tries of a container's first second, in milliseconds from the moment at which its probe may begin.
const EARLY: [u64; 5] = [0, 50, 150, 350, 700];
/// The same where each try is a process.
const EARLY_COSTLY: [u64; 2] = [0, 400];
/// From then on each result counts.
const SETTLED: Duration = Duration::from_secs(1);

/// One probe.
#[derive(Clone, Debug)]
struct Probe {
    pace: Pace,
    /// When it is tried next.
    next: Duration,
    /// When it might begin, and how many early tries there were; `None` once results count.
    early: Option<(Duration, usize)>,
    last: Option<Outcome>,
    /// How many in a row were like the last.
    row: u32,
    under_way: bool,
    over: bool,
}

impl Probe {
    fn new(pace: Pace) -> Self {
        Self { pace, next: pace.delay, early: None, last: None, row: 0, under_way: false, over: false }
    }

    /// Begins at that moment, with quick tries.
    fn begin_eagerly(&mut self, first: Duration) {
        self.next = first;
        self.early = Some((first, 0));
    }

    fn early_tries(&self) -> &'static [u64] {
        if self.pace.costly { &EARLY_COSTLY } else { &EARLY }
    }

    /// Sets the time of the next try.
    fn go_on(&mut self, outcome: Outcome, now: Duration) -> Note {
        match self.early {
            Some(_) if outcome == Outcome::Success => {
                self.early = None;
                self.next = now + self.pace.period;
            }
            Some((first, tries)) => {
                let at = |ms: &u64| first + Duration::from_millis(*ms);
                // Of the tries whose time a slow one let pass, one is made up for.
                let passed = self.early_tries().iter().skip(tries + 1).filter(|ms| at(ms) <= now).count();
                let place = tries + passed.max(1);
                let early = self.early_tries().get(place).filter(|_| now < first + SETTLED);
                self.next = early.map_or(first + SETTLED, at).max(now);
                self.early = early.map(|_| (first, place));
                return Note::TooEarly;
            }
            None => {
                self.next += self.pace.period;
                let behind = now.saturating_sub(self.next).as_nanos() / self.pace.period.as_nanos().max(1);
                // Of the turns that a slow try made it miss, one is made up for.
                self.next += self.pace.period.saturating_mul(u32::try_from(behind).unwrap_or(u32::MAX));
            }
        }
        Note::Counts
    }

    /// The result that holds from now on, if this one makes a row long enough.
    fn weigh(&mut self, outcome: Outcome) -> Option<Outcome> {
        self.row = if self.last == Some(outcome) { self.row.saturating_add(1) } else { 1 };
        self.last = Some(outcome);
        let enough = if outcome == Outcome::Success { self.pace.successes } else { self.pace.failures };
        (self.row >= enough).then_some(outcome)
    }
}

/// What an earlier process of this node had found out.
#[derive(Clone, Copy, Debug)]
pub struct Resumed {
    /// How long the container has run.
    pub ran: Duration,
    /// Its `started`.
    pub started: bool,
    /// Its `ready`.
    pub ready: bool,
    /// A part of each period, 0 to 1, that is waited first: not everything is probed at once after a restart.
    pub spread: f64,
}

/// All probes of one container.
#[derive(Clone, Debug)]
pub struct Machine {
    startup: Option<Probe>,
    liveness: Option<Probe>,
    readiness: Option<Probe>,
    results: Results,
}

impl Machine {
    /// Of a container that starts now; startup, liveness, readiness.
    pub fn new([startup, liveness, readiness]: [Option<Pace>; 3]) -> Self {
        let results = Results { started: startup.is_none(), ready: readiness.is_none(), failed: None };
        let [startup, liveness, readiness] = [startup, liveness, readiness].map(|pace| pace.map(Probe::new));
        let mut machine = Self { startup, liveness, readiness, results };
        match &mut machine.startup {
            Some(startup) => startup.begin_eagerly(startup.pace.delay),
            None => machine.open(Duration::ZERO),
        }
        machine
    }

    /// Of a container that an earlier process has probed.
    pub fn resumed(paces: [Option<Pace>; 3], before: Resumed) -> Self {
        let mut machine = Self::new(paces);
        machine.results.started |= before.started;
        machine.results.ready |= before.ready;
        if machine.results.started
            && let Some(startup) = &mut machine.startup
        {
            startup.over = true;
        }
        let probes = [&mut machine.startup, &mut machine.liveness, &mut machine.readiness];
        for probe in probes.into_iter().flatten() {
            probe.early = None;
            let spread = probe.pace.period.mul_f64(before.spread.clamp(0.0, 1.0));
            probe.next = (before.ran + spread).max(probe.pace.delay);
        }
        machine
    }

    /// What is known.
    pub fn results(&self) -> Results {
        self.results
    }

    /// The probe to try next, and when. `None` while none is waiting for its turn.
    pub fn due(&self) -> Option<(Duration, Kind)> {
        let waits = |kind: &Kind| {
            let probe = self.probe(*kind)?;
            let open = *kind == Kind::Startup || self.results.started;
            (open && !probe.over && !probe.under_way).then_some((probe.next, *kind))
        };
        Kind::ALL.iter().filter_map(waits).min()
    }

    /// Whether nothing will be due any more.
    pub fn is_over(&self) -> bool {
        let idle = |kind: &Kind| {
            self.probe(*kind).is_none_or(|probe| probe.over || (*kind != Kind::Startup && !self.results.started))
        };
        Kind::ALL.iter().all(idle)
    }

    /// A try begins.
    pub fn begin(&mut self, kind: Kind) {
        if let Some(probe) = self.probe_mut(kind) {
            probe.under_way = true;
        }
    }

    /// A try has ended.
    pub fn end(&mut self, kind: Kind, outcome: Outcome, now: Duration) -> Note {
        let Some(probe) = self.probe_mut(kind) else { return Note::TooEarly };
        probe.under_way = false;
        if probe.over {
            return Note::TooEarly;
        }
        let note = probe.go_on(outcome, now);
        if note == Note::TooEarly || outcome == Outcome::Unknown {
            return note;
        }
        if let Some(holds) = probe.weigh(outcome) {
            self.conclude(kind, holds, now);
        }
        note
    }

    /// The Pod ends: only readiness still matters.
    pub fn quiet(&mut self) {
        for probe in [&mut self.startup, &mut self.liveness].into_iter().flatten() {
            probe.over = true;
        }
        self.results.failed = None;
    }

    fn conclude(&mut self, kind: Kind, holds: Outcome, now: Duration) {
        let success = holds == Outcome::Success;
        match kind {
            Kind::Readiness => self.results.ready = success,
            Kind::Liveness if success => {}
            Kind::Startup if success => {
                self.results.started = true;
                self.finish(kind);
                self.open(now);
            }
            Kind::Startup | Kind::Liveness => {
                self.results.failed = Some(kind);
                self.finish(kind);
            }
        }
    }

    fn finish(&mut self, kind: Kind) {
        if let Some(probe) = self.probe_mut(kind) {
            probe.over = true;
        }
    }

    /// The container has come up: the other probes may begin.
    fn open(&mut self, now: Duration) {
        if let Some(readiness) = &mut self.readiness {
            readiness.begin_eagerly(readiness.pace.delay.max(now));
        }
        if let Some(Probe { pace, next, .. }) = &mut self.liveness {
            // Nobody is killed for not being up at once.
            *next = if pace.delay > now { pace.delay } else { now + pace.period };
        }
    }

    fn probe(&self, kind: Kind) -> Option<&Probe> {
        match kind {
            Kind::Startup => self.startup.as_ref(),
            Kind::Liveness => self.liveness.as_ref(),
            Kind::Readiness => self.readiness.as_ref(),
        }
    }

    fn probe_mut(&mut self, kind: Kind) -> Option<&mut Probe> {
        match kind {
            Kind::Startup => self.startup.as_mut(),
            Kind::Liveness => self.liveness.as_mut(),
            Kind::Readiness => self.readiness.as_mut(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Outcome::{Failure, Success, Unknown};
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace(delay: u64, period: u64, successes: u32, failures: u32) -> Pace {
        let [delay, period] = [delay, period].map(Duration::from_secs);
        Pace { delay, period, timeout: SECOND, successes, failures, costly: false }
    }

    /// Tries what is due next; when it was, and which.
    fn step(machine: &mut Machine, outcome: Outcome) -> Option<(Duration, Kind)> {
        let (at, kind) = machine.due()?;
        machine.begin(kind);
        machine.end(kind, outcome, at);
        Some((at, kind))
    }

    /// Gives every probe that becomes due until then this outcome; the times of the tries.
    fn run(machine: &mut Machine, until: Duration, outcome: Outcome) -> Vec<Duration> {
        let mut times = Vec::new();
        while let Some((at, _)) = machine.due().filter(|(at, _)| *at <= until) {
            step(machine, outcome);
            times.push(at);
        }
        times
    }

    #[test]
    fn without_probes_a_container_is_ready_and_nothing_is_due() {
        let machine = Machine::new([None; 3]);
        assert_eq!((machine.results(), machine.due(), machine.is_over()), (Results::default(), None, true));
    }

    #[test]
    fn readiness_is_tried_eagerly_and_its_first_failures_do_not_count() {
        let mut machine = Machine::new([None, None, Some(pace(0, 10, 1, 3))]);
        assert!(!machine.results().ready);
        let early = run(&mut machine, Duration::from_millis(999), Failure);
        assert_eq!(early, EARLY.map(Duration::from_millis));
        assert_eq!(step(&mut machine, Success), Some((SECOND, Kind::Readiness)));
        assert!(machine.results().ready);
        for (at, ready) in [(11, true), (21, true), (31, false), (41, false)] {
            assert_eq!(step(&mut machine, Failure).unwrap().0, at * SECOND);
            assert_eq!(machine.results().ready, ready, "after {at} s");
        }
    }

    #[test]
    fn a_delay_holds_and_a_success_within_the_first_second_counts() {
        let mut machine = Machine::new([None, None, Some(pace(30, 10, 2, 3))]);
        assert_eq!(step(&mut machine, Success).unwrap().0, 30 * SECOND);
        assert!(!machine.results().ready, "two are asked for");
        assert_eq!(step(&mut machine, Success).unwrap().0, 40 * SECOND);
        assert!(machine.results().ready);
    }

    #[test]
    fn a_startup_probe_gates_the_others_and_readiness_follows_at_once() {
        let mut machine = Machine::new([Some(pace(0, 5, 1, 10)), Some(pace(2, 3, 1, 1)), Some(pace(0, 600, 1, 3))]);
        run(&mut machine, 20 * SECOND, Failure);
        assert_eq!(machine.results(), Results { started: false, ready: false, failed: None });
        let (up, kind) = step(&mut machine, Success).unwrap();
        assert_eq!((up, kind, machine.results().started), (21 * SECOND, Kind::Startup, true));
        assert_eq!(step(&mut machine, Success), Some((up, Kind::Readiness)), "though its period is long");
        assert!(machine.results().ready);
        assert_eq!(step(&mut machine, Failure), Some((up + 3 * SECOND, Kind::Liveness)));
        assert_eq!(machine.results().failed, Some(Kind::Liveness));
    }

    #[test]
    fn a_failed_startup_probe_asks_for_the_end_and_nothing_else_is_tried() {
        let mut machine = Machine::new([Some(pace(0, 1, 1, 2)), Some(pace(0, 1, 1, 1)), None]);
        run(&mut machine, Duration::from_millis(2000), Failure);
        assert_eq!(machine.results(), Results { started: false, ready: true, failed: Some(Kind::Startup) });
        assert!(machine.due().is_none() && machine.is_over());
    }

    #[test]
    fn liveness_waits_a_period_or_its_delay() {
        let first = |delay| Machine::new([None, Some(pace(delay, 10, 1, 1)), None]).due().unwrap().0;
        assert_eq!((first(0), first(3), first(15)), (10 * SECOND, 3 * SECOND, 15 * SECOND));
    }

    #[test]
    fn what_cannot_be_asked_changes_nothing() {
        let mut machine = Machine::new([None, Some(pace(1, 1, 1, 2)), None]);
        step(&mut machine, Failure);
        for _ in 0..5 {
            step(&mut machine, Unknown);
        }
        assert_eq!(machine.results().failed, None);
        step(&mut machine, Failure);
        assert_eq!(machine.results().failed, Some(Kind::Liveness), "the row goes on where it was");
    }

    #[test]
    fn a_pod_that_ends_is_not_killed_for_its_liveness_and_goes_on_telling_its_readiness() {
        let mut machine = Machine::new([None, Some(pace(1, 1, 1, 1)), Some(pace(0, 1, 1, 1))]);
        step(&mut machine, Success);
        machine.begin(Kind::Liveness);
        machine.quiet();
        machine.end(Kind::Liveness, Failure, SECOND);
        assert_eq!((machine.results().failed, machine.results().ready), (None, true));
        step(&mut machine, Failure);
        assert!(!machine.results().ready);
    }

    #[test]
    fn a_slow_try_makes_up_for_one_turn_it_missed() {
        let mut machine = Machine::new([None, Some(pace(1, 1, 1, 9)), None]);
        machine.begin(Kind::Liveness);
        assert_eq!(machine.due(), None, "never twice at once");
        machine.end(Kind::Liveness, Failure, Duration::from_millis(4500));
        assert_eq!(machine.due().unwrap().0, 4 * SECOND);
        step(&mut machine, Failure);
        assert_eq!(machine.due().unwrap().0, 5 * SECOND);
    }

    #[test]
    fn a_restart_of_the_node_goes_on_from_what_was_known() {
        let paces = [Some(pace(0, 10, 1, 3)), Some(pace(0, 10, 1, 3)), Some(pace(0, 10, 1, 3))];
        let before = Resumed { ran: 100 * SECOND, started: true, ready: true, spread: 0.5 };
        let mut machine = Machine::resumed(paces, before);
        assert_eq!(machine.results(), Results::default());
        assert_eq!(machine.due().unwrap().0, 105 * SECOND);
        run(&mut machine, 116 * SECOND, Failure);
        assert!(machine.results().ready, "two failures are not three");
        let before = Resumed { started: false, ready: false, ..before };
        let machine = Machine::resumed(paces, before);
        assert_eq!(machine.due(), Some((105 * SECOND, Kind::Startup)));
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![4 => Just(Success), 4 => Just(Failure), 1 => Just(Unknown)]
    }

    /// What a row of counted outcomes means by the documentation's words: the last run of `enough` equal ones decides.
    fn by_the_book(initial: bool, outcomes: &[Outcome], successes: u32, failures: u32) -> bool {
        let known: Vec<_> = outcomes.iter().filter(|o| **o != Unknown).collect();
        let decided = (0..known.len()).rev().find_map(|end| {
            let run = known[..=end].iter().rev().take_while(|o| **o == known[end]).count();
            let enough = if *known[end] == Success { successes } else { failures };
            (run >= enough as usize).then_some(*known[end] == Success)
        });
        decided.unwrap_or(initial)
    }

    proptest! {
        #[test]
        fn readiness_is_what_the_documentation_says(
            outcomes in prop::collection::vec(outcome(), 0..40), successes in 1u32..5, failures in 1u32..5,
        ) {
            let mut machine = Machine::new([None, None, Some(pace(0, 1, successes, failures))]);
            let mut counted = Vec::new();
            for outcome in outcomes {
                let (at, kind) = machine.due().unwrap();
                machine.begin(kind);
                if machine.end(kind, outcome, at) == Note::Counts {
                    counted.push(outcome);
                }
                prop_assert_eq!(machine.results().ready, by_the_book(false, &counted, successes, failures));
            }
        }

        #[test]
        fn whatever_comes_time_goes_on_and_the_gate_holds(
            outcomes in prop::collection::vec((outcome(), 0u64..3000), 1..60),
            startup in prop::option::of((0u64..5, 1u64..5, 1u32..4)),
            liveness in prop::option::of((0u64..5, 1u64..5, 1u32..4)),
        ) {
            let of = |probe: Option<(u64, u64, u32)>| probe.map(|(delay, period, failures)| pace(delay, period, 1, failures));
            let mut machine = Machine::new([of(startup), of(liveness), Some(pace(0, 2, 1, 2))]);
            let mut now = Duration::ZERO;
            for (outcome, took) in outcomes {
                let Some((at, kind)) = machine.due() else {
                    prop_assert!(machine.is_over());
                    break;
                };
                let before = machine.results();
                prop_assert!(before.started || kind == Kind::Startup);
                prop_assert!(before.failed != Some(kind), "a probe that has failed for good is not tried");
                now = now.max(at) + Duration::from_millis(took);
                machine.begin(kind);
                machine.end(kind, outcome, now);
                let after = machine.results();
                prop_assert!(after.started >= before.started, "what has come up has come up");
                prop_assert!(after.failed.is_some() >= before.failed.is_some());
                if let Some((next, _)) = machine.due().filter(|(_, next)| *next == kind) {
                    prop_assert!(next > at, "time goes on");
                }
            }
        }
    }
}
