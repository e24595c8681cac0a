//! What to do next for a Pod: pure policy over the spec, what the runtime holds, and the time.
//!
//! ```text
//!  Run:  volumes -> sandbox -> init containers, one after the other -> main containers, in order -> wait
//!                     ^  sandbox died: stop what is left of it, make the next attempt, init again
//!         an ephemeral container is started once, as soon as there is a sandbox, and holds up nothing else
//!  End:  stop every container (grace) -> release sandbox, volumes -> done
//! ```
//! One step at a time: the worker executes it, looks again, and asks again. So a restart of the process continues
//! wherever the last one stopped, since nothing but what the runtime holds is remembered.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::ephemeral;
use super::observed::Observed;
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus, SandboxId};

/// What the Pod is meant to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Live.
    Run,
    /// End: every process gets this long after its stop signal.
    End(Duration),
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something happens, or until that moment.
    Wait(Option<Timestamp>),
    /// Make the volumes.
    SetUpVolumes,
    /// Stop a sandbox that can no longer be used.
    StopSandbox(SandboxId),
    /// Make a sandbox.
    RunSandbox {
        /// Its attempt number.
        attempt: u32,
    },
    /// Make and start one attempt of a container.
    Start {
        /// The container's name.
        name: String,
        /// Which attempt.
        attempt: u32,
    },
    /// Make one attempt of a container, and do not start it.
    Create {
        /// The container's name.
        name: String,
        /// Which attempt.
        attempt: u32,
    },
    /// Stop these, all at once.
    Stop {
        /// The running containers.
        containers: Vec<ContainerId>,
        /// How long they may take.
        grace: Duration,
    },
    /// Remove an old attempt: one dead attempt is kept for `logs --previous`.
    Prune(ContainerId),
    /// Remove a sandbox that another has replaced and that nothing was ever made in, or nothing is left of.
    RemoveSandbox(SandboxId),
    /// Every process has ended for good: give sandbox and volumes back.
    Release,
    /// Listen for calls in the sandbox of a function Pod.
    Serve,
    /// Take no more calls, let those under way end within that time, and end every environment.
    Drain(Duration),
}

/// How far a function Pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionPhase<'a> {
    /// Its front does not listen.
    Idle,
    /// Its front listens in that sandbox.
    Serving(&'a SandboxId),
    /// Its front and its environments have ended for good.
    Drained,
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The Pod's spec.
    pub spec: &'a PodSpec,
    /// What it is meant to do.
    pub goal: Goal,
    /// What the runtime holds of it.
    pub observed: &'a Observed,
    /// Whether the volumes are there.
    pub volumes_ready: bool,
    /// Whether sandbox and volumes were already given back.
    pub released: bool,
    /// Lowest number the next attempt of a container may have: one more than any attempt ever seen, for containers
    /// that somebody removed behind our back.
    pub floors: &'a BTreeMap<String, u32>,
    /// Nothing about this container is tried before that moment.
    pub container_holds: &'a BTreeMap<String, Timestamp>,
    /// Neither volumes nor sandbox are tried before that moment.
    pub pod_hold: Option<Timestamp>,
    /// How far it is, if it is a function Pod.
    pub function: Option<FunctionPhase<'a>>,
    /// Containers are made and not started until this ends.
    pub held: bool,
    /// Now.
    pub now: Timestamp,
}

/// What is to be done with one container.
enum Need {
    /// It runs, or it has done what it should.
    Nothing,
    /// It runs and others wait for its end.
    Busy,
    /// A new attempt, or the created one again.
    Start(u32),
    /// It has failed for good.
    Failed,
}

/// The next step; see the module's diagram.
pub fn plan(view: &View<'_>) -> Step {
    match view.goal {
        Goal::End(grace) => plan_end(view, grace),
        Goal::Run if finished(view.spec, view.observed).is_some() => plan_end(view, Duration::ZERO),
        Goal::Run => plan_run(view),
    }
}

fn plan_end(view: &View<'_>, grace: Duration) -> Step {
    let containers: Vec<_> = view.observed.running().map(|c| c.id.clone()).collect();
    if !containers.is_empty() {
        return Step::Stop { containers, grace };
    }
    if !view.released && view.function.is_some_and(|phase| phase != FunctionPhase::Drained) {
        return Step::Drain(grace);
    }
    if view.released { Step::Wait(None) } else { Step::Release }
}

fn plan_run(view: &View<'_>) -> Step {
    if let Some(old) = superfluous(view) {
        return Step::Prune(old);
    }
    if let Some(until) = view.pod_hold
        && until > view.now
        && (!view.volumes_ready || view.observed.ready_sandbox().is_none())
    {
        return Step::Wait(Some(until));
    }
    if !view.volumes_ready {
        return Step::SetUpVolumes;
    }
    if view.observed.ready_sandbox().is_none() {
        let dead = view.observed.sandbox().map(|s| s.id.clone());
        let lives_on = view.observed.running().any(|c| dead.as_ref() == Some(&c.sandbox));
        return match dead {
            Some(id) if lives_on => Step::StopSandbox(id),
            _ => Step::RunSandbox { attempt: view.observed.next_sandbox_attempt() },
        };
    }
    let step = match view.function {
        Some(phase) => plan_function(view, phase),
        None => plan_containers(view),
    };
    match step {
        // Last, since nobody waits for it.
        Step::Wait(until) => abandoned(view.observed).map_or(Step::Wait(until), Step::RemoveSandbox),
        step => step,
    }
}

/// A function Pod has nothing in its sandbox but the front; its environments are its pool's affair.
fn plan_function(view: &View<'_>, phase: FunctionPhase<'_>) -> Step {
    let sandbox = view.observed.ready_sandbox().map(|sandbox| &sandbox.id);
    if phase == FunctionPhase::Drained || sandbox.is_some_and(|id| phase == FunctionPhase::Serving(id)) {
        return Step::Wait(None);
    }
    let held = view.container_holds.values().copied().chain(view.pod_hold).filter(|until| *until > view.now).max();
    held.map_or(Step::Serve, |until| Step::Wait(Some(until)))
}

/// A sandbox before the present one without a container in it. One that holds an ended container is kept: its log may
/// still be asked for.
fn abandoned(observed: &Observed) -> Option<SandboxId> {
    let present = observed.sandbox()?.id.clone();
    let empty = |id: &SandboxId| observed.containers().all(|c| c.sandbox != *id);
    observed.sandbox_ids().find(|id| **id != present && empty(id)).cloned()
}

fn plan_containers(view: &View<'_>) -> Step {
    let mut earliest = None;
    for container in ephemeral::all(view.spec) {
        if let Some(attempt) = never_started(view, &container.name) {
            match start(view, &container.name, attempt) {
                Ok(step) => return step,
                Err(until) => earliest = sooner(earliest, until),
            }
        }
    }
    match plan_lasting(view) {
        Step::Wait(until) => Step::Wait(sooner(earliest, until)),
        step => step,
    }
}

/// The attempt to make of an ephemeral container, if none was ever started. One that was made and is not there any more
/// counts as started.
fn never_started(view: &View<'_>, name: &str) -> Option<u32> {
    match view.observed.latest(name) {
        None => (!view.floors.contains_key(name)).then_some(0),
        Some(latest) if latest.state != ContainerState::Created => None,
        Some(latest) if view.observed.current(name).is_some() => Some(latest.attempt),
        // Its sandbox died before.
        Some(latest) => Some(latest.attempt + 1),
    }
}

fn sooner(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    [one, other].into_iter().flatten().min()
}

/// Init and main containers.
fn plan_lasting(view: &View<'_>) -> Step {
    if !initialized(view.spec, view.observed) {
        for container in view.spec.init_containers.iter().flatten() {
            match need(view, container, true) {
                Need::Nothing => {}
                Need::Busy | Need::Failed => return Step::Wait(None),
                Need::Start(attempt) => return start(view, &container.name, attempt).unwrap_or_else(Step::Wait),
            }
        }
    }
    let mut earliest: Option<Timestamp> = None;
    for container in &view.spec.containers {
        if let Need::Start(attempt) = need(view, container, false) {
            match start(view, &container.name, attempt) {
                Ok(step) => return step,
                Err(until) => earliest = sooner(earliest, until),
            }
        }
    }
    Step::Wait(earliest)
}

/// The step, or when it may be done.
fn start(view: &View<'_>, name: &str, attempt: u32) -> Result<Step, Option<Timestamp>> {
    match view.container_holds.get(name) {
        Some(until) if *until > view.now => Err(Some(*until)),
        _ if view.held => match view.observed.current(name) {
            Some(current) if current.state == ContainerState::Created => Err(None),
            _ => Ok(Step::Create { name: name.to_owned(), attempt }),
        },
        _ => Ok(Step::Start { name: name.to_owned(), attempt }),
    }
}

fn need(view: &View<'_>, container: &Container, init: bool) -> Need {
    let next = || {
        let seen = view.observed.latest(&container.name).map_or(0, |c| c.attempt + 1);
        seen.max(view.floors.get(&container.name).copied().unwrap_or(0))
    };
    let Some(current) = view.observed.current(&container.name) else {
        let done_before = view
            .observed
            .latest(&container.name)
            .is_some_and(|latest| latest.state == ContainerState::Exited && !restarts(view.spec, latest, false));
        // What ended in an earlier sandbox stays ended, but each sandbox is initialised anew.
        return if done_before && !init { Need::Nothing } else { Need::Start(next()) };
    };
    match current.state {
        ContainerState::Created => Need::Start(current.attempt),
        ContainerState::Running if init => Need::Busy,
        ContainerState::Running => Need::Nothing,
        ContainerState::Exited if restarts(view.spec, current, init) => Need::Start(next()),
        ContainerState::Exited if init && current.exit_code != 0 => Need::Failed,
        ContainerState::Exited => Need::Nothing,
    }
}

/// Whether an exited container is started again. An init container that succeeded is not, whatever the policy.
fn restarts(spec: &PodSpec, status: &ContainerStatus, init: bool) -> bool {
    match restart_policy(spec) {
        "Never" => false,
        "OnFailure" => status.exit_code != 0,
        _ => !init || status.exit_code != 0,
    }
}

/// Whether an exited container of this Pod is started again.
pub fn would_restart(pod: &Pod, status: &ContainerStatus) -> bool {
    let Some(spec) = &pod.spec else { return false };
    if ephemeral::all(spec).any(|c| c.name == status.name) {
        return false;
    }
    let init = spec.init_containers.iter().flatten().any(|c| c.name == status.name);
    restarts(spec, status, init)
}

/// An attempt that nobody can ask for any more: all but the latest two of each container.
fn superfluous(view: &View<'_>) -> Option<ContainerId> {
    view.spec.init_containers.iter().flatten().chain(&view.spec.containers).find_map(|container| {
        let attempts = view.observed.attempts(&container.name);
        let old = attempts.len().checked_sub(2)?;
        attempts[..old].iter().find(|c| c.state != ContainerState::Running).map(|c| c.id.clone())
    })
}

/// `spec.restartPolicy`, `Always` if unset.
pub fn restart_policy(spec: &PodSpec) -> &str {
    spec.restart_policy.as_deref().unwrap_or("Always")
}

/// Whether every init container has succeeded in the present sandbox. A main container that was started in it proves
/// the same, so a removed init container is not run again.
pub fn initialized(spec: &PodSpec, observed: &Observed) -> bool {
    let succeeded = |c: &Container| {
        observed.current(&c.name).is_some_and(|s| s.state == ContainerState::Exited && s.exit_code == 0)
    };
    spec.containers.iter().any(|c| observed.current(&c.name).is_some())
        || spec.init_containers.iter().flatten().all(succeeded)
}

/// How a Pod ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// Every container ended with code 0.
    Succeeded,
    /// At least one did not, and none is restarted.
    Failed,
}

/// Whether the Pod has run to its end: its restart policy starts nothing again.
pub fn finished(spec: &PodSpec, observed: &Observed) -> Option<Finish> {
    let policy = restart_policy(spec);
    if policy == "Always" {
        return None;
    }
    let exited = |c: &Container| observed.latest(&c.name).filter(|s| s.state == ContainerState::Exited);
    let init_failed = spec.init_containers.iter().flatten().filter_map(exited).any(|s| s.exit_code != 0);
    if policy == "Never" && init_failed {
        return Some(Finish::Failed);
    }
    let ends: Option<Vec<_>> = spec.containers.iter().map(|c| exited(c).map(|s| s.exit_code)).collect();
    match ends?.iter().all(|code| *code == 0) {
        true => Some(Finish::Succeeded),
        false if policy == "Never" => Some(Finish::Failed),
        false => None,
    }
}

/// Longest grace period that is honoured, in seconds (68 years): the API takes any number, clocks do not.
const LONGEST_GRACE: u64 = i32::MAX as u64;

/// How long a Pod's processes have to end: what the deletion says, else what the spec says, else 30 s.
pub fn grace(pod: &Pod) -> Duration {
    let spec = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
    let seconds = pod.metadata.deletion_grace_period_seconds.or(spec).unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(LONGEST_GRACE))
}

#[cfg(test)]
mod tests;
