//! `kill -9` at any moment, and at each named step: what ran runs on, what was half done is finished or removed.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::ListParams;
use serde_json::json;

use crate::harness::leaks::Leaks;
use crate::harness::node::Options;
use crate::harness::on_own_node;
use crate::harness::pods::{
    STAY, busybox, busybox_with, container, exit_code, has_ended, identity, is_ready, restarts, sleeper, status,
};
use crate::harness::wait::{SOON, poll};

/// How often the process is killed.
const KILLS: u32 = 50;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn running_containers_are_adopted_untouched() {
    on_own_node("adopts", Options::default(), async |t| {
        let before = Leaks::of(&t.node);
        t.secret("keys", json!({"password": "old"})).await;
        let volumes =
            json!([{"name": "s", "secret": {"secretName": "keys"}}, {"name": "m", "emptyDir": {"medium": "Memory"}}]);
        let mounts = json!({"volumeMounts": [{"name": "s", "mountPath": "/s"}, {"name": "m", "mountPath": "/m"}]});
        let spec = json!({
            "volumes": volumes,
            "initContainers": [container("setup", "exit 0")],
            "containers": [busybox_with(&format!("echo kept >/m/file; {STAY}"), mounts), container("other", STAY)],
        });
        t.pod("web", spec).await;
        let first = t.running("web").await;
        for _ in 0..3 {
            t.node.restart(&t.client).await;
        }
        assert_eq!(t.log_with("web", "main", "up").await, "up\n", "its log is served again");
        let last = t.running("web").await;
        for name in ["main", "other"] {
            assert_eq!(identity(&last, name), identity(&first, name));
        }
        assert_eq!(status(&last, "setup"), status(&first, "setup"), "init containers are not run again");
        t.delete("web", Some(2)).await;
        t.gone("web", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_happened_while_the_node_was_away_is_made_up_for() {
    on_own_node("away", Options::default(), async |t| {
        let before = Leaks::of(&t.node);
        let dir = tempfile::tempdir().unwrap();
        let volume = json!([{"name": "v", "hostPath": {"path": dir.path()}}]);
        let mounts = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let until_told =
            "while [ ! -e /v/end ]; do sleep 0.1; done; echo -n my last words >/dev/termination-log; exit 4";
        let spec =
            json!({"restartPolicy": "Never", "volumes": volume, "containers": [busybox_with(until_told, mounts)]});
        t.pod("ends", spec).await;
        for name in ["graceful", "forced", "replaced"] {
            t.pod(name, sleeper()).await;
        }
        for name in ["ends", "graceful", "forced", "replaced"] {
            t.running(name).await;
        }
        t.node.kill9();
        std::fs::write(dir.path().join("end"), "").unwrap();
        t.delete("graceful", None).await;
        t.delete("forced", Some(0)).await;
        t.delete("replaced", Some(0)).await;
        t.gone("replaced", SOON).await;
        let anew = t.pod("replaced", sleeper()).await;
        t.pod("new", sleeper()).await;
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;

        let ended = t.until("ends", "known to have ended", has_ended).await;
        assert_eq!(exit_code(&ended, "main"), Some(4));
        let message = crate::harness::pods::terminated(&ended, "main").unwrap().message.clone();
        assert_eq!(message.as_deref(), Some("my last words"));
        t.gone("graceful", SOON).await;
        t.running("new").await;
        let replaced = t.running("replaced").await;
        assert_eq!((replaced.uid(), restarts(&replaced, "main")), (anew.uid(), 0));
        for name in ["ends", "new", "replaced"] {
            t.delete(name, Some(1)).await;
            t.gone(name, SOON).await;
        }
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crash_loops_count_and_wait_survive_a_restart() {
    on_own_node("counts", Options::default(), async |t| {
        t.pod("crash", json!({"containers": [busybox("exit 1")]})).await;
        let looping = |p: &Pod| {
            restarts(p, "main") == 1 && crate::harness::pods::waits_for(p, "main") == Some("CrashLoopBackOff")
        };
        t.until("crash", "in CrashLoopBackOff", looping).await;
        t.node.restart(&t.client).await;
        let pod = t.until("crash", "restarted once more", |p| restarts(p, "main") >= 2).await;
        assert_eq!(restarts(&pod, "main"), 2, "the count goes on");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn fifty_kills_at_random_moments_lose_restart_and_leak_nothing() {
    on_own_node("killed", Options::default(), async |t| {
        let before = Leaks::of(&t.node);
        let mut known: BTreeMap<String, (String, String, i32, String)> = BTreeMap::new();
        for kill in 0..KILLS {
            // One Pod comes and the oldest goes, in one of three ways, around every kill.
            t.pod(&format!("pod-{kill}"), sleeper()).await;
            if kill >= 4 {
                let grace = [None, Some(0), Some(1)][kill as usize % 3];
                t.delete(&format!("pod-{}", kill - 4), grace).await;
                known.remove(&format!("pod-{}", kill - 4));
            }
            let moment = Duration::from_millis(rand::random_range(0..900));
            tokio::time::sleep(moment).await;
            t.node.kill9();
            t.node.spawn(&[]);
            for pod in t.api::<Pod>().list(&ListParams::default()).await.unwrap() {
                if !is_ready(&pod) || pod.metadata.deletion_timestamp.is_some() {
                    continue;
                }
                let now = identity(&pod, "main");
                let first = known.entry(pod.name_any()).or_insert_with(|| now.clone());
                assert_eq!(*first, now, "{} was restarted by kill {kill}, {moment:?} after its start", pod.name_any());
            }
        }
        t.node.adopted(&t.client).await;
        for number in KILLS - 4..KILLS {
            let name = format!("pod-{number}");
            let pod = t.running(&name).await;
            assert_eq!(restarts(&pod, "main"), 0, "{name}");
            if let Some(first) = known.get(&name) {
                assert_eq!(*first, identity(&pod, "main"), "{name}");
            }
        }
        for number in 0..KILLS - 4 {
            t.gone(&format!("pod-{number}"), SOON).await;
        }
        poll("exactly the four Pods' containers on the host", SOON, async || {
            let there = Leaks::of(&t.node).containers;
            if there.len() == 8 { Ok(()) } else { Err(there.join("\n")) }
        })
        .await;
        for number in KILLS - 4..KILLS {
            t.delete(&format!("pod-{number}"), Some(1)).await;
        }
        for number in KILLS - 4..KILLS {
            t.gone(&format!("pod-{number}"), SOON).await;
        }
        before.again(&t.node).await;
    });
}

fn killed_at(step: &str) {
    killed_at_on(&format!("at-{step}"), step, Options::default());
}

/// The process of a node of that name kills itself at the step; then one without the failpoint takes over.
pub(crate) fn killed_at_on(name: &str, step: &str, options: Options) {
    assert!(lambdalet::failpoint::NAMES.contains(&step), "no such failpoint: {step}");
    on_own_node(name, options, async |t| {
        let before = Leaks::of(&t.node);
        t.config_map("settings", json!({"a": "1"})).await;
        t.pod("old", sleeper()).await;
        let old = t.running("old").await;
        let mut spec = sleeper();
        spec["volumes"] =
            json!([{"name": "v", "configMap": {"name": "settings"}}, {"name": "e", "emptyDir": {"medium": "Memory"}}]);
        spec["containers"][0]["volumeMounts"] =
            json!([{"name": "v", "mountPath": "/v"}, {"name": "e", "mountPath": "/e"}]);
        let at_end = matches!(step, "stop" | "status" | "remove");
        if at_end {
            t.pod("hit", spec.clone()).await;
            t.running("hit").await;
        }
        t.node.kill9();
        t.node.spawn(&[("LAMBDALET_FAILPOINT".to_owned(), step.to_owned())]);
        if at_end {
            t.delete("hit", None).await;
        } else {
            t.pod("hit", spec).await;
        }
        let ended = tokio::time::timeout(SOON, t.node.ended()).await;
        let status = ended.unwrap_or_else(|_| panic!("it never came to {step}:\n{}", t.node.log()));
        assert!(!status.success() && t.node.log().contains(&format!("failpoint {step}: killing")), "{status}");

        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        if at_end {
            t.gone("hit", SOON).await;
        } else {
            let pod = t.running("hit").await;
            assert_eq!(restarts(&pod, "main"), 0, "what was half made is no restart");
        }
        let still = t.running("old").await;
        assert_eq!(identity(&still, "main"), identity(&old, "main"), "the other Pod never noticed");
        for pod in t.api::<Pod>().list(&ListParams::default()).await.unwrap() {
            t.delete(&pod.name_any(), Some(1)).await;
            t.gone(&pod.name_any(), SOON).await;
        }
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_an_address_was_given() {
    killed_at("address");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_volumes_were_made() {
    killed_at("mount");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_sandbox_was_up() {
    killed_at("sandbox");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_sandbox_was_plugged_in() {
    killed_at("plug");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_a_container_was_made() {
    killed_at("create");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_a_container_was_started() {
    killed_at("start");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_containers_were_stopped() {
    killed_at("stop");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_final_status_was_written() {
    killed_at("status");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn killed_when_the_sandbox_was_removed() {
    killed_at("remove");
}
