//! Function Pods: pools of environments behind the Pod's own address, called over HTTP.

mod faults;
mod host;
mod limits;
mod prepared;
mod restart;
mod rollout;
mod runtimes;
mod scaling;
mod two_nodes;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::http::{Answer, send};
use crate::harness::node::output;
use crate::harness::pods::{busybox_with, pod_condition, pod_ip};
use crate::harness::wait::{SOON, poll};
use crate::harness::{BUSYBOX, Case};

/// Python behind the Lambda runtime interface emulator.
const LAMBDA: &str = "lambdalet.test/image-function:1";
const INVOKE: &str = "/2015-03-31/functions/function/invocations";
/// How long a call may take, a cold start on a busy machine included.
const CALL: Duration = Duration::from_secs(40);

/// A plain HTTP server. `/id` tells environments apart, `/cgi-bin/hold?NAME` is answered when the test says so,
/// `/cgi-bin/nap` after a tenth of a second, and `/cgi-bin/exit` ends the environment with code 3.
const SERVER: &str = r#"
mkdir -p /www/cgi-bin
cat /proc/sys/kernel/random/uuid >/www/id
cat >/www/cgi-bin/hold <<'END'
#!/bin/sh
: >"/gate/begun.$QUERY_STRING"
until [ -e /gate/open ] || [ -e "/gate/open.$QUERY_STRING" ]; do sleep 0.02; done
echo
cat /www/id
END
printf '#!/bin/sh\nsleep 0.1\necho\ncat /www/id\n' >/www/cgi-bin/nap
printf '#!/bin/sh\nkill -USR1 1\nsleep 60\n' >/www/cgi-bin/exit
chmod +x /www/cgi-bin/*
trap 'exit 3' USR1
trap 'exit 0' TERM
httpd -f -p 8080 -h /www &
wait
"#;

/// Tells who it is and whether it is alone, and waits with that if the event says so.
const HANDLER: &str = r#"
import fcntl, os, time, uuid
ID = uuid.uuid4().hex
def handler(event, context):
    with open("/tmp/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            alone = False
        if "exit" in event:
            os._exit(event["exit"])
        if "hold" in event:
            open(f"/gate/begun.{event['hold']}", "w").close()
            while not any(os.path.exists(f"/gate/open{end}") for end in ("", "." + event["hold"])):
                time.sleep(0.02)
        return {"id": ID, "alone": alone, "size": len(event.get("filler", ""))}
"#;

/// A function Pod, and the gate at which its calls are held.
struct Function<'a> {
    t: &'a Case,
    name: String,
    uid: String,
    address: String,
    gate: tempfile::TempDir,
}

/// A call under way.
type Call = JoinHandle<Result<Answer, String>>;

impl<'a> Function<'a> {
    /// A plain server that runs; `keys` are its labels and annotations.
    async fn server(t: &'a Case, name: &str, keys: Value) -> Self {
        let made = Self::make(t, name, keys, busybox_with(SERVER, json!({}))).await;
        made.ready().await
    }

    /// A Lambda function that runs.
    async fn lambda(t: &'a Case, name: &str, keys: Value) -> Self {
        t.config_map(&format!("{name}-code"), json!({"held.py": HANDLER})).await;
        let container = json!({
            "name": "main", "image": LAMBDA, "args": ["held.handler"],
            "env": [{"name": "PYTHONPATH", "value": "/code"}],
            "volumeMounts": [{"name": "code", "mountPath": "/code"}],
        });
        Self::make(t, name, keys, container).await.ready().await
    }

    /// Creates the Pod.
    async fn make(t: &'a Case, name: &str, keys: Value, container: Value) -> Self {
        let spec = json!({"terminationGracePeriodSeconds": 5, "containers": [container]});
        Self::of_spec(t, name, keys, spec).await
    }

    async fn of_spec(t: &'a Case, name: &str, keys: Value, mut spec: Value) -> Self {
        let gate = tempfile::tempdir().unwrap();
        // Some runtimes are not root.
        std::fs::set_permissions(gate.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let code = spec["containers"][0]["volumeMounts"].is_array();
        spec["volumes"] = json!([{"name": "gate", "hostPath": {"path": gate.path()}}]);
        if code {
            let volume = json!({"name": "code", "configMap": {"name": format!("{name}-code")}});
            spec["volumes"].as_array_mut().unwrap().push(volume);
        } else {
            spec["containers"][0]["volumeMounts"] = json!([]);
        }
        if spec["containers"][0]["resources"].is_null() {
            // What a replica is counted as: tests run side by side on a machine with few processors.
            let cpu = if spec["containers"][0]["image"] == json!(LAMBDA) { "300m" } else { "100m" };
            spec["containers"][0]["resources"] = json!({"limits": {"cpu": cpu}});
        }
        let mount = json!({"name": "gate", "mountPath": "/gate"});
        spec["containers"][0]["volumeMounts"].as_array_mut().unwrap().push(mount);
        let pod = t.labelled_pod(name, metadata(keys), spec).await;
        Self { t, name: name.to_owned(), uid: pod.uid().unwrap(), address: String::new(), gate }
    }

    /// Waits until the Pod is ready, and remembers where.
    async fn ready(mut self) -> Self {
        let pod = self.t.running(&self.name).await;
        self.address = format!("{}:8080", pod_ip(&pod));
        self
    }

    /// Waits until its front listens, as after a restart of the node.
    async fn listens(&self) {
        poll("a front that listens", SOON, async || {
            tokio::net::TcpStream::connect(&self.address).await.map(drop).map_err(|e| e.to_string())
        })
        .await;
    }

    /// Sends a request without waiting for its answer.
    fn begin(&self, request: http::request::Builder, body: impl Into<Bytes>) -> Call {
        let (address, body) = (self.address.clone(), body.into());
        tokio::spawn(async move { send(&address, request, body, CALL).await })
    }

    fn get(&self, path: &str) -> Call {
        self.begin(Request::get(path), Bytes::new())
    }

    /// The id of the environment that answers.
    async fn id(&self) -> String {
        told(self.get("/id").await)
    }

    /// A call that stays in a plain server until it is let go.
    fn hold(&self, call: &str) -> Call {
        self.get(&format!("/cgi-bin/hold?{call}"))
    }

    fn invoke(&self, event: &Value) -> Call {
        self.begin(Request::post(INVOKE), event.to_string())
    }

    /// Waits until these held calls run.
    async fn begun<T: AsRef<str>>(&self, calls: &[T]) {
        poll("calls in the function", CALL, async || {
            let missing = |call: &&T| !self.gate.path().join(format!("begun.{}", call.as_ref())).exists();
            match calls.iter().find(missing) {
                None => Ok(()),
                Some(call) => Err(format!("{} has not begun", call.as_ref())),
            }
        })
        .await;
    }

    /// Lets one held call go.
    fn let_go(&self, call: &str) {
        std::fs::write(self.gate.path().join(format!("open.{call}")), "").unwrap();
    }

    /// Holds no call any more.
    fn open(&self) {
        std::fs::write(self.gate.path().join("open"), "").unwrap();
    }

    /// Its main containers on the host: key of the environment and container id.
    fn environments(&self) -> BTreeSet<(String, String)> {
        self.containers(&[])
    }

    /// The same of those that `docker ps` shows with these flags.
    fn containers(&self, flags: &[&str]) -> BTreeSet<(String, String)> {
        let label = format!("label=lambdalet.dev/pod-namespace={}", self.t.namespace);
        let format = "{{.Label \"lambdalet.dev/kind\"}} {{.Label \"lambdalet.dev/pod-uid\"}} {{.ID}}";
        let list = ["ps", "--no-trunc", "--filter", &label, "--format", format];
        let listed = output("docker", &[&list, flags].concat());
        let words = listed.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let ours = words.filter(|w| w[0] == "container" && w[1].starts_with(&format!("{}.", self.uid)));
        ours.map(|w| (w[1][self.uid.len() + 1..].to_owned(), w[2].to_owned())).collect()
    }

    /// Waits until it has so many environments.
    async fn has(&self, count: usize) -> BTreeSet<(String, String)> {
        poll(&format!("{count} environments of {}", self.name), SOON, async || {
            let found = self.environments();
            if found.len() == count { Ok(found) } else { Err(format!("{found:?}")) }
        })
        .await
    }

    /// Waits until so many environments are prepared, and gives them.
    async fn prepared(&self, count: usize) -> BTreeSet<(String, String)> {
        poll(&format!("{count} prepared environments of {}", self.name), SOON, async || {
            let found = self.containers(&["--all", "--filter", "status=created"]);
            if found.len() == count { Ok(found) } else { Err(format!("{found:?}")) }
        })
        .await
    }

    /// Sets a label or an annotation of the living Pod.
    fn set(&self, what: &str, pair: &str) {
        self.t.kubectl_text(&[what, "pod", &self.name, pair, "--overwrite"]);
    }
}

/// Labels and annotations by their keys: those of lambdalet are annotations.
fn metadata(keys: Value) -> Value {
    let mut metadata = json!({"labels": {}, "annotations": {}});
    let Value::Object(keys) = keys else { panic!("not an object: {keys}") };
    for (key, value) in keys {
        let place = if key.starts_with("lambdalet.dev/") { "annotations" } else { "labels" };
        metadata[place][key] = value;
    }
    metadata
}

/// The text of an answer that must be good.
fn told(call: Result<Result<Answer, String>, tokio::task::JoinError>) -> String {
    let answer = answered(call);
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.text()
}

fn answered(call: Result<Result<Answer, String>, tokio::task::JoinError>) -> Answer {
    call.unwrap().unwrap_or_else(|error| panic!("{error}"))
}

/// What a Lambda returned.
fn returned(call: Result<Result<Answer, String>, tokio::task::JoinError>) -> Value {
    serde_json::from_str(&told(call)).unwrap()
}

/// The text of the condition that counts replicas.
fn replicas(pod: &Pod) -> &str {
    pod_condition(pod, "lambdalet.dev/Replicas").and_then(|c| c.message.as_deref()).unwrap_or("")
}

/// Whether an image is here.
fn has_image(name: &str) -> bool {
    !output("docker", &["images", "-q", name]).is_empty()
}

/// A name for an image that does not exist, until it is given to one that does.
fn image_name() -> String {
    assert!(has_image(BUSYBOX));
    format!("lambdalet.test/late-{:x}:1", rand::random_range(0..0xffff_ffffu32))
}
