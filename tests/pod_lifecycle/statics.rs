//! Static Pods and their mirrors: Pods from files, whether there is an API server or not.

use std::path::Path;
use std::sync::Arc;

use lambdalet::pod::static_pods::{self, HASH, MIRROR, SEEN, SOURCE, StaticPods};
use serde_json::{Value, json};

use super::api::NODE;
use super::pods::pod;
use super::world::{Setup, World, until};

/// What the files say from now on: a Pod of each name, whose container has that image. Their UIDs.
fn files(world: &World, pods: &[(&str, &str)]) -> Vec<String> {
    let read = |(name, image): &(&str, &str)| {
        let container =
            json!({ "name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["serve"] });
        let spec = json!({ "containers": [container], "terminationGracePeriodSeconds": 5 });
        let text = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name }, "spec": spec }).to_string();
        let mut pod = static_pods::read(&text, Path::new("/m").join(name).as_path(), NODE).unwrap();
        pod.metadata.annotations.as_mut().unwrap().insert(SEEN.to_owned(), "2026-11-21T10:00:00Z".to_owned());
        (pod.metadata.uid.clone().unwrap(), Arc::new(pod))
    };
    let read: Vec<_> = pods.iter().map(read).collect();
    let uids = read.iter().map(|(uid, _)| uid.clone()).collect();
    world.statics.send_replace(StaticPods { read: true, pods: read.into_iter().collect() });
    uids
}

fn mirror(world: &World, name: &str) -> Value {
    world.api.pod(name).unwrap_or_default()
}

#[tokio::test]
async fn a_static_pod_runs_and_is_seen_on_the_api_server() {
    let world = World::new();
    let uid = files(&world, &[("web", "busybox:1")]).remove(0);
    world.attempt(&uid, "main", 0).await;
    world.until_phase("web-n1", "Running").await;
    let seen = mirror(&world, "web-n1");
    let annotations = &seen["metadata"]["annotations"];
    assert_eq!((&annotations[HASH], &annotations[MIRROR]), (&json!(uid), &json!(uid)));
    assert_eq!((&annotations[SOURCE], &annotations[SEEN]), (&json!("file"), &json!("2026-11-21T10:00:00Z")));
    let owner = &seen["metadata"]["ownerReferences"][0];
    assert_eq!((&owner["kind"], &owner["name"], &owner["controller"]), (&json!("Node"), &json!(NODE), &json!(true)));
    assert_ne!(seen["metadata"]["uid"], json!(uid));
    assert_eq!(
        (world.api.condition("web-n1", "Ready"), seen["spec"]["nodeName"].clone()),
        ("True".into(), json!(NODE))
    );
    assert_eq!(world.all_sandboxes().await, 1, "the mirror itself is not run");
    files(&world, &[]);
    until("the mirror is gone", || world.api.pod("web-n1").is_none()).await;
    world.until_nothing_is_left_within(super::world::SOON).await;
}

#[tokio::test]
async fn a_mirror_that_somebody_deletes_is_made_anew_and_nothing_ends() {
    let world = World::new();
    let uid = files(&world, &[("web", "busybox:1")]).remove(0);
    world.until_phase("web-n1", "Running").await;
    let (before, main) = (mirror(&world, "web-n1"), world.attempt(&uid, "main", 0).await);
    for _ in 0..2 {
        world.api.delete("web-n1", 30);
        until("another takes its place", || {
            let now = mirror(&world, "web-n1");
            now["metadata"]["uid"].is_string() && now["metadata"]["deletionTimestamp"].is_null()
        })
        .await;
        world.until_phase("web-n1", "Running").await;
        assert_ne!(mirror(&world, "web-n1")["metadata"]["uid"], before["metadata"]["uid"]);
    }
    assert_eq!(world.attempt(&uid, "main", 0).await.pid, main.pid);
    // Somebody who says something else of it is corrected.
    world.api.edit("web-n1", |pod| pod["status"]["phase"] = json!("Failed"));
    world.until_phase("web-n1", "Running").await;
}

#[tokio::test]
async fn an_edited_file_is_another_pod_that_waits_for_the_one_before() {
    let world = World::new();
    let first = files(&world, &[("web", "busybox:1"), ("other", "busybox:1")]);
    world.until_phase("web-n1", "Running").await;
    let hold = world.runtime.hang_next(lambdalet::runtime::verb::Verb::StopContainer);
    let second = files(&world, &[("web", "busybox:2"), ("other", "busybox:1")]);
    assert_eq!(first[1], second[1], "the other file was not touched");
    until("the first is told to end", || world.runtime.calls(lambdalet::runtime::verb::Verb::StopContainer) > 0).await;
    assert!(world.sandboxes(&second[0]).await.is_empty());
    assert_eq!(mirror(&world, "web-n1")["metadata"]["annotations"][MIRROR], json!(first[0]), "it is still there");
    drop(hold);
    world.attempt(&second[0], "main", 0).await;
    until("the mirror shows the second", || {
        mirror(&world, "web-n1")["metadata"]["annotations"][MIRROR] == json!(second[0])
    })
    .await;
    world.until_phase("web-n1", "Running").await;
    assert_eq!(mirror(&world, "web-n1")["spec"]["containers"][0]["image"], "busybox:2");
    assert!(world.containers(&first[0]).await.is_empty());
    world.attempt(&second[1], "main", 0).await;
}

#[tokio::test]
async fn no_api_server_is_needed_and_one_that_comes_is_told() {
    let mut world = World::stopped(Setup::default());
    world.api.go_down();
    world.start();
    let uid = files(&world, &[("web", "busybox:1")]).remove(0);
    world.attempt(&uid, "main", 0).await;
    world.api.come_back();
    world.until_phase("web-n1", "Running").await;
}

#[tokio::test]
async fn a_restart_adopts_what_runs_and_ends_what_has_no_file_any_more() {
    let mut world = World::new();
    let uids = files(&world, &[("stays", "busybox:1"), ("goes", "busybox:1")]);
    world.until_phase("stays-n1", "Running").await;
    world.until_phase("goes-n1", "Running").await;
    let main = world.attempt(&uids[0], "main", 0).await;
    world.crash();
    // Files that were not read yet end nothing.
    world.statics.send_replace(StaticPods::default());
    world.start();
    world.running(pod("another")).await;
    assert_eq!(world.all_sandboxes().await, 3);
    files(&world, &[("stays", "busybox:1")]);
    until("the mirror of what goes is gone", || world.api.pod("goes-n1").is_none()).await;
    world.until_swept(&uids[1]).await;
    assert_eq!(world.attempt(&uids[0], "main", 0).await.pid, main.pid);
    assert_eq!(world.api.phase("stays-n1"), "Running");
}

#[tokio::test]
async fn a_mirror_of_nothing_is_removed_and_never_run() {
    let world = World::new();
    let orphan = pod("orphan").with("/metadata/annotations", json!({ MIRROR: "0123", HASH: "0123", SOURCE: "file" }));
    world.create(orphan);
    until("it is gone", || world.api.pod("orphan").is_none()).await;
    assert_eq!(world.all_sandboxes().await, 0);
}
