//! Probes and lifecycle hooks on real containers.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::harness::node::Options;
use crate::harness::pods::{
    STAY, busybox_with, exit_code, holds, is_ready, last_terminated, phase, pod_condition, restarts, status, waits_for,
};
use crate::harness::wait::SOON;
use crate::harness::{Case, on_own_node, on_shared_node};

/// Serves /www on port 8080 until it is told to end.
const SERVE: &str = "mkdir -p /www; trap 'exit 0' TERM; httpd -p 8080 -h /www; while true; do sleep 3600 & wait; done";

/// A probe that is tried every second, one result being enough.
fn quick(mut probe: Value) -> Value {
    for (field, number) in [("periodSeconds", 1), ("failureThreshold", 1)] {
        probe[field] = json!(number);
    }
    probe
}

fn run(t: &Case, pod: &str, script: &str) {
    t.kubectl_text(&["exec", pod, "--", "sh", "-c", script]);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn readiness_and_liveness_are_asked_in_each_way_and_mean_what_they_say() {
    on_shared_node(async |t| {
        let probes = json!({
            "ports": [{"name": "web", "containerPort": 8080}],
            "startupProbe": quick(json!({"tcpSocket": {"port": "web"}, "terminationGracePeriodSeconds": 1})),
            "readinessProbe": quick(json!({"httpGet": {"path": "/ready", "port": "web"}})),
            "livenessProbe": quick(json!({"exec": {"command": ["sh", "-c", "test ! -e /tmp/dead || { echo it is dead; false; }"]}})),
        });
        let script = format!("sleep 1; {SERVE}");
        let patient = {
            let mut probes = probes;
            probes["startupProbe"]["failureThreshold"] = json!(30);
            probes
        };
        t.pod("web", json!({"containers": [busybox_with(&script, patient)]})).await;
        let started = |p: &Pod| status(p, "main").is_some_and(|s| s.started == Some(true));
        let pod = t.until("web", "started", started).await;
        assert!(!holds(&pod, "Ready") && phase(&pod) == "Running");
        let message = pod_condition(&pod, "ContainersReady").unwrap().message.clone().unwrap();
        assert_eq!(message, "containers with unready status: [main]");
        let unhealthy = t.event("web", "Unhealthy").await;
        assert!(unhealthy.contains("probe failed"), "{unhealthy}");
        run(t, "web", "echo yes >/www/ready");
        t.until("web", "ready", is_ready).await;
        run(t, "web", "rm /www/ready");
        t.until("web", "not ready", |p| !holds(p, "Ready")).await;
        run(t, "web", "touch /tmp/dead");
        let pod = t.until("web", "restarted", |p| restarts(p, "main") == 1).await;
        assert_eq!(last_terminated(&pod, "main").unwrap().exit_code, 0, "it ended when it was told to");
        let killing = t.event("web", "Killing").await;
        assert_eq!(killing, "Container main failed liveness probe, will be restarted");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_ready_pod_stays_ready_while_the_node_agent_is_replaced() {
    on_own_node("probing", Options::default(), async |t| {
        let probes = json!({
            "startupProbe": quick(json!({"tcpSocket": {"port": 8080}})),
            "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 2},
        });
        t.pod(
            "web",
            json!({"containers": [busybox_with(&format!("mkdir -p /www; echo hi >/www/index.html; {SERVE}"), probes)]}),
        )
        .await;
        let since = |pod: &Pod| pod_condition(pod, "Ready").unwrap().last_transition_time.clone();
        let first = t.running("web").await;
        for _ in 0..3 {
            t.node.restart(&t.client).await;
        }
        run(t, "web", "rm /www/index.html");
        let pod = t.until("web", "not ready: it is asked again", |p| !holds(p, "Ready")).await;
        assert!(since(&pod) > since(&first) && restarts(&pod, "main") == 0);
        run(t, "web", "echo hi >/www/index.html");
        let again = t.running("web").await;
        t.node.restart(&t.client).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(since(&t.running("web").await), since(&again), "it never was unready in between");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn hooks_run_after_the_start_and_before_the_stop() {
    on_shared_node(async |t| {
        let dir = tempfile::tempdir().unwrap();
        let say = |words: &str| json!({"exec": {"command": ["sh", "-c", format!("echo {words} >>/v/order")]}});
        let more = json!({
            "lifecycle": {"postStart": say("started"), "preStop": say("stopping")},
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        });
        let script = "trap 'echo told >>/v/order; exit 0' TERM; while true; do sleep 3600 & wait; done";
        let volumes = json!([{"name": "v", "hostPath": {"path": dir.path()}}]);
        t.pod("hooked", json!({"volumes": volumes, "containers": [busybox_with(script, more)]})).await;
        t.running("hooked").await;
        assert_eq!(std::fs::read_to_string(dir.path().join("order")).unwrap(), "started\n");
        t.delete("hooked", None).await;
        t.gone("hooked", SOON).await;
        assert_eq!(std::fs::read_to_string(dir.path().join("order")).unwrap(), "started\nstopping\ntold\n");

        let failing = json!({"lifecycle": {"postStart": {"exec": {"command": ["false"]}}}});
        t.pod("failing", json!({"containers": [busybox_with(STAY, failing)]})).await;
        t.event("failing", "FailedPostStartHook").await;
        let looping = |p: &Pod| restarts(p, "main") >= 1 && waits_for(p, "main") == Some("CrashLoopBackOff");
        t.until("failing", "restarted and held back", looping).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_containers_end_is_in_the_api_at_once() {
    on_shared_node(async |t| {
        let mut best = Duration::MAX;
        for number in 0..5 {
            let name = format!("brief-{number}");
            let dir = tempfile::tempdir().unwrap();
            let more = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
            let volumes = json!([{"name": "v", "hostPath": {"path": dir.path()}}]);
            // It ends when the last writer, the container, is gone.
            let pipe = dir.path().join("alive");
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
            let mut reader = pipe::OpenOptions::new().open_receiver(&pipe).unwrap();
            let script = "exec 3>/v/alive; echo up >&3; sleep 1; exit 3";
            let spec =
                json!({"restartPolicy": "Never", "volumes": volumes, "containers": [busybox_with(script, more)]});
            t.pod(&name, spec).await;
            let gone = async {
                let mut bytes = [0; 8];
                while reader.read(&mut bytes).await.unwrap() == 0 {
                    // Nobody writes yet.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                while reader.read(&mut bytes).await.unwrap() > 0 {}
                Instant::now()
            };
            let told = async {
                t.until(&name, "at its end", |p| exit_code(p, "main") == Some(3)).await;
                Instant::now()
            };
            let (gone, told) = tokio::join!(gone, told);
            best = best.min(told.saturating_duration_since(gone));
        }
        eprintln!("the best of five took {best:?}");
        // A tenth of a second is what it may take on a quiet machine; other tests use this one too.
        assert!(best <= Duration::from_millis(300), "the best of five took {best:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_being_deleted_is_told_to_be_unready_while_it_ends() {
    on_shared_node(async |t| {
        let more = json!({
            "readinessProbe": quick(json!({"exec": {"command": ["test", "!", "-e", "/tmp/ending"]}})),
            "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "touch /tmp/ending; sleep 6"]}}},
        });
        t.pod("leaving", json!({"terminationGracePeriodSeconds": 20, "containers": [busybox_with(STAY, more)]})).await;
        t.running("leaving").await;
        t.delete("leaving", None).await;
        let unready = |p: &Pod| {
            !holds(p, "Ready") && status(p, "main").is_some_and(|s| s.state.as_ref().unwrap().running.is_some())
        };
        t.until("leaving", "unready while it still runs", unready).await;
        t.gone("leaving", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn probes_are_counted_for_prometheus() {
    on_shared_node(async |t| {
        let probe = json!({"livenessProbe": quick(json!({"exec": {"command": ["true"]}}))});
        t.pod(
            "counted",
            json!({"containers": [busybox_with(STAY, probe), crate::harness::pods::container("plain", STAY)]}),
        )
        .await;
        t.running("counted").await;
        let path = format!("/api/v1/nodes/{}/proxy/metrics/probes", t.node.name);
        let wanted =
            [format!("namespace=\"{}\"", t.namespace), "probe_type=\"Liveness\",result=\"successful\"".to_owned()];
        crate::harness::wait::poll("counted", SOON, async || {
            let text = t.kubectl_text(&["get", "--raw", &path]);
            let line = text.lines().find(|line| wanted.iter().all(|part| line.contains(part)));
            line.map(|_| ()).ok_or(text)
        })
        .await;
    });
}
