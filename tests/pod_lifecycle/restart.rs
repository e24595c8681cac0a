//! A restart of the node's process is not a restart of Pods; and what others may ask of a Pod in its life.

use std::time::Duration;

use lambdalet::kubelet_api::targets::{LogTarget, PodTargets, TargetError};
use lambdalet::runtime::types::{ContainerId, ContainerState};
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::pod;
use super::world::{Setup, World, until};

fn restarts_at_once() -> Setup {
    Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() }
}

#[tokio::test]
async fn a_restarted_process_adopts_what_runs_and_touches_none_of_it() {
    let mut world = World::new();
    let uid = world.running(pod("a").init("setup", "exit 0").and("helper", "serve")).await;
    let made = |world: &World| {
        let verbs = [Verb::RunPodSandbox, Verb::CreateContainer, Verb::StartContainer, Verb::StopContainer];
        verbs.map(|verb| world.runtime.calls(verb))
    };
    let (before, address) = (made(&world), world.api.pod("a").unwrap()["status"]["podIP"].clone());
    let written = world.api.state().statuses.len();
    world.crash();
    world.start();
    // It is in the hands of the new process once that reacts to what happens to it.
    world.runtime.exit_container(&world.attempt(&uid, "helper", 0).await.id, 1);
    world.attempt(&uid, "helper", 1).await;
    let [_, create, start, stop] = made(&world);
    assert_eq!([before[0], create - 1, start - 1, stop], before);
    until("the restart is told", || world.api.container("a", 1)["restartCount"] == 1).await;
    let pod = world.api.pod("a").unwrap();
    assert_eq!(pod["status"]["podIP"], address);
    for status in &world.api.state().statuses[written..] {
        assert_eq!(status.status["phase"], "Running", "the Pod never looked as if it started anew");
        assert!(status.status["containerStatuses"][0]["state"]["running"].is_object());
    }
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn an_address_whose_record_is_lost_or_torn_is_not_given_to_another_pod() {
    let mut world = World::new();
    for name in ["a", "b"] {
        world.running(pod(name)).await;
    }
    let address =
        |world: &World, name: &str| world.api.pod(name).unwrap()["status"]["podIP"].as_str().unwrap().to_owned();
    let taken = ["a", "b"].map(|name| address(&world, name));
    world.crash();
    let records = world.root.path().join("addresses");
    std::fs::remove_file(records.join(&taken[0])).unwrap();
    std::fs::write(records.join(&taken[1]), "{").unwrap();
    world.start();
    for name in ["c", "d"] {
        world.running(pod(name)).await;
        assert!(!taken.contains(&address(&world, name)), "{name} got {}", address(&world, name));
    }
    let held: Vec<String> =
        world.shared().addresses.held().into_iter().map(|(address, _)| address.to_string()).collect();
    assert!(taken.iter().all(|address| held.contains(address)), "{held:?}");
}

#[tokio::test]
async fn a_process_that_dies_in_any_step_leaves_nothing_that_the_next_one_does_not_find() {
    for verb in [Verb::RunPodSandbox, Verb::PullImage, Verb::CreateContainer, Verb::StartContainer] {
        let mut world = World::new();
        let hold = world.runtime.hang_next(verb);
        let uid = world.create(pod("a"));
        until("it is half done", || world.runtime.calls(verb) == 1).await;
        world.crash();
        drop(hold);
        world.start();
        world.until_phase("a", "Running").await;
        assert_eq!((world.sandboxes(&uid).await.len(), world.containers(&uid).await.len()), (1, 1), "{}", verb.name());
        world.api.delete("a", 30);
        world.until_gone("a").await;
    }
}

#[tokio::test]
async fn what_was_deleted_while_the_process_was_away_is_ended() {
    let mut world = World::new();
    world.running(pod("marked")).await;
    world.running(pod("gone")).await;
    let ended = world.running(pod("ended").policy("Never")).await;
    let container = world.attempt(&ended, "main", 0).await;
    world.crash();
    world.api.delete("marked", 30);
    world.api.remove("gone");
    world.runtime.exit_container(&container.id, 5);
    world.start();
    world.until_phase("ended", "Failed").await;
    assert_eq!(world.api.container("ended", 0)["state"]["terminated"]["exitCode"], 5);
    world.api.delete("ended", 30);
    until("the marked one is gone", || world.api.pod("marked").is_none()).await;
    world.until_gone("ended").await;
}

#[tokio::test]
async fn what_vanished_while_the_process_was_away_is_made_again_and_the_restarts_still_count() {
    let mut world = World::with(restarts_at_once());
    let uid = world.running(pod("a")).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    world.attempt(&uid, "main", 1).await;
    until("the restart is told", || world.api.container("a", 0)["restartCount"] == 1).await;
    world.crash();
    // The host was booted: the runtime has lost everything.
    world.runtime = lambdalet::runtime::fake::FakeRuntime::new();
    world.start();
    world.attempt(&uid, "main", 2).await;
    until("the second one is told", || world.api.container("a", 0)["restartCount"] == 2).await;
}

fn one(target: LogTarget) -> ContainerId {
    match target {
        LogTarget::One(id) => id,
        LogTarget::Many(_) => panic!("this Pod is no function"),
    }
}

#[tokio::test]
async fn logs_are_those_of_the_newest_attempt_and_the_previous_one_is_there_too() {
    let world = World::with(restarts_at_once());
    let directory = world.directory();
    let target = |pod: &'static str, container: &'static str, previous: bool| {
        let directory = directory.clone();
        async move { directory.log_target("default", pod, container, previous).await.map(one) }
    };
    let uid = world.running(pod("a")).await;
    let first = world.attempt(&uid, "main", 0).await;
    assert_eq!(target("a", "main", false).await.unwrap(), first.id);
    assert!(matches!(target("a", "main", true).await, Err(TargetError::NoPrevious { .. })));
    assert!(matches!(target("a", "other", false).await, Err(TargetError::NoContainer { .. })));
    assert!(matches!(target("b", "main", false).await, Err(TargetError::NoPod(_))));
    world.runtime.exit_container(&first.id, 1);
    let second = world.attempt(&uid, "main", 1).await;
    until("the restart is told", || world.api.container("a", 0)["restartCount"] == 1).await;
    assert_eq!(target("a", "main", false).await.unwrap(), second.id);
    assert_eq!(target("a", "main", true).await.unwrap(), first.id);

    let _never = world.runtime.hang_next(Verb::StartContainer);
    world.create(pod("b").init("setup", "serve"));
    until("it waits", || world.api.phase("b") == "Pending").await;
    match target("b", "main", false).await {
        Err(TargetError::Waiting { reason, .. }) => assert_eq!(reason, "PodInitializing"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_logs_of_a_pod_that_has_ended_can_be_asked_for_until_it_is_deleted() {
    let mut world = World::new();
    world.create(pod("a").policy("Never").runs("exit 0"));
    world.until_phase("a", "Succeeded").await;
    world.crash();
    world.start();
    let directory = world.directory();
    until("the new process knows it", || !directory.pods().is_empty()).await;
    let id = directory.log_target("default", "a", "main", false).await.map(one).unwrap();
    let uid = world.api.pod("a").unwrap()["metadata"]["uid"].as_str().unwrap().to_owned();
    let kept = world.containers(&uid).await.remove(0);
    assert_eq!((kept.id, kept.state), (id, ContainerState::Exited));
    world.api.delete("a", 30);
    world.until_gone("a").await;
    assert_eq!(directory.log_target("default", "a", "main", false).await.map(one), Err(TargetError::NoPod("a".into())));
}

#[tokio::test]
async fn a_termination_message_survives_a_restart_of_the_process() {
    let mut world = World::with(restarts_at_once());
    let uid = world.running(pod("a").policy("Never")).await;
    let container = world.attempt(&uid, "main", 0).await;
    let path = world.root.path().join("pods").join(&uid).join("containers/main/0");
    std::fs::write(path, "out of cheese").unwrap();
    world.runtime.exit_container(&container.id, 9);
    world.until_phase("a", "Failed").await;
    let message = |world: &World| world.api.container("a", 0)["state"]["terminated"]["message"].clone();
    assert_eq!(message(&world), json!("out of cheese"));
    world.crash();
    world.start();
    let directory = world.directory();
    until("the new process knows it", || !directory.pods().is_empty()).await;
    let known = directory.pods().remove(0);
    let told = known.status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].state.clone().unwrap();
    assert_eq!(told.terminated.unwrap().message.as_deref(), Some("out of cheese"));
}
