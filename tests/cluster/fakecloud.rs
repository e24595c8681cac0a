//! fakecloud, the real program in its Kubernetes mode, as a client whose Lambda functions are Pods of this node.

mod switches;

use std::ffi::{OsStr, OsString};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt as _;
use http::Request;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt as _;
use kube::api::{ListParams, PostParams};
use serde_json::{Value, json};

use crate::harness::cluster::Cluster;
use crate::harness::http::{Answer, get, send};
use crate::harness::node::{Options, free_port, output, tail};
use crate::harness::pods::{busybox, exit_code, phase, pod_ip, with};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_own_node, on_shared_node};

/// Never verified, but it tells fakecloud which of its services is meant.
const SIGNATURE: &str =
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/lambda/aws4_request, SignedHeaders=host, Signature=0";
/// Returns what it was given, and a little about where it runs.
const ECHO: &str = r#"
import os
def handler(event, context):
    print("handled", event)
    return {"event": event, "name": context.function_name, "env": os.environ.get("COLOUR"),
            "key": os.environ.get("AWS_ACCESS_KEY_ID"), "host": os.uname().nodename}
"#;

/// A fakecloud of this test's own; its Pods are in the test's namespace.
struct Fakecloud<'a> {
    t: &'a Case,
    process: Child,
    program: OsString,
    address: String,
    log: std::path::PathBuf,
    environment: Vec<(String, String)>,
    dir: tempfile::TempDir,
}

/// Runs a test with a fakecloud whose Lambda Pods go to the shared node.
fn with_fakecloud(test: impl AsyncFnOnce(&Case, &mut Fakecloud<'_>)) {
    with_fakecloud_told(&[], test);
}

/// The same, with more in its environment.
fn with_fakecloud_told(more: &[(&str, &str)], test: impl AsyncFnOnce(&Case, &mut Fakecloud<'_>)) {
    let Some(program) = std::env::var_os("LAMBDALET_TEST_FAKECLOUD") else {
        eprintln!("skipped: LAMBDALET_TEST_FAKECLOUD names no fakecloud; run hack/test");
        return;
    };
    on_shared_node(async |t| with_one(t, &program, more, test).await);
}

/// Runs a test on this case's node, with a fakecloud of its own.
pub(crate) async fn on_microvms(t: &Case) {
    let Some(program) = std::env::var_os("LAMBDALET_TEST_FAKECLOUD") else {
        eprintln!("skipped: LAMBDALET_TEST_FAKECLOUD names no fakecloud; run hack/test");
        return;
    };
    with_one(t, &program, &[], async |t, cloud| {
        let kernel =
            "import os\ndef handler(event, context):\n    return {\"event\": event, \"kernel\": os.uname().release}\n";
        cloud.create("isolated", kernel, json!({})).await;
        let cold = cloud.invoke("isolated", json!({"n": 1})).await;
        let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(cold["event"], json!({"n": 1}));
        assert!(cold["kernel"].as_str().is_some_and(|kernel| kernel != own.trim()), "{cold}");
        let warm = cloud.invoke("isolated", json!({"n": 2})).await;
        assert_eq!((&warm["event"], &warm["kernel"]), (&json!({"n": 2}), &cold["kernel"]));
        assert_eq!(cloud.pods().await.len(), 1);
        assert_eq!(crate::harness::leaks::vmms(&t.node, &t.namespace).len(), 1, "it is a guest");
    })
    .await;
}

async fn with_one(t: &Case, program: &OsStr, more: &[(&str, &str)], test: impl AsyncFnOnce(&Case, &mut Fakecloud<'_>)) {
    grant(t).await;
    let selector = format!("lambdalet.dev/test={}", t.node.name);
    let own = [("FAKECLOUD_LAMBDA_K8S_NODE_SELECTOR", selector.as_str())];
    let mut fakecloud = Fakecloud::start(t, program, &[&own, more].concat()).await;
    test(t, &mut fakecloud).await;
}

/// What fakecloud needs in its namespace, and nothing else.
async fn grant(t: &Case) {
    let rules = json!([
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["get", "create"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "delete", "patch"]},
    ]);
    t.make::<k8s_openapi::api::rbac::v1::Role>("fakecloud", json!({"rules": rules})).await;
    let binding = json!({
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "fakecloud"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "test:fakecloud"}],
    });
    t.make::<k8s_openapi::api::rbac::v1::RoleBinding>("fakecloud", binding).await;
}

impl<'a> Fakecloud<'a> {
    async fn start(t: &'a Case, program: &OsStr, more: &[(&str, &str)]) -> Self {
        let address = format!("{}:{}", t.cluster.fact("HOST_ADDRESS"), free_port());
        Self::start_at(t, program, &address, more).await
    }

    async fn start_at(t: &'a Case, program: &OsStr, address: &str, more: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = t.cluster.user_kubeconfig("test:fakecloud").display().to_string();
        let url = format!("http://{address}");
        let own = [
            ("KUBECONFIG", kubeconfig.as_str()),
            // Its own Docker backend would remove containers it takes for leftovers.
            ("FAKECLOUD_CONTAINER_CLI", "/bin/false"),
            ("FAKECLOUD_LAMBDA_BACKEND", "k8s"),
            ("FAKECLOUD_K8S_NAMESPACE", &t.namespace),
            ("FAKECLOUD_K8S_SELF_URL", &url),
        ];
        let environment = own.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let log = dir.path().join("log");
        let process = Command::new("true").spawn().unwrap();
        let program = program.to_owned();
        let mut fakecloud = Self { t, process, program, address: address.to_owned(), log, environment, dir };
        fakecloud.run().await;
        fakecloud
    }

    /// Starts the process and waits until it answers.
    async fn run(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let port = self.address.rsplit(':').next().unwrap().to_owned();
        let _ = self.process.wait();
        self.process = Command::new(&self.program)
            .args(["--addr", &format!("0.0.0.0:{port}"), "--storage-mode", "memory"])
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        poll("a fakecloud that answers", SOON, async || {
            get(&self.address, "/_fakecloud/health").await.map(drop).map_err(|e| format!("{e}\n{}", self.said()))
        })
        .await;
    }

    fn said(&self) -> String {
        tail(&std::fs::read_to_string(&self.log).unwrap_or_default(), 30)
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    async fn ask(&self, request: http::request::Builder, body: Vec<u8>) -> Answer {
        let request = request.header("authorization", SIGNATURE);
        let asked = send(&self.address, request, body, Duration::from_secs(90)).await;
        asked.unwrap_or_else(|error| panic!("{error}\n{}", self.said()))
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Value {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let answer = self.ask(request, body.to_string().into_bytes()).await;
        assert!(answer.status.is_success(), "{method} {path}: {} {}\n{}", answer.status, answer.text(), self.said());
        serde_json::from_slice(&answer.body).unwrap_or(Value::Null)
    }

    /// Creates a Python function `app.handler` from its source.
    async fn create(&self, name: &str, source: &str, more: Value) {
        let function = json!({
            "FunctionName": name, "Runtime": "python3.12", "Handler": "app.handler", "Timeout": 30,
            "Code": {"ZipFile": STANDARD.encode(zip(self.dir.path(), &[("app.py", source)]))},
        });
        self.call("POST", "/2015-03-31/functions", with(function, more)).await;
    }

    async fn invoke_raw(&self, name: &str, payload: Value, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::post(format!("/2015-03-31/functions/{name}/invocations"));
        for (key, value) in headers {
            request = request.header(*key, *value);
        }
        self.ask(request, payload.to_string().into_bytes()).await
    }

    /// Invokes a function that must succeed.
    async fn invoke(&self, name: &str, payload: Value) -> Value {
        let answer = self.invoke_raw(name, payload, &[]).await;
        let fine = answer.status.is_success() && answer.header("x-amz-function-error").is_none();
        assert!(fine, "{name}: {} {}\n{}", answer.status, answer.text(), self.said());
        serde_json::from_slice(&answer.body).unwrap_or_else(|e| panic!("{e}: {}", answer.text()))
    }

    /// Its Pods that are not being deleted.
    async fn pods(&self) -> Vec<Pod> {
        let params = ListParams::default().labels("fakecloud-service=lambda");
        let list = self.t.api::<Pod>().list(&params).await.unwrap();
        list.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect()
    }

    /// Waits until it has no Pod at all.
    async fn no_pods(&self) {
        poll("without Pods", Duration::from_secs(45), async || {
            let list = self.t.api::<Pod>().list(&ListParams::default()).await.map_err(|e| e.to_string())?;
            let names: Vec<_> = list.iter().map(|p| (p.name_any(), p.metadata.deletion_timestamp.clone())).collect();
            if names.is_empty() { Ok(()) } else { Err(format!("{names:?}")) }
        })
        .await;
    }
}

impl Drop for Fakecloud<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An archive with these files.
fn zip(directory: &Path, files: &[(&str, &str)]) -> Vec<u8> {
    let path = directory.join(format!("{:x}.zip", rand::random_range(0..0xffff_ffffu32)));
    let script = "import json, sys, zipfile\nz = zipfile.ZipFile(sys.argv[1], 'w')\nfor n, t in json.loads(sys.argv[2]):\n    i = zipfile.ZipInfo(n)\n    i.external_attr = 0o755 << 16\n    z.writestr(i, t)\nz.close()";
    let files = serde_json::to_string(files).unwrap();
    let status = Command::new("python3").args(["-c", script]).arg(&path).arg(files).status().unwrap();
    assert!(status.success());
    std::fs::read(path).unwrap()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_answers_cold_and_then_warm_from_the_same_pod() {
    with_fakecloud(async |t, cloud| {
        cloud.create("echo", ECHO, json!({"Environment": {"Variables": {"COLOUR": "green"}}})).await;
        let began = Instant::now();
        let cold = cloud.invoke("echo", json!({"n": 1})).await;
        let cold_time = began.elapsed();
        assert_eq!((&cold["event"], &cold["name"], &cold["env"]), (&json!({"n": 1}), &json!("echo"), &json!("green")));
        let pods = cloud.pods().await;
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0].spec.as_ref().unwrap().node_name.as_ref(), Some(&t.node.name), "it landed here");
        assert_eq!(exit_code(&pods[0], "fakecloud-init"), Some(0));
        assert_eq!(cold["host"], json!(pods[0].name_any()));
        let began = Instant::now();
        let warm = cloud.invoke("echo", json!({"n": 2})).await;
        let warm_time = began.elapsed();
        assert_eq!((&warm["host"], &warm["event"]), (&cold["host"], &json!({"n": 2})));
        eprintln!("cold {cold_time:?}, warm {warm_time:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_with_a_role_gets_credentials_from_its_secret() {
    with_fakecloud(async |t, cloud| {
        cloud.create("role", ECHO, json!({"Role": "arn:aws:iam::123456789012:role/x"})).await;
        let answer = cloud.invoke("role", json!({})).await;
        let pods = cloud.pods().await;
        let secret = t.api::<Secret>().get(&pods[0].name_any()).await.unwrap();
        let key =
            secret.data.unwrap().get("AWS_ACCESS_KEY_ID").or(None).map(|k| String::from_utf8(k.0.clone()).unwrap());
        assert!(answer["key"].as_str().is_some_and(|k| !k.is_empty()), "{answer}");
        if let Some(key) = key {
            assert_eq!(answer["key"], json!(key));
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn calls_at_once_are_all_answered_each_with_its_own() {
    with_fakecloud(async |_, cloud| {
        let slow = "import time\ndef handler(event, context):\n    time.sleep(0.5)\n    return event\n";
        cloud.create("slow", slow, json!({})).await;
        let calls = (0..4).map(|n| cloud.invoke("slow", json!({"n": n})));
        let answers = futures::future::join_all(calls).await;
        for (n, answer) in answers.iter().enumerate() {
            assert_eq!(answer["n"], json!(n));
        }
        assert!((1..=4).contains(&cloud.pods().await.len()));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_log_tail_of_a_call_has_its_output_and_report() {
    with_fakecloud(async |_, cloud| {
        cloud.create("talks", ECHO, json!({})).await;
        for round in 0..3 {
            // The client asks for the log as soon as it has the answer; on a busy host Docker may not have it all yet.
            poll("a call's output and report in the tail of its log", SOON, async || {
                let answer = cloud.invoke_raw("talks", json!({"round": round}), &[("x-amz-log-type", "Tail")]).await;
                let header = answer.header("x-amz-log-result").ok_or_else(|| "no log".to_owned())?;
                let log = String::from_utf8_lossy(&STANDARD.decode(header).unwrap()).into_owned();
                let whole = log.contains(&format!("handled {{'round': {round}}}")) && log.contains("REPORT RequestId");
                if whole { Ok(()) } else { Err(log) }
            })
            .await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_layer_reaches_the_function() {
    with_fakecloud(async |_, cloud| {
        let layer = zip(cloud.dir.path(), &[("python/helper.py", "WORD = 'from the layer'\n")]);
        let made = cloud
            .call("POST", "/2018-10-31/layers/helper/versions", json!({"Content": {"ZipFile": STANDARD.encode(layer)}}))
            .await;
        // This client leaves each layer as /opt/layer-N.zip; Python can import from it there.
        let source = "import sys\nsys.path.insert(0, '/opt/layer-0.zip/python')\nimport helper\ndef handler(event, context):\n    return helper.WORD\n";
        cloud.create("layered", source, json!({"Layers": [made["LayerVersionArn"]]})).await;
        assert_eq!(cloud.invoke("layered", json!({})).await, json!("from the layer"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_image_function_runs_its_image() {
    with_fakecloud(async |_, cloud| {
        let function = json!({"FunctionName": "image", "PackageType": "Image", "Code": {"ImageUri": "lambdalet.test/image-function:1"}});
        cloud.call("POST", "/2015-03-31/functions", function).await;
        let answer = cloud.invoke("image", json!({"a": 1})).await;
        assert_eq!(answer, json!({"from": "image", "event": {"a": 1}, "function": "image"}));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_changed_configuration_takes_effect_in_a_new_pod_and_the_old_one_goes() {
    with_fakecloud(async |t, cloud| {
        cloud.create("echo", ECHO, json!({"Environment": {"Variables": {"COLOUR": "green"}}})).await;
        let old = cloud.invoke("echo", json!({})).await;
        let change = json!({"Environment": {"Variables": {"COLOUR": "blue"}}});
        cloud.call("PUT", "/2015-03-31/functions/echo/configuration", change).await;
        let new = cloud.invoke("echo", json!({})).await;
        assert_eq!((&old["env"], &new["env"]), (&json!("green"), &json!("blue")));
        assert_ne!(old["host"], new["host"]);
        t.gone(old["host"].as_str().unwrap(), Duration::from_secs(45)).await;
        let code = json!({"ZipFile": STANDARD.encode(zip(cloud.dir.path(), &[("app.py", "def handler(e, c): return 'new code'")]))});
        cloud.call("PUT", "/2015-03-31/functions/echo/code", code).await;
        assert_eq!(cloud.invoke("echo", json!({})).await, json!("new code"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deleted_function_and_a_reset_take_their_pods_along() {
    with_fakecloud(async |t, cloud| {
        cloud.create("one", ECHO, json!({})).await;
        cloud.invoke("one", json!({})).await;
        cloud.call("DELETE", "/2015-03-31/functions/one", json!({})).await;
        cloud.no_pods().await;
        cloud.create("two", ECHO, json!({})).await;
        cloud.invoke("two", json!({})).await;
        cloud.call("POST", "/_reset", json!({})).await;
        cloud.no_pods().await;
        t.nothing_remains().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_restarted_fakecloud_reaps_what_its_predecessor_left() {
    with_fakecloud(async |_, cloud| {
        cloud.create("echo", ECHO, json!({})).await;
        cloud.invoke("echo", json!({})).await;
        cloud.kill();
        assert_eq!(cloud.pods().await.len(), 1, "killed, it could not clean up");
        cloud.run().await;
        cloud.no_pods().await;
        cloud.create("echo", ECHO, json!({})).await;
        assert_eq!(cloud.invoke("echo", json!({"n": 1})).await["event"], json!({"n": 1}), "names may repeat");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_that_raises_reports_it_and_lives() {
    with_fakecloud(async |_, cloud| {
        let source =
            "def handler(event, context):\n    if event.get('raise'): raise ValueError('as told')\n    return 'fine'\n";
        cloud.create("raises", source, json!({})).await;
        let answer = cloud.invoke_raw("raises", json!({"raise": true}), &[]).await;
        assert!(answer.text().contains("ValueError") && answer.text().contains("as told"), "{}", answer.text());
        assert_eq!(cloud.invoke("raises", json!({})).await, json!("fine"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_whose_process_dies_is_answered_and_the_next_call_works() {
    with_fakecloud(async |_, cloud| {
        // RIE survives its runtime, so what dies is everything in the container.
        let source = "import os, signal\ndef handler(event, context):\n    if event.get('die'):\n        os.kill(os.getppid() if os.getppid() > 1 else 1, signal.SIGKILL)\n        os._exit(1)\n    return 'alive'\n";
        cloud.create("dies", source, json!({"Timeout": 5})).await;
        assert_eq!(cloud.invoke("dies", json!({})).await, json!("alive"));
        let began = Instant::now();
        let answer = cloud.invoke_raw("dies", json!({"die": true}), &[]).await;
        let failed = !answer.status.is_success()
            || answer.header("x-amz-function-error").is_some()
            || !answer.text().contains("alive");
        assert!(failed, "{answer:?}");
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        assert_eq!(cloud.invoke("dies", json!({})).await, json!("alive"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_that_vanished_is_noticed_by_the_next_call_which_is_answered_by_another() {
    with_fakecloud(async |t, cloud| {
        cloud.create("echo", ECHO, json!({})).await;
        cloud.invoke("echo", json!({})).await;
        let pod = cloud.pods().await.remove(0);
        t.delete(&pod.name_any(), Some(0)).await;
        t.gone(&pod.name_any(), SOON).await;
        poll("an address that refuses", SOON, async || match get(&format!("{}:8080", pod_ip(&pod)), "/").await {
            Err(error) if error.contains("refused") => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        let began = Instant::now();
        assert_eq!(cloud.invoke("echo", json!({"n": 2})).await["event"], json!({"n": 2}));
        assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
        eprintln!("the call after its Pod vanished took {:?}", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_that_takes_too_long_times_out_and_leaves_the_node_well() {
    with_fakecloud(async |_, cloud| {
        let source =
            "import time\ndef handler(event, context):\n    time.sleep(event.get('s', 0))\n    return 'done'\n";
        cloud.create("slow", source, json!({"Timeout": 1})).await;
        assert_eq!(cloud.invoke("slow", json!({})).await, json!("done"));
        let began = Instant::now();
        let answer = cloud.invoke_raw("slow", json!({"s": 60}), &[]).await;
        assert!(!answer.text().contains("done"), "{answer:?}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        assert_eq!(cloud.invoke("slow", json!({})).await, json!("done"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn tags_of_a_function_decide_where_its_pod_goes() {
    let Some(program) = std::env::var_os("LAMBDALET_TEST_FAKECLOUD") else {
        eprintln!("skipped: LAMBDALET_TEST_FAKECLOUD names no fakecloud; run hack/test");
        return;
    };
    on_shared_node(async |t| {
        grant(t).await;
        // The variable leads nowhere; the tag wins.
        let cloud =
            Fakecloud::start(t, &program, &[("FAKECLOUD_LAMBDA_K8S_NODE_SELECTOR", "lambdalet.dev/test=nowhere")])
                .await;
        let tags = json!({"Tags": {
            "fakecloud-k8s/node-selector": format!("lambdalet.dev/test={}", t.node.name),
            "fakecloud-k8s/annotations": "lambdalet.dev/note=tagged",
            "fakecloud-k8s/tolerations": "[{\"key\":\"lambdalet.dev/only\",\"operator\":\"Exists\"}]",
        }});
        cloud.create("tagged", ECHO, tags).await;
        cloud.invoke("tagged", json!({})).await;
        let pod = cloud.pods().await.remove(0);
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.node_name.as_ref(), Some(&t.node.name));
        assert_eq!(pod.annotations().get("lambdalet.dev/note").map(String::as_str), Some("tagged"));
        assert!(spec.tolerations.iter().flatten().any(|t| t.key.as_deref() == Some("lambdalet.dev/only")));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_image_in_fakeclouds_own_registry_is_pulled_with_a_secret_in_plain_http() {
    let Some(program) = std::env::var_os("LAMBDALET_TEST_FAKECLOUD") else {
        eprintln!("skipped: LAMBDALET_TEST_FAKECLOUD names no fakecloud; run hack/test");
        return;
    };
    let port = free_port();
    let flag = format!("--insecure-registries={}:{port}", host_address());
    on_own_node("registry", Options::flags(&[&flag]), async |t| {
        grant(t).await;
        let registry = format!("{}:{port}", t.cluster.fact("HOST_ADDRESS"));
        let selector = format!("lambdalet.dev/test={}", t.node.name);
        let more =
            [("FAKECLOUD_LAMBDA_K8S_NODE_SELECTOR", selector.as_str()), ("FAKECLOUD_K8S_PULL_SECRET", "registry")];
        let cloud = Fakecloud::start_at(t, &program, &registry, &more).await;
        let request = Request::post("/")
            .header("x-amz-target", "AmazonEC2ContainerRegistry_V20150921.CreateRepository")
            .header("content-type", "application/x-amz-json-1.1")
            .header("authorization", SIGNATURE.replace("/lambda/", "/ecr/"));
        let made = send(&registry, request, json!({"repositoryName": "fn"}).to_string(), SOON).await.unwrap();
        assert!(made.status.is_success(), "{}", made.text());

        // Docker pushes in plain HTTP to the loopback interface only; the repository is the same one.
        let config = tempfile::tempdir().unwrap();
        let auth = STANDARD.encode("AWS:anything");
        let logins = json!({"auths": {format!("127.0.0.1:{port}"): {"auth": auth}}});
        std::fs::write(config.path().join("config.json"), logins.to_string()).unwrap();
        let name = format!("127.0.0.1:{port}/fn:1");
        output("docker", &["tag", "lambdalet.test/image-function:1", &name]);
        output("docker", &["--config", config.path().to_str().unwrap(), "push", "-q", &name]);
        output("docker", &["rmi", &name]);

        let logins = json!({"auths": {registry.as_str(): {"auth": auth}}}).to_string();
        let secret = json!({"type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": logins}});
        t.make::<Secret>("registry", secret).await;
        let image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/fn:1";
        let function = json!({"FunctionName": "mine", "PackageType": "Image", "Code": {"ImageUri": image}});
        cloud.call("POST", "/2015-03-31/functions", function).await;
        let answer = cloud.invoke("mine", json!({"a": 1})).await;
        let pod = cloud.pods().await.remove(0);
        output("docker", &["rmi", "-f", &format!("{registry}/fn:1")]);
        assert_eq!(answer["from"], json!("image"));
        let main = crate::harness::pods::status(&pod, "fakecloud-lambda").unwrap();
        assert_eq!(main.image, format!("{registry}/fn:1"));
        assert!(t.event(&pod.name_any(), "Pulling").await.contains(&registry));
    });
}

/// This host's address, before a cluster's facts are at hand.
fn host_address() -> String {
    let cluster = Cluster::from_environment();
    cluster.map_or_else(|| "127.0.0.1".to_owned(), |cluster| cluster.fact("HOST_ADDRESS").to_owned())
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn fakecloud_itself_is_a_pod_of_this_node_installed_as_its_guide_says() {
    on_own_node("demo", Options::flags(&["--node-labels=lambdalet.dev/node=demo"]), async |t| {
        if !t.cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        let manifests = format!("{}/manifests/fakecloud", env!("CARGO_MANIFEST_DIR"));
        t.kubectl_text(&["-n", "fakecloud", "apply", "-k", &manifests]);
        let installed = AssertUnwindSafe(installed_fakecloud_works(t)).catch_unwind().await;
        if installed.is_err() {
            eprintln!(
                "{}",
                t.kubectl(&["-n", "fakecloud", "get", "pods,events"])
                    .map_or_else(|e| e, |b| String::from_utf8_lossy(&b).into_owned())
            );
        }
        t.kubectl_text(&["-n", "fakecloud", "delete", "-k", &manifests, "--timeout=60s"]);
        installed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let left = output(
            "docker",
            &["ps", "-a", "--filter", "label=lambdalet.dev/pod-namespace=fakecloud", "--format", "{{.Names}}"],
        );
        assert_eq!(left, "");
    });
}

async fn installed_fakecloud_works(t: &Case) {
    t.kubectl_text(&["-n", "fakecloud", "rollout", "status", "deployment/fakecloud", "--timeout=60s"]);
    let service = ["-n", "fakecloud", "get", "service", "fakecloud", "-o", "jsonpath={.spec.clusterIP}"];
    let address = format!("{}:4566", t.kubectl_text(&service));
    poll("fakecloud by its Service", SOON, async || get(&address, "/_fakecloud/health").await).await;
    let dir = tempfile::tempdir().unwrap();
    let ask = async |method: &str, path: &str, body: Value| {
        let request = Request::builder().method(method).uri(path).header("authorization", SIGNATURE);
        send(&address, request, body.to_string(), Duration::from_secs(90)).await.unwrap()
    };
    let code = STANDARD.encode(zip(dir.path(), &[("app.py", ECHO)]));
    let function = json!({"FunctionName": "echo", "Runtime": "python3.12", "Handler": "app.handler", "Timeout": 30, "Code": {"ZipFile": code}});
    let made = ask("POST", "/2015-03-31/functions", function).await;
    assert!(made.status.is_success(), "{}", made.text());
    let answer = ask("POST", "/2015-03-31/functions/echo/invocations", json!({"n": 1})).await;
    let answer: Value = serde_json::from_slice(&answer.body).unwrap_or_else(|e| panic!("{e}: {}", answer.text()));
    assert_eq!(answer["event"], json!({"n": 1}), "{answer}");
    let pods = t.kubectl_text(&["-n", "fakecloud", "get", "pods", "-o", "jsonpath={.items[*].spec.nodeName}"]);
    assert_eq!(pods, format!("{0} {0}", t.node.name), "fakecloud and its function are both here");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_init_container_that_cannot_fetch_the_code_fails_the_pod_and_says_why() {
    with_fakecloud(async |t, cloud| {
        cloud.create("echo", ECHO, json!({})).await;
        cloud.invoke("echo", json!({})).await;
        // The same Pod once more, but what it fetches is not there.
        let mut pod = cloud.pods().await.remove(0);
        pod.metadata = kube::core::ObjectMeta { name: Some("broken".to_owned()), ..Default::default() };
        pod.status = None;
        let spec = pod.spec.as_mut().unwrap();
        spec.node_name = None;
        let env = spec.init_containers.as_mut().unwrap()[0].env.as_mut().unwrap();
        env.iter_mut().find(|e| e.name == "FN").unwrap().value = Some("nobody".to_owned());
        t.api::<Pod>().create(&PostParams::default(), &pod).await.unwrap();
        let pod = t.until("broken", "failed", |p| phase(p) == "Failed").await;
        assert_ne!(exit_code(&pod, "fakecloud-init"), Some(0));
        let columns = t.kubectl_text(&["get", "pod", "broken", "--no-headers"]);
        assert_eq!(columns.split_whitespace().nth(2), Some("Init:Error"), "{columns}");
        let log = t.kubectl_text(&["logs", "broken", "-c", "fakecloud-init"]);
        assert!(log.contains("404"), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_address_refuses_or_accepts_from_the_moment_its_pod_runs() {
    with_fakecloud(async |t, _| {
        let late = "until [ -e /open ]; do sleep 0.05; done; mkdir /www; echo here >/www/index.html; exec httpd -f -p 8080 -h /www";
        t.pod("late", json!({"terminationGracePeriodSeconds": 1, "containers": [busybox(late)]})).await;
        let pod = t.running("late").await;
        let address = format!("{}:8080", pod_ip(&pod));
        let began = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let asked = Instant::now();
            match tokio::net::TcpStream::connect(&address).await {
                Ok(_) => break,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}"),
            }
            // A packet that is lost is sent again after a second.
            assert!(asked.elapsed() < Duration::from_millis(900), "packets were swallowed for {:?}", asked.elapsed());
            if tries == 6 {
                t.kubectl_text(&["exec", "late", "--", "touch", "/open"]);
            }
            assert!(began.elapsed() < SOON, "nobody listens after {tries} tries");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(tries > 5, "it listened at once, so nothing was tested");
    });
}
