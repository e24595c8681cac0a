//! A Pod that runs is given other resources: what it asks for is sought, what it was granted is carried out.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use tokio::time::Instant;

use super::Worker;
use crate::pod::admission::Claim;
use crate::pod::backoff;
use crate::pod::plan::{self, Goal, Step};
use crate::pod::qos;
use crate::pod::resize::{self, Allocation, Change, IN_PROGRESS, MemoryStep, Note, Operation, PENDING};
use crate::pod::status::Trouble;
use crate::runtime::stats::{Limits, SandboxStats, StatsScope};
use crate::runtime::types::{ContainerId, Resources};
use crate::telemetry::chain;

/// How far the resources of a Pod are.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// What it was granted last; `None` until it was let in, and of what is never resized.
    allocation: Option<Allocation>,
    /// Why it does not have what it asks for, and since when it asks.
    pending: Option<(Note, Timestamp)>,
    /// What was granted is being carried out.
    progress: Option<Note>,
    /// What the Pod as a whole was given last; `None` is not known, and right unless a resize was under way.
    pod_limits: Option<Resources>,
    /// Nothing is tried before.
    pub(super) retry_at: Option<Timestamp>,
    /// It was said that the Pod is counted.
    settled: bool,
}

impl Book {
    /// From what the API server was told.
    pub(super) fn of(pod: &Pod) -> Self {
        let told = |type_: &'static str| {
            let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            let condition = conditions.find(|condition| condition.type_ == type_)?;
            let trouble =
                condition.reason.clone().map(|r| Trouble::new(r, condition.message.clone().unwrap_or_default()));
            let since = condition.last_transition_time.as_ref().map(|time| time.0);
            Some((Note { type_, trouble, generation: condition.observed_generation }, since))
        };
        let progress = told(IN_PROGRESS).map(|(note, _)| note);
        let pending = told(PENDING).map(|(note, since)| (note, since.unwrap_or(Timestamp::UNIX_EPOCH)));
        Self { allocation: Allocation::reported(pod), pending, progress, ..Self::default() }
    }

    /// The Pod was let in with this.
    pub(super) fn admitted(&mut self, spec: &PodSpec) {
        self.allocation.get_or_insert_with(|| Allocation::of(spec));
    }

    /// What the status says of it.
    pub(super) fn notes(&self) -> Vec<Note> {
        self.pending.iter().map(|(note, _)| note).chain(&self.progress).cloned().collect()
    }
}

impl Worker {
    /// The Pod with what it was granted in place of what it asks for.
    pub(super) fn granted(&self, pod: Arc<Pod>) -> Arc<Pod> {
        let allocation = self.memory.resize.allocation.as_ref().filter(|_| self.is_resizable());
        match (allocation, &pod.spec) {
            (Some(granted), Some(spec)) if !granted.is_of(spec) => {
                Arc::new(Pod { spec: Some(granted.over(spec)), ..(*pod).clone() })
            }
            _ => pod,
        }
    }

    /// A function is as large as its replicas are, and those are made anew when their Pod changes.
    fn is_resizable(&self) -> bool {
        self.seat.is_none() && self.function.is_none()
    }

    /// Asks for what the Pod's spec says beyond what was granted, and takes it where there is room.
    pub(super) fn seek_resources(&mut self, goal: Goal) {
        if self.seat.is_none() && !std::mem::replace(&mut self.memory.resize.settled, true) {
            self.shared.admission.settle(&self.reference.uid);
        }
        let desired = self.desired.borrow().pod.clone();
        let (Some(spec), Some(granted)) = (&desired.spec, &self.memory.resize.allocation) else { return };
        let uid = self.reference.uid.clone();
        if goal != Goal::Run || !self.is_resizable() || granted.is_of(spec) {
            if self.memory.resize.pending.take().is_some() {
                self.shared.admission.withdraw(&uid);
            }
            return;
        }
        if !self.shared.admission.is_settled(&uid) {
            return;
        }
        let now = Timestamp::now();
        let since = self.memory.resize.pending.as_ref().map_or(now, |(_, since)| *since);
        let claim = Claim {
            requests: qos::pod_requests(spec),
            priority: spec.priority.unwrap_or(0),
            guaranteed: qos::qos_class(spec) == "Guaranteed",
            since,
        };
        let generation = desired.metadata.generation;
        match self.shared.admission.resize(&uid, claim, &self.shared.node_view().allocatable) {
            Ok(()) => {
                let progress = Note { type_: IN_PROGRESS, trouble: None, generation };
                let book = &mut self.memory.resize;
                book.allocation = Some(Allocation::of(spec));
                (book.pending, book.progress, book.retry_at) = (None, Some(progress), None);
                // Pools give back what they have borrowed of it while it grows.
                self.shared.capacity.adopt(&uid, spec);
                self.tell(None, "ResizeStarted", resize::told("Pod resize started", &desired, generation, None));
                self.pod = desired;
            }
            Err(trouble) => self.has_to_wait(&desired, trouble, since),
        }
    }

    fn has_to_wait(&mut self, desired: &Pod, trouble: Trouble, since: Timestamp) {
        let generation = desired.metadata.generation;
        let known = self.memory.resize.pending.as_ref().map(|(note, _)| note);
        let reason = |note: &Note| note.trouble.as_ref().map(|trouble| trouble.reason.clone());
        if known.is_none_or(|n| n.generation != generation || reason(n).as_deref() != Some(&trouble.reason)) {
            let what = format!("Pod resize {}", trouble.reason);
            let text = resize::told(&what, desired, generation, Some(&trouble.message));
            self.shared.events.warning(desired, None, &format!("Resize{}", trouble.reason), text);
        }
        self.memory.resize.pending = Some((Note { type_: PENDING, trouble: Some(trouble), generation }, since));
    }

    /// The step that carries out what was granted, before any other is thought of; notes when all is done.
    pub(super) fn resize_step(&mut self, goal: Goal) -> Option<Step> {
        let spec = self.pod.spec.as_ref()?;
        let known = self.memory.resize.allocation.is_some() && self.is_resizable();
        if goal != Goal::Run || !known || self.observed.ready_sandbox().is_none() {
            // Nobody is to be woken for it.
            self.memory.resize.retry_at = None;
            return None;
        }
        let pod_wants = self.pod_limits_wanted(spec).is_some();
        if !pod_wants && resize::changes(spec, &self.observed, &self.shared.host).is_empty() {
            if let Some(done) = self.memory.resize.progress.take() {
                let text = resize::told("Pod resize completed", &self.pod, done.generation, None);
                self.tell(None, "ResizeCompleted", text);
            }
            self.memory.resize.retry_at = None;
            return None;
        }
        let generation = self.pod.metadata.generation;
        let book = &mut self.memory.resize;
        book.progress.get_or_insert(Note { type_: IN_PROGRESS, trouble: None, generation });
        book.retry_at.is_none_or(|at| at <= Timestamp::now()).then_some(Step::Resize)
    }

    /// The limits of the Pod as a whole, unless they are in effect.
    fn pod_limits_wanted(&self, spec: &PodSpec) -> Option<Resources> {
        let mut wanted = qos::pod_resources(spec, self.shared.host.cpu_quota);
        wanted.pids_limit = self.shared.host.pids_limit;
        let book = &self.memory.resize;
        let unlike = book.pod_limits.as_ref().map_or(book.progress.is_some(), |given| *given != wanted);
        unlike.then_some(wanted)
    }

    /// Carries it out; what fails is told, and tried again later.
    pub(super) async fn resize(&mut self) {
        let Err(message) = self.try_resize().await else { return };
        let until = Timestamp::now() + backoff::RETRY;
        let book = &mut self.memory.resize;
        book.retry_at = Some(until);
        let Some(progress) = &mut book.progress else { return };
        let trouble = Some(Trouble::new("Error", message.clone()));
        if progress.trouble != trouble {
            progress.trouble = trouble;
            let text = resize::told("Pod resize error", &self.pod, progress.generation, Some(&message));
            self.shared.events.warning(&self.pod, None, "ResizeError", text);
        }
    }

    async fn try_resize(&mut self) -> Result<(), String> {
        let pod = self.pod.clone();
        let Some(spec) = &pod.spec else { return Ok(()) };
        let changes = resize::changes(spec, &self.observed, &self.shared.host);
        self.change_limits(spec, &changes).await?;
        for change in &changes {
            if let Change::Replace { id, name, attempt } = change {
                self.replace(id, name, *attempt).await?;
            }
        }
        let left = resize::changes(spec, &self.observed, &self.shared.host);
        match left.first() {
            // An engine may pass over a limit that its kernel does not know.
            Some(change) => Err(format!("container {:?} does not have its limits yet", change.container())),
            None => Ok(()),
        }
    }

    async fn change_limits(&mut self, spec: &PodSpec, changes: &[Change]) -> Result<(), String> {
        let wanted = self.pod_limits_wanted(spec);
        let updates = changes.iter().any(|change| matches!(change, Change::Update { .. }));
        let Some(sandbox) = self.observed.ready_sandbox().map(|s| s.id.clone()) else { return Ok(()) };
        if wanted.is_none() && !updates {
            return Ok(());
        }
        let wanted = wanted.unwrap_or_else(|| qos::pod_resources(spec, self.shared.host.cpu_quota));
        let all = self.shared.runtime.list_pod_sandbox_stats(StatsScope::All).await.map_err(|error| chain(&error))?;
        let stats = all.into_iter().find(|stats| stats.id == sandbox);
        let stats =
            stats.ok_or_else(|| format!("unable to read memory usage for pod {:?}", self.reference.to_string()))?;
        let now = stats.usage.limits.map(resources).unwrap_or_default();
        if let Some(complaint) = resize::too_low(&memory_steps(&now, &wanted, &stats, changes)) {
            return Err(complaint);
        }
        for operation in resize::operations(&now, &wanted, changes) {
            match operation {
                Operation::Pod(limits) => self.shared.runtime.update_pod_sandbox_resources(&sandbox, &limits).await,
                Operation::Container(id, limits) => {
                    let done = self.shared.runtime.update_container_resources(&id, &limits).await;
                    self.look_at_container(&id).await;
                    done
                }
            }
            .map_err(|error| chain(&error))?;
        }
        self.memory.resize.pod_limits = Some(wanted);
        Ok(())
    }

    /// Another attempt in place of this one. It is made first: should this process end in between, what is found then
    /// says that the container is to go on, whatever its restart policy makes of how it ended.
    async fn replace(&mut self, id: &ContainerId, name: &str, attempt: u32) -> Result<(), String> {
        if self.observed.latest(name).is_none_or(|latest| latest.attempt != attempt) {
            self.create(name, attempt).await;
        }
        if self.observed.latest(name).is_none_or(|latest| latest.attempt != attempt) {
            return Err(format!("container {name:?} cannot be made anew yet"));
        }
        self.tell(Some(name), "Killing", format!("Container {name} resize requires restart"));
        // As any end: the hook first, and all of it within the grace.
        self.begin_endings(std::slice::from_ref(id), Instant::now() + plan::grace(&self.pod));
        loop {
            // Dropped in here the end goes on, and is taken by whoever waits next.
            let (ended, outcome) = self.endings.next().await;
            let failed = outcome.as_ref().err().map(|error| chain(error));
            let is_this = ended == *id;
            self.note_ending((ended, outcome)).await;
            if is_this {
                return failed.map_or(Ok(()), Err);
            }
        }
    }
}

fn resources(limits: Limits) -> Resources {
    let whole = |limit: Option<u64>| limit.and_then(|limit| i64::try_from(limit).ok());
    Resources {
        cpu_shares: whole(limits.cpu_shares),
        cpu_quota: whole(limits.cpu_quota),
        cpu_period: whole(limits.cpu_period),
        memory_limit: whole(limits.memory),
        ..Resources::default()
    }
}

fn memory_steps<'a>(
    now: &Resources,
    wanted: &Resources,
    stats: &SandboxStats,
    changes: &'a [Change],
) -> Vec<MemoryStep<'a>> {
    let pod = MemoryStep {
        container: None,
        from: now.memory_limit,
        to: wanted.memory_limit,
        usage: stats.usage.memory.map(|memory| memory.usage),
    };
    let of = |change: &'a Change| match change {
        Change::Update { id, name, from, to } => {
            let usage = stats.containers.iter().find(|container| container.id == *id).and_then(|c| c.usage.memory);
            let usage = usage.map(|memory| memory.usage);
            Some(MemoryStep { container: Some(name), from: from.memory_limit, to: to.memory_limit, usage })
        }
        Change::Replace { .. } => None,
    };
    [pod].into_iter().chain(changes.iter().filter_map(of)).collect()
}
