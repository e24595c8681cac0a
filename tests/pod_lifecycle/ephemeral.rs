//! Ephemeral containers: what `kubectl debug` adds to a Pod that runs.

use std::time::Duration;

use lambdalet::kubelet_api::targets::{LogTarget, PodTargets, TargetError};
use lambdalet::runtime::types::ContainerState;
use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};

use super::pods::pod;
use super::world::{Setup, World, until};

/// Adds one as `kubectl debug` does, through the Pod's subresource.
fn debug(world: &World, name: &str, command: &str, more: Value) {
    let words: Vec<&str> = command.split(' ').collect();
    let mut container =
        json!({ "name": "dbg", "image": "busybox:1", "imagePullPolicy": "IfNotPresent", "command": words });
    container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    world.api.edit(name, |pod| {
        let list = &mut pod["spec"]["ephemeralContainers"];
        if list.is_null() {
            *list = json!([]);
        }
        list.as_array_mut().unwrap().push(container);
    });
}

/// The state that the API server was told of the first one.
fn state(world: &World, pod: &str) -> Value {
    world.api.pod(pod).unwrap()["status"]["ephemeralContainerStatuses"][0]["state"].clone()
}

async fn until_terminated(world: &World, pod: &str) -> Value {
    until("its end is told", || state(world, pod)["terminated"].is_object()).await;
    state(world, pod)["terminated"].clone()
}

fn restarts_at_once() -> Setup {
    Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() }
}

#[tokio::test]
async fn it_is_started_once_and_the_pod_does_not_mind() {
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a")).await;
    let before = world.api.pod("a").unwrap();
    debug(&world, "a", "serve", json!({}));
    let dbg = world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    let pod = world.api.pod("a").unwrap();
    let status = &pod["status"]["ephemeralContainerStatuses"][0];
    assert_eq!((&status["name"], &status["ready"], &status["restartCount"]), (&json!("dbg"), &json!(false), &json!(0)));
    assert_eq!(status["containerID"], json!(format!("fake://{}", dbg.id)));
    for field in ["phase", "conditions", "containerStatuses", "podIP", "qosClass"] {
        assert_eq!(pod["status"][field], before["status"][field], "{field}");
    }
    until("its start was told", || {
        let events = world.api.state().events.clone();
        let path = |event: &Value| event["involvedObject"]["fieldPath"] == "spec.ephemeralContainers{dbg}";
        ["Pulled", "Created", "Started"].iter().all(|wanted| events.iter().any(|e| path(e) && e["reason"] == *wanted))
    })
    .await;

    world.runtime.exit_container(&dbg.id, 3);
    assert_eq!(until_terminated(&world, "a").await["exitCode"], 3);
    // The Pod's own container is started again, and so there was time for the other too.
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    world.attempt(&uid, "main", 1).await;
    until("the restart is told", || world.api.container("a", 0)["restartCount"] == 1).await;
    assert_eq!(world.containers(&uid).await.iter().filter(|c| c.name == "dbg").count(), 1);
    assert_eq!(state(&world, "a")["terminated"]["exitCode"], 3);
    assert_eq!((world.api.phase("a"), world.api.condition("a", "Ready")), ("Running".into(), "True".into()));
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn it_does_not_wait_for_init_containers() {
    let world = World::new();
    let uid = world.create(pod("a").init("setup", "serve"));
    world.attempt(&uid, "setup", 0).await;
    debug(&world, "a", "serve", json!({}));
    world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    assert_eq!(world.api.phase("a"), "Pending");
    assert_eq!(world.containers(&uid).await.len(), 2);
}

#[tokio::test]
async fn one_that_joined_a_container_ends_with_it() {
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a")).await;
    debug(&world, "a", "serve", json!({ "targetContainerName": "main" }));
    world.attempt(&uid, "dbg", 0).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    world.attempt(&uid, "main", 1).await;
    assert_eq!(until_terminated(&world, "a").await["exitCode"], 137);
}

#[tokio::test]
async fn one_whose_target_is_not_there_or_does_not_run_says_so_and_is_tried_again() {
    let world = World::new();
    let uid = world.running(pod("a").policy("Never").and("other", "exit 0")).await;
    until("one has ended", || world.api.container("a", 1)["state"]["terminated"].is_object()).await;
    debug(&world, "a", "serve", json!({ "targetContainerName": "nobody" }));
    until("it waits", || state(&world, "a")["waiting"]["reason"] == "CreateContainerConfigError").await;
    assert_eq!(state(&world, "a")["waiting"]["message"], "unable to find target container nobody");
    until("it was told", || world.api.state().reasons("a").iter().any(|reason| reason == "Failed")).await;
    debug(&world, "a", "serve", json!({ "name": "late", "targetContainerName": "other" }));
    let late = |world: &World| world.api.pod("a").unwrap()["status"]["ephemeralContainerStatuses"][1]["state"].clone();
    until("it waits too", || late(&world)["waiting"]["reason"] == "CreateContainerError").await;
    let message = late(&world)["waiting"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("target container other does not run"), "{message}");
    // A third is not held up by them.
    debug(&world, "a", "serve", json!({ "name": "good", "targetContainerName": "main" }));
    world.attempt(&uid, "good", 0).await;
    assert_eq!(world.api.phase("a"), "Running");
}

#[tokio::test]
async fn it_may_mount_a_volume_that_no_other_container_mounts() {
    let world = World::new();
    world
        .api
        .create("configmaps", json!({ "metadata": { "namespace": "default", "name": "tools" }, "data": { "k": "v" } }));
    let volumes = json!([{ "name": "t", "configMap": { "name": "tools" } }]);
    let uid = world.running(pod("a").with("/spec/volumes", volumes)).await;
    debug(&world, "a", "serve", json!({ "volumeMounts": [{ "name": "t", "mountPath": "/t" }] }));
    world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn its_log_and_its_process_can_be_asked_for() {
    let world = World::new();
    let uid = world.running(pod("a")).await;
    let hold = world.runtime.hang_next(Verb::CreateContainer);
    debug(&world, "a", "serve", json!({}));
    let directory = world.directory();
    until("it is known", || directory.pods()[0].spec.as_ref().unwrap().ephemeral_containers.is_some()).await;
    match directory.log_target("default", "a", "dbg", false).await {
        Err(TargetError::Waiting { reason, .. }) => assert_eq!(reason, "ContainerCreating"),
        other => panic!("{:?}", other.map(|_| ())),
    }
    drop(hold);
    let dbg = world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    match directory.log_target("default", "a", "dbg", false).await {
        Ok(LogTarget::One(id)) => assert_eq!(id, dbg.id),
        other => panic!("{:?}", other.map(|_| ())),
    }
    assert_eq!(directory.exec_target("default", "a", None, "dbg").await.unwrap().container, dbg.id);
    assert!(matches!(
        directory.log_target("default", "a", "dbg", true).await.map(|_| ()),
        Err(TargetError::NoPrevious { .. })
    ));
}

#[tokio::test]
async fn a_restarted_process_adopts_it_and_finishes_what_was_half_done() {
    let mut world = World::new();
    let uid = world.running(pod("a")).await;
    debug(&world, "a", "serve", json!({ "targetContainerName": "main" }));
    let dbg = world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    world.crash();
    world.start();
    world.runtime.exit_container(&dbg.id, 4);
    assert_eq!(until_terminated(&world, "a").await["exitCode"], 4);
    world.crash();
    world.start();
    for (number, verb) in [Verb::CreateContainer, Verb::StartContainer].into_iter().enumerate() {
        let name = format!("dbg{number}");
        let (hold, calls) = (world.runtime.hang_next(verb), world.runtime.calls(verb));
        debug(&world, "a", "serve", json!({ "name": name }));
        until("it is half done", || world.runtime.calls(verb) == calls + 1).await;
        world.crash();
        drop(hold);
        world.start();
        world.attempt(&uid, &name, 0).await;
    }
    let mut names: Vec<_> = world.containers(&uid).await.into_iter().map(|c| c.name).collect();
    names.sort();
    assert_eq!(names, ["dbg", "dbg0", "dbg1", "main"]);
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn one_that_somebody_removed_is_not_made_again() {
    let mut world = World::with(restarts_at_once());
    let uid = world.running(pod("a")).await;
    debug(&world, "a", "serve", json!({}));
    let dbg = world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    world.crash();
    lambdalet::runtime::SandboxRuntime::remove_container(&world.runtime, &dbg.id).await.unwrap();
    world.start();
    assert_eq!(until_terminated(&world, "a").await["reason"], "ContainerStatusUnknown");
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    world.attempt(&uid, "main", 1).await;
    assert!(world.containers(&uid).await.iter().all(|c| c.name == "main"));
}

#[tokio::test]
async fn a_pod_that_has_run_to_its_end_takes_it_along() {
    let world = World::new();
    let brief = pod("a").policy("Never").with("/spec/terminationGracePeriodSeconds", json!(1));
    let uid = world.running(brief).await;
    debug(&world, "a", "stubborn", json!({}));
    world.attempt(&uid, "dbg", 0).await;
    until("it is said to run", || state(&world, "a")["running"].is_object()).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 0);
    world.until_phase("a", "Succeeded").await;
    assert_eq!(until_terminated(&world, "a").await["exitCode"], 137);
    for written in world.api.state().statuses.iter().filter(|written| written.status["phase"] == "Succeeded") {
        let state = &written.status["ephemeralContainerStatuses"][0]["state"];
        assert!(state["terminated"].is_object(), "nothing of a Pod that has ended runs: {state}");
    }
    assert!(world.containers(&uid).await.iter().all(|c| c.state == ContainerState::Exited));
    world.api.delete("a", 30);
    world.until_gone("a").await;
}
