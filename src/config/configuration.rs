//! Pure: the settings in effect as a `KubeletConfiguration`, for `/configz`. Read as a file it gives the same settings.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::values::{GoDuration, Reserved, Threshold};
use super::{NodeSettings, PodSettings, ServingSettings, Settings};

/// The configuration; fields of a kubelet's that this node does not have are left out.
pub fn in_effect(settings: &Settings) -> Value {
    let mut fields = json!({"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration"});
    let groups = [serving(&settings.serving), node(&settings.node), pods(&settings.pods)];
    let mut all: Vec<_> = groups.into_iter().flat_map(|group| group.as_object().cloned().unwrap_or_default()).collect();
    // As a kubelet says it: one after the other, or as many at once as there is a limit for.
    let pulls = settings.images.max_parallel_pulls;
    all.push(("serializeImagePulls".to_owned(), json!(pulls == Some(1))));
    if let Some(most) = pulls.filter(|most| *most != 1) {
        all.push(("maxParallelImagePulls".to_owned(), json!(most)));
    }
    all.push(("containerRuntimeEndpoint".to_owned(), json!(settings.runtime.cri_endpoint)));
    let garbage = &settings.images.garbage;
    all.push(("imageGCHighThresholdPercent".to_owned(), json!(garbage.high_percent)));
    all.push(("imageGCLowThresholdPercent".to_owned(), json!(garbage.low_percent)));
    all.push(("imageMinimumGCAge".to_owned(), json!(duration(garbage.min_age))));
    all.push(("imageMaximumGCAge".to_owned(), json!(duration(garbage.max_age.unwrap_or_default()))));
    if let Some(object) = fields.as_object_mut() {
        object.extend(all.into_iter().filter(|(_, value)| !value.is_null()));
    }
    fields
}

fn serving(serving: &ServingSettings) -> Value {
    json!({
        "address": serving.address,
        "port": serving.port,
        "tlsCertFile": serving.tls_cert_file,
        "tlsPrivateKeyFile": serving.tls_private_key_file,
        "authentication": {
            "x509": serving.client_ca_file.as_ref().map_or_else(|| json!({}), |file| json!({"clientCAFile": file})),
            "webhook": {"enabled": serving.token_review, "cacheTTL": duration(serving.token_review_ttl)},
            "anonymous": {"enabled": serving.anonymous},
        },
        "authorization": {
            "mode": if serving.authorize { "Webhook" } else { "AlwaysAllow" },
            "webhook": {
                "cacheAuthorizedTTL": duration(serving.authorized_ttl),
                "cacheUnauthorizedTTL": duration(serving.unauthorized_ttl),
            },
        },
        "streamingConnectionIdleTimeout": duration(serving.stream_idle),
    })
}

fn node(node: &NodeSettings) -> Value {
    let taints = (!node.taints.is_empty()).then_some(&node.taints);
    let periods = node.eviction_soft_grace_period.iter().map(|(signal, period)| (signal, duration(*period)));
    let periods: BTreeMap<_, _> = periods.collect();
    json!({
        "maxPods": node.max_pods,
        "registerNode": node.register,
        "registerWithTaints": taints,
        "systemReserved": reserved(&node.system_reserved),
        "kubeReserved": reserved(&node.kube_reserved),
        "nodeStatusUpdateFrequency": duration(node.status_update_frequency),
        "nodeStatusReportFrequency": duration(node.status_report_frequency),
        "nodeLeaseDurationSeconds": node.lease_duration.as_secs(),
        "evictionHard": thresholds(&node.eviction_hard),
        "evictionSoft": thresholds(&node.eviction_soft),
        "evictionSoftGracePeriod": periods,
        "evictionMinimumReclaim": thresholds(&node.eviction_minimum_reclaim),
        "evictionMaxPodGracePeriod": node.eviction_max_pod_grace_period.as_secs(),
        "evictionPressureTransitionPeriod": duration(node.pressure_transition),
        "shutdownGracePeriod": duration(node.shutdown_grace.all),
        "shutdownGracePeriodCriticalPods": duration(node.shutdown_grace.critical),
        "shutdownGracePeriodByPodPriority": by_priority(&node.shutdown_grace.by_priority),
    })
}

fn by_priority(periods: &BTreeMap<i32, Duration>) -> Option<Vec<Value>> {
    let entry = |(priority, period): (&i32, &Duration)| json!({"priority": priority, "shutdownGracePeriodSeconds": period.as_secs()});
    (!periods.is_empty()).then(|| periods.iter().map(entry).collect())
}

fn pods(pods: &PodSettings) -> Value {
    let ranges: Vec<String> = pods.pod_cidrs.iter().map(ToString::to_string).collect();
    let sysctls: Vec<_> = pods.allowed_unsafe_sysctls.iter().map(|pattern| pattern.as_str()).collect();
    json!({
        "clusterDNS": (!pods.cluster_dns.is_empty()).then_some(&pods.cluster_dns),
        "clusterDomain": pods.cluster_domain,
        "podCIDR": (!ranges.is_empty()).then(|| ranges.join(",")),
        "resolvConf": pods.resolv_conf,
        "crashLoopBackOff": {"maxContainerRestartPeriod": duration(pods.max_restart_backoff)},
        "cpuCFSQuota": pods.cpu_cfs_quota,
        "podPidsLimit": pods.pids_limit.unwrap_or(-1),
        "containerLogMaxSize": pods.log_max_size.to_string(),
        "containerLogMaxFiles": pods.log_max_files,
        "staticPodPath": pods.static_pod_path,
        "fileCheckFrequency": duration(pods.file_check_frequency),
        "allowedUnsafeSysctls": (!sysctls.is_empty()).then_some(sysctls),
        "failSwapOn": false,
        "memorySwap": {"swapBehavior": "NoSwap"},
    })
}

fn duration(duration: Duration) -> String {
    GoDuration(duration).to_string()
}

fn reserved(reserved: &Reserved) -> Option<BTreeMap<&String, String>> {
    let texts: BTreeMap<_, _> = reserved.0.iter().map(|(name, quantity)| (name, quantity.to_string())).collect();
    (!texts.is_empty()).then_some(texts)
}

fn thresholds(thresholds: &BTreeMap<String, Threshold>) -> BTreeMap<&String, String> {
    let text = |threshold: &Threshold| match threshold {
        Threshold::Absolute(quantity) => quantity.to_string(),
        Threshold::Percent(percent) => format!("{percent}%"),
    };
    thresholds.iter().map(|(signal, threshold)| (signal, text(threshold))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::ConfigFile;

    fn read_back(settings: &Settings) -> (Settings, Vec<String>) {
        let mut read = Settings::default();
        let text = in_effect(settings).to_string();
        let warnings = ConfigFile::parse("configz".as_ref(), &text).unwrap().apply(&mut read).unwrap();
        (read, warnings)
    }

    #[test]
    fn what_is_shown_reads_back() {
        let (read, warnings) = read_back(&Settings::default());
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(format!("{read:?}"), format!("{:?}", Settings::default()));

        let mut settings = Settings::default();
        settings.serving.port = 10255;
        settings.serving.client_ca_file = Some("/ca".into());
        settings.serving.tls_cert_file = Some("/c".into());
        settings.serving.tls_private_key_file = Some("/k".into());
        settings.serving.token_review_ttl = Duration::from_millis(90_500);
        settings.serving.stream_idle = Duration::from_secs(61);
        settings.node.max_pods = 7;
        settings.node.port = settings.serving.port;
        settings.node.register = false;
        settings.node.system_reserved = Reserved::from_pairs([("cpu", "100m"), ("memory", "1Gi")]).unwrap();
        settings.node.lease_duration = Duration::from_secs(20);
        settings.node.eviction_hard = BTreeMap::from([("pid.available".to_owned(), Threshold::Percent(2.5))]);
        settings.pods.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
        settings.pods.pod_cidrs = ["10.1.0.0/24", "fd01::/64"].map(|range| range.parse().unwrap()).to_vec();
        settings.pods.pids_limit = Some(100);
        settings.pods.allowed_unsafe_sysctls = vec!["net.core.*".parse().unwrap()];
        settings.node.shutdown_grace.by_priority = BTreeMap::from([(7, Duration::from_secs(9))]);
        settings.pods.log_max_size = 12_345;
        settings.images.max_parallel_pulls = Some(4);
        settings.runtime.cri_endpoint = "unix:///run/crio/crio.sock".to_owned();
        let (read, warnings) = read_back(&settings);
        assert_eq!(warnings, Vec::<String>::new());
        let (mut read, mut wanted) = (read, settings);
        // Follows the serving port where flags and file are put together.
        read.node.port = 0;
        wanted.node.port = 0;
        assert_eq!(format!("{read:?}"), format!("{wanted:?}"));
    }
}
