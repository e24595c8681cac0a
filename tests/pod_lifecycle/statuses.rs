//! How statuses reach the API server: coalesced, again and again until they are through, and never the wrong Pod's.

use std::time::Duration;

use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};

use super::api::Fault;
use super::pods::pod;
use super::world::{Setup, World, until};

fn restarts_at_once() -> Setup {
    Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() }
}

/// The statuses of this Pod that were accepted, oldest first.
fn statuses(world: &World, uid: &str) -> Vec<Value> {
    world.api.state().statuses.iter().filter(|s| s.uid == uid).map(|s| s.status.clone()).collect()
}

#[tokio::test]
async fn while_a_patch_hangs_statuses_are_coalesced_and_the_newest_wins() {
    let world = World::with(restarts_at_once());
    let hold = world.api.hang_next("PATCH", "pods/a/status");
    let uid = world.create(pod("a"));
    until("the first write is under way", || world.api.state().count("PATCH", "pods/a/status") == 1).await;
    for attempt in 0..4 {
        let container = world.attempt(&uid, "main", attempt).await;
        world.runtime.exit_container(&container.id, 1);
    }
    world.attempt(&uid, "main", 4).await;
    assert_eq!(world.api.state().count("PATCH", "pods/a/status"), 1, "one write at a time");
    drop(hold);
    until("the newest is written", || world.api.container("a", 0)["restartCount"] == 4).await;
    until("it runs", || world.api.container("a", 0)["state"]["running"].is_object()).await;
    let written = statuses(&world, &uid);
    let seen = written.iter().map(|s| s["containerStatuses"][0]["restartCount"].as_i64().unwrap());
    assert!(seen.clone().is_sorted(), "an older status never follows a newer one: {:?}", seen.collect::<Vec<_>>());
    assert!(written.len() <= 4, "four restarts did not take a write each: {written:#?}");
}

#[tokio::test]
async fn a_status_is_written_again_until_the_api_server_takes_it() {
    let world = World::new();
    for code in [500, 503, 429, 409, 403] {
        world.api.fault_next("PATCH", "pods/a/status", Fault::Fail(code));
    }
    world.running(pod("a")).await;
    assert!(world.api.state().count("PATCH", "pods/a/status") > 5);
}

#[tokio::test]
async fn what_happens_while_the_api_server_is_away_is_told_when_it_is_back() {
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a")).await;
    let first = world.attempt(&uid, "main", 0).await;
    world.api.go_down();
    world.runtime.exit_container(&first.id, 7);
    world.attempt(&uid, "main", 1).await;
    let tried = world.api.state().count("PATCH", "pods/a/status");
    until("the status was tried twice", || world.api.state().count("PATCH", "pods/a/status") > tried + 1).await;
    world.api.come_back();
    until("it is told", || world.api.container("a", 0)["lastState"]["terminated"]["exitCode"] == 7).await;
    assert_eq!(world.api.container("a", 0)["restartCount"], 1);
}

#[tokio::test]
async fn a_pod_recreated_under_the_same_name_never_gets_the_old_ones_status() {
    let world = World::new();
    let old = world.running(pod("a").runs("stubborn").and("helper", "serve")).await;
    let hanging = world.api.hang_next("PATCH", "pods/a/status");
    world.runtime.exit_container(&world.attempt(&old, "helper", 0).await.id, 1);
    until("its restart is being written", || world.api.state().faults_left() == 0).await;
    let hold = world.runtime.hang_next(Verb::StopContainer);
    world.api.delete("a", 5);
    until("the old one is being stopped", || world.runtime.calls(Verb::StopContainer) > 0).await;
    world.api.delete("a", 0);
    let new = world.running(pod("a")).await;
    assert!(!world.containers(&old).await.is_empty(), "the new one did not wait for the old one");
    drop((hold, hanging));
    until("the old one is gone", || {
        let held = world.shared().addresses.held();
        held.len() == 1 && held[0].1 == new
    })
    .await;
    assert!(world.containers(&old).await.is_empty());
    let pod = world.api.pod("a").unwrap();
    assert_eq!(pod["metadata"]["uid"], json!(new));
    let main = world.attempt(&new, "main", 0).await;
    assert_eq!(pod["status"]["containerStatuses"][0]["containerID"], json!(format!("fake://{}", main.id)));
    let foreign = statuses(&world, &new).iter().any(|s| s["containerStatuses"][0]["state"]["terminated"].is_object());
    assert!(!foreign, "the old one's end was written to the new one");
}

/// Marks the object as a deletion by force does before it removes it.
fn mark_as_removed(world: &World) {
    world.api.edit("a", |pod| {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(0);
    });
}

#[tokio::test]
async fn nothing_is_written_to_a_pod_that_the_api_server_is_removing() {
    let world = World::new();
    world.running(pod("a")).await;
    let written = world.api.state().count("PATCH", "pods/a/status");
    mark_as_removed(&world);
    world.until_gone("a").await;
    assert_eq!(world.api.state().count("PATCH", "pods/a/status"), written);
}

#[tokio::test]
async fn what_waits_to_be_written_again_is_not_once_the_api_server_removes_the_pod() {
    let world = World::new();
    for _ in 0..100 {
        world.api.fault_next("PATCH", "pods/a/status", Fault::Fail(500));
    }
    world.create(pod("a"));
    until("a write has failed", || world.api.state().count("PATCH", "pods/a/status") > 0).await;
    mark_as_removed(&world);
    // The last words wait for what is still to be written.
    world.until_gone("a").await;
    assert!(world.api.state().faults_left() > 90, "it was written again and again");
}

#[tokio::test]
async fn the_same_status_is_not_written_twice() {
    let world = World::new();
    let uids = [world.running(pod("a")).await, world.running(pod("b").init("setup", "exit 0")).await];
    for name in ["a", "b"] {
        // Whatever was still to be written for it is written by the time it is gone.
        world.api.delete(name, 1);
        until("it is gone", || world.api.pod(name).is_none()).await;
    }
    for uid in uids {
        let written = statuses(&world, &uid);
        let twice = written.windows(2).find(|pair| pair[0] == pair[1]);
        assert!(twice.is_none(), "of {} writes one repeats the one before: {:#}", written.len(), twice.unwrap()[0]);
    }
}

#[tokio::test]
async fn the_last_status_is_written_before_the_object_is_deleted() {
    let world = World::new();
    let uid = world.running(pod("a")).await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
    let last = statuses(&world, &uid).pop().unwrap();
    let ended = &last["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 143, "{last:#}");
    assert_eq!(last["phase"], "Failed", "its process did not end with 0");
    let log = world.api.state().log.clone();
    let write = log.iter().rposition(|line| line.starts_with("PATCH") && line.ends_with("pods/a/status")).unwrap();
    let delete = log.iter().position(|line| line.starts_with("DELETE")).unwrap();
    assert!(write < delete, "{log:#?}");
}

#[tokio::test]
async fn a_ready_condition_that_somebody_else_has_written_is_corrected() {
    let world = World::new();
    world.running(pod("a")).await;
    until("it is ready", || world.api.condition("a", "Ready") == "True").await;
    world.api.edit("a", |pod| {
        for condition in pod["status"]["conditions"].as_array_mut().unwrap() {
            if condition["type"] == "Ready" {
                condition["status"] = json!("False");
                condition["reason"] = json!("NodeStatusUnknown");
            }
        }
    });
    until("it is ready again", || world.api.condition("a", "Ready") == "True").await;
    let pod = world.api.pod("a").unwrap();
    let ready = pod["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
    assert_eq!(ready.get("reason"), None, "the foreign reason is gone too");
}

#[tokio::test]
async fn a_readiness_gate_keeps_the_pod_unready_until_its_owner_opens_it() {
    let world = World::new();
    world.running(pod("a").with("/spec/readinessGates", json!([{ "conditionType": "example.com/in" }]))).await;
    until("its containers are ready", || world.api.condition("a", "ContainersReady") == "True").await;
    assert_eq!(world.api.condition("a", "Ready"), "False");
    world.api.edit("a", |pod| {
        let conditions = pod["status"]["conditions"].as_array_mut().unwrap();
        conditions.push(json!({ "type": "example.com/in", "status": "True" }));
    });
    until("it is ready", || world.api.condition("a", "Ready") == "True").await;
    assert_eq!(world.api.condition("a", "example.com/in"), "True", "the gate's own condition stays");
}
