//! The status of one ephemeral container: nothing of it counts for the Pod, and it is never started again.

use k8s_openapi::api::core::v1::{
    ContainerState as ApiState, ContainerStateTerminated, ContainerStatus as ApiStatus, EphemeralContainer,
};

use super::containers::{running, terminated, wait};
use super::{StatusInput, Trouble, is_running};
use crate::runtime::handler::with_scheme;
use crate::runtime::types::{ContainerState, ContainerStatus};

/// The status of `container`. As a kubelet has it, it is never ready and says nothing of having started.
pub(super) fn status(input: &StatusInput<'_>, container: &EphemeralContainer) -> ApiStatus {
    let latest = input.observed.latest(&container.name);
    let reported = reported(input, &container.name).filter(|_| latest.is_none());
    let seen = |of: fn(&ApiStatus) -> String| reported.map(of).unwrap_or_default();
    ApiStatus {
        name: container.name.clone(),
        image: latest.map_or_else(|| container.image.clone().unwrap_or_default(), |l| l.image_ref.clone()),
        image_id: latest.map_or_else(|| seen(|r| r.image_id.clone()), |l| l.image.to_string()),
        container_id: match latest {
            Some(latest) => Some(with_scheme(input.runtime_name, &latest.id)),
            None => reported.and_then(|r| r.container_id.clone()),
        },
        state: Some(state(input, container, latest)),
        last_state: Some(ApiState::default()),
        ..ApiStatus::default()
    }
}

/// What the API server was told of it.
pub(super) fn reported<'a>(input: &StatusInput<'a>, name: &str) -> Option<&'a ApiStatus> {
    input.pod.status.as_ref()?.ephemeral_container_statuses.iter().flatten().find(|c| c.name == name)
}

fn state(input: &StatusInput<'_>, container: &EphemeralContainer, latest: Option<&ContainerStatus>) -> ApiState {
    match latest {
        Some(now) if is_running(now.state) => running(now),
        Some(now) if now.state == ContainerState::Exited => terminated(input, now),
        _ => lost(input, &container.name).filter(|_| latest.is_none()).unwrap_or_else(|| {
            let waiting = input.waiting.get(&container.name).cloned();
            wait(waiting.unwrap_or_else(|| Trouble::new("ContainerCreating", "")))
        }),
    }
}

/// One that was there (the API server was told so) and is not any more: somebody removed it.
fn lost(input: &StatusInput<'_>, name: &str) -> Option<ApiState> {
    let before = reported(input, name)?;
    let id = before.container_id.clone()?;
    if let Some(state) = before.state.as_ref().filter(|state| state.terminated.is_some()) {
        return Some(state.clone());
    }
    let ended = ContainerStateTerminated {
        container_id: Some(id),
        exit_code: 137,
        reason: Some("ContainerStatusUnknown".to_owned()),
        message: Some("The container could not be located".to_owned()),
        ..ContainerStateTerminated::default()
    };
    Some(ApiState { terminated: Some(ended), ..ApiState::default() })
}
