//! `kubectl logs` with every option, and the node's own log endpoint where the API server rounds.

use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::harness::node::{Options, output};
use crate::harness::pods::{STAY, busybox, container, restarts, status, terminated};
use crate::harness::wait::SOON;
use crate::harness::{Case, on_own_node, on_shared_node};

/// A Pod that wrote these lines to stdout and has ended.
async fn ended(t: &Case, name: &str, script: &str) -> Pod {
    t.run_pod(name, json!({"containers": [busybox(script)]})).await
}

/// The node's own endpoint, as the API server asks it.
fn endpoint(t: &Case, pod: &str, query: &str) -> String {
    let pki = |name: &str| t.cluster.dir.join("pki").join(name).display().to_string();
    let url = format!("https://127.0.0.1:{}/containerLogs/{}/{pod}/main?{query}", t.node.port, t.namespace);
    output(
        "curl",
        &["-skf", "--noproxy", "*", "--cert", &pki("kubelet-client.crt"), "--key", &pki("kubelet-client.key"), &url],
    )
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn stdout_and_stderr_are_in_one_log_in_order() {
    on_shared_node(async |t| {
        ended(t, "both", "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three").await;
        assert_eq!(t.kubectl_text(&["logs", "both"]), "one\ntwo\nthree\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn tail_counts_lines_from_the_end_and_zero_is_none() {
    on_shared_node(async |t| {
        ended(t, "count", "seq 1 100").await;
        assert_eq!(t.kubectl_text(&["logs", "count", "--tail=3"]), "98\n99\n100\n");
        assert_eq!(t.kubectl_text(&["logs", "count", "--tail=0"]), "");
        assert_eq!(t.kubectl_text(&["logs", "count", "--tail=1000"]).lines().count(), 100);
        assert_eq!(t.kubectl_text(&["logs", "count", "--tail=-1"]).lines().count(), 100);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_limit_in_bytes_is_exact() {
    on_shared_node(async |t| {
        ended(t, "long", "seq 1 1000").await;
        assert_eq!(t.kubectl_text(&["logs", "long", "--limit-bytes=7"]), "1\n2\n3\n4");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn timestamps_are_rfc3339_with_nanoseconds_and_ascend() {
    on_shared_node(async |t| {
        ended(t, "stamped", "echo one; sleep 0.3; echo two").await;
        let log = t.kubectl_text(&["logs", "stamped", "--timestamps"]);
        let lines: Vec<(jiff::Timestamp, &str)> = log
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(time, text)| (time.parse().unwrap_or_else(|e| panic!("{time}: {e}")), text))
            .collect();
        assert_eq!(lines.iter().map(|(_, text)| *text).collect::<Vec<_>>(), ["one", "two"]);
        let gap = lines[1].0.duration_since(lines[0].0).as_millis();
        assert!((250..2000).contains(&gap), "{gap} ms");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn since_leaves_out_what_is_older() {
    on_shared_node(async |t| {
        t.pod("since", json!({"containers": [busybox(&format!("echo old; sleep 4; echo new; {STAY}"))]})).await;
        t.log_with("since", "main", "new").await;
        assert_eq!(t.kubectl_text(&["logs", "since", "--since=3s"]), "new\nup\n");
        assert_eq!(t.kubectl_text(&["logs", "since", "--since=1h"]), "old\nnew\nup\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn since_a_moment_counts_fractions_of_a_second() {
    on_shared_node(async |t| {
        ended(t, "moments", "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done").await;
        let log = t.kubectl_text(&["logs", "moments", "--timestamps"]);
        let third = log.lines().nth(2).unwrap().split_once(' ').unwrap().0;
        assert_eq!(endpoint(t, "moments", &format!("sinceTime={third}")), "3\n4\n5\n");
        // The API server cuts the fraction off before it asks, so through it the whole second counts.
        let whole = third.split_once('.').map_or(third.to_owned(), |(second, _)| format!("{second}Z"));
        let through = t.kubectl_text(&["logs", "moments", &format!("--since-time={whole}")]);
        assert!(through.ends_with("3\n4\n5\n"), "{through}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn following_shows_lines_as_they_are_written_and_ends_with_the_container() {
    on_shared_node(async |t| {
        let script = "for i in 1 2 3; do until [ -e /go$i ]; do sleep 0.05; done; echo $i; done";
        let spec = json!({"restartPolicy": "Never", "containers": [busybox(script)]});
        t.pod("slow", spec).await;
        t.running("slow").await;
        let mut command = t.cluster.kubectl(&["-n", &t.namespace, "logs", "-f", "slow"]);
        let mut child =
            tokio::process::Command::from(std::mem::replace(&mut command, std::process::Command::new("true")))
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for number in ["1", "2", "3"] {
            // The next line is not written before this one was seen.
            t.kubectl_text(&["exec", "slow", "--", "touch", &format!("/go{number}")]);
            let line = tokio::time::timeout(SOON, lines.next_line()).await.expect("a line is shown as it is written");
            assert_eq!(line.unwrap().as_deref(), Some(number));
        }
        let end = tokio::time::timeout(SOON, async { (lines.next_line().await.unwrap(), child.wait().await.unwrap()) });
        let (rest, status) = end.await.expect("kubectl logs -f does not end");
        assert!(rest.is_none() && status.success(), "{rest:?}, {status}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn following_from_the_tail_shows_only_what_is_new() {
    on_shared_node(async |t| {
        t.pod("ticks", json!({"containers": [busybox("i=0; trap 'exit 0' TERM; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done")]})).await;
        t.log_with("ticks", "main", "tick 5\n").await;
        let path = format!("/api/v1/namespaces/{}/pods/ticks/log?follow=true&tailLines=0", t.namespace);
        let request = http::Request::get(path).body(Vec::new()).unwrap();
        let stream = t.client.request_stream(request).await.unwrap();
        let mut lines = futures::io::AsyncBufReadExt::lines(stream);
        let first = tokio::time::timeout(SOON, futures::StreamExt::next(&mut lines)).await.unwrap().unwrap().unwrap();
        let number: u32 = first.strip_prefix("tick ").unwrap().parse().unwrap();
        assert!(number > 5, "{first}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn previous_is_the_run_before() {
    on_shared_node(async |t| {
        let script = format!("if [ -e /v/was ]; then echo second; {STAY}; fi; touch /v/was; echo first; exit 1");
        let main =
            crate::harness::pods::busybox_with(&script, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        t.pod("twice", json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [main]})).await;
        t.until("twice", "restarted", |p| restarts(p, "main") == 1 && crate::harness::pods::is_ready(p)).await;
        t.log_with("twice", "main", "up").await;
        assert_eq!(t.kubectl_text(&["logs", "twice"]), "second\nup\n");
        assert_eq!(t.kubectl_text(&["logs", "twice", "--previous"]), "first\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn without_a_run_before_previous_says_so() {
    on_shared_node(async |t| {
        ended(t, "once", "echo one").await;
        let error = t.kubectl(&["logs", "once", "--previous"]).unwrap_err();
        assert!(error.contains("previous terminated container \"main\" in pod \"once\" not found"), "{error}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_has_not_started_says_what_it_waits_for() {
    on_shared_node(async |t| {
        let spec = json!({"initContainers": [container("setup", STAY)], "containers": [busybox(STAY)]});
        t.pod("early", spec).await;
        t.log_with("early", "setup", "up").await;
        let error = t.kubectl(&["logs", "early", "-c", "main"]).unwrap_err();
        assert!(error.contains("container \"main\" in pod \"early\" is waiting to start: PodInitializing"), "{error}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn all_containers_and_init_containers_have_logs_of_their_own() {
    on_shared_node(async |t| {
        let spec = json!({
            "restartPolicy": "Never",
            "initContainers": [container("setup", "echo from setup")],
            "containers": [container("a", "echo from a"), container("b", "echo from b")],
        });
        t.run_pod("many", spec).await;
        assert_eq!(t.kubectl_text(&["logs", "many", "-c", "setup"]), "from setup\n");
        assert_eq!(t.kubectl_text(&["logs", "many", "-c", "b"]), "from b\n");
        let all = t.kubectl_text(&["logs", "many", "--all-containers", "--prefix"]);
        let mut lines: Vec<&str> = all.lines().collect();
        // kubectl asks for all of them at once.
        lines.sort_unstable();
        assert_eq!(lines, ["[pod/many/a] from a", "[pod/many/b] from b", "[pod/many/setup] from setup"]);
        let error = t.kubectl(&["logs", "many", "-c", "nobody"]).unwrap_err();
        assert!(error.contains("container nobody is not valid for pod many"), "{error}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_line_of_ten_mebibytes_arrives_whole() {
    on_shared_node(async |t| {
        let pod = ended(t, "long", "head -c 10485760 /dev/zero | tr '\\0' x; echo; echo after").await;
        assert_eq!(terminated(&pod, "main").unwrap().exit_code, 0);
        let log = t.kubectl(&["logs", "long"]).unwrap();
        assert_eq!(log.len(), 10_485_760 + 1 + 6);
        assert!(log.ends_with(b"x\nafter\n") && log[..10_485_760].iter().all(|b| *b == b'x'));
        let tail = t.kubectl(&["logs", "long", "--tail=2", "--timestamps"]).unwrap();
        let stamps = tail.windows(3).filter(|w| *w == b"Z x" || *w == b"Z a").count();
        assert_eq!(stamps, 2, "one time per line, however long: {}", tail.len());
        assert_eq!(t.kubectl_text(&["logs", "long", "--tail=1"]), "after\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn bytes_that_are_no_text_arrive_as_they_were_written() {
    on_shared_node(async |t| {
        ended(t, "binary", r"printf '\000\377\376a\r\303\n\001\n'; printf 'no newline at the end'").await;
        let log = t.kubectl(&["logs", "binary"]).unwrap();
        assert_eq!(log, b"\x00\xff\xfea\r\xc3\n\x01\nno newline at the end");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_slow_reader_gets_everything_and_holds_nobody_up() {
    on_shared_node(async |t| {
        ended(t, "large", "seq 1 400000").await;
        let path = format!("/api/v1/namespaces/{}/pods/large/log", t.namespace);
        let request = http::Request::get(path).body(Vec::new()).unwrap();
        let mut slow = Box::pin(t.client.request_stream(request).await.unwrap());
        let mut first = [0u8; 100];
        futures::AsyncReadExt::read_exact(&mut slow, &mut first).await.unwrap();
        // The rest of its 2.6 MB waits in buffers and in the node; others read meanwhile.
        for _ in 0..3 {
            assert_eq!(t.kubectl_text(&["logs", "large", "--tail=1"]), "400000\n");
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut rest = String::new();
        tokio::time::timeout(SOON, futures::AsyncReadExt::read_to_string(&mut slow, &mut rest)).await.unwrap().unwrap();
        assert!(rest.ends_with("399999\n400000\n"));
        let lines = (first.iter().filter(|b| **b == b'\n').count()) + rest.lines().count();
        assert!((400_000..=400_001).contains(&lines), "{lines} lines");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_reader_that_leaves_ends_the_work_for_it() {
    on_own_node("leaves-logs", Options::default(), async |t| {
        t.pod(
            "ticks",
            json!({"containers": [busybox("trap 'exit 0' TERM; while true; do echo tick; sleep 0.1; done")]}),
        )
        .await;
        t.log_with("ticks", "main", "tick").await;
        let open = || std::fs::read_dir(format!("/proc/{}/fd", t.node.pid())).unwrap().count();
        let before = open();
        for _ in 0..10 {
            let path = format!("/api/v1/namespaces/{}/pods/ticks/log?follow=true", t.namespace);
            let request = http::Request::get(path).body(Vec::new()).unwrap();
            let stream = t.client.request_stream(request).await.unwrap();
            let mut lines = futures::io::AsyncBufReadExt::lines(stream);
            futures::StreamExt::next(&mut lines).await.unwrap().unwrap();
        }
        crate::harness::wait::poll("back to the files it had open", SOON, async || {
            let now = open();
            if now <= before + 4 { Ok(()) } else { Err(format!("{now} now, {before} before")) }
        })
        .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn logs_survive_rotation() {
    on_own_node("rotates", Options::config("containerLogMaxSize: 100Ki\ncontainerLogMaxFiles: 3\n"), async |t| {
        ended(t, "much", "seq 1 40000").await;
        let log = t.kubectl_text(&["logs", "much"]);
        let numbers: Vec<u32> = log.lines().map(|l| l.parse().unwrap()).collect();
        assert_eq!(numbers.last(), Some(&40_000));
        assert!(numbers.len() < 40_000, "three files of 100 KiB cannot hold {} lines", numbers.len());
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "no line is missing inside");
        assert_eq!(t.kubectl_text(&["logs", "much", "--tail=2"]), "39999\n40000\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_log_of_a_pod_that_is_gone_is_gone() {
    on_shared_node(async |t| {
        let pod = ended(t, "gone", "echo one").await;
        assert!(status(&pod, "main").is_some() && pod.uid().is_some());
        t.delete("gone", Some(0)).await;
        t.gone("gone", SOON).await;
        let error = t.kubectl(&["logs", "gone"]).unwrap_err();
        assert!(error.contains("NotFound"), "{error}");
        crate::harness::wait::poll("unknown to the node too", SOON, async || {
            let body = endpoint(t, "gone", "");
            if body.is_empty() { Ok(()) } else { Err(body) }
        })
        .await;
    });
}
