//! What a worker has to do with probes and postStart hooks.

use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus as ApiContainerStatus};
use tokio::time::Instant;

use super::Worker;
use super::start::find;
use crate::pod::hooks;
use crate::pod::plan::{self, Goal};
use crate::pod::probes::machine::Resumed;
use crate::pod::probes::{Charge, has_any};
use crate::pod::qos::is_sidecar;
use crate::pod::status::Trouble;
use crate::runtime::handler::with_scheme;
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus};
use crate::telemetry::chain;

impl Worker {
    /// Begins to probe what runs, lets go of what does not, and takes the newest results.
    pub(super) fn probe(&mut self, goal: Goal) {
        let pod = self.pod.clone();
        let spec = pod.spec.as_ref().filter(|_| self.function.is_none());
        let sidecars = spec.iter().flat_map(|s| s.init_containers.iter().flatten()).filter(|c| is_sidecar(c));
        let lasting = spec.iter().flat_map(|s| &s.containers).chain(sidecars);
        for container in lasting.filter(|container| has_any(container)) {
            let runs = self.observed.current(&container.name).filter(|c| c.state == ContainerState::Running);
            if let Some(runs) = runs.filter(|runs| !self.probes.attends(&runs.id)).cloned() {
                let charge = self.charge(container, &runs);
                self.probes.attend(charge);
            }
        }
        if goal != Goal::Run {
            self.probes.quiet();
        }
        let running: std::collections::BTreeSet<_> = self.observed.running().map(|c| c.id.clone()).collect();
        self.probes.refresh(|id| running.contains(id));
    }

    fn charge(&self, container: &Container, runs: &ContainerStatus) -> Charge {
        Charge {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            reference: self.reference.clone(),
            container: container.clone(),
            id: runs.id.clone(),
            address: self.probed_address(),
            resumed: self.resumed(runs),
            freezes: self.seat.is_some(),
        }
    }

    /// Where the Pod is asked.
    pub(super) fn probed_address(&self) -> Option<IpAddr> {
        self.memory.addresses.first().copied().or_else(|| self.shared.facts.borrow().addresses.first().copied())
    }

    /// What an earlier process of this node told the API server of this very attempt.
    fn resumed(&self, runs: &ContainerStatus) -> Option<Resumed> {
        let id = with_scheme(&self.shared.runtime_name, &runs.id);
        let status = self.pod.status.as_ref()?;
        let mut told = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
        let told: &ApiContainerStatus = told.find(|c| c.container_id.as_ref() == Some(&id))?;
        told.state.as_ref()?.running.as_ref()?;
        let ran = Timestamp::now().duration_since(runs.started_at?);
        Some(Resumed {
            ran: Duration::try_from(ran).unwrap_or_default(),
            started: told.started == Some(true),
            ready: told.ready,
            spread: rand::random_range(0.0..1.0),
        })
    }

    /// Calls the hook of a container that has just been started. If it fails, the container is ended again.
    pub(super) async fn after_start(&mut self, name: &str, id: &ContainerId) {
        let pod = self.pod.clone();
        let Some(container) = find(&pod, name) else { return };
        let Some(handler) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref()) else {
            return;
        };
        let address = self.probed_address();
        let subject = hooks::Subject { runtime: self.shared.runtime.as_ref(), container: &container, id, address };
        let error = match hooks::run(subject, handler).await {
            Ok(None) => return,
            Ok(Some(warning)) => return self.shared.events.warning(&pod, None, hooks::FALLBACK, warning),
            Err(error) => error,
        };
        // What it said stays out of the event: it may hold what only the container's owner should see.
        tracing::warn!(pod = %self.reference, container = name, error = chain(&error), "postStart hook failed");
        self.shared.events.warning(&pod, Some(name), "FailedPostStartHook", "PostStartHook failed");
        self.tell(Some(name), "Killing", "FailedPostStartHook");
        if pod.spec.as_ref().is_some_and(|spec| plan::restarts_on_failure(spec, &container)) {
            self.memory.waiting.insert(name.to_owned(), Trouble::new("PostStartHookError", chain(&error)));
        }
        self.probes.hold_back(id);
        let grace = plan::grace(&pod);
        self.begin_endings(std::slice::from_ref(id), Instant::now() + grace);
    }
}
