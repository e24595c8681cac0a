//! The status of one container.

use std::time::Duration;

use k8s_openapi::api::core::v1::{
    Container, ContainerState as ApiState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus as ApiStatus, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{StatusInput, Trouble, ephemeral, is_running};
use crate::pod::qos::is_sidecar;
use crate::pod::{plan, qos, resize};
use crate::runtime::handler::with_scheme;
use crate::runtime::types::{ContainerState, ContainerStatus};

/// The status of `container`.
pub(super) fn status(input: &StatusInput<'_>, container: &Container, init: bool) -> ApiStatus {
    let latest = input.observed.latest(&container.name);
    let before = latest.and_then(|l| input.observed.attempts(&container.name).iter().rev().find(|c| c.id != l.id));
    let reported = reported(input, &container.name, init);
    let state = state(input, container, latest, init);
    let restarting = state.waiting.is_some();
    let last_state = match latest {
        Some(now) if restarting && now.state == ContainerState::Exited => Some(terminated(input, now)),
        Some(_) => before.filter(|b| b.state == ContainerState::Exited).map(|b| terminated(input, b)),
        None => None,
    }
    .or_else(|| reported.and_then(|r| r.last_state.clone()).filter(|_| latest.is_none()));
    let seen = latest.map_or(0, |l| i32::try_from(l.attempt).unwrap_or(i32::MAX));
    let running = latest.is_some_and(|l| is_running(l.state)) && !input.terminal;
    let sidecar = init && is_sidecar(container);
    let health = latest.map(|l| input.health.of(&l.id)).unwrap_or_default();
    let started = running && health.started;
    let succeeded = latest.is_some_and(|l| l.state == ContainerState::Exited && l.exit_code == 0);
    ApiStatus {
        name: container.name.clone(),
        image: latest.map_or_else(|| container.image.clone().unwrap_or_default(), |l| l.image_ref.clone()),
        image_id: latest.map(|l| l.image.to_string()).unwrap_or_default(),
        container_id: latest.map(|l| with_scheme(input.runtime_name, &l.id)),
        ready: if init && !sidecar { succeeded } else { started && health.ready && !input.unready },
        started: Some(started),
        restart_count: seen.max(if latest.is_none() { reported.map_or(0, |r| r.restart_count) } else { 0 }),
        state: Some(state),
        last_state: last_state.or_else(|| Some(ApiState::default())),
        resources: resources(input, container, latest),
        stop_signal: container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.clone()),
        allocated_resources: container.resources.as_ref().and_then(|r| r.requests.clone()),
        ..ApiStatus::default()
    }
}

/// What was allocated, or of a running container what is in effect.
fn resources(
    input: &StatusInput<'_>,
    container: &Container,
    latest: Option<&ContainerStatus>,
) -> Option<ResourceRequirements> {
    let allocated = container.resources.clone();
    let (Some(spec), Some(now)) = (&input.pod.spec, latest.filter(|now| is_running(now.state))) else {
        return allocated;
    };
    let wanted = qos::container_resources(spec, container, 1, input.cpu_quota);
    allocated.map(|allocated| resize::in_effect(&allocated, &wanted, now.resources.as_ref()))
}

fn reported<'a>(input: &StatusInput<'a>, name: &str, init: bool) -> Option<&'a ApiStatus> {
    let status = input.pod.status.as_ref()?;
    let list = if init { &status.init_container_statuses } else { &status.container_statuses };
    list.iter().flatten().find(|c| c.name == name)
}

fn state(input: &StatusInput<'_>, container: &Container, latest: Option<&ContainerStatus>, init: bool) -> ApiState {
    let waiting = input.waiting.get(&container.name);
    match latest {
        Some(now) if is_running(now.state) => running(now),
        Some(now) if now.state == ContainerState::Exited => match waiting {
            Some(trouble) if !input.terminal && input.ended.is_none() => wait(trouble.clone()),
            _ => terminated(input, now),
        },
        _ => lost(input, container, init)
            .unwrap_or_else(|| wait(waiting.cloned().unwrap_or_else(|| Trouble::new(default_reason(input, init), "")))),
    }
}

pub(super) fn running(now: &ContainerStatus) -> ApiState {
    ApiState { running: Some(ContainerStateRunning { started_at: now.started_at.map(Time) }), ..ApiState::default() }
}

/// A container that ran (the API server was told so) and is not there any more when the Pod ends.
fn lost(input: &StatusInput<'_>, container: &Container, init: bool) -> Option<ApiState> {
    let before = reported(input, &container.name, init)?;
    let was = before.state.as_ref()?;
    if !input.terminal {
        return None;
    }
    if was.terminated.is_some() {
        return Some(was.clone());
    }
    was.running.as_ref()?;
    Some(ApiState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some("The container could not be located when the pod was terminated".to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ApiState::default()
    })
}

fn default_reason(input: &StatusInput<'_>, init: bool) -> &'static str {
    let has_init = input.pod.spec.as_ref().and_then(|s| s.init_containers.as_ref()).is_some_and(|l| !l.is_empty());
    let initialized = input.pod.spec.as_ref().is_none_or(|spec| plan::initialized(spec, input.observed, input.health));
    if has_init && (init || !initialized) { "PodInitializing" } else { "ContainerCreating" }
}

pub(super) fn wait(trouble: Trouble) -> ApiState {
    let message = Some(trouble.message).filter(|m| !m.is_empty());
    ApiState { waiting: Some(ContainerStateWaiting { reason: Some(trouble.reason), message }), ..ApiState::default() }
}

pub(super) fn terminated(input: &StatusInput<'_>, status: &ContainerStatus) -> ApiState {
    let container_id = with_scheme(input.runtime_name, &status.id);
    let left = input.messages.get(&status.id).filter(|m| !m.is_empty()).cloned();
    let left = left.or_else(|| reported_message(input, &status.name, &container_id));
    ApiState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(container_id),
            exit_code: status.exit_code,
            finished_at: status.finished_at.map(Time),
            started_at: status.started_at.map(Time),
            reason: Some(reason(status).to_owned()),
            message: left.or_else(|| Some(status.message.clone()).filter(|m| !m.is_empty())),
            signal: None,
        }),
        ..ApiState::default()
    }
}

/// What this attempt left according to the API server: after a restart the file may be gone.
fn reported_message(input: &StatusInput<'_>, name: &str, container_id: &str) -> Option<String> {
    let main = reported(input, name, true).or_else(|| reported(input, name, false));
    let before = main.or_else(|| ephemeral::reported(input, name))?;
    let states = [before.state.as_ref(), before.last_state.as_ref()];
    let ended = states.into_iter().flatten().filter_map(|state| state.terminated.as_ref());
    ended.into_iter().find(|t| t.container_id.as_deref() == Some(container_id))?.message.clone()
}

/// Why a container ended.
fn reason(status: &ContainerStatus) -> &'static str {
    if status.oom_killed {
        "OOMKilled"
    } else if !status.message.is_empty() && status.started_at.is_none() {
        "StartError"
    } else if status.exit_code == 0 {
        "Completed"
    } else {
        "Error"
    }
}

/// What a container that waits for its next start is told to say.
pub(in crate::pod) fn crash_loop(container: &str, pod: &crate::runtime::types::PodRef, delay: Duration) -> Trouble {
    let message = format!(
        "back-off {} restarting failed container={container} pod={}_{}({})",
        go_duration(delay),
        pod.name,
        pod.namespace,
        pod.uid
    );
    Trouble::new("CrashLoopBackOff", message)
}

/// Whole seconds the way Go prints them (`10s`, `1m20s`, `5m0s`).
fn go_duration(delay: Duration) -> String {
    match (delay.as_secs() / 60, delay.as_secs() % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}
