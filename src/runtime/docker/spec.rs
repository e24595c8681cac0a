//! Pure: our configs as the bodies of Docker's create request.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigLogConfig, Mount as DockerMount, MountBindOptions,
    MountBindOptionsPropagationEnum, MountType,
};

use super::capabilities::{self, Held};
use crate::runtime::types::{
    ContainerConfig, Mount, MountPropagation, NamespaceMode, Profile, Resources, SandboxConfig, SandboxId,
    SandboxNetwork, Security,
};

/// Score of the process that holds a sandbox: it should outlive what it holds (the kubelet's own figure).
const HOLDER_OOM_SCORE: i64 = -998;
/// cgroup weight of the holder: the least there is.
const HOLDER_CPU_SHARES: i64 = 2;

/// What the bodies need to know besides the configs.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// Docker's form of the Pod's cgroup.
    pub(super) cgroup_parent: String,
    /// [`capabilities::floor`].
    pub(super) oom_floor: Option<i64>,
    /// [`capabilities::held`].
    pub(super) held: Option<Held>,
    pub(super) labels: HashMap<String, String>,
}

impl Surroundings {
    fn oom_score(&self, wanted: i64) -> i64 {
        self.oom_floor.map_or(wanted, |floor| wanted.max(floor))
    }
}

/// The container that holds a sandbox's namespaces. Its network namespace is fresh and empty ("none", and Docker's own
/// network set-up switched off, which halves the time a start takes); the cable is plugged in afterwards.
pub(super) fn sandbox_body(config: &SandboxConfig, image: &str, around: Surroundings) -> ContainerCreateBody {
    let own_network = config.network != SandboxNetwork::Host;
    let host_config = HostConfig {
        network_mode: Some(if own_network { "none" } else { "host" }.to_owned()),
        ipc_mode: Some(if config.ipc == NamespaceMode::Node { "host" } else { "shareable" }.to_owned()),
        pid_mode: (config.pid == NamespaceMode::Node).then(|| "host".to_owned()),
        sysctls: (!config.sysctls.is_empty()).then(|| config.sysctls.clone().into_iter().collect()),
        cpu_shares: Some(HOLDER_CPU_SHARES),
        oom_score_adj: Some(around.oom_score(HOLDER_OOM_SCORE)),
        cap_drop: Some(vec!["ALL".to_owned()]),
        // No filter for a program of five system calls that has no rights to lose: compiling one takes runc a fifth of
        // the time of a start.
        security_opt: Some(vec!["no-new-privileges".to_owned(), "seccomp=unconfined".to_owned()]),
        readonly_rootfs: Some(true),
        init: Some(false),
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
        cgroup_parent: Some(around.cgroup_parent),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: Some(image.to_owned()),
        hostname: Some(config.hostname.clone()),
        network_disabled: own_network.then_some(true),
        healthcheck: Some(no_healthcheck()),
        labels: Some(around.labels),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    }
}

/// What a container gets that is not in its config.
#[derive(Clone, Debug)]
pub(super) struct Extras {
    /// `uid`, `uid:gid` or `user:gid`; `None` is the image's.
    pub(super) user: Option<String>,
    /// Content of a seccomp profile on the node.
    pub(super) seccomp: Option<String>,
    pub(super) log: HostConfigLogConfig,
}

/// A container that joins the namespaces of `sandbox`.
pub(super) fn container_body(
    sandbox: &SandboxId,
    config: &ContainerConfig,
    extras: Extras,
    around: Surroundings,
) -> ContainerCreateBody {
    let nonempty = |words: &Vec<String>| (!words.is_empty()).then(|| words.clone());
    ContainerCreateBody {
        image: Some(config.image.to_string()),
        entrypoint: nonempty(&config.command),
        cmd: nonempty(&config.args),
        working_dir: config.working_dir.clone(),
        env: Some(environment(&config.env)),
        user: extras.user.clone(),
        open_stdin: Some(config.stdin),
        stdin_once: Some(config.stdin_once),
        tty: Some(config.tty),
        stop_signal: config.stop_signal.clone(),
        healthcheck: Some(no_healthcheck()),
        labels: Some(around.labels.clone()),
        host_config: Some(host_config(sandbox, config, extras, around)),
        ..ContainerCreateBody::default()
    }
}

fn host_config(sandbox: &SandboxId, config: &ContainerConfig, extras: Extras, around: Surroundings) -> HostConfig {
    let Resources { cpu_shares, cpu_quota, cpu_period, memory_limit, oom_score_adj, pids_limit } =
        config.resources.clone();
    let security = &config.security;
    let unmasked = security.unmasked_proc.then(Vec::new);
    let held = around.held.clone().filter(|_| security.privileged);
    let wanted = HostConfig {
        network_mode: Some(format!("container:{sandbox}")),
        ipc_mode: Some(match config.ipc {
            NamespaceMode::Pod => format!("container:{sandbox}"),
            NamespaceMode::Node => "host".to_owned(),
            NamespaceMode::Container => "private".to_owned(),
        }),
        pid_mode: match config.pid {
            _ if config.pid_target.is_some() => config.pid_target.as_ref().map(|target| format!("container:{target}")),
            NamespaceMode::Pod => Some(format!("container:{sandbox}")),
            NamespaceMode::Node => Some("host".to_owned()),
            NamespaceMode::Container => None,
        },
        cpu_shares,
        cpu_quota,
        cpu_period,
        memory: memory_limit,
        // The same figure for memory and memory plus swap: no swap, as a Pod's limit is meant.
        memory_swap: memory_limit,
        oom_score_adj: Some(around.oom_score(oom_score_adj.unwrap_or(0))),
        pids_limit,
        mounts: Some(config.mounts.iter().map(mount).collect()),
        privileged: Some(security.privileged),
        cap_add: Some(security.add_capabilities.iter().map(|name| capability(name)).collect()),
        cap_drop: Some(security.drop_capabilities.iter().map(|name| capability(name)).collect()),
        group_add: Some(security.supplemental_groups.iter().map(i64::to_string).collect()),
        readonly_rootfs: Some(security.read_only_rootfs),
        security_opt: Some(security_options(security, extras.seccomp)),
        masked_paths: unmasked.clone(),
        readonly_paths: unmasked,
        init: Some(false),
        log_config: Some(extras.log),
        cgroup_parent: Some(around.cgroup_parent),
        ..HostConfig::default()
    };
    match held {
        Some(held) => capabilities::unbind(&held, wanted),
        None => wanted,
    }
}

/// The image's HEALTHCHECK is not Kubernetes' way; Docker would run it.
fn no_healthcheck() -> HealthConfig {
    HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }
}

/// `NAME=value` once per name: a process handed two of one name reads the first, and the last is meant.
fn environment(env: &[(String, String)]) -> Vec<String> {
    let last: HashMap<&str, usize> = env.iter().enumerate().map(|(at, (name, _))| (name.as_str(), at)).collect();
    env.iter()
        .enumerate()
        .filter(|(at, (name, _))| last.get(name.as_str()) == Some(at))
        .map(|(_, (name, value))| format!("{name}={value}"))
        .collect()
}

/// Docker reads both spellings, yet takes `CAP_ALL` for a capability of that name.
fn capability(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
}

fn security_options(security: &Security, seccomp: Option<String>) -> Vec<String> {
    let mut options = Vec::new();
    if security.no_new_privileges {
        options.push("no-new-privileges".to_owned());
    }
    match (&security.seccomp, seccomp) {
        (Profile::Unconfined, _) => options.push("seccomp=unconfined".to_owned()),
        (Profile::Localhost(_), Some(content)) => options.push(format!("seccomp={content}")),
        (Profile::Localhost(_), None) | (Profile::RuntimeDefault, _) => {}
    }
    match &security.apparmor {
        Profile::Unconfined => options.push("apparmor=unconfined".to_owned()),
        Profile::Localhost(name) => options.push(format!("apparmor={name}")),
        Profile::RuntimeDefault => {}
    }
    options
}

fn mount(mount: &Mount) -> DockerMount {
    let propagation = match mount.propagation {
        MountPropagation::Private => MountBindOptionsPropagationEnum::RPRIVATE,
        MountPropagation::HostToContainer => MountBindOptionsPropagationEnum::RSLAVE,
        MountPropagation::Bidirectional => MountBindOptionsPropagationEnum::RSHARED,
    };
    DockerMount {
        typ: Some(MountType::BIND),
        source: Some(mount.host_path.to_string_lossy().into_owned()),
        target: Some(mount.container_path.clone()),
        read_only: Some(mount.read_only),
        bind_options: Some(MountBindOptions { propagation: Some(propagation), ..MountBindOptions::default() }),
        ..DockerMount::default()
    }
}

/// Docker's USER field. `image_user` is the image's, for a group given without a user.
pub(super) fn user(security: &Security, image_user: &str) -> Option<String> {
    match (security.run_as_user, security.run_as_group) {
        (None, None) => None,
        (Some(uid), None) => Some(uid.to_string()),
        (Some(uid), Some(gid)) => Some(format!("{uid}:{gid}")),
        (None, Some(gid)) => {
            let name = image_user.split(':').next().filter(|name| !name.is_empty()).unwrap_or("0");
            Some(format!("{name}:{gid}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_variable_wins_and_keeps_its_place() {
        let env = [("A", "1"), ("B", "2"), ("A", "3=4")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(environment(&env), ["B=2", "A=3=4"]);
    }

    #[test]
    fn a_group_alone_keeps_the_images_user() {
        let group = Security { run_as_group: Some(7), ..Security::default() };
        assert_eq!(user(&group, "www-data:33").as_deref(), Some("www-data:7"));
        assert_eq!(user(&group, "").as_deref(), Some("0:7"));
        let both = Security { run_as_user: Some(1), run_as_group: Some(2), ..Security::default() };
        assert_eq!(user(&both, "").as_deref(), Some("1:2"));
        assert_eq!(user(&Security::default(), "x"), None);
    }

    #[test]
    fn capabilities_lose_their_prefix() {
        assert_eq!(capability("CAP_NET_ADMIN"), "NET_ADMIN");
        assert_eq!(capability("cap_all"), "ALL");
        assert_eq!(capability("SYS_TIME"), "SYS_TIME");
    }

    #[test]
    fn a_score_is_cut_to_the_hosts_floor() {
        let around =
            |oom_floor| Surroundings { cgroup_parent: String::new(), oom_floor, held: None, labels: HashMap::new() };
        assert_eq!(around(None).oom_score(-998), -998);
        assert_eq!(around(Some(0)).oom_score(-998), 0);
        assert_eq!(around(Some(0)).oom_score(900), 900);
    }

    #[test]
    fn profiles_become_security_options() {
        let security = Security {
            no_new_privileges: true,
            seccomp: Profile::Localhost("/p.json".into()),
            apparmor: Profile::Unconfined,
            ..Security::default()
        };
        let options = security_options(&security, Some("{}".into()));
        assert_eq!(options, ["no-new-privileges", "seccomp={}", "apparmor=unconfined"]);
        assert!(security_options(&Security::default(), None).is_empty());
    }
}
