//! The Node object's life against an API server in memory, and once against a real one.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

#[path = "node/api.rs"]
mod api;
#[path = "node/runtime.rs"]
mod runtime;

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::{Api, NODE};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use lambdalet::apiserver::ApiServer;
use lambdalet::config::{DEFAULT_POD_CIDR, NodeSettings};
use lambdalet::events;
use lambdalet::node::{self, Health, NodeHandle, Params, Registration};
use lambdalet::shutdown::{Supervisor, Tasks};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// How long anything may take that should happen "at once"; generous, since test machines are slow.
const SOON: Duration = Duration::from_secs(10);

/// Long enough for several status rounds.
const A_WHILE: Duration = Duration::from_millis(400);

struct World {
    api: Api,
    health: watch::Sender<Health>,
    shutting_down: watch::Sender<bool>,
    tasks: Tasks,
    supervisor: Supervisor,
    handle: NodeHandle,
    _writing: AbortOnDropHandle<()>,
}

fn settings() -> NodeSettings {
    NodeSettings {
        name: NODE.to_owned(),
        addresses: vec!["10.0.0.5".parse().unwrap()],
        status_update_frequency: Duration::from_millis(50),
        status_report_frequency: Duration::from_secs(3600),
        lease_duration: Duration::from_millis(400),
        // A test must not depend on how full this host's disk is.
        eviction_hard: Default::default(),
        ..NodeSettings::default()
    }
}

/// What this host's address is, for nodes that were not told theirs; none at first.
static HOST_ADDRESS: Mutex<Option<IpAddr>> = Mutex::new(None);

fn host_address() -> Option<IpAddr> {
    *HOST_ADDRESS.lock().unwrap()
}

fn start(api: Api, settings: NodeSettings) -> World {
    let server = api.server();
    start_against(server, api, settings)
}

fn start_against(server: Arc<ApiServer>, api: Api, settings: NodeSettings) -> World {
    let (tasks, supervisor) = Tasks::new();
    let (health, receiver) = watch::channel(Ok(()));
    let (events, writer) = events::events(server.client.clone(), NODE, Default::default());
    let writing = lambdalet::shutdown::owned(writer.run(tasks.closing()));
    let shutting_down = watch::Sender::new(false);
    let params = Params {
        api: server,
        settings: Arc::new(settings),
        runtime: Arc::new(runtime::Silent),
        health: receiver,
        events,
        shutting_down: shutting_down.subscribe(),
        host_address,
    };
    let handle = node::spawn(params, &tasks).unwrap();
    World { api, health, shutting_down, tasks, supervisor, handle, _writing: writing }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < SOON, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl World {
    async fn until_registered(&self) {
        until("the Node is there", || self.api.state().node.is_some()).await;
    }

    async fn until_ready(&self, status: &str) {
        until(&format!("Ready is {status}"), || self.api.state().condition("Ready").0 == status).await;
    }

    fn status_patches(&self) -> usize {
        self.api.count("PATCH /api/v1/nodes/n1/status")
    }
}

fn existing() -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": NODE, "uid": "old", "resourceVersion": "0", "labels": { "mine": "yes", "kubernetes.io/os": "bsd" } },
        "spec": { "podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24", "fd09::/64"], "unschedulable": true },
        "status": { "capacity": { "example.com/gpu": "1" } },
    })
}

/// The ranges of Pod addresses, where the operator told that one or none.
async fn ranges(world: &World, told: Option<ipnet::IpNet>) -> String {
    let told: Vec<_> = told.into_iter().collect();
    let ranges = world.handle.pod_ranges(&told).await;
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[tokio::test]
async fn a_new_node_is_registered_with_everything_it_has() {
    let api = Api::new();
    api.state().pod_cidr = Some("10.8.0.0/24");
    let taints = vec!["dedicated=x:NoSchedule".parse().unwrap()];
    let world = start(api, NodeSettings { taints, ..settings() });
    assert_eq!(world.handle.facts.borrow().name, NODE, "facts are there before the API server was asked");
    world.until_registered().await;
    assert_eq!(ranges(&world, None).await, "10.8.0.0/24");
    let told = "10.7.0.0/16".parse().unwrap();
    assert_eq!(ranges(&world, Some(told)).await, told.to_string());
    let state = world.api.state();
    let node = state.node.as_ref().unwrap();
    assert_eq!(node["metadata"]["labels"]["kubernetes.io/hostname"], NODE);
    assert_eq!(node["spec"]["taints"][0]["key"], "dedicated");
    assert_eq!(node["status"]["addresses"][0], json!({ "type": "InternalIP", "address": "10.0.0.5" }));
    assert_eq!(node["status"]["nodeInfo"]["containerRuntimeVersion"], "docker://20.10.24");
    assert_eq!(node["status"]["images"][0]["names"][0], "busybox:1.36");
    assert_eq!(state.condition("Ready").0, "True");
}

#[tokio::test]
async fn a_node_that_goes_down_is_not_ready_until_it_does_not_and_events_tell_of_it() {
    let world = start(Api::new(), settings());
    world.until_ready("True").await;
    world.shutting_down.send_replace(true);
    world.until_ready("False").await;
    assert_eq!(world.api.state().condition("Ready").1, "node is shutting down");
    world.shutting_down.send_replace(false);
    world.until_ready("True").await;
    let first = ["Starting", "NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID", "NodeReady"];
    // What is told again is counted, and no event of its own.
    let told = [&first[..], &["NodeNotReady"]].concat();
    until("all of it was told", || world.api.state().told == told).await;
}

#[tokio::test]
async fn a_node_that_was_booted_anew_says_so() {
    let api = Api::new();
    let mut before = existing();
    before["status"]["nodeInfo"] = json!({ "bootID": "another" });
    api.state().node = Some(before);
    let world = start(api, settings());
    until("it was told", || world.api.state().told.contains(&"Rebooted".to_owned())).await;
}

#[tokio::test]
async fn an_existing_node_is_adopted_and_keeps_what_is_not_ours() {
    let api = Api::new();
    api.state().node = Some(existing());
    let taints = vec!["dedicated=x:NoSchedule".parse().unwrap()];
    let world = start(api, NodeSettings { taints, ..settings() });
    world.until_ready("True").await;
    assert_eq!(ranges(&world, None).await, "10.9.0.0/24,fd09::/64");
    let registration = world.handle.registration.borrow().clone().unwrap();
    assert!(registration.unschedulable && registration.uid == "old");
    let state = world.api.state();
    let node = state.node.as_ref().unwrap();
    assert_eq!(node["metadata"]["labels"]["mine"], "yes");
    assert_eq!(node["metadata"]["labels"]["kubernetes.io/os"], "linux");
    assert_eq!(node["spec"]["taints"], json!(null), "taints are given at registration only");
    assert_eq!(node["status"]["capacity"]["example.com/gpu"], "1");
}

#[tokio::test]
async fn a_deleted_node_is_registered_again_at_once_and_its_lease_follows() {
    // With an hour between rounds only the watch can tell.
    let slow = NodeSettings { status_update_frequency: Duration::from_secs(3600), ..settings() };
    let world = start(Api::new(), slow);
    until("there is a lease", || world.api.state().lease.is_some()).await;
    // The watch must have begun, as nobody tells of a deletion before it.
    until("the watch has listed", || world.api.count("GET /api/v1/nodes") > 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.api.delete_node();
    world.api.state().lease = None;
    world.until_registered().await;
    let uid = world.api.state().node.as_ref().unwrap()["metadata"]["uid"].clone();
    until("the lease belongs to the new Node", || {
        world.api.state().lease.as_ref().is_some_and(|lease| lease["metadata"]["ownerReferences"][0]["uid"] == uid)
    })
    .await;
}

#[tokio::test]
async fn a_node_deleted_during_an_outage_is_registered_again_after_it() {
    let slow = NodeSettings { status_update_frequency: Duration::from_secs(3600), ..settings() };
    let world = start(Api::new(), slow);
    world.until_registered().await;
    world.api.go_down();
    world.api.state().node = None;
    tokio::time::sleep(A_WHILE).await;
    world.api.state().down = false;
    world.until_registered().await;
}

#[tokio::test]
async fn the_status_is_sent_only_when_it_changed() {
    let world = start(Api::new(), settings());
    world.until_registered().await;
    tokio::time::sleep(A_WHILE).await;
    let before = world.status_patches();
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(world.status_patches(), before, "nothing changed");

    world.health.send(Err("container runtime is down: no socket".to_owned())).unwrap();
    world.until_ready("False").await;
    assert_eq!(world.api.state().condition("Ready").1, "container runtime is down: no socket");
    world.health.send(Ok(())).unwrap();
    world.until_ready("True").await;
}

#[tokio::test]
async fn an_address_that_changes_is_followed_and_one_that_was_told_is_not() {
    let now = |address: Option<&str>| *HOST_ADDRESS.lock().unwrap() = address.map(|text| text.parse().unwrap());
    now(Some("127.0.0.1"));
    let here = start(Api::new(), NodeSettings { addresses: Vec::new(), ..settings() });
    until("an address that stays is there", || {
        here.api.state().node.as_ref().is_some_and(|node| node["status"]["addresses"][0]["address"] == "127.0.0.1")
    })
    .await;
    now(Some("10.0.0.6"));
    let world = start(Api::new(), NodeSettings { addresses: Vec::new(), ..settings() });
    let told = start(Api::new(), settings());
    let shown = |world: &World| world.api.state().node.as_ref().map(|node| node["status"]["addresses"].clone());
    let addresses = |internal: &str| {
        Some(json!([{ "type": "InternalIP", "address": internal }, { "type": "Hostname", "address": NODE }]))
    };
    until("the first address is there", || shown(&world) == addresses("10.0.0.6")).await;
    let mut facts = world.handle.facts.clone();
    facts.mark_unchanged();
    // Between two addresses a host has none.
    now(None);
    tokio::time::sleep(A_WHILE).await;
    assert!(!facts.has_changed().unwrap());
    now(Some("fd00::6"));
    tokio::time::timeout(SOON, facts.changed()).await.unwrap().unwrap();
    assert_eq!(facts.borrow_and_update().addresses, ["fd00::6".parse::<IpAddr>().unwrap()]);
    until("the other address is there", || shown(&world) == addresses("fd00::6")).await;
    assert_eq!(shown(&told), addresses("10.0.0.5"));
    assert_eq!(shown(&here), addresses("127.0.0.1"), "another route is no other address");
}

#[tokio::test]
async fn an_unchanged_status_is_sent_again_at_the_report_frequency() {
    let world = start(Api::new(), NodeSettings { status_report_frequency: Duration::from_millis(100), ..settings() });
    until("it was sent three times", || world.status_patches() >= 3).await;
}

#[tokio::test]
async fn what_others_write_into_the_conditions_is_put_right() {
    let world = start(Api::new(), settings());
    world.until_ready("True").await;
    tokio::time::sleep(A_WHILE).await;
    world.api.edit_node(|node| {
        for condition in node["status"]["conditions"].as_array_mut().unwrap() {
            condition["status"] = json!("Unknown");
            condition["reason"] = json!("NodeStatusUnknown");
        }
    });
    world.until_ready("True").await;
}

#[tokio::test]
async fn a_change_of_the_node_is_nothing_to_its_lease() {
    let world = start(Api::new(), NodeSettings { lease_duration: Duration::from_secs(40), ..settings() });
    until("there is a lease", || world.api.state().lease.is_some()).await;
    until("the watch has listed", || world.api.count("GET /api/v1/nodes") > 0).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut registration = world.handle.registration.clone();
    let uid = registration.borrow_and_update().as_ref().unwrap().uid.clone();
    world.api.edit_node(|node| node["metadata"]["labels"]["disk"] = json!("ssd"));
    let labelled =
        |known: &Option<_>| known.as_ref().is_some_and(|node: &Registration| node.labels.contains_key("disk"));
    tokio::time::timeout(SOON, registration.wait_for(labelled)).await.unwrap().unwrap();
    tokio::time::sleep(A_WHILE).await;
    let lease = world.api.state().lease.clone().unwrap();
    assert_eq!(lease["metadata"]["ownerReferences"][0]["uid"], json!(uid));
    assert_eq!(
        world.api.count(&format!("PUT /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{NODE}")),
        0,
        "it was renewed before its time"
    );
}

#[tokio::test]
async fn the_lease_is_renewed_made_again_and_survives_a_conflict() {
    let world = start(Api::new(), settings());
    until("there is a lease", || world.api.state().lease.is_some()).await;
    let renewed = || world.api.state().lease.as_ref().map(|lease| lease["spec"]["renewTime"].clone());
    {
        let state = world.api.state();
        let lease = state.lease.as_ref().unwrap();
        assert_eq!(lease["spec"]["holderIdentity"], NODE);
        assert_eq!(lease["metadata"]["ownerReferences"][0]["kind"], "Node");
    }
    let first = renewed();
    until("it is renewed", || renewed() != first).await;
    world.api.state().lease.as_mut().unwrap()["metadata"]["resourceVersion"] = json!("somebody-else");
    let second = renewed();
    until("it is renewed in spite of a conflict", || renewed() != second).await;
    world.api.state().lease = None;
    until("it is made again", || world.api.state().lease.is_some()).await;
}

#[tokio::test]
async fn an_api_server_that_is_away_is_waited_for() {
    let api = Api::new();
    api.state().down = true;
    let world = start(api, settings());
    tokio::time::sleep(A_WHILE).await;
    assert!(world.handle.registration.borrow().is_none());
    world.api.state().down = false;
    world.until_registered().await;
    // And once more in the middle of its life.
    world.api.state().down = true;
    world.health.send(Err("container runtime is down".to_owned())).unwrap();
    tokio::time::sleep(A_WHILE).await;
    world.api.state().down = false;
    world.until_ready("False").await;
}

#[tokio::test]
async fn a_registration_that_is_forbidden_is_tried_again() {
    let api = Api::new();
    api.state().forbid_create = true;
    let world = start(api, settings());
    until("it was tried", || world.api.count("POST /api/v1/nodes") >= 2).await;
    world.api.state().forbid_create = false;
    world.until_registered().await;
}

#[tokio::test]
async fn the_identity_of_another_node_ends_the_process_with_an_explanation() {
    let api = Api::new();
    api.state().identity = "system:node:other".to_owned();
    let world = start(api, settings());
    let error = tokio::time::timeout(SOON, world.supervisor.run(SOON)).await.unwrap().unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("--node-name other") && text.contains("node.kubeconfig"), "{text}");
    assert_eq!(world.api.count("POST /api/v1/nodes"), 0);
}

#[tokio::test]
async fn a_server_our_ca_did_not_sign_ends_the_process_with_an_explanation() {
    let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        Err::<http::Response<kube::client::Body>, _>(std::io::Error::other(unknown))
    });
    let (client, kubeconfig) = (kube::Client::new(service, "default"), "node.kubeconfig".into());
    let server = Arc::new(ApiServer { client, url: "https://api.test".to_owned(), kubeconfig });
    let world = start_against(server, Api::new(), settings());
    let error = tokio::time::timeout(SOON, world.supervisor.run(SOON)).await.unwrap().unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("the CA in node.kubeconfig did not sign"), "{text}");
}

#[tokio::test]
async fn reservations_that_leave_nothing_are_refused() {
    let (tasks, _supervisor) = Tasks::new();
    let settings = NodeSettings { kube_reserved: "memory=1Pi".parse().unwrap(), ..settings() };
    let (_health, health) = watch::channel(Ok(()));
    let runtime = Arc::new(runtime::Silent);
    let api = Api::new().server();
    let (events, _writer) = events::events(api.client.clone(), NODE, Default::default());
    let (_shutting_down, shutting_down) = watch::channel(false);
    let params = Params { api, settings: Arc::new(settings), runtime, health, events, shutting_down, host_address };
    assert!(node::spawn(params, &tasks).unwrap_err().to_string().contains("memory"));
}

#[tokio::test]
async fn an_identity_that_is_no_node_may_be_any() {
    let api = Api::new();
    api.state().identity = "system:serviceaccount:kube-system:lambdalet".to_owned();
    start(api, settings()).until_registered().await;
}

#[tokio::test]
async fn without_register_node_somebody_else_makes_it() {
    let world = start(Api::new(), NodeSettings { register: false, ..settings() });
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(world.api.count("POST /api/v1/nodes"), 0);
    world.api.state().node = Some(existing());
    world.until_ready("True").await;
}

#[tokio::test]
async fn a_clean_end_leaves_the_node_ready() {
    let world = start(Api::new(), settings());
    world.until_ready("True").await;
    let api = world.api.clone();
    world.tasks.spawn_finite("end", async { anyhow::bail!("test") });
    assert!(world.supervisor.run(SOON).await.is_err());
    assert_eq!(api.state().condition("Ready").0, "True");
}

#[tokio::test]
async fn with_drain_on_exit_the_node_is_not_ready_while_its_pods_end_and_its_lease_holds() {
    let world = start(Api::new(), NodeSettings { drain_on_exit: true, ..settings() });
    world.until_ready("True").await;
    let (api, draining) = (world.api.clone(), world.tasks.draining());
    let observer = api.clone();
    world.tasks.spawn("pods", async move {
        draining.cancelled().await;
        until("Ready is False", || observer.state().condition("Ready").0 == "False").await;
        let renewed = || observer.state().lease.as_ref().map(|lease| lease["spec"]["renewTime"].clone());
        let before = renewed();
        until("the lease is renewed", || renewed() != before).await;
        Ok(())
    });
    world.tasks.spawn_finite("end", async { anyhow::bail!("test") });
    let error = world.supervisor.run(SOON).await.unwrap_err();
    assert_eq!(format!("{error:#}"), "task end failed: test", "the Pods' task did not fail");
    assert!(api.state().condition("Ready").1.contains("shutting down"));
}

#[tokio::test]
async fn with_drain_on_exit_a_node_without_pods_ends_as_not_ready_too() {
    let world = start(Api::new(), NodeSettings { drain_on_exit: true, ..settings() });
    world.until_ready("True").await;
    let api = world.api.clone();
    world.tasks.spawn_finite("end", async { anyhow::bail!("test") });
    assert!(world.supervisor.run(SOON).await.is_err());
    assert_eq!(api.state().condition("Ready").0, "False");
}

#[tokio::test]
async fn without_a_range_from_anybody_the_default_holds() {
    let world = start(Api::new(), settings());
    assert_eq!(ranges(&world, None).await, DEFAULT_POD_CIDR);
}

async fn real_node_that_is_ready(nodes: &kube::Api<Node>, name: &str, status: &str) -> Node {
    let begin = Instant::now();
    loop {
        let node = nodes.get_opt(name).await.unwrap();
        let conditions = node.as_ref().and_then(|node| node.status.clone()?.conditions).unwrap_or_default();
        if conditions.iter().any(|found| found.type_ == "Ready" && found.status == status) {
            return node.unwrap();
        }
        assert!(begin.elapsed() < SOON, "waited in vain until Ready is {status}: {conditions:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Wants `KUBECONFIG` to lead to a real cluster as `system:node:NAME`, and `LAMBDALET_ADMIN_KUBECONFIG` as somebody who
/// may delete Nodes.
#[tokio::test]
#[ignore = "needs cluster (KUBECONFIG of a system:node identity, LAMBDALET_ADMIN_KUBECONFIG)"]
async fn a_real_api_server_takes_the_node_its_status_and_its_lease() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let connect = async |variable: &str| {
        let path = std::env::var(variable).expect(variable);
        Arc::new(ApiServer::from_kubeconfig(path.as_ref()).await.unwrap())
    };
    let (ours, admin) = (connect("KUBECONFIG").await, connect("LAMBDALET_ADMIN_KUBECONFIG").await);
    let name = ours.whoami().await.unwrap().strip_prefix("system:node:").expect("a node identity").to_owned();
    let labels = [("type".to_owned(), "virtual-kubelet".to_owned())].into();
    let taints = vec!["dedicated=x:NoSchedule".parse().unwrap()];
    let frequency = Duration::from_millis(500);
    let settings = NodeSettings {
        name: name.clone(),
        labels,
        taints,
        status_update_frequency: frequency,
        ..NodeSettings::default()
    };
    let world = start_against(ours, Api::new(), settings);

    let nodes: kube::Api<Node> = kube::Api::all(admin.client.clone());
    let ready = async |status: &str| real_node_that_is_ready(&nodes, &name, status).await;
    let first = ready("True").await;
    assert_eq!(first.metadata.labels.as_ref().unwrap()["type"], "virtual-kubelet");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let quiet = ready("True").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let status = |node: &Node| node.status.clone().unwrap().conditions.unwrap();
    assert_eq!(status(&ready("True").await), status(&quiet), "an unchanged status is not sent again");

    world.health.send(Err("container runtime is down".to_owned())).unwrap();
    ready("False").await;
    world.health.send(Ok(())).unwrap();
    ready("True").await;

    nodes.delete(&name, &Default::default()).await.unwrap();
    let begin = Instant::now();
    let second = loop {
        match nodes.get_opt(&name).await.unwrap() {
            Some(node) if node.metadata.uid != first.metadata.uid => break node,
            _ => assert!(begin.elapsed() < SOON, "the deleted Node did not come back"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    println!("registered again after {:?}", begin.elapsed());
    println!("podCIDR: {:?}", ranges(&world, None).await);
    let leases: kube::Api<Lease> = kube::Api::namespaced(admin.client.clone(), "kube-node-lease");
    let begin = Instant::now();
    loop {
        let lease = leases.get_opt(&name).await.unwrap();
        let owners = lease.and_then(|lease| lease.metadata.owner_references).unwrap_or_default();
        if owners.iter().any(|owner| Some(&owner.uid) == second.metadata.uid.as_ref()) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "the lease does not belong to the new Node");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
