//! Replays traces of calls through our scaling policy (the very code of `function::pool_state`), a model of Knative's
//! autoscaler and a fixed keep-alive, and prints what each costs: cold starts, waiting, idle replicas.
//!
//! `cargo run --example sim-functions` prints the tables of docs/functions-simulation.md. Time is simulated and every
//! random number comes from a fixed seed, so the figures are the same in every build and on every machine.

mod engine;
mod keep_alive;
mod knative;
mod ours;
mod recorded;
mod synthetic;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;

use engine::{Outcome, Policy, Trace};
use keep_alive::KeepAlive;
use knative::Knative;
use ours::Ours;

#[derive(Parser)]
struct Args {
    /// Functions of the Azure-like mix
    #[arg(long, default_value_t = 3000)]
    functions: usize,
    /// Hours of the Azure-like mix
    #[arg(long, default_value_t = 2)]
    hours: u64,
    /// A recorded trace instead: calls per minute, one function a row, as in the Azure Functions trace of 2019
    #[arg(long)]
    recorded: Option<PathBuf>,
    /// Run times for it, as in the same trace; without it they are drawn as for the mix
    #[arg(long, requires = "recorded")]
    durations: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let traces = if let Some(path) = &args.recorded {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).with_context(|| format!("failed to read the trace {}", path.display()))
        };
        let durations = args.durations.as_ref().map(read).transpose()?;
        vec![recorded::parse(&read(path)?, durations.as_deref())?]
    } else {
        let mut traces = synthetic::one_function();
        traces.push(synthetic::azure_like(args.functions, args.hours));
        traces
    };
    for trace in &traces {
        table(trace);
    }
    Ok(())
}

/// Makes a policy for one function that may have so many replicas.
type Make = fn(usize) -> Box<dyn Policy>;

const POLICIES: [(&str, Make); 5] = [
    ("lambdalet (idle timeout 5 min)", |max| ours(300, max)),
    ("lambdalet, idle timeout 1 min", |max| ours(60, max)),
    ("lambdalet, idle timeout 10 min", |max| ours(600, max)),
    ("Knative KPA", |max| Box::new(Knative::new(max))),
    ("keep-alive 10 min", |max| Box::new(KeepAlive::new(max))),
];

fn ours(seconds: u64, max: usize) -> Box<dyn Policy> {
    Box::new(Ours::new(Duration::from_secs(seconds), max))
}

fn table(trace: &Trace) {
    let calls: usize = trace.functions.iter().map(Vec::len).sum();
    let (functions, minutes) = (trace.functions.len(), trace.length / 60_000_000);
    println!("### {}\n\n{}\n", trace.name, trace.about);
    println!("Functions: {functions}. Calls: {calls}. Length: {minutes} min. At most {} replicas each.\n", trace.max);
    println!("| policy | cold starts | wait p50 | wait p99 | waste | replicas started | refused |");
    println!("|---|---|---|---|---|---|---|");
    for (name, policy) in POLICIES {
        let mut sum = Outcome::default();
        trace.functions.iter().for_each(|calls| sum.add(engine::run(policy(trace.max).as_mut(), calls, trace.length)));
        println!("{}", row(name, calls, &mut sum));
    }
    println!();
}

#[allow(clippy::cast_precision_loss)] // Shares of counts, shown with two digits.
fn row(name: &str, calls: usize, sum: &mut Outcome) -> String {
    let share = 100.0 * sum.cold as f64 / calls.max(1) as f64;
    let waste = (sum.alive - sum.busy) as f64 / sum.busy.max(1) as f64;
    let (p50, p99) = (sum.wait(0.5), sum.wait(0.99));
    format!("| {name} | {share:.2} % | {p50} ms | {p99} ms | {waste:.2} | {} | {} |", sum.started, sum.refused)
}
