//! Startup, liveness and readiness probes of containers, with a kubelet's semantics.
//!
//! ```text
//! worker --attend--> attendant (one task per running container with probes)
//!    ^                   |  '-- machine: which probe is due, and what its results mean (pure)
//!    |                   '----- attempt: http | tcp | grpc from the node, exec in the container
//!    '--Health (watched)-'
//! ```
//! A startup probe gates the other two; a liveness or startup probe that failed for good has the container killed; a
//! readiness probe says whether it is ready. The numbers and their defaults are those of "Configure Liveness, Readiness
//! and Startup Probes" in the Kubernetes documentation.
//!
//! A container that has just started is tried in quick succession for its first second, and failures of that second do
//! not count: it is ready as soon as it listens, and no sooner than with a kubelet, which first looks about a second
//! after a start. Whoever runs again finds the results in the Pod's status and goes on from there.

pub mod action;
mod anybody;
pub(super) mod attempt;
mod attendant;
mod grpc;
pub(super) mod http;
pub mod machine;
mod tally;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Container;
use tokio::sync::Notify;

pub use self::attempt::Bounds;
use self::attendant::Attendant;
pub(super) use self::attendant::Charge;
use self::machine::Results;
pub use self::tally::Tally;
use crate::runtime::types::ContainerId;

/// What probes say of the running containers of a Pod, and why attempts were ended. A container without probes has started
/// and is ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    results: BTreeMap<ContainerId, Results>,
    killed: BTreeSet<ContainerId>,
    replaced: BTreeSet<ContainerId>,
}

impl Health {
    /// What they say of one attempt.
    pub fn of(&self, id: &ContainerId) -> Results {
        self.results.get(id).copied().unwrap_or_default()
    }

    /// Whether the attempt was killed for its health: then it has failed, whatever its exit code. This is forgotten when
    /// the process is replaced, as by a kubelet.
    pub fn has_killed(&self, id: &ContainerId) -> bool {
        self.killed.contains(id)
    }

    /// Whether the attempt ends only for another to take its place: there will be one, whatever the policy. This is
    /// forgotten in the same way.
    pub fn is_replaced(&self, id: &ContainerId) -> bool {
        self.replaced.contains(id)
    }

    /// Notes that the attempt ends to be replaced.
    pub fn replace(&mut self, id: ContainerId) {
        self.replaced.insert(id);
    }

    /// Notes results.
    pub fn put(&mut self, id: ContainerId, results: Results) {
        self.results.insert(id, results);
    }

    /// Notes that the attempt is killed for its health.
    pub fn kill(&mut self, id: ContainerId) {
        self.killed.insert(id);
    }
}

/// Whether the container has a probe of any kind.
pub(super) fn has_any(container: &Container) -> bool {
    container.startup_probe.is_some() || container.liveness_probe.is_some() || container.readiness_probe.is_some()
}

/// The probes of one Pod, as its worker holds them. Dropping it ends them.
#[derive(Default)]
pub(super) struct Probes {
    attendants: BTreeMap<ContainerId, Attendant>,
    /// Attempts that count as not started whatever else is known of them.
    held_back: BTreeMap<ContainerId, Results>,
    woken: Arc<Notify>,
    health: Health,
}

impl Probes {
    /// Whether somebody attends to the container.
    pub(super) fn attends(&self, id: &ContainerId) -> bool {
        self.attendants.contains_key(id)
    }

    /// Begins to probe a container that runs.
    pub(super) fn attend(&mut self, charge: Charge) {
        let id = charge.id.clone();
        self.attendants.insert(id, Attendant::new(charge, Arc::clone(&self.woken)));
    }

    /// The attempt never counts as started: its postStart hook failed.
    pub(super) fn hold_back(&mut self, id: &ContainerId) {
        self.held_back.insert(id.clone(), Results { started: false, ready: false, failed: None });
    }

    /// Lets those go that do not run any more, and takes the newest results.
    pub(super) fn refresh(&mut self, runs: impl Fn(&ContainerId) -> bool) {
        self.attendants.retain(|id, _| runs(id));
        self.held_back.retain(|id, _| runs(id));
        let results = self.attendants.iter().map(|(id, attendant)| (id.clone(), attendant.results()));
        let mut all: BTreeMap<_, _> = results.collect();
        all.extend(self.held_back.clone());
        self.health.results = all;
    }

    /// The attempt is killed for its health.
    pub(super) fn kill(&mut self, id: &ContainerId) {
        self.health.kill(id.clone());
    }

    /// The attempt ends for another to take its place.
    pub(super) fn replace(&mut self, id: &ContainerId) {
        self.health.replace(id.clone());
    }

    /// The attempt was removed.
    pub(super) fn forget(&mut self, id: &ContainerId) {
        self.health.killed.remove(id);
        self.health.replaced.remove(id);
    }

    /// The Pod ends: nothing is killed for its liveness any more, and readiness goes on being told.
    pub(super) fn quiet(&self) {
        self.attendants.values().for_each(Attendant::quiet);
    }

    /// What was known at the last [`refresh`](Self::refresh).
    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    /// Returns when results have changed since it last returned. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.woken.notified().await;
    }
}
