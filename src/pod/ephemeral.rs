//! Ephemeral containers: what `kubectl debug` adds to a Pod that runs. Pure.
//!
//! One is started once, beside whatever else the Pod does, and never again: neither its start nor its end changes the
//! Pod's phase or readiness (Kubernetes documentation, "Ephemeral Containers"; KEP-277). A Pod that ends takes it along.

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// Those of a Pod, in the order in which they were added.
pub fn all(spec: &PodSpec) -> impl Iterator<Item = &EphemeralContainer> {
    spec.ephemeral_containers.iter().flatten()
}

/// The one of that name.
pub fn find<'a>(pod: &'a Pod, name: &str) -> Option<&'a EphemeralContainer> {
    all(pod.spec.as_ref()?).find(|container| container.name == name)
}

/// The container whose processes it wants to see, if it names one.
pub fn target(container: &EphemeralContainer) -> Option<&str> {
    container.target_container_name.as_deref().filter(|name| !name.is_empty())
}

/// What it has in common with every other container. The API forbids it everything else (ports, probes, resources,
/// lifecycle hooks, a restart policy).
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    let own = ephemeral.clone();
    Container {
        name: own.name,
        image: own.image,
        image_pull_policy: own.image_pull_policy,
        command: own.command,
        args: own.args,
        working_dir: own.working_dir,
        env: own.env,
        env_from: own.env_from,
        volume_mounts: own.volume_mounts,
        volume_devices: own.volume_devices,
        security_context: own.security_context,
        stdin: own.stdin,
        stdin_once: own.stdin_once,
        tty: own.tty,
        termination_message_path: own.termination_message_path,
        termination_message_policy: own.termination_message_policy,
        ..Container::default()
    }
}
