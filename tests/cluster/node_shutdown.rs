//! The host goes down: logind is played by two programs of the names that the node calls, which do what a test says.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Node as NodeObject, Pod};
use kube::Api;
use kube::api::ListParams;
use serde_json::json;

use crate::harness::node::{Options, condition, output};
use crate::harness::on_own_node;
use crate::harness::pods::{busybox, holds, phase, pod_reason, sleeper};
use crate::harness::wait::{SOON, poll, watch_until};

/// `busctl`: the delay that logind grants, and its signals.
const BUSCTL: &str = r#"#!/bin/sh
here=$(dirname "$0")
case "$*" in
*get-property*) echo "t 60000000" ;;
*monitor*) echo "Monitoring bus message stream." >&2; exec cat <>"$here/signals" ;;
*) echo "not played: $*" >&2; exit 1 ;;
esac
"#;
/// `systemd-inhibit`: the lock is a file as long as the command runs.
const INHIBIT: &str = r#"#!/bin/sh
here=$(dirname "$0")
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
touch "$here/lock"
exec 3<&0
( "$@"; rm -f "$here/lock" ) <&3 &
wait
"#;

/// The stand-in for logind.
struct Logind {
    dir: tempfile::TempDir,
    signals: File,
}

impl Logind {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("busctl", BUSCTL), ("systemd-inhibit", INHIBIT)] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let signals = dir.path().join("signals");
        output("mkfifo", &[signals.to_str().unwrap()]);
        // Open for reading too, so that nobody waits for the other end.
        let signals = OpenOptions::new().read(true).write(true).open(signals).unwrap();
        Self { dir, signals }
    }

    /// An environment in which its programs are the first that are found.
    fn environment(&self) -> Vec<(String, String)> {
        let path = std::env::var("PATH").unwrap();
        vec![("PATH".to_owned(), format!("{}:{path}", self.dir.path().display()))]
    }

    fn says(&mut self, goes_down: bool) {
        let payload = json!({"type": "b", "data": [goes_down]});
        let message = json!({"type": "signal", "member": "PrepareForShutdown", "payload": payload});
        writeln!(self.signals, "{message}").unwrap();
    }

    fn lock(&self) -> PathBuf {
        self.dir.path().join("lock")
    }

    async fn is_held(&self, held: bool) {
        let lock = self.lock();
        poll(&format!("the lock is there: {held}"), SOON, async || {
            if lock.exists() == held { Ok(()) } else { Err(String::new()) }
        })
        .await;
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn pods_have_their_time_before_the_host_goes_down() {
    let mut logind = Logind::new();
    let config = "shutdownGracePeriod: 40s\nshutdownGracePeriodCriticalPods: 20s\n".to_owned();
    let options = Options { config, environment: logind.environment(), ..Options::default() };
    on_own_node("goesdown", options, async |t| {
        logind.is_held(true).await;
        let polite = "trap 'sleep 2; exit 5' TERM; echo up; while true; do sleep 3600 & wait; done";
        t.pod("polite", json!({"restartPolicy": "Never", "containers": [busybox(polite)]})).await;
        let mut critical = sleeper();
        critical["priorityClassName"] = json!("system-node-critical");
        t.pod("critical", critical).await;
        t.running("polite").await;
        t.running("critical").await;
        logind.says(true);
        let nodes: Api<NodeObject> = Api::all(t.client.clone());
        watch_until(nodes, &t.node.name, "NotReady at once", Duration::from_secs(5), |n| {
            n.is_some_and(|n| condition(n, "Ready") == Some("False"))
        })
        .await;
        let node = Api::<NodeObject>::all(t.client.clone()).get(&t.node.name).await.unwrap();
        let ready = node.status.unwrap().conditions.unwrap().into_iter().find(|c| c.type_ == "Ready").unwrap();
        let (reason, why) = (ready.reason.unwrap(), ready.message.unwrap());
        assert_eq!((reason.as_str(), why.as_str()), ("KubeletNotReady", "node is shutting down"));
        let mut late = sleeper();
        late["nodeName"] = json!(t.node.name);
        t.pod("late", late).await;
        let late = t.until("late", "refused", |pod| phase(pod) == "Failed").await;
        let message = late.status.as_ref().unwrap().message.clone().unwrap();
        let text = "Pod was rejected: Pod was rejected as the node is shutting down.";
        assert_eq!((pod_reason(&late), message.as_str()), ("NodeShutdown", text));
        t.until("critical", "ended", |pod| phase(pod) == "Failed").await;
        for name in ["polite", "critical"] {
            let pod = t.api::<Pod>().get(name).await.unwrap();
            assert_eq!((phase(&pod), pod_reason(&pod)), ("Failed", "Terminated"), "{name}");
            assert!(holds(&pod, "DisruptionTarget"), "{name}");
        }
        logind.is_held(false).await;
        assert!(t.log("polite", "main").await.contains("up"), "its log can still be read");
        logind.says(false);
        t.node.ready(&t.client).await;
        logind.is_held(true).await;
        let events: Api<Event> = Api::namespaced(t.client.clone(), "default");
        let params = ListParams::default().fields(&format!("involvedObject.name={}", t.node.name));
        let told = events.list(&params).await.unwrap();
        let reasons: Vec<_> = told.iter().filter_map(|event| event.reason.as_deref()).collect();
        for reason in ["Starting", "NodeHasSufficientMemory", "NodeReady", "NodeNotReady", "NodeShutdown"] {
            assert!(reasons.contains(&reason), "{reason} is not among {reasons:?}");
        }
    });
}
