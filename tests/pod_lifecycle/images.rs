//! An image that is changed while the Pod lives (`kubectl set image pod/...`).

use lambdalet::pod::backoff;
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::pod;
use super::world::{World, unavailable, until};

fn change(world: &World, name: &str) {
    world.runtime.add_image("busybox:2");
    world.api.edit(name, |pod| pod["spec"]["containers"][0]["image"] = json!("busybox:2"));
}

#[tokio::test]
async fn a_running_container_gives_way_to_one_of_the_new_image_whatever_the_policy() {
    let world = World::new();
    let uid = world.running(pod("a").policy("Never").and("other", "serve")).await;
    let written = world.api.state().statuses.len();
    change(&world, "a");
    assert_eq!(world.attempt(&uid, "main", 1).await.image_ref, "busybox:2");
    until("it is told", || {
        let status = world.api.container("a", 0);
        status["restartCount"] == 1 && status["image"] == "busybox:2" && status["state"]["running"].is_object()
    })
    .await;
    world.attempt(&uid, "other", 0).await;
    for status in &world.api.state().statuses[written..] {
        assert_eq!(status.status["phase"], "Running", "it never looked as if the Pod had ended");
    }
    until("why is told", || world.api.state().reasons("a").contains(&"Killing".to_owned())).await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_crash_loop_is_forgiven_with_a_new_image() {
    let world = World::new();
    let uid = world.create(pod("a").runs("exit 1"));
    until("it is held back", || world.api.container("a", 0)["state"]["waiting"]["reason"] == "CrashLoopBackOff").await;
    change(&world, "a");
    until("it is tried again", || world.api.container("a", 0)["restartCount"] == 2).await;
    let all = world.containers(&uid).await;
    let [before, after] = [1, 2].map(|attempt| all.iter().find(|c| c.attempt == attempt).unwrap());
    let waited = after.created_at.duration_since(before.finished_at.unwrap());
    assert!(waited.unsigned_abs() < backoff::INITIAL, "{waited}");
    assert_eq!((before.image_ref.as_str(), after.image_ref.as_str()), ("busybox:1", "busybox:2"));
}

#[tokio::test]
async fn a_pull_that_failed_is_not_waited_for_once_another_image_is_named() {
    let world = World::new();
    world.runtime.fail_next(Verb::PullImage, unavailable());
    let uid = world.create(pod("a").with("/spec/containers/0/image", json!("typo:1")));
    until("it is held back", || {
        let reason = &world.api.container("a", 0)["state"]["waiting"]["reason"];
        reason == "ErrImagePull" || reason == "ImagePullBackOff"
    })
    .await;
    change(&world, "a");
    assert_eq!(world.attempt(&uid, "main", 0).await.image_ref, "busybox:2");
    until("it runs", || world.api.phase("a") == "Running").await;
}
