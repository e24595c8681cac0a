//! Traces that are drawn, from fixed seeds.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::engine::{Call, Micros, Trace};

const SECOND: f64 = 1e6;
const HOUR: Micros = 3_600_000_000;
/// Replicas of one function at most: our default.
const MAX: usize = 20;

/// Log-normal fit of functions' average execution times in seconds: Shahrad et al., "Serverless in the Wild", USENIX ATC
/// 2020: log mean -0.38 and sigma 2.36.
const EXECUTION: (f64, f64) = (-0.38, 2.36);
/// Shortest and longest average kept, in seconds; the fit has no bounds, functions have.
const EXECUTION_BOUNDS: (f64, f64) = (0.001, 60.0);
/// How far one call is from its function's average: sigma of a log-normal factor.
const SPREAD: f64 = 0.5;
/// Calls per minute at these shares of functions. The same paper says of applications, over half of which are one function:
/// 45 % are called once an hour or less, 81 % once a minute or less, the other 18.6 % make 99.6 % of all calls. What lies
/// between those points, and the ends (the paper's reach over eight orders of magnitude), is ours.
const RATES: [(f64, f64); 5] = [(0.0, 1.0 / 1440.0), (0.45, 1.0 / 60.0), (0.81, 1.0), (0.99, 60.0), (1.0, 600.0)];
/// No function is offered more than this many calls at once on average while it is called: half of what it may have
/// replicas.
const MOST_LOAD: f64 = 10.0;
/// Shares of functions that are called like clockwork, and in bursts; the rest are Poisson. Chosen by us: the paper has
/// 15.6 % of functions behind timers, and 40 % of applications whose times between calls vary more than Poisson's.
const PERIODIC: f64 = 0.2;
/// See [`PERIODIC`].
const BURSTY: f64 = 0.4;
/// Bursts take one part in so many of the time, at so many times the rate.
const BURST: f64 = 10.0;

/// Draws numbers.
pub(crate) struct Dice(StdRng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// From 0, included, to 1.
    pub(crate) fn unit(&mut self) -> f64 {
        self.0.random::<f64>()
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.exponential(2.0).sqrt(), std::f64::consts::TAU * self.unit());
        radius * angle.cos()
    }

    /// The average run time of a function, in seconds.
    pub(crate) fn execution(&mut self) -> f64 {
        let (mean, sigma) = EXECUTION;
        (mean + sigma * self.normal()).exp().clamp(EXECUTION_BOUNDS.0, EXECUTION_BOUNDS.1)
    }

    /// One call at a moment (seconds), of a function that runs so long on average (seconds).
    pub(crate) fn call(&mut self, at: f64, average: f64) -> Call {
        // The factor's mean is 1.
        let factor = (SPREAD * self.normal() - SPREAD * SPREAD / 2.0).exp();
        Call { at: micros(at), runs: micros(average * factor).max(1000) }
    }

    /// Poisson calls from one moment to another, at so many per second.
    fn poisson(&mut self, calls: &mut Vec<Call>, [from, to]: [f64; 2], rate: f64, average: f64) {
        let mut at = from + self.exponential(1.0 / rate);
        while at < to {
            calls.push(self.call(at, average));
            at += self.exponential(1.0 / rate);
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Hours fit, and none is negative.
fn micros(seconds: f64) -> Micros {
    (seconds * SECOND) as Micros
}

/// Loads of one function each, an hour long.
pub(crate) fn one_function() -> Vec<Trace> {
    let trace = |name: &str, about: &str, calls: Vec<Call>| Trace {
        name: name.to_owned(),
        about: about.to_owned(),
        length: HOUR,
        max: MAX,
        functions: vec![calls],
    };
    let mut dice = Dice::new(1);
    let mut steady = Vec::new();
    dice.poisson(&mut steady, [0.0, 3600.0], 10.0, 0.2);
    let mut bursts = Vec::new();
    for burst in 0..12 {
        bursts.extend((0..100).map(|_| dice.call(f64::from(burst) * 300.0 + 10.0, 0.5)));
    }
    let mut on_off = |on: f64, off: f64| {
        let mut calls = Vec::new();
        let mut from = 0.0;
        while from < 3600.0 {
            dice.poisson(&mut calls, [from, from + on], 20.0, 0.2);
            from += on + off;
        }
        calls.retain(|call| call.at < HOUR);
        calls
    };
    let (short, long) = (on_off(30.0, 30.0), on_off(30.0, 150.0));
    vec![
        trace("Poisson", "10 calls/s, 200 ms each on average.", steady),
        trace("Bursts", "100 calls at once every 5 min, 500 ms each on average.", bursts),
        trace("On and off, 30 s each", "20 calls/s, 200 ms each on average, every other 30 s.", short),
        trace("On for 30 s, off for 150 s", "20 calls/s, 200 ms each on average, 30 s in every 180 s.", long),
    ]
}

/// Many functions, most of them called seldom, a few all the time.
pub(crate) fn azure_like(functions: usize, hours: u64) -> Trace {
    let length = hours * HOUR;
    let mut dice = Dice::new(2);
    let functions = (0..functions).map(|_| function(&mut dice, length)).collect();
    let about = "Rates, run times and burstiness drawn from published distributions; see below.".to_owned();
    Trace { name: "Azure-Functions-like mix".to_owned(), about, length, max: MAX, functions }
}

#[allow(clippy::cast_precision_loss)]
fn function(dice: &mut Dice, length: Micros) -> Vec<Call> {
    let seconds = length as f64 / SECOND;
    let rate = rate(dice.unit()) / 60.0;
    let kind = dice.unit();
    let bursty = (PERIODIC..PERIODIC + BURSTY).contains(&kind);
    let busiest = if bursty { rate * BURST } else { rate };
    let average = dice.execution().min(MOST_LOAD / busiest);
    let mut calls = Vec::new();
    if kind < PERIODIC {
        let mut at = dice.unit() / rate;
        while at < seconds {
            calls.push(dice.call(at, average));
            at += 1.0 / rate;
        }
    } else if bursty {
        // Rare functions are called some ten times in a burst.
        let on = (1.0 / rate).clamp(30.0, 600.0);
        let mut from = dice.exponential(on * (BURST - 1.0)) * dice.unit();
        while from < seconds {
            let to = (from + dice.exponential(on)).min(seconds);
            dice.poisson(&mut calls, [from, to], busiest, average);
            from = to + dice.exponential(on * (BURST - 1.0));
        }
    } else {
        dice.poisson(&mut calls, [0.0, seconds], rate, average);
    }
    calls
}

/// Calls per minute of the function at a share of all: on a straight line between the logarithms of [`RATES`].
fn rate(share: f64) -> f64 {
    let piece = RATES.windows(2).find(|two| share < two[1].0).unwrap_or(&RATES[RATES.len() - 2..]);
    let [(from, low), (to, high)] = [piece[0], piece[1]];
    (low.ln() + (high.ln() - low.ln()) * (share - from) / (to - from)).exp()
}
