//! How Pods end: with grace, with less of it, and without.

use std::time::{Duration, Instant};

use lambdalet::runtime::types::ContainerState;
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::pod;
use super::world::{World, until};

#[tokio::test]
async fn a_deleted_pod_ends_and_leaves_nothing() {
    let world = World::new();
    world.running(pod("a").init("setup", "exit 0").and("helper", "serve")).await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
    assert_eq!(world.api.state().count("DELETE", "pods/a"), 1);
    until("it was told", || world.api.state().reasons("a").contains(&"Killing".to_owned())).await;
}

#[tokio::test]
async fn a_force_deleted_pod_is_killed_and_leaves_nothing() {
    let world = World::new();
    let uid = world.running(pod("a").runs("stubborn")).await;
    world.attempt(&uid, "main", 0).await;
    world.api.delete("a", 3600);
    until("it is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    world.api.delete("a", 0);
    world.until_nothing_is_left_within(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_pod_whose_object_vanished_is_stopped_with_its_grace_and_leaves_nothing() {
    let world = World::new();
    let uid = world.running(pod("a").runs("stubborn").with("/spec/terminationGracePeriodSeconds", json!(1))).await;
    let began = Instant::now();
    world.api.remove("a");
    until("it is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    let state = world.containers(&uid).await[0].state;
    assert!(state == ContainerState::Running || began.elapsed() > Duration::from_secs(1), "its grace is kept");
    world.until_nothing_is_left_within(Duration::from_secs(5)).await;
    assert_eq!(world.api.state().count("DELETE", "pods/a"), 0, "there was nothing to delete");
}

#[tokio::test]
async fn a_shorter_grace_shortens_a_stop_under_way() {
    let world = World::new();
    world.running(pod("a").runs("stubborn")).await;
    world.api.delete("a", 3600);
    until("it is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    world.api.delete("a", 1);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_grace_period_of_centuries_does_no_harm() {
    let world = World::new();
    let forever = json!(i64::MAX);
    world.running(pod("a").with("/spec/terminationGracePeriodSeconds", forever.clone())).await;
    world.running(pod("b").runs("stubborn").with("/spec/terminationGracePeriodSeconds", forever)).await;
    for name in ["a", "b"] {
        world.api.delete(name, i64::MAX);
    }
    until("a is gone", || world.api.pod("a").is_none()).await;
    until("b is being stopped", || world.runtime.calls(Verb::StopContainer) == 2).await;
    world.api.delete("b", 1);
    world.until_gone("b").await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 3, "each stop was asked for once");
}

#[tokio::test]
async fn a_force_delete_while_the_removal_hangs_leaves_nothing() {
    let world = World::new();
    world.running(pod("a")).await;
    let _never = world.runtime.hang_next(Verb::RemovePodSandbox);
    world.api.delete("a", 30);
    until("it is being removed", || world.runtime.calls(Verb::RemovePodSandbox) == 1).await;
    world.api.delete("a", 0);
    world.until_nothing_is_left_within(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_pod_that_had_ended_by_itself_is_removed_when_it_is_deleted() {
    let world = World::new();
    world.create(pod("a").policy("Never").runs("exit 0"));
    world.until_phase("a", "Succeeded").await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_pod_past_its_deadline_fails_and_stays_ended() {
    let world = World::new();
    let uid = world.running(pod("a")).await;
    world.api.edit("a", |pod| pod["spec"]["activeDeadlineSeconds"] = json!(1));
    world.until_phase("a", "Failed").await;
    let pod = world.api.pod("a").unwrap();
    assert_eq!(pod["status"]["reason"], "DeadlineExceeded");
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 143);
    assert_eq!(world.api.condition("a", "Ready"), "False");
    assert!(world.containers(&uid).await.iter().all(|c| c.state == ContainerState::Exited && c.attempt == 0));
    until("it was told", || world.api.state().reasons("a").contains(&"DeadlineExceeded".to_owned())).await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_pod_deleted_while_the_api_server_is_away_is_ended_when_that_is_known() {
    let world = World::new();
    world.running(pod("a")).await;
    world.running(pod("b")).await;
    world.api.go_down();
    // What users did through another API server while this one could not be reached.
    world.api.delete("a", 30);
    world.api.remove("b");
    world.api.expire_watches();
    world.api.come_back();
    world.until_gone("a").await;
}
