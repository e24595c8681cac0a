//! What is wrong is named, once and clearly; the node keeps working; nothing is left behind.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::json;
use tokio::net::TcpListener;

use crate::harness::node::{Node, Options, free_port, output, tail};
use crate::harness::pods::{
    STAY, busybox, busybox_with, has_ended, identity, is_ready, last_terminated, sleeper, terminated, waiting,
    waits_for,
};
use crate::harness::wait::{SOON, poll};
use crate::harness::{BUSYBOX, Case, on_cluster, on_own_node, on_shared_node};

/// Runs the program until it ends by itself, at most ten seconds.
async fn refused(mut command: std::process::Command) -> Output {
    let child = tokio::process::Command::from(std::mem::replace(&mut command, std::process::Command::new("true")))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let output = tokio::time::timeout(Duration::from_secs(10), child.wait_with_output()).await;
    let output = output.expect("it runs on instead of refusing").unwrap();
    assert!(!output.status.success(), "{output:?}");
    output
}

/// The one line of an output that names the thing.
fn the_line(output: &Output, wanted: &[&str]) -> String {
    let text = [output.stdout.clone(), output.stderr.clone()].concat();
    let text = String::from_utf8(text).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| wanted.iter().all(|word| line.contains(word))).collect();
    assert_eq!(lines.len(), 1, "one line that says {wanted:?}, in:\n{text}");
    assert!(!text.contains("panicked"), "{text}");
    lines[0].to_owned()
}

/// A node that was never started, for its command line.
fn unstarted(cluster: &crate::harness::cluster::Cluster, name: &str) -> Node {
    Node::prepare(cluster, name, &[])
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_unknown_runtime_is_refused_with_those_there_are() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "no-runtime");
        let mut command = node.command("run");
        command.args(["--runtime", "podman"]);
        let output = refused(command).await;
        the_line(&output, &["error", "podman", "--runtime"]);
        assert!(String::from_utf8_lossy(&output.stderr).contains("docker"), "{output:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_invalid_quantity_is_refused_with_the_flag_it_is_in() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "no-quantity");
        let mut command = node.command("run");
        command.args(["--system-reserved", "cpu=1x"]);
        the_line(&refused(command).await, &["1x", "--system-reserved"]);
    });
}

/// A kubeconfig for the node whose text was changed.
fn changed_kubeconfig(node: &Node, change: impl FnOnce(String) -> String) -> PathBuf {
    let text = std::fs::read_to_string(node.cluster.node_kubeconfig(&node.name)).unwrap();
    let path = node.root.join("changed.kubeconfig");
    std::fs::write(&path, change(text)).unwrap();
    path
}

/// The process with another kubeconfig than the node's.
fn with_kubeconfig(node: &Node, path: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lambdalet"));
    command.arg("run").args(["--node-name", &node.name, "--port", &node.port.to_string()]);
    command.arg("--root-dir").arg(&node.root).arg("--kubeconfig").arg(path);
    command
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_malformed_kubeconfig_is_refused_without_showing_its_secrets() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "malformed");
        let path = changed_kubeconfig(&node, |text| text.replace("contexts:", "contexts: [}"));
        let output = refused(with_kubeconfig(&node, &path)).await;
        the_line(&output, &["changed.kubeconfig"]);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("client-key-data"), "{output:?}");
        let missing = refused(with_kubeconfig(&node, Path::new("/nowhere/kubeconfig"))).await;
        the_line(&missing, &["/nowhere/kubeconfig"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_malformed_configuration_file_is_refused_with_its_place() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "misconfigured");
        let path = node.root.join("config.yaml");
        let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
        for (text, wanted) in [
            (format!("{head}maxPods: many\n"), "maxPods"),
            (format!("{head}maxPods: [1\n"), "config.yaml"),
            ("apiVersion: v1\nkind: Pod\n".to_owned(), "KubeletConfiguration"),
            (format!("{head}evictionHard: {{memory.available: 1x}}\n"), "1x"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let mut command = node.command("run");
            command.arg("--config").arg(&path);
            the_line(&refused(command).await, &["config.yaml", wanted]);
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_configuration_field_without_effect_is_named_and_the_node_runs() {
    on_own_node(
        "ignores",
        Options::config("maxPods: 9\ntopologyManagerPolicy: restricted\nnoSuchField: 1\n"),
        async |t| {
            let node = t.node.ready(&t.client).await;
            assert_eq!(node.status.unwrap().allocatable.unwrap()["pods"].0, "9");
            let log = t.node.log();
            for field in ["topologyManagerPolicy", "noSuchField"] {
                assert!(
                    log.lines().any(|l| l.contains("WARN") && l.contains(field)),
                    "{field} is not named:\n{}",
                    tail(&log, 20)
                );
            }
        },
    );
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_api_server_of_another_authority_is_refused() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "wrong-ca");
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        output(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=other",
                "-keyout",
                &path("key"),
                "-out",
                &path("crt"),
            ],
        );
        let other = output("base64", &["-w0", &path("crt")]);
        assert!(!other.is_empty());
        let kubeconfig = changed_kubeconfig(&node, |text| replace_value(&text, "certificate-authority-data", &other));
        let output = refused(with_kubeconfig(&node, &kubeconfig)).await;
        the_line(&output, &["certificate", "changed.kubeconfig", "certificate-authority-data"]);
    });
}

/// Replaces the value behind a key of a YAML file.
fn replace_value(text: &str, key: &str, value: &str) -> String {
    let change = |line: &str| match line.split_once(&format!("{key}:")) {
        Some((indent, _)) => format!("{indent}{key}: {value}\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(change).collect()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_expired_client_certificate_is_refused_with_its_date() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "expired");
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let ca = |name: &str| cluster.dir.join(name).display().to_string();
        let config = format!(
            "[ca]\ndefault_ca=d\n[d]\ndatabase={}\nnew_certs_dir={}\nserial={}\ndefault_md=sha256\npolicy=p\n[p]\norganizationName=optional\ncommonName=supplied\n",
            path("index"),
            dir.path().display(),
            path("serial"),
        );
        std::fs::write(path("config"), config).unwrap();
        std::fs::write(path("index"), "").unwrap();
        std::fs::write(path("serial"), "01\n").unwrap();
        let subject = format!("/O=system:nodes/CN=system:node:{}", node.name);
        output(
            "openssl",
            &[
                "req",
                "-new",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                &subject,
                "-keyout",
                &path("key"),
                "-out",
                &path("csr"),
            ],
        );
        output(
            "openssl",
            &[
                "ca",
                "-batch",
                "-config",
                &path("config"),
                "-cert",
                &ca("ca.crt"),
                "-keyfile",
                &ca("ca.key"),
                "-in",
                &path("csr"),
                "-out",
                &path("crt"),
                "-notext",
                "-startdate",
                "20200101000000Z",
                "-enddate",
                "20210101000000Z",
            ],
        );
        let (crt, key) = (output("base64", &["-w0", &path("crt")]), output("base64", &["-w0", &path("key")]));
        assert!(!crt.is_empty() && !key.is_empty(), "openssl made no certificate");
        let kubeconfig = changed_kubeconfig(&node, |text| {
            replace_value(&replace_value(&text, "client-certificate-data", &crt), "client-key-data", &key)
        });
        let output = refused(with_kubeconfig(&node, &kubeconfig)).await;
        the_line(&output, &["expired", "2021-01-01", "changed.kubeconfig"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_root_directory_of_another_node_is_refused() {
    on_own_node("owner", Options::default(), async |t| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lambdalet"));
        command.args(["run", "--node-name", "somebody-else", "--port", &free_port().to_string()]);
        command.arg("--root-dir").arg(&t.node.root).arg("--kubeconfig").arg(t.cluster.node_kubeconfig("somebody-else"));
        the_line(&refused(command).await, &["owner.json", "somebody-else", &t.node.name]);
        assert!(t.node.runs());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_port_that_is_taken_is_named() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "no-port");
        let _taken = std::net::TcpListener::bind(("0.0.0.0", node.port)).unwrap();
        the_line(&refused(node.command("run")).await, &[&node.port.to_string(), "in use"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn check_finds_what_is_missing_and_says_what_to_do() {
    on_cluster(async |cluster, _| {
        let node = unstarted(cluster, "checked");
        let mut command = node.command("check");
        let fine = command.output().unwrap();
        let text = String::from_utf8_lossy(&fine.stdout);
        assert!(
            fine.status.success() && text.contains("This host can be a node"),
            "{text}{}",
            String::from_utf8_lossy(&fine.stderr)
        );
        let mut command = node.command("check");
        command.args(["--docker-endpoint", "unix:///nowhere/docker.sock"]);
        let bad = command.output().unwrap();
        assert!(!bad.status.success());
        the_line(&bad, &["FAIL", "/nowhere/docker.sock"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_command_that_does_not_exist_is_named() {
    on_shared_node(async |t| {
        let main = json!({"name": "main", "image": BUSYBOX, "command": ["/no/such/program"]});
        let pod = t.run_pod("once", json!({"containers": [main.clone()]})).await;
        let end = terminated(&pod, "main").unwrap();
        assert_ne!(end.exit_code, 0);
        assert!(end.message.as_ref().unwrap().contains("/no/such/program"), "{end:?}");
        assert_eq!(end.reason.as_deref(), Some("StartError"));
        assert!(t.event("once", "Failed").await.contains("/no/such/program"));

        t.pod("again", json!({"containers": [main]})).await;
        let held = |p: &Pod| waits_for(p, "main") == Some("CrashLoopBackOff") && last_terminated(p, "main").is_some();
        let pod = t.until("again", "in CrashLoopBackOff", held).await;
        assert!(last_terminated(&pod, "main").unwrap().message.as_ref().unwrap().contains("/no/such/program"));
        t.delete("again", None).await;
        t.gone("again", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_working_directory_that_is_a_file_is_named() {
    on_shared_node(async |t| {
        let spec = json!({"containers": [busybox_with("pwd", json!({"workingDir": "/bin/sh"}))]});
        t.pod("file", spec).await;
        let held = |p: &Pod| waits_for(p, "main") == Some("CreateContainerError");
        let pod = t.until("file", "held back", held).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.contains("/bin/sh"), "{message}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_quarter_megabyte_of_annotations_is_carried() {
    on_shared_node(async |t| {
        let big = "x".repeat(250 * 1024);
        let items = json!([{"path": "big", "fieldRef": {"fieldPath": "metadata.annotations['big']"}}]);
        let main = busybox_with("wc -c </v/big", json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        let spec = json!({
            "restartPolicy": "Never",
            "volumes": [{"name": "v", "downwardAPI": {"items": items}}],
            "containers": [main],
        });
        t.labelled_pod("heavy", json!({"annotations": {"big": big}}), spec).await;
        t.until("heavy", "at its end", has_ended).await;
        assert_eq!(t.log("heavy", "main").await.trim(), (250 * 1024).to_string());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn names_at_their_longest_fit_everywhere() {
    on_shared_node(async |t| {
        let name = format!("{}.{}", "p".repeat(63), "q".repeat(63)).repeat(2)[..].chars().take(253).collect::<String>();
        let name = name.trim_end_matches(['.', '-']).to_owned();
        let main = json!({"name": "c".repeat(63), "image": BUSYBOX, "command": ["sh", "-c", "hostname"]});
        let pod = t.run_pod(&name, json!({"containers": [main]})).await;
        assert_eq!(crate::harness::pods::phase(&pod), "Succeeded");
        let log = t.log(&name, &"c".repeat(63)).await;
        assert_eq!(log.trim(), "p".repeat(63), "a host name is cut at 63 characters");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_cannot_be_made_is_tried_again_and_named() {
    on_shared_node(async |t| {
        let capabilities = json!({"securityContext": {"capabilities": {"add": ["NO_SUCH_CAPABILITY"]}}});
        t.pod("wrong", json!({"containers": [busybox_with(STAY, capabilities)]})).await;
        let held = |p: &Pod| {
            matches!(waits_for(p, "main"), Some("CreateContainerError" | "RunContainerError" | "CrashLoopBackOff"))
        };
        let pod = t.until("wrong", "held back", held).await;
        let text = serde_json::to_string(&pod.status).unwrap();
        assert!(text.contains("NO_SUCH_CAPABILITY"), "{text}");
        t.delete("wrong", None).await;
        t.gone("wrong", SOON).await;
    });
}

// === An API server that says strange things ===

/// A proxy before the API server, in plain HTTP, that can lie about Pods.
struct Liar {
    address: String,
    /// Whether a list of Pods breaks off in its middle.
    half_a_list: AtomicBool,
    /// Whether a watch on Pods begins with an object that no Pod is.
    strange_pod: AtomicBool,
    client: Client,
}

impl Liar {
    async fn start(cluster: &crate::harness::cluster::Cluster, node: &str) -> Arc<Self> {
        let kubeconfig = Kubeconfig::read_from(cluster.node_kubeconfig(node)).unwrap();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        config.read_timeout = None;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let liar = Arc::new(Self {
            address: listener.local_addr().unwrap().to_string(),
            half_a_list: AtomicBool::new(false),
            strange_pod: AtomicBool::new(false),
            client: Client::try_from(config).unwrap(),
        });
        let served = Arc::clone(&liar);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let served = Arc::clone(&served);
                let service = hyper::service::service_fn(move |request| {
                    let served = Arc::clone(&served);
                    async move { served.pass(request).await }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        liar
    }

    /// A kubeconfig that leads here.
    fn kubeconfig(&self, directory: &Path) -> PathBuf {
        let path = directory.join("liar.kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address)}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        });
        std::fs::write(&path, text.to_string()).unwrap();
        path
    }

    async fn pass(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Broken> + use<>>, Broken> {
        let (mut head, body) = request.into_parts();
        let target = head.uri.to_string();
        head.headers.remove("host");
        let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
        let answer = self
            .client
            .send(Request::from_parts(head, kube::client::Body::from(body.to_vec())))
            .await
            .map_err(|_| Broken)?;
        let (head, body) = answer.into_parts();
        let of_pods = target.contains("/api/v1/pods?");
        let watches = target.contains("watch=");
        let chunks = body.into_data_stream().map_err(|_| Broken);
        let chunks = if of_pods && !watches && self.half_a_list.load(Ordering::SeqCst) {
            // The first half, then the connection breaks.
            let whole: Vec<Bytes> = chunks.try_collect().await?;
            let whole = whole.concat();
            let half = Bytes::copy_from_slice(&whole[..whole.len() / 2]);
            let broken_off = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(Broken)
            });
            futures::stream::iter([Ok(half)]).chain(broken_off).boxed()
        } else if of_pods && watches && self.strange_pod.load(Ordering::SeqCst) {
            let object = json!({"type": "ADDED", "object": {
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "strange", "namespace": "default", "uid": "11111111-2222-3333-4444-555555555555", "resourceVersion": "1"},
                "spec": {"containers": "not a list", "nodeName": "x"},
            }});
            futures::stream::iter([Ok(Bytes::from(format!("{object}\n")))]).chain(chunks).boxed()
        } else {
            chunks.boxed()
        };
        let mut answer = Response::new(StreamBody::new(chunks.map_ok(Frame::data)));
        *answer.status_mut() = head.status;
        for name in ["content-type"] {
            if let Some(value) = head.headers.get(name) {
                answer.headers_mut().insert("content-type", value.clone());
            }
        }
        Ok(answer)
    }
}

/// The proxy broke the connection off.
#[derive(Debug, thiserror::Error)]
#[error("broken off on purpose")]
struct Broken;

/// A node behind a lying API server.
fn behind_a_liar(name: &'static str, test: impl AsyncFnOnce(&Case, &Liar)) {
    on_cluster(async |cluster, client| {
        let node = Node::prepare(cluster, name, &[]);
        let liar = Liar::start(cluster, &node.name).await;
        node.lead_to(liar.kubeconfig(&node.root));
        node.spawn(&[]);
        node.ready(client).await;
        Case::run(cluster, client, &Arc::new(node), async |t| test(t, &liar).await).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_object_that_does_not_parse_is_named_and_stops_nothing() {
    behind_a_liar("strange", async |t, liar| {
        t.pod("before", sleeper()).await;
        let before = t.running("before").await;
        liar.strange_pod.store(true, Ordering::SeqCst);
        t.node.kill9();
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        t.pod("after", sleeper()).await;
        t.running("after").await;
        let named = |line: &&str| line.contains("WARN") && line.contains("strange");
        let lines = poll("a line that names the object", SOON, async || {
            let log = t.node.log();
            let lines: Vec<String> = log.lines().filter(named).map(str::to_owned).collect();
            if lines.is_empty() { Err(tail(&log, 30)) } else { Ok(lines) }
        })
        .await;
        assert!(lines.len() <= 2, "once per watch is enough: {lines:#?}");
        let after = t.api::<Pod>().get("before").await.unwrap();
        assert_eq!(identity(&after, "main"), identity(&before, "main"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn half_a_list_of_pods_at_start_deletes_nothing() {
    behind_a_liar("half", async |t, liar| {
        for name in ["one", "two", "three"] {
            t.pod(name, sleeper()).await;
        }
        for name in ["one", "two", "three"] {
            t.running(name).await;
        }
        let label = format!("label=lambdalet.dev/pod-namespace={}", t.namespace);
        let running = || output("docker", &["ps", "-q", "--filter", &label]).lines().count();
        assert_eq!(running(), 6);
        liar.half_a_list.store(true, Ordering::SeqCst);
        t.node.kill9();
        let from = t.node.log().len();
        t.node.spawn(&[]);
        poll("told that the list broke", SOON, async || {
            let log = t.node.log()[from..].to_owned();
            if log.contains("failed to watch Pods") { Ok(()) } else { Err(tail(&log, 20)) }
        })
        .await;
        assert_eq!(running(), 6, "nothing may be swept before a complete list");
        liar.half_a_list.store(false, Ordering::SeqCst);
        t.pod("new", sleeper()).await;
        t.until_within("new", "running", Duration::from_secs(60), is_ready).await;
        assert_eq!(running(), 8);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_floods_its_log_and_ends_does_not_hold_up_the_node() {
    on_shared_node(async |t| {
        t.pod(
            "flood",
            json!({"restartPolicy": "Never", "containers": [busybox("yes $(seq 1 40) | head -c 50000000")]}),
        )
        .await;
        t.pod("calm", sleeper()).await;
        t.running("calm").await;
        t.until("flood", "at its end", has_ended).await;
    });
}
