//! In-place resize: what `kubectl patch --subresource resize` does to a Pod that runs, down to the kernel.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::pods::{STAY, bare, busybox_with, pod_condition, status};
use crate::harness::{Case, on_shared_node};
use crate::resources::value;

fn amounts(cpu: &str, memory: &str) -> Value {
    json!({"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}})
}

async fn resize(t: &Case, name: &str, resources: Value) {
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}});
    let pods = t.api::<Pod>();
    pods.patch_subresource("resize", name, &PatchParams::default(), &Patch::Strategic(patch)).await.unwrap();
}

/// Waits until the container has these amounts, and nothing of the resize is left in the conditions.
async fn resized(t: &Case, name: &str, memory: &str) -> Pod {
    let done = |pod: &Pod| {
        let main = status(pod, "main").and_then(|c| c.resources.clone()).and_then(|r| r.limits);
        let over = ["PodResizePending", "PodResizeInProgress"].iter().all(|type_| pod_condition(pod, type_).is_none());
        over && main.is_some_and(|limits| limits["memory"].0 == memory)
    };
    t.until(name, "resized", done).await
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_is_resized_as_it_runs_and_the_kernel_knows() {
    on_shared_node(async |t| {
        let resources = json!({"resources": amounts("100m", "32Mi")});
        t.pod("grows", json!({"containers": [busybox_with(STAY, resources)]})).await;
        let before = t.running("grows").await;
        let id = status(&before, "main").unwrap().container_id.clone().unwrap();
        for (cpu, memory, bytes, quota) in [("300m", "64Mi", 64u64 << 20, "30000"), ("200m", "48Mi", 48 << 20, "20000")]
        {
            resize(t, "grows", amounts(cpu, memory)).await;
            let pod = resized(t, "grows", memory).await;
            let main = status(&pod, "main").unwrap();
            assert_eq!((main.restart_count, main.container_id.as_ref()), (0, Some(&id)));
            assert_eq!(main.allocated_resources.as_ref().unwrap()["cpu"].0, cpu);
            for group in [bare(&id).to_owned(), format!("pod{}", pod.uid().unwrap())] {
                assert_eq!(value(&group, "memory.limit_in_bytes", "memory.max"), bytes.to_string(), "{group}");
                let found = value(&group, "cpu.cfs_quota_us", "cpu.max");
                assert_eq!(found.split(' ').next(), Some(quota), "{group}: {found}");
            }
        }
        let told = t.event("grows", "ResizeCompleted").await;
        assert!(told.starts_with("Pod resize completed: {"), "{told}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_resize_policy_restarts_the_container_and_only_that() {
    on_shared_node(async |t| {
        let policy = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
        let main = busybox_with(STAY, json!({"resources": amounts("100m", "32Mi"), "resizePolicy": policy}));
        t.pod("restarts", json!({"containers": [main], "restartPolicy": "OnFailure"})).await;
        t.running("restarts").await;
        resize(t, "restarts", amounts("100m", "64Mi")).await;
        let again = |pod: &Pod| status(pod, "main").is_some_and(|main| main.restart_count == 1 && main.ready);
        let pod = t.until("restarts", "restarted", again).await;
        let id = status(&pod, "main").unwrap().container_id.clone().unwrap();
        let limit = value(bare(&id), "memory.limit_in_bytes", "memory.max");
        assert_eq!(limit, (64u64 << 20).to_string());
        resized(t, "restarts", "64Mi").await;
    });
}
