//! What people do with a function Pod besides calling it: logs, exec, port-forward, metrics, `lambdalet functions` and
//! `invoke`; and freezing, which they do not see.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::harness::http;
use crate::harness::node::{Options, output};
use crate::harness::pods::{busybox_with, pod_condition, pod_ip};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_own_node, on_shared_node};

/// Each environment has an id of its own, says that it is born, and each call says who served it.
const SERVER: &str = r#"
mkdir -p /tmp/www/cgi-bin
read -r id < /proc/sys/kernel/random/uuid
printf '#!/bin/sh\necho served %s >&2\nprintf "Content-Type: text/plain\\r\\n\\r\\n%s\\n"\n' "$id" "$id" > /tmp/www/cgi-bin/who
printf '#!/bin/sh\nsleep 2\nprintf "Content-Type: text/plain\\r\\n\\r\\n%s\\n"\n' "$id" > /tmp/www/cgi-bin/slow
chmod +x /tmp/www/cgi-bin/*
echo "born $id"
trap 'echo "bye $id"; exit 0' TERM
httpd -f -p 8080 -h /tmp/www & wait
"#;

/// A function of a plain HTTP server with these labels and annotations.
async fn function(t: &Case, name: &str, labels: Value, annotations: Value) -> Pod {
    // Small, so that what tests beside this one ask for does not take its replicas away.
    let limits = json!({"limits": {"cpu": "50m", "memory": "64Mi"}});
    let server = busybox_with(SERVER, json!({"ports": [{"containerPort": 8080}], "resources": limits}));
    t.labelled_pod(name, json!({"labels": labels, "annotations": annotations}), json!({"containers": [server]})).await;
    t.running(name).await
}

/// Calls it; what answers is the id of the environment.
async fn call(pod: &Pod) -> String {
    let answer = http::get(&format!("{}:8080", pod_ip(pod)), "/cgi-bin/who").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.text().trim().to_owned()
}

fn numbers(pod: &Pod) -> &str {
    pod_condition(pod, "lambdalet.dev/Replicas").and_then(|condition| condition.message.as_deref()).unwrap_or("")
}

async fn at_zero(t: &Case, name: &str) {
    t.until(name, "at zero", |pod| numbers(pod).starts_with("0/")).await;
}

fn quick() -> Value {
    json!({"lambdalet.dev/idle-timeout": "1s"})
}

fn lambdalet(t: &Case, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
    let command = command.args(args).args(["-n", &t.namespace]).env("KUBECONFIG", t.cluster.admin_kubeconfig());
    let done = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn logs_of_a_function_span_its_environments_in_the_order_of_time() {
    on_shared_node(async |t| {
        let pod = function(t, "spans", json!({"com.openfaas.scale.max": "2"}), quick()).await;
        assert_eq!(t.kubectl_text(&["logs", "spans"]), "", "nothing has run yet");
        let mut follower =
            tokio::process::Command::from(t.cluster.kubectl(&["-n", &t.namespace, "logs", "-f", "spans"]))
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
        let mut followed = BufReader::new(follower.stdout.take().unwrap()).lines();
        let mut next = async || tokio::time::timeout(SOON, followed.next_line()).await.unwrap().unwrap().unwrap();

        let first = call(&pod).await;
        assert_eq!(next().await, format!("born {first}"), "a log that is followed goes on with an environment");
        assert_eq!(next().await, format!("served {first}"));
        at_zero(t, "spans").await;
        let ended = t.log_with("spans", "main", &format!("bye {first}")).await;
        assert_eq!(ended, format!("born {first}\nserved {first}\nbye {first}\n"), "lines of the removed one stay");

        // The second one stays for as long as it is looked at.
        t.kubectl_text(&["annotate", "pod", "spans", "lambdalet.dev/idle-timeout=10m", "--overwrite"]);
        let second = call(&pod).await;
        assert_ne!(first, second);
        assert_eq!(next().await, format!("bye {first}"));
        assert_eq!(next().await, format!("born {second}"), "and with one that comes later");
        let all = format!("born {first}\nserved {first}\nbye {first}\nborn {second}\nserved {second}\n");
        assert_eq!(t.log_with("spans", "main", &format!("served {second}")).await, all);
        assert_eq!(
            t.kubectl_text(&["logs", "spans", "-c", "main", "--tail=3"]),
            all.lines().skip(2).collect::<Vec<_>>().join("\n") + "\n"
        );
        assert_eq!(t.kubectl_text(&["logs", "spans", "--tail=0"]), "");
        assert_eq!(t.kubectl_text(&["logs", "spans", "--limit-bytes=4"]), "born");
        assert_eq!(
            t.kubectl_text(&["logs", "spans", "--previous"]),
            format!("born {first}\nserved {first}\nbye {first}\n"),
            "what came before is what is gone"
        );
        let stamped = t.kubectl_text(&["logs", "spans", "--timestamps"]);
        let times: Vec<_> = stamped.lines().map(|line| line.split_once(' ').unwrap().0).collect();
        assert!(times.is_sorted() && times.len() == 5, "{stamped}");
        let since = t.kubectl_text(&["logs", "spans", &format!("--since-time={}", times[3])]);
        assert!(since.ends_with(&format!("born {second}\nserved {second}\n")), "{since}");
        assert!(t.kubectl(&["logs", "spans", "-c", "other"]).is_err());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn logs_of_environments_that_run_beside_each_other_are_one_log() {
    on_shared_node(async |t| {
        let labels = json!({"com.openfaas.scale.min": "2", "com.openfaas.scale.max": "2"});
        let pod = function(t, "beside", labels, json!({})).await;
        t.until("beside", "with two replicas", |pod| numbers(pod).starts_with("2/2 replicas, 2 env")).await;
        let address = format!("{}:8080", pod_ip(&pod));
        let both = tokio::join!(http::get(&address, "/cgi-bin/slow"), http::get(&address, "/cgi-bin/slow"));
        let mut ids = [both.0.unwrap().text(), both.1.unwrap().text()].map(|id| id.trim().to_owned());
        ids.sort();
        assert_ne!(ids[0], ids[1], "one call in each environment");
        let stamped = t.kubectl_text(&["logs", "beside", "--timestamps"]);
        let mut lines: Vec<_> = stamped.lines().map(|line| line.split_once(' ').unwrap()).collect();
        assert!(lines.is_sorted_by_key(|(time, _)| *time), "{stamped}");
        lines.sort_by_key(|(_, text)| *text);
        let texts: Vec<_> = lines.iter().map(|(_, text)| (*text).to_owned()).collect();
        assert_eq!(texts, ids.map(|id| format!("born {id}")));
        assert_eq!(t.kubectl_text(&["logs", "beside", "--tail=1"]).lines().count(), 1);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn exec_wakes_a_function_and_holds_its_replica_while_the_session_lasts() {
    on_shared_node(async |t| {
        function(t, "visited", json!({"com.openfaas.scale.max": "1"}), quick()).await;
        let here = t.kubectl_text(&["exec", "visited", "--", "sh", "-c", "ls /tmp/www/cgi-bin | head -1"]);
        assert_eq!(here, "slow\n");
        at_zero(t, "visited").await;
        let mut session = tokio::process::Command::from(t.cluster.kubectl(&[
            "-n",
            &t.namespace,
            "exec",
            "-i",
            "visited",
            "--",
            "sh",
            "-c",
            "echo in; cat",
        ]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
        let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().unwrap(), "in");
        // Three times its idle timeout: there is no event for what does not happen.
        let gone = tokio::time::timeout(Duration::from_secs(3), at_zero(t, "visited")).await;
        // The numbers of before may be shown for a moment; what counts is that the session lives.
        drop(gone);
        {
            use tokio::io::AsyncWriteExt as _;
            let mut stdin = session.stdin.take().unwrap();
            stdin.write_all(b"still here\n").await.unwrap();
            stdin.flush().await.unwrap();
            assert_eq!(lines.next_line().await.unwrap().unwrap(), "still here");
        }
        assert!(session.wait().await.unwrap().success());
        at_zero(t, "visited").await;
        let wrong = t.kubectl(&["exec", "visited", "-c", "other", "--", "true"]).unwrap_err();
        assert!(wrong.contains("other"), "{wrong}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn port_forward_reaches_the_front() {
    on_shared_node(async |t| {
        function(t, "forwarded", json!({"com.openfaas.scale.max": "1"}), quick()).await;
        let mut forward = tokio::process::Command::from(t.cluster.kubectl(&[
            "-n",
            &t.namespace,
            "port-forward",
            "forwarded",
            ":8080",
        ]))
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
        let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
        let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        let address = line.trim_start_matches("Forwarding from ").split(" ->").next().unwrap().to_owned();
        let answer = http::get(&address, "/cgi-bin/who").await.unwrap();
        assert_eq!(answer.status, 200);
        assert_eq!(answer.text().trim().len(), 36, "{}", answer.text());
    });
}

/// The function's container, and whether it is paused.
fn container(pod: &Pod) -> Option<(String, bool)> {
    let filter = format!("name={}", pod.uid().unwrap());
    let listed =
        output("docker", &["ps", "--no-trunc", "--filter", &filter, "--format", "{{.ID}} {{.Names}} {{.Status}}"]);
    let line = listed.lines().find(|line| line.contains("main"))?.to_owned();
    Some((line.split(' ').next()?.to_owned(), line.contains("(Paused)")))
}

async fn frozen(pod: &Pod) -> String {
    poll("frozen", SOON, async || match container(pod) {
        Some((id, true)) => Ok(id),
        other => Err(format!("{other:?}")),
    })
    .await
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_idle_environment_is_frozen_and_a_call_thaws_it() {
    on_own_node("freezer", Options::default(), async |t| {
        let labels = json!({"com.openfaas.scale.min": "1", "com.openfaas.scale.max": "1"});
        let pod = function(t, "frozen", labels, json!({"lambdalet.dev/freeze-after": "50ms"})).await;
        let id = call(&pod).await;
        let before = frozen(&pod).await;
        let mut took = Vec::new();
        for _ in 0..15 {
            let begun = Instant::now();
            assert_eq!(call(&pod).await, id);
            took.push(begun.elapsed());
            let warm = Instant::now();
            assert_eq!(call(&pod).await, id);
            took.last_mut().map(|took| *took = took.saturating_sub(warm.elapsed())).unwrap();
            frozen(&pod).await;
        }
        took.sort();
        println!("thaw, p50 of {}: {:?}, longest {:?}", took.len(), took[took.len() / 2], took[took.len() - 1]);

        // Its numbers say so, exec wakes it, and it is frozen again.
        let metrics = t.kubectl_text(&["get", "--raw", &format!("/api/v1/nodes/{}/proxy/metrics", t.node.name)]);
        let line = metrics.lines().find(|l| l.contains("function_environments{") && l.contains(r#"state="frozen""#));
        assert!(line.is_some_and(|line| line.ends_with(" 1")), "{line:?}");
        assert_eq!(t.kubectl_text(&["exec", "frozen", "--", "echo", "in"]), "in\n");
        assert_eq!(frozen(&pod).await, before);

        // A restart of the node leaves it frozen, and the next call thaws it.
        t.node.restart(&t.client).await;
        assert_eq!(container(&pod), Some((before.clone(), true)), "it was adopted as it was");
        let address = format!("{}:8080", pod_ip(&pod));
        let answer = poll("answering again", SOON, async || http::get(&address, "/cgi-bin/who").await).await;
        assert_eq!(answer.text().trim(), id, "and serves as before");
        assert_eq!(frozen(&pod).await, before);
        // A frozen one ends as any other; what it leaves behind is looked for when the test has ended.
        t.delete("frozen", None).await;
        t.gone("frozen", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn metrics_of_a_function_come_and_go_with_it() {
    on_shared_node(async |t| {
        let pod = function(t, "counted", json!({"com.openfaas.scale.max": "3"}), json!({})).await;
        call(&pod).await;
        let of_pod = || {
            let path = format!("/api/v1/nodes/{}/proxy/metrics", t.node.name);
            let text = t.kubectl_text(&["get", "--raw", &path]);
            let uid = format!("uid=\"{}\"", pod.uid().unwrap());
            text.lines().filter(|line| line.contains(&uid)).map(str::to_owned).collect::<Vec<_>>()
        };
        let shown = of_pod();
        let value = |name: &str, state: &str| {
            let line =
                shown.iter().find(|l| l.starts_with(&format!("lambdalet_function_{name}{{")) && l.contains(state));
            line.unwrap_or_else(|| panic!("{name} in {shown:#?}")).rsplit_once(' ').unwrap().1.to_owned()
        };
        assert_eq!(value("replicas", r#"state="ready""#), "1");
        assert_eq!(value("environments", r#"state="idle""#), "1");
        assert_eq!(value("replicas_max", ""), "3");
        assert_eq!(value("queued", ""), "0");
        assert_eq!(value("running", ""), "0");
        assert_eq!(value("cold_starts_total", ""), "1");
        assert_eq!(value("start_seconds_count", ""), "1");
        t.delete("counted", Some(1)).await;
        t.gone("counted", SOON).await;
        poll("without its series", SOON, async || {
            let left = of_pod();
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
        .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn functions_and_invoke_show_and_call_one_through_the_api_server() {
    on_shared_node(async |t| {
        let (code, out, err) = lambdalet(t, &["functions"]);
        assert_eq!((code, out.as_str()), (Some(0), ""), "{err}");
        assert!(err.contains(&format!("no functions in namespace {}", t.namespace)), "{err}");

        function(t, "tried", json!({"com.openfaas.scale.max": "3"}), json!({})).await;
        let (code, out, err) = lambdalet(t, &["invoke", "tried", "--path", "/cgi-bin/who"]);
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(out.trim().len(), 36, "{out}");
        let (code, _, err) = lambdalet(t, &["invoke", "tried", "--path", "/nowhere"]);
        assert_eq!(code, Some(4), "{err}");
        assert!(err.contains("404"), "{err}");
        let (code, _, err) = lambdalet(t, &["invoke", "missing"]);
        assert_eq!(code, Some(1));
        assert!(err.contains("there is no Pod missing in namespace"), "{err}");

        t.until("tried", "shown with its replica", |pod| numbers(pod).starts_with("1/3 replicas, 1 env")).await;
        let (code, out, _) = lambdalet(t, &["functions"]);
        assert_eq!(code, Some(0));
        let row: Vec<_> = out.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row[..5], [t.namespace.as_str(), "tried", &t.node.name, "1/3", "1"], "{out}");
        assert_eq!(row.len(), 8, "{out}");
    });
}
