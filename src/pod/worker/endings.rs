//! Containers that are being ended, a task each: the preStop hook, the turn of a sidecar, the stop signal, the kill.
//!
//! All of it happens within one grace period that begins when the end is decided, as a kubelet counts it. The worker
//! goes on meanwhile: it sees who has ended, tells readiness, and may shorten the grace.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::start::find;
use crate::pod::hooks;
use crate::pod::plan;
use crate::pod::probes::machine::Kind;
use crate::pod::qos::is_sidecar;
use crate::runtime::types::ContainerId;
use crate::runtime::{Runtime, RuntimeError};
use crate::telemetry::chain;

/// Time to end after the stop signal that a container has whatever its hook took of the grace (a kubelet's value).
const LEAST: Duration = Duration::from_secs(2);

/// The ends under way. Dropping it leaves the containers as they are.
#[derive(Default)]
pub(super) struct Endings {
    tasks: JoinSet<(ContainerId, Result<(), RuntimeError>)>,
    under_way: BTreeMap<ContainerId, watch::Sender<Instant>>,
    ids: BTreeSet<ContainerId>,
    /// Told once the container has ended.
    ended: BTreeMap<ContainerId, CancellationToken>,
    /// Whose hook was called: never twice.
    hooked: BTreeSet<ContainerId>,
}

/// One end.
struct Ending {
    runtime: Arc<dyn Runtime>,
    id: ContainerId,
    by: watch::Receiver<Instant>,
    /// The preStop hook, if it is to be called.
    hook: Option<BoxFuture<'static, ()>>,
    /// Whose ends come first.
    after: Vec<CancellationToken>,
}

impl Endings {
    /// Those that are being ended.
    pub(super) fn ids(&self) -> &BTreeSet<ContainerId> {
        &self.ids
    }

    /// The next that has ended, or could not be ended. Pends while none is under way. Cancel-safe.
    pub(super) async fn next(&mut self) -> (ContainerId, Result<(), RuntimeError>) {
        match self.tasks.join_next().await {
            Some(Ok((id, ended))) => {
                self.under_way.remove(&id);
                self.ids.remove(&id);
                if ended.is_ok() {
                    self.token(&id).cancel();
                }
                (id, ended)
            }
            // Whoever replaces this worker finds everything anew.
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Some(Err(_)) | None => std::future::pending().await,
        }
    }

    /// The container was removed.
    pub(super) fn forget(&mut self, id: &ContainerId) {
        self.ended.remove(id);
        self.hooked.remove(id);
    }

    fn token(&mut self, id: &ContainerId) -> CancellationToken {
        self.ended.entry(id.clone()).or_default().clone()
    }

    /// Begins an end, or has one under way end sooner.
    fn begin(&mut self, ending: impl FnOnce(watch::Receiver<Instant>) -> Ending, id: &ContainerId, by: Instant) {
        if let Some(deadline) = self.under_way.get(id) {
            deadline.send_if_modified(|deadline| std::mem::replace(deadline, by.min(*deadline)) > by);
            return;
        }
        let (deadline, seen) = watch::channel(by);
        self.tasks.spawn(ending(seen).run());
        self.under_way.insert(id.clone(), deadline);
        self.ids.insert(id.clone());
    }
}

impl Ending {
    async fn run(mut self) -> (ContainerId, Result<(), RuntimeError>) {
        let waits = self.hook.is_some() || !self.after.is_empty();
        if let Some(hook) = self.hook.take() {
            within(&mut self.by, hook).await;
        }
        let after = std::mem::take(&mut self.after);
        let turn = async {
            for ended in after {
                ended.cancelled().await;
            }
        };
        within(&mut self.by, turn).await;
        let deadline = *self.by.borrow_and_update();
        let mut deadline = if waits { deadline.max(Instant::now() + LEAST) } else { deadline };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let stop = self.runtime.stop_container(&self.id, left);
            tokio::select! {
                ended = stop => return (self.id.clone(), ended),
                // Cancel-safe: a verb that is dropped is called again, with less grace.
                Ok(()) = self.by.changed() => deadline = *self.by.borrow_and_update(),
            }
        }
    }
}

/// Waits for it, but not beyond the deadline, which may move.
async fn within(by: &mut watch::Receiver<Instant>, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    loop {
        let deadline = *by.borrow_and_update();
        tokio::select! {
            biased;
            () = &mut work => return,
            // Cancel-safe: a timer.
            () = sleep_until(deadline) => return,
            // Cancel-safe: a watch channel keeps its value.
            Ok(()) = by.changed() => {}
        }
    }
}

impl Worker {
    /// Begins to end these containers by then, or has them end sooner.
    pub(super) fn begin_endings(&mut self, containers: &[ContainerId], by: Instant) {
        self.begin(containers, by, true);
    }

    /// Every container begins anew, since one ended with a code that a rule names: what runs has the least time there is
    /// and no hook, as with a kubelet.
    pub(super) fn reset(&mut self, containers: &[ContainerId]) {
        for id in containers {
            let name = self.name_of(id);
            self.tell(Some(&name), "Killing", format!("Stopping container {name}, every container is restarted"));
        }
        self.begin(containers, Instant::now() + LEAST, false);
    }

    fn begin(&mut self, containers: &[ContainerId], by: Instant, hooks: bool) {
        let named: Vec<_> = containers.iter().map(|id| (id.clone(), self.name_of(id))).collect();
        for (id, name) in &named {
            let after = self.comes_after(name, &named);
            let (pod, shared, address) = (self.pod.clone(), self.shared.clone(), self.probed_address());
            let first = !self.endings.ids.contains(id) && by > Instant::now() && !self.endings.hooked.contains(id);
            let container = find(&pod, name).map(std::borrow::Cow::into_owned);
            let hook = container.filter(|c| hooks && first && has_hook(c)).map(|container| {
                let id = id.clone();
                let call = async move { call_hook(&shared, (&pod, &container), &id, address).await };
                Box::pin(call) as BoxFuture<'static, ()>
            });
            if hook.is_some() {
                self.endings.hooked.insert(id.clone());
            }
            let runtime: Arc<dyn Runtime> = self.shared.runtime.clone();
            self.endings.begin(|by| Ending { runtime, id: id.clone(), by, hook, after }, id, by);
        }
    }

    fn name_of(&self, id: &ContainerId) -> String {
        self.observed.containers().find(|c| c.id == *id).map(|c| c.name.clone()).unwrap_or_default()
    }

    /// Whose ends a sidecar waits for: those of the main containers and of the sidecars that were started after it
    /// (KEP-753).
    fn comes_after(&mut self, name: &str, ending: &[(ContainerId, String)]) -> Vec<CancellationToken> {
        let pod = self.pod.clone();
        let Some(own) = rank(&pod, name) else { return Vec::new() };
        let later = ending.iter().filter(|(_, other)| rank(&pod, other).is_none_or(|rank| rank > own));
        later.map(|(id, _)| self.endings.token(id)).collect()
    }

    /// Kills a container whose probe has failed for good; it has the grace that the probe gives.
    pub(super) fn kill(&mut self, id: &ContainerId, kind: Kind) {
        let pod = self.pod.clone();
        let name = self.name_of(id);
        let Some(container) = find(&pod, &name) else { return };
        let probe = match kind {
            Kind::Startup => container.startup_probe.as_ref(),
            Kind::Liveness | Kind::Readiness => container.liveness_probe.as_ref(),
        };
        let own = probe.and_then(|probe| probe.termination_grace_period_seconds);
        let own = own.filter(|seconds| *seconds >= 0 && !self.is_deleted());
        let grace = own.map_or_else(|| plan::grace(&pod), plan::honoured);
        let again = pod.spec.as_ref().is_some_and(|spec| plan::restarts_on_failure(spec, &container));
        let (what, then) = (kind.name().to_lowercase(), if again { ", will be restarted" } else { "" });
        self.tell(Some(&name), "Killing", format!("Container {name} failed {what} probe{then}"));
        self.probes.kill(id);
        self.begin_endings(std::slice::from_ref(id), Instant::now() + grace);
    }

    /// Ends a container for one of another image to take its place.
    pub(super) fn give_way(&mut self, id: &ContainerId) {
        let name = self.name_of(id);
        self.tell(Some(&name), "Killing", format!("Container {name} definition changed, will be restarted"));
        self.probes.replace(id);
        self.begin_endings(std::slice::from_ref(id), Instant::now() + plan::grace(&self.pod));
    }

    /// A container has ended, or would not.
    pub(super) async fn note_ending(&mut self, (id, ended): (ContainerId, Result<(), RuntimeError>)) {
        crate::failpoint::hit("stop");
        self.look_at_container(&id).await;
        if let Err(error) = ended {
            self.complain("FailedKillPod", chain(&error));
            tokio::time::sleep(super::finish::TRY_AGAIN).await;
        }
    }
}

fn has_hook(container: &Container) -> bool {
    container.lifecycle.as_ref().is_some_and(|lifecycle| lifecycle.pre_stop.is_some())
}

/// The place of a sidecar among the init containers; `None` for any other container.
fn rank(pod: &Pod, name: &str) -> Option<usize> {
    let mut init = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    init.position(|container| container.name == name && is_sidecar(container))
}

async fn call_hook(
    shared: &crate::pod::Shared,
    (pod, container): (&Pod, &Container),
    id: &ContainerId,
    address: Option<std::net::IpAddr>,
) {
    let Some(handler) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref()) else { return };
    let subject = hooks::Subject { runtime: shared.runtime.as_ref(), container, id, address };
    match hooks::run(subject, handler).await {
        Ok(None) => {}
        Ok(Some(warning)) => shared.events.warning(pod, None, hooks::FALLBACK, warning),
        Err(error) => {
            // What it said stays in the node's log: it may hold what only the container's owner should see.
            let (pod_name, name, error) = (&pod.metadata.name, &container.name, chain(&error));
            tracing::warn!(pod = pod_name, container = name, error, "preStop hook failed");
            shared.events.warning(pod, Some(name), "FailedPreStopHook", "PreStopHook failed");
        }
    }
}
