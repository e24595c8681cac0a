//! What befalls the host under a function: Docker restarts, the disk is full, far more calls come than it can serve.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::harness::docker::Docker;
use crate::harness::node::{Node, Options};
use crate::harness::{on_cluster, on_own_node};

/// Callers that call again as soon as they are answered.
struct Callers {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<BTreeMap<String, usize>>>,
}

impl Callers {
    fn start(address: &str, count: usize) -> Self {
        let (stop, good) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let call = || {
            let (address, stop, good) = (address.to_owned(), Arc::clone(&stop), Arc::clone(&good));
            tokio::spawn(async move {
                let mut ends = BTreeMap::new();
                while !stop.load(Ordering::Relaxed) {
                    let ended = match send(&address, Request::get("/id"), Bytes::new(), CALL).await {
                        Ok(answer) => answer.status.as_u16().to_string(),
                        Err(error) if error.starts_with("no answer") => "never".to_owned(),
                        Err(_) => "broken".to_owned(),
                    };
                    good.fetch_add(usize::from(ended == "200"), Ordering::Relaxed);
                    if ended != "200" {
                        // As a client does that was told to come again.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    *ends.entry(ended).or_default() += 1;
                }
                ends
            })
        };
        let tasks = (0..count).map(|_| call()).collect();
        Self { stop, good, tasks }
    }

    /// Waits for so many more good answers.
    async fn served(&self, more: usize) {
        let goal = self.good.load(Ordering::Relaxed) + more;
        poll("good answers", Duration::from_secs(90), async || {
            let good = self.good.load(Ordering::Relaxed);
            if good >= goal { Ok(()) } else { Err(format!("{good} of {goal}")) }
        })
        .await;
    }

    /// How often each kind of end was seen.
    async fn ended(self) -> BTreeMap<String, usize> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        for task in self.tasks {
            for (end, count) in task.await.unwrap() {
                *all.entry(end).or_default() += count;
            }
        }
        all
    }
}

/// Runs a test on a node with a Docker daemon of its own.
fn on_own_docker(name: &str, flags: &[&'static str], test: impl AsyncFnOnce(&Case, &mut Docker)) {
    on_cluster(async |cluster, client| {
        let mut docker = Docker::start(flags).await;
        docker.load(crate::harness::BUSYBOX);
        let flags = ["--docker-endpoint", &docker.endpoint()];
        let node = Arc::new(Node::start(cluster, client, name, Options::flags(&flags)).await);
        Case::run(cluster, client, &node, async |t| test(t, &mut docker).await).await;
        drop(node);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_docker_that_restarts_under_load_costs_calls_and_not_the_function() {
    on_own_docker("docker-restarts", &[], async |t, docker| {
        let keys = json!({"com.openfaas.scale.max": "2", "execenvironment.count": "1"});
        let function = Function::server(t, "f", keys).await;
        let callers = Callers::start(&function.address, 4);
        callers.served(20).await;
        // Its end is the end of sandbox and environments.
        docker.stop();
        docker.run().await;
        callers.served(20).await;
        let ends = callers.ended().await;
        eprintln!("how calls ended: {ends:?}");
        let known = ["200", "429", "502", "503", "broken"];
        assert!(ends.keys().all(|end| known.contains(&end.as_str())), "{ends:?}");
        t.running("f").await;
        t.delete("f", Some(2)).await;
        t.gone("f", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_docker_that_restarts_and_leaves_containers_running_costs_no_warm_call() {
    on_own_docker("docker-lives", &["--live-restore"], async |t, docker| {
        let keys = json!({"com.openfaas.scale.max": "1", "execenvironment.count": "2"});
        let function = Function::server(t, "f", keys).await;
        let held = function.hold("held");
        function.begun(&["held"]).await;
        let id = function.id().await;
        let callers = Callers::start(&function.address, 1);
        callers.served(5).await;
        docker.stop();
        callers.served(20).await;
        docker.run().await;
        t.node.ready(&t.client).await;
        callers.served(20).await;
        let ends = callers.ended().await;
        assert_eq!(ends.keys().collect::<Vec<_>>(), ["200"], "{ends:?}");
        assert_eq!(function.id().await, id, "the same environment");
        function.open();
        told(held.await);
        let pod = t.running("f").await;
        assert_eq!(crate::harness::pods::restarts(&pod, "main"), 0);
        t.delete("f", Some(2)).await;
        t.gone("f", SOON).await;
    });
}

/// A small disk, mounted on a node's directory.
struct Disk(PathBuf);

impl Disk {
    fn mount(place: &Path, size: &str) -> Self {
        let place = place.to_owned();
        let path = place.display().to_string();
        output("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &path]);
        assert!(output("findmnt", &["-n", "-o", "FSTYPE", "--mountpoint", &path]).contains("tmpfs"), "{path}");
        Self(place)
    }

    /// Writes until nothing more fits.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        let full = (0..1 << 20).find_map(|_| file.write_all(&[b'x'; 4096]).err());
        assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        output("umount", &["--lazy", &self.0.display().to_string()]);
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_full_disk_stops_no_function_that_is_there_and_a_new_one_comes_when_there_is_room() {
    on_cluster(async |cluster, client| {
        // The node itself would be taken for full, and get no Pods.
        let config = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                    evictionHard: {memory.available: 100Mi, nodefs.available: 4Ki, nodefs.inodesFree: 1%}\n";
        std::fs::write(config.path(), text).unwrap();
        let disk;
        let node = Node::prepare(cluster, "full", &[format!("--config={}", config.path().display())]);
        disk = Disk::mount(&node.root, "16m");
        node.spawn(&[]);
        node.ready(client).await;
        let node = Arc::new(node);
        Case::run(cluster, client, &node, async |t| {
            let keys = json!({"com.openfaas.scale.max": "1", "lambdalet.dev/idle-timeout": "1s"});
            let function = Function::server(t, "f", keys.clone()).await;
            let warm = function.id().await;
            disk.fill();
            assert_eq!(function.id().await, warm, "what runs serves on");
            function.has(0).await;
            assert_ne!(function.id().await, warm, "it comes from zero as well: that takes no room");
            // Not by way of the scheduler, which sends nothing to a node whose disk is full.
            let spec = json!({"nodeName": t.node.name, "containers": [busybox_with(SERVER, json!({}))]});
            let late = Function::of_spec(t, "late", keys, spec).await;
            poll("told why a new one does not start", SOON, async || {
                let of = "involvedObject.name=late";
                let messages = "-o=jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}";
                let said = t.kubectl_text(&["get", "events", "--field-selector", of, messages]);
                if said.contains("No space left") { Ok(()) } else { Err(said) }
            })
            .await;
            disk.free();
            late.ready().await.id().await;
            t.running("f").await;
        })
        .await;
    });
}

/// Resident memory of a process, in bytes.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn ten_times_what_it_can_serve_is_answered_at_once_and_kept_nowhere() {
    on_own_node("overload", Options::default(), async |t| {
        let keys = json!({
            "com.openfaas.scale.max": "2", "lambdalet.dev/queue-length": "10",
        });
        let function = Function::server(t, "f", keys).await;
        let warm = ["a", "b"].map(|_| function.get("/cgi-bin/nap"));
        for call in warm {
            told(call.await);
        }
        let before = resident(t.node.pid());
        // Two environments, a tenth of a second for each call: twenty calls a second at most. Two hundred come.
        let mut calls = Vec::new();
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        for _ in 0..1000 {
            ticks.tick().await;
            calls.push(function.get("/cgi-bin/nap"));
        }
        let during = resident(t.node.pid());
        let mut ends = BTreeMap::<_, usize>::new();
        for call in calls {
            let answer = answered(call.await);
            if answer.status == StatusCode::TOO_MANY_REQUESTS {
                assert!(answer.header("retry-after").is_some(), "{answer:?}");
            }
            *ends.entry(answer.status.as_u16()).or_default() += 1;
        }
        let grown = during.saturating_sub(before) >> 20;
        eprintln!("how calls ended: {ends:?}; the node grew by {grown} MiB");
        assert_eq!(ends.keys().copied().collect::<Vec<_>>(), [200, 429], "{ends:?}");
        assert!(ends[&200] >= 20 && ends[&429] >= 500, "{ends:?}");
        assert!(grown < 32, "{grown} MiB more");
        // The numbers are written now and then: what was written before the load says that nothing is busy, too.
        let at_rest = |pod: &Pod| replicas(pod) == "2/2 replicas, 2 environments, 0 busy, 0 queued";
        let pod = t.until("f", "at rest with both environments", at_rest).await;
        assert_eq!(crate::harness::pods::restarts(&pod, "main"), 0);
    });
}
