//! Measures how fast a node starts and ends Pods, as its users see it: from the moment a Pod is created until a watch
//! on the API server says that every container runs, and from its deletion until the object is gone.
//!
//! `cargo run --release --example bench-pods -- --node NAME --image IMAGE` prints one JSON object; `hack/bench/run`
//! runs it against lambdalet and its peer and makes a table.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

#[path = "changes.rs"]
mod changes;
#[allow(dead_code, reason = "what other benches use of it")]
#[path = "client.rs"]
mod client;
#[path = "memory.rs"]
mod memory;
#[path = "namespace.rs"]
mod namespace;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use futures::future::try_join_all;
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};

use changes::{Change, Changes};
use client::Client;
use memory::Group;
use namespace::{PATIENCE, Place};

/// Answers probes, and ends on SIGTERM.
const SERVER: &str = "trap 'exit 0' TERM; httpd -p 8080 -h /; while :; do sleep 3600 & wait $!; done";

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
    /// Pods started one after the other, each when the one before is gone
    #[arg(long, default_value_t = 15)]
    single: usize,
    /// Sizes of the bursts of Pods created at once
    #[arg(long, value_delimiter = ',', default_value = "10,30")]
    bursts: Vec<usize>,
    /// Pods created back to back, each when the creation of the one before is answered; 0 leaves it out
    #[arg(long, default_value_t = 0)]
    back_to_back: usize,
    /// Numbers of Pods kept for the idle measurements; 0 leaves them out
    #[arg(long, value_delimiter = ',', default_value = "50")]
    idle: Vec<usize>,
    /// Seconds of idleness measured
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// Give every Pod a readiness and a liveness probe over HTTP; the image must have a busybox shell
    #[arg(long)]
    probes: bool,
    /// A process measured while idle, as NAME=PID
    #[arg(long)]
    process: Vec<String>,
    /// Where the node's API listens, to measure a scrape of its statistics while idle
    #[arg(long, requires = "certificate")]
    api: Option<SocketAddr>,
    /// PEM certificate of somebody who may use it
    #[arg(long, requires = "key")]
    certificate: Option<PathBuf>,
    /// The certificate's key
    #[arg(long)]
    key: Option<PathBuf>,
    /// Text in the command line of the runtime's shims, which are measured while idle with what they started; those
    /// that were there before are left out
    #[arg(long)]
    shims: Option<String>,
}

/// How the Pods of a round are created.
#[derive(Clone, Copy)]
enum Pace {
    AtOnce,
    BackToBack,
}

/// Seconds of each Pod of a round, and of the round as a whole.
struct Round {
    starts: Vec<f64>,
    /// Of each start what comes after the scheduler: from the watch's word that the Pod has a node.
    of_node: Vec<f64>,
    start_wall: f64,
    ends: Vec<f64>,
}

struct Bench {
    pods: Api<Pod>,
    args: Args,
    changes: Changes,
    number: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    let place = Place::open(&args.kubeconfig).await?;
    let result = measure(Api::namespaced(place.client.clone(), &place.namespace), args).await;
    place.close().await?;
    println!("{}", result?);
    Ok(())
}

async fn measure(pods: Api<Pod>, args: Args) -> anyhow::Result<Value> {
    let changes = Changes::of(pods.clone());
    let mut bench = Bench { pods, args, changes, number: 0 };
    // The first Pods pay for connections and caches.
    bench.round(2, Pace::AtOnce).await?;
    let (mut starts, mut of_node, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.args.single {
        let round = bench.round(1, Pace::AtOnce).await?;
        starts.extend(round.starts);
        of_node.extend(round.of_node);
        ends.extend(round.ends);
    }
    let mut bursts = Vec::new();
    for size in bench.args.bursts.clone() {
        bursts.push(bench.round(size, Pace::AtOnce).await?.summary(size, "at once"));
    }
    if bench.args.back_to_back > 0 {
        let size = bench.args.back_to_back;
        bursts.push(bench.round(size, Pace::BackToBack).await?.summary(size, "back to back"));
    }
    let mut idle = Vec::new();
    for size in bench.args.idle.clone().into_iter().filter(|size| *size > 0) {
        idle.push(bench.idle(size).await?);
    }
    Ok(json!({
        "node": bench.args.node, "start_p50": median(starts.clone()), "start_max": longest(&starts),
        "of_node_p50": median(of_node),
        "delete_p50": median(ends), "bursts": bursts, "idle": idle, "watch_troubles": bench.changes.troubles(),
    }))
}

impl Round {
    fn summary(self, size: usize, pace: &str) -> Value {
        json!({
            "pods": size, "pace": pace, "start_p50": median(self.starts), "start_wall": self.start_wall,
            "delete_p50": median(self.ends.clone()), "delete_wall": longest(&self.ends),
        })
    }
}

impl Bench {
    /// Creates so many Pods, waits until all run, deletes them at once, waits until all are gone.
    async fn round(&mut self, size: usize, pace: Pace) -> anyhow::Result<Round> {
        let begun = Instant::now();
        let (names, starts, of_node) = self.start(size, pace).await?;
        let start_wall = begun.elapsed().as_secs_f64();
        let ends = self.delete(&names).await?;
        Ok(Round { starts, of_node, start_wall, ends })
    }

    /// Creates so many Pods and waits until all run: their names, and the seconds each took, in all and on its node.
    async fn start(&mut self, size: usize, pace: Pace) -> anyhow::Result<(Vec<String>, Vec<f64>, Vec<f64>)> {
        let names: Vec<String> = (0..size).map(|i| format!("p{}", self.number + i)).collect();
        self.number += size;
        let (begun, bound) = (Mutex::default(), Mutex::<HashMap<String, Instant>>::default());
        let (pods, args) = (&self.pods, &self.args);
        let create = async {
            match pace {
                Pace::AtOnce => {
                    try_join_all(names.iter().map(|name| create(pods, args, name, &begun))).await?;
                }
                Pace::BackToBack => {
                    for name in &names {
                        create(pods, args, name, &begun).await?;
                    }
                }
            }
            anyhow::Ok(())
        };
        let started = await_all(&mut self.changes, size, &begun, |change| {
            let Change::Seen(pod) = change else { return None };
            let name = pod.metadata.name.clone()?;
            if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
                locked(&bound).entry(name.clone()).or_insert_with(Instant::now);
            }
            all_run(&pod).then_some(name)
        });
        let ((), seconds) = tokio::try_join!(create, started)?;
        let (begun, bound) = (locked(&begun), locked(&bound));
        let before = |name: &String| bound[name].duration_since(begun[name]).as_secs_f64();
        let of_node = seconds.iter().map(|(name, seconds)| seconds - before(name)).collect();
        Ok((names, seconds.into_values().collect(), of_node))
    }

    async fn delete(&mut self, names: &[String]) -> anyhow::Result<Vec<f64>> {
        let begun = Mutex::new(names.iter().map(|name| (name.clone(), Instant::now())).collect());
        let (api, params) = (self.pods.clone(), DeleteParams::default());
        let delete = async { Ok(try_join_all(names.iter().map(|name| api.delete(name, &params))).await?) };
        let gone = await_all(&mut self.changes, names.len(), &begun, |change| match change {
            Change::Gone(name) => Some(name),
            Change::Seen(_) => None,
        });
        let (_, seconds): (Vec<_>, HashMap<_, _>) = tokio::try_join!(delete, gone)?;
        Ok(seconds.into_values().collect())
    }

    /// Memory and CPU of the named processes, and of the shims, while so many Pods run and nothing happens.
    async fn idle(&mut self, size: usize) -> anyhow::Result<Value> {
        let earlier = self.args.shims.as_deref().map(memory::processes_with).unwrap_or_default();
        let (names, ..) = self.start(size, Pace::AtOnce).await?;
        // Let what the start has left behind settle before the measurement begins.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let mut groups = self.args.process.iter().map(|text| Group::named(text)).collect::<Result<Vec<_>, _>>()?;
        if let Some(text) = &self.args.shims {
            let shims: Vec<u32> =
                memory::processes_with(text).into_iter().filter(|pid| !earlier.contains(pid)).collect();
            groups.push(Group::new("processes in Pods", memory::children_of(&shims)));
            groups.push(Group::new("shims", shims));
        }
        let before: Vec<f64> = groups.iter().map(Group::cpu_seconds).collect();
        let span = Duration::from_secs(self.args.idle_seconds);
        tokio::time::sleep(span).await;
        let rows: Vec<Value> =
            groups.iter().zip(before).map(|(group, before)| group.row(before, span)).collect::<Result<_, _>>()?;
        let scrape = self.scrape().await?;
        self.delete(&names).await?;
        Ok(json!({ "pods": size, "processes": rows, "scrape_ms_p50": scrape }))
    }

    /// Milliseconds of `/metrics/resource` over a kept connection, as metrics-server reads it.
    async fn scrape(&self) -> anyhow::Result<Option<f64>> {
        let Some(api) = self.args.api else { return Ok(None) };
        let identity = self.args.certificate.as_deref().zip(self.args.key.as_deref());
        let mut kept = Client::new(api, identity)?.plain().await?;
        let mut times = Vec::new();
        for _ in 0..30 {
            // Longer than a node may tell the same figures again.
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let begun = Instant::now();
            kept.send("GET", "/metrics/resource").await?.collect().await?;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        Ok(Some(median(times)))
    }
}

/// Creates a Pod and notes when that began.
async fn create(
    pods: &Api<Pod>,
    args: &Args,
    name: &str,
    begun: &Mutex<HashMap<String, Instant>>,
) -> anyhow::Result<()> {
    let mut container = json!({ "name": "c", "image": args.image, "imagePullPolicy": "IfNotPresent" });
    if args.probes {
        let probe = json!({ "httpGet": { "path": "/etc/hostname", "port": 8080 }, "periodSeconds": 1 });
        container["command"] = json!(["sh", "-c", SERVER]);
        container["readinessProbe"] = probe.clone();
        container["livenessProbe"] = probe;
    }
    let pod = json!({
        "metadata": { "name": name },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": args.node },
            "tolerations": [{ "operator": "Exists" }],
            "containers": [container],
        },
    });
    let pod = serde_json::from_value(pod)?;
    locked(begun).insert(name.to_owned(), Instant::now());
    pods.create(&PostParams::default(), &pod).await?;
    Ok(())
}

/// Seconds from each Pod's begin until the watch delivered what `select` names it for.
async fn await_all(
    changes: &mut Changes,
    size: usize,
    begun: &Mutex<HashMap<String, Instant>>,
    select: impl Fn(Change) -> Option<String>,
) -> anyhow::Result<HashMap<String, f64>> {
    let mut seen: HashMap<String, f64> = HashMap::new();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while seen.len() < size {
        let next = tokio::time::timeout_at(deadline, changes.next()).await;
        let change = next.with_context(|| format!("{} of {size} Pods are missing", size - seen.len()))?;
        if let Some(name) = select(change)
            && let Some(begin) = locked(begun).get(&name)
        {
            seen.entry(name).or_insert_with(|| begin.elapsed().as_secs_f64());
        }
    }
    Ok(seen)
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
