//! Measures how soon users see what happened on a node: that a container has exited, and that a ConfigMap has changed in a
//! volume.
//!
//! `cargo run --release --example bench-life -- --node NAME` prints one JSON object of milliseconds; `hack/bench/run` runs
//! it against lambdalet and its peer. The containers note the times, so node and benchmark must share a clock.

#[allow(dead_code, reason = "what another bench uses of it")]
#[path = "changes.rs"]
mod changes;
#[path = "namespace.rs"]
mod namespace;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Parser;
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, LogParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use serde_json::{Value, json};

use changes::{Change, Changes};
use namespace::{PATIENCE, Place};

/// Says when it ends, in the message that its status carries.
const ENDS: &str = "sleep 1; date +%s.%N >/dev/termination-log";
/// Says what it reads, and when that is new. Looks every 10 ms.
const READS: &str = r#"old=; while :; do new=$(cat /c/n); [ "$new" = "$old" ] || echo "$new $(date +%s.%N)"; old=$new; sleep 0.01; done"#;

#[derive(Parser)]
struct Args {
    /// Kubeconfig of somebody who may create Pods and ConfigMaps
    #[arg(long)]
    kubeconfig: PathBuf,
    /// The node to measure
    #[arg(long)]
    node: String,
    /// An image with sh, cat, sleep and a date that knows nanoseconds
    #[arg(long, default_value = "lambdalet.test/debian:12")]
    image: String,
    /// Containers that exit
    #[arg(long, default_value_t = 15)]
    exits: usize,
    /// Changes of a ConfigMap
    #[arg(long, default_value_t = 10)]
    updates: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    let place = Place::open(&args.kubeconfig).await?;
    let result = measure(&place, &args).await;
    place.close().await?;
    println!("{}", result?);
    Ok(())
}

async fn measure(place: &Place, args: &Args) -> anyhow::Result<Value> {
    let exits = exits(place, args).await.context("no figures of exits")?;
    let updates = updates(place, args).await.context("no figures of ConfigMaps")?;
    Ok(json!({ "node": args.node, "exit": exits, "config_map": updates }))
}

/// From a container's last act until a watch says that it has terminated.
async fn exits(place: &Place, args: &Args) -> anyhow::Result<Value> {
    let pods: Api<Pod> = Api::namespaced(place.client.clone(), &place.namespace);
    let mut changes = Changes::of(pods.clone());
    let mut all = Vec::new();
    for number in 0..args.exits {
        let name = format!("exits-{number}");
        pods.create(&PostParams::default(), &pod(args, &name, ENDS, json!([]))?).await?;
        let ended = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Change::Seen(pod) = changes.next().await
                    && pod.metadata.name.as_ref() == Some(&name)
                    && let Some(message) = last_words(&pod)
                {
                    return (now(), message);
                }
            }
        });
        let (seen, message) = ended.await.with_context(|| format!("the end of Pod {name} was not seen"))?;
        let end: f64 =
            message.trim().parse().with_context(|| format!("Pod {name} said {message:?}, not when it ended"))?;
        all.push((seen - end) * 1e3);
    }
    let mut figures = summary(all);
    figures["watch_troubles"] = changes.troubles().into();
    Ok(figures)
}

fn last_words(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    status.state.as_ref()?.terminated.as_ref()?.message.clone()
}

/// From a change of a ConfigMap until a container reads it in its volume.
async fn updates(place: &Place, args: &Args) -> anyhow::Result<Value> {
    let maps: Api<ConfigMap> = Api::namespaced(place.client.clone(), &place.namespace);
    let map = json!({ "metadata": { "name": "config" }, "data": { "n": "0" } });
    maps.create(&PostParams::default(), &serde_json::from_value(map)?).await?;
    let pods: Api<Pod> = Api::namespaced(place.client.clone(), &place.namespace);
    let volumes = json!([{ "name": "c", "configMap": { "name": "config" } }]);
    pods.create(&PostParams::default(), &pod(args, "reads", READS, volumes)?).await?;
    let running = tokio::time::timeout(PATIENCE, await_condition(pods.clone(), "reads", conditions::is_pod_running()));
    running.await.context("the Pod does not run")??;
    let follow = LogParams { follow: true, ..LogParams::default() };
    let mut lines = pods.log_stream("reads", &follow).await?.lines();
    let mut all = Vec::new();
    for number in 0..=args.updates {
        let begun = now();
        if number > 0 {
            let change = json!({ "data": { "n": number.to_string() } });
            maps.patch("config", &PatchParams::default(), &Patch::Merge(change)).await?;
        }
        let line = tokio::time::timeout(PATIENCE, lines.try_next()).await;
        let line = line.with_context(|| format!("change {number} was not seen"))??.context("the log has ended")?;
        let (seen, time) = line.split_once(' ').with_context(|| format!("the container said {line:?}"))?;
        anyhow::ensure!(seen == number.to_string(), "the container read {seen:?} where {number} was written");
        // The first is what the volume began with.
        if number > 0 {
            all.push((time.parse::<f64>()? - begun) * 1e3);
        }
    }
    Ok(summary(all))
}

fn pod(args: &Args, name: &str, script: &str, volumes: Value) -> anyhow::Result<Pod> {
    let mounts: Vec<Value> = volumes
        .as_array()
        .into_iter()
        .flatten()
        .map(|volume| json!({ "name": volume["name"], "mountPath": "/c" }))
        .collect();
    let pod = json!({
        "metadata": { "name": name },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": args.node },
            "tolerations": [{ "operator": "Exists" }],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "volumes": volumes,
            "containers": [{
                "name": "c", "image": args.image, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script], "volumeMounts": mounts,
            }],
        },
    });
    Ok(serde_json::from_value(pod)?)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn summary(mut milliseconds: Vec<f64>) -> Value {
    milliseconds.sort_by(f64::total_cmp);
    json!({ "p50": milliseconds.get(milliseconds.len() / 2), "max": milliseconds.last() })
}
