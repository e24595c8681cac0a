//! Pods on a network that CNI plugins make: those of Debian, with a real Docker and a real API server.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use kube::ResourceExt as _;
use kube::api::ListParams;
use serde_json::{Value, json};

use crate::harness::http::get;
use crate::harness::leaks::Leaks;
use crate::harness::node::{Options, free_port, output};
use crate::harness::pods::{STAY, busybox, identity, pod_ip, restarts, sleeper, with};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_own_node};

/// Where Debian has them (`apt-get install containernetworking-plugins`).
const PLUGINS: &str = "/usr/lib/cni";
/// Serves its own name on port 8080.
const SERVE: &str = "mkdir /www; hostname >/www/index.html; echo up; exec httpd -f -p 8080 -h /www";

/// A network of Debian's plugins on a bridge of its own; the addresses come from the node's range.
struct Network {
    dir: tempfile::TempDir,
    bridge: String,
}

impl Network {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let (dir, bridge) = (tempfile::tempdir().unwrap(), format!("ct{}-{number}", std::process::id()));
        std::fs::create_dir(dir.path().join("conf")).unwrap();
        let network = Self { dir, bridge };
        let ipam = json!({"type": "host-local", "dataDir": network.path("leases"), "routes": [{"dst": "0.0.0.0/0"}]});
        network.configure(
            "10-pods.conflist",
            &json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
                {"type": "bridge", "bridge": network.bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                 "capabilities": {"ipRanges": true}, "ipam": ipam},
                {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
                {"type": "firewall"},
            ]})
            .to_string(),
        );
        network
    }

    fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    fn configure(&self, name: &str, text: &str) {
        std::fs::write(self.path("conf").join(name), text).unwrap();
    }

    fn flags(&self) -> Options {
        Options::flags(&[
            &format!("--cni-conf-dir={}", self.path("conf").display()),
            &format!("--cni-bin-dir={PLUGINS}"),
        ])
    }

    /// What Pods have of it on the host: ports of the bridge, leases, and rules with an address of the node.
    fn traces(&self, t: &Case) -> Vec<String> {
        let links = output("ip", &["-o", "link", "show", "master", &self.bridge]);
        let mut found: Vec<String> = links.lines().map(str::to_owned).collect();
        let leases = std::fs::read_dir(self.path("leases/pods")).into_iter().flatten().flatten();
        found.extend(leases.filter_map(|entry| entry.file_name().into_string().ok()).filter(|n| t.node.has_address(n)));
        for table in ["filter", "nat"] {
            let rules = output("iptables", &["-w", "-t", table, "-S"]);
            let of_pod =
                |rule: &&str| rule.split([' ', ':']).any(|word| t.node.has_address(word) && !word.ends_with("/24"));
            found.extend(rules.lines().filter(of_pod).map(str::to_owned));
        }
        let records = std::fs::read_dir(t.node.root.join("cni/results")).into_iter().flatten().flatten();
        found.extend(records.map(|entry| entry.path().display().to_string()));
        found
    }

    /// Waits until nothing of any Pod is left.
    async fn is_clean(&self, t: &Case) {
        poll("nothing left of the network", SOON, async || {
            let found = self.traces(t);
            if found.is_empty() { Ok(()) } else { Err(found.join("\n")) }
        })
        .await;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        output("ip", &["link", "delete", &self.bridge]);
    }
}

/// Runs the test on a node whose network these plugins make, or says why not.
fn on_their_network(name: &str, test: impl AsyncFnOnce(&Case, &Network)) {
    if !Path::new(PLUGINS).join("bridge").exists() {
        println!("skipped: {PLUGINS} has no plugins (apt-get install containernetworking-plugins)");
        return;
    }
    let network = Network::new();
    on_own_node(name, network.flags(), async |t| test(t, &network).await);
}

async fn answer(address: &str) -> String {
    poll("an answer", SOON, async || get(address, "/").await).await.text()
}

async fn delete_all(t: &Case) {
    for pod in t.api::<Pod>().list(&ListParams::default()).await.unwrap() {
        t.delete(&pod.name_any(), Some(1)).await;
        t.gone(&pod.name_any(), SOON).await;
    }
}

fn not_ready_because(node: &NodeObject, text: &str) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.filter(|c| c.type_ == "Ready").find(|c| c.status == "False");
    ready.and_then(|c| c.message.as_ref()).is_some_and(|message| message.contains(text))
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn pods_on_debians_plugins_are_reached_survive_kill_9_and_leave_nothing() {
    on_their_network("cni-whole", async |t, network| {
        let before = Leaks::of(&t.node);
        let port = free_port();
        let main = with(busybox(SERVE), json!({"ports": [{"containerPort": 8080, "hostPort": port}]}));
        t.pod("web", json!({"terminationGracePeriodSeconds": 1, "containers": [main]})).await;
        let web = t.running("web").await;
        let address = pod_ip(&web).to_owned();
        assert!(t.node.has_address(&address), "{address} is not of the node's range");
        assert_eq!(answer(&format!("{address}:8080")).await, "web\n");
        assert_eq!(answer(&format!("127.0.0.1:{port}")).await, "web\n");
        let ask = format!(
            "until timeout 2 wget -qO- http://{address}:8080/ 2>/dev/null; do sleep 0.2; done; grep -c {address} /etc/hosts || true"
        );
        assert_eq!(t.script(&ask).await, "web\n0\n");
        assert!(t.kubectl_text(&["exec", "web", "--", "cat", "/etc/hosts"]).contains(&address));

        t.node.restart(&t.client).await;
        t.node.kill9();
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        let still = t.running("web").await;
        assert_eq!((pod_ip(&still), identity(&still, "main")), (address.as_str(), identity(&web, "main")));
        assert_eq!(answer(&format!("127.0.0.1:{port}")).await, "web\n");

        // While nobody is there to take it away.
        t.pod("orphan", sleeper()).await;
        t.running("orphan").await;
        t.node.kill9();
        let label = format!("label=lambdalet.dev/pod-namespace={}", t.namespace);
        let orphans =
            output("docker", &["ps", "-aq", "--filter", &label, "--filter", "label=lambdalet.dev/pod-name=orphan"]);
        for container in orphans.lines() {
            output("docker", &["rm", "-f", container]);
        }
        t.delete("orphan", Some(0)).await;
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        t.gone("orphan", SOON).await;
        delete_all(t).await;
        network.is_clean(t).await;
        before.again(&t.node).await;
        assert!(get(&format!("127.0.0.1:{port}"), "/").await.is_err());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_answers_at_the_address_that_plugins_gave_it() {
    on_their_network("cni-function", async |t, network| {
        let metadata = json!({"labels": {"com.openfaas.scale.min": "0", "com.openfaas.scale.max": "1"}});
        let main = with(busybox(SERVE), json!({"ports": [{"containerPort": 8080}]}));
        t.labelled_pod("function", metadata, json!({"terminationGracePeriodSeconds": 1, "containers": [main]})).await;
        let address = pod_ip(&t.running("function").await).to_owned();
        assert!(t.node.has_address(&address), "{address}");
        assert_eq!(answer(&format!("{address}:8080")).await, "function\n");
        delete_all(t).await;
        network.is_clean(t).await;
    });
}

/// Killed at a step of the plugins, half a sandbox is taken away and made anew.
fn killed_at(step: &str) {
    assert!(lambdalet::failpoint::NAMES.contains(&step), "no such failpoint: {step}");
    on_their_network(&format!("at-{step}"), async |t, network| {
        if step == "cni-del" {
            t.pod("hit", sleeper()).await;
            t.running("hit").await;
        }
        t.node.kill9();
        t.node.spawn(&[("LAMBDALET_FAILPOINT".to_owned(), step.to_owned())]);
        if step == "cni-del" {
            t.delete("hit", Some(1)).await;
        } else {
            t.pod("hit", sleeper()).await;
        }
        let ended = tokio::time::timeout(SOON, t.node.ended()).await;
        assert!(!ended.unwrap_or_else(|_| panic!("it never came to {step}:\n{}", t.node.log())).success());
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        if step != "cni-del" {
            let pod = t.running("hit").await;
            assert_eq!(restarts(&pod, "main"), 0, "what was half made is no restart");
            t.delete("hit", Some(1)).await;
        }
        t.gone("hit", SOON).await;
        network.is_clean(t).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crash_before_the_first_plugin_leaves_nothing() {
    killed_at("cni-record");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crash_after_the_last_plugin_leaves_nothing() {
    killed_at("cni");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crash_after_everything_was_undone_leaves_nothing() {
    killed_at("cni-del");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_is_ready_only_while_its_network_can_be_used_and_says_what_is_wrong() {
    on_their_network("cni-broken", async |t, network| {
        t.pod("before", json!({"terminationGracePeriodSeconds": 1, "containers": [busybox(STAY)]})).await;
        t.running("before").await;
        let spoil = |text: &str| network.configure("00-first.conf", text);
        let mended = async || {
            std::fs::remove_file(network.path("conf/00-first.conf")).unwrap();
            t.node.ready(&t.client).await;
        };
        spoil("{");
        let told = "00-first.conf cannot be used: it is not JSON";
        t.node.until(&t.client, "NotReady", SOON, |node| not_ready_because(node, told)).await;
        // Bound without the scheduler, which passes the node over.
        t.pod(
            "after",
            json!({"nodeName": t.node.name, "tolerations": [{"operator": "Exists"}],
            "terminationGracePeriodSeconds": 1, "containers": [busybox(STAY)]}),
        )
        .await;
        let event = t.event("after", "FailedCreatePodSandBox").await;
        assert!(event.contains(told), "{event}");
        mended().await;
        t.running("after").await;

        let network_of = |plugin: &str| -> Value { json!({"cniVersion": "1.0.0", "name": "other", "type": plugin}) };
        spoil(&network_of("no-such-plugin").to_string());
        let told = format!("CNI plugin no-such-plugin is not in {PLUGINS}");
        t.node.until(&t.client, "NotReady", SOON, |node| not_ready_because(node, &told)).await;
        // What runs is taken away as it was made.
        t.delete("before", None).await;
        t.gone("before", SOON).await;
        mended().await;

        let annotations = json!({"annotations": {"lambdalet.dev/runtime": "microvm"}});
        t.labelled_pod("guest", annotations, sleeper()).await;
        let refused = t.until("guest", "refused", crate::harness::pods::has_ended).await;
        let message = crate::harness::pods::pod_message(&refused);
        assert!(message.contains("CNI plugins make the network"), "{message}");
        delete_all(t).await;
        network.is_clean(t).await;
    });
}
