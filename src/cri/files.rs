//! The files of a sandbox that its containers see: `/etc/hosts` and `/etc/resolv.conf`.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use lambdalet_proto::cri::v1;

use super::failure::CriError;

const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";

/// Writes the files beside the sandbox's record.
///
/// # Errors
/// The file system.
pub(super) fn write(
    place: &Path,
    config: &v1::PodSandboxConfig,
    (hostname, address): (&str, Option<IpAddr>),
) -> Result<(), CriError> {
    let resolv_conf = match &config.dns_config {
        Some(dns) => resolv_conf(dns),
        None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    let put = |name: &str, text: &str| {
        let path = place.join(name);
        fs::write(&path, text).map_err(CriError::file("write", &path))
    };
    put(RESOLV_CONF, &resolv_conf)?;
    match address {
        Some(address) => put(HOSTS, &hosts(hostname, address)),
        None => put(HOSTS, &fs::read_to_string("/etc/hosts").unwrap_or_default()),
    }
}

/// Where containers see them.
pub(super) fn mounts(place: &Path) -> Vec<(PathBuf, &'static str)> {
    let files = [(place.join(HOSTS), "/etc/hosts"), (place.join(RESOLV_CONF), "/etc/resolv.conf")];
    files.into_iter().filter(|(path, _)| path.exists()).collect()
}

fn hosts(hostname: &str, address: IpAddr) -> String {
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{hostname}\n")
}

fn resolv_conf(dns: &v1::DnsConfig) -> String {
    let mut text: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (word, values) in [("search", &dns.searches), ("options", &dns.options)] {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_where_the_sandbox_says() {
        let dns = v1::DnsConfig {
            servers: vec!["10.96.0.10".into(), "1.1.1.1".into()],
            searches: vec!["n.svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        let config = v1::PodSandboxConfig { dns_config: Some(dns), ..Default::default() };
        let place = tempfile::tempdir().unwrap();
        assert!(mounts(place.path()).is_empty());
        write(place.path(), &config, ("web", Some("10.1.0.2".parse().unwrap()))).unwrap();
        let text = |at: usize| fs::read_to_string(&mounts(place.path())[at].0).unwrap();
        assert_eq!(
            text(1),
            "nameserver 10.96.0.10\nnameserver 1.1.1.1\nsearch n.svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        assert!(text(0).contains("10.1.0.2\tweb\n"), "{}", text(0));
    }
}
