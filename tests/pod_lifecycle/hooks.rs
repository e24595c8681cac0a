//! postStart and preStop hooks.

use std::time::{Duration, Instant};

use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};

use super::pods::{PodBuilder, pod};
use super::server::Server;
use super::world::{World, until};

impl PodBuilder {
    /// A hook of `main`.
    fn hooked(self, hook: &str, handler: Value) -> Self {
        self.with("/spec/containers/0/lifecycle", json!({ hook: handler }))
    }
}

fn exec(command: &str) -> Value {
    json!({ "exec": { "command": command.split(' ').collect::<Vec<_>>() } })
}

async fn told(world: &World, reason: &str) {
    until(&format!("{reason} is told"), || world.api.state().reasons("a").contains(&reason.to_owned())).await;
}

#[tokio::test]
async fn a_container_whose_post_start_hook_fails_is_ended_and_started_again() {
    let world = World::new();
    world.create(pod("a").hooked("postStart", exec("exit 1")));
    told(&world, "FailedPostStartHook").await;
    until("the second is held back", || {
        let status = world.api.container("a", 0);
        status["restartCount"] == 1 && status["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    })
    .await;
    for written in &world.api.state().statuses {
        assert_ne!(written.status["containerStatuses"][0]["started"], true, "it never counts as started");
    }
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_container_counts_as_running_once_its_post_start_hook_is_over() {
    let server = Server::new(0).await;
    let world = World::new();
    world.create(pod("a").hooked("postStart", server.get()).and("next", "serve"));
    until("the hook was called", || server.asked() == 1).await;
    assert_eq!(world.runtime.calls(Verb::StartContainer), 1, "the next one waits");
    assert_ne!(world.api.phase("a"), "Running");
    world.api.delete("a", 30);
    world.until_gone("a").await;
}

#[tokio::test]
async fn a_stop_waits_for_the_pre_stop_hook() {
    let server = Server::new(0).await;
    let world = World::new();
    world.running(pod("a").hooked("preStop", server.get())).await;
    world.api.delete("a", 3600);
    until("the hook was called", || server.asked() == 1).await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 0);
    let began = Instant::now();
    world.api.delete("a", 1);
    world.until_gone("a").await;
    assert!(began.elapsed() >= Duration::from_millis(900), "the hook has the whole grace");
    assert_eq!((server.asked(), world.runtime.calls(Verb::StopContainer)), (1, 1), "it is called once");
}

#[tokio::test]
async fn a_pre_stop_hook_that_fails_is_told_and_holds_nothing_up() {
    let world = World::new();
    world.running(pod("a").hooked("preStop", exec("exit 3"))).await;
    world.api.delete("a", 3600);
    world.until_gone("a").await;
    told(&world, "FailedPreStopHook").await;
}

#[tokio::test]
async fn a_sleep_before_the_stop_takes_its_time() {
    let world = World::new();
    world.running(pod("a").hooked("preStop", json!({ "sleep": { "seconds": 1 } }))).await;
    let began = Instant::now();
    world.api.delete("a", 30);
    world.until_gone("a").await;
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_container_that_ended_by_itself_has_no_pre_stop_hook() {
    let server = Server::new(200).await;
    let world = World::new();
    world.create(pod("a").policy("Never").runs("exit 0").hooked("preStop", server.get()));
    world.until_phase("a", "Succeeded").await;
    world.api.delete("a", 30);
    world.until_gone("a").await;
    assert_eq!(server.asked(), 0);
}
