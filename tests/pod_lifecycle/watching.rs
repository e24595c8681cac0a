//! A watch that breaks in every way a watch can.

use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::api::Fault;
use super::pods::pod;
use super::world::{Setup, World, until};

#[tokio::test]
async fn a_watch_that_is_cut_goes_on_where_it_was() {
    let world = World::new();
    world.running(pod("a")).await;
    let lists = world.api.state().count("LIST", "pods");
    world.api.cut_watches();
    world.running(pod("b")).await;
    assert_eq!(world.api.state().count("LIST", "pods"), lists, "nothing was listed anew");
}

#[tokio::test]
async fn a_watch_refused_as_expired_begins_anew_with_a_list() {
    let world = World::new();
    world.running(pod("a")).await;
    let lists = world.api.state().count("LIST", "pods");
    world.api.fault_next("WATCH", "pods", Fault::Fail(410));
    world.api.cut_watches();
    world.running(pod("b")).await;
    assert!(world.api.state().count("LIST", "pods") > lists);
}

#[tokio::test]
async fn a_watch_whose_history_is_forgotten_finds_what_it_missed() {
    let world = World::new();
    let gone = world.running(pod("gone")).await;
    world.running(pod("stays")).await;
    world.api.remove("gone");
    world.api.expire_watches();
    world.running(pod("new")).await;
    until("the one that is gone has ended", || world.shared().addresses.held().iter().all(|(_, uid)| *uid != gone))
        .await;
    assert!(world.sandboxes(&gone).await.is_empty());
    assert_eq!(world.runtime.calls(Verb::StopContainer), 1, "no other was stopped");
}

#[tokio::test]
async fn a_pod_object_that_does_not_parse_stops_neither_the_others_nor_its_own_pod() {
    let world = World::new();
    let uid = world.running(pod("a")).await;
    let spec = world.api.pod("a").unwrap()["spec"].clone();
    world.api.edit("a", |pod| pod["spec"]["containers"] = json!("from the future"));
    world.create(pod("never").with("/spec/containers", json!(7)));
    world.running(pod("b")).await;
    until("it was told", || world.api.state().reasons("a").contains(&"InvalidPod".to_owned())).await;
    let container = world.attempt(&uid, "main", 0).await;
    world.runtime.exit_container(&container.id, 1);
    world.attempt(&uid, "main", 1).await;
    world.api.edit("a", |pod| pod["spec"] = spec);
    world.api.delete("a", 30);
    until("a is gone", || world.api.pod("a").is_none()).await;
}

#[tokio::test]
async fn a_pod_object_that_does_not_parse_keeps_its_pod_over_a_restart_of_the_node() {
    let mut world = World::new();
    let uid = world.running(pod("a")).await;
    world.crash();
    world.api.edit("a", |pod| pod["spec"]["containers"] = json!("from the future"));
    let orphan = world.leave_an_orphan("orphan").await;
    world.start();
    // The sweep that follows the LIST has been there once the orphan is gone.
    world.until_swept(&orphan).await;
    world.attempt(&uid, "main", 0).await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 1, "only the orphan was stopped");
    world.api.remove("a");
    world.until_nothing_is_left_within(super::world::SOON).await;
}

#[tokio::test]
async fn a_process_told_to_stop_does_so_while_the_runtime_is_away() {
    let mut world = World::stopped(Setup::default());
    for _ in 0..1000 {
        world.runtime.fail_next(Verb::ListPodSandboxes, super::world::unavailable());
    }
    world.start();
    until("the runtime was asked", || world.runtime.calls(Verb::ListPodSandboxes) > 0).await;
    world.begin_drain();
    world.ended().await;
}
