//! Measures how fast a node starts and ends Pods, as its users see it: from the moment a Pod is created until a watch
//! on the API server says that every container runs, and from its deletion until the object is gone.
//!
//! `cargo run --release --example bench-pods -- --node NAME --image IMAGE` prints one JSON object; `hack/bench/run`
//! runs it against lambdalet and its peer and makes a table.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use futures::StreamExt as _;
use futures::future::try_join_all;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

/// Longest time any one wait may take.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Parser)]
struct Args {
    /// Kubeconfig of somebody who may create Pods
    #[arg(long)]
    kubeconfig: PathBuf,
    /// The node to measure
    #[arg(long)]
    node: String,
    /// A small image that is present on the node and ends on SIGTERM
    #[arg(long, default_value = "lambdalet.test/pause:1")]
    image: String,
    /// Pods started one after the other
    #[arg(long, default_value_t = 15)]
    single: usize,
    /// Sizes of the bursts of Pods created at once
    #[arg(long, value_delimiter = ',', default_value = "10,30")]
    bursts: Vec<usize>,
    /// Pods kept for the idle measurement; 0 leaves it out
    #[arg(long, default_value_t = 50)]
    idle: usize,
    /// Seconds of idleness measured
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// Processes measured while idle, as NAME=PID
    #[arg(long)]
    process: Vec<String>,
}

struct Bench {
    pods: Api<Pod>,
    args: Args,
    watch: BoxStream<'static, kube::Result<WatchEvent<Pod>>>,
    number: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    let kubeconfig = Kubeconfig::read_from(&args.kubeconfig).context("failed to read the kubeconfig")?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let name = format!("bench-{}", std::process::id());
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = json!({ "metadata": { "name": name } });
    namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &name);
    wait_for_service_account(&client, &name).await?;
    let result = measure(pods, args).await;
    namespaces.delete(&name, &DeleteParams::default()).await?;
    println!("{}", result?);
    Ok(())
}

/// Pods are refused until their namespace has its default ServiceAccount.
async fn wait_for_service_account(client: &Client, namespace: &str) -> anyhow::Result<()> {
    let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let mut changes = accounts.watch(&WatchParams::default().fields("metadata.name=default"), "0").await?.boxed();
    let seen = tokio::time::timeout(PATIENCE, changes.next()).await;
    seen.context("the namespace got no default ServiceAccount")?.context("the watch ended")??;
    Ok(())
}

async fn measure(pods: Api<Pod>, args: Args) -> anyhow::Result<Value> {
    let version = pods.list(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();
    let watch = pods.watch(&WatchParams::default(), &version).await?.boxed();
    let mut bench = Bench { pods, args, watch, number: 0 };
    // The first Pod pays for connections and caches.
    bench.round(2).await?;
    let mut starts = Vec::new();
    let mut ends = Vec::new();
    for _ in 0..bench.args.single {
        let round = bench.round(1).await?;
        starts.extend(round.starts);
        ends.extend(round.ends);
    }
    let mut bursts = Vec::new();
    for size in bench.args.bursts.clone() {
        let round = bench.round(size).await?;
        bursts.push(json!({
            "pods": size, "start_p50": median(round.starts.clone()), "start_wall": longest(&round.starts),
            "delete_p50": median(round.ends.clone()), "delete_wall": longest(&round.ends),
        }));
    }
    let idle = if bench.args.idle > 0 { bench.idle().await? } else { Value::Null };
    Ok(json!({
        "node": bench.args.node, "start_p50": median(starts.clone()), "start_max": longest(&starts),
        "delete_p50": median(ends), "bursts": bursts, "idle": idle,
    }))
}

/// Seconds of each Pod of a round.
struct Round {
    starts: Vec<f64>,
    ends: Vec<f64>,
}

impl Bench {
    /// Creates so many Pods at once, waits until all run, deletes them at once, waits until all are gone.
    async fn round(&mut self, size: usize) -> anyhow::Result<Round> {
        let created = self.create(size).await?;
        let starts = self.await_all(&created, |event| match event {
            WatchEvent::Modified(pod) | WatchEvent::Added(pod) if all_run(pod) => pod.metadata.name.clone(),
            _ => None,
        });
        let starts = starts.await?;
        let ends = self.delete(&created).await?;
        Ok(Round { starts, ends })
    }

    async fn create(&mut self, size: usize) -> anyhow::Result<HashMap<String, Instant>> {
        let names: Vec<String> = (0..size).map(|i| format!("p{}", self.number + i)).collect();
        self.number += size;
        let begun = names.iter().map(|name| (name.clone(), Instant::now())).collect();
        let made = names.iter().map(|name| self.create_one(name));
        try_join_all(made).await?;
        Ok(begun)
    }

    async fn create_one(&self, name: &str) -> anyhow::Result<()> {
        let pod = json!({
            "metadata": { "name": name },
            "spec": {
                "nodeSelector": { "kubernetes.io/hostname": self.args.node },
                "tolerations": [{ "operator": "Exists" }],
                "containers": [{ "name": "c", "image": self.args.image, "imagePullPolicy": "IfNotPresent" }],
            },
        });
        self.pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
        Ok(())
    }

    async fn delete(&mut self, pods: &HashMap<String, Instant>) -> anyhow::Result<Vec<f64>> {
        let begun: HashMap<String, Instant> = pods.keys().map(|name| (name.clone(), Instant::now())).collect();
        let api = self.pods.clone();
        let params = DeleteParams::default();
        try_join_all(begun.keys().map(|name| api.delete(name, &params))).await?;
        self.await_all(&begun, |event| match event {
            WatchEvent::Deleted(pod) => pod.metadata.name.clone(),
            _ => None,
        })
        .await
    }

    /// Seconds from each Pod's begin until the watch delivered what `select` names it for.
    async fn await_all(
        &mut self,
        begun: &HashMap<String, Instant>,
        select: impl Fn(&WatchEvent<Pod>) -> Option<String>,
    ) -> anyhow::Result<Vec<f64>> {
        let mut seen: HashMap<String, f64> = HashMap::new();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while seen.len() < begun.len() {
            let next = tokio::time::timeout_at(deadline, self.watch.next()).await;
            let missing = || format!("{} of {} Pods are missing", begun.len() - seen.len(), begun.len());
            let event = next.with_context(missing)?.context("the watch ended")??;
            if let Some(name) = select(&event)
                && let Some(begin) = begun.get(&name)
            {
                seen.entry(name).or_insert_with(|| begin.elapsed().as_secs_f64());
            }
        }
        Ok(seen.into_values().collect())
    }

    /// Memory and CPU of the named processes while so many Pods run and nothing happens.
    async fn idle(&mut self) -> anyhow::Result<Value> {
        let created = self.create(self.args.idle).await?;
        self.await_all(&created, |event| match event {
            WatchEvent::Modified(pod) | WatchEvent::Added(pod) if all_run(pod) => pod.metadata.name.clone(),
            _ => None,
        })
        .await?;
        // Let what the start has left behind settle before the measurement begins.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before: Vec<f64> = self.args.process.iter().map(|p| cpu_seconds(pid(p)?)).collect::<Result<_, _>>()?;
        let span = Duration::from_secs(self.args.idle_seconds);
        tokio::time::sleep(span).await;
        let mut rows = Vec::new();
        for (process, before) in self.args.process.iter().zip(before) {
            let used = cpu_seconds(pid(process)?)? - before;
            rows.push(json!({
                "process": process.split('=').next(), "rss_mb": rss_mb(pid(process)?)?,
                "cpu_percent": 100.0 * used / span.as_secs_f64(),
            }));
        }
        self.delete(&created).await?;
        Ok(json!({ "pods": self.args.idle, "processes": rows }))
    }
}

fn all_run(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_ref());
    let wanted = pod.spec.as_ref().map_or(0, |s| s.containers.len());
    statuses.is_some_and(|list| {
        let running = list.iter().filter(|c| c.state.as_ref().is_some_and(|s| s.running.is_some()));
        running.count() == wanted
    })
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

fn longest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(0.0, f64::max)
}

fn pid(process: &str) -> anyhow::Result<u32> {
    let Some((_, pid)) = process.split_once('=') else { bail!("--process {process}: expected NAME=PID") };
    pid.parse().with_context(|| format!("--process {process}: expected NAME=PID"))
}

/// CPU time of a process so far (proc(5): fields 14 and 15 of stat, in hundredths of a second).
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn rss_mb(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the process has ended")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
