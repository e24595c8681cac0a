//! What the node tells of itself: its configuration, flags, and what runs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::{StatusCode, header};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use super::targets::TargetError;
use super::{App, ListMeta, PodList, health, internal, log_files, profile, runtime_status, stats};
use crate::runtime::stats::{SandboxStats, StatsScope};
use crate::telemetry::chain;

/// Said on top of what is for people only, as by every Kubernetes component.
const FOR_PEOPLE: &str =
    "Warning: this page is for people who look for a fault. Its form may change at any time: do not parse it.";

/// What the node is asked about itself.
#[derive(Clone, Debug)]
pub struct About {
    /// The configuration in effect, as a `KubeletConfiguration`; for `/configz`.
    pub configuration: Value,
    /// Flags given, without dashes; for `/flagz`.
    pub flags: BTreeMap<String, String>,
    /// A path on the node's file system, whose size and use `/stats/summary` tells.
    pub root_dir: PathBuf,
    /// The directory behind `/logs/`.
    pub log_dir: PathBuf,
    /// When the process started; for `/statusz`.
    pub started_at: Timestamp,
}

impl Default for About {
    /// Nothing to tell, the host's root directory and `/var/log`, started now.
    fn default() -> Self {
        Self {
            configuration: Value::Null,
            flags: BTreeMap::new(),
            root_dir: PathBuf::from("/"),
            log_dir: PathBuf::from("/var/log"),
            started_at: Timestamp::now(),
        }
    }
}

/// The flags of a command line, each with its value; a flag without one is `true`, one given twice has both.
pub fn flags_of(arguments: impl IntoIterator<Item = String>) -> BTreeMap<String, String> {
    let mut flags: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = arguments.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix("--") else { continue };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                (flag.to_owned(), arguments.next_if(|next| !next.starts_with("--")).unwrap_or_else(|| "true".into()))
            }
        };
        let known = flags.entry(name).or_default();
        if !known.is_empty() {
            known.push(',');
        }
        known.push_str(&value);
    }
    flags
}

/// The routes of this file, of [`health`], [`stats`], [`log_files`] and [`profile`].
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/healthz/ping", get(health::ping))
        .route("/healthz/log", get(health::log))
        .route("/healthz/syncloop", get(health::syncloop))
        .route("/debug/pprof", any(profile::pprof))
        .route("/debug/pprof/", any(profile::pprof))
        .route("/debug/pprof/{*rest}", any(profile::pprof))
        .route("/configz", get(configz))
        .route("/flagz", get(flagz))
        .route("/statusz", get(statusz))
        .route("/runningpods", get(running_pods))
        .route("/runningpods/", get(running_pods))
        .route("/checkpoint/{namespace}/{pod}/{container}", post(checkpoint))
        .route("/logs", get(log_files::root))
        .route("/logs/", get(log_files::root))
        .route("/logs/{*path}", get(log_files::below))
        .route("/stats/summary", get(stats::summary))
        .route("/metrics/resource", get(stats::resource))
        .route("/metrics/cadvisor", get(stats::cadvisor))
        .route("/metrics/probes", get(stats::probes))
        .route("/metrics/slis", get(health::slis))
}

/// GET `/configz`: the configuration in effect.
async fn configz(State(app): State<App>) -> Response {
    json_answer(&json!({"kubeletconfig": app.about.configuration}))
}

/// GET `/flagz`: the flags given.
async fn flagz(State(app): State<App>) -> String {
    let lines = app.about.flags.iter().map(|(name, value)| format!("{name}={value}\n"));
    format!("lambdalet flagz\n{FOR_PEOPLE}\n\n{}", lines.collect::<String>())
}

/// GET `/statusz`: what runs here, and since when.
async fn statusz(State(app): State<App>) -> String {
    let up = Timestamp::now().duration_since(app.about.started_at).as_secs().max(0);
    format!(
        "lambdalet statusz\n{FOR_PEOPLE}\n\nStarted: {}\nUp: {} hr {:02} min {:02} sec\nBinary version: {}\n\
         Emulation version: {}\nPaths: /configz /flagz /healthz /metrics\n",
        app.about.started_at.strftime("%a %b %e %H:%M:%S UTC %Y"),
        up / 3600,
        up / 60 % 60,
        up % 60,
        env!("CARGO_PKG_VERSION"),
        crate::node::object::KUBELET_VERSION,
    )
}

/// GET `/runningpods/`: what the runtime runs, by its own account: a Pod that the Pod loop has lost is still here.
async fn running_pods(State(app): State<App>) -> Response {
    match app.runtime.list_pod_sandbox_stats(StatsScope::CpuAndMemory).await {
        Ok(sandboxes) => {
            let pods: Vec<Pod> = sandboxes.iter().map(running_pod).collect();
            let items = pods.iter().collect();
            json_answer(&PodList { kind: "PodList", api_version: "v1", metadata: ListMeta {}, items })
        }
        Err(error) => {
            let text = format!("failed to list what runs: {}\n", chain(&error));
            (runtime_status(error.kind()), text).into_response()
        }
    }
}

fn running_pod(sandbox: &SandboxStats) -> Pod {
    let container = |container: &crate::runtime::stats::ContainerStats| Container {
        name: container.name.clone(),
        image: Some(container.image_ref.clone()),
        ..Container::default()
    };
    let pod = &sandbox.pod;
    let metadata = ObjectMeta {
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectMeta::default()
    };
    let containers = sandbox.containers.iter().map(container).collect();
    Pod { metadata, spec: Some(PodSpec { containers, ..PodSpec::default() }), status: Some(PodStatus::default()) }
}

/// POST `/checkpoint/{namespace}/{pod}/{container}`: 404 for what is not here, else 501: no runtime of this node can.
async fn checkpoint(
    State(app): State<App>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
) -> Response {
    let text = match app.targets.log_target(&namespace, &pod, &container, false).await {
        Err(error @ (TargetError::NoPod(_) | TargetError::NoContainer { .. })) => {
            return (StatusCode::NOT_FOUND, format!("{error}\n")).into_response();
        }
        _ => "the container runtime of this node cannot checkpoint containers\n",
    };
    (StatusCode::NOT_IMPLEMENTED, text).into_response()
}

fn json_answer(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(cause) => internal("failed to write an answer", &cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_in_either_spelling() {
        let words = "lambdalet run --port 1 --kubeconfig=/k --drain-on-exit --taint a --taint=b";
        let flags = flags_of(words.split(' ').map(str::to_owned));
        let wanted = [("drain-on-exit", "true"), ("kubeconfig", "/k"), ("port", "1"), ("taint", "a,b")];
        assert_eq!(flags, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }
}
