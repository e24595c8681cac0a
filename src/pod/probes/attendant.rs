//! The task that probes one running container.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::action::{self, Action, ActionError};
use super::attempt::{Place, Tried, attempt};
use super::machine::{Kind, Machine, Note, Outcome, Results, Resumed};
use crate::pod::Shared;
use crate::runtime::types::{ContainerId, PodRef};
use crate::shutdown::owned;

/// A running container, and what its probes need to know.
pub(in crate::pod) struct Charge {
    pub(in crate::pod) shared: Arc<Shared>,
    pub(in crate::pod) pod: Arc<Pod>,
    /// As the runtime knows its Pod.
    pub(in crate::pod) reference: PodRef,
    pub(in crate::pod) container: Container,
    pub(in crate::pod) id: ContainerId,
    /// The Pod's, or the node's on the host's network.
    pub(in crate::pod) address: Option<IpAddr>,
    /// What an earlier process has found out.
    pub(in crate::pod) resumed: Option<Resumed>,
    /// It may be frozen now and then, and is not asked anything then.
    pub(in crate::pod) freezes: bool,
}

/// The task, and the lines to it. Dropping it ends the task.
pub(super) struct Attendant {
    _task: AbortOnDropHandle<()>,
    results: watch::Receiver<Results>,
    quiet: watch::Sender<bool>,
}

/// What a try has found.
type Found = (Kind, Tried);

impl Attendant {
    pub(super) fn new(charge: Charge, woken: Arc<Notify>) -> Self {
        let round = Round::new(charge);
        let (sender, results) = watch::channel(round.machine.results());
        let (quiet, quieted) = watch::channel(false);
        Self { _task: owned(round.attend(sender, quieted, woken)), results, quiet }
    }

    pub(super) fn results(&self) -> Results {
        *self.results.borrow()
    }

    /// The Pod ends.
    pub(super) fn quiet(&self) {
        self.quiet.send_if_modified(|quiet| !std::mem::replace(quiet, true));
    }
}

/// The task's own.
struct Round {
    charge: Arc<Charge>,
    machine: Machine,
    began: Instant,
    probes: [Option<Arc<Asked>>; 3],
}

/// One probe, ready to be tried.
struct Asked {
    action: Result<Action, ActionError>,
    timeout: Duration,
}

impl Round {
    fn new(charge: Charge) -> Self {
        let container = &charge.container;
        let specs = [&container.startup_probe, &container.liveness_probe, &container.readiness_probe];
        let paces = specs.map(|probe| probe.as_ref().map(action::pace));
        let asked = |probe: &Probe| {
            let action = action::of_probe(probe, container, charge.address);
            Arc::new(Asked { action, timeout: action::pace(probe).timeout })
        };
        let probes = specs.map(|probe| probe.as_ref().map(asked));
        let (machine, ran) = match charge.resumed {
            Some(before) => (Machine::resumed(paces, before), before.ran),
            None => (Machine::new(paces), Duration::ZERO),
        };
        let now = Instant::now();
        Self { machine, began: now.checked_sub(ran).unwrap_or(now), probes, charge: Arc::new(charge) }
    }

    /// Tries whatever is due until nothing will be any more.
    async fn attend(mut self, results: watch::Sender<Results>, mut quiet: watch::Receiver<bool>, woken: Arc<Notify>) {
        let mut tries: FuturesUnordered<BoxFuture<'static, Found>> = FuturesUnordered::new();
        while !self.machine.is_over() || !tries.is_empty() {
            let due = self.machine.due();
            let at = due.map_or(self.began, |(at, _)| self.began + at);
            tokio::select! {
                // Cancel-safe: a try that has ended stays until it is taken.
                Some((kind, tried)) = tries.next() => self.note(kind, tried),
                // Cancel-safe: a timer.
                () = tokio::time::sleep_until(at), if due.is_some() => {
                    if let Some((_, kind)) = due {
                        self.machine.begin(kind);
                        tries.extend(self.try_once(kind));
                    }
                }
                // Cancel-safe: a watch channel keeps its value. The worker outlives this task.
                Ok(()) = quiet.changed() => self.machine.quiet(),
            }
            let now = self.machine.results();
            if results.send_if_modified(|before| std::mem::replace(before, now) != now) {
                woken.notify_one();
            }
        }
    }

    fn try_once(&self, kind: Kind) -> Option<BoxFuture<'static, Found>> {
        let asked = Arc::clone(self.probes[kind as usize].as_ref()?);
        let charge = Arc::clone(&self.charge);
        Some(Box::pin(async move {
            let tried = match &asked.action {
                Ok(action) => charge.ask(action, asked.timeout).await,
                Err(error) => Tried::Unknown(error.to_string()),
            };
            (kind, tried)
        }))
    }

    fn note(&mut self, kind: Kind, tried: Tried) {
        let (outcome, told) = match &tried {
            Tried::Success => (Outcome::Success, None),
            Tried::Warning(text) => (Outcome::Success, Some(("ProbeWarning", "probe warning", text))),
            Tried::Failure(text) => (Outcome::Failure, Some(("Unhealthy", "probe failed", text))),
            Tried::Unknown(text) => {
                (Outcome::Unknown, Some(("Unhealthy", "probe errored and resulted in unknown state", text)))
            }
        };
        if self.machine.end(kind, outcome, self.began.elapsed()) == Note::TooEarly {
            return;
        }
        let Charge { shared, pod, reference, container, .. } = &*self.charge;
        shared.directory.probes.note(reference, &container.name, kind, outcome);
        if let Some((reason, what, text)) = told.filter(|(_, _, text)| !text.is_empty() || outcome != Outcome::Unknown)
        {
            let text = format!("{} {what}: {text}", kind.name());
            shared.events.warning(pod, Some(&container.name), reason, text);
        }
    }
}

impl Charge {
    async fn ask(&self, action: &Action, limit: Duration) -> Tried {
        if self.is_frozen().await {
            return Tried::Unknown(String::new());
        }
        let runtime = self.shared.runtime.as_ref();
        let place = Place { runtime, container: &self.id, bounds: &self.shared.probes };
        let tried = attempt(place, action, limit).await;
        if tried != Tried::Success && self.is_frozen().await {
            // It was frozen while it was asked.
            return Tried::Unknown(String::new());
        }
        tried
    }

    async fn is_frozen(&self) -> bool {
        self.freezes && self.shared.runtime.container_status(&self.id).await.is_ok_and(|status| status.frozen)
    }
}
