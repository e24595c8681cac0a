//! How Pods come up, and what is said of them.

use lambdalet::runtime::types::{ContainerState, SandboxState};
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::pod;
use super::world::{LATER, World, until, until_within};

#[tokio::test]
async fn init_containers_run_one_after_another_and_then_the_main_ones_start_in_order() {
    let world = World::new();
    let uid = world.create(pod("a").init("first", "serve").init("second", "serve").and("helper", "serve"));
    let first = world.attempt(&uid, "first", 0).await;
    until("the first init container is said to run", || {
        let pod = world.api.pod("a").unwrap();
        pod["status"]["initContainerStatuses"][0]["state"]["running"].is_object()
    })
    .await;
    let status = world.api.pod("a").unwrap()["status"].clone();
    assert_eq!(status["phase"], "Pending");
    assert_eq!(status["initContainerStatuses"][1]["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(status["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(world.api.condition("a", "Initialized"), "False");
    assert_eq!(world.containers(&uid).await.len(), 1, "nothing starts beside an init container");

    world.runtime.exit_container(&first.id, 0);
    let second = world.attempt(&uid, "second", 0).await;
    assert_eq!(world.containers(&uid).await.len(), 2, "nothing starts beside an init container");
    world.runtime.exit_container(&second.id, 0);
    world.until_phase("a", "Running").await;
    let (main, helper) = (world.attempt(&uid, "main", 0).await, world.attempt(&uid, "helper", 0).await);
    assert!(second.created_at < main.created_at);
    assert!(main.created_at <= helper.created_at, "main containers start in the order of the spec");
    let status = world.api.pod("a").unwrap()["status"].clone();
    let sandbox = world.sandboxes(&uid).await.remove(0);
    assert_eq!(status["podIP"], json!(sandbox.address().unwrap().to_string()));
    assert_eq!(status["hostIP"], "10.0.0.5");
    assert_eq!(status["qosClass"], "BestEffort");
    assert_eq!(status["initContainerStatuses"][0]["state"]["terminated"]["reason"], "Completed");
    assert_eq!(status["containerStatuses"][0]["containerID"], json!(format!("fake://{}", main.id)));
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0);
    for condition in ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"] {
        assert_eq!(world.api.condition("a", condition), "True", "{condition}");
    }
    until("the start was told", || {
        let reasons = world.api.state().reasons("a");
        ["Pulling", "Pulled", "Created", "Started"].iter().all(|wanted| reasons.iter().any(|r| r == wanted))
    })
    .await;
}

#[tokio::test]
async fn an_init_container_that_fails_is_tried_again_before_anything_else_starts() {
    let world = World::new();
    let uid = world.create(pod("a").init("setup", "serve"));
    let first = world.attempt(&uid, "setup", 0).await;
    world.runtime.exit_container(&first.id, 1);
    let again = world.attempt(&uid, "setup", 1).await;
    assert!(world.containers(&uid).await.iter().all(|c| c.name == "setup"));
    world.runtime.exit_container(&again.id, 0);
    world.attempt(&uid, "main", 0).await;
}

#[tokio::test]
async fn a_pod_of_another_node_is_never_touched() {
    let world = World::new();
    let other = world.create(pod("other").with("/spec/nodeName", json!("n2")));
    world.running(pod("own")).await;
    assert!(world.sandboxes(&other).await.is_empty());
    assert_eq!(world.api.phase("other"), "");
}

#[tokio::test]
async fn a_pod_that_has_run_to_its_end_keeps_its_containers_for_their_logs_and_nothing_else() {
    let world = World::new();
    let good = world.create(pod("good").policy("Never").runs("print done exit 0"));
    let bad = world.create(pod("bad").policy("OnFailure").runs("exit 0").and("late", "exit 0"));
    world.until_phase("good", "Succeeded").await;
    world.until_phase("bad", "Succeeded").await;
    let failed = world.create(pod("failed").policy("Never").runs("exit 3"));
    world.until_phase("failed", "Failed").await;
    assert_eq!(world.api.container("failed", 0)["state"]["terminated"]["exitCode"], 3);
    assert_eq!(world.api.condition("good", "Ready"), "False");
    for uid in [good, bad, failed] {
        until("the volumes are gone", || !world.root.path().join("pods").join(&uid).exists()).await;
        assert!(world.containers(&uid).await.iter().all(|c| c.state == ContainerState::Exited && c.attempt == 0));
        assert!(world.sandboxes(&uid).await.iter().all(|s| s.state == SandboxState::NotReady));
    }
}

#[tokio::test]
async fn a_container_that_keeps_failing_is_held_back_and_says_so() {
    let world = World::new();
    let uid = world.create(pod("a"));
    for attempt in 0..2 {
        let container = world.attempt(&uid, "main", attempt).await;
        world.runtime.exit_container(&container.id, 1);
    }
    until("it is said to crash in a loop", || {
        world.api.container("a", 0)["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    })
    .await;
    let status = world.api.container("a", 0);
    assert_eq!(status["restartCount"], 1);
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 1);
    assert_eq!(world.runtime.calls(Verb::StartContainer), 2, "it is not started a third time yet");
    until("it was told", || world.api.state().reasons("a").contains(&"BackOff".to_owned())).await;
}

#[tokio::test]
async fn a_command_that_does_not_exist_and_a_death_for_want_of_memory_are_told_apart() {
    let world = World::new();
    world.create(pod("absent").policy("Never").runs("missing"));
    let uid = world.running(pod("hungry").policy("Never")).await;
    world.runtime.oom_kill_container(&world.attempt(&uid, "main", 0).await.id);
    world.until_phase("hungry", "Failed").await;
    assert_eq!(world.api.container("hungry", 0)["state"]["terminated"]["reason"], "OOMKilled");
    world.until_phase("absent", "Failed").await;
    let ended = world.api.container("absent", 0)["state"]["terminated"].clone();
    assert_eq!((&ended["reason"], &ended["exitCode"]), (&json!("StartError"), &json!(127)));
}

#[tokio::test]
async fn a_config_map_that_is_missing_holds_the_pod_until_it_is_there() {
    let world = World::new();
    let uid = world.create(pod("a").mounts_config("settings"));
    until("the missing ConfigMap was told", || world.api.state().reasons("a").contains(&"FailedMount".to_owned()))
        .await;
    let map = json!({ "metadata": { "namespace": "default", "name": "settings" }, "data": { "color": "blue" } });
    world.api.create("configmaps", map);
    until_within(LATER, "it runs", || world.api.phase("a") == "Running").await;
    let dir = world.root.path().join("secrets").join(&uid).join("kubernetes.io~configmap/config");
    assert_eq!(std::fs::read_to_string(dir.join("color")).unwrap(), "blue");
    assert_eq!(world.runtime.calls(Verb::RunPodSandbox), 1, "no sandbox was tried without the volume");
}
