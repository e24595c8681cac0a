//! A deletion never waits for what was begun before it.

use std::time::Duration;

use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::{PodBuilder, pod};
use super::world::{World, until};

/// How soon "at once" is: far less than the ten seconds of the shortest hold.
const AT_ONCE: Duration = Duration::from_secs(6);

/// Deletes the Pod while this verb hangs for good.
async fn delete_while_hanging(verb: Verb, pod: PodBuilder) {
    let world = World::new();
    let _never = world.runtime.hang_next(verb);
    world.create(pod);
    until(&format!("{} hangs", verb.name()), || world.runtime.calls(verb) == 1).await;
    world.api.delete("a", 30);
    world.until_nothing_is_left_within(AT_ONCE).await;
    until("the object is gone", || world.api.pod("a").is_none()).await;
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_an_image_pull() {
    delete_while_hanging(Verb::PullImage, pod("a")).await;
}

#[tokio::test]
async fn a_deadline_does_not_wait_for_an_image_pull() {
    let world = World::new();
    let _never = world.runtime.hang_next(Verb::PullImage);
    world.create(pod("a").with("/spec/activeDeadlineSeconds", json!(1)));
    world.until_phase("a", "Failed").await;
    assert_eq!(world.api.pod("a").unwrap()["status"]["reason"], "DeadlineExceeded");
}

#[tokio::test]
async fn a_pull_given_up_lets_the_next_one_begin() {
    let world = World::new();
    let _never = world.runtime.hang_next(Verb::PullImage);
    world.create(pod("a"));
    until("the pull hangs", || world.runtime.calls(Verb::PullImage) == 1).await;
    world.create(pod("b"));
    world.api.delete("a", 30);
    world.until_phase("b", "Running").await;
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_sandbox() {
    delete_while_hanging(Verb::RunPodSandbox, pod("a")).await;
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_container_to_be_made() {
    delete_while_hanging(Verb::CreateContainer, pod("a")).await;
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_container_to_start() {
    delete_while_hanging(Verb::StartContainer, pod("a").init("setup", "serve")).await;
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_crash_loop() {
    let world = World::new();
    let uid = world.create(pod("a"));
    for attempt in 0..2 {
        let container = world.attempt(&uid, "main", attempt).await;
        world.runtime.exit_container(&container.id, 1);
    }
    until("it is held back", || world.api.container("a", 0)["state"]["waiting"]["reason"] == "CrashLoopBackOff").await;
    world.api.delete("a", 30);
    world.until_nothing_is_left_within(AT_ONCE).await;
    assert_eq!(world.runtime.calls(Verb::StartContainer), 2);
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_volume_that_cannot_be_made() {
    let world = World::new();
    world.create(pod("a").mounts_config("absent"));
    until("it was told", || world.api.state().reasons("a").contains(&"FailedMount".to_owned())).await;
    world.api.delete("a", 30);
    world.until_nothing_is_left_within(AT_ONCE).await;
    until("the object is gone", || world.api.pod("a").is_none()).await;
    assert_eq!(world.runtime.calls(Verb::RunPodSandbox), 0);
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_config_map_request() {
    let world = World::new();
    let _never = world.api.hang_next("GET", "configmaps/slow");
    world.create(pod("a").mounts_config("slow"));
    until("the request hangs", || world.api.state().count("GET", "configmaps/slow") == 1).await;
    world.api.delete("a", 30);
    world.until_nothing_is_left_within(AT_ONCE).await;
}

#[tokio::test]
async fn a_status_write_that_hangs_delays_neither_start_nor_stop() {
    let world = World::new();
    let _never = world.api.hang_next("PATCH", "pods/a/status");
    let uid = world.create(pod("a"));
    until("the write hangs", || world.api.state().count("PATCH", "pods/a/status") == 1).await;
    world.attempt(&uid, "main", 0).await;
    world.api.delete("a", 30);
    until("it is stopped", || world.runtime.calls(Verb::RemovePodSandbox) > 0).await;
}
