//! What this node was told: kubelet's defaults, then the `--config` file, then the flags, the later winning.
//!
//! [`Settings`] is the sum; every room takes the group it needs and knows neither flags nor files.

pub mod configuration;
pub(crate) mod document;
pub mod file;
pub mod function_server;
pub mod microvm;
pub mod node_shutdown;
pub mod sysctls;
pub mod tls;
pub mod values;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use microvm::MicrovmSettings;
use node_shutdown::ShutdownGrace;
use sysctls::SysctlPattern;
use tls::{CipherSuite, TlsVersion};
use values::{NodeTaint, Reserved, Threshold};

/// The Pod range where neither `--pod-cidr` nor `spec.podCIDR` names one.
///
/// Outside what its neighbours use by default: Docker (172.17.0.0/12, 192.168.0.0/16), kubeadm Services (10.96.0.0/12),
/// flannel and kind (10.244.0.0/16), k3s (10.42.0.0/15), podman (10.88.0.0/16), AKS (10.224.0.0/12).
pub const DEFAULT_POD_CIDR: &str = "10.187.0.0/16";

/// Where CNI plugins are by default, as kubelet and containerd have it.
pub const DEFAULT_CNI_BIN_DIR: &str = "/opt/cni/bin";

/// Everything this node was told.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The Node object and its lease.
    pub node: NodeSettings,
    /// How the node gets its credentials.
    pub identity: IdentitySettings,
    /// The HTTPS API.
    pub serving: ServingSettings,
    /// How Pods are run.
    pub pods: PodSettings,
    /// How images are fetched.
    pub images: ImageSettings,
    /// What runs them.
    pub runtime: RuntimeSettings,
    /// The server for a resource manager, if there is to be one.
    pub function_server: Option<function_server::FunctionServerSettings>,
}

/// The Node object and its lease.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// `metadata.name`; filled in from the host's name before any room starts.
    pub name: String,
    /// InternalIPs, the primary first; empty asks the host for the address of its default route.
    pub addresses: Vec<IpAddr>,
    /// Labels beside those every node carries.
    pub labels: BTreeMap<String, String>,
    /// Taints given at registration, never afterwards.
    pub taints: Vec<NodeTaint>,
    /// Create the Node object; without it an existing one is kept fresh.
    pub register: bool,
    /// Most Pods at once.
    pub max_pods: u32,
    /// Kept for the operating system.
    pub system_reserved: Reserved,
    /// Kept for this process and the runtime.
    pub kube_reserved: Reserved,
    /// By signal (`memory.available`, `nodefs.available`, `nodefs.inodesFree`, `pid.available`): below it the node is
    /// under pressure, and as much is kept from allocatable.
    pub eviction_hard: BTreeMap<String, Threshold>,
    /// By signal: below it for as long as [`NodeSettings::eviction_soft_grace_period`] says, Pods are evicted too.
    pub eviction_soft: BTreeMap<String, Threshold>,
    /// By signal.
    pub eviction_soft_grace_period: BTreeMap<String, Duration>,
    /// By signal: once Pods are evicted, until there is so much more than the threshold.
    pub eviction_minimum_reclaim: BTreeMap<String, Threshold>,
    /// The most grace of a Pod that goes for a soft threshold.
    pub eviction_max_pod_grace_period: Duration,
    /// How long a pressure condition stays true after it was last seen.
    pub pressure_transition: Duration,
    /// How long Pods have when the host goes down.
    pub shutdown_grace: ShutdownGrace,
    /// How often the status is computed, and sent if it changed.
    pub status_update_frequency: Duration,
    /// How often it is sent although nothing changed.
    pub status_report_frequency: Duration,
    /// How long the lease holds without renewal.
    pub lease_duration: Duration,
    /// On the first signal: end the Pods and report NotReady at once.
    pub drain_on_exit: bool,
    /// Port in `daemonEndpoints.kubeletEndpoint`; the one the HTTPS API listens on.
    pub port: u16,
    /// Name of the runtime chosen, for `containerRuntimeVersion` while it does not answer.
    pub runtime_name: String,
    /// What RuntimeClasses may name here; the first is that of Pods without a class.
    pub runtime_handlers: Vec<String>,
    /// Measured for disk pressure and ephemeral storage.
    pub root_dir: PathBuf,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            name: String::new(),
            addresses: Vec::new(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            register: true,
            max_pods: 110,
            system_reserved: Reserved::default(),
            kube_reserved: Reserved::default(),
            eviction_hard: default_eviction_hard(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_minimum_reclaim: BTreeMap::new(),
            eviction_max_pod_grace_period: Duration::ZERO,
            pressure_transition: Duration::from_secs(5 * 60),
            shutdown_grace: ShutdownGrace::default(),
            status_update_frequency: Duration::from_secs(10),
            status_report_frequency: Duration::from_secs(5 * 60),
            lease_duration: Duration::from_secs(40),
            drain_on_exit: false,
            port: 10250,
            runtime_name: RuntimeKind::default().name().to_owned(),
            runtime_handlers: vec![RuntimeKind::default().name().to_owned()],
            root_dir: PathBuf::from("/var/lib/lambdalet"),
        }
    }
}

/// kubelet's hard thresholds on Linux, without those of the image file system, which is not measured.
fn default_eviction_hard() -> BTreeMap<String, Threshold> {
    let mebibytes = crate::quantity::Quantity::from_units(100 << 20);
    BTreeMap::from([
        ("memory.available".to_owned(), Threshold::Absolute(mebibytes)),
        ("nodefs.available".to_owned(), Threshold::Percent(10.0)),
        ("nodefs.inodesFree".to_owned(), Threshold::Percent(5.0)),
    ])
}

/// How the node gets its credentials.
#[derive(Clone, Debug)]
pub struct IdentitySettings {
    /// Used once, to ask for a client certificate, if the kubeconfig is not there or its certificate has expired.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Where certificates asked for are kept; `None` is `pki` below the root directory.
    pub cert_dir: Option<PathBuf>,
    /// Renew the client certificate that bootstrap got, at 70 to 90 % of its life. kubelet's own default is false, but
    /// kubeadm turns it on everywhere: a node that stops after a year helps nobody.
    pub rotate_certificates: bool,
    /// Ask the API server for the serving certificate, and renew it; self-signed until it is granted.
    pub server_tls_bootstrap: bool,
}

impl Default for IdentitySettings {
    fn default() -> Self {
        Self { bootstrap_kubeconfig: None, cert_dir: None, rotate_certificates: true, server_tls_bootstrap: false }
    }
}

/// The HTTPS API.
#[derive(Clone, Debug)]
pub struct ServingSettings {
    /// Address to listen on.
    pub address: IpAddr,
    /// Port to listen on.
    pub port: u16,
    /// PEM certificate chain; without it a self-signed one is made.
    pub tls_cert_file: Option<PathBuf>,
    /// Its PEM key.
    pub tls_private_key_file: Option<PathBuf>,
    /// The lowest TLS version a client may speak.
    pub tls_min_version: TlsVersion,
    /// Suites offered for TLS 1.2; empty offers all there are. Those of TLS 1.3 are always offered, as a kubelet does.
    pub tls_cipher_suites: Vec<CipherSuite>,
    /// PEM bundle of the CAs client certificates are checked against; without it none is accepted.
    pub client_ca_file: Option<PathBuf>,
    /// Let callers without credentials be `system:anonymous`.
    pub anonymous: bool,
    /// Ask the API server whose a bearer token is.
    pub token_review: bool,
    /// How long its answer holds.
    pub token_review_ttl: Duration,
    /// Ask the API server what a caller may do; otherwise every authenticated caller may do everything.
    pub authorize: bool,
    /// How long "yes" holds.
    pub authorized_ttl: Duration,
    /// How long "no" holds.
    pub unauthorized_ttl: Duration,
    /// After this long in which nothing but pings came or went exec, attach and port-forward end
    /// (`streamingConnectionIdleTimeout`).
    pub stream_idle: Duration,
    /// Socket at which CRI v1 is served beside the Pods; `None` serves none.
    pub cri_listen: Option<PathBuf>,
}

impl Default for ServingSettings {
    fn default() -> Self {
        Self {
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: 10250,
            tls_cert_file: None,
            tls_private_key_file: None,
            tls_min_version: TlsVersion::default(),
            tls_cipher_suites: Vec::new(),
            client_ca_file: None,
            anonymous: false,
            token_review: true,
            token_review_ttl: Duration::from_secs(2 * 60),
            authorize: true,
            authorized_ttl: Duration::from_secs(5 * 60),
            unauthorized_ttl: Duration::from_secs(30),
            stream_idle: Duration::from_secs(4 * 60 * 60),
            cri_listen: None,
        }
    }
}

/// How Pods are run.
#[derive(Clone, Debug)]
pub struct PodSettings {
    /// Where this node keeps what must survive its own restart, and the Pods' volumes.
    pub root_dir: PathBuf,
    /// Name servers of Pods with `dnsPolicy: ClusterFirst`; without one they get the host's.
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's DNS zone.
    pub cluster_domain: String,
    /// The host's resolver file, whose content Pods with `dnsPolicy: Default` get; empty gives them none.
    pub resolv_conf: PathBuf,
    /// Ranges Pod addresses come from, if told, at most one of each family and the first one first; else
    /// `spec.podCIDRs`, else [`DEFAULT_POD_CIDR`].
    pub pod_cidrs: Vec<IpNet>,
    /// Where Pods' packets go with their own addresses, at most one range of each family: to Pods of other nodes.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// The plugins that make the Pods' network; without them it is the node's own.
    pub cni: Option<CniSettings>,
    /// Longest wait between two starts of a container that keeps ending.
    pub max_restart_backoff: Duration,
    /// Most processes and threads of one Pod; `None` is no limit.
    pub pids_limit: Option<i64>,
    /// Turn CPU limits into CFS quotas.
    pub cpu_cfs_quota: bool,
    /// Size in bytes at which a container's log is rotated.
    pub log_max_size: u64,
    /// How many files of a container's log are kept.
    pub log_max_files: u32,
    /// Directory of static Pods, or the file of one; `None` runs none.
    pub static_pod_path: Option<PathBuf>,
    /// How often it is read although no change was noticed.
    pub file_check_frequency: Duration,
    /// Kernel parameters that Pods may set beside the safe ones.
    pub allowed_unsafe_sysctls: Vec<SysctlPattern>,
}

impl Default for PodSettings {
    fn default() -> Self {
        Self {
            root_dir: PathBuf::from("/var/lib/lambdalet"),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            pod_cidrs: Vec::new(),
            non_masquerade_cidrs: Vec::new(),
            cni: None,
            max_restart_backoff: Duration::from_secs(300),
            pids_limit: None,
            cpu_cfs_quota: true,
            log_max_size: 10 << 20,
            log_max_files: 5,
            static_pod_path: None,
            file_check_frequency: Duration::from_secs(20),
            allowed_unsafe_sysctls: Vec::new(),
        }
    }
}

/// Who makes the Pods' network, if it is not this node: plugins of the Container Network Interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniSettings {
    /// The directory of the network's configuration; the first file by name counts.
    pub conf_dir: PathBuf,
    /// The directories of plugins; the first that has one counts.
    pub bin_dirs: Vec<PathBuf>,
}

/// How images are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSettings {
    /// Pulls at once; `None` is no limit. kubelet's `serializeImagePulls: true` is `Some(1)`.
    pub max_parallel_pulls: Option<u32>,
    /// Registries spoken to in plain HTTP.
    pub insecure_registries: Vec<String>,
    /// When images that nobody uses are removed.
    pub garbage: ImageGarbage,
}

/// When images that nobody uses are removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageGarbage {
    /// Percent of their file system in use from which on space is made; 100 is never.
    pub high_percent: u8,
    /// Percent in use at which there is enough space again.
    pub low_percent: u8,
    /// No image goes for want of space sooner than this after it came.
    pub min_age: Duration,
    /// An image that was not used for so long goes whatever the space is; `None` keeps it.
    pub max_age: Option<Duration>,
}

impl Default for ImageGarbage {
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(2 * 60), max_age: None }
    }
}

impl Default for ImageSettings {
    fn default() -> Self {
        Self { max_parallel_pulls: Some(1), insecure_registries: Vec::new(), garbage: ImageGarbage::default() }
    }
}

/// What runs Pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeSettings {
    /// Which driver runs Pods that do not say.
    pub kind: RuntimeKind,
    /// The Docker daemon, `unix:///path` .
    pub docker_endpoint: String,
    /// The CRI runtime, `unix:///path`.
    pub cri_endpoint: String,
    /// Image of the process that holds a sandbox; `None` is the driver's own.
    pub sandbox_image: Option<String>,
    /// Pods as microVMs.
    pub microvm: MicrovmSettings,
}

impl Default for RuntimeSettings {
    fn default() -> Self {
        Self {
            kind: RuntimeKind::default(),
            docker_endpoint: "unix:///var/run/docker.sock".to_owned(),
            cri_endpoint: "unix:///run/containerd/containerd.sock".to_owned(),
            sandbox_image: None,
            microvm: MicrovmSettings::default(),
        }
    }
}

/// A driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum RuntimeKind {
    /// Containers of a Docker daemon; microVMs for Pods that ask for them
    #[default]
    Docker,
    /// MicroVMs; containers of a Docker daemon, if there is one, for Pods that ask for them
    Microvm,
    /// Containers of another runtime that speaks CRI v1, such as containerd; nothing else
    Cri,
    /// Nothing real: Pods are remembered, not run
    Fake,
}

impl RuntimeKind {
    /// The name, as in `--runtime`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Microvm => "microvm",
            Self::Cri => "cri",
            Self::Fake => "fake",
        }
    }
}
