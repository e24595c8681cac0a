//! One function at a time: its calls, its replicas (one call each), and a policy that decides.
//!
//! Starting a replica takes [`START`] and stopping one [`STOP`], whoever decides.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Microseconds.
pub(crate) type Micros = u64;
/// From the decision until the first call may run: start of a container in a ready sandbox and a small runtime's own
/// initialisation.
const START: Micros = 400_000;
/// Until nothing of a replica is left.
const STOP: Micros = 200_000;

/// A call: when it comes and how long it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) at: Micros,
    pub(crate) runs: Micros,
}

/// Calls of many functions, each in the order of time.
pub(crate) struct Trace {
    pub(crate) name: String,
    pub(crate) about: String,
    pub(crate) length: Micros,
    /// Replicas of one function at most, for every policy.
    pub(crate) max: usize,
    pub(crate) functions: Vec<Vec<Call>>,
}

/// What a policy hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum News {
    Arrived(usize),
    Started(u64),
    Ended { call: usize, replica: u64 },
    Stopped(u64),
    Tick,
}

/// What a policy decides. Replicas are numbered by it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    Start(u64),
    Stop(u64),
    Run { call: usize, replica: u64 },
    Refuse,
}

/// Decides for one function.
pub(crate) trait Policy {
    /// Takes in what happened.
    fn hear(&mut self, news: News, now: Micros, orders: &mut Vec<Order>);
    /// When it wants a [`News::Tick`], after `now`.
    fn wakes(&self, now: Micros) -> Option<Micros>;
}

/// What it cost.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Calls that waited for the start of the replica they then ran in.
    pub(crate) cold: usize,
    pub(crate) refused: usize,
    pub(crate) started: usize,
    /// Replica-microseconds from the decision to start until the decision to stop.
    pub(crate) alive: Micros,
    /// Of those, with a call.
    pub(crate) busy: Micros,
    /// Milliseconds that each call waited.
    waits: Vec<u32>,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: Self) {
        self.cold += other.cold;
        self.refused += other.refused;
        self.started += other.started;
        self.alive += other.alive;
        self.busy += other.busy;
        self.waits.extend(other.waits);
    }

    /// A quantile of the time that calls waited, in milliseconds.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(crate) fn wait(&mut self, quantile: f64) -> u32 {
        self.waits.sort_unstable();
        let at = (self.waits.len() as f64 * quantile) as usize;
        self.waits.get(at.min(self.waits.len().saturating_sub(1))).copied().unwrap_or(0)
    }
}

struct Replica {
    ordered: Micros,
    ready: Micros,
    fresh: bool,
}

struct World<'a> {
    calls: &'a [Call],
    length: Micros,
    future: BinaryHeap<Reverse<(Micros, u64, News)>>,
    number: u64,
    replicas: HashMap<u64, Replica>,
    outcome: Outcome,
}

/// Replays the calls of one function.
pub(crate) fn run(policy: &mut dyn Policy, calls: &[Call], length: Micros) -> Outcome {
    let (future, replicas) = (BinaryHeap::new(), HashMap::new());
    let mut world = World { calls, length, future, number: 0, replicas, outcome: Outcome::default() };
    let (mut next, mut now, mut orders) = (0, 0, Vec::new());
    loop {
        let arrival = calls.get(next).map(|call| call.at);
        let event = world.future.peek().map(|Reverse((at, _, _))| *at);
        let tick = policy.wakes(now).filter(|at| *at <= length || arrival.or(event).is_some());
        let Some(at) = [arrival, event, tick].into_iter().flatten().min() else { break };
        now = at;
        // What is due at one moment: first what ends and starts, then timers, then what comes.
        let news = if event == Some(at) {
            world.future.pop().map_or(News::Tick, |Reverse((_, _, news))| news)
        } else if tick == Some(at) {
            News::Tick
        } else {
            next += 1;
            News::Arrived(next - 1)
        };
        policy.hear(news, now, &mut orders);
        orders.drain(..).for_each(|order| world.obey(order, now));
    }
    world.end()
}

impl World<'_> {
    fn later(&mut self, at: Micros, news: News) {
        self.number += 1;
        self.future.push(Reverse((at, self.number, news)));
    }

    fn obey(&mut self, order: Order, now: Micros) {
        match order {
            Order::Start(id) => {
                self.replicas.insert(id, Replica { ordered: now, ready: now + START, fresh: true });
                self.outcome.started += 1;
                self.later(now + START, News::Started(id));
            }
            Order::Stop(id) => {
                if let Some(replica) = self.replicas.remove(&id) {
                    self.outcome.alive += now.min(self.length) - replica.ordered.min(self.length);
                    self.later(now + STOP, News::Stopped(id));
                }
            }
            Order::Run { call, replica: id } => {
                let Call { at, runs } = self.calls[call];
                let replica = self.replicas.get_mut(&id).expect("calls run in replicas that exist");
                assert!(replica.ready <= now, "calls run in replicas that are ready");
                self.outcome.cold += usize::from(replica.fresh && at < replica.ready);
                replica.fresh = false;
                let wait = u32::try_from((now - at) / 1000).unwrap_or(u32::MAX);
                self.outcome.waits.push(wait);
                self.outcome.busy += (now + runs).min(self.length) - now.min(self.length);
                self.later(now + runs, News::Ended { call, replica: id });
            }
            Order::Refuse => self.outcome.refused += 1,
        }
    }

    fn end(mut self) -> Outcome {
        let left: Vec<u64> = self.replicas.keys().copied().collect();
        left.into_iter().for_each(|id| self.obey(Order::Stop(id), self.length));
        let answered = self.outcome.waits.len() + self.outcome.refused;
        assert_eq!(answered, self.calls.len(), "every call is answered once");
        self.outcome
    }
}
