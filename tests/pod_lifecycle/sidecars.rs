//! Sidecars (init containers that stay), and restart policies of single containers.

use std::time::Duration;

use lambdalet::runtime::types::ContainerState;
use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};

use super::pods::{PodBuilder, pod};
use super::server::Server;
use super::world::{Setup, World, until};

fn restarts_at_once() -> Setup {
    Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() }
}

impl PodBuilder {
    /// One more init container that stays.
    fn sidecar(self, place: usize, name: &str, command: &str) -> Self {
        self.init(name, command).with(&format!("/spec/initContainers/{place}/restartPolicy"), json!("Always"))
    }
}

fn init_status(world: &World, place: usize) -> Value {
    world.api.pod("a").map(|pod| pod["status"]["initContainerStatuses"][place].clone()).unwrap_or_default()
}

#[tokio::test]
async fn what_comes_after_a_sidecar_waits_until_it_has_started() {
    let server = Server::new(500).await;
    let world = World::new();
    let mut probe = server.probe();
    probe["failureThreshold"] = json!(1000);
    let proxied = pod("a").sidecar(0, "proxy", "serve").init("setup", "exit 0");
    let uid = world.create(proxied.with("/spec/initContainers/0/startupProbe", probe));
    until("the sidecar is asked", || server.asked() > 6).await;
    assert_eq!(world.runtime.calls(Verb::StartContainer), 1);
    assert_eq!(world.api.condition("a", "Initialized"), "False");
    server.answer(200);
    world.until_phase("a", "Running").await;
    until("it is ready", || world.api.condition("a", "Ready") == "True").await;
    assert_eq!(init_status(&world, 0)["started"], true);
    assert_eq!(init_status(&world, 0)["ready"], true);
    // It comes back, and what runs does not wait for it.
    world.runtime.exit_container(&world.attempt(&uid, "proxy", 0).await.id, 0);
    world.attempt(&uid, "proxy", 1).await;
    assert_eq!(world.attempt(&uid, "main", 0).await.state, ContainerState::Running);
    assert_eq!(world.api.condition("a", "Initialized"), "True");
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_sidecar_does_not_keep_a_job_from_succeeding_nor_does_its_end_count() {
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a").policy("Never").sidecar(0, "proxy", "serve")).await;
    world.runtime.exit_container(&world.attempt(&uid, "proxy", 0).await.id, 9);
    world.attempt(&uid, "proxy", 1).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 0);
    world.until_phase("a", "Succeeded").await;
    assert_eq!(init_status(&world, 0)["state"]["terminated"]["exitCode"], 143);
    assert_eq!(init_status(&world, 0)["restartCount"], 1);
}

#[tokio::test]
async fn sidecars_end_after_the_main_containers_in_reverse_order() {
    let world = World::new();
    let server = Server::new(0).await;
    let both = pod("a").sidecar(0, "first", "serve").sidecar(1, "second", "serve");
    let hook = json!({ "preStop": server.get() });
    let uid = world.running(both.with("/spec/containers/0/lifecycle", hook)).await;
    // So it ends, and what was is kept.
    world.api.edit("a", |pod| pod["spec"]["activeDeadlineSeconds"] = json!(1));
    until("the hook of the main container was called", || server.asked() == 1).await;
    let states = world.containers(&uid).await;
    assert!(states.iter().all(|c| c.state == ContainerState::Running), "{states:#?}");
    assert_eq!(world.runtime.calls(Verb::StopContainer), 0, "the sidecars wait for it");
    server.answer(200);
    world.until_phase("a", "Failed").await;
    let ended = |containers: &[lambdalet::runtime::types::ContainerStatus], name: &str| {
        containers.iter().find(|c| c.name == name).unwrap().finished_at.unwrap()
    };
    let containers = world.containers(&uid).await;
    let times = ["main", "second", "first"].map(|name| ended(&containers, name));
    assert!(times.is_sorted(), "{times:?}");
}

#[tokio::test]
async fn a_rule_restarts_a_container_that_its_pod_would_not() {
    let world = World::with(restarts_at_once());
    let rule = json!([{ "action": "Restart", "exitCodes": { "operator": "In", "values": [42] } }]);
    let ruled = pod("a").policy("Never").with("/spec/containers/0/restartPolicy", json!("Never"));
    let uid = world.running(ruled.with("/spec/containers/0/restartPolicyRules", rule)).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 42);
    world.runtime.exit_container(&world.attempt(&uid, "main", 1).await.id, 43);
    world.until_phase("a", "Failed").await;
    assert_eq!(world.api.container("a", 0)["restartCount"], 1);
}

#[tokio::test]
async fn a_container_has_a_restart_policy_of_its_own() {
    let world = World::with(restarts_at_once());
    let once = pod("a").and("again", "serve").with("/spec/containers/0/restartPolicy", json!("Never"));
    let uid = world.running(once).await;
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 1);
    world.runtime.exit_container(&world.attempt(&uid, "again", 0).await.id, 1);
    world.attempt(&uid, "again", 1).await;
    until("the end is told", || !world.api.container("a", 0)["state"]["terminated"].is_null()).await;
    assert_eq!(world.api.phase("a"), "Running");
    let main = world.containers(&uid).await.into_iter().filter(|c| c.name == "main").count();
    assert_eq!(main, 1);
}

#[tokio::test]
async fn a_rule_may_restart_every_container_init_containers_included() {
    let world = World::with(restarts_at_once());
    let rule = json!([{ "action": "RestartAllContainers", "exitCodes": { "operator": "In", "values": [88] } }]);
    let ruled = pod("a").policy("Never").init("setup", "exit 0").and("other", "serve");
    let ruled = ruled.with("/spec/containers/0/restartPolicy", json!("Never"));
    let uid = world.running(ruled.with("/spec/containers/0/restartPolicyRules", rule)).await;
    assert_eq!(world.api.condition("a", "AllContainersRestarting"), "False");
    world.runtime.exit_container(&world.attempt(&uid, "main", 0).await.id, 88);
    for name in ["main", "other"] {
        world.attempt(&uid, name, 1).await;
    }
    let setups = world.containers(&uid).await.into_iter().filter(|c| c.name == "setup").count();
    assert_eq!(setups, 2);
    until("the restarts are told", || (0..2).all(|place| world.api.container("a", place)["restartCount"] == 1)).await;
    until("it is over", || world.api.condition("a", "AllContainersRestarting") == "False").await;
    assert_eq!(world.api.phase("a"), "Running");
}
