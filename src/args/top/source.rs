//! Reads what is shown: Nodes and Pods from the API server, usage from each node through it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use anyhow::Context;
use futures::{StreamExt as _, stream};
use http::Request;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde::de::DeserializeOwned;

use super::figures::{PodUsage, Pool, Summary, pools};
use super::render::{Function, Sandbox, View};
use crate::apiserver::{ApiServer, RequestError, Trouble};
use crate::function::labels;
use crate::telemetry::chain;

/// Marks this software among the versions of nodes.
const VERSION_MARK: &str = "+lambdalet.";
/// Nodes asked at once.
const NODES_AT_ONCE: usize = 8;

/// What is asked for.
#[derive(Debug)]
pub(super) struct Scope {
    /// `None` is every namespace.
    pub(super) namespace: Option<String>,
    /// `None` is every node that runs this software.
    pub(super) node: Option<String>,
}

/// Reads again and again, since rates need two readings.
pub(super) struct Source {
    api: ApiServer,
    scope: Scope,
    /// Calls of each function by Pod UID, and when they were counted.
    calls: HashMap<String, (Instant, f64)>,
}

/// What one node tells.
#[derive(Default)]
struct Told {
    usage: BTreeMap<String, PodUsage>,
    pools: BTreeMap<String, Pool>,
    read: Option<Instant>,
    note: Option<String>,
}

impl Source {
    pub(super) fn new(api: ApiServer, scope: Scope) -> Self {
        Self { api, scope, calls: HashMap::new() }
    }

    /// Everything now. A node that does not tell makes for a note.
    pub(super) async fn read(&mut self) -> anyhow::Result<View> {
        let nodes = self.nodes().await?;
        let pods = self.pods(&nodes).await?;
        let asked = stream::iter(nodes.iter().cloned());
        let told: BTreeMap<String, Told> =
            asked.map(|node| self.ask(node)).buffer_unordered(NODES_AT_ONCE).collect().await;
        let now = Timestamp::now();
        let view = view(&pods, &told, now, |uid, pool, read| self.rate(uid, pool, read));
        let counted = told.values().filter_map(|told| Some((told.read?, &told.pools)));
        self.calls = counted
            .flat_map(|(read, pools)| pools.iter().map(move |(uid, pool)| (uid.clone(), (read, pool.calls))))
            .collect();
        Ok(view)
    }

    async fn nodes(&self) -> anyhow::Result<BTreeSet<String>> {
        let api: Api<Node> = Api::all(self.api.client.clone());
        if let Some(node) = &self.scope.node {
            return match self.api.request(api.get(node)).await {
                Err(error) if error.trouble == Trouble::NotFound => anyhow::bail!("there is no node {node}"),
                // Whether it is there may be a secret; what it uses is asked anyway.
                Err(error) if error.trouble != Trouble::Forbidden => Err(error.into()),
                _ => Ok(BTreeSet::from([node.clone()])),
            };
        }
        let listed = self.api.request(api.list(&ListParams::default())).await;
        let listed = listed.context("failed to list the nodes; name one with --node NODE to do without")?;
        let ours = |node: &Node| {
            let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
            info.is_some_and(|info| info.kubelet_version.contains(VERSION_MARK))
        };
        Ok(listed.iter().filter(|node| ours(node)).map(ResourceExt::name_any).collect())
    }

    async fn pods(&self, nodes: &BTreeSet<String>) -> anyhow::Result<Vec<Pod>> {
        let client = self.api.client.clone();
        let api: Api<Pod> = match &self.scope.namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        };
        let mut params = ListParams::default();
        if let Some(node) = &self.scope.node {
            params = params.fields(&format!("spec.nodeName={node}"));
        }
        let listed = self.api.request(api.list(&params)).await.context("failed to list the Pods")?;
        let here = |pod: &Pod| node_of(pod).is_some_and(|node| nodes.contains(node));
        Ok(listed.items.into_iter().filter(here).collect())
    }

    async fn ask(&self, node: String) -> (String, Told) {
        let summary = self.proxied::<Summary>(&node, "stats/summary?only_cpu_and_memory=true");
        let metrics = self.text(&node, "metrics");
        let told = match futures::try_join!(summary, metrics) {
            Ok((summary, text)) => {
                Told { usage: summary.usage(), pools: pools(&text), read: Some(Instant::now()), note: None }
            }
            Err(error) => {
                Told { note: Some(format!("node {node} does not tell: {}", chain(&error))), ..Told::default() }
            }
        };
        (node, told)
    }

    async fn proxied<T: DeserializeOwned>(&self, node: &str, path: &str) -> Result<T, RequestError> {
        let text = self.text(node, path).await?;
        serde_json::from_str(&text).map_err(|error| self.api.explain(kube::Error::SerdeError(error)))
    }

    async fn text(&self, node: &str, path: &str) -> Result<String, RequestError> {
        let request = Request::get(format!("/api/v1/nodes/{node}/proxy/{path}")).body(Vec::new());
        let request = request.map_err(|error| self.api.explain(kube::Error::HttpError(error)))?;
        self.api.request(self.api.client.request_text(request)).await
    }

    /// Calls per second since the reading before.
    fn rate(&self, uid: &str, pool: &Pool, read: Instant) -> Option<f64> {
        let (before, calls) = self.calls.get(uid)?;
        let seconds = read.duration_since(*before).as_secs_f64();
        // A node that was started again counts from zero.
        (seconds > 0.0).then(|| (pool.calls - calls).max(0.0) / seconds)
    }
}

fn view(
    pods: &[Pod],
    told: &BTreeMap<String, Told>,
    now: Timestamp,
    rate: impl Fn(&str, &Pool, Instant) -> Option<f64>,
) -> View {
    let mut view = View { time: now, nodes: told.keys().cloned().collect(), ..View::default() };
    view.notes = told.values().filter_map(|told| told.note.clone()).collect();
    for pod in pods {
        let told = node_of(pod).and_then(|node| told.get(node));
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let usage = told.and_then(|told| told.usage.get(uid)).copied().unwrap_or_default();
        view.sandboxes.push(Sandbox::of(pod, usage, now));
        if labels::is_function(pod) {
            let pool = told.and_then(|told| Some((told.pools.get(uid)?, told.read?)));
            let calls = pool.and_then(|(pool, read)| rate(uid, pool, read));
            view.functions.push(Function::of(pod, pool.map(|(pool, _)| *pool), calls, now));
        }
    }
    view.sort();
    view
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}
