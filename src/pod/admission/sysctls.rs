//! Kernel parameters that a Pod may have set for itself.

use k8s_openapi::api::core::v1::PodSpec;

use crate::config::sysctls::SysctlPattern;
use crate::pod::status::Trouble;

/// Kernel parameters that are namespaced and harmless to others; any other is refused.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Whether each parameter that the Pod asks for may be set: it is safe, or the operator allows it, and it is the Pod's own.
pub(super) fn check(spec: &PodSpec, allowed: &[SysctlPattern]) -> Result<(), Trouble> {
    for sysctl in spec.security_context.iter().flat_map(|s| s.sysctls.iter().flatten()) {
        let name = dotted(&sysctl.name);
        let forbidden = |why: &str| {
            let message = format!("forbidden sysctl: {:?} {why}", sysctl.name);
            Err(Trouble::new("SysctlForbidden", message))
        };
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !allowed.iter().any(|pattern| pattern.matches(&name)) {
            return forbidden("not allowlisted");
        }
        let of_network = name.starts_with("net.");
        if of_network && spec.host_network == Some(true) {
            return forbidden("not allowed with host net enabled");
        }
        if !of_network && spec.host_ipc == Some(true) {
            return forbidden("not allowed with host ipc enabled");
        }
    }
    Ok(())
}

/// A kernel parameter's name with dots between its parts; sysctl(8) takes slashes as well, and each of the two may then
/// be part of a name as the other (`net/ipv4/conf/eth0.1/rp_filter`).
pub fn dotted(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(first) if name[first..].starts_with('/') => name
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn verdict(name: &str, allowed: &[&str], more: Value) -> Option<String> {
        let mut spec = json!({"containers": [], "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let allowed: Vec<SysctlPattern> = allowed.iter().map(|pattern| pattern.parse().unwrap()).collect();
        let verdict = check(&serde_json::from_value(spec).unwrap(), &allowed);
        verdict.err().map(|trouble| format!("{}: {}", trouble.reason, trouble.message))
    }

    #[test]
    fn a_kernel_parameter_is_known_with_dots_and_with_slashes() {
        assert_eq!(dotted("kernel.shm_rmid_forced"), "kernel.shm_rmid_forced");
        assert_eq!(dotted("kernel/shm_rmid_forced"), "kernel.shm_rmid_forced");
        assert_eq!(dotted("net/ipv4/conf/eth0.1/rp_filter"), "net.ipv4.conf.eth0/1.rp_filter");
        assert_eq!(dotted("net.ipv4.conf.eth0/1.rp_filter"), "net.ipv4.conf.eth0/1.rp_filter");
        assert_eq!(verdict("kernel/shm_rmid_forced", &[], json!({})), None);
        let refused = "SysctlForbidden: forbidden sysctl: \"kernel/msgmax\" not allowlisted";
        assert_eq!(verdict("kernel/msgmax", &[], json!({})).as_deref(), Some(refused));
    }

    #[test]
    fn what_the_operator_allows_is_allowed_and_what_is_the_hosts_is_not() {
        let allowed = ["kernel.msg*", "net.core.somaxconn"];
        assert_eq!(verdict("kernel.msgmax", &allowed, json!({})), None);
        assert_eq!(verdict("net/core/somaxconn", &allowed, json!({})), None);
        assert!(verdict("net.core.rmem_max", &allowed, json!({})).unwrap().ends_with("not allowlisted"));
        let on_host = verdict("net.core.somaxconn", &allowed, json!({ "hostNetwork": true })).unwrap();
        assert!(on_host.ends_with("not allowed with host net enabled"), "{on_host}");
        let shared = verdict("kernel.msgmax", &allowed, json!({ "hostIPC": true })).unwrap();
        assert!(shared.ends_with("not allowed with host ipc enabled"), "{shared}");
    }
}
