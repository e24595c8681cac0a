//! The files of a Pod that are no volumes: `/etc/hosts` and `/etc/resolv.conf`, and its host name.
//!
//! The rules are those of "DNS for Services and Pods" and "Adding entries to Pod /etc/hosts with HostAliases" in the
//! Kubernetes documentation. All but [`write()`] is pure.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

/// Longest host name the kernel takes, less one for its end.
const LONGEST_HOSTNAME: usize = 63;
/// Longest fully qualified name the kernel takes as a host name.
const LONGEST_FQDN: usize = 64;
/// What a resolver reads at most.
const MOST_NAMESERVERS: usize = 3;
/// What the API allows in a search path.
const MOST_SEARCHES: usize = 32;
/// And its longest text, blanks included.
const LONGEST_SEARCH: usize = 2048;

/// What the node knows about names.
#[derive(Clone, Debug, Default)]
pub struct DnsSettings {
    /// Addresses of the cluster's DNS (`--cluster-dns`); empty if there is none.
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's domain (`--cluster-domain`, `cluster.local`).
    pub cluster_domain: String,
    /// Content of the host's resolv.conf (`--resolv-conf`).
    pub host_resolv_conf: String,
    /// Content of the host's `/etc/hosts`, for Pods on the host's network.
    pub host_hosts: String,
    /// The node's host name, for Pods on the host's network.
    pub node_hostname: String,
}

/// What the containers of a Pod are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodHostname {
    /// What `hostname` prints; at most 64 bytes.
    pub hostname: String,
    /// The name without its domain.
    pub short: String,
    /// Domain of the Pod's `subdomain`, if it has one.
    pub domain: Option<String>,
}

/// Something about names that cannot be done for this Pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// `setHostnameAsFQDN` asks for more than the kernel takes.
    #[error(
        "failed to construct FQDN from the Pod's hostname and the cluster domain: {fqdn} has {} characters, at most {LONGEST_FQDN} are possible",
        fqdn.len()
    )]
    FqdnTooLong {
        /// The name.
        fqdn: String,
    },
    /// `hostname` or `hostnameOverride` is no host name.
    #[error("Pod hostname {hostname:?} is not a valid DNS name")]
    Invalid {
        /// The name.
        hostname: String,
    },
}

/// A resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Addresses, at most three.
    pub nameservers: Vec<String>,
    /// Search path.
    pub searches: Vec<String>,
    /// Options, `name` or `name:value`.
    pub options: Vec<String>,
    /// What was left out or could not be done, for events (`DNSConfigForming`, `MissingClusterDNS`).
    pub warnings: Vec<String>,
}

// === Host names ===

/// The Pod's host name.
///
/// # Errors
/// A name that the kernel cannot take.
pub fn hostname(pod: &Pod, settings: &DnsSettings) -> Result<PodHostname, NameError> {
    let spec = spec(pod);
    if let Some(name) = spec.hostname_override.as_deref().filter(|name| !name.is_empty()) {
        if name.len() > LONGEST_FQDN || !is_dns_name(name) {
            return Err(NameError::Invalid { hostname: name.to_owned() });
        }
        return Ok(PodHostname { hostname: name.to_owned(), short: name.to_owned(), domain: None });
    }
    if spec.host_network == Some(true) {
        let name = settings.node_hostname.clone();
        return Ok(PodHostname { hostname: name.clone(), short: name, domain: None });
    }
    let short = match spec.hostname.as_deref().filter(|name| !name.is_empty()) {
        Some(name) if name.len() > LONGEST_HOSTNAME || name.contains('.') || !is_dns_name(name) => {
            return Err(NameError::Invalid { hostname: name.to_owned() });
        }
        Some(name) => name.to_owned(),
        None => truncated(pod.metadata.name.as_deref().unwrap_or_default()),
    };
    let subdomain = spec.subdomain.as_deref().filter(|subdomain| !subdomain.is_empty());
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let domain = subdomain.map(|subdomain| format!("{subdomain}.{namespace}.svc.{}", settings.cluster_domain));
    let hostname = match &domain {
        Some(domain) if spec.set_hostname_as_fqdn == Some(true) => format!("{short}.{domain}"),
        _ => short.clone(),
    };
    if hostname.len() > LONGEST_FQDN {
        return Err(NameError::FqdnTooLong { fqdn: hostname });
    }
    Ok(PodHostname { hostname, short, domain })
}

/// A Pod's name can be four times as long as a host name, and must not then end in a dash or dot.
fn truncated(name: &str) -> String {
    let end = (0..=name.len().min(LONGEST_HOSTNAME)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    if end == name.len() { name.to_owned() } else { name[..end].trim_end_matches(['-', '.']).to_owned() }
}

fn is_dns_name(name: &str) -> bool {
    name.split('.').all(|label| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    })
}

// === /etc/hosts ===

/// The Pod's `/etc/hosts`. On the host's network it is the host's own with the Pod's aliases.
pub fn hosts(pod: &Pod, addresses: &[IpAddr], hostname: &PodHostname, settings: &DnsSettings) -> String {
    let spec = spec(pod);
    let mut text = if spec.host_network == Some(true) {
        let mut text = "# Kubernetes-managed hosts file (host network).\n".to_owned();
        text.push_str(&settings.host_hosts);
        if !text.ends_with('\n') {
            text.push('\n');
        }
        text
    } else {
        let mut text = "# Kubernetes-managed hosts file.\n".to_owned();
        for (address, names) in [
            ("127.0.0.1", "localhost"),
            ("::1", "localhost ip6-localhost ip6-loopback"),
            ("fe00::0", "ip6-localnet"),
            ("fe00::0", "ip6-mcastprefix"),
            ("fe00::1", "ip6-allnodes"),
            ("fe00::2", "ip6-allrouters"),
        ] {
            text.push_str(&format!("{address}\t{names}\n"));
        }
        for address in addresses {
            match &hostname.domain {
                Some(domain) => text.push_str(&format!("{address}\t{0}.{domain}\t{0}\n", hostname.short)),
                None => text.push_str(&format!("{address}\t{}\n", hostname.short)),
            }
        }
        text
    };
    let aliases: Vec<_> = spec.host_aliases.iter().flatten().collect();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        let names = alias.hostnames.clone().unwrap_or_default().join("\t");
        text.push_str(&format!("{}\t{names}\n", alias.ip));
    }
    text
}

// === resolv.conf ===

/// The Pod's resolv.conf, by its `dnsPolicy` and `dnsConfig`.
pub fn resolv_conf(pod: &Pod, settings: &DnsSettings) -> ResolvConf {
    let spec = spec(pod);
    let host = ResolvConf::parse(&settings.host_resolv_conf);
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let cluster = match policy {
        "ClusterFirstWithHostNet" => true,
        "ClusterFirst" => spec.host_network != Some(true),
        _ => false,
    };
    let mut conf = match policy {
        "None" => ResolvConf::default(),
        _ if cluster && !settings.cluster_dns.is_empty() => {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            let domain = &settings.cluster_domain;
            let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
            searches.extend(host.searches);
            ResolvConf {
                nameservers: settings.cluster_dns.iter().map(IpAddr::to_string).collect(),
                searches,
                options: vec!["ndots:5".to_owned()],
                warnings: Vec::new(),
            }
        }
        _ if cluster => ResolvConf {
            warnings: vec![format!("the node has no cluster DNS, so the Pod gets the host's instead of {policy}")],
            ..host
        },
        _ => host,
    };
    conf.add(spec);
    conf.limit();
    conf
}

impl ResolvConf {
    /// Reads resolv.conf(5); later `search` and `options` lines replace and extend earlier ones as the resolver does.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines().filter(|line| !line.trim_start().starts_with(['#', ';'])) {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => conf.nameservers.extend(words.next().map(str::to_owned)),
                Some("search" | "domain") => {
                    conf.searches = words
                        .map(|word| if word == "." { "." } else { word.trim_end_matches('.') }.to_owned())
                        .collect();
                }
                Some("options") => words.for_each(|option| conf.set_option(option)),
                _ => {}
            }
        }
        conf
    }

    /// The file's text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        if !self.searches.is_empty() {
            text.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for nameserver in &self.nameservers {
            text.push_str(&format!("nameserver {nameserver}\n"));
        }
        if !self.options.is_empty() {
            text.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        text
    }

    fn set_option(&mut self, option: &str) {
        let name = |option: &str| option.split(':').next().unwrap_or_default().to_owned();
        match self.options.iter_mut().find(|known| name(known) == name(option)) {
            Some(known) => option.clone_into(known),
            None => self.options.push(option.to_owned()),
        }
    }

    /// Adds the Pod's own `dnsConfig`.
    fn add(&mut self, spec: &PodSpec) {
        let Some(config) = &spec.dns_config else { return };
        self.nameservers.extend(config.nameservers.iter().flatten().cloned());
        self.searches.extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let Some(name) = option.name.as_deref() else { continue };
            match option.value.as_deref() {
                Some(value) if !value.is_empty() => self.set_option(&format!("{name}:{value}")),
                _ => self.set_option(name),
            }
        }
    }

    /// Drops repetitions and what goes over the limits, saying so.
    fn limit(&mut self) {
        for list in [&mut self.nameservers, &mut self.searches] {
            let mut seen = std::collections::HashSet::new();
            list.retain(|entry| seen.insert(entry.clone()));
        }
        if self.nameservers.len() > MOST_NAMESERVERS {
            self.nameservers.truncate(MOST_NAMESERVERS);
            let kept = self.nameservers.join(" ");
            self.warnings.push(format!("more than {MOST_NAMESERVERS} nameservers; the Pod gets only {kept}"));
        }
        let mut length = 0;
        let fitting = self.searches.iter().take(MOST_SEARCHES).take_while(|search| {
            length += search.len() + 1;
            length <= LONGEST_SEARCH + 1
        });
        let fitting = fitting.count();
        if fitting < self.searches.len() {
            self.searches.truncate(fitting);
            self.warnings.push(format!(
                "the search path has more than {MOST_SEARCHES} entries or {LONGEST_SEARCH} characters; the Pod gets only the first {fitting}"
            ));
        }
    }
}

// === Writing ===

/// Writes a file of the Pod at `path` if its content differs; true if it was written.
///
/// It is written in place once it exists, since containers have that very file mounted. Directories are made.
///
/// # Errors
/// The file system's refusal.
pub fn write(path: &Path, text: &str) -> io::Result<bool> {
    match fs::read(path) {
        Ok(present) if present == text.as_bytes() => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
        }
        Err(error) => return Err(error),
    }
    fs::write(path, text)?;
    Ok(true)
}

fn spec(pod: &Pod) -> &PodSpec {
    static NONE: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&NONE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec})).unwrap()
    }

    fn settings() -> DnsSettings {
        DnsSettings {
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            host_resolv_conf: "# from dhcp\nnameserver 192.0.2.53\nsearch corp.example. lab\noptions edns0 ndots:1\n"
                .into(),
            host_hosts: "127.0.0.1 localhost\n192.0.2.1 n1".into(),
            node_hostname: "n1".into(),
        }
    }

    #[test]
    fn host_names_follow_the_spec() {
        let name = |spec| hostname(&pod(spec), &settings()).map(|name| name.hostname);
        assert_eq!(name(json!({})).unwrap(), "web-0");
        assert_eq!(name(json!({"hostname": "a"})).unwrap(), "a");
        assert_eq!(name(json!({"hostname": "a", "subdomain": "s"})).unwrap(), "a");
        let fqdn = json!({"hostname": "a", "subdomain": "s", "setHostnameAsFQDN": true});
        assert_eq!(name(fqdn).unwrap(), "a.s.shop.svc.cluster.local");
        assert_eq!(name(json!({"setHostnameAsFQDN": true})).unwrap(), "web-0");
        assert_eq!(name(json!({"hostNetwork": true})).unwrap(), "n1");
        assert_eq!(name(json!({"hostnameOverride": "x.y"})).unwrap(), "x.y");
        let long = json!({"subdomain": "s".repeat(60), "setHostnameAsFQDN": true});
        let error = name(long).unwrap_err().to_string();
        assert!(error.contains("FQDN") && error.contains("at most 64"), "{error}");
        for bad in ["A", "a.b", "-a", "a_b"] {
            assert!(name(json!({"hostname": bad})).is_err(), "{bad}");
        }
    }

    #[test]
    fn long_pod_names_are_cut_to_host_names() {
        assert_eq!(truncated(&"a".repeat(63)), "a".repeat(63));
        assert_eq!(truncated(&"a".repeat(64)), "a".repeat(63));
        assert_eq!(truncated(&format!("{}-.-bcd", "a".repeat(60))), "a".repeat(60));
    }

    #[test]
    fn hosts_has_the_pods_names_and_aliases() {
        let pod = pod(
            json!({"hostname": "a", "subdomain": "s", "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["x", "y.z"]}]}),
        );
        let name = hostname(&pod, &settings()).unwrap();
        let text = hosts(&pod, &["10.0.0.2".parse().unwrap()], &name, &settings());
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "{text}");
        assert!(text.contains("\n10.0.0.2\ta.s.shop.svc.cluster.local\ta\n"), "{text}");
        assert!(text.ends_with("\n# Entries added by HostAliases.\n192.0.2.7\tx\ty.z\n"), "{text}");
    }

    #[test]
    fn on_the_hosts_network_hosts_is_the_hosts() {
        let pod = pod(json!({"hostNetwork": true, "hostAliases": [{"ip": "192.0.2.7", "hostnames": ["x"]}]}));
        let name = hostname(&pod, &settings()).unwrap();
        assert_eq!(
            hosts(&pod, &[], &name, &settings()),
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n192.0.2.1 n1\n\n# Entries added by HostAliases.\n192.0.2.7\tx\n"
        );
    }

    #[test]
    fn every_dns_policy_has_its_resolv_conf() {
        let text = |spec| resolv_conf(&pod(spec), &settings()).render();
        let cluster = "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example lab\nnameserver 10.96.0.10\noptions ndots:5\n";
        let host = "search corp.example lab\nnameserver 192.0.2.53\noptions edns0 ndots:1\n";
        assert_eq!(text(json!({})), cluster);
        assert_eq!(text(json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true})), host);
        assert_eq!(text(json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})), cluster);
        assert_eq!(text(json!({"dnsPolicy": "Default"})), host);
        let config = json!({"nameservers": ["1.1.1.1", "1.1.1.1"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        assert_eq!(
            text(json!({"dnsPolicy": "None", "dnsConfig": config})),
            "search a.b\nnameserver 1.1.1.1\noptions ndots:2 edns0\n"
        );
        let both = text(json!({"dnsConfig": config}));
        assert!(
            both.contains("cluster.local corp.example lab a.b\n")
                && both.ends_with("nameserver 10.96.0.10\nnameserver 1.1.1.1\noptions ndots:2 edns0\n"),
            "{both}"
        );
    }

    #[test]
    fn without_cluster_dns_the_pod_gets_the_hosts_and_a_warning() {
        let settings = DnsSettings { cluster_dns: vec![], ..settings() };
        let conf = resolv_conf(&pod(json!({})), &settings);
        assert_eq!(conf.nameservers, ["192.0.2.53"]);
        assert_eq!(conf.warnings.len(), 1);
    }

    #[test]
    fn what_goes_over_the_limits_is_left_out_with_a_warning() {
        let servers: Vec<_> = (1..6).map(|number| format!("192.0.2.{number}")).collect();
        let searches: Vec<_> = (0..40).map(|number| format!("s{number}")).collect();
        let config = json!({"nameservers": servers, "searches": searches});
        let conf = resolv_conf(&pod(json!({"dnsPolicy": "None", "dnsConfig": config})), &settings());
        assert_eq!((conf.nameservers.len(), conf.searches.len(), conf.warnings.len()), (3, 32, 2));
        let searches: Vec<_> = (0..10).map(|number| format!("{number}{}", "x".repeat(250))).collect();
        let config = json!({"searches": searches});
        let conf = resolv_conf(&pod(json!({"dnsPolicy": "None", "dnsConfig": config})), &settings());
        assert_eq!(conf.searches.len(), 8);
        assert!(conf.searches.join(" ").len() <= LONGEST_SEARCH);
    }

    #[test]
    fn a_file_is_written_once_and_in_place() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pods/u/etc-hosts");
        assert!(write(&path, "a").unwrap());
        let inode = fs::metadata(&path).unwrap().ino();
        assert!(!write(&path, "a").unwrap());
        assert!(write(&path, "b").unwrap());
        assert_eq!((fs::metadata(&path).unwrap().ino(), fs::read_to_string(&path).unwrap().as_str()), (inode, "b"));
    }

    proptest! {
        #[test]
        fn what_is_rendered_reads_back_the_same(
            nameservers in proptest::collection::vec("[0-9.]{1,9}", 0..4),
            searches in proptest::collection::vec("[a-z]{1,9}", 0..4),
            options in proptest::collection::btree_map("[a-z]{1,5}", "[0-9]{1,2}", 0..3),
        ) {
            let options = options.into_iter().map(|(name, value)| format!("{name}:{value}")).collect();
            let conf = ResolvConf { nameservers, searches, options, warnings: vec![] };
            prop_assert_eq!(ResolvConf::parse(&conf.render()), conf);
        }

        #[test]
        fn no_pod_name_makes_an_overlong_host_name(name in ".{0,300}") {
            prop_assert!(truncated(&name).len() <= LONGEST_HOSTNAME);
        }
    }
}
