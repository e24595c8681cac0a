//! What every test stands on: a cluster, nodes, a namespace per test, and waiting that ends.

pub(crate) mod cluster;
pub(crate) mod containerd;
pub(crate) mod docker;
pub(crate) mod http;
pub(crate) mod leaks;
pub(crate) mod node;
pub(crate) mod pods;
pub(crate) mod wait;

use std::any::Any;
use std::fmt::Debug;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Pod, Secret, ServiceAccount};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::cluster::Cluster;
use self::node::{Node, Options, tail};
use self::wait::{SOON, poll, show, watch_until};

/// The image most Pods of these tests run: small, present, pulled by nobody.
pub(crate) const BUSYBOX: &str = "busybox:1.36";
/// One with bash, Perl and Python.
pub(crate) const DEBIAN: &str = "lambdalet.test/debian:12";

/// The node that most tests share.
static SHARED: Shared = Shared::new("shared");

/// A node that tests share, as long as one of them uses it.
pub(crate) struct Shared {
    name: &'static str,
    node: Mutex<Weak<Node>>,
    /// How many there were before.
    before: AtomicU32,
    /// Held while it starts.
    starting: tokio::sync::Mutex<()>,
}

/// One test: its namespace and the node its Pods go to.
pub(crate) struct Case {
    pub(crate) cluster: Cluster,
    pub(crate) client: Client,
    pub(crate) node: Arc<Node>,
    pub(crate) namespace: String,
    uids: Mutex<Vec<String>>,
}

/// Runs a test whose Pods go to the node that others use too.
pub(crate) fn on_shared_node(test: impl AsyncFnOnce(&Case)) {
    on_node_of(&SHARED, &Options::default(), test);
}

/// Runs a test whose Pods go to a node that others of its kind use too; whoever is first starts it.
pub(crate) fn on_node_of(shared: &Shared, options: &Options, test: impl AsyncFnOnce(&Case)) {
    run(test, async |cluster, client| {
        let _starting = shared.starting.lock().await;
        let running = shared.node.lock().unwrap().upgrade();
        if let Some(node) = running {
            return node;
        }
        // Should a moment without any such test have ended the last one, that one may still be clearing up.
        let name = format!("{}{}", shared.name, shared.before.fetch_add(1, Ordering::Relaxed));
        let node = Arc::new(Node::start(cluster, client, &name, options.clone()).await);
        *shared.node.lock().unwrap() = Arc::downgrade(&node);
        node
    });
}

/// Runs a test on a node of its own, which it may kill.
pub(crate) fn on_own_node(name: &str, options: Options, test: impl AsyncFnOnce(&Case)) {
    run(test, async |cluster, client| Arc::new(Node::start(cluster, client, name, options).await));
}

/// Runs a test that needs the cluster and starts nodes itself, if any.
pub(crate) fn on_cluster(test: impl AsyncFnOnce(&Cluster, &Client)) {
    let Some(cluster) = Cluster::from_environment() else { return };
    runtime().block_on(async {
        let client = cluster.client().await;
        test(&cluster, &client).await;
    });
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn run(test: impl AsyncFnOnce(&Case), node: impl AsyncFnOnce(&Cluster, &Client) -> Arc<Node>) {
    let Some(cluster) = Cluster::from_environment() else { return };
    let ended = runtime().block_on(async {
        let client = cluster.client().await;
        let node = node(&cluster, &client).await;
        Case::run(&cluster, &client, &node, test).await;
        // Out of the async runtime: its end may stop a process.
        node
    });
    drop(ended);
}

impl Shared {
    pub(crate) const fn new(name: &'static str) -> Self {
        let starting = tokio::sync::Mutex::const_new(());
        Self { name, node: Mutex::new(Weak::new()), before: AtomicU32::new(0), starting }
    }
}

impl Case {
    /// Runs a test in a namespace of its own, then removes that, then looks for what was left behind.
    pub(crate) async fn run(cluster: &Cluster, client: &Client, node: &Arc<Node>, test: impl AsyncFnOnce(&Case)) {
        let case = Self::open(cluster, client, node).await;
        let outcome = AssertUnwindSafe(test(&case)).catch_unwind().await;
        if outcome.is_err() {
            case.report().await;
        }
        let cleared = AssertUnwindSafe(case.close(outcome.is_ok())).catch_unwind().await;
        for outcome in [outcome, cleared] {
            outcome.unwrap_or_else(|panic: Box<dyn Any + Send>| std::panic::resume_unwind(panic));
        }
    }

    async fn open(cluster: &Cluster, client: &Client, node: &Arc<Node>) -> Self {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let wanted = json!({"metadata": {"generateName": "test-"}});
        let namespace: Namespace = serde_json::from_value(wanted).unwrap();
        let namespace = namespaces.create(&PostParams::default(), &namespace).await.unwrap().name_any();
        let case = Self {
            cluster: cluster.clone(),
            client: client.clone(),
            node: Arc::clone(node),
            namespace,
            uids: Mutex::default(),
        };
        // Without these the API server refuses Pods, and their token volume cannot be made.
        watch_until(case.api::<ServiceAccount>(), "default", "there", SOON, |found| found.is_some()).await;
        watch_until(case.api::<ConfigMap>(), "kube-root-ca.crt", "there", SOON, |found| found.is_some()).await;
        case
    }

    /// What a person would look at after a failure.
    async fn report(&self) {
        for pod in self.api::<Pod>().list(&ListParams::default()).await.map_or_else(|_| Vec::new(), |list| list.items) {
            eprintln!("--- Pod {}", show(&pod));
        }
        for event in self.api::<Event>().list(&ListParams::default()).await.map_or_else(|_| Vec::new(), |l| l.items) {
            let object = event.involved_object.name.unwrap_or_default();
            let (reason, message) = (event.reason.unwrap_or_default(), event.message.unwrap_or_default());
            eprintln!("--- event on {object}: {reason}: {message}");
        }
        let lines: Vec<String> =
            self.node.log().lines().filter(|l| l.contains(&self.namespace)).map(str::to_owned).collect();
        eprintln!("--- log of {} on {}\n{}", self.node.name, self.namespace, tail(&lines.join("\n"), 100));
    }

    async fn close(&self, strict: bool) {
        let pods = self.api::<Pod>();
        let listed = pods.list(&ListParams::default()).await.unwrap();
        self.uids.lock().unwrap().extend(listed.iter().filter_map(|pod| pod.metadata.uid.clone()));
        let at_once = DeleteParams::default().grace_period(0);
        pods.delete_collection(&at_once, &ListParams::default()).await.unwrap();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        match namespaces.delete(&self.namespace, &DeleteParams::background()).await {
            // The test was about its deletion, which is done by now.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            deleted => drop(deleted.unwrap()),
        }
        if strict && self.node.runs() {
            self.nothing_remains().await;
        }
    }

    /// Waits until the host holds nothing of this test's Pods any more.
    pub(crate) async fn nothing_remains(&self) {
        let uids = self.uids.lock().unwrap().clone();
        poll("free of this test's Pods", SOON, async || {
            let found = leaks::remains(&self.node, &self.namespace, &uids);
            if found.is_empty() { Ok(()) } else { Err(found.join("\n")) }
        })
        .await;
    }

    /// The API of a kind, in this test's namespace.
    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates an object from its JSON.
    pub(crate) async fn make<K>(&self, name: &str, mut object: Value) -> K
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Serialize + DeserializeOwned + Clone + Debug,
    {
        object["metadata"]["name"] = json!(name);
        let object: K = serde_json::from_value(object).unwrap();
        self.api::<K>().create(&PostParams::default(), &object).await.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) async fn config_map(&self, name: &str, data: Value) -> ConfigMap {
        self.make(name, json!({"data": data})).await
    }

    pub(crate) async fn secret(&self, name: &str, data: Value) -> Secret {
        self.make(name, json!({"stringData": data})).await
    }

    /// Creates a Pod that the scheduler can only place on this test's node.
    pub(crate) async fn pod(&self, name: &str, spec: Value) -> Pod {
        self.labelled_pod(name, json!({}), spec).await
    }

    /// The same, with metadata.
    pub(crate) async fn labelled_pod(&self, name: &str, metadata: Value, mut spec: Value) -> Pod {
        if spec.get("nodeName").is_none() {
            spec["nodeSelector"]["lambdalet.dev/test"] = json!(self.node.name);
        }
        let pod: Pod = self.make(name, json!({"metadata": metadata, "spec": spec})).await;
        self.uids.lock().unwrap().push(pod.uid().unwrap());
        pod
    }

    /// Watches a Pod until it is as wanted.
    pub(crate) async fn until(&self, name: &str, what: &str, done: impl Fn(&Pod) -> bool) -> Pod {
        self.until_within(name, what, SOON, done).await
    }

    /// The same, for what takes longer.
    pub(crate) async fn until_within(
        &self,
        name: &str,
        what: &str,
        within: Duration,
        done: impl Fn(&Pod) -> bool,
    ) -> Pod {
        watch_until(self.api::<Pod>(), name, what, within, |pod| pod.is_some_and(&done)).await.unwrap()
    }

    pub(crate) async fn running(&self, name: &str) -> Pod {
        self.until(name, "Running and ready", pods::is_ready).await
    }

    /// Waits until the Pod object is gone.
    pub(crate) async fn gone(&self, name: &str, within: Duration) {
        watch_until(self.api::<Pod>(), name, "gone", within, |pod| pod.is_none()).await;
    }

    /// Creates a Pod and waits for its end.
    pub(crate) async fn run_pod(&self, name: &str, mut spec: Value) -> Pod {
        if spec.get("restartPolicy").is_none() {
            spec["restartPolicy"] = json!("Never");
        }
        self.pod(name, spec).await;
        self.until(name, "at its end", pods::has_ended).await
    }

    /// Runs a Pod to its successful end and returns what its first container wrote.
    pub(crate) async fn output_of(&self, name: &str, spec: Value) -> String {
        let pod = self.run_pod(name, spec).await;
        let container = pod.spec.as_ref().unwrap().containers[0].name.clone();
        let log = self.log(name, &container).await;
        assert_eq!(pods::phase(&pod), "Succeeded", "{}\nits log: {log}", show(&pod));
        log
    }

    /// Runs a shell script in busybox and returns what it wrote.
    pub(crate) async fn script(&self, script: &str) -> String {
        let name = format!("script-{:x}", rand::random_range(0..0xffff_ffffu32));
        self.output_of(&name, json!({"containers": [pods::busybox(script)]})).await
    }

    /// What a container wrote, through the API server.
    pub(crate) async fn log(&self, pod: &str, container: &str) -> String {
        let params = LogParams { container: Some(container.to_owned()), ..LogParams::default() };
        self.api::<Pod>().logs(pod, &params).await.unwrap_or_else(|e| panic!("logs of {pod}/{container}: {e}"))
    }

    /// Waits until a container has written something.
    pub(crate) async fn log_with(&self, pod: &str, container: &str, wanted: &str) -> String {
        poll(&format!("{wanted:?} in the log of {pod}"), SOON, async || {
            let params = LogParams { container: Some(container.to_owned()), ..LogParams::default() };
            let log = self.api::<Pod>().logs(pod, &params).await.map_err(|e| e.to_string())?;
            if log.contains(wanted) { Ok(log) } else { Err(log) }
        })
        .await
    }

    /// `kubectl` in this test's namespace; its standard output, if it succeeds.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Result<Vec<u8>, String> {
        let output = self.cluster.kubectl(&[&["-n", &self.namespace], args].concat()).output().unwrap();
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The same, as text; it must succeed.
    pub(crate) fn kubectl_text(&self, args: &[&str]) -> String {
        let bytes = self.kubectl(args).unwrap_or_else(|e| panic!("kubectl {args:?}: {e}"));
        String::from_utf8(bytes).unwrap()
    }

    /// Waits for an event on a Pod, and returns its message.
    pub(crate) async fn event(&self, pod: &str, reason: &str) -> String {
        let params = ListParams::default().fields(&format!("involvedObject.name={pod}"));
        poll(&format!("an event {reason} on {pod}"), SOON, async || {
            let list = self.api::<Event>().list(&params).await.map_err(|e| e.to_string())?;
            let seen: Vec<_> = list
                .iter()
                .map(|e| (e.reason.clone().unwrap_or_default(), e.message.clone().unwrap_or_default()))
                .collect();
            let wanted = seen.iter().find(|(found, _)| found == reason).map(|(_, message)| message.clone());
            wanted.ok_or_else(|| format!("{seen:?}"))
        })
        .await
    }

    /// Deletes a Pod with a grace period, or its own.
    pub(crate) async fn delete(&self, name: &str, grace: Option<u32>) {
        let params = DeleteParams { grace_period_seconds: grace, ..DeleteParams::default() };
        self.api::<Pod>().delete(name, &params).await.unwrap();
    }
}
