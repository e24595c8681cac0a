//! What a Pod asks for that this node does not do yet: said aloud, never passed over.

use k8s_openapi::api::core::v1::{Container, PodSpec};

use super::qos::is_sidecar;
use super::status::Trouble;

/// Reason of the events and of the refusal.
pub const REASON: &str = "UnsupportedPodFeature";

/// Why the Pod cannot be run at all here, if so: to run it without the feature would make it another Pod.
pub fn refusal(spec: &PodSpec) -> Option<Trouble> {
    let sidecar = spec.init_containers.iter().flatten().find(|c| is_sidecar(c));
    let text = if let Some(sidecar) = sidecar {
        format!("init container {:?} has restartPolicy Always (a sidecar)", sidecar.name)
    } else if spec.host_users == Some(false) {
        "the Pod asks for a user namespace of its own (hostUsers: false)".to_owned()
    } else {
        return None;
    };
    Some(Trouble::new(REASON, format!("Pod was rejected: {text}, which this node does not support yet")))
}

/// What is left out although the Pod runs, a sentence each.
pub fn omissions(spec: &PodSpec) -> Vec<String> {
    let mut list = Vec::new();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        of_container(container, &mut list);
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        list.push("resourceClaims are ignored: this node does not allocate devices yet".to_owned());
    }
    list
}

fn of_container(container: &Container, list: &mut Vec<String>) {
    let name = &container.name;
    let probes = [
        ("startupProbe", container.startup_probe.is_some()),
        ("readinessProbe", container.readiness_probe.is_some()),
        ("livenessProbe", container.liveness_probe.is_some()),
    ];
    for (probe, _) in probes.iter().filter(|(_, set)| *set) {
        list.push(format!("container {name:?}: {probe} is not run yet; a running container counts as ready"));
    }
    let hooks = container.lifecycle.as_ref();
    let hooks = [
        ("postStart", hooks.is_some_and(|l| l.post_start.is_some())),
        ("preStop", hooks.is_some_and(|l| l.pre_stop.is_some())),
    ];
    for (hook, _) in hooks.iter().filter(|(_, set)| *set) {
        list.push(format!("container {name:?}: lifecycle.{hook} is not run yet"));
    }
    for port in container.ports.iter().flatten().filter_map(|p| p.host_port).filter(|p| *p > 0) {
        list.push(format!("container {name:?}: hostPort {port} is not opened on the node yet; use the Pod's address"));
    }
}
