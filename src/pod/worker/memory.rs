//! What a worker remembers between turns. All of it can be lost: a restart starts afresh, as a kubelet does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::time::Instant;

use super::resize::Book;
use super::start::find;
use crate::pod::backoff::Backoff;
use crate::pod::inputs::following::Following;
use crate::pod::resize::Note;
use crate::pod::status::Trouble;
use crate::pod::translate::Places;
use crate::runtime::types::{ContainerConfig, ContainerId};

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Volumes and files, once they are there.
    pub(super) places: Option<Places>,
    /// Sandbox and volumes were given back.
    pub(super) released: bool,
    /// Why this node ended the Pod.
    pub(super) ended: Option<Trouble>,
    /// The most grace that it has then, if there is no time to lose.
    pub(super) hurry: Option<Duration>,
    /// It ended to make room: its containers go at once.
    pub(super) leaves_nothing: bool,
    /// That it ended for others' sake.
    pub(super) disruption: Option<Note>,
    /// The Pod's addresses; none on the host's network.
    pub(super) addresses: Vec<IpAddr>,
    /// Its ports on the host lead to it.
    pub(super) ports_open: bool,
    /// Why containers wait.
    pub(super) waiting: BTreeMap<String, Trouble>,
    /// Until when containers are not tried.
    pub(super) holds: BTreeMap<String, Timestamp>,
    /// Until when volumes and sandbox are not tried.
    pub(super) pod_hold: Option<Timestamp>,
    /// How often in a row volumes could not be set up.
    pub(super) mount_failures: u32,
    /// Crash loops.
    pub(super) crashes: BTreeMap<String, Backoff>,
    /// Failing pulls.
    pub(super) pulls: BTreeMap<String, Backoff>,
    /// When `ErrImagePull` turns into `ImagePullBackOff`.
    pub(super) pull_notice: Option<Timestamp>,
    /// Lowest next attempt numbers.
    pub(super) floors: BTreeMap<String, u32>,
    /// Containers that were made in advance, and what of.
    pub(super) made: BTreeMap<String, (ContainerId, ContainerConfig)>,
    /// Termination messages, and which attempts' ends were seen.
    pub(super) messages: BTreeMap<ContainerId, String>,
    /// Attempts whose end was noted.
    pub(super) digested: BTreeSet<ContainerId>,
    /// The status last handed to the publisher.
    pub(super) sent: Option<PodStatus>,
    /// When that was.
    pub(super) sent_at: Option<Instant>,
    /// When to write the status again since the API server's differs.
    pub(super) reassert_at: Option<Instant>,
    /// When a token or other volume content must be renewed.
    pub(super) next_refresh: Option<Instant>,
    /// The objects whose changes the volumes are to show at once.
    pub(super) following: Following,
    /// When this node first saw the Pod.
    pub(super) start_time: Timestamp,
    /// The grace the containers were last told.
    pub(super) killing: Option<Duration>,
    /// When stopping processes are killed.
    pub(super) stop_by: Option<Instant>,
    /// Until when a function that is being deleted takes calls.
    pub(super) farewell: Option<Instant>,
    /// The trouble with ending the Pod that was told last.
    pub(super) complaint: Option<String>,
    /// Containers and sandboxes were removed.
    pub(super) removed: bool,
    /// How far its resources are.
    pub(super) resize: Book,
    /// The event count at the last look.
    pub(super) events_seen: u64,
}

impl Memory {
    /// What was held back for an image that the spec does not name any more may be tried at once.
    pub(super) fn forgive(&mut self, before: &Pod, now: &Pod) {
        let image = |pod: &Pod, name: &str| find(pod, name).and_then(|container| container.image.clone());
        let mut held: Vec<String> = self.crashes.keys().chain(self.pulls.keys()).cloned().collect();
        held.retain(|name| image(before, name) != image(now, name));
        for name in held {
            self.crashes.remove(&name);
            self.pulls.remove(&name);
            self.holds.remove(&name);
            self.waiting.remove(&name);
        }
    }

    /// From what the API server knows: start time, address, and how often containers were started.
    pub(super) fn new(pod: &Pod, now: Timestamp) -> Self {
        let status = pod.status.as_ref();
        let lists = status
            .iter()
            .flat_map(|s| [&s.init_container_statuses, &s.container_statuses, &s.ephemeral_container_statuses]);
        let known = lists.flat_map(|l| l.iter().flatten()).filter(|c| c.container_id.is_some());
        let floors = known.map(|c| (c.name.clone(), u32::try_from(c.restart_count).map_or(0, |n| n + 1))).collect();
        let told = status.iter().flat_map(|s| s.pod_ips.iter().flatten()).filter_map(|ip| ip.ip.parse().ok());
        let on_host = pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true));
        Self {
            floors,
            resize: Book::of(pod),
            addresses: told.filter(|_| !on_host).collect(),
            start_time: status.and_then(|s| s.start_time.as_ref()).map_or(now, |t| t.0),
            ..Self::default()
        }
    }

    /// When `activeDeadlineSeconds` ends the Pod.
    pub(super) fn deadline(&self, pod: &Pod) -> Option<Timestamp> {
        if self.ended.is_some() || self.released {
            return None;
        }
        let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
        self.start_time.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?)).ok()
    }
}
