//! Nothing is swept before one complete LIST of Pods, and everything that is nobody's afterwards.

use lambdalet::runtime::verb::Verb;

use super::api::Fault;
use super::pods::pod;
use super::world::{SOON, World, until};

/// A node that has a Pod and an orphan, and a process that is not running.
async fn with_an_orphan() -> (World, String) {
    let mut world = World::new();
    world.running(pod("a")).await;
    world.running(pod("b")).await;
    world.crash();
    let orphan = world.leave_an_orphan("orphan").await;
    (world, orphan)
}

#[tokio::test]
async fn what_is_nobodys_is_ended_after_a_complete_list() {
    let (mut world, orphan) = with_an_orphan().await;
    let root = world.root.path().to_owned();
    for place in ["pods/uid-disk/volumes", "secrets/uid-secret"] {
        std::fs::create_dir_all(root.join(place)).unwrap();
    }
    world.start();
    world.until_swept(&orphan).await;
    until("directories of nobody are gone", || {
        !root.join("pods/uid-disk").exists() && !root.join("secrets/uid-secret").exists()
    })
    .await;
    for name in ["a", "b"] {
        assert_eq!(world.api.phase(name), "Running");
        world.api.delete(name, 1);
    }
    world.until_nothing_is_left_within(SOON).await;
}

#[tokio::test]
async fn an_api_server_that_is_down_sweeps_nothing() {
    let (mut world, orphan) = with_an_orphan().await;
    world.api.go_down();
    world.start();
    until("Pods were asked for twice", || world.api.state().count("LIST", "pods") > 3).await;
    assert_eq!(world.sandboxes(&orphan).await.len(), 1, "the orphan is left alone");
    world.api.come_back();
    world.until_swept(&orphan).await;
    assert_eq!(world.all_sandboxes().await, 2, "the others are not");
}

#[tokio::test]
async fn half_a_list_sweeps_nothing() {
    let (mut world, orphan) = with_an_orphan().await;
    let before = world.api.state().count("LIST", "pods");
    for fault in [Fault::FirstPage, Fault::Fail(500), Fault::FirstPage, Fault::Fail(410)] {
        world.api.fault_next("LIST", "pods", fault);
    }
    let hold = world.api.hang_next("LIST", "pods");
    world.start();
    until("two halves were listed", || world.api.state().count("LIST", "pods") == before + 5).await;
    assert_eq!(world.sandboxes(&orphan).await.len(), 1, "the orphan is left alone");
    assert_eq!(world.all_sandboxes().await, 3, "and so is the Pod of the other half");
    drop(hold);
    world.until_swept(&orphan).await;
    assert_eq!(world.all_sandboxes().await, 2);
}

#[tokio::test]
async fn a_list_of_this_node_does_not_end_what_comes_while_the_sweep_is_under_way() {
    let (mut world, orphan) = with_an_orphan().await;
    world.runtime.fail_next(Verb::ListPodSandboxes, super::world::unavailable());
    world.start();
    world.running(pod("c")).await;
    world.until_swept(&orphan).await;
    assert_eq!(world.all_sandboxes().await, 3);
}

#[tokio::test]
async fn a_look_for_leftovers_that_hangs_holds_no_pod_up() {
    let mut world = World::stopped(Default::default());
    let orphan = world.leave_an_orphan("orphan").await;
    let hold = world.runtime.hang_next(Verb::ListPodSandboxes);
    let before = world.runtime.calls(Verb::ListPodSandboxes);
    world.start();
    until("the look hangs", || world.runtime.calls(Verb::ListPodSandboxes) == before + 1).await;
    world.running(pod("a")).await;
    world.api.delete("a", 1);
    until("the object is gone", || world.api.pod("a").is_none()).await;
    assert_eq!(world.sandboxes(&orphan).await.len(), 1, "the look still hangs");
    drop(hold);
    world.until_swept(&orphan).await;
}
