//! A node that leaves its host: every Pod ends and is told of, and the runtime is empty.

use lambdalet::runtime::verb::Verb;

use serde_json::json;

use super::pods::pod;
use super::world::{World, until};

#[tokio::test]
async fn a_drain_ends_every_pod_tells_why_and_leaves_the_runtime_empty() {
    let mut world = World::new();
    world.running(pod("a").and("helper", "serve")).await;
    world.running(pod("b")).await;
    world.begin_drain();
    world.ended().await;
    for name in ["a", "b"] {
        let pod = world.api.pod(name).expect("its object stays");
        assert_eq!((&pod["status"]["phase"], &pod["status"]["reason"]), (&"Failed".into(), &"Terminated".into()));
        assert_eq!(world.api.condition(name, "Ready"), "False");
    }
    world.assert_the_runtime_is_empty().await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_an_image_pull() {
    let mut world = World::new();
    let _never = world.runtime.hang_next(Verb::PullImage);
    world.create(pod("a"));
    until("the pull hangs", || world.runtime.calls(Verb::PullImage) == 1).await;
    world.begin_drain();
    world.ended().await;
    assert_eq!(world.api.phase("a"), "Failed");
    world.assert_the_runtime_is_empty().await;
}

#[tokio::test]
async fn a_drain_waits_for_the_grace_of_pods_whose_objects_are_gone() {
    let mut world = World::new();
    world.running(pod("a").runs("stubborn").with("/spec/terminationGracePeriodSeconds", json!(1))).await;
    world.crash();
    world.api.remove("a");
    world.start();
    until("it is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    world.begin_drain();
    world.ended().await;
    world.assert_the_runtime_is_empty().await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 1, "it was stopped once, and its end awaited");
}

#[tokio::test]
async fn a_drain_removes_what_pods_that_had_ended_kept_for_their_logs() {
    let mut world = World::new();
    world.create(pod("done").policy("Never").runs("exit 0"));
    world.until_phase("done", "Succeeded").await;
    world.running(pod("a")).await;
    world.begin_drain();
    world.ended().await;
    assert_eq!(world.api.phase("done"), "Succeeded", "what has succeeded stays so");
    world.assert_the_runtime_is_empty().await;
}

#[tokio::test]
async fn a_pod_bound_to_a_draining_node_is_not_started() {
    let mut world = World::new();
    world.running(pod("a").runs("stubborn")).await;
    world.begin_drain();
    until("a is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    world.create(pod("late"));
    world.until_phase("late", "Failed").await;
    world.api.delete("a", 1);
    world.ended().await;
    assert_eq!(world.runtime.calls(Verb::RunPodSandbox), 1);
    world.assert_the_runtime_is_empty().await;
}
