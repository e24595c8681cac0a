//! The flags of `run` and `check`, named as kubelet's where kubelet has them; each group lays itself over [`Settings`].

mod microvm;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use ipnet::IpNet;

use super::cri::socket;
use super::function_server::FunctionServerArgs;
use crate::config::file::ConfigFile;
use crate::config::sysctls::SysctlPattern;
use crate::config::tls::{CipherSuite, TlsVersion};
use crate::config::values::{GoDuration, NodeLabel, NodeName, NodeTaint, RegistryHost, Reserved};
use crate::config::{CniSettings, DEFAULT_CNI_BIN_DIR, RuntimeKind, ServingSettings, Settings};
use crate::quantity::Quantity;
use crate::telemetry::LogFormat;
pub(super) use microvm::MicrovmArgs;

/// Every flag of `run` and `check`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    serving: ServingArgs,
    #[command(flatten)]
    pods: PodArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    microvm: MicrovmArgs,
    #[command(flatten)]
    function_server: FunctionServerArgs,
    #[command(flatten)]
    pub(super) logging: LoggingArgs,
}

/// What flags and file come to.
#[derive(Debug)]
pub(super) struct Plan {
    /// Everything the rooms need to know.
    pub(super) settings: Settings,
    /// The way to the API server.
    pub(super) kubeconfig: Option<PathBuf>,
    /// What an operator should be told once.
    pub(super) warnings: Vec<String>,
}

impl RunArgs {
    /// Defaults, then the file, then the flags.
    pub(super) fn resolve(self) -> anyhow::Result<Plan> {
        let Self { cluster, node, serving, pods, runtime, microvm, function_server, logging: _ } = self;
        let mut settings = Settings::default();
        let warnings = match &cluster.config {
            Some(path) => ConfigFile::read(path)?.apply(&mut settings)?,
            None => Vec::new(),
        };
        let kubeconfig = cluster.apply(&mut settings)?;
        node.apply(&mut settings)?;
        serving.apply(&mut settings);
        pods.apply(&mut settings);
        runtime.apply(&mut settings);
        microvm.apply(&mut settings)?;
        settings.function_server = function_server.resolve()?;
        check_ranges("pod-cidr", &settings.pods.pod_cidrs)?;
        check_ranges("non-masquerade-cidr", &settings.pods.non_masquerade_cidrs)?;
        check_plugins(&settings)?;
        check_serving_pair(&settings.serving)?;
        if let Some(memory) = settings.function_server.as_ref().and_then(|server| server.memory) {
            settings.node.kube_reserved.add("memory", Quantity::from_units(memory.try_into().unwrap_or(i64::MAX)));
        }
        anyhow::ensure!(settings.serving.port != 0, "port 0 cannot be written into the Node object: choose one");
        settings.node.port = settings.serving.port;
        settings.node.runtime_name = settings.runtime.kind.name().to_owned();
        settings.node.runtime_handlers = vec![settings.node.runtime_name.clone()];
        settings.node.root_dir = settings.pods.root_dir.clone();
        Ok(Plan { settings, kubeconfig, warnings })
    }
}

/// Where the cluster is and what this node was told in a file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cluster")]
struct ClusterArgs {
    /// Kubeconfig with the API server's address and this node's credentials
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// KubeletConfiguration file (kubelet.config.k8s.io/v1beta1); flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Kubeconfig with a bootstrap token: if --kubeconfig is not there or its certificate has expired, a client
    /// certificate is asked for with it and --kubeconfig is written
    #[arg(long, value_name = "FILE")]
    bootstrap_kubeconfig: Option<PathBuf>,
    /// Where certificates the node asked for are kept [default: pki below --root-dir]
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// Renew the client certificate that --bootstrap-kubeconfig got, at 70-90 % of its life [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rotate_certificates: Option<bool>,
}

impl ClusterArgs {
    fn apply(self, settings: &mut Settings) -> anyhow::Result<Option<PathBuf>> {
        let Self { kubeconfig, config: _, bootstrap_kubeconfig, cert_dir, rotate_certificates } = self;
        anyhow::ensure!(
            bootstrap_kubeconfig.is_none() || kubeconfig.is_some(),
            "--bootstrap-kubeconfig needs --kubeconfig, the file it writes"
        );
        let identity = &mut settings.identity;
        identity.bootstrap_kubeconfig = bootstrap_kubeconfig;
        identity.cert_dir = cert_dir;
        set(&mut identity.rotate_certificates, rotate_certificates);
        Ok(kubeconfig)
    }
}

/// The Node object.
#[derive(Debug, Args)]
#[command(next_help_heading = "Node")]
struct NodeArgs {
    /// Name of the Node object [default: the host's name in lower case]
    #[arg(long, alias = "hostname-override", value_name = "NAME")]
    node_name: Option<NodeName>,
    /// The node's address, or one of each family [default: that of the default route]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    node_ip: Vec<IpAddr>,
    /// Labels for the Node, key=value
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    node_labels: Vec<NodeLabel>,
    /// Taints the Node is registered with, key=value:Effect
    #[arg(long, value_name = "TAINT", value_delimiter = ',')]
    register_with_taints: Vec<NodeTaint>,
    /// Create the Node object; if false, somebody else does [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    register_node: Option<bool>,
    /// Most Pods at once [default: 110]
    #[arg(long, value_name = "N")]
    max_pods: Option<u32>,
    /// Kept from Pods for the operating system, cpu=…,memory=…,ephemeral-storage=…
    #[arg(long, value_name = "LIST")]
    system_reserved: Option<Reserved>,
    /// Kept from Pods for the node agent and the runtime, as --system-reserved
    #[arg(long, value_name = "LIST")]
    kube_reserved: Option<Reserved>,
    /// How often the Node's status is computed [default: 10s]
    #[arg(long, value_name = "DURATION")]
    node_status_update_frequency: Option<GoDuration>,
    /// Label the Node type=virtual-kubelet, which some schedulers and clients look for
    #[arg(long)]
    virtual_kubelet_label: bool,
    /// On the first signal report NotReady and end the Pods, instead of leaving them running
    #[arg(long)]
    drain_on_exit: bool,
}

impl NodeArgs {
    fn apply(self, settings: &mut Settings) -> anyhow::Result<()> {
        let Self {
            node_name,
            node_ip,
            node_labels,
            register_with_taints,
            register_node,
            max_pods,
            system_reserved,
            kube_reserved,
            node_status_update_frequency,
            virtual_kubelet_label,
            drain_on_exit,
        } = self;
        let node = &mut settings.node;
        node.name = match node_name {
            Some(name) => name.to_string(),
            None => host_name()?,
        };
        anyhow::ensure!(node_ip.len() <= 2, "--node-ip takes one address, or one IPv4 and one IPv6 address");
        if let [first, second] = node_ip[..] {
            anyhow::ensure!(first.is_ipv4() != second.is_ipv4(), "--node-ip {first},{second}: both are of one family");
        }
        if let Some(address) = node_ip.iter().find(|ip| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()) {
            anyhow::bail!("--node-ip {address}: the API server could not reach this node there");
        }
        node.addresses = node_ip;
        node.labels.extend(node_labels.into_iter().map(|label| (label.key, label.value)));
        if virtual_kubelet_label {
            node.labels.insert("type".to_owned(), "virtual-kubelet".to_owned());
        }
        if !register_with_taints.is_empty() {
            node.taints = register_with_taints;
        }
        set(&mut node.register, register_node);
        set(&mut node.max_pods, max_pods);
        set(&mut node.system_reserved, system_reserved);
        set(&mut node.kube_reserved, kube_reserved);
        if let Some(GoDuration(frequency)) = node_status_update_frequency {
            anyhow::ensure!(!frequency.is_zero(), "--node-status-update-frequency must be longer than zero");
            node.status_update_frequency = frequency;
        }
        node.drain_on_exit = drain_on_exit;
        Ok(())
    }
}

/// The host's name, if it can be a node's.
fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("failed to read the host's name; pass --node-name")?;
    let name = name.to_string_lossy().trim().to_lowercase();
    let name: NodeName = name.parse().context("the host's name is no node name; pass --node-name")?;
    Ok(name.to_string())
}

/// The HTTPS API that kubectl logs and scrapers reach.
#[derive(Debug, Args)]
#[command(next_help_heading = "Serving")]
struct ServingArgs {
    /// Address the HTTPS API listens on [default: 0.0.0.0]
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Port it listens on [default: 10250]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// CA bundle that client certificates are checked against [default: none is believed: no kubectl logs]
    #[arg(long, value_name = "FILE")]
    client_ca_file: Option<PathBuf>,
    /// Certificate it shows [default: a self-signed one]
    #[arg(long, value_name = "FILE", requires = "tls_private_key_file")]
    tls_cert_file: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    tls_private_key_file: Option<PathBuf>,
    /// Ask the API server for that certificate (serverTLSBootstrap) and renew it; self-signed until it is approved
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rotate_server_certificates: Option<bool>,
    /// Lowest TLS version, VersionTLS12 or VersionTLS13 [default: VersionTLS12]
    #[arg(long, value_name = "VERSION")]
    tls_min_version: Option<TlsVersion>,
    /// Cipher suites for TLS 1.2, by Go's names [default: all with forward secrecy and AEAD]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    tls_cipher_suites: Vec<CipherSuite>,
    /// Socket at which CRI v1 is served besides, to crictl or another kubelet, beside the Pods [default: none]
    #[arg(long, value_name = "URL", value_parser = socket)]
    cri_listen: Option<PathBuf>,
}

impl ServingArgs {
    fn apply(self, settings: &mut Settings) {
        let Self {
            address,
            port,
            client_ca_file,
            tls_cert_file,
            tls_private_key_file,
            rotate_server_certificates,
            tls_min_version,
            tls_cipher_suites,
            cri_listen,
        } = self;
        set(&mut settings.identity.server_tls_bootstrap, rotate_server_certificates);
        let serving = &mut settings.serving;
        set(&mut serving.address, address);
        set(&mut serving.port, port);
        set(&mut serving.client_ca_file, client_ca_file.map(Some));
        set(&mut serving.tls_cert_file, tls_cert_file.map(Some));
        set(&mut serving.tls_private_key_file, tls_private_key_file.map(Some));
        set(&mut serving.tls_min_version, tls_min_version);
        set(&mut serving.cri_listen, cri_listen.map(Some));
        if !tls_cipher_suites.is_empty() {
            serving.tls_cipher_suites = tls_cipher_suites;
        }
    }
}

/// What Pods find around them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pods")]
struct PodArgs {
    /// Where this node keeps volumes and what must survive its restart [default: /var/lib/lambdalet]
    #[arg(long, value_name = "DIR")]
    root_dir: Option<PathBuf>,
    /// Name servers for Pods with dnsPolicy ClusterFirst [default: the host's, and an event that says so]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    cluster_dns: Vec<IpAddr>,
    /// The cluster's DNS zone [default: cluster.local]
    #[arg(long, value_name = "ZONE")]
    cluster_domain: Option<String>,
    /// Directory of static Pods, or the file of one: they run whether there is an API server or not
    #[arg(long, value_name = "PATH")]
    pod_manifest_path: Option<PathBuf>,
    /// Kernel parameters that Pods may set beside the safe ones, such as net.core.somaxconn or kernel.msg*
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    allowed_unsafe_sysctls: Vec<SysctlPattern>,
    /// Range of Pod addresses, or one of each family [default: the Node's spec.podCIDRs, else 10.187.0.0/16]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pod_cidr: Vec<IpNet>,
    /// Range of all Pods of the cluster, or one of each family: what Pods send there keeps its source address, as something
    /// routes it between nodes [default: none, all that leaves the node is masqueraded]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    non_masquerade_cidr: Vec<IpNet>,
    /// Directory of CNI configurations, of which the first by name makes the Pods' network [default: none, the node's own]
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Directories of CNI plugins [default: /opt/cni/bin]
    #[arg(long, value_name = "DIR", value_delimiter = ',', requires = "cni_conf_dir")]
    cni_bin_dir: Vec<PathBuf>,
}

impl PodArgs {
    fn apply(self, settings: &mut Settings) {
        let Self {
            root_dir,
            cluster_dns,
            cluster_domain,
            pod_manifest_path,
            allowed_unsafe_sysctls,
            pod_cidr,
            non_masquerade_cidr,
            cni_conf_dir,
            cni_bin_dir,
        } = self;
        let pods = &mut settings.pods;
        if !allowed_unsafe_sysctls.is_empty() {
            pods.allowed_unsafe_sysctls = allowed_unsafe_sysctls;
        }
        set(&mut pods.root_dir, root_dir);
        if !cluster_dns.is_empty() {
            pods.cluster_dns = cluster_dns;
        }
        set(&mut pods.cluster_domain, cluster_domain);
        set(&mut pods.static_pod_path, pod_manifest_path.map(Some));
        if !pod_cidr.is_empty() {
            pods.pod_cidrs = pod_cidr;
        }
        pods.non_masquerade_cidrs = non_masquerade_cidr;
        pods.cni = cni_conf_dir.map(|conf_dir| CniSettings {
            conf_dir,
            bin_dirs: if cni_bin_dir.is_empty() { vec![DEFAULT_CNI_BIN_DIR.into()] } else { cni_bin_dir },
        });
    }
}

/// At most one range of each family.
fn check_ranges(flag: &str, ranges: &[IpNet]) -> anyhow::Result<()> {
    match ranges {
        [] | [_] => Ok(()),
        [first, second] => {
            let differ = first.addr().is_ipv4() != second.addr().is_ipv4();
            anyhow::ensure!(differ, "--{flag} {first},{second}: both are of one family");
            Ok(())
        }
        _ => anyhow::bail!("--{flag} takes one range, or one IPv4 and one IPv6 range"),
    }
}

/// What cannot be had where CNI plugins make the network.
fn check_plugins(settings: &Settings) -> anyhow::Result<()> {
    if settings.pods.cni.is_none() {
        return Ok(());
    }
    let runtime = settings.runtime.kind;
    anyhow::ensure!(
        runtime == RuntimeKind::Docker,
        "--cni-conf-dir: CNI plugins make the network of Pods on Docker only, and --runtime is {}",
        runtime.name()
    );
    anyhow::ensure!(
        settings.function_server.is_none(),
        "--cni-conf-dir: the replicas of --function-server-addr need the node's own network"
    );
    Ok(())
}

/// A certificate and its key go together; of flags clap sees to that, of a file nobody does.
fn check_serving_pair(serving: &ServingSettings) -> anyhow::Result<()> {
    let (there, file, missing) = match (&serving.tls_cert_file, &serving.tls_private_key_file) {
        (Some(file), None) => ("tlsCertFile", file, "tlsPrivateKeyFile"),
        (None, Some(file)) => ("tlsPrivateKeyFile", file, "tlsCertFile"),
        _ => return Ok(()),
    };
    anyhow::bail!("{there} is {}, but {missing} is missing: add it, or leave both out", file.display())
}

/// What runs Pods.
#[derive(Debug, Args)]
#[command(next_help_heading = "Runtime")]
pub(super) struct RuntimeArgs {
    /// What runs Pods that name neither a RuntimeClass nor lambdalet.dev/runtime [default: docker]
    #[arg(long, value_enum, value_name = "NAME")]
    runtime: Option<RuntimeKind>,
    /// The Docker daemon [default: unix:///var/run/docker.sock]
    #[arg(long, value_name = "URL")]
    docker_endpoint: Option<String>,
    /// The runtime of --runtime cri [default: unix:///run/containerd/containerd.sock]
    #[arg(long, value_name = "URL")]
    container_runtime_endpoint: Option<String>,
    /// Image of the process that holds a Pod's namespaces [default: one made on the spot; a CRI runtime has its own]
    #[arg(long, value_name = "IMAGE")]
    sandbox_image: Option<String>,
    /// Registries that are spoken to in plain HTTP
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    insecure_registries: Vec<RegistryHost>,
}

impl RuntimeArgs {
    pub(super) fn apply(self, settings: &mut Settings) {
        let Self { runtime, docker_endpoint, container_runtime_endpoint, sandbox_image, insecure_registries } = self;
        let target = &mut settings.runtime;
        set(&mut target.kind, runtime);
        set(&mut target.docker_endpoint, docker_endpoint);
        set(&mut target.cri_endpoint, container_runtime_endpoint);
        set(&mut target.sandbox_image, sandbox_image.map(Some));
        settings.images.insecure_registries = insecure_registries.iter().map(|host| host.as_str().to_owned()).collect();
    }
}

/// What the process says about itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LoggingArgs {
    /// Verbosity: 0 what an operator needs, 2 libraries too, 4 debugging, 6 tracing; RUST_LOG wins
    #[arg(long = "v", short = 'v', value_name = "N", default_value_t = 0)]
    v: u8,
    /// How log lines are written
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

impl LoggingArgs {
    pub(super) fn format(&self) -> LogFormat {
        self.log_format
    }

    pub(super) fn verbosity(&self) -> u8 {
        self.v
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Run {
        #[command(flatten)]
        args: RunArgs,
    }

    /// What the flags come to with a file of these fields.
    fn resolved(fields: &str, flags: &[&str]) -> anyhow::Result<Plan> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
        std::fs::write(file.path(), format!("{head}{fields}")).unwrap();
        let told = ["run", "--node-name", "a", "--config", file.path().to_str().unwrap()];
        Run::try_parse_from(told.iter().chain(flags)).unwrap().args.resolve()
    }

    #[test]
    fn a_node_serves_cri_where_it_is_told_to_and_else_nowhere() {
        assert_eq!(resolved("", &[]).unwrap().settings.serving.cri_listen, None);
        let told = resolved("", &["--cri-listen", "unix:///run/lambdalet/cri.sock"]).unwrap();
        assert_eq!(told.settings.serving.cri_listen, Some(PathBuf::from("/run/lambdalet/cri.sock")));
    }

    #[test]
    fn half_a_serving_pair_is_refused_by_what_is_missing() {
        for (fields, missing) in [
            ("tlsCertFile: /c\n", "tlsPrivateKeyFile is missing"),
            ("tlsPrivateKeyFile: /k\n", "tlsCertFile is missing"),
        ] {
            let error = resolved(fields, &[]).unwrap_err().to_string();
            assert!(error.contains(missing), "{error}");
        }
        let flags = ["--tls-cert-file", "/flag-c", "--tls-private-key-file", "/flag-k"];
        let serving = resolved("tlsCertFile: /c\n", &flags).unwrap().settings.serving;
        assert_eq!(serving.tls_cert_file, Some(PathBuf::from("/flag-c")));
        assert!(resolved("tlsCertFile: /c\ntlsPrivateKeyFile: /k\n", &[]).is_ok());
        assert!(resolved("", &[]).is_ok());
    }
}
