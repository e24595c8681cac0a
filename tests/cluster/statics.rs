//! Pods from files: beside a cluster's own, shown by mirrors; and without any cluster.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::harness::cluster::Cluster;
use crate::harness::node::{Options, free_port, output};
use crate::harness::pods::{STAY, container, is_ready, status};
use crate::harness::wait::{SOON, poll};
use crate::harness::{on_own_node, runtime};

/// Puts a static Pod in place as an editor does: written aside, then moved.
fn put(directory: &Path, name: &str, namespace: &str, container: Value) {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 5}});
    let aside = directory.join(format!(".{name}"));
    std::fs::write(&aside, pod.to_string()).unwrap();
    std::fs::rename(aside, directory.join(format!("{name}.json"))).unwrap();
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_file_makes_a_pod_that_the_cluster_sees_and_cannot_end() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options::flags(&["--pod-manifest-path", directory.path().to_str().unwrap()]);
    on_own_node("statics", options, async |t| {
        put(directory.path(), "web", &t.namespace, container("main", STAY));
        let name = format!("web-{}", t.node.name);
        let pod = t.until(&name, "Running and ready", is_ready).await;
        let hash = pod.annotations()["kubernetes.io/config.mirror"].clone();
        assert_eq!(pod.annotations()["kubernetes.io/config.hash"], hash);
        let id = status(&pod, "main").unwrap().container_id.clone();
        assert_eq!(t.log_with(&name, "main", "up").await, "up\n");
        assert_eq!(t.kubectl_text(&["exec", &name, "--", "echo", "inside"]), "inside\n");

        t.delete(&name, Some(0)).await;
        let again = |p: &Pod| is_ready(p) && p.uid() != pod.uid();
        let again = t.until(&name, "made anew", again).await;
        assert_eq!(status(&again, "main").unwrap().container_id, id, "nothing was restarted");

        put(directory.path(), "web", &t.namespace, container("other", STAY));
        let changed = |p: &Pod| is_ready(p) && p.annotations()["kubernetes.io/config.mirror"] != hash;
        let changed = t.until(&name, "that of the edited file", changed).await;
        assert!(status(&changed, "other").is_some());
        std::fs::remove_file(directory.path().join("web.json")).unwrap();
        t.gone(&name, SOON).await;
    });
}

/// A node without a cluster; what it made goes with it.
struct Alone {
    process: Child,
    root: tempfile::TempDir,
    port: u16,
}

impl Alone {
    fn start(pods: &Path) -> Self {
        let (root, port) = (tempfile::tempdir().unwrap(), free_port());
        let process = Command::new(env!("CARGO_BIN_EXE_lambdalet"))
            .args(["run", "--node-name", "alone", "--pod-cidr", "10.202.77.0/24", "--drain-on-exit"])
            .args(["--port", &port.to_string(), "--root-dir", root.path().to_str().unwrap()])
            .args(["--pod-manifest-path", pods.to_str().unwrap()])
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, root, port }
    }

    /// What the node's API answers, and its status code.
    fn ask(&self, path: &str, token: &str) -> (String, String) {
        let header = format!("Authorization: Bearer {token}");
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let answer = output("curl", &["-sk", "-m", "5", "-w", "\n%{http_code}", "-H", &header, &url]);
        let (body, code) = answer.rsplit_once('\n').unwrap_or_default();
        (code.to_owned(), body.to_owned())
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.root.path().join("api-token")).unwrap_or_default()
    }

    fn containers(&self) -> String {
        let record = std::fs::read_to_string(self.root.path().join("owner.json")).unwrap_or_default();
        let record: Value = serde_json::from_str(&record).unwrap_or_default();
        let identity =
            format!("{}/{}", record["cluster"].as_str().unwrap_or(""), record["node"].as_str().unwrap_or(""));
        let owner: String = Sha256::digest(identity).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        output("docker", &["ps", "-aq", "--filter", &format!("label=lambdalet.dev/owner={owner}")])
    }

    fn end(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id().try_into().unwrap()), Signal::SIGTERM);
        self.process.wait().unwrap();
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.end();
        }
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn without_a_cluster_files_are_all_there_is_and_a_token_is_the_way_in() {
    if Cluster::from_environment().is_none() {
        return;
    }
    let pods = tempfile::tempdir().unwrap();
    put(pods.path(), "web", "default", container("main", STAY));
    let mut node = Alone::start(pods.path());
    runtime().block_on(async {
        let running = poll("one Pod that runs", SOON, async || {
            let (code, body) = node.ask("/pods", &node.token());
            let list: Value = serde_json::from_str(&body).map_err(|_| format!("{code}: {body}"))?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let phase = |pod: &Value| pod["status"]["phase"] == "Running";
            if items.len() == 1 && phase(&items[0]) { Ok(items[0].clone()) } else { Err(body) }
        })
        .await;
        assert_eq!(running["metadata"]["name"], "web-alone");
        poll("its log", SOON, async || match node.ask("/containerLogs/default/web-alone/main", &node.token()) {
            (_, log) if log == "up\n" => Ok(()),
            (code, log) => Err(format!("{code}: {log}")),
        })
        .await;
        for wrong in ["", "guessed"] {
            assert_eq!(node.ask("/pods", wrong).0, "401", "{wrong:?}");
        }
    });
    assert!(!node.containers().is_empty());
    node.end();
    assert_eq!(node.containers(), "", "with --drain-on-exit nothing stays");
}
