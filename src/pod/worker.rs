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

mod clock;
mod driver;
mod endings;
mod finish;
mod function;
mod image_volumes;
mod look;
mod memory;
mod preempt;
mod probing;
mod report;
mod resize;
mod seat;
mod start;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};
use tokio::sync::watch;
use tokio::time::Instant;

use self::clock::{at, spread};
use self::endings::Endings;
use self::function::{Function, NUMBERS};
use self::memory::Memory;
pub(super) use self::seat::Seat;
use super::Shared;
use super::observed::Observed;
use super::plan::{self, Goal, Step, View, plan};
use super::probes::Probes;
use super::status::{self, Trouble};
use super::translate::pod_ref;
use crate::runtime::types::PodRef;
use crate::telemetry::chain;

/// A status that says only how far a start or a removal has come waits this long for a better one: most Pods run, or
/// are gone, by then, and one PATCH instead of three leaves the API server to others.
const PROGRESS: Duration = Duration::from_secs(1);
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
    probes: Probes,
    endings: Endings,
    look_at: Instant,
    past: Past,
    /// What it owns is an environment of a function Pod, not a Pod of its own.
    seat: Option<Seat>,
    /// What a function Pod has beyond any other.
    function: Option<Function>,
}

/// Whether the runtime may hold something of a Pod when its worker takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// The Pod was bound to the node while this process watched: nobody has touched it.
    None,
    /// An earlier process, or an earlier worker, may have begun with it.
    Unknown,
}

/// Whether the loop goes on.
enum Next {
    Again,
    Done,
}

impl Worker {
    /// A worker for the Pod; `past` says whether the runtime may hold something of it already.
    pub(super) fn new(
        shared: Arc<Shared>,
        desired: watch::Receiver<Desired>,
        signal: watch::Receiver<Signal>,
        past: Past,
    ) -> Self {
        let worker = Self::plain(shared, desired, signal, past);
        Self { function: Function::of(&worker.pod), ..worker }
    }

    /// What workers of Pods and of environments begin with.
    fn plain(
        shared: Arc<Shared>,
        desired: watch::Receiver<Desired>,
        signal: watch::Receiver<Signal>,
        past: Past,
    ) -> Self {
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
            probes: Probes::default(),
            endings: Endings::default(),
            look_at: Instant::now() + spread(LOOK_AGAIN),
            past,
            seat: None,
            function: None,
        }
    }

    /// Owns the Pod until its object and everything of it on this node are gone.
    pub(super) async fn run(mut self) {
        tracing::debug!(pod = %self.reference, uid = self.reference.uid, "taking over Pod");
        if self.past == Past::Unknown {
            self.relist().await;
        }
        self.take_desired();
        if self.seat.is_none() {
            self.admit().await;
        }
        while let Next::Again = self.turn().await {}
        self.shared.forget(&self.reference.uid);
        tracing::debug!(pod = %self.reference, uid = self.reference.uid, "Pod is gone");
    }

    async fn turn(&mut self) -> Next {
        self.take_desired();
        self.refuse_ephemeral();
        self.digest().await;
        let goal = self.goal();
        self.probe(goal);
        self.seek_resources(goal);
        let step = self.resize_step(goal).unwrap_or_else(|| self.plan(goal));
        if matches!(step, Step::Wait(_)) && goal != Goal::Run && self.memory.released {
            if self.gone {
                return self.clean_up().await;
            }
            if self.is_deleted() {
                return self.take_leave().await;
            }
        }
        let status = self.status(goal);
        let urgent = match step {
            Step::SetUpVolumes | Step::RunSandbox { .. } | Step::Create { .. } | Step::Start { .. } | Step::Serve => {
                false
            }
            // The last words of a Pod that is being deleted say all of it.
            Step::Stop { .. } | Step::Release => !self.is_deleted(),
            Step::Drain(_) => false,
            _ => true,
        };
        let unsent = self.report(status, urgent);
        if self.memory.released {
            // After the report: whoever waits for the node to be empty may end the process then.
            self.shared.admission.leave(&self.reference.uid);
            self.shared.capacity.leave(&self.reference.uid);
        }
        match step {
            Step::Wait(until) => self.wait(until).await,
            // Boxed, for most workers wait: they need not keep room for the largest step.
            step => Box::pin(self.perform(step, goal, unsent)).await,
        }
        Next::Again
    }

    fn plan(&self, goal: Goal) -> Step {
        let empty = PodSpec::default();
        plan(&View {
            spec: self.pod.spec.as_ref().unwrap_or(&empty),
            goal,
            observed: &self.observed,
            volumes_ready: self.memory.places.is_some() || self.function.is_some(),
            released: self.memory.released,
            floors: &self.memory.floors,
            container_holds: &self.memory.holds,
            pod_hold: self.memory.pod_hold,
            function: self.function.as_ref().map(|function| function.phase(&self.pod)),
            held: self.seat.as_ref().is_some_and(Seat::is_held),
            health: self.probes.health(),
            ending: self.endings.ids(),
            now: Timestamp::now(),
        })
    }

    /// Takes the newest spec, and drops the marks that depended on an older one.
    fn take_desired(&mut self) {
        let desired = self.desired.borrow_and_update().clone();
        let (new, old) = (&desired.pod.metadata, &self.pod.metadata);
        let changed = new.resource_version != old.resource_version;
        if self.memory.places.is_some() && (&new.labels, &new.annotations) != (&old.labels, &old.annotations) {
            // A volume may show them.
            self.memory.next_refresh = Some(Instant::now());
        }
        let granted = self.granted(desired.pod);
        let before = std::mem::replace(&mut self.pod, granted);
        self.gone = desired.gone;
        if changed {
            self.memory.forgive(&before, &self.pod);
            self.retune();
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
            self.shared.capacity.adopt(&self.reference.uid, spec);
            self.memory.resize.admitted(spec);
            return;
        }
        if !super::static_pods::is_independent(&self.pod) {
            self.registered().await;
        }
        self.take_desired();
        let (Some(spec), true) = (&self.pod.spec, self.may_live()) else { return };
        let refusal = self.refusal(spec).await;
        let verdict = refusal.map_or_else(|| self.shared.admission.admit(&self.pod, &self.shared.node_view()), Err);
        let verdict = match verdict {
            Err(refused) if self.may_preempt(&refused) => self.preempt().await,
            verdict => verdict,
        };
        if let Err(Trouble { reason, message }) = verdict {
            self.shared.events.warning(&self.pod, None, &reason, message.clone());
            self.memory.ended = Some(Trouble::new(reason, format!("Pod was rejected: {message}")));
            return;
        }
        self.memory.resize.admitted(spec);
        self.make_room(spec).await;
        let idle = super::fakecloud::idle_switches(&self.pod);
        for omission in super::unsupported::omissions(&self.pod, spec).into_iter().chain(idle) {
            self.shared.events.warning(&self.pod, None, super::unsupported::REASON, omission);
        }
    }

    /// Waits until function pools have given back what they borrowed of the Pod's share. A Pod that is deleted does not
    /// wait.
    async fn make_room(&self, spec: &PodSpec) {
        let mut desired = self.desired.clone();
        tokio::select! {
            // Cancel-safe: the Pod is noted at once, and stays so.
            () = self.shared.capacity.bind(&self.reference.uid, spec) => {}
            // Cancel-safe: a watch channel keeps its value.
            _ = desired.wait_for(|d| d.gone || d.pod.metadata.deletion_timestamp.is_some()) => {}
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

    fn is_deleted(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    fn goal(&self) -> Goal {
        self.hastened(goal(&self.pod, self.gone, self.memory.ended.is_some()))
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
            self.memory.resize.retry_at.map(at),
            self.numbers_due().map(|due| if due > Instant::now() { due } else { Instant::now() + NUMBERS }),
        ];
        let wake = due.into_iter().flatten().min().unwrap_or(self.look_at);
        let function = async {
            match &mut self.function {
                Some(function) => function.changed().await,
                None => std::future::pending().await,
            }
        };
        let seat = async {
            match &mut self.seat {
                Some(seat) => seat.let_go().await,
                None => std::future::pending().await,
            }
        };
        let mut ended = None;
        tokio::select! {
            // Cancel-safe: a change not taken stays unseen.
            _ = self.desired.changed() => return,
            // Cancel-safe: likewise.
            () = self.probes.changed() => return,
            // Cancel-safe: one that has ended stays until it is taken.
            next = self.endings.next() => ended = Some(next),
            // Cancel-safe: as the first.
            () = self.memory.following.changed() => self.memory.next_refresh = Some(Instant::now()),
            // Cancel-safe: likewise.
            () = seat => return,
            // Cancel-safe: likewise.
            () = function => return,
            // Cancel-safe: likewise.
            _ = self.signal.changed() => {}
            // Cancel-safe: a timer.
            () = tokio::time::sleep_until(wake) => {}
        }
        if let Some(ended) = ended {
            return self.note_ending(ended).await;
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
        let (shared, uid) = (self.shared.clone(), self.reference.uid.clone());
        // An environment ends when its pool says so.
        let drains = goal == Goal::Run && self.seat.is_none();
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
                () = once(draining, |draining| *draining), if drains => {}
                // Cancel-safe: an order stays until it is taken, which the next turn does first of all.
                () = once(shared.evictions.given(), |_| shared.evictions.has(&uid)) => {}
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
            Step::Create { name, attempt } => self.create(&name, attempt).await,
            Step::Start { name, attempt } => self.start(&name, attempt).await,
            Step::Stop { containers, grace } => self.stop(&containers, grace).await,
            Step::Reset(containers) => self.reset(&containers),
            Step::Kill { container, probe } => self.kill(&container, probe),
            Step::Replace(container) => self.give_way(&container),
            Step::Resize => self.resize().await,
            Step::Prune(id) => self.prune(&id).await,
            Step::RemoveSandbox(id) => self.remove_sandbox(&id).await,
            Step::Release => self.release().await,
            Step::Serve => self.serve().await,
            Step::Renew => self.renew().await,
            Step::Drain(grace) => self.drain(grace).await,
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

/// A trouble from an error.
fn trouble(reason: &str, error: &(dyn std::error::Error + 'static)) -> Trouble {
    Trouble::new(reason, chain(error))
}

#[cfg(test)]
mod tests;
