//! Pure: what of a node's `/stats/summary` and `/metrics` is shown.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The part of a `Summary` (stats/v1alpha1) that is read.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Summary {
    #[serde(default)]
    pods: Vec<PodStats>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStats {
    pod_ref: PodReference,
    cpu: Option<Cpu>,
    memory: Option<Memory>,
}

#[derive(Debug, Deserialize)]
struct PodReference {
    uid: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cpu {
    usage_nano_cores: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    working_set_bytes: Option<u64>,
}

/// What a Pod uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PodUsage {
    /// Thousandths of a core.
    pub(super) cpu: Option<u64>,
    /// Bytes.
    pub(super) memory: Option<u64>,
}

impl Summary {
    /// By Pod UID.
    pub(super) fn usage(self) -> BTreeMap<String, PodUsage> {
        let of_pod = |pod: PodStats| {
            let cpu = pod.cpu.and_then(|cpu| cpu.usage_nano_cores).map(|nano| nano.div_ceil(1_000_000));
            let memory = pod.memory.and_then(|memory| memory.working_set_bytes);
            (pod.pod_ref.uid, PodUsage { cpu, memory })
        };
        self.pods.into_iter().map(of_pod).collect()
    }
}

/// What a function's pool is at.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Pool {
    /// Replicas that are there, in whatever state.
    pub(super) replicas: u64,
    /// Those that it may have.
    pub(super) max: u64,
    /// Environments that run a call.
    pub(super) busy: u64,
    /// Environments that wait for one, frozen ones too.
    pub(super) idle: u64,
    /// Calls that wait.
    pub(super) queued: u64,
    /// Calls that have ended, however.
    pub(super) calls: f64,
}

/// The pools in a `/metrics` text, by Pod UID.
pub(super) fn pools(text: &str) -> BTreeMap<String, Pool> {
    let mut pools: BTreeMap<String, Pool> = BTreeMap::new();
    for line in text.lines() {
        let Some((name, labels, value)) = line.strip_prefix("lambdalet_function_").and_then(sample) else { continue };
        let Some(uid) = labels.get("uid") else { continue };
        let state = labels.get("state").map(String::as_str).unwrap_or_default();
        let pool = pools.entry(uid.clone()).or_default();
        match (name, state) {
            ("replicas", _) => pool.replicas += value as u64,
            ("replicas_max", _) => pool.max = value as u64,
            ("environments", "busy") => pool.busy = value as u64,
            ("environments", "idle" | "frozen") => pool.idle += value as u64,
            ("queued", _) => pool.queued = value as u64,
            ("calls_total", _) => pool.calls += value,
            _ => {}
        }
    }
    pools
}

type Labels = BTreeMap<String, String>;

/// `name{label="value",…} number` (OpenMetrics 1.0), with backslashes before quotes, backslashes and `n`.
fn sample(line: &str) -> Option<(&str, Labels, f64)> {
    let (name, mut rest) = line.split_once('{')?;
    let mut labels = Labels::new();
    while let Some((label, after)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        labels.insert(label.trim_start_matches(',').to_owned(), value);
        rest = &after[end + 1..];
        if rest.starts_with('}') {
            break;
        }
    }
    let value = rest.strip_prefix('}')?.split_ascii_whitespace().next()?.parse().ok()?;
    Some((name, labels, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_usage_is_read_by_its_uid() {
        let text = r#"{"node": {"nodeName": "n"}, "pods": [
            {"podRef": {"name": "p", "namespace": "ns", "uid": "u1"}, "containers": [],
             "cpu": {"time": "t", "usageNanoCores": 1500001, "usageCoreNanoSeconds": 5},
             "memory": {"time": "t", "workingSetBytes": 4096}},
            {"podRef": {"name": "q", "namespace": "ns", "uid": "u2"}, "cpu": {"usageCoreNanoSeconds": 5}}]}"#;
        let usage = serde_json::from_str::<Summary>(text).unwrap().usage();
        assert_eq!(usage["u1"], PodUsage { cpu: Some(2), memory: Some(4096) });
        assert_eq!(usage["u2"], PodUsage::default());
    }

    #[test]
    fn a_pool_is_added_up_from_its_series() {
        let labels = r#"namespace="a",pod="f",uid="u1""#;
        let text = format!(
            "# TYPE lambdalet_function_replicas gauge\n\
             lambdalet_function_replicas{{{labels},state=\"ready\"}} 2\n\
             lambdalet_function_replicas{{state=\"starting\",{labels}}} 1\n\
             lambdalet_function_replicas_max{{{labels}}} 20\n\
             lambdalet_function_environments{{{labels},state=\"busy\"}} 4\n\
             lambdalet_function_environments{{{labels},state=\"idle\"}} 3\n\
             lambdalet_function_environments{{{labels},state=\"frozen\"}} 2\n\
             lambdalet_function_queued{{{labels}}} 7\n\
             lambdalet_function_calls_total{{{labels},outcome=\"Answered\"}} 10\n\
             lambdalet_function_calls_total{{{labels},outcome=\"Busy\"}} 1\n\
             lambdalet_function_overhead_seconds_count 9\n\
             lambdalet_function_queued{{uid=\"odd\\\"\\\\\\n\"}} 1 # {{}} 1\n\
             lambdalet_function_queued{{uid=\"broken\n\
             lambdalet_api_connections 1\n# EOF\n"
        );
        let pools = pools(&text);
        assert_eq!(pools["u1"], Pool { replicas: 3, max: 20, busy: 4, idle: 5, queued: 7, calls: 11.0 });
        assert_eq!(pools.keys().collect::<Vec<_>>(), ["odd\"\\\n", "u1"]);
    }
}
