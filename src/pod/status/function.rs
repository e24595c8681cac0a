//! What a function Pod shows in place of containers: it runs since its front listens, whatever its replicas do.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::{Trouble, crash_loop};
use crate::function::pool_state::Summary;
use crate::pod::observed::Observed;
use crate::pod::qos::is_sidecar;
use crate::pod::translate::pod_ref;
use crate::runtime::types::{ContainerState, ContainerStatus, ImageId, SandboxStatus};

/// The scheme of the container ids of function Pods: no runtime knows them.
pub(in crate::pod) const SCHEME: &str = "lambdalet";

/// What a status is made from instead of what the runtime holds.
#[derive(Clone, Debug, Default)]
pub(in crate::pod) struct Shown {
    /// Containers that stand for the function.
    pub(in crate::pod) observed: Observed,
    /// Running containers are not ready: there are not as many replicas as there should be.
    pub(in crate::pod) unready: bool,
    /// Why its containers wait.
    pub(in crate::pod) trouble: Option<Trouble>,
    /// The text of the condition `lambdalet.dev/Replicas`, and whether it holds.
    pub(in crate::pod) replicas: Option<(bool, String)>,
}

/// Since when the Pod's own status says that it runs: the front was down with the node agent, and its environments were
/// not.
pub(in crate::pod) fn running_since(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.iter().flatten();
    let running = statuses.filter_map(|container| container.state.as_ref()?.running.as_ref()?.started_at.as_ref());
    running.map(|time| time.0).min()
}

/// What the Pod shows whose front listens since `since`.
pub(in crate::pod) fn shown(
    pod: &Pod,
    sandbox: Option<&SandboxStatus>,
    since: Option<Timestamp>,
    summary: Option<Summary>,
    drained: bool,
) -> Shown {
    let mut observed = Observed::new(sandbox.cloned().into_iter().collect(), Vec::new());
    let Some(sandbox) = sandbox.filter(|_| since.is_some() || drained) else {
        return Shown { observed, ..Shown::default() };
    };
    let summary = summary.unwrap_or_default();
    let crash = summary.crash.as_ref().filter(|crash| crash.until.is_some());
    let spec = pod.spec.clone().unwrap_or_default();
    let state = if drained || crash.is_some() { ContainerState::Exited } else { ContainerState::Running };
    for init in spec.init_containers.iter().flatten() {
        let state = if is_sidecar(init) { state } else { ContainerState::Exited };
        observed.put_container(stand_in(pod, sandbox, &init.name, state, since));
    }
    for container in &spec.containers {
        let mut status = stand_in(pod, sandbox, &container.name, state, since);
        status.attempt = u32::try_from(summary.crashes).unwrap_or(u32::MAX);
        status.image_ref = container.image.clone().unwrap_or_default();
        if let Some(crash) = crash {
            status.exit_code = crash.exit.code.unwrap_or(1);
            status.oom_killed = crash.exit.reason == "OOMKilled";
        }
        observed.put_container(status);
    }
    let trouble = crash.map(|crash| {
        let name = spec.containers.first().map(|c| c.name.clone()).unwrap_or_default();
        let left = crash.until.map(|until| until.saturating_duration_since(std::time::Instant::now()));
        let text = crash_loop(&name, &pod_ref(pod), left.unwrap_or_default()).message;
        Trouble::new("CrashLoopBackOff", format!("{text}: {}", crash.exit))
    });
    let ready = summary.is_ready();
    Shown { observed, unready: !ready, trouble, replicas: Some((ready, summary.to_string())) }
}

fn stand_in(
    pod: &Pod,
    sandbox: &SandboxStatus,
    name: &str,
    state: ContainerState,
    since: Option<Timestamp>,
) -> ContainerStatus {
    let ended = state == ContainerState::Exited;
    ContainerStatus {
        id: format!("{}/{name}", pod.metadata.uid.as_deref().unwrap_or_default()).into(),
        sandbox: sandbox.id.clone(),
        pod: pod_ref(pod),
        name: name.to_owned(),
        attempt: 0,
        state,
        created_at: since.unwrap_or_default(),
        started_at: since,
        finished_at: since.filter(|_| ended),
        frozen: false,
        exit_code: 0,
        oom_killed: false,
        message: String::new(),
        image: ImageId::from(""),
        image_ref: String::new(),
        pid: None,
        resources: None,
        annotations: std::collections::BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(statuses: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({ "status": { "containerStatuses": statuses } })).unwrap()
    }

    #[test]
    fn a_function_runs_since_the_api_server_was_told_so() {
        let running = |at: &str| {
            serde_json::json!({
                "name": at, "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                "state": { "running": { "startedAt": at } },
            })
        };
        let waiting = serde_json::json!({
            "name": "w", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "CrashLoopBackOff" } },
        });
        let (early, late) = ("2026-11-21T10:00:00Z", "2026-11-21T11:00:00Z");
        let both = pod(serde_json::json!([running(late), waiting, running(early)]));
        assert_eq!(running_since(&both), Some(early.parse().unwrap()));
        assert_eq!(running_since(&pod(serde_json::json!([waiting]))), None);
        assert_eq!(running_since(&Pod::default()), None, "it is new");
    }
}
