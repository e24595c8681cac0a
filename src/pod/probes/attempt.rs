//! One try of a probe, from the node or in the container.

use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::action::Action;
use super::{grpc, http};
use crate::runtime::session::ExecRequest;
use crate::runtime::types::ContainerId;
use crate::runtime::{Runtime, RuntimeError};
use crate::telemetry::chain;

/// Execs of probes that are being started at once on the node: a start is work for the engine, waiting for the end is not.
const STARTS: usize = 8;
/// Tries from the node under way at once: each takes a file descriptor.
const CONNECTIONS: usize = 256;
/// Most of a command's output that is kept, in bytes; a kubelet's number.
const LONGEST: usize = 10 << 10;
/// How often a question that cannot be asked is asked, as by a kubelet.
const TRIES: usize = 3;

/// What all probes of the node share.
pub struct Bounds {
    starts: Semaphore,
    connections: Semaphore,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { starts: Semaphore::new(STARTS), connections: Semaphore::new(CONNECTIONS) }
    }
}

/// What a try said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    Success,
    /// Success that the user should hear of.
    Warning(String),
    Failure(String),
    /// The question could not be asked.
    Unknown(String),
}

/// Where it is tried.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) runtime: &'a dyn Runtime,
    pub(super) container: &'a ContainerId,
    pub(super) bounds: &'a Bounds,
}

/// One try, which takes no longer than `limit` once it is its turn.
pub(super) async fn attempt(place: Place<'_>, action: &Action, limit: Duration) -> Tried {
    if let Action::Exec(command) = action {
        let mut tried = Tried::Success;
        for _ in 0..TRIES {
            tried = exec(place, command, limit).await;
            if !matches!(tried, Tried::Unknown(_)) {
                break;
            }
        }
        return tried;
    }
    // Never closed; if it were, nobody would have to wait.
    let _turn = place.bounds.connections.acquire().await;
    match action {
        Action::Exec(_) => Tried::Success,
        Action::Http(wanted) => match timeout(limit, http::get(wanted)).await {
            Ok(Ok(answer)) => judge(&answer),
            Ok(Err(error)) => Tried::Failure(error.to_string()),
            Err(_) => {
                let scheme = if wanted.https { "https" } else { "http" };
                let url = format!("{scheme}://{}:{}{}", wanted.host, wanted.port, wanted.path);
                Tried::Failure(format!("Get {url:?}: context deadline exceeded (no answer within {limit:?})"))
            }
        },
        Action::Tcp { host, port } => match timeout(limit, http::dial(host, *port)).await {
            Ok(Ok(_)) => Tried::Success,
            Ok(Err(text)) => Tried::Failure(text),
            Err(_) => Tried::Failure(format!("dial tcp {host}:{port}: i/o timeout")),
        },
        Action::Grpc { host, port, service } => match timeout(limit, grpc::check(host, *port, service)).await {
            Ok(Ok(())) => Tried::Success,
            Ok(Err(text)) => Tried::Failure(text),
            Err(_) => Tried::Failure(format!("timeout: health rpc did not complete within {limit:?}")),
        },
    }
}

fn judge(answer: &http::Answer) -> Tried {
    match answer.status.as_u16() {
        200..=299 => Tried::Success,
        300..=399 => Tried::Warning(format!("Probe terminated redirects, Response body: {}", answer.body)),
        // The body stays out: it may hold what only the container's owner should see.
        status => Tried::Failure(format!("HTTP probe failed with statuscode: {status}")),
    }
}

async fn exec(place: Place<'_>, command: &[String], limit: Duration) -> Tried {
    let turn = place.bounds.starts.acquire().await;
    let run = async {
        let ended = run(place.runtime, place.container, command, || drop(turn)).await;
        match ended {
            Ok((0, _)) => Tried::Success,
            Ok((_, output)) => Tried::Failure(output),
            Err(error) => Tried::Unknown(chain(&error)),
        }
    };
    let late = || Tried::Failure(format!("command timed out: {:?} timed out after {limit:?}", command.join(" ")));
    timeout(limit, run).await.unwrap_or_else(|_| late())
}

/// Runs a command in a container to its end: its exit code, and the beginning of its output. Dropping this ends it.
///
/// # Errors
/// It could not be started, or the engine lost it.
pub(in crate::pod) async fn run(
    runtime: &dyn Runtime,
    container: &ContainerId,
    command: &[String],
    started: impl FnOnce(),
) -> Result<(i32, String), RuntimeError> {
    let request = ExecRequest { command: command.to_vec(), stdout: true, stderr: true, ..ExecRequest::default() };
    let mut session = runtime.exec(container, &request).await?;
    started();
    let mut text = Vec::new();
    while let Some(Ok(output)) = session.output.next().await {
        text.extend_from_slice(&output.bytes[..output.bytes.len().min(LONGEST - text.len())]);
    }
    let code = session.exit.await?;
    Ok((code, String::from_utf8_lossy(&text).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_by_their_status() {
        let judged = |status: u16| judge(&http::Answer { status: status.try_into().unwrap(), body: "secret".into() });
        assert_eq!(judged(204), Tried::Success);
        assert!(matches!(judged(302), Tried::Warning(text) if text.contains("secret")));
        assert_eq!(judged(500), Tried::Failure("HTTP probe failed with statuscode: 500".into()));
        assert!(matches!(judged(101), Tried::Failure(_)));
    }
}
