//! The Node object, its Lease, and how a node comes and goes.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::docker::Docker;
use crate::harness::leaks::Leaks;
use crate::harness::node::{Node, Options, condition, output};
use crate::harness::pods::{busybox, identity, is_ready, phase, pod_reason, sleeper, terminated};
use crate::harness::wait::{SOON, watch_until};
use crate::harness::{Case, on_cluster, on_own_node, on_shared_node};

fn reason(node: &NodeObject, type_: &str) -> String {
    let conditions = node.status.as_ref().unwrap().conditions.as_ref().unwrap();
    let found = conditions.iter().find(|c| c.type_ == type_).unwrap();
    format!("{}: {}", found.reason.clone().unwrap_or_default(), found.message.clone().unwrap_or_default())
}

fn leases(t: &Case) -> Api<Lease> {
    Api::namespaced(t.client.clone(), "kube-node-lease")
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_node_registers_with_all_a_kubelet_puts_there() {
    on_shared_node(async |t| {
        let node = t.node.ready(&t.client).await;
        let labels = node.labels();
        for (key, value) in [
            ("kubernetes.io/hostname", t.node.name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/os", "linux"),
            ("lambdalet.dev/test", t.node.name.as_str()),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        let machine = output("uname", &["-m"]);
        let arch = if machine.trim() == "aarch64" { "arm64" } else { "amd64" };
        assert_eq!(labels["kubernetes.io/arch"], arch);
        assert!(!labels.contains_key("type"), "type=virtual-kubelet only if asked");

        let status = node.status.as_ref().unwrap();
        let address = |type_: &str| {
            let found = status.addresses.iter().flatten().find(|a| a.type_ == type_);
            found.map(|a| a.address.clone()).unwrap_or_default()
        };
        assert_eq!(
            (address("InternalIP").as_str(), address("Hostname")),
            (t.cluster.fact("HOST_ADDRESS"), t.node.name.clone())
        );
        let port = status.daemon_endpoints.as_ref().unwrap().kubelet_endpoint.as_ref().unwrap().port;
        assert_eq!(port, i32::from(t.node.port));

        let info = status.node_info.as_ref().unwrap();
        assert_eq!(info.kernel_version, output("uname", &["-r"]).trim());
        assert_eq!((info.operating_system.as_str(), info.architecture.as_str()), ("linux", arch));
        assert!(info.container_runtime_version.starts_with("docker://"), "{info:?}");
        assert!(info.kubelet_version.starts_with("v1.") && info.kubelet_version.contains("+lambdalet."), "{info:?}");
        for (name, value) in [("bootID", &info.boot_id), ("osImage", &info.os_image)] {
            assert!(!value.is_empty(), "{name}");
        }
        let handlers: Vec<_> = status.runtime_handlers.iter().flatten().filter_map(|h| h.name.clone()).collect();
        assert!(handlers.contains(&"docker".to_owned()) || handlers.contains(&String::new()), "{handlers:?}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn capacity_is_measured_and_allocatable_is_less() {
    on_shared_node(async |t| {
        let node = t.node.ready(&t.client).await;
        let status = node.status.unwrap();
        let (capacity, allocatable) = (status.capacity.unwrap(), status.allocatable.unwrap());
        let cpus = output("nproc", &["--all"]);
        assert_eq!(capacity["cpu"].0, cpus.trim());
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let total = meminfo.lines().next().unwrap().split_whitespace().nth(1).unwrap();
        assert_eq!(capacity["memory"].0, format!("{total}Ki"));
        assert_eq!(capacity["pods"].0, "110");
        let kibi = |q: &str| q.trim_end_matches("Ki").parse::<u64>().unwrap();
        assert_eq!(kibi(&capacity["memory"].0) - kibi(&allocatable["memory"].0), 100 * 1024, "memory.available<100Mi");
        assert!(kibi(&allocatable["ephemeral-storage"].0) < kibi(&capacity["ephemeral-storage"].0));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn every_condition_says_what_is_so() {
    on_shared_node(async |t| {
        let node = t.node.ready(&t.client).await;
        for (type_, reason) in [
            ("MemoryPressure", "KubeletHasSufficientMemory"),
            ("DiskPressure", "KubeletHasNoDiskPressure"),
            ("PIDPressure", "KubeletHasSufficientPID"),
            ("Ready", "KubeletReady"),
        ] {
            let conditions = node.status.as_ref().unwrap().conditions.as_ref().unwrap();
            let found = conditions.iter().find(|c| c.type_ == type_).unwrap_or_else(|| panic!("no {type_}"));
            assert_eq!(found.reason.as_deref(), Some(reason));
            assert!(found.last_heartbeat_time.is_some() && found.last_transition_time.is_some());
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_images_on_the_host_are_listed() {
    on_shared_node(async |t| {
        t.node
            .until(&t.client, "listing an image", SOON, |node| {
                let images = node.status.iter().flat_map(|s| s.images.iter().flatten());
                images.into_iter().any(|i| {
                    i.size_bytes.is_some_and(|s| s > 0)
                        && i.names.iter().flatten().any(|n| n.ends_with("lambda/python:3.12"))
                })
            })
            .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_lease_belongs_to_the_node_and_is_renewed_every_ten_seconds() {
    on_shared_node(async |t| {
        let node = t.node.ready(&t.client).await;
        let held = |l: &Lease| l.spec.as_ref().is_some_and(|s| s.renew_time.is_some());
        let lease = watch_until(leases(t), &t.node.name, "there", SOON, |l| l.is_some_and(held)).await.unwrap();
        let spec = lease.spec.as_ref().unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some(t.node.name.as_str()));
        assert_eq!(spec.lease_duration_seconds, Some(40));
        let owner = &lease.owner_references()[0];
        assert_eq!((owner.kind.as_str(), Some(&owner.uid)), ("Node", node.metadata.uid.as_ref()));
        let renewed = |l: &Lease| l.spec.as_ref().unwrap().renew_time.clone().unwrap().0;
        // A node that registered a moment ago may renew once more at once; from then on it keeps its pace.
        let mut times = vec![renewed(&lease)];
        for _ in 0..2 {
            let last = times[times.len() - 1];
            let next = |l: Option<&Lease>| l.is_some_and(|l| renewed(l) > last);
            let lease = watch_until(leases(t), &t.node.name, "renewed", Duration::from_secs(15), next).await.unwrap();
            times.push(renewed(&lease));
        }
        let gap = times[2].duration_since(times[1]).as_secs_f64();
        assert!((8.0..13.0).contains(&gap), "{gap} s between renewals");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn taints_labels_and_reservations_are_as_flagged() {
    let flags = [
        "--register-with-taints=lambdalet.dev/only=us:NoSchedule",
        "--virtual-kubelet-label",
        "--max-pods=7",
        "--system-reserved=cpu=250m,memory=64Mi",
        "--kube-reserved=cpu=250m",
    ];
    on_own_node("flagged", Options::flags(&flags), async |t| {
        let node = t.node.ready(&t.client).await;
        let taints = node.spec.as_ref().unwrap().taints.clone().unwrap_or_default();
        let ours =
            taints.iter().find(|taint| taint.key == "lambdalet.dev/only").unwrap_or_else(|| panic!("{taints:?}"));
        assert_eq!((ours.value.as_deref(), ours.effect.as_str()), (Some("us"), "NoSchedule"));
        assert_eq!(node.labels()["type"], "virtual-kubelet");
        let status = node.status.as_ref().unwrap();
        let (capacity, allocatable) = (status.capacity.as_ref().unwrap(), status.allocatable.as_ref().unwrap());
        assert_eq!(allocatable["pods"].0, "7");
        let cpus: u32 = capacity["cpu"].0.parse().unwrap();
        let left = allocatable["cpu"]
            .0
            .parse::<u32>()
            .map_or_else(|_| allocatable["cpu"].0.clone(), |n| format!("{}m", n * 1000));
        assert_eq!(left, format!("{}m", cpus * 1000 - 500));

        t.pod("untolerant", sleeper()).await;
        t.until("untolerant", "refused by the scheduler", |p| {
            crate::harness::pods::pod_condition(p, "PodScheduled")
                .is_some_and(|c| c.reason.as_deref() == Some("Unschedulable"))
        })
        .await;
        let mut spec = sleeper();
        spec["tolerations"] = json!([{"key": "lambdalet.dev/only", "operator": "Exists"}]);
        t.pod("tolerant", spec).await;
        t.running("tolerant").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn without_a_range_flag_pods_get_addresses_of_the_nodes_pod_cidr() {
    on_cluster(async |cluster, client| {
        let node = Node::without_range(cluster, "assigned");
        node.spawn(&[]);
        let node = Arc::new(node);
        let object = node.ready(client).await;
        let assigned = |n: &NodeObject| n.spec.as_ref().is_some_and(|s| s.pod_cidr.is_some());
        let object = if assigned(&object) { object } else { node.until(client, "given a range", SOON, assigned).await };
        let range: ipnet::IpNet = object.spec.unwrap().pod_cidr.unwrap().parse().unwrap();
        Case::run(cluster, client, &node, async |t| {
            t.pod("web", sleeper()).await;
            let pod = t.running("web").await;
            let address: std::net::IpAddr = crate::harness::pods::pod_ip(&pod).parse().unwrap();
            assert!(range.contains(&address), "{address} is not in {range}");
        })
        .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deleted_node_object_is_registered_again_and_its_pods_stay() {
    on_own_node("deleted", Options::default(), async |t| {
        let before = t.node.ready(&t.client).await;
        let nodes: Api<NodeObject> = Api::all(t.client.clone());
        nodes.delete(&t.node.name, &DeleteParams::default()).await.unwrap();
        let after = t
            .node
            .until(&t.client, "registered again", SOON, |n| {
                n.uid() != before.uid() && condition(n, "Ready") == Some("True")
            })
            .await;
        assert_eq!(after.labels()["lambdalet.dev/test"], t.node.name);
        let lease = watch_until(leases(t), &t.node.name, "the new Node's", Duration::from_secs(30), |l| {
            l.is_some_and(|l| l.owner_references().first().is_some_and(|o| Some(&o.uid) == after.metadata.uid.as_ref()))
        })
        .await;
        assert!(lease.is_some());
        t.pod("web", sleeper()).await;
        t.running("web").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_condition_that_somebody_changes_is_put_right_and_a_label_at_the_next_start() {
    on_own_node("changed", Options::default(), async |t| {
        let nodes: Api<NodeObject> = Api::all(t.client.clone());
        let unknown =
            json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}});
        nodes.patch_status(&t.node.name, &PatchParams::default(), &Patch::Strategic(unknown)).await.unwrap();
        t.node.ready(&t.client).await;
        let change = json!({"metadata": {"labels": {"kubernetes.io/os": "plan9", "somebodys": "own"}}});
        nodes.patch(&t.node.name, &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
        t.node.restart(&t.client).await;
        let node = t.node.until(&t.client, "linux again", SOON, |n| n.labels()["kubernetes.io/os"] == "linux").await;
        assert_eq!(node.labels()["somebodys"], "own", "labels of others stay");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_clean_shutdown_leaves_pods_running_and_the_node_ready() {
    on_own_node("leaves", Options::default(), async |t| {
        t.pod("web", sleeper()).await;
        let before = t.running("web").await;
        let status = t.node.stop(Duration::from_secs(15)).await;
        assert!(status.success(), "{status}");
        let nodes: Api<NodeObject> = Api::all(t.client.clone());
        assert_eq!(condition(&nodes.get(&t.node.name).await.unwrap(), "Ready"), Some("True"));
        let pod = t.api::<Pod>().get("web").await.unwrap();
        assert_eq!(identity(&pod, "main"), identity(&before, "main"));
        let id = identity(&pod, "main").0;
        let state = output("docker", &["inspect", "-f", "{{.State.Running}}", id.trim_start_matches("docker://")]);
        assert_eq!(state.trim(), "true");
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        assert_eq!(t.log_with("web", "main", "up").await, "up\n");
        let after = t.running("web").await;
        assert_eq!(identity(&after, "main"), identity(&before, "main"), "the same run after all");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_clean_shutdown_without_pods_leaves_no_cgroups() {
    on_own_node("empty", Options::default(), async |t| {
        t.run_pod("short", json!({"containers": [busybox("true")]})).await;
        t.delete("short", Some(0)).await;
        t.gone("short", SOON).await;
        t.nothing_remains().await;
        let pattern = format!("*lambdalet*{}*", t.node.owner().unwrap());
        let cgroups = || output("find", &["/sys/fs/cgroup", "-type", "d", "-path", &pattern]);
        assert_ne!(cgroups(), "", "there were none to leave behind");
        let status = t.node.stop(Duration::from_secs(15)).await;
        assert!(status.success(), "{status}");
        assert_eq!(cgroups(), "");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn drain_on_exit_ends_pods_by_their_grace_and_leaves_nothing() {
    on_own_node("drains", Options::flags(&["--drain-on-exit"]), async |t| {
        t.pod("polite", json!({"restartPolicy": "Never", "containers": [busybox("trap 'sleep 1; exit 5' TERM; echo up; while true; do sleep 3600 & wait; done")]})).await;
        let mut deaf =
            json!({"restartPolicy": "Never", "containers": [busybox("trap '' TERM; while true; do sleep 1; done")]});
        deaf["terminationGracePeriodSeconds"] = json!(3);
        t.pod("deaf", deaf).await;
        t.running("polite").await;
        t.running("deaf").await;
        t.node.signal(Signal::SIGTERM);
        let nodes: Api<NodeObject> = Api::all(t.client.clone());
        watch_until(nodes, &t.node.name, "NotReady at once", Duration::from_secs(5), |n| {
            n.is_some_and(|n| condition(n, "Ready") == Some("False"))
        })
        .await;
        let status = tokio::time::timeout(SOON, t.node.ended()).await.unwrap();
        assert!(status.success(), "{status}");
        for (name, code) in [("polite", 5), ("deaf", 137)] {
            let pod = t.api::<Pod>().get(name).await.unwrap();
            assert_eq!((phase(&pod), pod_reason(&pod)), ("Failed", "Terminated"), "{name}");
            assert_eq!(terminated(&pod, "main").map(|t| t.exit_code), Some(code), "{name}");
        }
        let left = Leaks::of(&t.node);
        assert_eq!((left.links, left.mounts, left.namespaces), Default::default());
        let running = output(
            "docker",
            &["ps", "-q", "--filter", &format!("label=lambdalet.dev/owner={}", t.node.owner().unwrap())],
        );
        assert_eq!(running, "", "containers still run");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_second_signal_aborts_a_drain() {
    on_own_node("aborts", Options::flags(&["--drain-on-exit"]), async |t| {
        let mut deaf = json!({"containers": [busybox("trap '' TERM; while true; do sleep 1; done")]});
        deaf["terminationGracePeriodSeconds"] = json!(600);
        t.pod("deaf", deaf).await;
        t.running("deaf").await;
        t.node.signal(Signal::SIGTERM);
        t.event("deaf", "Killing").await;
        assert!(t.node.runs());
        t.node.signal(Signal::SIGTERM);
        let status = tokio::time::timeout(Duration::from_secs(5), t.node.ended()).await.expect("it still runs");
        assert!(!status.success(), "{status}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_without_its_docker_is_not_ready_and_says_why_until_it_is_back() {
    on_cluster(async |cluster, client| {
        let mut docker = Docker::start(&[]).await;
        docker.load(crate::harness::BUSYBOX);
        let flags = ["--docker-endpoint", &docker.endpoint()];
        let node = Arc::new(Node::start(cluster, client, "dockerless", Options::flags(&flags)).await);
        Case::run(cluster, client, &node, async |t| {
            t.pod("before", sleeper()).await;
            t.running("before").await;
            docker.stop();
            let down = |n: &NodeObject| condition(n, "Ready") == Some("False");
            let object = node.until(client, "NotReady", SOON, down).await;
            let why = reason(&object, "Ready");
            assert!(why.starts_with("KubeletNotReady: ") && why.contains("container runtime is down"), "{why}");
            docker.run().await;
            node.ready(client).await;
            t.pod("after", sleeper()).await;
            t.running("after").await;
            // The daemon's end was the containers' end too; the Pod comes back by itself.
            t.until("before", "running again", is_ready).await;
            for name in ["before", "after"] {
                t.delete(name, Some(1)).await;
                t.gone(name, SOON).await;
            }
        })
        .await;
        drop(node);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_that_starts_before_its_docker_registers_and_becomes_ready_later() {
    on_cluster(async |cluster, client| {
        let mut docker = Docker::stopped(&[]);
        let node = Node::prepare(cluster, "early", &["--docker-endpoint".to_owned(), docker.endpoint()]);
        node.spawn(&[]);
        let down = |n: &NodeObject| condition(n, "Ready") == Some("False");
        let object = node.until(client, "NotReady", SOON, down).await;
        let why = reason(&object, "Ready");
        assert!(
            why.contains("container runtime is down") && why.contains(&docker.endpoint()["unix://".len()..]),
            "{why}"
        );
        docker.run().await;
        node.ready(client).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn its_own_api_answers_health_pods_and_metrics_to_the_api_server_only() {
    on_shared_node(async |t| {
        t.pod("web", sleeper()).await;
        t.running("web").await;
        let raw = |path: &str| t.kubectl_text(&["get", "--raw", &format!("/api/v1/nodes/{}/proxy{path}", t.node.name)]);
        assert_eq!(raw("/healthz"), "ok");
        let pods: serde_json::Value = serde_json::from_str(&raw("/pods")).unwrap();
        let names: Vec<_> = pods["items"].as_array().unwrap().iter().map(|p| p["metadata"]["name"].clone()).collect();
        assert!(names.contains(&json!("web")), "{names:?}");
        let metrics = raw("/metrics");
        let names = metrics.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
        assert!(names.clone().count() > 5, "{metrics}");
        for line in names {
            assert!(line.starts_with("lambdalet_") || line.starts_with("process_"), "{line}");
        }

        let anonymous = |path: &str| {
            output(
                "curl",
                &[
                    "-sk",
                    "--noproxy",
                    "*",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    &format!("https://127.0.0.1:{}{path}", t.node.port),
                ],
            )
        };
        for path in ["/pods", "/metrics", &format!("/containerLogs/{}/web/main", t.namespace)] {
            assert_eq!(anonymous(path), "401", "{path}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_token_is_let_in_only_for_what_its_owner_may() {
    on_shared_node(async |t| {
        let token = |account: &str| t.kubectl_text(&["create", "token", account]);
        t.kubectl_text(&["create", "serviceaccount", "reader"]);
        let role = format!("{}-reader", t.namespace);
        let rule = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": role},
            "rules": [{"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]}],
        });
        let roles: Api<k8s_openapi::api::rbac::v1::ClusterRole> = Api::all(t.client.clone());
        roles.create(&kube::api::PostParams::default(), &serde_json::from_value(rule).unwrap()).await.unwrap();
        t.kubectl_text(&[
            "create",
            "clusterrolebinding",
            &role,
            "--clusterrole",
            &role,
            "--serviceaccount",
            &format!("{}:reader", t.namespace),
        ]);
        let ask = |account: &str, path: &str| {
            let bearer = format!("Authorization: Bearer {}", token(account).trim());
            output(
                "curl",
                &[
                    "-sk",
                    "--noproxy",
                    "*",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "-H",
                    &bearer,
                    &format!("https://127.0.0.1:{}{path}", t.node.port),
                ],
            )
        };
        assert_eq!(ask("reader", "/metrics"), "200");
        assert_eq!(ask("reader", "/pods"), "403");
        assert_eq!(ask("default", "/metrics"), "403");
        for kind in ["clusterrole", "clusterrolebinding"] {
            t.kubectl_text(&["delete", kind, &role]);
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn two_nodes_on_one_host_leave_each_other_alone() {
    on_own_node("neighbour", Options::default(), async |t| {
        t.pod("web", sleeper()).await;
        let before = t.running("web").await;
        let other = Node::start(&t.cluster, &t.client, "other", Options::default()).await;
        other.restart(&t.client).await;
        drop(other);
        let after = t.api::<Pod>().get("web").await.unwrap();
        assert_eq!(identity(&after, "main"), identity(&before, "main"));
        assert_eq!(t.kubectl_text(&["logs", "web"]), "up\n");
    });
}
