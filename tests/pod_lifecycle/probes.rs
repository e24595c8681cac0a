//! Startup, readiness and liveness probes.

use std::time::{Duration, Instant};

use lambdalet::kubelet_api::targets::PodTargets;
use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::{PodBuilder, pod};
use super::server::Server;
use super::world::{Setup, World, until};

fn restarts_at_once() -> Setup {
    Setup { max_restart_backoff: Duration::ZERO, ..Setup::default() }
}

impl PodBuilder {
    /// A probe of `main`.
    fn probed(self, kind: &str, probe: serde_json::Value) -> Self {
        self.with(&format!("/spec/containers/0/{kind}"), probe)
    }
}

fn ready(world: &World) -> bool {
    world.api.container("a", 0)["ready"] == true && world.api.condition("a", "Ready") == "True"
}

async fn told(world: &World, reason: &str) {
    until(&format!("{reason} is told"), || world.api.state().reasons("a").contains(&reason.to_owned())).await;
}

#[tokio::test]
async fn readiness_follows_its_probe() {
    let server = Server::new(503).await;
    let world = World::new();
    world.running(pod("a").probed("readinessProbe", server.probe())).await;
    told(&world, "Unhealthy").await;
    assert_eq!(world.api.container("a", 0)["started"], true);
    assert_eq!(world.api.container("a", 0)["ready"], false);
    assert_eq!(world.api.condition("a", "ContainersReady"), "False");
    server.answer(200);
    until("it is ready", || ready(&world)).await;
    server.answer(500);
    until("it is not ready any more", || world.api.condition("a", "Ready") == "False").await;
    assert_eq!(world.api.container("a", 0)["restartCount"], 0, "it is not killed for that");
    let counts = world.directory().probes();
    assert!(counts.iter().any(|c| (c.probe, c.result, c.container.as_str()) == ("Readiness", "successful", "main")));
    world.api.delete("a", 30);
    world.until_gone("a").await;
    assert!(world.directory().probes().is_empty(), "what was counted goes with the Pod");
}

#[tokio::test]
async fn a_container_that_fails_its_liveness_is_killed_and_started_again() {
    let server = Server::new(200).await;
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a").and("other", "serve").probed("livenessProbe", server.probe())).await;
    until("it was asked", || server.asked() > 0).await;
    assert_eq!(world.api.container("a", 0)["restartCount"], 0);
    server.answer(500);
    world.attempt(&uid, "main", 1).await;
    server.answer(200);
    for reason in ["Unhealthy", "Killing"] {
        told(&world, reason).await;
    }
    until("the restart is told", || world.api.container("a", 0)["restartCount"] == 1).await;
    assert_eq!(world.api.container("a", 1)["restartCount"], 0, "its neighbour goes on");
    assert_eq!(world.runtime.calls(Verb::StopContainer), 1);
}

#[tokio::test]
async fn the_grace_of_a_liveness_probe_is_its_own() {
    let server = Server::new(500).await;
    let world = World::with(restarts_at_once());
    let mut probe = server.probe();
    probe["terminationGracePeriodSeconds"] = json!(1);
    let stubborn = pod("a").runs("stubborn").with("/spec/terminationGracePeriodSeconds", json!(3600));
    let uid = world.running(stubborn.probed("livenessProbe", probe)).await;
    world.attempt(&uid, "main", 1).await;
    until("the kill is told", || world.api.container("a", 0)["lastState"]["terminated"]["exitCode"] == 137).await;
}

#[tokio::test]
async fn a_pod_that_restarts_nothing_fails_with_its_liveness() {
    let server = Server::new(500).await;
    let world = World::new();
    world.running(pod("a").policy("Never").probed("livenessProbe", server.probe())).await;
    world.until_phase("a", "Failed").await;
    assert_eq!(world.api.container("a", 0)["state"]["terminated"]["exitCode"], 143);
}

#[tokio::test]
async fn a_startup_probe_gates_liveness_and_readiness() {
    let (startup, rest) = (Server::new(500).await, Server::new(500).await);
    let world = World::new();
    let mut slow = startup.probe();
    slow["failureThreshold"] = json!(1000);
    let mut readiness = rest.probe();
    readiness["periodSeconds"] = json!(600);
    let probed = pod("a").probed("startupProbe", slow).probed("livenessProbe", rest.probe());
    world.running(probed.probed("readinessProbe", readiness)).await;
    until("startup was asked for a while", || startup.asked() > 6).await;
    assert_eq!((rest.asked(), &world.api.container("a", 0)["started"]), (0, &json!(false)));
    rest.answer(200);
    startup.answer(200);
    until("it is ready, in spite of the long period", || ready(&world)).await;
    assert_eq!(world.api.container("a", 0)["started"], true);
    let asked = startup.asked();
    until("liveness is asked", || rest.asked() > 3).await;
    assert_eq!(startup.asked(), asked, "startup is not asked again");
}

#[tokio::test]
async fn a_container_that_never_comes_up_is_killed() {
    let server = Server::new(500).await;
    let world = World::with(restarts_at_once());
    let uid = world.running(pod("a").probed("startupProbe", server.probe())).await;
    world.attempt(&uid, "main", 1).await;
}

#[tokio::test]
async fn commands_are_probes_too_and_one_that_hangs_has_failed() {
    let world = World::with(restarts_at_once());
    let exec = |command: &str| {
        let words: Vec<_> = command.split(' ').collect();
        json!({ "exec": { "command": words }, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 1 })
    };
    let uid = world.running(pod("a").probed("readinessProbe", exec("exit 0"))).await;
    until("it is ready", || ready(&world)).await;
    let other = pod("b").probed("livenessProbe", exec("serve")).probed("readinessProbe", exec("exit 1"));
    let hangs = world.running(other).await;
    world.attempt(&hangs, "main", 1).await;
    assert_eq!(world.api.container("b", 0)["ready"], false);
    assert!(ready(&world));
    let main = world.attempt(&uid, "main", 0).await;
    world.api.delete("a", 30);
    until("a is gone", || world.api.pod("a").is_none()).await;
    world.runtime.execs_ended(&main.id).await;
}

#[tokio::test]
async fn a_restart_of_the_process_does_not_make_a_ready_pod_unready() {
    let server = Server::new(200).await;
    let mut world = World::new();
    let mut probe = server.probe();
    probe["periodSeconds"] = json!(2);
    world.running(pod("a").probed("readinessProbe", probe.clone()).probed("startupProbe", probe)).await;
    until("it is ready", || ready(&world)).await;
    world.crash();
    let (written, asked) = (world.api.state().statuses.len(), server.asked());
    world.start();
    until("the new process asks", || server.asked() > asked + 1).await;
    for status in &world.api.state().statuses[written..] {
        let main = &status.status["containerStatuses"][0];
        assert_eq!((&main["ready"], &main["started"]), (&json!(true), &json!(true)));
    }
    server.answer(500);
    until("it is not ready any more", || world.api.condition("a", "Ready") == "False").await;
}

#[tokio::test]
async fn a_pod_that_ends_tells_its_readiness_and_is_not_killed_for_its_liveness() {
    let server = Server::new(200).await;
    let world = World::new();
    let stubborn = pod("a").runs("stubborn").probed("livenessProbe", server.probe());
    world.running(stubborn.probed("readinessProbe", server.probe())).await;
    until("it is ready", || ready(&world)).await;
    world.api.delete("a", 3600);
    until("it is being stopped", || world.runtime.calls(Verb::StopContainer) == 1).await;
    server.answer(500);
    until("it is not ready any more", || world.api.condition("a", "Ready") == "False").await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 1, "nothing is stopped for its liveness");
    world.api.delete("a", 0);
    world.until_nothing_is_left_within(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn an_end_is_told_before_anything_looks_again() {
    let world = World::new();
    let uid = world.running(pod("a").policy("Never")).await;
    let main = world.attempt(&uid, "main", 0).await;
    let began = Instant::now();
    world.runtime.exit_container(&main.id, 3);
    until("the end is told", || !world.api.container("a", 0)["state"]["terminated"].is_null()).await;
    // A minute is what the next look would take; how fast it is, a benchmark says.
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
}
