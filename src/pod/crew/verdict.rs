//! What the status of an environment says to its pool.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

use super::failed;
use crate::function::pool_state::Exit;

/// Whether an environment takes calls, or will not; `None` while that is open.
pub(super) fn verdict(status: &PodStatus) -> Option<Result<IpAddr, Exit>> {
    if let Some(exit) = ended(status) {
        return Some(Err(exit));
    }
    let each = || status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let stuck = each().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|r| !matches!(*r, "ContainerCreating" | "PodInitializing"))?;
        Some(failed(reason, waiting.message.clone().unwrap_or_default()))
    });
    if let Some(exit) = stuck {
        return Some(Err(exit));
    }
    // Ready too, where a probe says when that is.
    let runs = |container: &ContainerStatus| {
        container.ready && container.state.as_ref().is_some_and(|state| state.running.is_some())
    };
    let main = status.container_statuses.as_ref()?;
    (!main.is_empty() && main.iter().all(runs)).then(|| {
        let address = status.pod_ip.as_ref().and_then(|ip| ip.parse().ok());
        address.ok_or_else(|| failed("NoAddress", "it has no address".to_owned()))
    })
}

/// Whether an environment that takes calls may have another: every container is ready, as its probe says.
pub(super) fn is_ready(status: &PodStatus) -> bool {
    status.container_statuses.iter().flatten().all(|container| container.ready)
}

/// How it ended: with its first container that did, or with a failed init container.
pub(super) fn ended(status: &PodStatus) -> Option<Exit> {
    let end = |container: &ContainerStatus, init: bool| {
        let ended = container.state.as_ref()?.terminated.as_ref()?;
        if init && ended.exit_code == 0 {
            return None;
        }
        let reason = ended.reason.clone().unwrap_or_else(|| "Error".to_owned());
        Some(Exit { code: Some(ended.exit_code), reason, message: ended.message.clone().unwrap_or_default() })
    };
    let init = status.init_container_statuses.iter().flatten().find_map(|container| end(container, true));
    init.or_else(|| status.container_statuses.iter().flatten().find_map(|container| end(container, false)))
}
