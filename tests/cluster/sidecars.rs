//! Sidecars on real containers, and restart policies of single containers.

use serde_json::{Value, json};

use crate::harness::on_shared_node;
use crate::harness::pods::{busybox_with, container, exit_code, holds, phase, restarts, status, terminated, with};
use crate::harness::wait::SOON;

/// Notes its name in a file when it starts and when it is told to end.
fn noting(name: &str) -> String {
    format!(
        "trap 'echo {name} ends >>/v/order; exit 0' TERM; echo {name} >>/v/order; touch /tmp/up; while true; do sleep 3600 & wait; done"
    )
}

fn mounted(container: Value) -> Value {
    with(container, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}))
}

fn sidecar(name: &str) -> Value {
    let probe = json!({"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1, "failureThreshold": 30});
    let script = format!("sleep 1; {}", noting(name));
    with(mounted(container(name, &script)), json!({"restartPolicy": "Always", "startupProbe": probe}))
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn sidecars_start_in_order_and_end_in_reverse_after_the_main_container() {
    on_shared_node(async |t| {
        let dir = tempfile::tempdir().unwrap();
        let setup = mounted(container("setup", "echo setup >>/v/order"));
        let spec = json!({
            "volumes": [{"name": "v", "hostPath": {"path": dir.path()}}],
            "initContainers": [sidecar("one"), setup, sidecar("two")],
            "containers": [mounted(container("main", &noting("main")))],
        });
        t.pod("proxied", spec).await;
        let pod = t.running("proxied").await;
        for name in ["one", "two"] {
            let status = status(&pod, name).unwrap();
            assert!(status.ready && status.started == Some(true), "{status:?}");
        }
        assert!(holds(&pod, "Initialized"));
        let order = || std::fs::read_to_string(dir.path().join("order")).unwrap();
        t.log("proxied", "main").await;
        crate::harness::wait::poll("all started", SOON, async || {
            if order() == "one\nsetup\ntwo\nmain\n" { Ok(()) } else { Err(order()) }
        })
        .await;
        t.delete("proxied", None).await;
        t.gone("proxied", SOON).await;
        assert_eq!(order(), "one\nsetup\ntwo\nmain\nmain ends\ntwo ends\none ends\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_job_with_a_sidecar_succeeds_with_its_main_container() {
    on_shared_node(async |t| {
        // It crashes once on the way, and comes back.
        let side = with(
            mounted(container(
                "side",
                "test -e /v/once || { touch /v/once; exit 1; }; trap 'exit 5' TERM; while true; do sleep 3600 & wait; done",
            )),
            json!({"restartPolicy": "Always"}),
        );
        let spec = json!({
            "volumes": [{"name": "v", "emptyDir": {}}],
            "initContainers": [side],
            "containers": [mounted(container("main", "while [ ! -e /v/once ]; do sleep 0.1; done; sleep 2"))],
        });
        let pod = t.run_pod("job", spec).await;
        assert_eq!((phase(&pod), exit_code(&pod, "main"), exit_code(&pod, "side")), ("Succeeded", Some(0), Some(5)));
        assert_eq!(restarts(&pod, "side"), 1);
        let times = ["main", "side"].map(|name| terminated(&pod, name).unwrap().finished_at.as_ref().unwrap().0);
        assert!(times[0] <= times[1], "{times:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_restarts_by_rules_of_its_own() {
    on_shared_node(async |t| {
        let own = json!({
            "restartPolicy": "Never",
            "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        });
        let script = "test -e /v/tried && exit 0; touch /v/tried; exit 42";
        let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [busybox_with(script, own)]});
        let pod = t.run_pod("ruled", spec).await;
        assert_eq!((phase(&pod), restarts(&pod, "main")), ("Succeeded", 1));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_rule_restarts_every_container_of_the_pod() {
    on_shared_node(async |t| {
        let own = json!({
            "restartPolicy": "Never",
            "restartPolicyRules": [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        });
        // All of them have run once before the rule strikes.
        let wait = |count: &str| format!("while [ \"$(grep -c other /v/order)\" -lt {count} ]; do sleep 0.1; done");
        let script = format!("test -e /v/tried && exit 0; {}; touch /v/tried; exit 88", wait("1"));
        let setup = mounted(container("setup", "echo setup >>/v/order"));
        let other = mounted(container("other", &format!("echo other >>/v/order; {}", wait("2"))));
        let spec = json!({
            "volumes": [{"name": "v", "emptyDir": {}}],
            "initContainers": [setup],
            "containers": [busybox_with(&script, own), other],
        });
        let pod = t.run_pod("again", spec).await;
        assert_eq!(phase(&pod), "Succeeded");
        assert!(
            ["setup", "main", "other"].iter().all(|name| restarts(&pod, name) == 1),
            "{}",
            crate::harness::wait::show(&pod)
        );
    });
}
