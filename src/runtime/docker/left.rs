//! Execs that an earlier process of this node started and did not live to end.
//!
//! Docker goes on with an exec whose client is gone, and its streams cannot be joined again: nobody will ever read what
//! such a process says, or end it. So the first thing a new process does with a daemon is to end them.
//!
//! An exec has no labels. What its starter can write on it, and read back, are the keys that let go of a terminal; ours
//! are like nobody else's (see [`DETACH_KEYS`]), and every exec of ours has them. One that somebody else runs in a
//! container of ours has others and is spared.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::models::ExecInspectResponse;
use bollard::query_parameters::InspectContainerOptions;
use futures::{StreamExt as _, stream};

use super::container::INSPECTS_IN_FLIGHT;
use super::exec::DETACH_BYTES;
#[cfg(doc)]
use super::exec::DETACH_KEYS;
use super::process::Process;
use super::{DockerRuntime, labels};
use crate::runtime::Result;
use crate::telemetry::chain;

impl DockerRuntime {
    /// Ends them. That it failed is only told: there may be none, and the node is of use all the same.
    ///
    /// To be called before the first exec of this process, which looks just like them. Returns once they are found; each
    /// gets its time to end in a task of its own.
    pub(super) async fn end_left_execs(&self) {
        let left = match self.left_execs().await {
            Ok(left) => left,
            Err(error) => return tracing::warn!(error = chain(&error), "failed to look for execs left behind"),
        };
        if !left.is_empty() {
            tracing::info!(execs = left.len(), "ending execs that were left behind by an earlier process");
        }
        for process in left {
            self.keepers.spawn(async move { process.hang_up().await });
        }
    }

    async fn left_execs(&self) -> Result<Vec<Process>> {
        let containers = self.list_ids(labels::KIND_CONTAINER, &[]).await?;
        let running = containers.into_iter().filter(|listed| listed.may_run).map(|listed| listed.id);
        let found = stream::iter(running).map(|id| self.left_in(id)).buffer_unordered(INSPECTS_IN_FLIGHT);
        Ok(found.collect::<Vec<_>>().await.into_iter().flatten().collect())
    }

    /// Those in one container. It and they may end at any moment, so what cannot be looked at is not there.
    async fn left_in(&self, container: String) -> Vec<Process> {
        let inspected = self.docker.inspect_container(&container, None::<InspectContainerOptions>).await;
        let ids = inspected.ok().and_then(|seen| seen.exec_ids).unwrap_or_default();
        let mut left = Vec::new();
        for id in ids {
            let exec = self.docker.inspect_exec(&id).await;
            let pid = exec.ok().and_then(|exec| process_of(&exec));
            left.extend(pid.and_then(|pid| Process::open(pid, &container)));
        }
        left
    }
}

/// The process of an exec of ours that runs.
fn process_of(exec: &ExecInspectResponse) -> Option<i32> {
    let ours = STANDARD.encode(DETACH_BYTES);
    let runs = exec.running == Some(true) && exec.detach_keys.as_ref() == Some(&ours);
    exec.pid.filter(|pid| runs && *pid > 0).and_then(|pid| i32::try_from(pid).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_exec_of_ours_is_ended() {
        let exec = |running, keys: &str, pid| ExecInspectResponse {
            running: Some(running),
            detach_keys: Some(keys.to_owned()),
            pid: Some(pid),
            ..ExecInspectResponse::default()
        };
        // As a daemon shows them.
        let ours = "AB4fHR4fHR4fHQ==";
        assert_eq!(process_of(&exec(true, ours, 7)), Some(7));
        for other in [exec(false, ours, 7), exec(true, "", 7), exec(true, "EBE=", 7), exec(true, ours, 0)] {
            assert_eq!(process_of(&other), None, "{other:?}");
        }
    }
}
