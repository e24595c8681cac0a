//! A Deployment of function Pods behind a Service.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};

use super::*;
use crate::harness::node::Options;
use crate::harness::pods::{busybox_with, is_ready};
use crate::harness::wait::watch_until;
use crate::harness::{on_own_node, on_shared_node};

/// Whether every replica of the Deployment, and nothing else, is ready and of its latest version.
pub(super) fn complete(deployment: Option<&Deployment>) -> bool {
    deployment.is_some_and(|deployment| {
        let wanted = deployment.spec.replicas;
        let status = deployment.status.clone().unwrap_or_default();
        status.observed_generation == deployment.metadata.generation
            && status.updated_replicas == wanted
            && status.ready_replicas == wanted
            && status.replicas == wanted
    })
}

/// How many calls a caller made, which Pods answered, and what was lost.
type Tally = (usize, BTreeSet<String>, Vec<String>);

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_rolling_update_behind_a_service_loses_no_call() {
    on_shared_node(async |t| {
        if !t.cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        let template = json!({
            "metadata": {"labels": {"app": "f", "com.openfaas.scale.min": "0", "com.openfaas.scale.max": "3"}},
            "spec": {
                "nodeSelector": {"lambdalet.dev/test": t.node.name},
                "containers": [busybox_with(SERVER, json!({"resources": {"limits": {"cpu": "100m"}}}))],
            },
        });
        let rolling = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}});
        let spec = json!({
            "replicas": 2, "strategy": rolling, "selector": {"matchLabels": {"app": "f"}}, "template": template,
        });
        t.make::<Deployment>("f", json!({"spec": spec})).await;
        let ports = json!([{"port": 80, "targetPort": 8080}]);
        let service: Service = t.make("f", json!({"spec": {"selector": {"app": "f"}, "ports": ports}})).await;
        let address = format!("{}:80", service.spec.unwrap().cluster_ip.unwrap());
        watch_until(t.api::<Deployment>(), "f", "complete", SOON, complete).await;
        // Until kube-proxy knows the Service, its address is anybody's.
        let ask = async || match send(&address, Request::get("/id"), Bytes::new(), CALL).await? {
            answer if answer.status == StatusCode::OK => Ok(answer),
            other => Err(format!("{other:?}")),
        };
        let first = poll("the Service", SOON, ask).await.text();

        let stop = Arc::new(AtomicBool::new(false));
        let callers: Vec<JoinHandle<Tally>> = (0..3)
            .map(|_| {
                let (address, stop) = (address.clone(), Arc::clone(&stop));
                tokio::spawn(async move {
                    let (mut calls, mut ids, mut lost) = (0, BTreeSet::new(), Vec::new());
                    while !stop.load(Ordering::Relaxed) {
                        calls += 1;
                        match send(&address, Request::get("/id"), Bytes::new(), CALL).await {
                            Ok(answer) if answer.status == StatusCode::OK => _ = ids.insert(answer.text()),
                            other => lost.push(format!("{other:?}")),
                        }
                    }
                    (calls, ids, lost)
                })
            })
            .collect();
        let change = json!({"spec": {"template": {"metadata": {"annotations": {"version": "2"}}}}});
        t.api::<Deployment>().patch("f", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
        watch_until(t.api::<Deployment>(), "f", "updated", SOON, complete).await;
        let version = kube::api::ListParams::default().labels("app=f");
        poll("free of the old Pods", SOON, async || {
            let pods = t.api::<Pod>().list(&version).await.map_err(|e| e.to_string())?;
            if pods.items.len() == 2 { Ok(()) } else { Err(format!("{} Pods", pods.items.len())) }
        })
        .await;
        stop.store(true, Ordering::Relaxed);
        let (mut calls, mut ids) = (0, BTreeSet::from([first]));
        for caller in callers {
            let (made, seen, lost) = caller.await.unwrap();
            assert!(lost.is_empty(), "of {made} calls {} were lost: {:?}", lost.len(), &lost[..lost.len().min(5)]);
            calls += made;
            ids.extend(seen);
        }
        eprintln!("{calls} calls, {} environments", ids.len());
        assert!(calls > 50 && ids.len() >= 3, "{calls} calls, {ids:?}");
        let scale = json!({"spec": {"replicas": 0}});
        t.api::<Deployment>().patch("f", &PatchParams::default(), &Patch::Merge(scale)).await.unwrap();
        poll("without Pods", SOON, async || {
            let pods = t.api::<Pod>().list(&version).await.map_err(|e| e.to_string())?;
            if pods.items.is_empty() { Ok(()) } else { Err(format!("{} Pods", pods.items.len())) }
        })
        .await;
    });
}

/// Another name of the image that plain servers are made of; gone with the test.
struct Renamed(String);

impl Renamed {
    fn new(t: &Case) -> Self {
        let name = format!("lambdalet.test/renamed-{}:1", t.namespace);
        output("docker", &["tag", BUSYBOX, &name]);
        Self(name)
    }
}

impl Drop for Renamed {
    fn drop(&mut self) {
        output("docker", &["rmi", &self.0]);
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn environments_of_an_earlier_image_end_their_calls_and_give_way() {
    on_shared_node(async |t| {
        let keys = json!({"com.openfaas.scale.min": "1", "com.openfaas.scale.max": "2"});
        let function = Function::server(t, "f", keys).await;
        let first = function.id().await;
        let held = function.hold("held");
        function.begun(&["held"]).await;
        let renamed = Renamed::new(t);
        t.kubectl_text(&["set", "image", "pod/f", "main=lambdalet.test/no-such-image:1"]);
        assert!(t.event("f", "Failed").await.contains("no-such-image"));
        assert!(is_ready(&t.running("f").await), "it serves from the old image");
        t.kubectl_text(&["set", "image", "pod/f", &format!("main={}", renamed.0)]);
        let second = function.id().await;
        assert_ne!(second, first, "the old one takes no new call");
        function.let_go("held");
        assert_eq!(told(held.await), first, "and ends the one it had");
        let one = function.has(1).await;
        let (_, id) = one.first().unwrap();
        let image = output("docker", &["inspect", "--format={{index .Config.Labels \"lambdalet.dev/image-ref\"}}", id]);
        assert_eq!(image.trim(), renamed.0);
        let pod = t.until("f", "ready again", is_ready).await;
        assert_eq!(crate::harness::pods::restarts(&pod, "main"), 0, "nothing crashed");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_image_set_while_the_node_was_away_is_served_from_when_it_is_back() {
    on_own_node("renews-functions", Options::default(), async |t| {
        let function = Function::server(t, "f", json!({"com.openfaas.scale.min": "1"})).await;
        let first = function.id().await;
        let renamed = Renamed::new(t);
        t.node.kill9();
        t.kubectl_text(&["set", "image", "pod/f", &format!("main={}", renamed.0)]);
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        function.listens().await;
        assert_ne!(function.id().await, first);
        function.has(1).await;
    });
}
