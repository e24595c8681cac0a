//! The node's health, check by check, and `/metrics/slis`: how each check went, in component-base's names (KEP-3466).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;

use super::App;
use super::stats::exposition::{self, Exposition, Kind};
use super::targets::PodTargets;

/// What is checked, under the names a kubelet gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// That there is an answer is the answer.
    Ping,
    /// Log lines are written by whoever has something to say, so no part of its own could be stuck.
    Log,
    /// The Pod loop comes round.
    Syncloop,
}

const CHECKS: [Check; 3] = [Check::Ping, Check::Log, Check::Syncloop];
/// How a check may end.
const RESULTS: [&str; 2] = ["success", "error"];

impl Check {
    fn name(self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Log => "log",
            Self::Syncloop => "syncloop",
        }
    }

    fn look(self, targets: &dyn PodTargets) -> Result<(), String> {
        match self {
            Self::Ping | Self::Log => Ok(()),
            Self::Syncloop => targets.healthy(),
        }
    }
}

/// Counts how checks went. A clone counts into the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Health(Arc<[[AtomicU64; RESULTS.len()]; CHECKS.len()]>);

impl Health {
    /// Makes one check and counts it.
    fn check(&self, check: Check, targets: &dyn PodTargets) -> Result<(), String> {
        let outcome = check.look(targets);
        let of_check = CHECKS.iter().zip(self.0.iter()).find(|(known, _)| **known == check);
        if let Some((_, counts)) = of_check {
            counts[usize::from(outcome.is_err())].fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// The text of `/metrics/slis`. A scrape makes each check itself: otherwise nothing were known of a node whose
    /// `/healthz` nobody asks.
    fn render(&self, targets: &dyn PodTargets) -> String {
        let mut out = Exposition::default();
        let mut family = out.family("kubernetes_healthcheck", Kind::Gauge, "Whether a health check passes: 1 or 0");
        for check in CHECKS {
            let passes = self.check(check, targets).is_ok();
            family.sample(&[("name", check.name()), ("type", "healthz")], f64::from(u8::from(passes)), None);
        }
        let mut family = out.family("kubernetes_healthchecks_total", Kind::Counter, "Health checks, by how they ended");
        for (check, counts) in CHECKS.iter().zip(self.0.iter()) {
            for (result, count) in RESULTS.iter().zip(counts) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let labels = [("name", check.name()), ("status", *result), ("type", "healthz")];
                    family.sample(&labels, count as f64, None);
                }
            }
        }
        out.finish()
    }
}

/// GET `/metrics/slis`.
pub(super) async fn slis(State(app): State<App>) -> Response {
    exposition::answer(app.health.render(app.targets.as_ref()))
}

/// GET `/healthz[?verbose]`: `ok`, or 500 with what is stuck; `verbose` tells of each check.
pub(super) async fn healthz(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    let outcomes = CHECKS.map(|check| (check, app.health.check(check, app.targets.as_ref())));
    let failure = outcomes.iter().find_map(|(_, outcome)| outcome.as_ref().err());
    if query.is_some_and(|query| query.split('&').any(|pair| pair == "verbose" || pair.starts_with("verbose="))) {
        let lines = outcomes.iter().map(|(check, outcome)| match outcome {
            Ok(()) => format!("[+]{} ok\n", check.name()),
            Err(reason) => format!("[-]{} failed: {reason}\n", check.name()),
        });
        let end = if failure.is_none() { "healthz check passed\n" } else { "healthz check failed\n" };
        return (status(failure), lines.chain([end.to_owned()]).collect::<String>()).into_response();
    }
    answer(failure)
}

/// GET `/healthz/ping`.
pub(super) async fn ping(State(app): State<App>) -> Response {
    one(&app, Check::Ping)
}

/// GET `/healthz/log`.
pub(super) async fn log(State(app): State<App>) -> Response {
    one(&app, Check::Log)
}

/// GET `/healthz/syncloop`.
pub(super) async fn syncloop(State(app): State<App>) -> Response {
    one(&app, Check::Syncloop)
}

fn one(app: &App, check: Check) -> Response {
    answer(app.health.check(check, app.targets.as_ref()).as_ref().err())
}

fn answer(failure: Option<&String>) -> Response {
    let text = failure.map_or_else(|| "ok".to_owned(), |reason| format!("{reason}\n"));
    (status(failure), text).into_response()
}

fn status(failure: Option<&String>) -> StatusCode {
    if failure.is_none() { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
}
