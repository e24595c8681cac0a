//! The owner of one Pod: looks, plans, does one step, and looks again.
//!
//! ```text
//!   desired (watch) --.                      .--> Step::Start ... --> runtime
//!   runtime event  ---+--> loop: look -> plan +--> Step::Stop  ... --> runtime
//!   timer          --'        |              '--> Step::Wait
//!                             '--> status --> publisher, directory
//! ```
//! A step is interrupted the moment the Pod is to end (or to end sooner): every runtime verb may be dropped, and what
//! it left is found by listing. So an image that takes minutes to pull does not hold up a deletion.

mod finish;
mod memory;
mod start;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};
use tokio::sync::watch;
use tokio::time::Instant;

use self::memory::Memory;
use super::Shared;
use super::backoff;
use super::observed::Observed;
use super::plan::{self, Goal, Step, View, plan};
use super::status::{self, StatusInput, Trouble, pod_status};
use super::translate::pod_ref;
use crate::runtime::types::{ContainerId, PodRef};
use crate::telemetry::chain;

/// A status that says only how far a start has come waits this long for a better one: most Pods run by then, and one
/// PATCH instead of three leaves the API server to others.
const PROGRESS: Duration = Duration::from_millis(300);
/// Longest time between two looks at the runtime, in case an event was lost; spread by up to half as much again.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How long a difference between the API server's status and ours must last before ours is written again: a watch
/// event may be older than our last write.
const REASSERT: Duration = Duration::from_secs(3);

/// What the watch says of a Pod.
#[derive(Clone, Debug)]
pub(super) struct Desired {
    /// The newest spec (and status) seen.
    pub(super) pod: Arc<Pod>,
    /// The Pod object does not exist any more.
    pub(super) gone: bool,
}

/// What the runtime says of a Pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signal {
    /// Counts events about this Pod.
    pub(super) events: u64,
    /// Counts the times events may have been lost, so that everything must be listed again.
    pub(super) relists: u64,
}

/// One Pod's owner.
pub(super) struct Worker {
    shared: Arc<Shared>,
    reference: PodRef,
    desired: watch::Receiver<Desired>,
    signal: watch::Receiver<Signal>,
    relists: u64,
    pod: Arc<Pod>,
    gone: bool,
    observed: Observed,
    memory: Memory,
    look_at: Instant,
}

/// Whether the loop goes on.
enum Next {
    Again,
    Done,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, desired: watch::Receiver<Desired>, signal: watch::Receiver<Signal>) -> Self {
        let pod = desired.borrow().pod.clone();
        let relists = signal.borrow().relists;
        Self {
            reference: pod_ref(&pod),
            memory: Memory::new(&pod, Timestamp::now()),
            shared,
            desired,
            signal,
            relists,
            pod,
            gone: false,
            observed: Observed::default(),
            look_at: Instant::now(),
        }
    }

    /// Owns the Pod until its object and everything of it on this node are gone.
    pub(super) async fn run(mut self) {
        tracing::debug!(pod = %self.reference, uid = self.reference.uid, "taking over Pod");
        self.relist().await;
        self.take_desired();
        self.admit().await;
        while let Next::Again = self.turn().await {}
        self.shared.forget(&self.reference.uid);
        tracing::debug!(pod = %self.reference, uid = self.reference.uid, "Pod is gone");
    }

    async fn turn(&mut self) -> Next {
        self.take_desired();
        self.digest().await;
        let goal = self.goal();
        let step = self.plan(goal);
        if matches!(step, Step::Wait(_)) && goal != Goal::Run && self.memory.released {
            if self.gone {
                return self.clean_up().await;
            }
            if self.is_deleted() {
                return self.take_leave().await;
            }
        }
        let status = self.status(goal);
        let urgent = !matches!(step, Step::SetUpVolumes | Step::RunSandbox { .. } | Step::Start { .. });
        let unsent = self.report(status, urgent);
        if self.memory.released {
            // After the report: whoever waits for the node to be empty may end the process then.
            self.shared.admission.leave(&self.reference.uid);
        }
        match step {
            Step::Wait(until) => self.wait(until).await,
            step => self.perform(step, goal, unsent).await,
        }
        Next::Again
    }

    fn plan(&self, goal: Goal) -> Step {
        let empty = PodSpec::default();
        plan(&View {
            spec: self.pod.spec.as_ref().unwrap_or(&empty),
            goal,
            observed: &self.observed,
            volumes_ready: self.memory.places.is_some(),
            released: self.memory.released,
            floors: &self.memory.floors,
            container_holds: &self.memory.holds,
            pod_hold: self.memory.pod_hold,
            now: Timestamp::now(),
        })
    }

    /// Takes the newest spec, and drops the marks that depended on an older one.
    fn take_desired(&mut self) {
        let desired = self.desired.borrow_and_update().clone();
        let changed = desired.pod.metadata.resource_version != self.pod.metadata.resource_version;
        self.pod = desired.pod;
        self.gone = desired.gone;
        if changed {
            self.memory.reassert_at = None;
            if let Some(sent) = &self.memory.sent
                && !status::same_as_reported(&self.pod, sent)
            {
                self.memory.reassert_at = Some(Instant::now() + REASSERT);
            }
        }
    }

    /// Lets the Pod in, unless it ran here before (a restart of this process does not evict it) or has ended.
    async fn admit(&mut self) {
        let (Some(spec), true) = (&self.pod.spec, self.may_live()) else { return };
        if !self.observed.is_empty() {
            self.shared.admission.adopt(&self.reference.uid, spec);
            return;
        }
        self.registered().await;
        self.take_desired();
        let (Some(spec), true) = (&self.pod.spec, self.may_live()) else { return };
        let refusal = super::unsupported::refusal(&self.pod, spec);
        let verdict = refusal.map_or_else(|| self.shared.admission.admit(&self.pod, &self.shared.node_view()), Err);
        if let Err(trouble) = verdict {
            self.shared.events.warning(&self.pod, None, &trouble.reason, trouble.message.clone());
            self.memory.ended = Some(trouble);
            return;
        }
        let idle = super::fakecloud::idle_switches(&self.pod);
        for omission in super::unsupported::omissions(spec).into_iter().chain(idle) {
            self.shared.events.warning(&self.pod, None, super::unsupported::REASON, omission);
        }
    }

    /// Whether anything of the Pod may still run.
    fn may_live(&self) -> bool {
        !self.gone && !self.is_deleted() && !status::is_terminal(&self.pod)
    }

    /// Waits until the Node's labels are known, which the Pod's selectors are checked against: after a restart the Pods
    /// may be listed before the Node is. A Pod that is deleted does not wait.
    async fn registered(&self) {
        let mut registration = self.shared.registration.clone();
        let mut desired = self.desired.clone();
        tokio::select! {
            // Cancel-safe: a watch channel keeps its value.
            _ = registration.wait_for(Option::is_some) => {}
            // Cancel-safe: likewise.
            _ = desired.wait_for(|d| d.gone || d.pod.metadata.deletion_timestamp.is_some()) => {}
        }
    }

    /// Whether the API server is removing the object this very moment, as it does after a deletion by force.
    ///
    /// Nobody would read a status written now, and it could cost another Pod its life. A deletion with grace 0 takes two
    /// writes: the object is marked, then removed. Whatever updates it in between makes the API server remove it there
    /// and then (`ShouldDeleteDuringUpdate`, `deleteWithoutFinalizers` in apiserver's `registry/store.go`, read at 1.36),
    /// by its name alone: the UID in a PATCH is compared with the marked object and is no precondition of that removal
    /// (`Preconditions` in `registry/rest/update.go` knows that of a PUT only). If the first deletion gets there before
    /// and the Pod is made anew, the new one is removed.
    ///
    /// A PATCH that is under way when the mark is set can still meet that moment, as a kubelet's can: only a resource
    /// version would exclude it, and with that every status would be refused that follows a change not yet seen.
    fn is_vanishing(&self) -> bool {
        let meta = &self.pod.metadata;
        meta.deletion_grace_period_seconds == Some(0) && meta.finalizers.as_ref().is_none_or(Vec::is_empty)
    }

    fn is_deleted(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    fn goal(&self) -> Goal {
        goal(&self.pod, self.gone, self.memory.ended.is_some())
    }

    /// The status now.
    fn status(&self, goal: Goal) -> PodStatus {
        let facts = self.shared.facts.borrow();
        let finished = self.pod.spec.as_ref().is_some_and(|s| plan::finished(s, &self.observed).is_some());
        // A container in the sandbox proves that the volumes are there, also right after a restart of this process.
        let has_volumes = self.memory.places.is_some() || self.observed.containers().next().is_some();
        let ready_to_start = self.observed.ready_sandbox().is_some() && has_volumes;
        pod_status(&StatusInput {
            pod: &self.pod,
            observed: &self.observed,
            ready_to_start: ready_to_start && !self.memory.released,
            address: self.memory.address,
            host_addresses: &facts.addresses,
            waiting: &self.memory.waiting,
            messages: &self.memory.messages,
            ended: self.memory.ended.as_ref(),
            terminal: (goal != Goal::Run || finished) && self.observed.running().next().is_none(),
            runtime_name: &self.shared.runtime_name,
            // The API keeps whole seconds: with more, what comes back would differ from what was sent.
            start_time: whole_second(self.memory.start_time),
            now: whole_second(Timestamp::now()),
        })
    }

    /// Tells the directory, and the API server if it is urgent. Returns what it was not told.
    fn report(&mut self, status: PodStatus, urgent: bool) -> Option<PodStatus> {
        if self.is_vanishing() {
            self.shared.publisher.withdraw(&self.reference.uid);
        }
        let reassert = self.memory.reassert_at.is_some_and(|at| at <= Instant::now());
        if self.memory.sent.as_ref() == Some(&status) && !reassert {
            return None;
        }
        self.shared.directory.put(&self.pod, &status, &self.observed);
        if self.gone || self.is_vanishing() {
            return None;
        }
        if !urgent {
            return Some(status);
        }
        self.memory.reassert_at = None;
        self.memory.sent = Some(status.clone());
        self.shared.publisher.publish(&self.reference, status);
        None
    }

    /// Sleeps until something happens or something is due.
    async fn wait(&mut self, until: Option<Timestamp>) {
        let due = [
            Some(self.look_at),
            until.map(at),
            self.memory.deadline(&self.pod).map(at),
            self.memory.next_refresh,
            self.memory.reassert_at,
            self.memory.pull_notice.map(at),
        ];
        let wake = due.into_iter().flatten().min().unwrap_or(self.look_at);
        tokio::select! {
            // Cancel-safe: a change not taken stays unseen.
            _ = self.desired.changed() => return,
            // Cancel-safe: likewise.
            _ = self.signal.changed() => {}
            // Cancel-safe: a timer.
            () = tokio::time::sleep_until(wake) => {}
        }
        if self.signal_seen() || Instant::now() >= self.look_at {
            self.look().await;
        }
        if self.memory.next_refresh.is_some_and(|at| at <= Instant::now()) {
            self.refresh_volumes().await;
        }
    }

    /// Whether an event came since the last look, or may have been lost.
    fn signal_seen(&mut self) -> bool {
        let Signal { events, relists } = *self.signal.borrow_and_update();
        std::mem::replace(&mut self.memory.events_seen, events) != events || relists != self.relists
    }

    /// Does one step. It is dropped when the Pod is to end sooner than `goal` says.
    async fn perform(&mut self, step: Step, goal: Goal, unsent: Option<PodStatus>) {
        let sooner = self.sooner(goal);
        let publisher = self.shared.publisher.clone();
        let reference = self.reference.clone();
        let mut sent = None;
        let told = &mut sent;
        let progress = async move {
            let Some(status) = unsent else { return std::future::pending::<()>().await };
            tokio::time::sleep(PROGRESS).await;
            publisher.publish(&reference, status.clone());
            *told = Some(status);
            std::future::pending::<()>().await;
        };
        let interrupted = tokio::select! {
            // Cancel-safe: see the module text; what was dropped is listed anew below.
            () = self.execute(step.clone()) => false,
            () = sooner => true,
            () = progress => false,
        };
        if sent.is_some() {
            self.memory.sent = sent;
        }
        if interrupted {
            tracing::debug!(pod = %self.reference, ?step, "interrupted by the Pod's end");
            self.relist().await;
        }
    }

    /// Returns when the Pod is to end, or to end sooner than `goal` says.
    fn sooner(&self, goal: Goal) -> impl Future<Output = ()> + use<> {
        let (desired, draining) = (self.desired.clone(), self.shared.draining.clone());
        let ended = self.memory.ended.is_some();
        let deadline = self.memory.deadline(&self.pod).filter(|_| goal == Goal::Run).map(at);
        async move {
            let is_sooner = |d: &Desired| match (goal, self::goal(&d.pod, d.gone, ended)) {
                (Goal::Run, Goal::End(_)) => true,
                (Goal::End(now), Goal::End(then)) => then < now,
                _ => false,
            };
            tokio::select! {
                // Cancel-safe: a watch channel keeps its value.
                () = once(desired, is_sooner) => {}
                // Cancel-safe: likewise.
                () = once(draining, |draining| *draining), if goal == Goal::Run => {}
                // Cancel-safe: a timer.
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        }
    }

    async fn execute(&mut self, step: Step) {
        tracing::trace!(pod = %self.reference, ?step, "step");
        match step {
            Step::Wait(_) => {}
            Step::SetUpVolumes => self.set_up_volumes().await,
            Step::StopSandbox(id) => self.stop_sandbox(&id).await,
            Step::RunSandbox { attempt } => self.run_sandbox(attempt).await,
            Step::Start { name, attempt } => self.start(&name, attempt).await,
            Step::Stop { containers, grace } => self.stop(&containers, grace).await,
            Step::Prune(id) => self.prune(&id).await,
            Step::RemoveSandbox(id) => self.remove_sandbox(&id).await,
            Step::Release => self.release().await,
        }
    }

    /// Asks the runtime about what ran when last seen.
    async fn look(&mut self) {
        let relists = self.signal.borrow().relists;
        if relists != self.relists {
            self.relists = relists;
            return self.relist().await;
        }
        self.look_at = Instant::now() + spread(LOOK_AGAIN);
        let running: Vec<ContainerId> = self.observed.running().map(|c| c.id.clone()).collect();
        let sandbox = self.observed.ready_sandbox().map(|s| s.id.clone());
        for id in running {
            self.look_at_container(&id).await;
        }
        if let Some(id) = sandbox {
            match self.shared.runtime.pod_sandbox_status(&id).await {
                Ok(status) => self.observed.put_sandbox(status),
                Err(error) if error.is_not_found() => self.observed.drop_sandbox(&id),
                Err(error) => tracing::debug!(pod = %self.reference, error = chain(&error), "failed to look"),
            }
        }
    }

    async fn look_at_container(&mut self, id: &ContainerId) {
        match self.shared.runtime.container_status(id).await {
            Ok(status) => self.observed.put_container(status),
            Err(error) if error.is_not_found() => self.observed.drop_container(id),
            Err(error) => tracing::debug!(pod = %self.reference, error = chain(&error), "failed to look"),
        }
    }

    /// Lists everything of the Pod; tries until the runtime answers.
    async fn relist(&mut self) {
        let mut wait = Duration::from_millis(200);
        loop {
            let uid = Some(self.reference.uid.as_str());
            let listed =
                tokio::try_join!(self.shared.runtime.list_pod_sandboxes(uid), self.shared.runtime.list_containers(uid));
            match listed {
                Ok((sandboxes, containers)) => {
                    self.observed = Observed::new(sandboxes, containers);
                    break;
                }
                Err(error) => {
                    tracing::debug!(pod = %self.reference, error = chain(&error), "failed to list; trying again");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(backoff::RETRY);
                }
            }
        }
        self.look_at = Instant::now() + spread(LOOK_AGAIN);
        if let Some(address) = self.observed.sandbox().and_then(|s| s.address) {
            self.memory.address = Some(address);
        }
    }
}

/// What a Pod is meant to do.
fn goal(pod: &Pod, gone: bool, ended: bool) -> Goal {
    if pod.metadata.deletion_timestamp.is_some() {
        // An object that is gone was deleted by force, or its grace has run out.
        let grace = plan::grace(pod);
        Goal::End(if gone { grace.min(Duration::from_secs(1)) } else { grace })
    } else if gone || ended {
        Goal::End(plan::grace(pod))
    } else if status::is_terminal(pod) {
        Goal::End(Duration::ZERO)
    } else {
        Goal::Run
    }
}

/// Returns once it holds; never if nobody is left to change it.
async fn once<T>(mut channel: watch::Receiver<T>, holds: impl FnMut(&T) -> bool) {
    if channel.wait_for(holds).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// The moment on the timers' clock; one that has passed is now.
fn at(moment: Timestamp) -> Instant {
    Instant::now() + Duration::try_from(moment.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO)
}

/// Without its fraction of a second.
fn whole_second(moment: Timestamp) -> Timestamp {
    Timestamp::from_second(moment.as_second()).unwrap_or(moment)
}

/// The period and up to half as much again, so that many Pods do not act at once.
fn spread(period: Duration) -> Duration {
    period + period.mul_f64(rand::random_range(0.0..0.5))
}

/// A trouble from an error.
fn trouble(reason: &str, error: &(dyn std::error::Error + 'static)) -> Trouble {
    Trouble::new(reason, chain(error))
}
