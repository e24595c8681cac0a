//! A model of Knative Serving's Pod autoscaler (KPA) with its default settings and `containerConcurrency: 1`.
//!
//! Rules and defaults are those of <https://knative.dev/docs/serving/autoscaling/kpa-specific/> and
//! <https://knative.dev/docs/serving/autoscaling/concurrency/>: every 2 s the average concurrency (running and waiting
//! calls) over a stable window of 60 s, and over a panic window of 6 s, is divided by the target (1 x 70 %). Twice the
//! ready replicas wanted by the panic window starts panic mode, in which nothing scales down, for a stable window after
//! the last such moment. Scale-up is limited to 1000 times, scale-down to half. A first call at zero is acted on at
//! once. After an empty stable window the last replica stays for the grace period of 30 s. Calls wait in the activator:
//! 10,000 at most, 300 s at most (the request timeout).

use std::collections::{BTreeMap, VecDeque};

use crate::engine::{Micros, News, Order, Policy};

const SECOND: Micros = 1_000_000;
const TICK: Micros = 2 * SECOND;
const STABLE: u64 = 60;
const PANIC: u64 = 6;
const PANIC_THRESHOLD: f64 = 2.0;
const TARGET: f64 = 0.7;
const GRACE: Micros = 30 * SECOND;
const QUEUE_LENGTH: usize = 10_000;
const QUEUE_TIMEOUT: Micros = 300 * SECOND;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Idle,
    Busy,
    /// Scaled down with a call in it.
    Draining,
}

/// The policy for one function.
#[derive(Default)]
pub(crate) struct Knative {
    max: usize,
    replicas: BTreeMap<u64, State>,
    next: u64,
    waiting: VecDeque<(usize, Micros)>,
    load: Load,
    /// The last moment at which the panic threshold was passed.
    panic: Option<Micros>,
    panic_replicas: usize,
    inactive: Option<Micros>,
}

/// Concurrency, averaged per second: the last [`STABLE`] seconds of it.
#[derive(Default)]
struct Load {
    now: f64,
    at: Micros,
    /// The second that the last of `seconds` stands for.
    second: u64,
    seconds: VecDeque<f64>,
    /// Since when there is something to average, in seconds.
    first: u64,
}

impl Load {
    /// Accounts for the time that has passed.
    #[allow(clippy::cast_precision_loss)]
    fn advance(&mut self, now: Micros) {
        let stale = now / SECOND > self.second + STABLE;
        if self.seconds.is_empty() || (stale && self.now == 0.0) {
            // After a long pause averages begin anew.
            self.seconds = VecDeque::from([0.0]);
            (self.second, self.first, self.at) = (now / SECOND, now / SECOND, now);
            return;
        }
        while self.at < now {
            let until = now.min((self.second + 1) * SECOND);
            let part = (until - self.at) as f64 / SECOND as f64;
            if let Some(last) = self.seconds.back_mut() {
                *last += self.now * part;
            }
            self.at = until;
            if until == (self.second + 1) * SECOND {
                self.second += 1;
                self.seconds.push_back(0.0);
                if self.seconds.len() as u64 > STABLE {
                    self.seconds.pop_front();
                }
            }
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn average(&self, window: u64) -> f64 {
        let known = (self.second + 1 - self.first).min(window).max(1);
        let sum: f64 = self.seconds.iter().rev().take(usize::try_from(window).unwrap_or(usize::MAX)).sum();
        sum / known as f64
    }
}

impl Knative {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, ..Self::default() }
    }

    fn count(&self, of: &[State]) -> usize {
        self.replicas.values().filter(|state| of.contains(state)).count()
    }

    /// How many replicas there should be.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn desired(&mut self, now: Micros) -> usize {
        let ready = self.count(&[State::Idle, State::Busy]).max(1);
        // A call that has come this moment weighs nothing yet; the activator reports it as one.
        let floor = if self.waiting.is_empty() { 0.0 } else { f64::MIN_POSITIVE };
        let wanted = |average: f64| (average.max(floor) / TARGET).ceil() as usize;
        let (stable, panic) = (wanted(self.load.average(STABLE)), wanted(self.load.average(PANIC)));
        let limited = |wanted: usize| wanted.clamp(ready / 2, ready * 1000);
        if panic as f64 / ready as f64 >= PANIC_THRESHOLD {
            self.panic = Some(now);
        } else if self.panic.is_some_and(|since| since + STABLE * SECOND < now) {
            (self.panic, self.panic_replicas) = (None, 0);
        }
        let mut desired = limited(stable);
        if self.panic.is_some() {
            desired = desired.max(limited(panic)).max(self.panic_replicas);
            self.panic_replicas = desired;
        }
        desired.min(self.max)
    }

    fn scale(&mut self, now: Micros, orders: &mut Vec<Order>) {
        let mut desired = self.desired(now);
        if desired > 0 {
            self.inactive = None;
        } else if *self.inactive.get_or_insert(now) + GRACE > now {
            desired = 1.min(self.replicas.len());
        }
        let counted = [State::Starting, State::Idle, State::Busy];
        while self.count(&counted) < desired {
            self.next += 1;
            self.replicas.insert(self.next, State::Starting);
            orders.push(Order::Start(self.next));
        }
        while self.count(&counted) > desired {
            let youngest = |of: State| self.replicas.iter().rev().find(|(_, state)| **state == of).map(|(id, _)| *id);
            if let Some(id) = youngest(State::Starting).or_else(|| youngest(State::Idle)) {
                self.replicas.remove(&id);
                orders.push(Order::Stop(id));
            } else if let Some(id) = youngest(State::Busy) {
                self.replicas.insert(id, State::Draining);
            }
        }
    }

    fn hand_out(&mut self, orders: &mut Vec<Order>) {
        while let Some((call, _)) = self.waiting.front().copied() {
            let Some((id, state)) = self.replicas.iter_mut().find(|(_, state)| **state == State::Idle) else { return };
            *state = State::Busy;
            self.waiting.pop_front();
            orders.push(Order::Run { call, replica: *id });
        }
    }

    fn ended(&mut self, replica: u64, orders: &mut Vec<Order>) {
        self.load.now -= 1.0;
        if self.replicas.get(&replica) == Some(&State::Draining) {
            self.replicas.remove(&replica);
            orders.push(Order::Stop(replica));
        } else {
            self.replicas.insert(replica, State::Idle);
        }
    }
}

impl Policy for Knative {
    fn hear(&mut self, news: News, now: Micros, orders: &mut Vec<Order>) {
        self.load.advance(now);
        match news {
            News::Arrived(_) if self.waiting.len() == QUEUE_LENGTH => orders.push(Order::Refuse),
            News::Arrived(call) => {
                self.load.now += 1.0;
                self.waiting.push_back((call, now));
                if self.replicas.is_empty() {
                    self.scale(now, orders);
                }
            }
            News::Started(id) => {
                if let Some(state) = self.replicas.get_mut(&id) {
                    *state = State::Idle;
                }
            }
            News::Ended { replica, .. } => self.ended(replica, orders),
            News::Stopped(_) => {}
            News::Tick => {
                while self.waiting.front().is_some_and(|(_, since)| since + QUEUE_TIMEOUT <= now) {
                    self.waiting.pop_front();
                    self.load.now -= 1.0;
                    orders.push(Order::Refuse);
                }
                self.scale(now, orders);
            }
        }
        self.hand_out(orders);
    }

    fn wakes(&self, now: Micros) -> Option<Micros> {
        let awake = !self.replicas.is_empty() || !self.waiting.is_empty();
        awake.then_some((now / TICK + 1) * TICK)
    }
}
