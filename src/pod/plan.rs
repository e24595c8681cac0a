//! What to do next for a Pod: pure policy over the spec, what the runtime holds, and the time.
//!
//! ```text
//!  Run:  volumes -> sandbox -> init containers, one after the other -> main containers, in order -> wait
//!                     ^  sandbox died: stop what is left of it, make the next attempt, init again
//!         a sidecar (init container with restartPolicy Always) lets the next one begin once it has started, and stays
//!         an ephemeral container is started once, as soon as there is a sandbox, and holds up nothing else
//!         a container whose probe has failed for good is killed, one of another image than the spec's is replaced
//!  End:  stop every container (grace) -> release sandbox, volumes -> done
//! ```
//! One step at a time: the worker executes it, looks again, and asks again. So a restart of the process continues
//! wherever the last one stopped, since nothing but what the runtime holds is remembered.

mod restart;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

pub use self::restart::{
    Finish, finished, is_outdated, is_resetting, may_restart_all, restart_policy, restarts_on_failure, would_restart,
};
use self::restart::{counts, present, restarts};
use super::ephemeral;
use super::observed::Observed;
use super::probes::Health;
use super::probes::machine::Kind;
use super::qos::is_sidecar;
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
    /// Kill one container, for this probe; nobody waits for its end.
    Kill {
        /// The running container.
        container: ContainerId,
        /// Which probe has failed for good.
        probe: Kind,
    },
    /// Stop one container, since the spec names another image by now; nobody waits for its end.
    Replace(ContainerId),
    /// Kill these, since a rule has every container begin anew; nobody waits for their end.
    Reset(Vec<ContainerId>),
    /// Give what runs the resources that the Pod was granted.
    Resize,
    /// Remove an old attempt: one dead attempt is kept for `logs --previous`.
    Prune(ContainerId),
    /// Remove a sandbox that another has replaced and that nothing was ever made in, or nothing is left of.
    RemoveSandbox(SandboxId),
    /// Every process has ended for good: give sandbox and volumes back.
    Release,
    /// Listen for calls in the sandbox of a function Pod.
    Serve,
    /// Replace the environments of a function Pod by others, of the images that it names now.
    Renew,
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
    /// So it does, with environments of images that the Pod names no more.
    Outdated(&'a SandboxId),
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
    /// What probes say.
    pub health: &'a Health,
    /// Containers whose end is under way.
    pub ending: &'a BTreeSet<ContainerId>,
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
        Goal::Run if finished(view.spec, view.observed, view.health).is_some() => {
            plan_end(view, grace_of(view.spec, None))
        }
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
    let step = match phase {
        FunctionPhase::Drained => return Step::Wait(None),
        FunctionPhase::Serving(id) if sandbox == Some(id) => return Step::Wait(None),
        FunctionPhase::Outdated(id) if sandbox == Some(id) => Step::Renew,
        FunctionPhase::Idle | FunctionPhase::Serving(_) | FunctionPhase::Outdated(_) => Step::Serve,
    };
    let held = view.container_holds.values().copied().chain(view.pod_hold).filter(|until| *until > view.now).max();
    held.map_or(step, |until| Step::Wait(Some(until)))
}

/// A sandbox before the present one without a container in it. One that holds an ended container is kept: its log may
/// still be asked for.
fn abandoned(observed: &Observed) -> Option<SandboxId> {
    let present = observed.sandbox()?.id.clone();
    let empty = |id: &SandboxId| observed.containers().all(|c| c.sandbox != *id);
    observed.sandbox_ids().find(|id| **id != present && empty(id)).cloned()
}

fn plan_containers(view: &View<'_>) -> Step {
    let old = |c: &&ContainerStatus| !counts(view.spec, view.observed, c) && !is_ephemeral(view.spec, &c.name);
    let old: Vec<_> = view.observed.running().filter(old).map(|c| c.id.clone()).collect();
    if !old.is_empty() {
        let done = old.iter().all(|id| view.ending.contains(id));
        return if done { Step::Wait(None) } else { Step::Reset(old) };
    }
    if let Some(end) = outdated(view).or_else(|| unhealthy(view)) {
        return end;
    }
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

fn is_ephemeral(spec: &PodSpec, name: &str) -> bool {
    ephemeral::all(spec).any(|container| container.name == name)
}

/// A container of another image than its own, whose end is not under way yet.
fn outdated(view: &View<'_>) -> Option<Step> {
    let mut running = view.observed.running().filter(|c| !view.ending.contains(&c.id));
    running.find(|c| is_outdated(view.spec, c)).map(|c| Step::Replace(c.id.clone()))
}

/// A container whose startup or liveness probe has failed for good, and whose end is not under way yet.
fn unhealthy(view: &View<'_>) -> Option<Step> {
    let mut running = view.observed.running().filter(|c| !view.ending.contains(&c.id));
    running.find_map(|c| Some(Step::Kill { container: c.id.clone(), probe: view.health.of(&c.id).failed? }))
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
    let mut earliest: Option<Timestamp> = None;
    let frontier = frontier(view.spec, view.observed);
    for (place, container) in view.spec.init_containers.iter().flatten().enumerate() {
        let (sidecar, behind) = (is_sidecar(container), place < frontier);
        if behind && !sidecar {
            continue;
        }
        match need(view, container, !sidecar) {
            Need::Start(attempt) => match start(view, &container.name, attempt) {
                Ok(step) => return step,
                Err(until) => {
                    earliest = sooner(earliest, until);
                    if !behind {
                        return Step::Wait(earliest);
                    }
                }
            },
            Need::Busy | Need::Failed => return Step::Wait(earliest),
            Need::Nothing if behind || !sidecar || started(view.spec, view.observed, view.health, container) => {}
            Need::Nothing => return Step::Wait(earliest),
        }
    }
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

/// How many init containers certainly have done what those after them wait for: something later was begun in the
/// present sandbox.
fn frontier(spec: &PodSpec, observed: &Observed) -> usize {
    let begun = |c: &Container| present(spec, observed, &c.name).is_some();
    let init = spec.init_containers.as_deref().unwrap_or_default();
    if spec.containers.iter().any(begun) { init.len() } else { init.iter().rposition(begun).unwrap_or(0) }
}

/// Whether a sidecar runs and has come up.
fn started(spec: &PodSpec, observed: &Observed, health: &Health, sidecar: &Container) -> bool {
    let runs = present(spec, observed, &sidecar.name).filter(|s| s.state == ContainerState::Running);
    runs.is_some_and(|s| health.of(&s.id).started)
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
    let Some(current) = present(view.spec, view.observed, &container.name) else {
        let latest = view.observed.latest(&container.name).filter(|latest| counts(view.spec, view.observed, latest));
        let done_before = latest.is_some_and(|latest| {
            latest.state == ContainerState::Exited && !restarts(view.spec, container, latest, view.health)
        });
        // What ended in an earlier sandbox stays ended, but each sandbox is initialised anew.
        return if done_before && !init { Need::Nothing } else { Need::Start(next()) };
    };
    let attempts = view.observed.attempts(&container.name);
    let beside = |other: &ContainerStatus| other.state == ContainerState::Running && other.sandbox == current.sandbox;
    match current.state {
        // Made to take the place of one that has yet to end, as a resize has it.
        ContainerState::Created if attempts.iter().any(beside) => Need::Nothing,
        ContainerState::Created if is_outdated(view.spec, current) => Need::Start(next()),
        ContainerState::Created => Need::Start(current.attempt),
        ContainerState::Running if init => Need::Busy,
        ContainerState::Running => Need::Nothing,
        ContainerState::Exited if restarts(view.spec, container, current, view.health) => Need::Start(next()),
        ContainerState::Exited if init && current.exit_code != 0 => Need::Failed,
        ContainerState::Exited => Need::Nothing,
    }
}

/// An attempt that nobody can ask for any more: all but the latest two of each container.
fn superfluous(view: &View<'_>) -> Option<ContainerId> {
    view.spec.init_containers.iter().flatten().chain(&view.spec.containers).find_map(|container| {
        let attempts = view.observed.attempts(&container.name);
        let old = attempts.len().checked_sub(2)?;
        attempts[..old].iter().find(|c| c.state != ContainerState::Running).map(|c| c.id.clone())
    })
}

/// Whether every init container has succeeded, and every sidecar has started, in the present sandbox. A main container
/// that was started in it proves the same, so a removed init container is not run again.
pub fn initialized(spec: &PodSpec, observed: &Observed, health: &Health) -> bool {
    let done = |c: &Container| match present(spec, observed, &c.name) {
        _ if is_sidecar(c) => started(spec, observed, health, c),
        status => status.is_some_and(|s| s.state == ContainerState::Exited && s.exit_code == 0),
    };
    spec.containers.iter().any(|c| present(spec, observed, &c.name).is_some())
        || spec.init_containers.iter().flatten().all(done)
}

/// Longest grace period that is honoured, in seconds (68 years): the API takes any number, clocks do not.
const LONGEST_GRACE: u64 = i32::MAX as u64;

/// How long a Pod's processes have to end: what the deletion says, else what the spec says, else 30 s.
pub fn grace(pod: &Pod) -> Duration {
    let empty = PodSpec::default();
    grace_of(pod.spec.as_ref().unwrap_or(&empty), pod.metadata.deletion_grace_period_seconds)
}

fn grace_of(spec: &PodSpec, deletion: Option<i64>) -> Duration {
    honoured(deletion.or(spec.termination_grace_period_seconds).unwrap_or(30))
}

/// What is granted of a grace period of so many seconds.
pub fn honoured(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(LONGEST_GRACE))
}

#[cfg(test)]
mod tests;
