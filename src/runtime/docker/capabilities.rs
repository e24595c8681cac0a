//! What a privileged container gets where the Docker daemon itself may not do everything.
//!
//! "Privileged" asks for every capability there is, and where the daemon lacks one (inside some virtual machines and
//! containers) runc fails the whole start over it. There such a container asks one by one for what "privileged" stands
//! for: the capabilities that the daemon has, the host's devices, and no confinement.

use std::fs;
use std::sync::Arc;

use bollard::models::{DeviceMapping, HostConfig};
use lambdalet_proto::capability::NAMES;

/// Of all capabilities, the first so many are known to every supported version of Docker.
const KNOWN: usize = 38;

/// CAP_SYS_RESOURCE in a set of capabilities.
pub(super) const SYS_RESOURCE: u64 = 1 << 24;

/// The capabilities of a daemon that does not have all of them.
pub(super) type Held = Arc<[&'static str]>;

/// What the process `pid` has, if it lacks some. What cannot be read counts as unrestricted, since that is the rule.
pub(super) fn held(pid: i32) -> Option<Held> {
    restricted(effective(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?)
}

fn restricted(set: u64) -> Option<Held> {
    let known = NAMES.iter().take(KNOWN).enumerate();
    let held: Held = known.filter(|(at, _)| set & (1 << at) != 0).map(|(_, name)| *name).collect();
    (held.len() < KNOWN).then_some(held)
}

/// The effective set in `/proc/<pid>/status`.
pub(super) fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Makes a container that was to be privileged as free as the daemon is.
pub(super) fn unbind(held: &Held, config: HostConfig) -> HostConfig {
    let devices = DeviceMapping {
        path_on_host: Some("/dev".to_owned()),
        path_in_container: Some("/dev".to_owned()),
        cgroup_permissions: Some("rwm".to_owned()),
    };
    HostConfig {
        privileged: Some(false),
        cap_add: Some(held.iter().map(|name| (*name).to_owned()).collect()),
        cap_drop: None,
        devices: Some(vec![devices]),
        device_cgroup_rules: Some(vec!["a *:* rwm".to_owned()]),
        security_opt: Some(vec!["seccomp=unconfined".to_owned(), "apparmor=unconfined".to_owned()]),
        masked_paths: Some(Vec::new()),
        readonly_paths: Some(Vec::new()),
        ..config
    }
}

/// Lowering an oom_score_adj takes CAP_SYS_RESOURCE. Where the daemon lacks it (inside some virtual machines and
/// containers) runc fails the whole start over a negative value, so there the wish is cut to what can be had: this is the
/// lowest score a child of the process `pid` can be given; `None` if there is no floor. What cannot be read counts
/// as unrestricted, since that is the rule.
pub(super) fn floor(pid: i32) -> Option<i64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    if effective(&status)? & SYS_RESOURCE != 0 {
        return None;
    }
    let own = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
    Some(own.trim().parse::<i64>().ok()?.max(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read_as_hexadecimal() {
        let status = "Name:\tx\nCapPrm:\tff\nCapEff:\t000001fffeffffff\n";
        let set = effective(status).unwrap();
        assert_eq!(set & SYS_RESOURCE, 0);
        assert_ne!(set & 1, 0);
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn only_a_daemon_that_lacks_something_is_restricted() {
        assert_eq!(restricted(u64::MAX), None);
        assert_eq!(restricted((1 << 38) - 1), None, "newer ones are not asked for");
        let held = restricted(!SYS_RESOURCE).unwrap();
        assert!(!held.contains(&"SYS_RESOURCE") && held.contains(&"SYS_ADMIN") && held.contains(&"SYS_TIME"));
        let config = unbind(&held, HostConfig { privileged: Some(true), ..HostConfig::default() });
        assert_eq!(config.privileged, Some(false));
        assert_eq!(config.cap_add.map(|added| added.len()), Some(37));
    }
}
