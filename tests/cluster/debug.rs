//! `kubectl debug`: ephemeral containers on a real node.

use std::process::Stdio;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use serde_json::json;

use crate::exec::{run, text};
use crate::harness::node::Options;
use crate::harness::pods::{STAY, busybox, busybox_with, exit_code, identity, is_ready, pod_ip, with};
use crate::harness::wait::SOON;
use crate::harness::{BUSYBOX, on_own_node, on_shared_node};

/// What the main container runs, to be looked for.
const MARK: &str = "sleep 987654";

fn ephemeral<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    pod.status.as_ref()?.ephemeral_container_statuses.iter().flatten().find(|c| c.name == name)
}

fn state(pod: &Pod, name: &str) -> ContainerState {
    ephemeral(pod, name).and_then(|status| status.state.clone()).unwrap_or_default()
}

/// `kubectl debug` of the Pod `p` with a container of that name.
pub(crate) fn debug<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    const IMAGE: [&str; 4] = ["--image", BUSYBOX, "--image-pull-policy=IfNotPresent", "--profile=general"];
    [&["debug", "p", "-c", name][..], &IMAGE, more].concat()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_running_pod_is_debugged_beside_its_target() {
    on_own_node("debugged", Options::default(), async |t| {
        let mount = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let main = busybox_with(&format!("echo kept >/v/file; exec {MARK}"), mount.clone());
        let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [main],
                          "terminationGracePeriodSeconds": 1});
        t.pod("p", spec).await;
        let first = t.running("p").await;
        let folder = tempfile::tempdir().unwrap();
        let custom = folder.path().join("custom.json");
        let partial = with(mount, json!({"env": [{"name": "WORD", "value": "cheese"}]}));
        std::fs::write(&custom, partial.to_string()).unwrap();

        // It has the Pod's network and volumes, and the target's processes, and what is written to it arrives.
        let script = "read line; echo \"$line $WORD\"; cat /v/file; hostname -i; ps; exit 3";
        let custom = format!("--custom={}", custom.display());
        let arguments = debug("dbg", &["-i", "--target=main", &custom, "--", "sh", "-c", script]);
        let ended = run(t, "true", &arguments, b"hello\n");
        let seen = text(&ended.stdout);
        for wanted in ["hello cheese\nkept\n", pod_ip(&first), MARK] {
            assert!(seen.contains(wanted), "{wanted:?} is missing in {seen}\n{}", text(&ended.stderr));
        }
        let is_over = |pod: &Pod| state(pod, "dbg").terminated.is_some();
        let pod = t.until("p", "done with its debugger", is_over).await;
        assert_eq!(state(&pod, "dbg").terminated.unwrap().exit_code, 3);
        assert!(is_ready(&pod));
        assert_eq!(identity(&pod, "main"), identity(&first, "main"));
        assert!(t.log("p", "dbg").await.contains("hello cheese"), "its log stays");
        let events = t.kubectl_text(&["get", "events", "-o", "yaml"]);
        assert!(events.contains("spec.ephemeralContainers{dbg}"), "{events}");

        // One that stays is entered, and adopted by the next process of the node.
        t.kubectl_text(&debug("stays", &["--target=main", "--", "sh", "-c", STAY]));
        let runs = |pod: &Pod| state(pod, "stays").running.is_some();
        let before = t.until("p", "debugged again", runs).await;
        assert!(t.kubectl_text(&["exec", "p", "-c", "stays", "--", "ps"]).contains(MARK));
        t.node.restart(&t.client).await;
        assert!(t.log_with("p", "stays", "up").await.contains("up"));
        let after = t.running("p").await;
        assert_eq!(ephemeral(&after, "stays"), ephemeral(&before, "stays"));
        assert_eq!(state(&after, "dbg").terminated.unwrap().exit_code, 3, "never started again");
        t.delete("p", None).await;
        t.gone("p", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_debugger_has_a_terminal() {
    on_shared_node(async |t| {
        t.pod("p", json!({"containers": [busybox(STAY)]})).await;
        t.running("p").await;
        // The size is there once kubectl is.
        let script = "until [ \"$(stty size)\" = \"33 99\" ]; do sleep 0.1; done; echo sized; \
                      read line; tty; echo \"got $line\"";
        let arguments = debug("dbg", &["-it", "--target=main", "--", "sh", "-c", script]);
        let command = t.cluster.kubectl(&[&["-n", &t.namespace][..], &arguments].concat());
        let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
        let line = words.iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
        // util-linux' script gives kubectl a terminal, on which the line is typed.
        let mut typed = std::process::Command::new("script");
        typed.args(["-qec", &format!("stty rows 33 cols 99; {line}"), "/dev/null"]);
        let mut child = typed.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        t.until("p", "debugged", |pod: &Pod| state(pod, "dbg").running.is_some()).await;
        t.log_with("p", "dbg", "sized").await;
        std::io::Write::write_all(&mut stdin, b"cheese\n").unwrap();
        let out = text(&child.wait_with_output().unwrap().stdout);
        assert!(out.contains("/dev/pts/") && out.contains("got cheese"), "{out}");
        drop(stdin);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_target_that_does_not_run_is_told() {
    on_shared_node(async |t| {
        let ends = with(busybox("exit 0"), json!({"name": "ends"}));
        t.pod("p", json!({"restartPolicy": "Never", "containers": [busybox(STAY), ends]})).await;
        t.until("p", "half done", |pod: &Pod| exit_code(pod, "ends") == Some(0)).await;
        t.kubectl_text(&debug("dbg", &["--target=ends", "--", "true"]));
        let waits = |pod: &Pod| state(pod, "dbg").waiting.is_some_and(|w| w.message.is_some());
        let pod = t.until("p", "waiting for its target", waits).await;
        let waiting = state(&pod, "dbg").waiting.unwrap();
        assert_eq!(waiting.reason.as_deref(), Some("CreateContainerError"));
        let message = waiting.message.unwrap();
        assert!(message.contains("its target container ends does not run"), "{message}");
        assert!(t.event("p", "Failed").await.contains("its target container ends does not run"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_is_not_debugged_and_says_so() {
    on_shared_node(async |t| {
        let server = busybox_with("exec httpd -f -p 8080", json!({"ports": [{"containerPort": 8080}]}));
        let labels = json!({"labels": {"com.openfaas.scale.min": "0"}});
        t.labelled_pod("p", labels, json!({"containers": [server]})).await;
        t.running("p").await;
        t.kubectl_text(&debug("dbg", &["--", "true"]));
        let told = |pod: &Pod| state(pod, "dbg").waiting.is_some_and(|w| w.message.is_some());
        let pod = t.until("p", "told that it is not debugged", told).await;
        assert_eq!(state(&pod, "dbg").waiting.unwrap().reason.as_deref(), Some("UnsupportedPodFeature"));
        assert!(is_ready(&pod));
        assert!(t.event("p", "UnsupportedPodFeature").await.contains("does not debug function Pods"));
    });
}
