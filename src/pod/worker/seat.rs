//! An environment of a function Pod, owned as a Pod is: the same steps, the same care, another place in the runtime.
//!
//! To the runtime an environment is a Pod by itself, with a key of its own as its UID (see [`crate::pod::crew`]); to the
//! API server it does not exist. Its volumes and its cgroup are its replica's, its status goes to the pool, and nobody
//! admits or deletes it but the pool.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::watch;

use super::memory::Memory;
use super::{Desired, Past, Signal, Worker};
use crate::pod::Shared;
use crate::pod::translate::Places;
use crate::runtime::types::{ContainerConfig, PodRef, Resources, SandboxConfig};

/// Where an environment is.
pub(in crate::pod) struct Seat {
    /// Its identity in the runtime.
    pub(in crate::pod) reference: PodRef,
    /// Its replica's cgroup, and the limits of that.
    pub(in crate::pod) cgroup: String,
    /// See `cgroup`.
    pub(in crate::pod) resources: Resources,
    /// Its replica's volumes.
    pub(in crate::pod) volumes: BTreeMap<String, (PathBuf, bool)>,
    /// Whether it may start; until then it is prepared only.
    pub(in crate::pod) go: watch::Receiver<bool>,
    /// Who wants to know how it is.
    pub(in crate::pod) status: watch::Sender<Option<PodStatus>>,
}

impl Seat {
    pub(super) fn place_sandbox(&self, config: &mut SandboxConfig) {
        config.pod = self.reference.clone();
        config.cgroup_parent.clone_from(&self.cgroup);
        config.resources = self.resources.clone();
    }

    pub(super) fn place_container(&self, config: &mut ContainerConfig) {
        config.pod = self.reference.clone();
        config.cgroup_parent.clone_from(&self.cgroup);
    }

    /// What stands for its UID.
    pub(super) fn key(&self) -> &str {
        &self.reference.uid
    }

    /// Whether its containers are made and not started.
    pub(super) fn is_held(&self) -> bool {
        !*self.go.borrow()
    }

    /// Woken once it may start.
    pub(super) async fn let_go(&mut self) {
        if self.go.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(super) fn report(&self, status: &PodStatus) {
        self.status.send_replace(Some(status.clone()));
    }
}

impl Worker {
    /// A worker for an environment; the Pod in `desired` is the one that [`crate::pod::crew`] derived.
    pub(in crate::pod) fn of_environment(
        shared: Arc<Shared>,
        seat: Seat,
        desired: watch::Receiver<Desired>,
        signal: watch::Receiver<Signal>,
        past: Past,
    ) -> Self {
        let worker = Self::plain(shared, desired, signal, past);
        let places = Places { volumes: seat.volumes.clone(), ..Places::default() };
        Self {
            reference: seat.reference.clone(),
            memory: Memory { places: Some(places), ..worker.memory },
            seat: Some(seat),
            ..worker
        }
    }

    /// A Normal event on the Pod, or on one of its containers. Those of environments would only repeat each other.
    pub(super) fn tell(&self, container: Option<&str>, reason: &str, note: impl Into<String>) {
        if self.seat.is_none() {
            self.shared.events.normal(&self.pod, container, reason, note);
        }
    }
}
