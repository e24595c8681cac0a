//! What people and programs are told of a node: every path of its API through the API server, `kubectl top` by
//! metrics-server, the queries of the dashboard, `lambdalet top`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::harness::node::Options;
use crate::harness::pods::{STAY, busybox_with, container, pod_ip};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, http, on_own_node, on_shared_node};
use crate::queries;

/// Uses what it may of a core.
const BURN: &str = "trap 'exit 0' TERM; while :; do :; done";
/// metrics-server looks every ten seconds, and needs two looks at a container that has run for ten.
const TWO_LOOKS: Duration = Duration::from_secs(90);

/// GET of a path of the node's API by way of the API server.
fn raw(t: &Case, path: &str) -> Result<String, String> {
    let path = format!("/api/v1/nodes/{}/proxy{path}", t.node.name);
    t.kubectl(&["get", "--raw", &path]).map(|bytes| String::from_utf8(bytes).unwrap())
}

fn json_of(t: &Case, path: &str) -> Value {
    serde_json::from_str(&raw(t, path).unwrap_or_else(|e| panic!("{path}: {e}"))).unwrap()
}

/// The value of a sample whose name and labels begin and contain what is given.
fn sample(text: &str, name: &str, labels: &[String]) -> Option<f64> {
    let of_it = |line: &&str| {
        let rest = line.strip_prefix(name).unwrap_or_default();
        rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label.as_str()))
    };
    let line = text.lines().find(of_it)?;
    let behind = line.rsplit_once("} ").or_else(|| line.split_once(' '))?.1;
    behind.split(' ').next()?.parse().ok()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn every_path_is_reached_through_the_api_server() {
    on_shared_node(async |t| {
        let mut main = busybox_with(
            &format!("head -c 3000000 /dev/zero > /data/file; {STAY}"),
            json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "host", "mountPath": "/host"}]}),
        );
        main["resources"] = json!({"limits": {"memory": "64Mi"}});
        let volumes = json!([{"name": "data", "emptyDir": {}}, {"name": "host", "hostPath": {"path": "/etc"}}]);
        t.pod("seen", json!({"containers": [main], "volumes": volumes})).await;
        let pod = t.running("seen").await;
        t.log_with("seen", "main", "up").await;
        let own = [format!("namespace=\"{}\"", t.namespace), "pod=\"seen\"".to_owned()];

        for path in ["/healthz", "/healthz/ping", "/healthz/log", "/healthz/syncloop"] {
            assert_eq!(raw(t, path).unwrap(), "ok", "{path}");
        }
        assert!(raw(t, "/healthz?verbose").unwrap().contains("[+]syncloop ok\n"));

        let resource = raw(t, "/metrics/resource").unwrap();
        assert!(sample(&resource, "pod_memory_working_set_bytes", &own).unwrap() > 1e5, "{resource}");
        assert!(sample(&resource, "node_cpu_usage_seconds_total", &[]).unwrap() > 1.0);
        let cadvisor = raw(t, "/metrics/cadvisor").unwrap();
        let main = [&own[..], &["container=\"main\"".to_owned()]].concat();
        assert_eq!(sample(&cadvisor, "container_spec_memory_limit_bytes", &main), Some(f64::from(64 << 20)));
        let slis = raw(t, "/metrics/slis").unwrap();
        assert_eq!(sample(&slis, "kubernetes_healthcheck", &["name=\"syncloop\"".to_owned()]), Some(1.0), "{slis}");
        assert!(!raw(t, "/metrics/probes").unwrap().contains(&own[0]), "it has no probes");
        let metrics = raw(t, "/metrics").unwrap();
        let asked = ["route=\"/metrics/slis\"".to_owned(), "code=\"200\"".to_owned()];
        assert!(sample(&metrics, "lambdalet_api_requests_total", &asked).unwrap() >= 1.0, "{metrics}");

        let listed = json_of(t, "/pods");
        let items = listed["items"].as_array().unwrap();
        let found = items.iter().find(|item| item["metadata"]["uid"] == json!(pod.uid())).unwrap();
        assert_eq!(found["status"]["podIP"], pod_ip(&pod));
        let running = json_of(t, "/runningpods/");
        let found =
            running["items"].as_array().unwrap().iter().find(|item| item["metadata"]["uid"] == json!(pod.uid()));
        assert_eq!(found.unwrap()["spec"]["containers"][0]["name"], "main", "{running}");

        let configz = json_of(t, "/configz");
        assert_eq!(configz["kubeletconfig"]["kind"], "KubeletConfiguration");
        assert_eq!(configz["kubeletconfig"]["evictionHard"]["nodefs.available"], "1Gi", "{configz:#}");
        let flagz = raw(t, "/flagz").unwrap();
        assert!(flagz.contains(&format!("\nnode-name={}\n", t.node.name)), "{flagz}");
        let statusz = raw(t, "/statusz").unwrap();
        assert!(statusz.contains(&format!("Binary version: {}", env!("CARGO_PKG_VERSION"))), "{statusz}");
        let name = std::fs::read_dir("/var/log").unwrap().flatten().find(|e| e.path().is_file()).unwrap().file_name();
        let logs = raw(t, "/logs/").unwrap();
        assert!(logs.contains(&format!(">{}</a>", name.to_string_lossy())), "{name:?} in {logs}");

        let profile = raw(t, "/debug/pprof/profile?seconds=1").unwrap_err();
        assert!(profile.contains(&format!("perf record -F 99 -g -p {} ", t.node.pid())), "{profile}");
        for (path, wanted) in
            [("seen/main", "cannot checkpoint"), ("seen/other", "could not find"), ("none/main", "could not find")]
        {
            let path = format!("/api/v1/nodes/{}/proxy/checkpoint/{}/{path}", t.node.name, t.namespace);
            let mut post = t.cluster.kubectl(&["create", "--raw", &path, "-f", "-"]);
            let mut post = post.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
            post.stdin.take().unwrap().write_all(b"{}").unwrap();
            let error = String::from_utf8(post.wait_with_output().unwrap().stderr).unwrap();
            assert!(error.contains(wanted), "{path}: {error}");
        }
        volumes_and_file_systems(t, &pod.uid().unwrap()).await;
    });
}

/// What `/stats/summary` says of space.
async fn volumes_and_file_systems(t: &Case, uid: &str) {
    let pod = poll("told with its volume", SOON, async || {
        let summary = json_of(t, "/stats/summary");
        let pod = summary["pods"].as_array().unwrap().iter().find(|pod| pod["podRef"]["uid"] == uid).cloned();
        let pod = pod.ok_or_else(|| format!("no {uid} in {summary:#}"))?;
        let measured = pod["volume"].is_array() && pod["containers"][0]["rootfs"].is_object();
        if measured { Ok((pod, summary)) } else { Err(format!("{pod:#}")) }
    });
    let (pod, summary) = pod.await;
    let volumes = pod["volume"].as_array().unwrap();
    let volume = |name: &str| volumes.iter().find(|volume| volume["name"] == name);
    let data = volume("data").unwrap();
    let bytes = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number in {pod:#}: {value}"));
    assert!((3_000_000..4_000_000).contains(&bytes(&data["usedBytes"])) && data["inodesUsed"] == 1, "{data}");
    assert!(bytes(&data["capacityBytes"]) > bytes(&data["availableBytes"]));
    assert!(volume("host").is_none(), "a host path is the host's: {pod:#}");
    let token = volumes.iter().find(|volume| volume["name"].as_str().unwrap().starts_with("kube-api-access-"));
    assert!(bytes(&token.unwrap()["usedBytes"]) > 0, "{pod:#}");
    let ephemeral = bytes(&pod["ephemeral-storage"]["usedBytes"]);
    assert!((3_000_000..4_000_000).contains(&ephemeral), "the volume on disk, layer and log, no token: {pod:#}");
    let runtime = &summary["node"]["runtime"];
    for (part, figure) in [("imageFs", "usedBytes"), ("imageFs", "capacityBytes"), ("containerFs", "usedBytes")] {
        assert!(bytes(&runtime[part][figure]) > 4096, "{part} {figure} in {runtime:#}");
    }
}

/// Stops metrics-server however the test goes.
struct MetricsServer<'a>(&'a Case);

impl<'a> MetricsServer<'a> {
    fn start(t: &'a Case) -> Self {
        t.cluster.hack(&["metrics", "up"]);
        Self(t)
    }
}

impl Drop for MetricsServer<'_> {
    fn drop(&mut self) {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.0.cluster.hack(&["metrics", "down"])));
    }
}

/// The rows of a table of kubectl's, as words, by their first word.
fn rows(table: &str) -> BTreeMap<String, Vec<String>> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    table.lines().map(words).filter(|row| !row.is_empty()).map(|row| (row[0].clone(), row)).collect()
}

fn number(cell: &str, unit: &str) -> u64 {
    cell.strip_suffix(unit).unwrap_or_else(|| panic!("{cell} in {unit}")).parse().unwrap()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn kubectl_top_shows_the_node_and_its_pods() {
    on_shared_node(async |t| {
        let _server = MetricsServer::start(t);
        let burner = busybox_with(BURN, json!({"resources": {"limits": {"cpu": "200m", "memory": "32Mi"}}}));
        t.pod("burns", json!({"containers": [burner]})).await;
        t.pod("idles", json!({"containers": [container("one", STAY), container("two", STAY)]})).await;
        t.running("burns").await;
        t.running("idles").await;
        let pods = poll("known to metrics-server", TWO_LOOKS, async || {
            let rows = rows(&String::from_utf8_lossy(&t.kubectl(&["top", "pods", "--no-headers"])?));
            if rows.contains_key("burns") && rows.contains_key("idles") { Ok(rows) } else { Err(format!("{rows:?}")) }
        })
        .await;
        let (cpu, memory) = (number(&pods["burns"][1], "m"), number(&pods["burns"][2], "Mi"));
        assert!((100..=230).contains(&cpu), "limited to 200m: {pods:?}");
        assert!(memory <= 32, "{pods:?}");
        assert!(number(&pods["idles"][1], "m") < 50, "{pods:?}");
        let containers = t.kubectl_text(&["top", "pod", "idles", "--containers", "--no-headers"]);
        let names: BTreeSet<_> = containers.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(names, BTreeSet::from(["one", "two"]), "{containers}");
        let node = poll("known as a node", SOON, async || {
            let table = t.kubectl(&["top", "node", &t.node.name, "--no-headers"])?;
            rows(&String::from_utf8_lossy(&table)).remove(&t.node.name).ok_or_else(|| "no row".to_owned())
        })
        .await;
        let cores: u64 = std::thread::available_parallelism().unwrap().get() as u64;
        assert!((cpu / 2..=cores * 1000).contains(&number(&node[1], "m")), "{node:?}");
        assert!(number(&node[3], "Mi") > 100, "{node:?}");
    });
}

/// A function that answers at once.
async fn function(t: &Case, name: &str) -> k8s_openapi::api::core::v1::Pod {
    let script = "mkdir -p /tmp/www && echo hello > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www";
    let more = json!({
        "ports": [{"containerPort": 8080}], "resources": {"limits": {"cpu": "50m", "memory": "64Mi"}},
    });
    let metadata = json!({"labels": {"com.openfaas.scale.max": "2"}});
    t.labelled_pod(name, metadata, json!({"containers": [busybox_with(script, more)]})).await;
    let pod = t.running(name).await;
    let answer = http::send(&format!("{}:8080", pod_ip(&pod)), ::http::Request::get("/"), "", SOON).await.unwrap();
    assert_eq!(answer.text(), "hello\n");
    pod
}

/// The names of all samples, each with every label that one of them has.
fn shown(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut metrics: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let labels = line.split_once('{').map_or("", |(_, rest)| rest);
        // What stands before each `="`, back to the comma or the brace before it; values have no quotes here.
        let labels = labels.split("=\"").map(|part| part.rsplit([',', '{']).next().unwrap());
        let names = labels.filter(|l| !l.is_empty() && l.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
        metrics.entry(name.to_owned()).or_default().extend(names.map(str::to_owned));
    }
    metrics
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn every_query_of_dashboard_and_alerts_finds_its_metrics_on_a_node() {
    on_own_node("dashboard", Options::default(), async |t| {
        let pod = function(t, "asked").await;
        t.kubectl_text(&["exec", "asked", "--", "true"]);
        // Two connections that bring no request, for those who count what was not served.
        drop(std::net::TcpStream::connect(("127.0.0.1", t.node.port)).unwrap());
        let mut slow = tokio::net::TcpStream::connect((pod_ip(&pod), 8080)).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut slow, b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
        let queries: Vec<_> = queries::all()
            .iter()
            .flat_map(|query| query.uses().into_iter().map(|used| (query.to_string(), used)).collect::<Vec<_>>())
            .collect();
        poll("telling all that is asked", Duration::from_secs(60), async || {
            let mut there = BTreeMap::new();
            for path in ["/metrics", "/metrics/resource", "/metrics/slis"] {
                there.extend(shown(&raw(t, path)?));
            }
            for (query, used) in &queries {
                let labels = there.get(&used.metric).ok_or_else(|| format!("{query}: there is no {}", used.metric))?;
                let known = |l: &&String| labels.contains(*l) || queries::OF_THE_TARGET.contains(&l.as_str());
                if let Some(missing) = used.labels.iter().find(|label| !known(label)) {
                    return Err(format!("{query}: {} has no {missing}, but {labels:?}", used.metric));
                }
            }
            Ok(())
        })
        .await;
        drop(slow);
    });
}

fn top(t: &Case, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
    let command = command.arg("top").args(args).env("KUBECONFIG", t.cluster.admin_kubeconfig());
    let done = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn lambdalet_top_shows_pods_and_functions_with_what_they_use() {
    on_shared_node(async |t| {
        let burner = busybox_with(BURN, json!({"resources": {"limits": {"cpu": "200m", "memory": "32Mi"}}}));
        t.pod("burns", json!({"containers": [burner]})).await;
        t.running("burns").await;
        let pod = function(t, "counts").await;
        let (code, out, err) = top(t, &["--once", "-n", &t.namespace]);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
        assert!(!out.contains('\x1b'), "plain where there is no terminal: {out:?}");
        let row = |name: &str, end: &str| -> Vec<String> {
            let words = out.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
            let mut of_it = words.filter(|row| row.get(1).is_some_and(|word| word == name));
            of_it.find(|row| row[3].contains(end)).unwrap_or_else(|| panic!("no {name} in {out}"))
        };
        let burns = row("burns", "Running");
        assert_eq!(
            (burns[2].as_str(), burns[4].as_str(), burns[7].as_str()),
            (t.node.name.as_str(), "1/1", "0"),
            "{out}"
        );
        assert!((50..=260).contains(&number(&burns[5], "m")), "{out}");
        assert_eq!(row("counts", "/2")[3..7], ["1/2", "0", "1", "0"], "{out}");

        // Calls between the two readings.
        let calling = tokio::spawn(async move {
            loop {
                let _ = http::get(&format!("{}:8080", pod_ip(&pod)), "/").await;
            }
        });
        let (args, namespace) = (["--once", "-o", "json", "--node"], t.namespace.clone());
        let (code, out, err) = top(t, &[&args[..], &[&t.node.name, "-n", &namespace]].concat());
        calling.abort();
        assert_eq!(code, Some(0), "{err}");
        let view: Value = serde_json::from_str(&out).unwrap();
        let calls = view["functions"][0]["callsPerSecond"].as_f64();
        assert!(calls.is_some_and(|calls| calls > 0.5), "{view:#}");
        assert_eq!(view["sandboxes"].as_array().unwrap().len(), 2, "{view:#}");

        let (code, _, err) = top(t, &["--once", "--node", "no-such-node"]);
        assert_eq!((code, err.as_str()), (Some(1), "lambdalet: there is no node no-such-node\n"));
    });
}

/// A process that does not outlive a test that fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn lambdalet_top_leaves_the_terminal_as_it_was() {
    on_shared_node(async |t| {
        // script(1) gives it a terminal, and q comes from its standard input once the table stands.
        let command = format!("{} top -A; stty -a", env!("CARGO_BIN_EXE_lambdalet"));
        let terminal = Command::new("script")
            .args(["-qec", &command, "/dev/null"])
            .env("KUBECONFIG", t.cluster.admin_kubeconfig())
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut terminal = Killed(terminal);
        let (mut keys, mut shown) = (terminal.0.stdin.take().unwrap(), terminal.0.stdout.take().unwrap());
        let reader = tokio::task::spawn_blocking(move || {
            let (mut text, mut bytes) = (String::new(), [0; 4096]);
            let mut pressed = false;
            while let Ok(read @ 1..) = std::io::Read::read(&mut shown, &mut bytes) {
                text.push_str(&String::from_utf8_lossy(&bytes[..read]));
                if !pressed && text.contains("(q: quit)") {
                    keys.write_all(b"q").unwrap();
                    pressed = true;
                }
            }
            text
        });
        let text = tokio::time::timeout(SOON, reader).await.expect("it ends by q").unwrap();
        assert!(terminal.0.wait().unwrap().success(), "{text}");
        let (page, after) = text.split_once("\x1b[?25h\x1b[?1049l").unwrap_or_else(|| panic!("not left: {text:?}"));
        assert!(page.contains("\x1b[?1049h\x1b[?25l") && page.contains("NAMESPACE"), "{page:?}");
        let words: Vec<&str> = after.split([' ', ';', '\r', '\n']).collect();
        assert!(words.contains(&"icanon") && words.contains(&"echo"), "{after}");
    });
}
