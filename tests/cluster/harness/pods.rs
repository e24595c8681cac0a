//! Writing and reading Pods.

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, Pod, PodCondition,
};
use serde_json::{Value, json};

use super::BUSYBOX;

/// A container `main` that runs a shell script. As PID 1 the shell ignores SIGTERM unless the script traps it.
pub(crate) fn busybox(script: &str) -> Value {
    container("main", script)
}

pub(crate) fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

/// The same, with more fields.
pub(crate) fn busybox_with(script: &str, more: Value) -> Value {
    with(busybox(script), more)
}

/// Lays the fields of `more` over an object.
pub(crate) fn with(mut object: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("not an object: {more}") };
    object.as_object_mut().unwrap().extend(more);
    object
}

/// A spec whose only container stays up until it is told to end, and then ends at once.
pub(crate) fn sleeper() -> Value {
    json!({"containers": [busybox(STAY)]})
}

/// Stays up until SIGTERM.
pub(crate) const STAY: &str = "trap 'exit 0' TERM; echo up; while true; do sleep 3600 & wait; done";

pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("")
}

pub(crate) fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub(crate) fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == type_)
}

/// Whether a condition holds.
pub(crate) fn holds(pod: &Pod, type_: &str) -> bool {
    pod_condition(pod, type_).is_some_and(|c| c.status == "True")
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    phase(pod) == "Running" && holds(pod, "Ready")
}

/// The status of a container, init containers included.
pub(crate) fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    all.into_iter().find(|c| c.name == container)
}

fn state<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerState> {
    status(pod, container)?.state.as_ref()
}

pub(crate) fn waiting<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateWaiting> {
    state(pod, container)?.waiting.as_ref()
}

/// Why a container waits.
pub(crate) fn waits_for<'a>(pod: &'a Pod, container: &str) -> Option<&'a str> {
    waiting(pod, container)?.reason.as_deref()
}

pub(crate) fn terminated<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateTerminated> {
    state(pod, container)?.terminated.as_ref()
}

/// How the attempt before the present one ended.
pub(crate) fn last_terminated<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateTerminated> {
    status(pod, container)?.last_state.as_ref()?.terminated.as_ref()
}

pub(crate) fn exit_code(pod: &Pod, container: &str) -> Option<i32> {
    terminated(pod, container).map(|t| t.exit_code)
}

pub(crate) fn restarts(pod: &Pod, container: &str) -> i32 {
    status(pod, container).map_or(0, |s| s.restart_count)
}

pub(crate) fn pod_ip(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.pod_ip.as_deref()).unwrap_or("")
}

/// `status.reason`, for Pods that the node ended or refused.
pub(crate) fn pod_reason(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.reason.as_deref()).unwrap_or("")
}

pub(crate) fn pod_message(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.message.as_deref()).unwrap_or("")
}

/// A container's id without the name of what runs it.
pub(crate) fn bare(id: &str) -> &str {
    id.split_once("://").map_or(id, |(_, bare)| bare)
}

/// What identifies a run of a container: a restart changes it.
pub(crate) fn identity(pod: &Pod, container: &str) -> (String, String, i32, String) {
    let status = status(pod, container).unwrap();
    let running = status.state.as_ref().unwrap().running.as_ref();
    let started = running.and_then(|r| r.started_at.as_ref()).map(|t| t.0.to_string()).unwrap_or_default();
    let id = status.container_id.clone().unwrap_or_default();
    (id, started, status.restart_count, pod_ip(pod).to_owned())
}
