//! Pure: what a driver sees and what is kept of a request, as CRI's messages.

use std::collections::HashMap;

use jiff::Timestamp;
use lambdalet_proto::cri::v1;

use crate::runtime::types::{ContainerState, ContainerStatus, Image, Resources, SandboxState, SandboxStatus};

/// What is kept of a sandbox, if it is.
type OfSandbox<'a> = Option<&'a v1::RunPodSandboxRequest>;
/// What is kept of a container, if it is.
type OfContainer<'a> = Option<&'a v1::CreateContainerRequest>;

/// Nanoseconds since 1970; 0 for never.
pub(super) fn nanoseconds(time: Option<Timestamp>) -> i64 {
    time.map_or(0, |time| i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX))
}

fn sandbox_metadata(status: &SandboxStatus) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: status.pod.name.clone(),
        uid: status.pod.uid.clone(),
        namespace: status.pod.namespace.clone(),
        attempt: status.attempt,
    }
}

fn sandbox_state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

fn container_state(state: ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running => v1::ContainerState::ContainerRunning,
        ContainerState::Exited => v1::ContainerState::ContainerExited,
    }
}

/// One of a list of sandboxes.
pub(super) fn sandbox(status: &SandboxStatus, kept: OfSandbox<'_>) -> v1::PodSandbox {
    let config = kept.and_then(|kept| kept.config.as_ref());
    v1::PodSandbox {
        id: status.id.to_string(),
        metadata: Some(sandbox_metadata(status)),
        state: sandbox_state(status.state).into(),
        created_at: nanoseconds(Some(status.created_at)),
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        runtime_handler: kept.map(|kept| kept.runtime_handler.clone()).unwrap_or_default(),
    }
}

/// The status of a sandbox. One that is not ready has no address, nor has one on the host's network.
pub(super) fn sandbox_status(status: &SandboxStatus, kept: OfSandbox<'_>) -> v1::PodSandboxStatus {
    let v1::PodSandbox { id, metadata, state, created_at, labels, annotations, runtime_handler } =
        sandbox(status, kept);
    let ready = status.state == SandboxState::Ready;
    let mut addresses = status.addresses.iter().filter(|_| ready).map(ToString::to_string);
    let linux = kept.and_then(|kept| kept.config.as_ref()?.linux.as_ref()?.security_context.as_ref());
    let options = linux.and_then(|context| context.namespace_options.clone());
    v1::PodSandboxStatus {
        id,
        metadata,
        state,
        created_at,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: addresses.next().unwrap_or_default(),
            additional_ips: addresses.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus { namespaces: Some(v1::Namespace { options }) }),
        labels,
        annotations,
        runtime_handler,
    }
}

/// The image as the client named it.
fn image_spec(status: &ContainerStatus, config: Option<&v1::ContainerConfig>) -> v1::ImageSpec {
    let kept = config.and_then(|config| config.image.clone()).unwrap_or_default();
    v1::ImageSpec { image: status.image_ref.clone(), ..kept }
}

/// One of a list of containers.
pub(super) fn container(status: &ContainerStatus, kept: OfContainer<'_>) -> v1::Container {
    let config = kept.and_then(|kept| kept.config.as_ref());
    v1::Container {
        id: status.id.to_string(),
        pod_sandbox_id: status.sandbox.to_string(),
        metadata: Some(v1::ContainerMetadata { name: status.name.clone(), attempt: status.attempt }),
        image: Some(image_spec(status, config)),
        image_ref: status.image.to_string(),
        state: container_state(status.state).into(),
        created_at: nanoseconds(Some(status.created_at)),
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        image_id: status.image.to_string(),
    }
}

/// Why a container has ended, in the words that kubelets know.
fn reason(status: &ContainerStatus) -> &'static str {
    match status.state {
        ContainerState::Created | ContainerState::Running => "",
        ContainerState::Exited if status.oom_killed => "OOMKilled",
        ContainerState::Exited if status.started_at.is_none() && !status.message.is_empty() => "StartError",
        ContainerState::Exited if status.exit_code == 0 => "Completed",
        ContainerState::Exited => "Error",
    }
}

/// The status of a container, with the file that its log is in.
pub(super) fn container_status(status: &ContainerStatus, kept: OfContainer<'_>, log: &str) -> v1::ContainerStatus {
    let v1::Container { id, metadata, image, image_ref, state, created_at, labels, annotations, image_id, .. } =
        container(status, kept);
    let config = kept.and_then(|kept| kept.config.as_ref());
    let exited = status.state == ContainerState::Exited;
    v1::ContainerStatus {
        id,
        metadata,
        state,
        created_at,
        started_at: nanoseconds(status.started_at),
        finished_at: nanoseconds(status.finished_at.filter(|_| exited)),
        exit_code: if exited { status.exit_code } else { 0 },
        image,
        image_ref,
        reason: reason(status).to_owned(),
        message: status.message.clone(),
        labels,
        annotations,
        mounts: config.map(|config| config.mounts.clone()).unwrap_or_default(),
        log_path: log.to_owned(),
        resources: status
            .resources
            .as_ref()
            .map(|limits| v1::ContainerResources { linux: Some(resources(limits)), windows: None }),
        image_id,
        user: config.and_then(user).map(|user| v1::ContainerUser { linux: Some(user) }),
        stop_signal: config.map_or(0, |config| config.stop_signal),
    }
}

/// Who runs it, where the client said all of it. Else only the image knows.
fn user(config: &v1::ContainerConfig) -> Option<v1::LinuxContainerUser> {
    let context = config.linux.as_ref()?.security_context.as_ref()?;
    Some(v1::LinuxContainerUser {
        uid: context.run_as_user.as_ref()?.value,
        gid: context.run_as_group.as_ref()?.value,
        supplemental_groups: context.supplemental_groups.clone(),
    })
}

/// Limits; 0 is none, as CRI has it.
fn resources(limits: &Resources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: limits.cpu_period.unwrap_or(0),
        cpu_quota: limits.cpu_quota.unwrap_or(0),
        cpu_shares: limits.cpu_shares.unwrap_or(0),
        memory_limit_in_bytes: limits.memory_limit.unwrap_or(0),
        oom_score_adj: limits.oom_score_adj.unwrap_or(0),
        ..Default::default()
    }
}

/// An image. Whoever runs it is told by number where the image says a number, else by name.
pub(super) fn image(image: &Image) -> v1::Image {
    let user = image.user.split(':').next().unwrap_or_default();
    let uid = user.parse().ok().map(|value| v1::Int64Value { value });
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        username: if uid.is_none() { user.to_owned() } else { String::new() },
        uid: uid.or_else(|| user.is_empty().then_some(v1::Int64Value { value: 0 })),
        spec: Some(v1::ImageSpec { image: image.id.to_string(), ..Default::default() }),
        pinned: image.pinned,
    }
}

/// What is known of an image besides (`verbose`), as one JSON object.
pub(super) fn image_info(image: &Image) -> HashMap<String, String> {
    let config = serde_json::json!({
        "User": image.user, "Entrypoint": image.entrypoint, "Cmd": image.command, "Env": image.environment,
    });
    let info = serde_json::json!({ "imageSpec": { "config": config } });
    HashMap::from([("info".to_owned(), info.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::types::PodRef;

    fn exited() -> ContainerStatus {
        ContainerStatus {
            id: "c".into(),
            sandbox: "s".into(),
            pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() },
            name: "main".into(),
            attempt: 2,
            state: ContainerState::Exited,
            frozen: false,
            created_at: Timestamp::from_nanosecond(5).unwrap(),
            started_at: Some(Timestamp::from_nanosecond(6).unwrap()),
            finished_at: Some(Timestamp::from_nanosecond(7).unwrap()),
            exit_code: 3,
            oom_killed: false,
            message: String::new(),
            image: "sha256:1".into(),
            image_ref: "busybox:1".into(),
            pid: None,
            resources: None,
            annotations: Default::default(),
        }
    }

    #[test]
    fn an_ended_container_says_why_in_words_a_kubelet_knows() {
        let table = [
            (exited(), "Error"),
            (ContainerStatus { exit_code: 0, ..exited() }, "Completed"),
            (ContainerStatus { oom_killed: true, ..exited() }, "OOMKilled"),
            (ContainerStatus { started_at: None, message: "no such file".into(), ..exited() }, "StartError"),
            (ContainerStatus { state: ContainerState::Running, ..exited() }, ""),
        ];
        for (status, wanted) in table {
            let told = container_status(&status, None, "");
            assert_eq!(told.reason, wanted);
            assert_eq!(told.finished_at != 0, status.state == ContainerState::Exited);
        }
    }

    #[test]
    fn a_container_without_a_record_has_all_that_the_driver_knows() {
        let told = container_status(&exited(), None, "/l");
        assert_eq!(told.metadata.map(|metadata| (metadata.name, metadata.attempt)), Some(("main".to_owned(), 2)));
        assert_eq!((told.created_at, told.started_at, told.finished_at, told.exit_code), (5, 6, 7, 3));
        assert_eq!((told.image.unwrap().image.as_str(), told.image_id.as_str()), ("busybox:1", "sha256:1"));
        assert_eq!(told.log_path, "/l");
    }

    #[test]
    fn a_user_is_a_number_or_a_name() {
        let of = |user: &str| {
            let image = Image { user: user.to_owned(), ..Image::new("sha256:1") };
            let told = super::image(&image);
            (told.uid.map(|uid| uid.value), told.username)
        };
        assert_eq!(of("1000:1000"), (Some(1000), String::new()));
        assert_eq!(of("www-data:33"), (None, "www-data".to_owned()));
        assert_eq!(of(""), (Some(0), String::new()));
    }
}
