//! The `--config` file: a `KubeletConfiguration` of `kubelet.config.k8s.io/v1beta1`, in YAML or JSON.
//!
//! Fields that are not supported here do not stop a node that a kubelet's file was carried to, but they are named: a
//! setting that has no effect must not look as if it had.

mod eviction;
mod images;
mod node_shutdown;
mod swap;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Settings;
use super::document::decode;
use super::tls::TlsVersion;
use super::values::{GoDuration, NodeTaint, Reserved, ValueError, parse_quantity};

/// The only kind and version read.
const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const KIND: &str = "KubeletConfiguration";

/// Most bytes of a configuration file; kubelet's real ones have a few thousand.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("failed to read the configuration file {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not YAML or JSON, or a field has the wrong type.
    #[error("failed to parse the configuration file {path}: {message}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and what is wrong there.
        message: String,
    },
    /// It is some other document.
    #[error(
        "the configuration file {path} holds {found}, but {API_VERSION} {KIND} is what this node reads",
        path = path.display()
    )]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// Its apiVersion and kind.
        found: String,
    },
    /// A field's value is not acceptable.
    #[error("field {field} in the configuration file {path} cannot be used", path = path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted.
        field: String,
        /// Why.
        #[source]
        source: ValueError,
    },
}

/// The file's supported fields, as they are spelled there.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct KubeletConfiguration {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
    address: Option<IpAddr>,
    port: Option<u16>,
    tls_cert_file: Option<PathBuf>,
    tls_private_key_file: Option<PathBuf>,
    tls_cipher_suites: Option<Vec<String>>,
    tls_min_version: Option<String>,
    rotate_certificates: Option<bool>,
    #[serde(rename = "serverTLSBootstrap")]
    server_tls_bootstrap: Option<bool>,
    feature_gates: Option<FeatureGates>,
    authentication: Option<Authentication>,
    authorization: Option<Authorization>,
    streaming_connection_idle_timeout: Option<GoDuration>,
    #[serde(rename = "clusterDNS")]
    cluster_dns: Option<Vec<IpAddr>>,
    cluster_domain: Option<String>,
    max_pods: Option<u32>,
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    system_reserved: Option<BTreeMap<String, String>>,
    kube_reserved: Option<BTreeMap<String, String>>,
    register_with_taints: Option<Vec<NodeTaint>>,
    register_node: Option<bool>,
    node_status_update_frequency: Option<GoDuration>,
    node_status_report_frequency: Option<GoDuration>,
    node_lease_duration_seconds: Option<u32>,
    container_runtime_endpoint: Option<String>,
    container_log_max_size: Option<String>,
    container_log_max_files: Option<u32>,
    eviction_hard: Option<BTreeMap<String, String>>,
    eviction_pressure_transition_period: Option<GoDuration>,
    eviction_soft: Option<BTreeMap<String, String>>,
    eviction_soft_grace_period: Option<BTreeMap<String, String>>,
    eviction_minimum_reclaim: Option<BTreeMap<String, String>>,
    eviction_max_pod_grace_period: Option<i32>,
    serialize_image_pulls: Option<bool>,
    max_parallel_image_pulls: Option<u32>,
    #[serde(rename = "imageGCHighThresholdPercent")]
    image_gc_high_threshold_percent: Option<u8>,
    #[serde(rename = "imageGCLowThresholdPercent")]
    image_gc_low_threshold_percent: Option<u8>,
    #[serde(rename = "imageMinimumGCAge")]
    image_minimum_gc_age: Option<GoDuration>,
    #[serde(rename = "imageMaximumGCAge")]
    image_maximum_gc_age: Option<GoDuration>,
    resolv_conf: Option<PathBuf>,
    crash_loop_back_off: Option<CrashLoopBackOff>,
    #[serde(rename = "cpuCFSQuota")]
    cpu_cfs_quota: Option<bool>,
    pod_pids_limit: Option<i64>,
    static_pod_path: Option<PathBuf>,
    file_check_frequency: Option<GoDuration>,
    shutdown_grace_period: Option<GoDuration>,
    shutdown_grace_period_critical_pods: Option<GoDuration>,
    shutdown_grace_period_by_pod_priority: Option<Vec<node_shutdown::ByPriority>>,
    allowed_unsafe_sysctls: Option<Vec<String>>,
    fail_swap_on: Option<bool>,
    memory_swap: Option<swap::MemorySwap>,
}

/// The gates that make a difference here; the others are named as ignored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct FeatureGates {
    rotate_kubelet_server_certificate: Option<bool>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Authentication {
    x509: Option<X509>,
    webhook: Option<WebhookAuthentication>,
    anonymous: Option<Anonymous>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct X509 {
    #[serde(rename = "clientCAFile")]
    client_ca_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct WebhookAuthentication {
    enabled: Option<bool>,
    #[serde(rename = "cacheTTL")]
    cache_ttl: Option<GoDuration>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Anonymous {
    enabled: Option<bool>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Authorization {
    mode: Option<AuthorizationMode>,
    webhook: Option<WebhookAuthorization>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum AuthorizationMode {
    AlwaysAllow,
    Webhook,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct WebhookAuthorization {
    #[serde(rename = "cacheAuthorizedTTL")]
    cache_authorized_ttl: Option<GoDuration>,
    #[serde(rename = "cacheUnauthorizedTTL")]
    cache_unauthorized_ttl: Option<GoDuration>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CrashLoopBackOff {
    max_container_restart_period: Option<GoDuration>,
}

/// A file that was read and found to be right, to be laid over the defaults.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    fields: KubeletConfiguration,
    ignored: Vec<String>,
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, does not parse (with line and column), or is not a `KubeletConfiguration`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > MAX_FILE_BYTES {
            let message = format!("it has {size} bytes, more than the {MAX_FILE_BYTES} that are read");
            return Err(ConfigError::Parse { path: path.to_owned(), message });
        }
        Self::parse(path, &std::fs::read_to_string(path).map_err(read)?)
    }

    /// Reads a file's text; `path` is what errors name.
    ///
    /// # Errors
    /// As [`ConfigFile::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let parse = |message| ConfigError::Parse { path: path.to_owned(), message };
        let raw: Value = decode(text).map_err(parse)?;
        let named = |field: &str| raw.get(field).and_then(Value::as_str).unwrap_or_default();
        if named("apiVersion") != API_VERSION || named("kind") != KIND {
            let found = match (named("apiVersion"), named("kind")) {
                ("", "") => "no apiVersion and kind".to_owned(),
                (version, kind) => format!("apiVersion {version:?} and kind {kind:?}"),
            };
            return Err(ConfigError::WrongKind { path: path.to_owned(), found });
        }
        let fields: KubeletConfiguration = decode(text).map_err(parse)?;
        // What does not come back when the supported fields are written out again was not read.
        let known = serde_json::to_value(&fields).map_err(|error| parse(error.to_string()))?;
        let mut ignored = Vec::new();
        collect_unknown(&raw, &known, "", &mut ignored);
        Ok(Self { path: path.to_owned(), fields, ignored })
    }

    /// Lays the file over `settings` and returns what an operator should be warned of, one sentence each.
    ///
    /// # Errors
    /// [`ConfigError::Field`] for the first value that cannot be used.
    pub fn apply(mut self, settings: &mut Settings) -> Result<Vec<String>, ConfigError> {
        let fields = std::mem::take(&mut self.fields);
        let mut overlay = Overlay { path: self.path, ignored: self.ignored };
        let mut warnings = apply_serving(&fields, settings);
        // To a kubelet an empty one is a field that was not set.
        let endpoint = fields.container_runtime_endpoint.clone().filter(|endpoint| !endpoint.is_empty());
        set(&mut settings.runtime.cri_endpoint, endpoint);
        overlay.tls(&fields, settings)?;
        overlay.node(&fields, settings)?;
        overlay.pods(&fields, settings)?;
        overlay.images(&fields, settings)?;
        if !overlay.ignored.is_empty() {
            let ignored = overlay.ignored.join(", ");
            warnings.push(format!("ignored in the configuration file {}: fields {ignored}", overlay.path.display()));
        }
        Ok(warnings)
    }
}

/// Names every field of `raw` that is not in `known`, dotted.
fn collect_unknown(raw: &Value, known: &Value, prefix: &str, unknown: &mut Vec<String>) {
    let (Value::Object(raw), Value::Object(known)) = (raw, known) else { return };
    for (name, value) in raw {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match known.get(name) {
            None => unknown.push(path),
            Some(known) => collect_unknown(value, known, &path, unknown),
        }
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

/// To a kubelet a zero is a field that was not set: a file that a program wrote has one for each duration nobody chose.
fn chosen(value: Option<GoDuration>) -> Option<Duration> {
    value.map(|GoDuration(duration)| duration).filter(|duration| !duration.is_zero())
}

fn set_duration(target: &mut Duration, value: Option<GoDuration>) {
    set(target, chosen(value));
}

/// An empty path is no more than a zero.
fn named(path: Option<&PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty()).cloned()
}

fn apply_serving(fields: &KubeletConfiguration, settings: &mut Settings) -> Vec<String> {
    let serving = &mut settings.serving;
    set(&mut serving.address, fields.address);
    set(&mut serving.port, fields.port.filter(|port| *port != 0));
    set(&mut serving.tls_cert_file, named(fields.tls_cert_file.as_ref()).map(Some));
    set(&mut serving.tls_private_key_file, named(fields.tls_private_key_file.as_ref()).map(Some));
    let authentication = fields.authentication.clone().unwrap_or_default();
    let client_ca = authentication.x509.and_then(|x509| x509.client_ca_file);
    set(&mut serving.client_ca_file, named(client_ca.as_ref()).map(Some));
    let webhook = authentication.webhook.unwrap_or_default();
    set(&mut serving.token_review, webhook.enabled);
    set_duration(&mut serving.token_review_ttl, webhook.cache_ttl);
    set(&mut serving.anonymous, authentication.anonymous.and_then(|anonymous| anonymous.enabled));
    let authorization = fields.authorization.clone().unwrap_or_default();
    set(&mut serving.authorize, authorization.mode.map(|mode| mode == AuthorizationMode::Webhook));
    let webhook = authorization.webhook.unwrap_or_default();
    set_duration(&mut serving.authorized_ttl, webhook.cache_authorized_ttl);
    set_duration(&mut serving.unauthorized_ttl, webhook.cache_unauthorized_ttl);
    set_duration(&mut serving.stream_idle, fields.streaming_connection_idle_timeout);

    let mut warnings = Vec::new();
    if serving.anonymous {
        warnings.push(
            "authentication.anonymous.enabled is true: callers without credentials reach this node's API".to_owned(),
        );
    }
    if !serving.authorize {
        warnings.push(
            "authorization.mode is AlwaysAllow: whoever is authenticated may read every log on this node".to_owned(),
        );
    }
    warnings
}

/// The values that can be wrong in themselves.
struct Overlay {
    path: PathBuf,
    ignored: Vec<String>,
}

impl Overlay {
    fn check<T>(&self, field: &str, value: Result<T, impl Into<ValueError>>) -> Result<T, ConfigError> {
        let field = field.to_owned();
        value.map_err(|source| ConfigError::Field { path: self.path.clone(), field, source: source.into() })
    }

    fn tls(&self, fields: &KubeletConfiguration, settings: &mut Settings) -> Result<(), ConfigError> {
        let Settings { serving, identity, .. } = settings;
        if let Some(names) = &fields.tls_cipher_suites {
            let suites = names.iter().map(|name| name.parse()).collect::<Result<_, ValueError>>();
            serving.tls_cipher_suites = self.check("tlsCipherSuites", suites)?;
        }
        if let Some(name) = fields.tls_min_version.as_deref().filter(|name| !name.is_empty()) {
            serving.tls_min_version = self.check("tlsMinVersion", name.parse::<TlsVersion>())?;
        }
        set(&mut identity.rotate_certificates, fields.rotate_certificates);
        set(&mut identity.server_tls_bootstrap, fields.server_tls_bootstrap);
        let gate = fields.feature_gates.as_ref().and_then(|gates| gates.rotate_kubelet_server_certificate);
        if gate == Some(false) && identity.server_tls_bootstrap {
            let text = "it needs the feature gate RotateKubeletServerCertificate, which featureGates turns off";
            return self.check("serverTLSBootstrap", Err(ValueError::new(text)));
        }
        Ok(())
    }

    fn node(&mut self, fields: &KubeletConfiguration, settings: &mut Settings) -> Result<(), ConfigError> {
        let node = &mut settings.node;
        set(&mut node.max_pods, fields.max_pods.filter(|most| *most != 0));
        set(&mut node.register, fields.register_node);
        if let Some(reserved) = &fields.system_reserved {
            node.system_reserved = self.check("systemReserved", reserved_from(reserved))?;
        }
        if let Some(reserved) = &fields.kube_reserved {
            node.kube_reserved = self.check("kubeReserved", reserved_from(reserved))?;
        }
        if let Some(taints) = &fields.register_with_taints {
            let checked = taints.iter().cloned().map(NodeTaint::checked).collect::<Result<_, _>>();
            node.taints = self.check("registerWithTaints", checked)?;
        }
        // Since 1.13 kubelet computes the status at one pace and reports it at another; a file that only says the
        // first means both, as kubelet's defaulting has it.
        set_duration(&mut node.status_update_frequency, fields.node_status_update_frequency);
        set_duration(&mut node.status_report_frequency, fields.node_status_update_frequency);
        set_duration(&mut node.status_report_frequency, fields.node_status_report_frequency);
        let lease = fields.node_lease_duration_seconds.filter(|seconds| *seconds != 0);
        set(&mut node.lease_duration, lease.map(|seconds| Duration::from_secs(seconds.into())));
        set_duration(&mut node.pressure_transition, fields.eviction_pressure_transition_period);
        self.eviction(fields, node)?;
        self.node_shutdown(fields, node)
    }

    fn pods(&mut self, fields: &KubeletConfiguration, settings: &mut Settings) -> Result<(), ConfigError> {
        let pods = &mut settings.pods;
        set(&mut pods.cluster_dns, fields.cluster_dns.clone());
        set(&mut pods.cluster_domain, fields.cluster_domain.clone());
        set(&mut pods.resolv_conf, fields.resolv_conf.clone());
        if let Some(text) = fields.pod_cidr.as_deref().filter(|text| !text.is_empty()) {
            let range = |text: &str| {
                text.trim().parse::<IpNet>().map_err(|_| {
                    ValueError::new(format!("{text:?} is not an address range such as {}", super::DEFAULT_POD_CIDR))
                })
            };
            pods.pod_cidrs = self.check("podCIDR", text.split(',').map(range).collect())?;
        }
        let backoff = fields.crash_loop_back_off.clone().unwrap_or_default().max_container_restart_period;
        if let Some(GoDuration(longest)) = backoff {
            // The bounds of KEP-4603.
            let bounded = if (Duration::from_secs(1)..=Duration::from_secs(300)).contains(&longest) {
                Ok(longest)
            } else {
                Err(ValueError::new(format!("{} is not between 1s and 300s", GoDuration(longest))))
            };
            pods.max_restart_backoff = self.check("crashLoopBackOff.maxContainerRestartPeriod", bounded)?;
        }
        if let Some(texts) = &fields.allowed_unsafe_sysctls {
            let patterns = texts.iter().map(|text| text.parse()).collect::<Result<_, ValueError>>();
            pods.allowed_unsafe_sysctls = self.check("allowedUnsafeSysctls", patterns)?;
        }
        self.swap(fields)?;
        set(&mut pods.cpu_cfs_quota, fields.cpu_cfs_quota);
        set(&mut pods.static_pod_path, named(fields.static_pod_path.as_ref()).map(Some));
        set_duration(&mut pods.file_check_frequency, fields.file_check_frequency);
        // kubelet's -1 is "as many as the node has".
        set(&mut pods.pids_limit, fields.pod_pids_limit.map(|limit| (limit > 0).then_some(limit)));
        if let Some(text) = &fields.container_log_max_size {
            let size = parse_quantity(text).map(|size| u64::try_from(size.nanos() / 1_000_000_000).unwrap_or(u64::MAX));
            pods.log_max_size = self.check("containerLogMaxSize", size)?;
        }
        if let Some(files) = fields.container_log_max_files {
            let enough = if files > 1 { Ok(files) } else { Err(ValueError::new("at least 2 files are needed")) };
            pods.log_max_files = self.check("containerLogMaxFiles", enough)?;
        }
        Ok(())
    }
}

fn reserved_from(pairs: &BTreeMap<String, String>) -> Result<Reserved, ValueError> {
    Reserved::from_pairs(pairs.iter().map(|(name, text)| (name.as_str(), text.as_str())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::values::Threshold;
    use crate::config::{ImageGarbage, ImageSettings};
    use crate::quantity::Quantity;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    pub(in crate::config) fn applied(body: &str) -> (Settings, Vec<String>) {
        let mut settings = Settings::default();
        let file = ConfigFile::parse(Path::new("node.yaml"), &format!("{HEAD}{body}")).unwrap();
        let warnings = file.apply(&mut settings).unwrap();
        (settings, warnings)
    }

    /// What is wrong with a file of these fields.
    pub(in crate::config) fn refused_field(body: &str) -> String {
        refused(&format!("{HEAD}{body}"))
    }

    fn refused(text: &str) -> String {
        let result = ConfigFile::parse(Path::new("node.yaml"), text)
            .and_then(|file| file.apply(&mut Settings::default()).map(|_| ()));
        crate::telemetry::chain(&result.unwrap_err())
    }

    #[test]
    fn tls_and_certificates_are_taken_over_and_bad_names_refused() {
        let (settings, warnings) = applied(
            "tlsMinVersion: VersionTLS13\ntlsCipherSuites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]\n\
             rotateCertificates: false\nserverTLSBootstrap: true\n\
             featureGates: {RotateKubeletServerCertificate: true, SomethingElse: true}\n",
        );
        assert_eq!(settings.serving.tls_min_version, TlsVersion::Tls13);
        assert_eq!(settings.serving.tls_cipher_suites.len(), 1);
        assert!(!settings.identity.rotate_certificates && settings.identity.server_tls_bootstrap);
        assert!(warnings[0].ends_with("fields featureGates.SomethingElse"), "{warnings:?}");

        let error = refused(&format!("{HEAD}tlsCipherSuites: [TLS_RSA_WITH_AES_128_CBC_SHA]"));
        assert!(error.contains("tlsCipherSuites") && error.contains("TLS_RSA_WITH_AES_128_CBC_SHA"), "{error}");
        let error = refused(&format!("{HEAD}tlsMinVersion: TLS1.3"));
        assert!(error.contains("tlsMinVersion") && error.contains("VersionTLS13"), "{error}");
        let gate = "serverTLSBootstrap: true\nfeatureGates: {RotateKubeletServerCertificate: false}";
        assert!(refused(&format!("{HEAD}{gate}")).contains("RotateKubeletServerCertificate"));
    }

    #[test]
    fn an_empty_file_leaves_the_defaults() {
        let (settings, warnings) = applied("");
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(format!("{settings:?}"), format!("{:?}", Settings::default()));
    }

    #[test]
    fn serving_fields_are_read() {
        let (settings, warnings) = applied(
            "address: 10.0.0.1\nport: 10255\ntlsCertFile: /c\ntlsPrivateKeyFile: /k\n\
             authentication:\n  x509: {clientCAFile: /ca}\n  webhook: {enabled: false, cacheTTL: 1m}\n  \
             anonymous: {enabled: false}\n\
             authorization:\n  mode: Webhook\n  webhook: {cacheAuthorizedTTL: 3m0s, cacheUnauthorizedTTL: 10s}\n\
             streamingConnectionIdleTimeout: 15m\n",
        );
        assert!(warnings.is_empty(), "{warnings:?}");
        let serving = settings.serving;
        assert_eq!((serving.address.to_string().as_str(), serving.port), ("10.0.0.1", 10255));
        assert_eq!(serving.tls_cert_file, Some(PathBuf::from("/c")));
        assert_eq!(serving.tls_private_key_file, Some(PathBuf::from("/k")));
        assert_eq!(serving.client_ca_file, Some(PathBuf::from("/ca")));
        assert!(!serving.token_review && !serving.anonymous && serving.authorize);
        assert_eq!(serving.token_review_ttl, Duration::from_secs(60));
        assert_eq!(serving.authorized_ttl, Duration::from_secs(180));
        assert_eq!(serving.unauthorized_ttl, Duration::from_secs(10));
        assert_eq!(serving.stream_idle, Duration::from_secs(900));
        let (settings, _) = applied("streamingConnectionIdleTimeout: 0s\n");
        assert_eq!(settings.serving.stream_idle, Duration::from_secs(4 * 3600), "as a kubelet reads a zero");
    }

    #[test]
    fn open_doors_are_honoured_and_warned_of() {
        let (settings, warnings) =
            applied("authentication: {anonymous: {enabled: true}}\nauthorization: {mode: AlwaysAllow}\n");
        assert!(settings.serving.anonymous && !settings.serving.authorize);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("anonymous") && warnings[1].contains("AlwaysAllow"), "{warnings:?}");
    }

    #[test]
    fn node_fields_are_read() {
        let (settings, warnings) = applied(
            "maxPods: 50\nregisterNode: false\nsystemReserved: {cpu: 100m, memory: 1Gi}\nkubeReserved: {cpu: 1}\n\
             registerWithTaints: [{key: a, value: b, effect: NoSchedule}, {key: c, effect: NoExecute}]\n\
             nodeStatusUpdateFrequency: 5s\nnodeStatusReportFrequency: 1m\nnodeLeaseDurationSeconds: 20\n\
             evictionPressureTransitionPeriod: 30s\nevictionMaxPodGracePeriod: 20\n\
             evictionSoft: {memory.available: 300Mi}\nevictionSoftGracePeriod: {memory.available: 1m30s}\n\
             evictionMinimumReclaim: {memory.available: 50Mi}\n\
             evictionHard: {memory.available: 200Mi, nodefs.available: 5%, nodefs.inodesFree: 1%, pid.available: 10%}\n",
        );
        assert!(warnings.is_empty(), "{warnings:?}");
        let node = settings.node;
        assert_eq!((node.max_pods, node.register), (50, false));
        assert_eq!(node.system_reserved.0["cpu"], Quantity::from_millis(100));
        assert_eq!(node.kube_reserved.0["cpu"], Quantity::from_units(1));
        assert_eq!(node.taints.len(), 2);
        assert_eq!(node.status_update_frequency, Duration::from_secs(5));
        assert_eq!(node.status_report_frequency, Duration::from_secs(60));
        assert_eq!(node.lease_duration, Duration::from_secs(20));
        assert_eq!(node.pressure_transition, Duration::from_secs(30));
        assert_eq!(node.eviction_soft["memory.available"].of(0), 300 << 20);
        assert_eq!(node.eviction_soft_grace_period["memory.available"], Duration::from_secs(90));
        assert_eq!(node.eviction_minimum_reclaim["memory.available"].of(0), 50 << 20);
        assert_eq!(node.eviction_max_pod_grace_period, Duration::from_secs(20));
        assert_eq!(node.eviction_hard.len(), 4);
        assert_eq!(node.eviction_hard["nodefs.available"], Threshold::Percent(5.0));
    }

    #[test]
    fn a_status_frequency_alone_sets_both_paces() {
        for other in ["", "nodeStatusReportFrequency: 0s\n"] {
            let (settings, _) = applied(&format!("nodeStatusUpdateFrequency: 20s\n{other}"));
            assert_eq!(settings.node.status_report_frequency, Duration::from_secs(20), "{other}");
        }
    }

    #[test]
    fn what_is_zero_or_empty_was_not_set() {
        let (settings, warnings) = applied(
            "port: 0\nmaxPods: 0\nnodeLeaseDurationSeconds: 0\ntlsCertFile: ''\ntlsPrivateKeyFile: ''\n\
             authentication: {x509: {clientCAFile: ''}}\nstaticPodPath: ''\ncontainerRuntimeEndpoint: ''\n",
        );
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(format!("{settings:?}"), format!("{:?}", Settings::default()));
    }

    /// What kubeadm leaves in /var/lib/kubelet/config.yaml: each duration is there, chosen or not.
    const KUBEADM: &str = r#"
authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: ""
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
httpCheckFrequency: 0s
imageMaximumGCAge: 0s
imageMinimumGCAge: 0s
logging:
  flushFrequency: 0
  options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}
  verbosity: 0
memorySwap: {}
nodeStatusReportFrequency: 0s
nodeStatusUpdateFrequency: 0s
resolvConf: /run/systemd/resolve/resolv.conf
rotateCertificates: true
runtimeRequestTimeout: 0s
shutdownGracePeriod: 0s
shutdownGracePeriodCriticalPods: 0s
staticPodPath: /etc/kubernetes/manifests
streamingConnectionIdleTimeout: 0s
syncFrequency: 0s
volumeStatsAggPeriod: 0s
"#;

    #[test]
    fn the_file_that_kubeadm_writes_leaves_the_defaults_but_for_what_it_says() {
        let (settings, warnings) = applied(KUBEADM);
        let mut wanted = Settings::default();
        wanted.serving.client_ca_file = Some(PathBuf::from("/etc/kubernetes/pki/ca.crt"));
        wanted.pods.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
        wanted.pods.resolv_conf = PathBuf::from("/run/systemd/resolve/resolv.conf");
        wanted.pods.static_pod_path = Some(PathBuf::from("/etc/kubernetes/manifests"));
        assert_eq!(format!("{settings:?}"), format!("{wanted:?}"));
        assert_eq!(warnings.len(), 1, "only what has no effect: {warnings:?}");
        assert!(warnings[0].contains("cgroupDriver") && !warnings[0].contains("nodeStatus"), "{warnings:?}");
    }

    #[test]
    fn pod_and_image_fields_are_read() {
        let (settings, warnings) = applied(
            "clusterDNS: [10.96.0.10]\nclusterDomain: c.example\npodCIDR: 10.1.0.0/24\nresolvConf: /r\n\
             crashLoopBackOff: {maxContainerRestartPeriod: 60s}\ncpuCFSQuota: false\npodPidsLimit: 100\n\
             containerLogMaxSize: 5Mi\ncontainerLogMaxFiles: 3\nstaticPodPath: /m\nfileCheckFrequency: 5s\n\
             serializeImagePulls: false\nmaxParallelImagePulls: 4\nimageGCHighThresholdPercent: 70\n\
             imageGCLowThresholdPercent: 60\nimageMinimumGCAge: 1m\nimageMaximumGCAge: 1h\n",
        );
        assert!(warnings.is_empty(), "{warnings:?}");
        let pods = settings.pods;
        assert_eq!(pods.cluster_dns, ["10.96.0.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            (pods.cluster_domain.as_str(), pods.pod_cidrs[0].to_string()),
            ("c.example", "10.1.0.0/24".to_owned())
        );
        assert_eq!((pods.resolv_conf, pods.max_restart_backoff), (PathBuf::from("/r"), Duration::from_secs(60)));
        assert_eq!((pods.cpu_cfs_quota, pods.pids_limit), (false, Some(100)));
        assert_eq!((pods.log_max_size, pods.log_max_files), (5 << 20, 3));
        assert_eq!(pods.static_pod_path, Some(PathBuf::from("/m")));
        assert_eq!(pods.file_check_frequency, Duration::from_secs(5));
        let garbage = ImageGarbage {
            high_percent: 70,
            low_percent: 60,
            min_age: Duration::from_secs(60),
            max_age: Some(Duration::from_secs(3600)),
        };
        let images = ImageSettings { max_parallel_pulls: Some(4), garbage, ..ImageSettings::default() };
        assert_eq!(settings.images, images);
        let (settings, _) = applied("allowedUnsafeSysctls: [net.core.*, kernel.msgmax]\n");
        assert_eq!(settings.pods.allowed_unsafe_sysctls.len(), 2);
        let error = refused_field("allowedUnsafeSysctls: [vm.swappiness]\n");
        assert!(error.contains("allowedUnsafeSysctls") && error.contains("not namespaced"), "{error}");
        assert_eq!(applied("podPidsLimit: -1\n").0.pods.pids_limit, None);
        assert_eq!(applied("serializeImagePulls: false\n").0.images.max_parallel_pulls, None);
        for (body, pulls) in [
            ("maxParallelImagePulls: 4\n", Some(4)),
            ("maxParallelImagePulls: 1\n", Some(1)),
            ("serializeImagePulls: true\n", Some(1)),
            ("imageMinimumGCAge: 1m\n", Some(1)),
        ] {
            assert_eq!(applied(body).0.images.max_parallel_pulls, pulls, "{body}");
        }
    }

    #[test]
    fn what_has_no_effect_is_named_once() {
        let (_, warnings) = applied(
            "staticPodURL: /m\nnotAField: 1\nauthentication: {x509: {clientCAFile: /ca, other: 1}}\n\
             evictionHard: {imagefs.available: 10%}\nfeatureGates: {A: true}\n",
        );
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        for field in
            ["staticPodURL", "notAField", "authentication.x509.other", "evictionHard.imagefs.available", "featureGates"]
        {
            assert!(warnings[0].contains(field), "{field}: {}", warnings[0]);
        }
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_with_its_line() {
        let error = refused(&format!("{HEAD}port: many\n"));
        assert!(error.contains("node.yaml: field port: ") && error.contains("line 3"), "{error}");
        let error = refused(&format!("{HEAD}maxPods: 1\nnodeStatusUpdateFrequency: soon\n"));
        assert!(error.contains("field nodeStatusUpdateFrequency: ") && error.contains("\"soon\""), "{error}");
        assert!(error.contains("line 4"), "{error}");
        let error = refused(
            "{\"apiVersion\": \"kubelet.config.k8s.io/v1beta1\",\n\"kind\": \"KubeletConfiguration\",\n\"port\": []}",
        );
        assert!(error.contains("field port: ") && error.contains("line 3"), "{error}");
        let error = refused(&format!("{HEAD}port: [\n"));
        assert!(error.contains("line "), "{error}");
        assert!(refused(&format!("{HEAD}port: 1\nport: 2\n")).contains("port"));
    }

    #[test]
    fn another_document_is_refused_by_what_it_is() {
        let error = refused("apiVersion: v1\nkind: Pod\n");
        assert!(error.contains("\"Pod\"") && error.contains("KubeletConfiguration"), "{error}");
        assert!(refused("port: 1\n").contains("no apiVersion and kind"));
        assert!(refused("").contains("node.yaml"));
        assert!(refused("- a\n- b\n").contains("no apiVersion and kind"));
    }

    #[test]
    fn a_value_that_cannot_be_used_is_named_by_its_field() {
        for (body, field) in [
            ("systemReserved: {gpu: 1}\n", "systemReserved"),
            ("kubeReserved: {cpu: x}\n", "kubeReserved"),
            ("evictionHard: {memory.available: x}\n", "evictionHard.memory.available"),
            ("evictionHard: {cpu.available: 1}\n", "evictionHard.cpu.available"),
            ("evictionSoft: {memory.available: 1Gi}\n", "evictionSoft.memory.available"),
            ("evictionMaxPodGracePeriod: -1\n", "evictionMaxPodGracePeriod"),
            ("registerWithTaints: [{key: 'a b', effect: NoSchedule}]\n", "registerWithTaints"),
            ("podCIDR: 10.0.0.1\n", "podCIDR"),
            ("crashLoopBackOff: {maxContainerRestartPeriod: 1h}\n", "crashLoopBackOff.maxContainerRestartPeriod"),
            ("containerLogMaxSize: big\n", "containerLogMaxSize"),
            ("containerLogMaxFiles: 1\n", "containerLogMaxFiles"),
            ("imageGCHighThresholdPercent: 101\n", "imageGCHighThresholdPercent"),
            ("imageGCLowThresholdPercent: 85\n", "imageGCHighThresholdPercent"),
        ] {
            let error = refused(&format!("{HEAD}{body}"));
            assert!(error.contains(&format!("field {field} in")), "{error}");
        }
    }

    #[test]
    fn json_may_be_indented_with_tabs() {
        let text = "{\n\t\"apiVersion\": \"kubelet.config.k8s.io/v1beta1\",\n\t\"kind\": \"KubeletConfiguration\",\n\t\"port\": 1\n}";
        let mut settings = Settings::default();
        ConfigFile::parse(Path::new("c.json"), text).unwrap().apply(&mut settings).unwrap();
        assert_eq!(settings.serving.port, 1);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ConfigFile::read(Path::new("/nowhere/node.yaml")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/node.yaml"), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[a-z:{}\\[\\]\"'&*!|>\\- \n\t0-9]{0,80}") {
            let _ = ConfigFile::parse(Path::new("x"), &text);
            let _ = ConfigFile::parse(Path::new("x"), &format!("{HEAD}{text}"));
        }
    }
}
