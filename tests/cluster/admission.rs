//! What the node itself refuses, and who has to go for whom.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::harness::node::Options;
use crate::harness::pods::{STAY, busybox, busybox_with, has_ended, holds, phase, pod_reason, sleeper};
use crate::harness::{Case, on_own_node, on_shared_node};

/// Bound to the node by its name: the scheduler has no say.
fn placed(t: &Case, mut spec: Value) -> Value {
    spec["nodeName"] = json!(t.node.name);
    spec
}

fn message(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

async fn refused(t: &Case, name: &str, reason: &str) -> Pod {
    let pod = t.until(name, "refused", has_ended).await;
    assert_eq!((phase(&pod), pod_reason(&pod)), ("Failed", reason), "{}", message(&pod));
    assert!(message(&pod).starts_with("Pod was rejected: "), "{}", message(&pod));
    pod
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_critical_pod_has_the_place_of_one_that_is_not() {
    on_own_node("preempts", Options::flags(&["--max-pods=1"]), async |t| {
        t.pod("plain", placed(t, sleeper())).await;
        t.running("plain").await;
        t.pod("refused", placed(t, sleeper())).await;
        refused(t, "refused", "OutOfpods").await;
        let mut critical = placed(t, sleeper());
        critical["priorityClassName"] = json!("system-node-critical");
        t.pod("critical", critical).await;
        t.running("critical").await;
        let gone = t.api::<Pod>().get("plain").await.unwrap();
        assert_eq!((phase(&gone), pod_reason(&gone)), ("Failed", "Preempting"));
        assert_eq!(message(&gone), "Preempted in order to admit critical pod");
        assert!(holds(&gone, "DisruptionTarget"));
        assert_eq!(t.event("plain", "Preempting").await, "Preempted in order to admit critical pod");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_port_of_the_host_is_had_by_one_pod_at_a_time() {
    on_shared_node(async |t| {
        let port = crate::harness::node::free_port();
        let asking = || {
            let ports = json!({"ports": [{"containerPort": 80, "hostPort": port}]});
            placed(t, json!({"containers": [busybox_with(STAY, ports)]}))
        };
        t.pod("first", asking()).await;
        t.running("first").await;
        t.pod("second", asking()).await;
        let pod = refused(t, "second", "NodePorts").await;
        assert!(message(&pod).ends_with("node(s) didn't have free ports for the requested pod ports"));
        t.delete("first", Some(1)).await;
        t.gone("first", crate::harness::wait::SOON).await;
        t.pod("third", asking()).await;
        t.running("third").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_kernel_parameter_that_is_not_safe_is_set_where_the_operator_allows_it() {
    let setting = |name: &str| {
        let context = json!({"sysctls": [{"name": name, "value": "77"}]});
        json!({
            "restartPolicy": "Never", "securityContext": context,
            "containers": [busybox("cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax")],
        })
    };
    on_own_node("sysctls", Options::flags(&["--allowed-unsafe-sysctls=net.core.*"]), async |t| {
        let shown = t.output_of("allowed", setting("net.core.somaxconn")).await;
        assert_eq!(shown.lines().next(), Some("77"));
        t.pod("refused", placed(t, setting("kernel.msgmax"))).await;
        let pod = refused(t, "refused", "SysctlForbidden").await;
        assert!(message(&pod).ends_with("forbidden sysctl: \"kernel.msgmax\" not allowlisted"), "{}", message(&pod));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_user_namespace_of_its_own_is_refused_with_the_reason() {
    on_shared_node(async |t| {
        let mut spec = placed(t, sleeper());
        spec["hostUsers"] = json!(false);
        t.pod("mapped", spec).await;
        let pod = refused(t, "mapped", "UnsupportedPodFeature").await;
        assert!(message(&pod).contains("hostUsers: false"), "{}", message(&pod));
    });
}
