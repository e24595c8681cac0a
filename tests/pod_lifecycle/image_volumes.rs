//! Volumes that show an image.

use jiff::Timestamp;
use lambdalet::config::{ImageGarbage, ImageSettings};
use lambdalet::pod::garbage::Collector;
use lambdalet::runtime::ImageStore as _;
use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

use super::pods::{PodBuilder, pod};
use super::world::{World, unavailable, until};

/// A Pod whose container sees an image.
fn showing(name: &str, source: Value) -> PodBuilder {
    pod(name)
        .with("/spec/volumes", json!([{ "name": "data", "image": source }]))
        .with("/spec/containers/0/volumeMounts", json!([{ "name": "data", "mountPath": "/data" }]))
}

fn unpacked(world: &World) -> usize {
    std::fs::read_dir(world.root.path().join("image-volumes")).map_or(0, Iterator::count)
}

async fn waits_for(world: &World, name: &str, reason: &str) {
    until(&format!("{name} waits for {reason}"), || {
        world.api.container(name, 0)["state"]["waiting"]["reason"] == reason
    })
    .await;
}

#[tokio::test]
async fn the_image_is_fetched_and_its_files_are_mounted_read_only() {
    let world = World::new();
    let uid = world.running(showing("a", json!({ "reference": "data:1" }))).await;
    let mounts = world.runtime.mounts(&world.attempt(&uid, "main", 0).await.id);
    let mount = mounts.iter().find(|mount| mount.container_path == "/data").unwrap();
    assert!(mount.read_only);
    assert!(mount.host_path.join("part/file").is_file(), "{mount:?}");
    let pulled = world.api.state().events.clone();
    let told = pulled.iter().any(|event| {
        event["reason"] == "Pulling"
            && event["message"] == "Pulling image \"data:1\""
            && event["involvedObject"]["fieldPath"].is_null()
    });
    assert!(told, "{pulled:#?}");
    // One more Pod costs nothing.
    world.running(showing("b", json!({ "reference": "data:1" }))).await;
    assert_eq!((world.runtime.calls(Verb::UnpackImage), unpacked(&world)), (1, 1));
}

#[tokio::test]
async fn its_files_go_once_its_image_is_gone_and_no_pod_shows_it() {
    let world = World::new();
    world.running(showing("a", json!({ "reference": "data:1" }))).await;
    let garbage = ImageGarbage { max_age: Some(Duration::from_secs(60)), ..ImageGarbage::default() };
    let settings = ImageSettings { garbage, ..ImageSettings::default() };
    let collector = Collector::new(Arc::new(world.runtime.clone()), &settings);
    let mut collector = collector.beside(Arc::clone(world.shared().volumes.images()));
    let later = |minutes: i64| Timestamp::now() + Duration::from_secs(60 * minutes.unsigned_abs());
    collector.collect(later(0)).await.unwrap();
    collector.collect(later(10)).await.unwrap();
    assert!(world.runtime.image_status("data:1").await.unwrap().is_some(), "a volume shows it");
    assert_eq!(unpacked(&world), 1);
    world.api.delete("a", 1);
    world.until_gone("a").await;
    collector.collect(later(20)).await.unwrap();
    assert!(world.runtime.image_status("data:1").await.unwrap().is_none());
    assert_eq!(unpacked(&world), 0);
}

#[tokio::test]
async fn an_image_that_is_not_to_be_had_is_the_containers_trouble() {
    let world = World::new();
    world.create(showing("never", json!({ "reference": "data:1", "pullPolicy": "Never" })));
    waits_for(&world, "never", "ErrImageNeverPull").await;
    world.runtime.fail_next(Verb::PullImage, unavailable());
    world.create(showing("failing", json!({ "reference": "data:2" })));
    waits_for(&world, "failing", "ErrImagePull").await;
    assert_eq!(world.runtime.calls(Verb::CreateContainer), 0);
    world.runtime.fail_next(Verb::UnpackImage, unavailable());
    world.create(showing("full", json!({ "reference": "data:3" })));
    waits_for(&world, "full", "CreateContainerError").await;
    assert_eq!(unpacked(&world), 0);
}

#[tokio::test]
async fn a_part_that_the_image_does_not_have_is_not_made() {
    let world = World::new();
    let mounts = json!([{ "name": "data", "mountPath": "/data", "subPath": "absent" }]);
    let absent = showing("a", json!({ "reference": "data:1" })).with("/spec/containers/0/volumeMounts", mounts);
    world.create(absent);
    waits_for(&world, "a", "CreateContainerConfigError").await;
    let text = world.api.container("a", 0)["state"]["waiting"]["message"].clone();
    assert!(text.as_str().unwrap().contains("failed to prepare subPath"), "{text}");
    let files = std::fs::read_dir(world.root.path().join("image-volumes")).unwrap().next().unwrap().unwrap().path();
    assert!(!files.join("absent").exists());
}
