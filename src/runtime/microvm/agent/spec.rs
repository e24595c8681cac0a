//! A container in the seam's words, said in the guest's.

use std::collections::BTreeSet;

use lambdalet_proto::agent::v1::{self, PidMode};
use lambdalet_proto::capability;

use crate::runtime::types::{ContainerConfig, NamespaceMode, Profile, Resources, Security};
use crate::runtime::{Kind, Result, RuntimeError};

/// What a container may do unless its Pod says otherwise: the set that other runtimes begin with.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// What only the image knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageFacts<'a> {
    /// The name it was mounted under.
    pub name: &'a str,
    /// USER.
    pub user: &'a str,
    /// WORKDIR.
    pub working_dir: &'a str,
    /// STOPSIGNAL.
    pub stop_signal: &'a str,
}

/// The message for [`Agent::create_container`](super::Agent::create_container). `config.command` is the whole command, and
/// `config.env` holds the image's too; `config.mounts` are the host's, and not looked at: `mounts` are the guest's.
///
/// # Errors
/// [`Kind::Unsupported`] for a profile that lies on the host.
pub fn container_spec(
    id: &str,
    image: ImageFacts<'_>,
    config: &ContainerConfig,
    mounts: Vec<v1::Mount>,
) -> Result<v1::ContainerSpec> {
    let security = &config.security;
    if let Profile::Localhost(profile) = &security.seccomp {
        let unsupported = format!("seccomp profile {profile} of the host is not for a microVM");
        return Err(RuntimeError::new(Kind::Unsupported, unsupported));
    }
    let pid = match (&config.pid_target, config.pid) {
        (Some(_), _) => PidMode::Target,
        (None, NamespaceMode::Pod) => PidMode::Pod,
        (None, NamespaceMode::Container | NamespaceMode::Node) => PidMode::Container,
    };
    let or = |said: &Option<String>, image: &str| said.clone().unwrap_or_else(|| image.to_owned());
    let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    Ok(v1::ContainerSpec {
        id: id.to_owned(),
        image: image.name.to_owned(),
        args: config.command.iter().chain(&config.args).cloned().collect(),
        env: config.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd: or(&config.working_dir, image.working_dir),
        user: image.user.to_owned(),
        uid: number(security.run_as_user),
        gid: number(security.run_as_group),
        supplemental_groups: security.supplemental_groups.iter().filter_map(|group| number(Some(*group))).collect(),
        mounts,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: Some(resources(&config.resources)),
        capabilities: capabilities(security),
        privileged: security.privileged,
        read_only_rootfs: security.read_only_rootfs,
        no_new_privileges: security.no_new_privileges,
        seccomp_unconfined: security.seccomp == Profile::Unconfined,
        unmasked_proc: security.unmasked_proc,
        pid: pid.into(),
        pid_target: config.pid_target.as_ref().map(ToString::to_string).unwrap_or_default(),
        shared_ipc: config.ipc != NamespaceMode::Container,
        oom_score_adj: config.resources.oom_score_adj.and_then(|score| i32::try_from(score).ok()).unwrap_or_default(),
        rlimits: Vec::new(),
        log_limit: 0,
        stop_signal: or(&config.stop_signal, image.stop_signal),
        annotations: config.annotations.clone().into_iter().collect(),
    })
}

/// Limits in the units of cgroup v2, which a guest has.
pub fn resources(resources: &Resources) -> v1::Resources {
    let positive = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or_default();
    v1::Resources {
        cpu_weight: resources.cpu_shares.map_or(0, weight),
        cpu_quota_us: positive(resources.cpu_quota),
        cpu_period_us: positive(resources.cpu_period),
        memory_bytes: positive(resources.memory_limit),
        pids: positive(resources.pids_limit),
    }
}

/// Shares of cgroup v1 (2 to 262144) as a weight of v2 (1 to 10000), on a straight line as the kubelet has it.
fn weight(shares: i64) -> u32 {
    let shares = shares.clamp(2, 262_144);
    u32::try_from(1 + (shares - 2) * 9999 / 262_142).unwrap_or(10_000)
}

/// The default set with what is added, without what is dropped; `ALL` is all, and is looked at first, so that
/// `drop: [ALL], add: [X]` leaves X.
fn capabilities(security: &Security) -> Vec<String> {
    let plain = |name: &String| name.strip_prefix("CAP_").unwrap_or(name).to_ascii_uppercase();
    let added: BTreeSet<String> = security.add_capabilities.iter().map(plain).collect();
    let dropped: BTreeSet<String> = security.drop_capabilities.iter().map(plain).collect();
    let mut kept: BTreeSet<String> = match (added.contains("ALL"), dropped.contains("ALL")) {
        (true, _) => capability::NAMES.map(str::to_owned).into(),
        (false, true) => BTreeSet::new(),
        (false, false) => DEFAULT_CAPABILITIES.map(str::to_owned).into(),
    };
    kept.retain(|name| !dropped.contains(name));
    kept.extend(added.into_iter().filter(|name| name != "ALL"));
    kept.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(add: &[&str], drop: &[&str]) -> Vec<String> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        capabilities(&Security { add_capabilities: names(add), drop_capabilities: names(drop), ..Security::default() })
    }

    #[test]
    fn capabilities_are_added_to_the_default_and_taken_from_it() {
        assert_eq!(kept(&[], &[]), DEFAULT_CAPABILITIES);
        assert_eq!(kept(&["NET_ADMIN"], &["ALL"]), ["NET_ADMIN"]);
        assert_eq!(kept(&["CAP_SYS_TIME"], &["chown"]).len(), DEFAULT_CAPABILITIES.len());
        assert_eq!(kept(&["ALL"], &["SYS_ADMIN"]).len(), capability::NAMES.len() - 1);
    }

    #[test]
    fn weights_span_the_range_of_shares() {
        assert_eq!([0, 2, 1024, 262_144, i64::MAX].map(weight), [1, 1, 39, 10_000, 10_000]);
        let limits = Resources { memory_limit: Some(-1), cpu_quota: Some(50_000), ..Resources::default() };
        let said = resources(&limits);
        assert_eq!((said.memory_bytes, said.cpu_quota_us, said.cpu_weight), (0, 50_000, 0));
    }
}
