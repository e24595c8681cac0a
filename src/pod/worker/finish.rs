//! What happens when containers and Pods end.

use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;
use tokio::time::Instant;

use super::start::find;
use super::{Next, Worker};
use crate::failpoint;
use crate::pod::crew::kept;
use crate::pod::ephemeral;
use crate::pod::eviction::{DISRUPTION, End, Order};
use crate::pod::inputs::following::Following;
use crate::pod::node_shutdown;
use crate::pod::plan::{self, Goal};
use crate::pod::resize::Note;
use crate::pod::status::{Trouble, crash_loop};
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus, LogOptions, SandboxId};
use crate::telemetry::chain;

/// Longest termination message, in bytes (the kubelet's value).
const MAX_MESSAGE: usize = 4096;
/// Most lines of the log taken in place of a message.
const MAX_LOG_LINES: u64 = 80;
/// Most bytes of the log taken in place of a message.
const MAX_LOG_BYTES: usize = 2048;
/// Wait before something that must be removed is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(1);

impl Worker {
    /// Takes note of what has ended since the last turn, and of deadlines passed.
    pub(super) async fn digest(&mut self) {
        let now = Timestamp::now();
        self.take_order();
        let ended: Vec<ContainerStatus> = self
            .observed
            .containers()
            .filter(|c| c.state == ContainerState::Exited && !self.memory.digested.contains(&c.id))
            .cloned()
            .collect();
        for status in ended {
            self.digest_end(&status, now).await;
            self.memory.digested.insert(status.id.clone());
        }
        if self.seat.is_none() && *self.shared.draining.borrow() && self.memory.ended.is_none() && !self.memory.released
        {
            self.memory.ended = Some(Trouble::new(node_shutdown::REASON, node_shutdown::MESSAGE));
        }
        if self.memory.deadline(&self.pod).is_some_and(|at| at <= now) {
            let text = "Pod was active on the node longer than the specified deadline";
            self.tell(None, "DeadlineExceeded", text);
            self.memory.ended = Some(Trouble::new("DeadlineExceeded", text));
        }
        if self.memory.pull_notice.is_some_and(|at| at <= now) {
            self.memory.pull_notice = None;
            self.say_pull_backoff();
        }
    }

    /// Takes the order to end the Pod, if there is one. One that ends already does so for its own reason, but in no
    /// more time than the order leaves.
    fn take_order(&mut self) {
        let Some(Order { trouble, grace, end, disruption }) = self.shared.evictions.take(&self.reference.uid) else {
            return;
        };
        if self.memory.released || self.is_over() {
            return;
        }
        self.memory.hurry = Some(self.memory.hurry.map_or(grace, |before| before.min(grace)));
        if self.memory.ended.is_some() {
            return;
        }
        if end == End::ForRoom {
            self.shared.events.warning(&self.pod, None, &trouble.reason, trouble.message.clone());
        }
        let generation = self.pod.metadata.generation;
        self.memory.disruption = disruption.map(|text| {
            let told = Trouble::new("TerminationByKubelet", text);
            Note { type_: DISRUPTION, trouble: Some(told), generation }
        });
        self.memory.leaves_nothing = end == End::ForRoom;
        self.memory.ended = Some(trouble);
    }

    /// Whether the Pod has come to its own end, of which only what is left remains to be removed.
    fn is_over(&self) -> bool {
        let finished = |spec| plan::finished(spec, &self.observed, self.probes.health()).is_some();
        self.memory.ended.is_none()
            && self.function.is_none()
            && self.observed.running().next().is_none()
            && self.pod.spec.as_ref().is_some_and(finished)
    }

    /// The goal, with no more grace than an order leaves.
    pub(super) fn hastened(&self, goal: Goal) -> Goal {
        match (goal, self.memory.hurry) {
            (Goal::End(grace), Some(most)) => Goal::End(grace.min(most)),
            _ => goal,
        }
    }

    fn say_pull_backoff(&mut self) {
        for (name, trouble) in &mut self.memory.waiting {
            if trouble.reason == "ErrImagePull"
                && let Some(container) = find(&self.pod, name)
            {
                let text = format!("Back-off pulling image {:?}", container.image.as_deref().unwrap_or_default());
                self.shared.events.normal(&self.pod, Some(name), "BackOff", text.clone());
                self.shared.events.warning(&self.pod, Some(name), "Failed", "Error: ImagePullBackOff");
                *trouble = Trouble::new("ImagePullBackOff", format!("{text}: ErrImagePull: {}", trouble.message));
            }
        }
    }

    /// Reads the message of an attempt that ended, and holds the next one back if it crashes in a loop.
    async fn digest_end(&mut self, status: &ContainerStatus, now: Timestamp) {
        let pod = self.pod.clone();
        let Some(container) = find(&pod, &status.name) else { return };
        let message = self.termination_message(&container, status).await;
        self.memory.messages.insert(status.id.clone(), message);
        if ephemeral::find(&pod, &status.name).is_some() {
            // Never started again, so nothing is to be held back.
            return;
        }
        let newest = self.observed.latest(&status.name).is_some_and(|l| l.id == status.id);
        if !newest || !matches!(self.goal(), Goal::Run) {
            return;
        }
        let max = self.shared.settings.max_restart_backoff;
        let backoff = self.memory.crashes.entry(status.name.clone()).or_default().clone();
        let until = backoff.until(status.finished_at.unwrap_or(now), max).filter(|until| *until > now);
        if let Some(until) = until {
            self.memory.holds.insert(status.name.clone(), until);
            if crate::pod::plan::would_restart(&pod, status, self.probes.health()) {
                let trouble = crash_loop(&status.name, &self.reference, backoff.delay());
                let text = format!(
                    "Back-off restarting failed container {} in pod {}_{}({})",
                    status.name, self.reference.name, self.reference.namespace, self.reference.uid
                );
                self.shared.events.warning(&pod, Some(&status.name), "BackOff", text);
                self.memory.waiting.insert(status.name.clone(), trouble);
            }
        }
    }

    async fn termination_message(&self, container: &Container, status: &ContainerStatus) -> String {
        let path = self.shared.termination_log(&self.reference.uid, &status.name, status.attempt);
        let written = read_bounded(&path);
        let from_log = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
        if !written.is_empty() || !from_log || status.exit_code == 0 {
            return written;
        }
        self.log_tail(&status.id).await
    }

    async fn log_tail(&self, id: &ContainerId) -> String {
        let options = LogOptions { tail: Some(MAX_LOG_LINES), ..LogOptions::default() };
        let mut text = Vec::new();
        match self.shared.runtime.logs(id, &options).await {
            Ok(mut chunks) => {
                while let Some(Ok(chunk)) = chunks.next().await {
                    text.extend_from_slice(&chunk.bytes);
                    let over = text.len().saturating_sub(MAX_LOG_BYTES);
                    text.drain(..over);
                }
            }
            Err(error) => return format!("Error reading the log of the container: {}", chain(&error)),
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(super) async fn stop_sandbox(&mut self, id: &SandboxId) {
        self.tell(None, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.");
        if let Err(error) = self.shared.runtime.stop_pod_sandbox(id).await {
            tracing::warn!(pod = %self.reference, sandbox = %id, error = chain(&error), "failed to stop sandbox");
            tokio::time::sleep(TRY_AGAIN).await;
        }
        self.relist().await;
    }

    pub(super) async fn stop(&mut self, containers: &[ContainerId], grace: Duration) {
        let names: Vec<_> = self.observed.running().map(|c| c.name.clone()).collect();
        if self.memory.killing.replace(grace).is_none_or(|before| grace < before) {
            for name in &names {
                self.tell(Some(name), "Killing", format!("Stopping container {name}"));
            }
        }
        // A later, shorter grace starts this step anew; the time already waited counts.
        let deadline = *self.memory.stop_by.get_or_insert_with(|| Instant::now() + grace);
        let deadline = deadline.min(Instant::now() + grace);
        self.memory.stop_by = Some(deadline);
        self.begin_endings(containers, deadline);
        let ended = tokio::select! {
            // Cancel-safe: one that has ended stays until it is taken.
            ended = self.endings.next() => ended,
            // Cancel-safe: the next turn takes the results and tells them.
            () = self.probes.changed() => return,
        };
        self.note_ending(ended).await;
    }

    pub(super) async fn remove_sandbox(&mut self, id: &SandboxId) {
        if let Err(error) = self.shared.runtime.remove_pod_sandbox(id).await {
            tracing::warn!(pod = %self.reference, sandbox = %id, error = chain(&error), "failed to remove old sandbox");
            tokio::time::sleep(TRY_AGAIN).await;
            return;
        }
        self.observed.drop_sandbox(id);
    }

    pub(super) async fn prune(&mut self, id: &ContainerId) {
        if let Err(error) = self.shared.runtime.remove_container(id).await {
            tracing::warn!(pod = %self.reference, container = %id, error = chain(&error), "failed to remove old attempt");
            tokio::time::sleep(TRY_AGAIN).await;
            return;
        }
        self.observed.drop_container(id);
        self.memory.digested.remove(id);
        self.memory.messages.remove(id);
        self.endings.forget(id);
        self.probes.forget(id);
    }

    /// Gives back what an ended Pod does not need any more. Containers stay for their logs while the Pod object exists
    /// and is not being deleted.
    pub(super) async fn release(&mut self) {
        // A node that leaves the host keeps no containers for their logs: nobody could ask for them.
        // Nor does a Pod that had to make room.
        if self.memory.leaves_nothing || self.gone || self.is_deleted() || *self.shared.draining.borrow() {
            self.remove_everything_once().await;
        } else {
            let ids: Vec<_> = self.observed.sandbox_ids().cloned().collect();
            for id in ids {
                if let Err(error) = self.shared.runtime.stop_pod_sandbox(&id).await {
                    tracing::warn!(pod = %self.reference, sandbox = %id, error = chain(&error), "failed to stop sandbox");
                    return tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
        if let Err(error) = self.shared.volumes.tear_down(&self.reference.uid).await {
            self.complain("FailedUnMount", chain(&error));
            return tokio::time::sleep(TRY_AGAIN).await;
        }
        if let Err(error) = self.shared.addresses.close_ports(&self.reference.uid).await {
            self.complain("FailedKillPod", chain(&error));
            return tokio::time::sleep(TRY_AGAIN).await;
        }
        self.memory.ports_open = false;
        self.memory.places = None;
        self.memory.next_refresh = None;
        self.memory.following = Following::default();
        self.memory.released = true;
    }

    /// A Warning event, unless it is what was said last: what is tried every second is not told every second.
    pub(super) fn complain(&mut self, reason: &str, text: String) {
        if self.memory.complaint.as_ref() != Some(&text) {
            self.shared.events.warning(&self.pod, None, reason, text.clone());
            self.memory.complaint = Some(text);
        }
    }

    /// Removes sandboxes and containers; tries until the runtime has done it.
    async fn remove_everything(&mut self) {
        let uid = self.reference.uid.clone();
        if self.seat.is_some() {
            kept::keep(&self.shared, &uid).await;
        }
        loop {
            match self.shared.remove_from_runtime(&uid).await {
                Ok(()) => return,
                Err(error) => {
                    self.complain("FailedKillPod", format!("failed to remove the Pod: {}", chain(&error)));
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    /// The last words: the final status is written, then the Pod object is deleted, then its going is awaited.
    pub(super) async fn take_leave(&mut self) -> Next {
        self.remove_everything_once().await;
        let status = self.status(self.goal());
        self.report(status, true);
        let leave = async {
            self.shared.publisher.flushed(&self.reference.uid).await;
            failpoint::hit("status");
            self.shared.publisher.delete(&self.reference).await;
        };
        let mut desired = self.desired.clone();
        tokio::select! {
            // Cancel-safe: once the object is gone there is nothing left to write.
            () = leave => {}
            _ = desired.wait_for(|d| d.gone) => {}
        }
        if desired.wait_for(|d| d.gone).await.is_err() {
            return Next::Done;
        }
        Next::Again
    }

    /// A Pod that had ended before it was deleted kept its containers for their logs.
    async fn remove_everything_once(&mut self) {
        if !self.memory.removed {
            self.remove_everything().await;
            // Not before: a release is interrupted when the Pod is to end sooner.
            self.memory.removed = true;
        }
    }

    /// The object is gone: nothing of the Pod stays on this node.
    pub(super) async fn clean_up(&mut self) -> Next {
        self.remove_everything_once().await;
        let uid = &self.reference.uid;
        if let Err(error) = self.shared.volumes.tear_down(uid).await {
            tracing::warn!(pod = %self.reference, error = chain(&error), "failed to remove the Pod's directory; trying again");
            tokio::time::sleep(TRY_AGAIN).await;
            return Next::Again;
        }
        if let Err(error) = self.shared.addresses.close_ports(uid).await {
            tracing::warn!(pod = %self.reference, error = chain(&error), "failed to close the Pod's ports; trying again");
            tokio::time::sleep(TRY_AGAIN).await;
            return Next::Again;
        }
        let given_back = match self.seat {
            None => self.shared.addresses.release(uid),
            Some(_) => self.shared.addresses.discard(uid),
        };
        if let Err(error) = given_back {
            tracing::warn!(pod = %self.reference, error = chain(&error), "failed to give the Pod's address back");
        }
        Next::Done
    }
}

/// At most [`MAX_MESSAGE`] bytes of the file, from its beginning. What the container left there is not trusted: only a
/// regular file is read.
fn read_bounded(path: &std::path::Path) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    let regular = std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file());
    if regular && let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_MESSAGE as u64).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
