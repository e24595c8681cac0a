//! The API server goes away and comes back; each test has a cluster of its own, since nobody else may notice.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde_json::json;

use crate::harness::cluster::Cluster;
use crate::harness::node::{Node, Options, output};
use crate::harness::pods::{exit_code, identity, is_ready, sleeper};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, runtime};

/// Runs a test on a cluster and a node that are its own.
fn on_own_cluster(name: &str, test: impl AsyncFnOnce(&Case)) {
    if Cluster::from_environment().is_none() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("lambdalet-outage-").tempdir().unwrap();
    let cluster = Cluster::start(&dir.path().join("cluster"));
    let _down = Down(cluster.clone());
    runtime().block_on(async {
        let client: Client = cluster.client().await;
        let node = Arc::new(Node::start(&cluster, &client, name, Options::default()).await);
        Case::run(&cluster, &client, &node, test).await;
    });
}

struct Down(Cluster);

impl Drop for Down {
    fn drop(&mut self) {
        self.0.down();
    }
}

fn running_containers(t: &Case) -> String {
    let label = format!("label=lambdalet.dev/pod-namespace={}", t.namespace);
    let mut ids: Vec<String> = output("docker", &["ps", "-q", "--filter", &label]).lines().map(str::to_owned).collect();
    ids.sort();
    ids.join(" ")
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn pods_run_on_without_the_api_server_and_their_news_is_told_when_it_is_back() {
    on_own_cluster("runs-on", async |t| {
        let dir = tempfile::tempdir().unwrap();
        let flag = dir.path().join("end");
        let mounts = json!([{"name": "v", "mountPath": "/v"}]);
        let script = "while [ ! -e /v/end ]; do sleep 0.1; done; exit 9";
        let main = json!({"name": "main", "image": crate::harness::BUSYBOX, "command": ["sh", "-c", script], "volumeMounts": mounts});
        let spec = json!({"restartPolicy": "Never", "volumes": [{"name": "v", "hostPath": {"path": dir.path()}}], "containers": [main]});
        t.pod("ends", spec).await;
        t.pod("stays", sleeper()).await;
        t.running("ends").await;
        let before = t.running("stays").await;
        t.cluster.hack(&["stop-apiserver", "--now"]);
        std::fs::write(&flag, "").unwrap();
        poll("one container less", SOON, async || {
            let left = running_containers(t);
            // Two sandboxes and the container that stays.
            if left.split(' ').count() <= 3 { Ok(()) } else { Err(left) }
        })
        .await;
        assert!(t.node.runs(), "{}", t.node.log());
        t.cluster.hack(&["start-apiserver"]);
        let pod = t
            .until_within("ends", "known to have ended", Duration::from_secs(60), |p| exit_code(p, "main") == Some(9))
            .await;
        assert_eq!(crate::harness::pods::phase(&pod), "Failed");
        let after = t.until_within("stays", "ready", Duration::from_secs(60), is_ready).await;
        assert_eq!(identity(&after, "main"), identity(&before, "main"));
        t.node.ready(&t.client).await;
        t.pod("new", sleeper()).await;
        t.until_within("new", "running", Duration::from_secs(60), is_ready).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_that_starts_without_the_api_server_deletes_nothing() {
    on_own_cluster("starts-alone", async |t| {
        t.pod("stays", sleeper()).await;
        t.pod("goes", sleeper()).await;
        let before = t.running("stays").await;
        t.running("goes").await;
        let ids = running_containers(t);
        t.node.kill9();
        t.delete("goes", Some(0)).await;
        t.cluster.hack(&["stop-apiserver", "--now"]);
        t.node.spawn(&[]);
        // It takes this long to find out that nobody answers, several times over.
        poll("going on without the API server", SOON, async || {
            let log = t.node.log();
            if log.contains("going on without the API server") {
                Ok(())
            } else {
                Err(crate::harness::node::tail(&log, 20))
            }
        })
        .await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(t.node.runs(), "{}", t.node.log());
        assert_eq!(running_containers(t), ids, "nothing may be swept before a complete list");
        t.cluster.hack(&["start-apiserver"]);
        let after = t.until_within("stays", "ready", Duration::from_secs(60), is_ready).await;
        assert_eq!(identity(&after, "main"), identity(&before, "main"));
        poll("rid of the Pod that was deleted meanwhile", Duration::from_secs(60), async || {
            let label = format!("label=lambdalet.dev/pod-namespace={}", t.namespace);
            let names = output("docker", &["ps", "-a", "--filter", &label, "--format", "{{.Names}}"]);
            if names.contains("_goes_") { Err(names) } else { Ok(()) }
        })
        .await;
        assert!(t.api::<Pod>().get("stays").await.is_ok());
    });
}
