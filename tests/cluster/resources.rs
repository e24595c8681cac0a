//! Requests and limits: cgroup files, QoS classes, OOM scores.

use std::path::PathBuf;

use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::harness::node::output;
use crate::harness::on_shared_node;
use crate::harness::pods::{STAY, bare, busybox_with, container, sleeper, status, with};

/// The value of a file in a cgroup directory whose path ends in or contains `name`.
pub(crate) fn value(name: &str, v1: &str, v2: &str) -> String {
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let file = if unified { v2 } else { v1 };
    let found = output("find", &["/sys/fs/cgroup", "-type", "d", "-name", &format!("*{name}*")]);
    let files = found.lines().map(|directory| PathBuf::from(directory).join(file));
    let mut values = files.filter_map(|path| std::fs::read_to_string(path).ok());
    values.next().unwrap_or_else(|| panic!("no {file} in a cgroup of {name}; its cgroups: {found:?}")).trim().to_owned()
}

fn limited(requests: Value, limits: Value) -> Value {
    json!({"resources": {"requests": requests, "limits": limits}})
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn limits_are_in_the_containers_cgroup() {
    on_shared_node(async |t| {
        let resources = limited(json!({"cpu": "250m", "memory": "32Mi"}), json!({"cpu": "500m", "memory": "64Mi"}));
        t.pod("limited", json!({"containers": [busybox_with(STAY, resources)]})).await;
        let pod = t.running("limited").await;
        let id = status(&pod, "main").unwrap().container_id.clone().unwrap();
        let id = bare(&id);
        assert_eq!(value(id, "memory.limit_in_bytes", "memory.max"), (64u64 << 20).to_string());
        assert!(["256", "10"].contains(&value(id, "cpu.shares", "cpu.weight").as_str()), "a quarter of 1024");
        assert!(["50000", "50000 100000"].contains(&value(id, "cpu.cfs_quota_us", "cpu.max").as_str()), "half a core");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_pod_as_a_whole_is_limited_to_the_sum_of_its_containers() {
    on_shared_node(async |t| {
        let resources = limited(json!({"cpu": "100m", "memory": "16Mi"}), json!({"cpu": "300m", "memory": "40Mi"}));
        let containers = json!([with(container("a", STAY), resources.clone()), with(container("b", STAY), resources)]);
        t.pod("pair", json!({"containers": containers})).await;
        let pod = t.running("pair").await;
        let group = format!("pod{}", pod.uid().unwrap());
        assert_eq!(value(&group, "memory.limit_in_bytes", "memory.max"), (80u64 << 20).to_string());
        assert!(["60000", "60000 100000"].contains(&value(&group, "cpu.cfs_quota_us", "cpu.max").as_str()));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_qos_class_follows_from_the_resources_and_places_the_cgroup() {
    on_shared_node(async |t| {
        let same = json!({"cpu": "50m", "memory": "16Mi"});
        let cases = [
            ("guaranteed", "Guaranteed", limited(same.clone(), same.clone())),
            ("burstable", "Burstable", limited(json!({"cpu": "10m"}), same)),
            ("besteffort", "BestEffort", json!({})),
        ];
        for (name, class, resources) in cases {
            t.pod(name, json!({"containers": [busybox_with(STAY, resources)]})).await;
            let pod = t.running(name).await;
            assert_eq!(pod.status.as_ref().unwrap().qos_class.as_deref(), Some(class));
            let group = format!("pod{}", pod.uid().unwrap());
            let paths = output("find", &["/sys/fs/cgroup", "-type", "d", "-name", &group]);
            assert!(!paths.is_empty(), "{group} has no cgroup");
            let within = paths.contains(&format!("/{name}/{group}"));
            assert_eq!(within, class != "Guaranteed", "{class}: {paths}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_best_effort_process_is_the_first_to_be_killed_for_memory() {
    on_shared_node(async |t| {
        assert_eq!(t.script("cat /proc/self/oom_score_adj").await, "1000\n");
        let resources = limited(json!({"memory": "64Mi"}), json!({"memory": "64Mi"}));
        let burstable = json!({"containers": [busybox_with("cat /proc/self/oom_score_adj", resources)]});
        let score: i32 = t.output_of("burstable", burstable).await.trim().parse().unwrap();
        assert!((2..1000).contains(&score), "between Guaranteed and BestEffort: {score}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn requests_of_running_pods_leave_less_for_others() {
    on_shared_node(async |t| {
        let node = t.node.ready(&t.client).await;
        let cpus: u32 = node.status.unwrap().allocatable.unwrap()["cpu"].0.parse().unwrap();
        let most = json!({"resources": {"requests": {"cpu": format!("{}m", cpus * 1000 - 600)}}});
        t.pod("first", json!({"containers": [busybox_with(STAY, most.clone())]})).await;
        t.running("first").await;
        t.pod("second", json!({"nodeName": t.node.name, "containers": [busybox_with(STAY, most.clone())]})).await;
        let pod = t.until("second", "refused", |p| crate::harness::pods::pod_reason(p) == "OutOfcpu").await;
        assert_eq!(crate::harness::pods::phase(&pod), "Failed");
        // The scheduler gives the share to the next one as soon as the object is gone; so does the node.
        t.delete("first", Some(0)).await;
        t.pod("third", json!({"containers": [busybox_with(STAY, most)]})).await;
        t.running("third").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn status_repeats_the_resources_that_were_given() {
    on_shared_node(async |t| {
        let mut spec = sleeper();
        spec["containers"][0]["resources"] = json!({"requests": {"cpu": "10m"}, "limits": {"memory": "32Mi"}});
        t.pod("limited", spec).await;
        let pod = t.running("limited").await;
        let main = status(&pod, "main").unwrap();
        let resources = main.resources.as_ref().unwrap();
        assert_eq!(resources.limits.as_ref().unwrap()["memory"].0, "32Mi");
        assert_eq!(main.allocated_resources.as_ref().unwrap()["cpu"].0, "10m");
    });
}
