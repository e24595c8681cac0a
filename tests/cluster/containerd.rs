//! A node that runs its Pods on containerd, through CRI, and has nothing from Docker.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Api;
use serde_json::json;

use crate::exec::{PROTOCOLS, fetched, run, text};
use crate::harness::containerd::Containerd;
use crate::harness::leaks::Leaks;
use crate::harness::pods::{
    STAY, busybox, busybox_with, container, exit_code, has_ended, identity, is_ready, last_terminated, restarts,
    terminated, with,
};
use crate::harness::wait::SOON;
use crate::harness::{Case, on_own_node};
use crate::restart::killed_at_on;

fn on_containerd(name: &str, test: impl AsyncFnOnce(&Case)) {
    let Some(containerd) = Containerd::from_environment() else { return };
    on_own_node(name, containerd.options(), test);
}

/// Answers on port 8080 until it is told to end.
const SERVE: &str = "mkdir -p /www; hostname >/www/index.html; httpd -p 8080 -h /www; trap 'exit 0' TERM
    echo up; while true; do sleep 3600 & wait; done";

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_on_containerd_is_what_it_is_elsewhere() {
    on_containerd("containerd", async |t| {
        let before = Leaks::of(&t.node);
        let node: NodeObject = Api::all(t.client.clone()).get(&t.node.name).await.unwrap();
        let version = node.status.unwrap().node_info.unwrap().container_runtime_version;
        assert!(version.starts_with("containerd://"), "{version}");
        let probes = json!({
            "startupProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 30},
            "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
            "livenessProbe": {"exec": {"command": ["test", "!", "-e", "/tmp/dead"]}, "periodSeconds": 1, "failureThreshold": 1},
        });
        let init = container("setup", "echo set up >/shared/file");
        let mount = json!({"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]});
        let init = with(init, mount.clone());
        let main = with(busybox_with(SERVE, probes), mount);
        t.pod(
            "web",
            json!({"volumes": [{"name": "shared", "emptyDir": {}}], "initContainers": [init], "containers": [main]}),
        )
        .await;
        let pod = t.running("web").await;
        let (id, ..) = identity(&pod, "main");
        assert!(id.starts_with("containerd://"), "{id}");
        assert_eq!(t.log("web", "main").await, "up\n");
        for (protocol, websockets) in PROTOCOLS {
            let script = "cat /shared/file; cat; echo to err >&2; exit 7";
            let ended = run(t, websockets, &["exec", "-i", "web", "-c", "main", "--", "sh", "-c", script], b"typed");
            assert_eq!((text(&ended.stdout), ended.status.code()), ("set up\ntyped".to_owned(), Some(7)), "{protocol}");
            assert!(text(&ended.stderr).starts_with("to err\n"), "{protocol}: {}", text(&ended.stderr));
        }
        assert_eq!(fetched(t, "web", 8080).await, "web\n");
        t.kubectl_text(&["exec", "web", "-c", "main", "--", "touch", "/tmp/dead"]);
        let pod = t.until("web", "restarted by its probe", |pod| restarts(pod, "main") == 1 && is_ready(pod)).await;
        assert_eq!(last_terminated(&pod, "main").unwrap().exit_code, 0, "it ended when it was told to");
        t.delete("web", None).await;
        t.gone("web", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deployment_on_containerd_scales_and_goes() {
    on_containerd("deployed", async |t| {
        let before = Leaks::of(&t.node);
        let ready = json!({"readinessProbe": {"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1}});
        let spec = json!({
            "containers": [busybox_with(SERVE, ready)], "nodeSelector": {"lambdalet.dev/test": t.node.name},
            "terminationGracePeriodSeconds": 2,
        });
        let template = json!({"metadata": {"labels": {"app": "shop"}}, "spec": spec});
        let deployment = json!({"replicas": 2, "selector": {"matchLabels": {"app": "shop"}}, "template": template});
        t.make::<Deployment>("shop", json!({"spec": deployment})).await;
        let wait = ["rollout", "status", "deployment/shop", "--timeout=60s"];
        t.kubectl_text(&wait);
        t.kubectl_text(&["scale", "deployment/shop", "--replicas=5"]);
        t.kubectl_text(&wait);
        let words = "mkdir /m; mount -t tmpfs none /m && echo -n my last words >/dev/termination-log; exit 3";
        let privileged = json!({"securityContext": {"privileged": true}});
        t.pod("crash", json!({"restartPolicy": "Never", "containers": [busybox_with(words, privileged)]})).await;
        let pod = t.until("crash", "at its end", has_ended).await;
        let ended = terminated(&pod, "main").unwrap();
        assert_eq!((exit_code(&pod, "main"), ended.message.as_deref()), (Some(3), Some("my last words")));
        t.kubectl_text(&["delete", "deployment", "shop", "--cascade=foreground", "--timeout=60s"]);
        t.delete("crash", None).await;
        t.gone("crash", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_runs_on_containerd_is_adopted_by_the_next_process() {
    on_containerd("taken-over", async |t| {
        let before = Leaks::of(&t.node);
        t.pod("web", json!({"containers": [busybox(SERVE), container("other", STAY)]})).await;
        let first = t.running("web").await;
        for _ in 0..2 {
            t.node.restart(&t.client).await;
        }
        assert_eq!(t.log_with("web", "main", "up").await, "up\n", "its log is served again");
        assert_eq!(fetched(t, "web", 8080).await, "web\n");
        assert_eq!(t.kubectl_text(&["exec", "web", "-c", "other", "--", "hostname"]), "web\n");
        let last = t.running("web").await;
        for name in ["main", "other"] {
            assert_eq!(identity(&last, name), identity(&first, name));
        }
        t.node.kill9();
        t.delete("web", Some(2)).await;
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        t.gone("web", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_kill_halfway_to_a_pod_on_containerd_leaves_nothing() {
    let Some(containerd) = Containerd::from_environment() else { return };
    for step in ["plug", "create", "remove"] {
        killed_at_on(&format!("cri-{step}"), step, containerd.options());
    }
}
