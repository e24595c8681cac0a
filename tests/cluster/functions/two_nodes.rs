//! A Deployment of function Pods over two nodes, behind one Service.
//!
//! Both nodes are processes on this host, each with its own directory, port, range and bridge. kube-proxy runs once and
//! writes the rules for all of it, as it would on each machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::api::{ListParams, Patch, PatchParams};

use super::rollout::complete;
use super::*;
use crate::harness::leaks::{Leaks, remains};
use crate::harness::node::{Node, Options};
use crate::harness::on_cluster;
use crate::harness::wait::watch_until;

/// Time for a rolling update of a few Pods on a busy machine: each old one still takes calls for seconds.
const ROLLOUT: Duration = Duration::from_secs(90);
/// Calls per second while the Pods are replaced.
const RATE: u32 = 40;

/// A Deployment `f` of `replicas` function Pods on two nodes, evenly spread, behind a Service.
struct Spread<'a> {
    t: &'a Case,
    nodes: BTreeSet<String>,
    address: String,
}

impl<'a> Spread<'a> {
    /// Makes it, and waits until all of it is ready and called by way of the Service.
    async fn start(t: &'a Case, nodes: [&Node; 2], replicas: u32) -> Self {
        let names = nodes.map(|node| node.name.clone());
        let where_ = json!({"key": "lambdalet.dev/test", "operator": "In", "values": names});
        let node_affinity = json!({
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [where_]}]},
        });
        let spread = json!({
            "maxSkew": 1, "topologyKey": "lambdalet.dev/test", "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "f"}}, "matchLabelKeys": ["pod-template-hash"],
        });
        // The node's name is a page beside the environment's own.
        let script = format!("mkdir -p /www; echo \"$NODE\" >/www/node\n{SERVER}");
        let container = busybox_with(
            &script,
            json!({
                "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                "resources": {"limits": {"cpu": "100m"}},
            }),
        );
        let template = json!({
            "metadata": {"labels": {"app": "f", "com.openfaas.scale.min": "0", "com.openfaas.scale.max": "3"}},
            "spec": {
                "affinity": {"nodeAffinity": node_affinity}, "topologySpreadConstraints": [spread],
                "containers": [container],
            },
        });
        let rolling = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}});
        let spec = json!({
            "replicas": replicas, "strategy": rolling, "selector": {"matchLabels": {"app": "f"}}, "template": template,
        });
        t.make::<Deployment>("f", json!({"spec": spec})).await;
        let ports = json!([{"port": 80, "targetPort": 8080}]);
        let service: Service = t.make("f", json!({"spec": {"selector": {"app": "f"}, "ports": ports}})).await;
        watch_until(t.api::<Deployment>(), "f", "complete", ROLLOUT, complete).await;
        let address = format!("{}:80", service.spec.unwrap().cluster_ip.unwrap());
        let spread = Self { t, nodes: names.into(), address };
        spread.reached().await;
        spread
    }

    /// Calls by way of the Service until both nodes have answered.
    async fn reached(&self) {
        let mut seen = BTreeSet::new();
        poll("answered by both nodes", SOON, async || {
            let answer = send(&self.address, Request::get("/node"), Bytes::new(), CALL).await?;
            // Until kube-proxy knows the Service, its address is anybody's.
            if answer.status == StatusCode::OK {
                seen.insert(answer.text().trim().to_owned());
            }
            if seen == self.nodes { Ok(()) } else { Err(format!("{} {seen:?}", answer.status)) }
        })
        .await;
    }

    /// Its Pods' names by the node they are on.
    async fn pods(&self) -> BTreeMap<String, BTreeSet<String>> {
        let mut pods = BTreeMap::<_, BTreeSet<_>>::new();
        for pod in self.t.api::<Pod>().list(&ListParams::default().labels("app=f")).await.unwrap() {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            pods.entry(node).or_default().insert(pod.name_any());
        }
        pods
    }

    /// Gives the Deployment other fields.
    async fn change(&self, change: &Value) {
        self.t.api::<Deployment>().patch("f", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
    }

    /// Takes it down to no Pods, so that what they leave can be looked for.
    async fn end(&self, other: &Node) {
        let label = ListParams::default().labels("app=f");
        let pods = self.t.api::<Pod>().list(&label).await.unwrap();
        let uids: Vec<String> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        self.change(&json!({"spec": {"replicas": 0}})).await;
        poll("without Pods", SOON, async || {
            let pods = self.t.api::<Pod>().list(&label).await.map_err(|e| e.to_string())?;
            if pods.items.is_empty() { Ok(()) } else { Err(format!("{} Pods", pods.items.len())) }
        })
        .await;
        poll("free of what was on the other node", SOON, async || {
            let mut found = remains(other, &self.t.namespace, &uids);
            found.extend(Leaks::of(other).links);
            if found.is_empty() { Ok(()) } else { Err(found.join("\n")) }
        })
        .await;
    }
}

/// Runs a test on two nodes; the case's own is the first.
fn on_two_nodes(name: &str, test: impl AsyncFnOnce(&Case, &Node)) {
    on_cluster(async |cluster, client| {
        if !cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        let (left, right) = (format!("{name}-left"), format!("{name}-right"));
        let (left, right) = tokio::join!(
            Node::start(cluster, client, &left, Options::default()),
            Node::start(cluster, client, &right, Options::default()),
        );
        let left = Arc::new(left);
        Case::run(cluster, client, &left, async |t| test(t, &right).await).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_service_reaches_functions_on_two_nodes_from_the_host_and_from_pods_of_both() {
    on_two_nodes("reach", async |t, right| {
        let functions = Spread::start(t, [&t.node, right], 2).await;
        let pods = functions.pods().await;
        assert_eq!(pods.len(), 2, "one Pod on each node: {pods:?}");
        let wanted: Vec<&str> = functions.nodes.iter().map(String::as_str).collect();
        // By the Service's name, so that cluster DNS is asked as well; each kind of caller hears from both nodes.
        let script = "for i in $(seq 200); do
            timeout 20 wget -qO- http://f/node >>/tmp/heard || exit 1
            [ \"$(sort -u /tmp/heard | wc -l)\" -lt 2 ] || break
        done; sort -u /tmp/heard";
        for node in [&t.node.name, &right.name] {
            let name = format!("caller-on-{node}");
            let place = json!({"lambdalet.dev/test": node});
            let spec = json!({
                "nodeSelector": place, "restartPolicy": "Never",
                "containers": [crate::harness::pods::busybox(script)],
            });
            let spec = json!({"metadata": {"name": name}, "spec": spec});
            t.make::<Pod>(&name, spec).await;
            let pod = t.until(&name, "at its end", crate::harness::pods::has_ended).await;
            let heard = t.log(&name, "main").await;
            assert_eq!(crate::harness::pods::phase(&pod), "Succeeded", "{heard}");
            assert_eq!(heard.lines().collect::<Vec<_>>(), wanted, "heard on {node}");
            t.delete(&name, Some(0)).await;
        }
        functions.end(right).await;
    });
}

/// What became of calls that were sent at a fixed rate, whatever became of those before.
struct Load {
    calls: Vec<JoinHandle<Result<Answer, String>>>,
}

impl Load {
    /// Sends calls at [`RATE`] while `change` is under way, and a second longer.
    async fn during(address: &str, change: impl Future<Output = ()>) -> Self {
        let mut calls = Vec::new();
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        let mut change = std::pin::pin!(async {
            change.await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        });
        loop {
            // Neither loses anything when the other is first: a tick comes again, and the change is looked at again.
            tokio::select! {
                () = &mut change => return Self { calls },
                _ = ticks.tick() => {
                    let address = address.to_owned();
                    calls.push(tokio::spawn(async move {
                        send(&address, Request::get("/node"), Bytes::new(), CALL).await
                    }));
                }
            }
        }
    }

    /// How many calls each node has answered; none may be lost.
    async fn told(self) -> BTreeMap<String, usize> {
        let (mut answers, mut lost) = (BTreeMap::new(), Vec::new());
        for call in self.calls {
            match call.await.unwrap() {
                Ok(answer) if answer.status == StatusCode::OK => {
                    *answers.entry(answer.text().trim().to_owned()).or_default() += 1;
                }
                Ok(answer) => lost.push(format!("{}: {}", answer.status, answer.text())),
                Err(error) => lost.push(error),
            }
        }
        assert!(lost.is_empty(), "{} were lost, {answers:?} were not: {:?}", lost.len(), &lost[..lost.len().min(5)]);
        answers
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_rolling_update_over_two_nodes_loses_no_call_of_an_open_loop() {
    on_two_nodes("roll", async |t, right| {
        let functions = Spread::start(t, [&t.node, right], 2).await;
        let before = functions.pods().await;
        let load = Load::during(&functions.address, async {
            functions.change(&json!({"spec": {"template": {"metadata": {"annotations": {"version": "2"}}}}})).await;
            watch_until(t.api::<Deployment>(), "f", "updated", ROLLOUT, complete).await;
            poll("free of the old Pods", ROLLOUT, async || {
                let now = functions.pods().await;
                let old = now.values().flatten().filter(|name| before.values().flatten().any(|old| old == *name));
                if old.count() == 0 { Ok(()) } else { Err(format!("{now:?}")) }
            })
            .await;
        })
        .await;
        let after = functions.pods().await;
        assert_eq!(after.len(), 2, "one Pod on each node again: {after:?}");
        let answers = load.told().await;
        eprintln!("answers by node: {answers:?}");
        assert_eq!(answers.keys().cloned().collect::<BTreeSet<_>>(), functions.nodes);
        let sum: usize = answers.values().sum();
        assert!(answers.values().all(|count| *count > sum / 10), "each node has its share: {answers:?}");
        functions.reached().await;
        functions.end(right).await;
    });
}
