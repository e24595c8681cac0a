//! The host itself: rights, directories, ports, network tools.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use nix::unistd::{AccessFlags, access};

use super::Finding;
use crate::config::{CniSettings, ServingSettings};
use crate::network::cni::{Cni, CniError, CniOptions};
use crate::telemetry::chain;

/// Bits of the capability sets, from `capabilities(7)`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// How long a tool may take to tell its version.
const TOOL_PATIENCE: Duration = Duration::from_secs(5);

/// User and capabilities.
pub(super) fn rights() -> Vec<Finding> {
    let root = if nix::unistd::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::fail("user", "not root: mounts, network and cgroups need it", "run lambdalet as root")
    };
    let Some(held) = effective_capabilities() else {
        let unread = Finding::warn("capabilities", "/proc/self/status does not tell them", "mount /proc");
        return vec![root, unread];
    };
    let has = |bit: u32| held & (1 << bit) != 0;
    let needed = [
        (CAP_NET_ADMIN, "CAP_NET_ADMIN", "Pods get no network"),
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "volumes cannot be mounted, nor Pod network namespaces entered"),
    ];
    let mut findings = vec![root];
    findings.extend(needed.into_iter().map(|(bit, name, without)| match has(bit) {
        true => Finding::ok("capability", name),
        false => Finding::fail("capability", format!("no {name}: {without}"), format!("give the process {name}")),
    }));
    findings.push(match has(CAP_SYS_RESOURCE) {
        true => Finding::ok("capability", "CAP_SYS_RESOURCE"),
        false => Finding::warn(
            "capability",
            "no CAP_SYS_RESOURCE: OOM scores cannot be lowered, so the kernel picks its victims less well",
            "give the process CAP_SYS_RESOURCE, or live without",
        ),
    });
    findings
}

fn effective_capabilities() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The root directory, or the nearest parent that exists.
pub(super) fn root_dir(path: &Path) -> Finding {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let shown = path.display();
    if !existing.is_dir() {
        let found = format!("{} is not a directory", existing.display());
        return Finding::fail("root directory", found, "pass another --root-dir");
    }
    match access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) if existing == path => Finding::ok("root directory", format!("{shown} can be written")),
        Ok(()) => Finding::ok("root directory", format!("{shown} can be made")),
        Err(error) => Finding::fail(
            "root directory",
            format!("{} cannot be written: {}", existing.display(), error.desc()),
            format!("make {shown} writable for this user, or pass another --root-dir"),
        ),
    }
}

/// Whether the API's port is free.
pub(super) async fn port(serving: &ServingSettings) -> Finding {
    let address = SocketAddr::new(serving.address, serving.port);
    match tokio::net::TcpListener::bind(address).await {
        Ok(_) => Finding::ok("port", format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Finding::fail(
            "port",
            format!("{address} is taken, maybe by a kubelet or another lambdalet"),
            "stop that, or pass another --port",
        ),
        Err(error) => Finding::fail(
            "port",
            format!("{address} cannot be listened on: {error}"),
            "pass another --address or --port",
        ),
    }
}

/// Whether the API server's own client certificate can be checked.
pub(super) fn client_ca(file: Option<&Path>) -> Finding {
    let subject = "client CA";
    let remedy =
        "pass --client-ca-file FILE: the CA that signs the API server's client certificate (often the cluster's)";
    let Some(file) = file else {
        let found = "none was given: nobody's certificate is believed, so kubectl logs does not work";
        return Finding::warn(subject, found, remedy);
    };
    match std::fs::read_to_string(file) {
        Ok(text) if text.contains("BEGIN CERTIFICATE") => Finding::ok(subject, file.display().to_string()),
        Ok(_) => Finding::fail(subject, format!("{} holds no certificate", file.display()), remedy),
        Err(error) => Finding::fail(subject, format!("{} cannot be read: {error}", file.display()), remedy),
    }
}

/// Whether Pods find the cluster's names.
pub(super) fn cluster_dns(servers: &[IpAddr]) -> Finding {
    if servers.is_empty() {
        return Finding::warn(
            "cluster DNS",
            "none was given: Pods ask this host's name servers, which do not know Services",
            "pass --cluster-dns ADDRESS (that of the kube-dns Service), if Services work on this host",
        );
    }
    let list: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
    Finding::ok("cluster DNS", list.join(", "))
}

/// Bridge, forwarding and packet filter.
pub(super) async fn network(ranges: &[IpNet]) -> Vec<Finding> {
    let mut findings = vec![bridge()];
    findings.push(match std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
        Ok(text) if text.trim() == "1" => Finding::ok("forwarding", "net.ipv4.ip_forward is on"),
        Ok(_) => Finding::ok("forwarding", "net.ipv4.ip_forward is off; lambdalet run turns it on"),
        Err(error) => Finding::fail(
            "forwarding",
            format!("net.ipv4.ip_forward cannot be read ({error}): Pods reach nobody outside this host"),
            "mount /proc, and take a kernel with IPv4",
        ),
    });
    findings.push(match tool_version("iptables").await {
        Some(version) => Finding::ok("packet filter", version),
        None => Finding::fail(
            "packet filter",
            "there is no iptables command: Pod traffic cannot be let through, refused or masqueraded",
            "install iptables (its nf_tables variant will do)",
        ),
    });
    if ranges.iter().any(|range| range.addr().is_ipv6()) {
        findings.push(match tool_version("ip6tables").await {
            Some(version) => Finding::ok("packet filter", version),
            None => Finding::fail(
                "packet filter",
                "there is no ip6tables command, and --pod-cidr has an IPv6 range",
                "install iptables with its IPv6 part, or pass IPv4 ranges only",
            ),
        });
    }
    findings
}

/// Whether CNI plugins can make the network.
pub(super) async fn plugins(told: &CniSettings) -> Finding {
    let CniSettings { conf_dir, bin_dirs } = told.clone();
    let shown = conf_dir.display().to_string();
    // Nothing is plugged in, so nothing is kept.
    let root = std::env::temp_dir();
    let error = match Cni::new(CniOptions { conf_dir, bin_dirs, root, patience: TOOL_PATIENCE }).ready().await {
        Ok(()) => return Finding::ok("CNI", format!("the configuration in {shown} can be used")),
        Err(error) => error,
    };
    let remedy = match &error {
        CniError::Unconfigured { .. } => {
            "have the cluster's network installed (most come as a DaemonSet), or do without \
                                          --cni-conf-dir for the node's own"
                .to_owned()
        }
        CniError::Missing { .. } | CniError::NotExecutable { .. } => {
            "install it (Debian: containernetworking-plugins, in /usr/lib/cni), or pass another --cni-bin-dir"
                .to_owned()
        }
        _ => format!("mend the first file in {shown}, or what it names"),
    };
    let found = format!("{}: the node stays NotReady, and its Pods get no network", chain(&error));
    match error {
        // As a rule a Pod of the node itself brings it later.
        CniError::Unconfigured { .. } => Finding::warn("CNI", found, remedy),
        _ => Finding::fail("CNI", found, remedy),
    }
}

fn bridge() -> Finding {
    if Path::new("/sys/module/bridge").exists() {
        return Finding::ok("bridge", "the kernel has bridges");
    }
    // Loading the module would be a change; whether it is there can be looked up.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim());
    let listed = ["modules.builtin", "modules.dep"]
        .iter()
        .any(|file| std::fs::read_to_string(modules.join(file)).is_ok_and(|text| text.contains("/bridge.ko")));
    if listed {
        return Finding::ok("bridge", "the kernel has a bridge module that is loaded when needed");
    }
    Finding::warn(
        "bridge",
        "the kernel shows no bridge support: if it has none, Pods get no network",
        "modprobe bridge, or a kernel with CONFIG_BRIDGE",
    )
}

/// The first line a tool says about itself, if it is there and works.
async fn tool_version(tool: &str) -> Option<String> {
    let command = tokio::process::Command::new(tool).arg("--version").kill_on_drop(true).output();
    let output = tokio::time::timeout(TOOL_PATIENCE, command).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or(tool).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    #[test]
    fn a_root_directory_below_a_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(root_dir(&file.path().join("x")).level, Level::Fail);
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(root_dir(&directory.path().join("a/b")).level, Level::Ok);
        assert!(!directory.path().join("a").exists(), "check changes nothing");
    }

    #[test]
    fn a_client_ca_is_missed_and_one_that_is_none_is_refused_by_name() {
        assert_eq!(client_ca(None).level, Level::Warn);
        let file = tempfile::NamedTempFile::new().unwrap();
        let refused = client_ca(Some(file.path()));
        assert!(refused.level == Level::Fail && refused.found.contains(&file.path().display().to_string()));
        std::fs::write(file.path(), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert_eq!(client_ca(Some(file.path())).level, Level::Ok);
        assert_eq!(client_ca(Some(Path::new("/nowhere/ca.crt"))).level, Level::Fail);
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let serving = ServingSettings { address: address.ip(), port: address.port(), ..ServingSettings::default() };
        let finding = port(&serving).await;
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.found.contains(&address.to_string()), "{}", finding.found);
    }
}
