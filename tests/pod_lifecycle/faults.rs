//! A runtime that fails: every verb once, and things that vanish without a word.

use std::time::Duration;

use futures::future::join_all;
use lambdalet::runtime::SandboxRuntime;
use lambdalet::runtime::types::{ContainerState, SandboxState};
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::{PodBuilder, pod};
use super::world::{LATER, Setup, World, unavailable, until, until_within};

/// Whether the Pod loop uses the verb at all, and the reason of the event that tells of its failure.
fn told_as(verb: Verb) -> Option<Option<&'static str>> {
    match verb {
        Verb::RunPodSandbox => Some(Some("FailedCreatePodSandBox")),
        Verb::CreateContainer | Verb::StartContainer | Verb::PullImage | Verb::ImageStatus => Some(Some("Failed")),
        Verb::StopContainer | Verb::RemovePodSandbox => Some(Some("FailedKillPod")),
        // Tried again at once or by the next turn: nothing a user could act on.
        Verb::StopPodSandbox | Verb::PodSandboxStatus | Verb::ListPodSandboxes | Verb::RemoveContainer => Some(None),
        Verb::ListContainers | Verb::ContainerStatus | Verb::Logs | Verb::Events => Some(None),
        Verb::Version
        | Verb::Ready
        | Verb::ListImages
        | Verb::ImageFsInfo
        | Verb::RemoveImage
        | Verb::ListPodSandboxStats => None,
        Verb::Exec | Verb::Attach | Verb::PortForward | Verb::PauseContainer | Verb::UnpauseContainer => None,
        // Tests of their own, with a Pod that is resized.
        Verb::UpdateContainerResources | Verb::UpdatePodSandboxResources | Verb::UnpackImage => None,
    }
}

/// A Pod that makes the loop use every verb, and more than two attempts of one container.
fn busy_pod() -> PodBuilder {
    pod("a")
        .init("setup", "exit 0")
        .with("/spec/containers/0/image", json!("busybox:2"))
        .with("/spec/containers/0/terminationMessagePolicy", json!("FallbackToLogsOnError"))
}

/// The verb fails once in a Pod's life; the Pod comes up, goes on, and leaves nothing.
async fn survives_failure_of(verb: Verb) {
    let Some(event) = told_as(verb) else { return };
    let world = World::with(Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() });
    // Not at the start of the process, which asks for some of them too.
    world.running(pod("first")).await;
    world.runtime.fail_next(verb, unavailable());
    if verb == Verb::Events {
        world.runtime.end_events();
    }
    let before = world.runtime.calls(verb);
    world.create(busy_pod().policy("Always"));
    let name = verb.name();
    until_within(LATER, &format!("a runs in spite of {name}"), || world.api.phase("a") == "Running").await;
    for restarts in 1..4 {
        let status = world.api.container("a", 0);
        let id = status["containerID"].as_str().unwrap().trim_start_matches("fake://").to_owned();
        world.runtime.exit_container(&id.into(), 1);
        until_within(LATER, &format!("a was restarted {restarts} times in spite of {name}"), || {
            let status = world.api.container("a", 0);
            status["restartCount"] == restarts && status["state"]["running"].is_object()
        })
        .await;
    }
    world.create(pod("brief").policy("Never").runs("exit 0"));
    until_within(LATER, "the brief one has ended", || world.api.phase("brief") == "Succeeded").await;
    if verb == Verb::StopPodSandbox {
        // Removing the sandbox stops it too, so a deletion would spare the second try.
        until("the brief one's sandbox was stopped", || world.runtime.calls(verb) > before + 1).await;
    }
    for name in ["a", "brief", "first"] {
        world.api.delete(name, 30);
    }
    world.until_nothing_is_left_within(LATER).await;
    assert!(world.runtime.calls(verb) > before + 1, "{name} was tried again");
    if let Some(reason) = event {
        let told =
            || ["a", "brief", "first"].iter().any(|name| world.api.state().reasons(name).contains(&reason.to_owned()));
        until(&format!("{reason} tells of {name}"), told).await;
    }
}

#[tokio::test]
async fn each_verb_that_fails_once_is_tried_again_told_and_leaves_nothing() {
    join_all(Verb::ALL.iter().map(|verb| survives_failure_of(*verb))).await;
}

#[tokio::test]
async fn a_sandbox_whose_status_cannot_be_had_is_found_by_listing() {
    let world = World::new();
    world.runtime.fail_next(Verb::PodSandboxStatus, unavailable());
    world.running(pod("a")).await;
    assert_eq!(world.runtime.calls(Verb::RunPodSandbox), 1, "it was made once");
}

#[tokio::test]
async fn a_sandbox_that_died_is_replaced_and_its_init_containers_run_again() {
    let world = World::new();
    let uid = world.running(pod("a").init("setup", "exit 0")).await;
    let dead = world.sandboxes(&uid).await.remove(0);
    world.runtime.kill_sandbox(&dead.id);
    world.attempt(&uid, "main", 1).await;
    let sandboxes = world.sandboxes(&uid).await;
    let new = sandboxes.iter().find(|s| s.state == SandboxState::Ready).unwrap();
    assert_eq!((new.attempt, new.address()), (1, dead.address()), "it keeps its address");
    let containers = world.containers(&uid).await;
    let again = containers.iter().find(|c| c.name == "setup" && c.attempt == 1).expect("init ran again");
    assert_eq!((&again.sandbox, again.exit_code), (&new.id, 0));
    until("the restart is told", || world.api.container("a", 0)["restartCount"] == 1).await;
    until("it is ready", || world.api.condition("a", "Ready") == "True").await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_container_removed_behind_our_back_comes_back_and_the_restarts_still_count() {
    let world = World::with(Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() });
    let uid = world.running(pod("a")).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    let second = world.attempt(&uid, "main", 1).await;
    for container in world.containers(&uid).await {
        world.runtime.remove_container(&container.id).await.unwrap();
    }
    let third = world.attempt(&uid, "main", 2).await;
    assert_ne!(second.id, third.id);
    until("both restarts are told", || world.api.container("a", 0)["restartCount"] == 2).await;
    let written = world.api.state().statuses.clone();
    let counts = written.iter().map(|s| s.status["containerStatuses"][0]["restartCount"].as_i64().unwrap());
    assert!(counts.clone().is_sorted(), "the count never goes back: {:?}", counts.collect::<Vec<_>>());
}

#[tokio::test]
async fn an_end_missed_between_two_event_streams_is_noticed() {
    let world = World::new();
    let uid = world.running(pod("a")).await;
    let container = world.attempt(&uid, "main", 0).await;
    let asked = world.runtime.calls(Verb::Events);
    world.runtime.fail_next(Verb::Events, unavailable());
    world.runtime.end_events();
    until("the stream is lost", || world.runtime.calls(Verb::Events) == asked + 1).await;
    world.runtime.exit_container(&container.id, 1);
    world.attempt(&uid, "main", 1).await;
}

#[tokio::test]
async fn a_worker_that_panics_is_replaced_and_its_pod_goes_on() {
    let world = World::new();
    world.runtime.panic_next(Verb::CreateContainer);
    world.running(pod("a")).await;
    world.running(pod("b")).await;
    assert_eq!(world.runtime.calls(Verb::RunPodSandbox), 2, "what was there was found again");
    world.runtime.panic_next(Verb::StopContainer);
    world.api.delete("a", 30);
    until("a is gone", || world.api.pod("a").is_none()).await;
    world.api.delete("b", 30);
    world.until_gone("b").await;
}

#[tokio::test]
async fn old_attempts_are_removed_but_for_the_last() {
    let world = World::with(Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() });
    let uid = world.running(pod("a")).await;
    for attempt in 0..4 {
        world.runtime.exit_container(&world.attempt(&uid, "main", attempt).await.id, 1);
    }
    world.attempt(&uid, "main", 4).await;
    until("old attempts are removed", || world.runtime.calls(Verb::RemoveContainer) == 3).await;
    let mut left: Vec<_> = world.containers(&uid).await.into_iter().map(|c| (c.attempt, c.state)).collect();
    left.sort_by_key(|(attempt, _)| *attempt);
    assert_eq!(left, [(3, ContainerState::Exited), (4, ContainerState::Running)]);
}
