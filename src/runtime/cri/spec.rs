//! Pure: our configs as CRI's messages.

use std::collections::HashMap;

use lambdalet_proto::cri::v1;

use crate::runtime::labels::{self, Facts};
use crate::runtime::types::{
    ContainerConfig, Mount, MountPropagation, NamespaceMode, Profile, Resources, SandboxConfig, SandboxId,
    SandboxNetwork, Security,
};

/// The image that was asked for, by id: what a runtime says of a container's image differs from one to the next.
pub(super) const IMAGE: &str = "lambdalet.dev/image";
/// Which of `stdin`, `once` and `tty` a container has.
pub(super) const STREAMS: &str = "lambdalet.dev/streams";
/// [`ContainerConfig::stop_signal`].
pub(super) const STOP_SIGNAL: &str = "lambdalet.dev/stop-signal";
const HOSTNAME: &str = "lambdalet.dev/hostname";
const PID: &str = "lambdalet.dev/pid";
const IPC: &str = "lambdalet.dev/ipc";

/// What a process without `procMount: Unmasked` does not see, and may not write: a kubelet's lists
/// (KK pkg/securitycontext/util.go).
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Labels and annotations of one object: by the former it is found, the latter may hold anything.
type Notes = (HashMap<String, String>, HashMap<String, String>);

fn notes(all: HashMap<String, String>) -> Notes {
    // The plug-in that the runtime asks for an address is shown annotations only (see `args::cni`).
    all.into_iter().partition(|(key, _)| !key.starts_with(labels::ANNOTATION_PREFIX) && key != labels::ADDRESS)
}

/// Whether the sandbox has a network of its own, not the host's.
pub(super) fn has_own_network(status: &v1::PodSandboxStatus) -> bool {
    status.annotations.contains_key(labels::ADDRESS)
}

/// What the labels and annotations of an object say; `None` if it is not an object of `owner`.
pub(super) fn facts(
    owner: &str,
    labels: &HashMap<String, String>,
    annotations: &HashMap<String, String>,
) -> Option<Facts> {
    let all = labels.iter().chain(annotations).map(|(key, value)| (key.clone(), value.clone())).collect();
    labels::read(owner, &all)
}

/// The sandbox, with its cgroup as the runtime wants it and the directory of its Pod's logs.
pub(super) fn sandbox(
    owner: &str,
    config: &SandboxConfig,
    cgroup_parent: String,
    log_directory: String,
) -> v1::PodSandboxConfig {
    let own_network = config.network != SandboxNetwork::Host;
    let (labels, mut annotations) = notes(labels::of_sandbox(owner, config));
    annotations.insert(HOSTNAME.to_owned(), config.hostname.clone());
    annotations.insert(PID.to_owned(), mode(config.pid).as_str_name().to_owned());
    annotations.insert(IPC.to_owned(), mode(config.ipc).as_str_name().to_owned());
    v1::PodSandboxConfig {
        // Runtimes make names of it, which must be nobody else's: two owners may have static Pods of one UID.
        metadata: Some(v1::PodSandboxMetadata {
            name: config.pod.name.clone(),
            uid: format!("{}.{owner}", config.pod.uid),
            namespace: config.pod.namespace.clone(),
            attempt: config.attempt,
        }),
        // On the host's network it has the host's name.
        hostname: if own_network { config.hostname.clone() } else { String::new() },
        log_directory,
        labels,
        annotations,
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(own_network, config.pid, config.ipc)),
                // Compiling a filter takes runc a fifth of the time of a start, and the process has no rights to lose.
                seccomp: Some(profile(&Profile::Unconfined)),
                ..v1::LinuxSandboxSecurityContext::default()
            }),
            sysctls: config.sysctls.clone().into_iter().collect(),
            resources: Some(resources(&config.resources)),
            ..v1::LinuxPodSandboxConfig::default()
        }),
        ..v1::PodSandboxConfig::default()
    }
}

/// The sandbox as one of its containers has to name it, from what the runtime tells of it. A `privileged` container is let
/// in by a sandbox that says it is, which nobody knew when that was made: it may have come to the Pod since.
pub(super) fn sandbox_again(
    status: &v1::PodSandboxStatus,
    cgroup_parent: String,
    log_directory: String,
    privileged: bool,
) -> v1::PodSandboxConfig {
    let said = |key: &str| status.annotations.get(key).cloned().unwrap_or_default();
    let own_network = has_own_network(status);
    let named = |key: &str| v1::NamespaceMode::from_str_name(&said(key)).unwrap_or_default().into();
    let options = v1::NamespaceOption {
        network: network(own_network).into(),
        pid: named(PID),
        ipc: named(IPC),
        ..v1::NamespaceOption::default()
    };
    v1::PodSandboxConfig {
        metadata: status.metadata.clone(),
        hostname: if own_network { said(HOSTNAME) } else { String::new() },
        log_directory,
        labels: status.labels.clone(),
        annotations: status.annotations.clone(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                privileged,
                ..v1::LinuxSandboxSecurityContext::default()
            }),
            ..v1::LinuxPodSandboxConfig::default()
        }),
        ..v1::PodSandboxConfig::default()
    }
}

/// A container of the sandbox. `image_user` is the image's USER.
pub(super) fn container(
    (owner, sandbox): (&str, &SandboxId),
    config: &ContainerConfig,
    image_user: &str,
    own_network: bool,
    log_path: String,
) -> v1::ContainerConfig {
    let (labels, mut annotations) = notes(labels::of_container(owner, sandbox, config));
    annotations.insert(IMAGE.to_owned(), config.image.to_string());
    let streams = [(config.stdin, "stdin"), (config.stdin_once, "once"), (config.tty, "tty")];
    let streams: Vec<_> = streams.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect();
    annotations.insert(STREAMS.to_owned(), streams.join(" "));
    annotations.extend(config.stop_signal.iter().map(|signal| (STOP_SIGNAL.to_owned(), signal.clone())));
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: config.name.clone(), attempt: config.attempt }),
        image: Some(v1::ImageSpec {
            image: config.image.to_string(),
            user_specified_image: config.image_ref.clone(),
            ..v1::ImageSpec::default()
        }),
        command: config.command.clone(),
        args: config.args.clone(),
        working_dir: config.working_dir.clone().unwrap_or_default(),
        envs: environment(&config.env),
        mounts: config.mounts.iter().map(mount).collect(),
        labels,
        annotations,
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(resources(&config.resources)),
            security_context: Some(security(config, image_user, own_network)),
        }),
        ..v1::ContainerConfig::default()
    }
}

fn security(config: &ContainerConfig, image_user: &str, own_network: bool) -> v1::LinuxContainerSecurityContext {
    let security = &config.security;
    let options = namespaces(own_network, config.pid, config.ipc);
    let options = match &config.pid_target {
        Some(target) => {
            v1::NamespaceOption { pid: v1::NamespaceMode::Target.into(), target_id: target.to_string(), ..options }
        }
        None => options,
    };
    let (uid, name) = user(security, image_user);
    let masks = !security.unmasked_proc && !security.privileged;
    let paths = |paths: &[&str]| paths.iter().filter(|_| masks).map(|path| (*path).to_owned()).collect();
    v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: security.add_capabilities.iter().map(|name| capability(name)).collect(),
            drop_capabilities: security.drop_capabilities.iter().map(|name| capability(name)).collect(),
            ..v1::Capability::default()
        }),
        privileged: security.privileged,
        namespace_options: Some(options),
        run_as_user: uid.map(|value| v1::Int64Value { value }),
        run_as_username: name,
        run_as_group: security.run_as_group.map(|value| v1::Int64Value { value }),
        readonly_rootfs: security.read_only_rootfs,
        supplemental_groups: security.supplemental_groups.clone(),
        no_new_privs: security.no_new_privileges,
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READ_ONLY),
        seccomp: Some(profile(&security.seccomp)),
        // The runtime's own is what it takes if none is named; to name it is an error on a host without AppArmor.
        apparmor: (security.apparmor != Profile::RuntimeDefault).then(|| profile(&security.apparmor)),
        ..v1::LinuxContainerSecurityContext::default()
    }
}

/// The user by number or by name. A group needs one beside it, so then the image's is told.
fn user(security: &Security, image_user: &str) -> (Option<i64>, String) {
    if security.run_as_user.is_some() || security.run_as_group.is_none() {
        return (security.run_as_user, String::new());
    }
    let name = image_user.split(':').next().filter(|name| !name.is_empty()).unwrap_or("0");
    name.parse().map_or_else(|_| (None, name.to_owned()), |uid| (Some(uid), String::new()))
}

/// The last value of a name counts, wherever the runtime looks first.
fn environment(env: &[(String, String)]) -> Vec<v1::KeyValue> {
    let last = |at: usize, name: &str| !env[at + 1..].iter().any(|(later, _)| later == name);
    let kept = env.iter().enumerate().filter(|(at, (name, _))| last(*at, name));
    kept.map(|(_, (key, value))| v1::KeyValue { key: key.clone(), value: value.clone().into() }).collect()
}

fn mount(mount: &Mount) -> v1::Mount {
    let propagation = match mount.propagation {
        MountPropagation::Private => v1::MountPropagation::PropagationPrivate,
        MountPropagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
        MountPropagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
    };
    v1::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.read_only,
        propagation: propagation.into(),
        ..v1::Mount::default()
    }
}

/// CRI writes them without their prefix, as a Pod does.
fn capability(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
}

fn profile(profile: &Profile) -> v1::SecurityProfile {
    use v1::security_profile::ProfileType;
    let (profile_type, localhost_ref) = match profile {
        Profile::RuntimeDefault => (ProfileType::RuntimeDefault, String::new()),
        Profile::Unconfined => (ProfileType::Unconfined, String::new()),
        Profile::Localhost(name) => (ProfileType::Localhost, name.clone()),
    };
    v1::SecurityProfile { profile_type: profile_type.into(), localhost_ref }
}

fn namespaces(own_network: bool, pid: NamespaceMode, ipc: NamespaceMode) -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: network(own_network).into(),
        pid: mode(pid).into(),
        ipc: mode(ipc).into(),
        ..v1::NamespaceOption::default()
    }
}

fn network(own: bool) -> v1::NamespaceMode {
    if own { v1::NamespaceMode::Pod } else { v1::NamespaceMode::Node }
}

fn mode(mode: NamespaceMode) -> v1::NamespaceMode {
    match mode {
        NamespaceMode::Pod => v1::NamespaceMode::Pod,
        NamespaceMode::Container => v1::NamespaceMode::Container,
        NamespaceMode::Node => v1::NamespaceMode::Node,
    }
}

/// Limits as CRI has them: zero is none, and there is no limit of processes (the Pod's cgroup has that).
pub(super) fn resources(resources: &Resources) -> v1::LinuxContainerResources {
    let Resources { cpu_shares, cpu_quota, cpu_period, memory_limit, oom_score_adj, pids_limit: _ } = resources;
    v1::LinuxContainerResources {
        cpu_shares: cpu_shares.unwrap_or(0),
        cpu_quota: cpu_quota.unwrap_or(0),
        cpu_period: cpu_quota.and(*cpu_period).unwrap_or(0),
        memory_limit_in_bytes: memory_limit.unwrap_or(0),
        oom_score_adj: oom_score_adj.unwrap_or(0),
        ..v1::LinuxContainerResources::default()
    }
}

/// The limits a runtime tells of a container.
pub(super) fn limits(linux: &v1::LinuxContainerResources) -> Resources {
    let set = |limit: i64| Some(limit).filter(|limit| *limit != 0);
    Resources {
        cpu_shares: set(linux.cpu_shares),
        cpu_quota: set(linux.cpu_quota),
        cpu_period: set(linux.cpu_period),
        memory_limit: set(linux.memory_limit_in_bytes),
        oom_score_adj: Some(linux.oom_score_adj),
        pids_limit: None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::runtime::types::{MachineFiles, PodRef};

    fn pod() -> PodRef {
        PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() }
    }

    fn config(network: SandboxNetwork) -> SandboxConfig {
        SandboxConfig {
            pod: pod(),
            handler: None,
            attempt: 2,
            hostname: "h".into(),
            network,
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: "/l/podu".into(),
            resources: Resources::default(),
            machine: MachineFiles::default(),
        }
    }

    #[test]
    fn containers_name_their_sandbox_as_it_was_made() {
        for address in [None, Some([10, 0, 0, 7].into())] {
            let network = address.map_or(SandboxNetwork::Host, |address| SandboxNetwork::Pod { address });
            let made = sandbox("o", &config(network), "/c".into(), "/logs".into());
            let status = v1::PodSandboxStatus {
                metadata: made.metadata.clone(),
                labels: made.labels.clone(),
                annotations: made.annotations.clone(),
                ..v1::PodSandboxStatus::default()
            };
            let again = sandbox_again(&status, "/c".into(), "/logs".into(), false);
            let privileged = |asked| {
                let again = sandbox_again(&status, "/c".into(), "/logs".into(), asked);
                again.linux.unwrap().security_context.unwrap().privileged
            };
            assert!(privileged(true) && !privileged(false));
            let options = |config: &v1::PodSandboxConfig| {
                config.linux.clone().and_then(|linux| linux.security_context?.namespace_options)
            };
            assert_eq!(options(&again), options(&made));
            assert_eq!((&again.hostname, &again.annotations), (&made.hostname, &made.annotations));
            let facts = facts("o", &made.labels, &made.annotations).unwrap();
            assert_eq!(facts.addresses, address.into_iter().collect::<Vec<_>>());
            assert_eq!((facts.attempt, facts.cgroup.as_str(), facts.sandbox_itself), (2, "/l/podu", true));
        }
    }

    #[test]
    fn what_a_caller_notes_on_a_container_is_no_label() {
        let annotations = BTreeMap::from([("odd/key".to_owned(), "ä \"=\n".to_owned())]);
        let config = ContainerConfig {
            annotations: annotations.clone(),
            tty: true,
            stdin: true,
            ..ContainerConfig::new(pod(), "c", "sha256:1".into(), Vec::new())
        };
        let made = container(("o", &"s".into()), &config, "", true, "c/0.log".into());
        assert!(made.labels.keys().all(|key| key.starts_with("lambdalet.dev/")));
        assert_eq!(facts("o", &made.labels, &made.annotations).unwrap().annotations, annotations);
        assert_eq!(made.annotations[STREAMS], "stdin tty");
    }

    #[test]
    fn a_group_alone_keeps_the_images_user() {
        let group = Security { run_as_group: Some(7), ..Security::default() };
        assert_eq!(user(&group, "www-data:33"), (None, "www-data".to_owned()));
        assert_eq!(user(&group, "12:33"), (Some(12), String::new()));
        assert_eq!(user(&group, ""), (Some(0), String::new()));
        assert_eq!(user(&Security::default(), "x"), (None, String::new()));
    }

    #[test]
    fn the_last_value_of_a_variable_wins_and_keeps_its_place() {
        let env = [("A", "1"), ("B", "2"), ("A", "3=4")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let told: Vec<_> = environment(&env).into_iter().map(|pair| (pair.key, pair.value)).collect();
        assert_eq!(told, [("B".to_owned(), "2".into()), ("A".to_owned(), "3=4".into())]);
    }

    #[test]
    fn limits_read_back_as_they_were_given() {
        let given = Resources {
            cpu_shares: Some(512),
            cpu_quota: Some(50_000),
            cpu_period: Some(100_000),
            memory_limit: Some(1 << 20),
            oom_score_adj: Some(-998),
            pids_limit: None,
        };
        assert_eq!(limits(&resources(&given)), given);
        let nothing = Resources { oom_score_adj: Some(0), ..Resources::default() };
        assert_eq!(limits(&resources(&Resources::default())), nothing);
    }
}
