//! `/stats/summary`, the `/metrics/…` and what the node tells of itself.

use std::collections::BTreeMap;

use http::Method;
use lambdalet::kubelet_api::About;
use lambdalet::kubelet_api::targets::PodVolume;
use lambdalet::runtime::stats::{
    ContainerStats, CpuUsage, DiskUsage, ImageFs, Interface, Limits, MemoryUsage, SandboxStats, Traffic, Usage,
};
use lambdalet::runtime::types::{ContainerId, PodRef, SandboxId};
use lambdalet::runtime::{Kind, RuntimeError};
use serde_json::Value;

use crate::exposition::{Family, read};
use crate::support::{Node, Setup, request};

const TIME: i64 = 1_795_245_343;

fn usage(seconds: u64, megabytes: u64) -> Usage {
    Usage {
        time: jiff::Timestamp::from_second(TIME).unwrap(),
        cpu: Some(CpuUsage { total: seconds * 1_000_000_000, ..CpuUsage::default() }),
        memory: Some(MemoryUsage {
            usage: megabytes << 21,
            working_set: megabytes << 20,
            rss: megabytes << 19,
            ..MemoryUsage::default()
        }),
        tasks: Some(3),
        limits: Some(Limits { cpu_shares: Some(128), cpu_quota: None, cpu_period: None, memory: Some(64 << 20) }),
    }
}

/// A Pod of one container, whose names are as bad as names can be.
fn sandbox(number: u64) -> SandboxStats {
    let traffic = |bytes| Traffic { bytes, packets: 1, ..Traffic::default() };
    let disk = |bytes| Some(DiskUsage { bytes, inodes: 2, ..DiskUsage::default() });
    let started = jiff::Timestamp::from_millisecond(TIME * 1000 - 60_500).ok();
    SandboxStats {
        id: SandboxId::from(format!("sandbox-{number}")),
        pod: PodRef { uid: format!("uid-{number}"), namespace: "ns".into(), name: format!("p{number}") },
        started_at: started,
        cgroup: format!("/l/pod{number}"),
        usage: usage(number + 2, 8),
        network: Some(vec![Interface { name: "eth0".into(), received: traffic(100), sent: traffic(200) }]),
        containers: vec![ContainerStats {
            id: ContainerId::from(format!("container-{number}")),
            name: "c".into(),
            attempt: 1,
            image_ref: "odd\"image\\\n".into(),
            started_at: started,
            cgroup: format!("/l/pod{number}/c"),
            usage: usage(number + 1, 7),
            writable_layer: disk(4096),
            log: disk(512),
        }],
        volumes: Vec::new(),
    }
}

async fn node(pods: u64) -> Node {
    let directory = tempfile::tempdir().unwrap();
    let about = About {
        configuration: serde_json::json!({"kind": "KubeletConfiguration", "maxPods": 7}),
        flags: BTreeMap::from([("port".to_owned(), "1".to_owned())]),
        log_dir: directory.path().join("log"),
        ..About::default()
    };
    std::fs::create_dir_all(directory.path().join("log/below")).unwrap();
    std::fs::write(directory.path().join("log/below/a file"), "content\n").unwrap();
    std::fs::write(directory.path().join("secret"), "secret").unwrap();
    let node = Node::start(Setup { about, ..Setup::default() }).await;
    *node.world.stats.lock().unwrap() = Some((0..pods).map(sandbox).collect());
    node.cluster.granted.lock().unwrap().extend(["stats", "log", "checkpoint", "configz", "statusz"]);
    // The directory goes with the process.
    std::mem::forget(directory);
    node
}

async fn exposition(node: &Node, path: &str) -> BTreeMap<String, Family> {
    let mut client = node.api_server().await;
    let response = client.open(path, None).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let (status, text) = node.get(path).await;
    assert_eq!(status, 200, "{text}");
    read(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The one sample with these labels and no others.
fn only<'a>(
    families: &'a BTreeMap<String, Family>,
    name: &str,
    labels: &[(&str, &str)],
) -> &'a crate::exposition::Sample {
    let wanted = labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned())).collect();
    let family = families.get(name).unwrap_or_else(|| panic!("no {name}"));
    let found: Vec<_> = family.samples.iter().filter(|sample| sample.labels == wanted).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?} in {family:?}");
    found[0]
}

#[tokio::test]
async fn resource_metrics_are_those_of_a_kubelet() {
    let node = node(2).await;
    let families = exposition(&node, "/metrics/resource").await;
    let mut names: Vec<_> = families.keys().map(String::as_str).collect();
    names.sort_unstable();
    let wanted = [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_start_time_seconds",
        "node_cpu_usage_seconds_total",
        "node_memory_working_set_bytes",
        "pod_cpu_usage_seconds_total",
        "pod_memory_working_set_bytes",
        "resource_scrape_error",
        "scrape_error",
    ];
    assert_eq!(names, wanted);
    let container = [("container", "c"), ("namespace", "ns"), ("pod", "p1")];
    let sample = only(&families, "container_cpu_usage_seconds_total", &container);
    assert_eq!((sample.value, sample.time), (2.0, Some(TIME * 1000)));
    assert_eq!(only(&families, "container_memory_working_set_bytes", &container).value, f64::from(7 << 20));
    let sample = only(&families, "container_start_time_seconds", &container);
    assert_eq!((sample.value, sample.time), (TIME as f64 - 60.5, None));
    let pod = [("namespace", "ns"), ("pod", "p1")];
    assert_eq!(only(&families, "pod_cpu_usage_seconds_total", &pod).value, 3.0);
    assert_eq!(only(&families, "pod_memory_working_set_bytes", &pod).value, f64::from(8 << 20));
    assert!(only(&families, "node_cpu_usage_seconds_total", &[]).value > 0.0);
    assert!(only(&families, "node_memory_working_set_bytes", &[]).time.is_some());
    assert_eq!(only(&families, "resource_scrape_error", &[]).value, 0.0);
}

#[tokio::test]
async fn a_runtime_that_does_not_answer_is_an_error_in_the_figures() {
    let node = node(0).await;
    *node.world.stats.lock().unwrap() = None;
    let families = exposition(&node, "/metrics/resource").await;
    assert_eq!(only(&families, "resource_scrape_error", &[]).value, 1.0);
    assert!(only(&families, "node_cpu_usage_seconds_total", &[]).value > 0.0);
    for path in ["/metrics/cadvisor", "/stats/summary", "/runningpods/"] {
        let (status, text) = node.get(path).await;
        assert_eq!(status, 501, "{path}: {text}");
    }
}

#[tokio::test]
async fn cadvisor_metrics_have_the_names_and_labels_dashboards_query() {
    let node = node(2).await;
    let families = exposition(&node, "/metrics/cadvisor").await;
    let labels = |container, id, image, name, pod| {
        [("container", container), ("id", id), ("image", image), ("name", name), ("namespace", "ns"), ("pod", pod)]
    };
    let container = labels("c", "/l/pod1/c", "odd\"image\\\n", "container-1", "p1");
    let with = |more| container.iter().copied().chain([more]).collect::<Vec<_>>();
    let sample = only(&families, "container_cpu_usage_seconds_total", &with(("cpu", "total")));
    assert_eq!((sample.value, sample.time), (2.0, Some(TIME * 1000)));
    for (name, value) in [
        ("container_memory_working_set_bytes", f64::from(7 << 20)),
        ("container_memory_usage_bytes", f64::from(7 << 21)),
        ("container_memory_rss", f64::from(7 << 19)),
        ("container_spec_memory_limit_bytes", f64::from(64 << 20)),
        ("container_spec_cpu_shares", 128.0),
        ("container_fs_usage_bytes", 4608.0),
        ("container_start_time_seconds", TIME as f64 - 61.0),
        ("container_threads", 3.0),
    ] {
        assert_eq!(only(&families, name, &container).value, value, "{name}");
    }
    let pod = labels("", "/l/pod1", "", "", "p1");
    assert_eq!(only(&families, "container_memory_working_set_bytes", &pod).value, f64::from(8 << 20));
    let pod: Vec<_> = pod.into_iter().chain([("interface", "eth0")]).collect();
    assert_eq!(only(&families, "container_network_receive_bytes_total", &pod).value, 100.0);
    assert_eq!(only(&families, "container_network_transmit_bytes_total", &pod).value, 200.0);
    let host = [("container", ""), ("id", "/"), ("image", ""), ("name", ""), ("namespace", ""), ("pod", "")];
    assert!(only(&families, "container_memory_working_set_bytes", &host).value > 0.0);
    for name in ["machine_cpu_cores", "machine_memory_bytes"] {
        assert!(families[name].samples[0].value >= 1.0 && families[name].samples[0].labels.contains_key("boot_id"));
    }
    assert!(!families.contains_key("container_cpu_cfs_throttled_periods_total"), "there is no quota");
    let probes = exposition(&node, "/metrics/probes").await;
    let labels = ["container=c", "namespace=ns", "pod=p", "pod_uid=u", "probe_type=Liveness", "result=failed"];
    let labels = labels.map(|label| label.split_once('=').unwrap());
    assert!((only(&probes, "prober_probe_total", &labels).value - 3.0).abs() < f64::EPSILON);
}

#[tokio::test]
async fn the_summary_is_that_of_the_stats_api() {
    let node = node(2).await;
    let (status, body) = node.get("/stats/summary").await;
    let summary: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &summary["node"]["nodeName"]), (200, &"node-1".into()));
    for pointer in [
        "/node/cpu/usageCoreNanoSeconds",
        "/node/memory/workingSetBytes",
        "/node/memory/availableBytes",
        "/node/fs/capacityBytes",
        "/node/fs/availableBytes",
        "/node/fs/inodes",
        "/node/rlimit/maxpid",
    ] {
        assert!(summary.pointer(pointer).and_then(Value::as_u64).unwrap_or(0) > 0, "{pointer} in {summary:#}");
    }
    let pod = &summary["pods"][1];
    assert_eq!(pod["podRef"], serde_json::json!({"name": "p1", "namespace": "ns", "uid": "uid-1"}));
    assert_eq!(pod["startTime"], "2026-11-21T07:14:42Z");
    assert_eq!(pod["cpu"]["usageCoreNanoSeconds"], 3_000_000_000_u64);
    assert_eq!(pod["network"]["rxBytes"], 100);
    assert_eq!(pod["network"]["interfaces"][0]["name"], "eth0");
    assert_eq!(pod["ephemeral-storage"]["usedBytes"], 4608);
    assert_eq!(pod["process_stats"]["process_count"], 3);
    let container = &pod["containers"][0];
    assert_eq!((&container["name"], &container["rootfs"]["usedBytes"]), (&"c".into(), &4096.into()));
    assert_eq!((&container["logs"]["usedBytes"], &container["memory"]["rssBytes"]), (&512.into(), &(7 << 19).into()));
    assert_eq!(container["memory"]["availableBytes"], (64 - 7) << 20);
    let (_, body) = node.get("/stats/summary?only_cpu_and_memory=true").await;
    let brief: Value = serde_json::from_str(&body).unwrap();
    assert!(brief["node"]["fs"].is_null() && brief["node"]["cpu"].is_object());
}

/// A Pod's volumes come once they were measured, with the file systems they are on.
#[tokio::test]
async fn volumes_and_file_systems_are_told() {
    let node = node(2).await;
    let volume = |name: &str, on_disk| {
        let path = node.directory.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("file"), vec![1; 50_000]).unwrap();
        PodVolume { name: name.to_owned(), path, on_disk }
    };
    let missing = PodVolume { name: "missing".into(), path: "/no/such/place".into(), on_disk: true };
    let volumes = BTreeMap::from([("uid-1".to_owned(), vec![volume("disk", true), volume("memory", false), missing])]);
    *node.world.volumes.lock().unwrap() = volumes;
    let images = ImageFs { path: node.directory.path().to_owned(), used: Some(12_345) };
    *node.world.images.lock().unwrap() = Some(images);
    let began = std::time::Instant::now();
    let summary: Value = loop {
        let summary: Value = serde_json::from_str(&node.get("/stats/summary").await.1).unwrap();
        if !summary["pods"][1]["volume"].is_null() {
            break summary;
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(10), "no volumes in {summary:#}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    let pod = &summary["pods"][1];
    let names: Vec<_> = pod["volume"].as_array().unwrap().iter().map(|volume| volume["name"].as_str()).collect();
    assert_eq!(names, [Some("disk"), Some("memory")]);
    let used = pod["volume"][0]["usedBytes"].as_u64().unwrap();
    assert!((50_000..100_000).contains(&used) && pod["volume"][0]["inodesUsed"] == 1, "{pod:#}");
    for figure in ["availableBytes", "capacityBytes", "inodesFree", "inodes"] {
        for of in [&pod["volume"][0], &pod["ephemeral-storage"], &pod["containers"][0]["rootfs"]] {
            assert!(of[figure].as_u64().is_some_and(|figure| figure > 0), "{figure} in {pod:#}");
        }
    }
    assert_eq!(pod["ephemeral-storage"]["usedBytes"], used + 4608, "what is in memory does not count");
    assert_eq!(pod["ephemeral-storage"]["inodesUsed"], 5);
    assert_eq!(summary["pods"][0]["ephemeral-storage"]["usedBytes"], 4608);
    let runtime = &summary["node"]["runtime"];
    assert_eq!(
        (&runtime["imageFs"]["usedBytes"], &runtime["containerFs"]["usedBytes"]),
        (&12_345.into(), &8192.into())
    );
    assert!(runtime["imageFs"]["capacityBytes"].as_u64() > runtime["imageFs"]["availableBytes"].as_u64());
    *node.world.images.lock().unwrap() = None;
    let summary: Value = serde_json::from_str(&node.get("/stats/summary").await.1).unwrap();
    assert!(summary["node"]["runtime"].is_null() && summary["node"]["fs"].is_object());
}

#[tokio::test]
async fn health_checks_are_indicators_of_the_service_level() {
    let node = node(0).await;
    let check = |name| [("name", name), ("type", "healthz")];
    let ended = |name, status| [("name", name), ("status", status), ("type", "healthz")];
    assert_eq!(node.get("/healthz").await.0, 200);
    let families = exposition(&node, "/metrics/slis").await;
    for name in ["ping", "log", "syncloop"] {
        assert_eq!(only(&families, "kubernetes_healthcheck", &check(name)).value, 1.0);
    }
    let counted = |families, name, status| only(families, "kubernetes_healthchecks_total", &ended(name, status)).value;
    let before = counted(&families, "syncloop", "success");
    *node.world.stuck.lock().unwrap() = Some("Pod loop stuck".to_owned());
    assert_eq!(node.get("/healthz/syncloop").await.0, 500);
    let families = exposition(&node, "/metrics/slis").await;
    assert_eq!(only(&families, "kubernetes_healthcheck", &check("syncloop")).value, 0.0);
    assert_eq!(only(&families, "kubernetes_healthcheck", &check("ping")).value, 1.0);
    assert_eq!(counted(&families, "syncloop", "success"), before);
    // The question above, and one for each of the two scrapes that `exposition` makes.
    assert_eq!(counted(&families, "syncloop", "error"), 3.0);
}

/// How fast is for `cargo run --release --example bench-stats` to say.
#[tokio::test]
async fn each_of_a_hundred_pods_is_told_once() {
    let node = node(100).await;
    let families = exposition(&node, "/metrics/resource").await;
    for number in 0..100 {
        let name = format!("p{number}");
        let pod = [("namespace", "ns"), ("pod", name.as_str())];
        assert_eq!(only(&families, "pod_cpu_usage_seconds_total", &pod).value, f64::from(number + 2));
    }
}

/// A function's replicas are its Pod to whoever reads `/metrics/resource` and the summary, and stay apart by cgroup for
/// `/metrics/cadvisor`.
#[tokio::test]
async fn replicas_are_told_as_their_pod() {
    let node = node(1).await;
    let environment = |number: u64| {
        let mut sandbox = sandbox(number);
        sandbox.pod = PodRef { uid: format!("uid-0.1.{number}"), namespace: "ns".into(), name: "p0".into() };
        sandbox.cgroup = "/l/poduid-0.1".to_owned();
        sandbox
    };
    node.world.stats.lock().unwrap().as_mut().unwrap().extend([environment(1), environment(2)]);
    let families = exposition(&node, "/metrics/resource").await;
    // Containers of 1, 2 and 3 s; cgroups of 2 s (the Pod's own) and 3 s (the replica's, read with the first of two).
    let pod = [("namespace", "ns"), ("pod", "p0")];
    assert_eq!(only(&families, "pod_cpu_usage_seconds_total", &pod).value, 5.0);
    let container = [("container", "c"), ("namespace", "ns"), ("pod", "p0")];
    assert_eq!(only(&families, "container_cpu_usage_seconds_total", &container).value, 6.0);
    let summary: Value = serde_json::from_str(&node.get("/stats/summary").await.1).unwrap();
    assert_eq!(summary["pods"].as_array().unwrap().len(), 1);
    assert_eq!(summary["pods"][0]["podRef"]["uid"], "uid-0");
    let families = exposition(&node, "/metrics/cadvisor").await;
    let memory = &families["container_memory_working_set_bytes"].samples;
    let labels: std::collections::BTreeSet<_> = memory.iter().map(|sample| format!("{:?}", sample.labels)).collect();
    assert_eq!(labels.len(), memory.len(), "no series twice");
    assert_eq!(memory.len(), 1 + 2 + 3, "the host, two cgroups of the Pod, three containers");
}

#[tokio::test]
async fn the_node_tells_of_itself() {
    let node = node(1).await;
    for path in ["/healthz/ping", "/healthz/log", "/healthz/syncloop"] {
        assert_eq!(node.get(path).await, (200, "ok".to_owned()), "{path}");
    }
    *node.world.stuck.lock().unwrap() = Some("Pod loop stuck".to_owned());
    assert_eq!(node.get("/healthz/syncloop").await, (500, "Pod loop stuck\n".to_owned()));
    assert_eq!(node.get("/healthz/ping").await.0, 200);
    let (status, text) = node.get("/healthz?verbose").await;
    assert_eq!(status, 500);
    assert_eq!(text, "[+]ping ok\n[+]log ok\n[-]syncloop failed: Pod loop stuck\nhealthz check failed\n");
    let (_, body) = node.get("/configz").await;
    let configz: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(configz["kubeletconfig"]["maxPods"], 7);
    let (status, flags) = node.get("/flagz").await;
    assert!(status == 200 && flags.contains("\nport=1\n"), "{flags}");
    let (status, text) = node.get("/statusz").await;
    assert!(status == 200 && text.contains("\nUp: 0 hr 00 min ") && text.contains("Binary version: "), "{text}");
    let (_, body) = node.get("/runningpods/").await;
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&list["kind"], &list["items"][0]["metadata"]["uid"]), (&"PodList".into(), &"uid-0".into()));
    assert_eq!(list["items"][0]["spec"]["containers"][0]["name"], "c");
    let mut client = node.api_server().await;
    for (method, path, status) in [
        (Method::POST, "/checkpoint/ns/p/c", 501),
        (Method::POST, "/checkpoint/ns/p/other", 404),
        (Method::POST, "/checkpoint/ns/none/c", 404),
        (Method::GET, "/checkpoint/ns/p/c", 405),
    ] {
        let response = client.send(request(method.clone(), path, None)).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
    }
}

#[tokio::test]
async fn log_files_are_served_and_nothing_else() {
    let node = node(0).await;
    let (status, list) = node.get("/logs/").await;
    assert!(status == 200 && list.contains("<a href=\"./below/\">below/</a>"), "{list}");
    assert_eq!(node.get("/logs/below").await.0, 301);
    let (_, list) = node.get("/logs/below/").await;
    assert!(list.contains("<a href=\"./a%20file\">a file</a>"), "{list}");
    assert_eq!(node.get("/logs/below/a%20file").await, (200, "content\n".to_owned()));
    for path in [
        "/logs/none",
        "/logs/../secret",
        "/logs/%2e%2e/secret",
        "/logs/..%2fsecret",
        "/logs/below/..%2f..%2fsecret",
        "/logs/%2fetc%2fpasswd",
        "/logs//etc/passwd",
        "/logs/below/a%00file",
    ] {
        let (status, text) = node.get(path).await;
        assert!(status == 404 || status == 400, "{path}: {status} {text}");
    }
    assert_eq!(node.get("/logs/?query=kubelet").await.0, 501);
}

/// What the World answers where a test gave no statistics.
pub(crate) fn no_stats() -> RuntimeError {
    RuntimeError::new(Kind::Unsupported, "no statistics in this test")
}
