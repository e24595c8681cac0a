//! Measures how fast functions start, as their callers see it, beside the least that Docker needs for the same.
//!
//! `cargo run --release --example bench-functions -- --kubeconfig FILE --node NAME` prints a table; `hack/bench/functions`
//! runs it against a node of its own. This process is the load; the node is another. The node must not
//! throttle (`--cpu-cfs-quota=false`): replicas are counted as a tenth of a CPU so that twenty fit.
//!
//! The floor of a cold start is what is left when everything is there: `docker start` of a created container that joins
//! a running one's network, and then the time until the program in it answers. The second part is the function's own.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

#[path = "floor.rs"]
mod floor;
#[path = "namespace.rs"]
mod namespace;
#[path = "resident.rs"]
mod resident;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bollard::Docker;
use clap::Parser;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;

use floor::Place;
use namespace::PATIENCE;
use resident::resident_kib;

const LOOK: Duration = Duration::from_millis(20);

/// A plain HTTP server: `/` answers at once, `/cgi-bin/hold` says a word and keeps its environment for a while.
const SERVER: &str = r#"mkdir -p /www/cgi-bin
echo hello >/www/index.html
printf '#!/bin/sh\necho\necho begun\nexec sleep 20\n' >/www/cgi-bin/hold
chmod +x /www/cgi-bin/hold
exec httpd -f -p 8080 -h /www"#;

#[derive(Parser)]
struct Args {
    /// Kubeconfig of somebody who may create Pods
    #[arg(long)]
    kubeconfig: PathBuf,
    /// The node to measure
    #[arg(long)]
    node: String,
    /// Another node on which Pods of the same image are started
    #[arg(long)]
    peer: Option<String>,
    /// An image with busybox, which is present
    #[arg(long, default_value = "busybox:1.36")]
    image: String,
    /// An image with a Lambda runtime behind its interface emulator, which is present; empty leaves it out
    #[arg(long, default_value = "lambdalet.test/image-function:1")]
    lambda: String,
    /// Cold starts of each kind; the median counts
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Replicas of a burst
    #[arg(long, default_value_t = 20)]
    burst: usize,
    /// Functions whose memory is measured
    #[arg(long, default_value_t = 100)]
    functions: usize,
    /// The node's process
    #[arg(long)]
    pid: Option<u32>,
}

/// What is called, and how.
#[derive(Clone)]
struct Kind {
    name: &'static str,
    image: String,
    command: Vec<String>,
    request: &'static str,
}

const GET: &str = "GET / HTTP/1.1\r\nHost: function\r\nConnection: close\r\n\r\n";
const HOLD: &str = "GET /cgi-bin/hold HTTP/1.1\r\nHost: function\r\nConnection: close\r\n\r\n";
const INVOKE: &str = "POST /2015-03-31/functions/function/invocations HTTP/1.1\r\nHost: function\r\n\
                      Content-Length: 2\r\nConnection: close\r\n\r\n{}";

struct Bench {
    pods: Api<Pod>,
    docker: Docker,
    args: Args,
    number: usize,
}

/// A function Pod that runs.
struct Function {
    name: String,
    uid: String,
    address: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    let docker = Docker::connect_with_local_defaults()?.negotiate_version().await?;
    let place = namespace::Place::open(&args.kubeconfig).await?;
    let pods = Api::namespaced(place.client.clone(), &place.namespace);
    let result = Bench { pods, docker, args, number: 0 }.measure().await;
    place.close().await?;
    result
}

fn row(label: &str, seconds: f64, note: impl std::fmt::Display) {
    println!("| {label} | {:.0} ms | {note} |", seconds * 1000.0);
}

impl Bench {
    async fn measure(&mut self) -> anyhow::Result<()> {
        println!("| | median | |\n|---|---|---|");
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let http =
            Kind { name: "HTTP", image: self.args.image.clone(), command: words(&["sh", "-c", SERVER]), request: GET };
        self.starts(&http).await?;
        if !self.args.lambda.is_empty() {
            let image = self.args.lambda.clone();
            self.starts(&Kind { name: "Lambda (RIE)", image, command: Vec::new(), request: INVOKE }).await?;
        }
        for reserve in [0, self.args.burst] {
            self.burst(&http, reserve).await?;
        }
        self.thaw(&http).await?;
        if let Some(pid) = self.args.pid {
            self.memory(&http, pid).await?;
        }
        Ok(())
    }

    /// Cold starts from zero beside the floor, and Pods of the same image.
    async fn starts(&mut self, kind: &Kind) -> anyhow::Result<()> {
        let (mut starts, mut inits, mut ready, mut bare) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let warm = self.function(kind, json!({"lambdalet.dev/idle-timeout": "1s"}), 1).await?;
        let cold = json!({"lambdalet.dev/idle-timeout": "1s", "lambdalet.dev/reserve": "0"});
        let cold = self.function(kind, cold, 1).await?;
        let place = self.place().await?;
        for round in 0..=self.args.rounds {
            // In turn, so that what else the machine does meets all of them.
            let (start, init) = place.0.measure(&self.docker, kind).await?;
            self.until(&warm, 0, 1).await?;
            let with = call(&warm.address, kind.request, true).await?;
            self.until(&cold, 0, 0).await?;
            let without = call(&cold.address, kind.request, true).await?;
            // The first pays for caches.
            if round > 0 {
                starts.push(start);
                inits.push(init);
                ready.push(with);
                bare.push(without);
            }
        }
        self.delete(&[warm.name, cold.name, place.1]).await?;
        let name = kind.name;
        let (start, init, ready, bare) = (median(starts), median(inits), median(ready), median(bare));
        let floor = start + init;
        row(
            &format!("{name}: floor"),
            floor,
            format!("`docker start` {:.0} ms, then the function's own {:.0} ms", start * 1000.0, init * 1000.0),
        );
        row(
            &format!("{name}: from zero, prepared"),
            ready,
            format!("{:.2} x the floor; ours {:.0} ms", ready / floor, (ready - init) * 1000.0),
        );
        row(
            &format!("{name}: from zero, not prepared"),
            bare,
            format!("{:.2} x the floor; ours {:.0} ms", bare / floor, (bare - init) * 1000.0),
        );
        let nodes = [Some(self.args.node.clone()), self.args.peer.clone()];
        for node in nodes.into_iter().flatten() {
            let mut times = Vec::new();
            for _ in 0..self.args.rounds.div_ceil(2) {
                times.push(self.pod_start(kind, &node).await?);
            }
            let time = median(times);
            row(
                &format!("{name}: Pod created, ready, first answer on {node}"),
                time,
                format!("prepared: {:.2} x of it", ready / time),
            );
        }
        Ok(())
    }

    /// A sandbox for the floor, and the name of its Pod.
    async fn place(&mut self) -> anyhow::Result<(Place, String)> {
        let command = ["sleep", "3600"].map(str::to_owned).to_vec();
        let idle = Kind { name: "idle", image: self.args.image.clone(), command, request: "" };
        let node = self.args.node.clone();
        let name = self.create(&idle, (json!({"bench": "floor"}), json!({})), &node).await?;
        let pod = self.ready(&name).await?;
        let uid = pod.metadata.uid.clone().context("a Pod has a UID")?;
        Ok((Place::of_pod(&self.docker, &uid, address(&pod)?).await?, name))
    }

    /// What a system does that scales Pods: one is created, becomes ready, and is called.
    async fn pod_start(&mut self, kind: &Kind, node: &str) -> anyhow::Result<f64> {
        let began = Instant::now();
        let name = self.create(kind, (json!({}), json!({})), node).await?;
        let pod = self.ready(&name).await?;
        // Ready is what its probe said, where the node has probes; it may not listen yet.
        while let Err(error) = call(&address(&pod)?, kind.request, true).await {
            ensure!(began.elapsed() < PATIENCE, "{name}: {error:#}");
            sleep(Duration::from_millis(1)).await;
        }
        let took = began.elapsed().as_secs_f64();
        self.delete(&[name]).await?;
        Ok(took)
    }

    /// As many calls at once as there may be replicas, each of which keeps its environment.
    async fn burst(&mut self, kind: &Kind, reserve: usize) -> anyhow::Result<()> {
        let size = self.args.burst;
        let function = self.function(kind, json!({"lambdalet.dev/reserve": reserve.to_string()}), size).await?;
        self.until(&function, 0, reserve).await?;
        let began = Instant::now();
        let times = try_join_all((0..size).map(|_| call(&function.address, HOLD, false))).await?;
        let wall = began.elapsed().as_secs_f64();
        let text = format!("the first after {:.0} ms", times.iter().copied().fold(f64::MAX, f64::min) * 1000.0);
        row(&format!("0 -> {size} replicas, {reserve} prepared: all answer"), wall, text);
        self.delete(&[function.name]).await
    }

    async fn thaw(&mut self, kind: &Kind) -> anyhow::Result<()> {
        let annotations = json!({"lambdalet.dev/freeze-after": "50ms", "lambdalet.dev/reserve": "0"});
        let function = self.function(kind, annotations, 1).await?;
        let (mut frozen, mut warm) = (Vec::new(), Vec::new());
        call(&function.address, kind.request, true).await?;
        for _ in 0..self.args.rounds.max(20) {
            self.in_state(&function, "paused", 1).await?;
            frozen.push(call(&function.address, kind.request, true).await?);
            warm.push(call(&function.address, kind.request, true).await?);
        }
        self.delete(&[function.name]).await?;
        let (frozen, warm) = (median(frozen), median(warm));
        row("call to a frozen environment", frozen, format!("warm: {:.1} ms", warm * 1000.0));
        Ok(())
    }

    async fn memory(&mut self, kind: &Kind, pid: u32) -> anyhow::Result<()> {
        let before = resident_kib(pid)? as f64 / 1024.0;
        let mut names = Vec::new();
        for _ in 0..self.args.functions {
            names.push(self.function(kind, json!({}), 1).await?.name);
        }
        sleep(Duration::from_secs(10)).await;
        let after = resident_kib(pid)? as f64 / 1024.0;
        println!(
            "| {} functions at zero: RSS of the node | {after:.1} MB | {:.1} MB more than without |",
            names.len(),
            after - before
        );
        self.delete(&names).await
    }

    // === Pods ===

    async fn function(&mut self, kind: &Kind, annotations: Value, max: usize) -> anyhow::Result<Function> {
        let labels = json!({"com.openfaas.scale.max": max.to_string(), "execenvironment.count": "1"});
        let node = self.args.node.clone();
        let name = self.create(kind, (labels, annotations), &node).await?;
        let pod = self.ready(&name).await?;
        let uid = pod.metadata.uid.clone().context("a Pod has a UID")?;
        Ok(Function { name, uid, address: address(&pod)? })
    }

    async fn create(
        &mut self,
        kind: &Kind,
        (labels, annotations): (Value, Value),
        node: &str,
    ) -> anyhow::Result<String> {
        let name = format!("f{}", self.number);
        self.number += 1;
        let mut container = json!({
            "name": "main", "image": kind.image, "imagePullPolicy": "IfNotPresent", "ports": [{"containerPort": 8080}],
            "resources": {"limits": {"cpu": "100m", "memory": "128Mi"}, "requests": {"cpu": "0", "memory": "0"}},
        });
        if !kind.command.is_empty() {
            container["command"] = json!(kind.command);
        }
        if labels.as_object().is_none_or(|labels| labels.is_empty()) {
            container["readinessProbe"] = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
        }
        let pod = json!({
            "metadata": {"name": name, "labels": labels, "annotations": annotations},
            "spec": {
                "nodeSelector": {"kubernetes.io/hostname": node}, "tolerations": [{"operator": "Exists"}],
                "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false, "containers": [container],
            },
        });
        self.pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
        Ok(name)
    }

    async fn ready(&self, name: &str) -> anyhow::Result<Pod> {
        let ready = |pod: Option<&Pod>| {
            let conditions = pod.and_then(|pod| pod.status.as_ref()?.conditions.as_ref());
            conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
        };
        let pod = tokio::time::timeout(PATIENCE, await_condition(self.pods.clone(), name, ready)).await;
        pod.with_context(|| format!("{name} does not become ready"))??.context("it is gone")
    }

    async fn delete(&self, names: &[String]) -> anyhow::Result<()> {
        try_join_all(names.iter().map(|name| async move {
            self.pods.delete(name, &DeleteParams::default()).await?;
            let gone = await_condition(self.pods.clone(), name, |pod: Option<&Pod>| pod.is_none());
            tokio::time::timeout(PATIENCE, gone).await.with_context(|| format!("{name} does not go"))??;
            Ok(())
        }))
        .await
        .map(drop)
    }

    /// Waits until so many environments run and so many are prepared.
    async fn until(&self, function: &Function, running: usize, prepared: usize) -> anyhow::Result<()> {
        self.in_state(function, "running", running).await?;
        self.in_state(function, "created", prepared).await
    }

    /// Waits until so many containers of the function's environments are in that state.
    async fn in_state(&self, function: &Function, state: &str, count: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = floor::environments(&self.docker, &function.uid, state).await?;
            if found == count {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{found} instead of {count} environments of {} are {state}",
                function.name
            );
            sleep(LOOK).await;
        }
    }
}

fn address(pod: &Pod) -> anyhow::Result<String> {
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()).context("a ready Pod has an address")?;
    Ok(format!("{ip}:8080"))
}

/// Seconds until the answer is there, or its beginning.
async fn call(address: &str, request: &str, whole: bool) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("failed to connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(4096);
    loop {
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut answer)).await?;
        let ended = read.with_context(|| format!("{address} does not answer"))? == 0;
        if ended || (!whole && answer.ends_with(b"begun\n")) || (!whole && answer.windows(5).any(|w| w == b"begun")) {
            break;
        }
    }
    let took = began.elapsed().as_secs_f64();
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "a call failed: {}", String::from_utf8_lossy(&answer));
    Ok(took)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}
