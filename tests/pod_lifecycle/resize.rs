//! In-place resize: the resources of a Pod that runs are changed.

use lambdalet::runtime::SandboxRuntime;
use lambdalet::runtime::stats::{MemoryUsage, StatsScope, Usage};
use lambdalet::runtime::types::{ContainerState, Resources};
use lambdalet::runtime::verb::Verb;
use serde_json::{Value, json};

use super::pods::{PodBuilder, pod};
use super::server::Server;
use super::world::{Setup, World, unavailable, until, until_within};

const MI: i64 = 1 << 20;

fn amounts(cpu: &str, memory: &str) -> Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } })
}

fn sized(name: &str, cpu: &str, memory: &str) -> PodBuilder {
    pod(name).with("/spec/containers/0/resources", amounts(cpu, memory))
}

/// Asks for other resources, as the Pod's subresource does.
fn resize(world: &World, name: &str, resources: Value) {
    world.api.edit(name, |pod| {
        pod["spec"]["containers"][0]["resources"] = resources;
        let generation = pod["metadata"]["generation"].as_i64().unwrap_or(1);
        pod["metadata"]["generation"] = json!(generation + 1);
    });
}

/// A condition as the API server has it; null if there is none.
fn condition(world: &World, name: &str, type_: &str) -> Value {
    let conditions = world.api.pod(name).unwrap()["status"]["conditions"].clone();
    let found = conditions.as_array().unwrap().iter().find(|condition| condition["type"] == type_).cloned();
    found.unwrap_or_default()
}

async fn until_done(world: &World, name: &str, resources: &Value) {
    until("the resize is told", || world.api.container(name, 0)["resources"] == *resources).await;
    until("it is over", || {
        ["PodResizePending", "PodResizeInProgress"].iter().all(|type_| condition(world, name, type_).is_null())
    })
    .await;
    assert_eq!(world.api.container(name, 0)["allocatedResources"], resources["requests"]);
}

async fn limits(world: &World, uid: &str) -> Resources {
    let all = world.containers(uid).await;
    all.into_iter().find(|c| c.state == ContainerState::Running).unwrap().resources.unwrap()
}

fn told(world: &World, name: &str, reason: &str) -> usize {
    world.api.state().reasons(name).iter().filter(|told| *told == reason).count()
}

#[tokio::test]
async fn a_container_gets_more_and_less_as_it_runs() {
    let world = World::new();
    let uid = world.running(sized("a", "500m", "64Mi")).await;
    let first = world.attempt(&uid, "main", 0).await;
    for (cpu, memory, quota, bytes) in [("1", "128Mi", 100_000, 128 * MI), ("250m", "32Mi", 25_000, 32 * MI)] {
        resize(&world, "a", amounts(cpu, memory));
        until_done(&world, "a", &amounts(cpu, memory)).await;
        let now = limits(&world, &uid).await;
        assert_eq!((now.cpu_quota, now.memory_limit), (Some(quota), Some(bytes)));
        let stats = world.runtime.list_pod_sandbox_stats(StatsScope::All).await.unwrap();
        let of_pod = stats[0].usage.limits.unwrap();
        assert_eq!(
            (of_pod.cpu_quota, of_pod.memory),
            (Some(quota as u64), Some(bytes as u64)),
            "the Pod as a whole too"
        );
    }
    let status = world.api.pod("a").unwrap()["status"].clone();
    assert_eq!(status["allocatedResources"], json!({ "cpu": "250m", "memory": "32Mi" }));
    let same = world.attempt(&uid, "main", 0).await;
    assert_eq!((same.id, same.pid), (first.id, first.pid), "it was not restarted");
    until("all of it was told", || told(&world, "a", "ResizeCompleted") == 2).await;
    assert_eq!(told(&world, "a", "ResizeStarted"), 2);
}

#[tokio::test]
async fn a_policy_may_want_a_restart_and_has_it_whatever_the_pods_own_says() {
    let world = World::new();
    let policy = json!([{ "resourceName": "memory", "restartPolicy": "RestartContainer" }]);
    let pod = sized("a", "500m", "64Mi").policy("OnFailure").with("/spec/containers/0/resizePolicy", policy);
    // The process ends with code 0 when it is asked to.
    let uid = world.running(pod.runs("serve")).await;
    resize(&world, "a", amounts("1", "64Mi"));
    until_done(&world, "a", &amounts("1", "64Mi")).await;
    world.attempt(&uid, "main", 0).await;
    resize(&world, "a", amounts("1", "128Mi"));
    world.attempt(&uid, "main", 1).await;
    until_done(&world, "a", &amounts("1", "128Mi")).await;
    assert_eq!(limits(&world, &uid).await.memory_limit, Some(128 * MI));
    assert_eq!(
        (world.api.phase("a"), world.api.container("a", 0)["restartCount"].clone()),
        ("Running".into(), json!(1))
    );
    until("the end of the first is told", || told(&world, "a", "Killing") == 1).await;
}

#[tokio::test]
async fn a_restart_for_other_resources_calls_the_hook_and_waits_for_it() {
    let server = Server::new(0).await;
    let world = World::new();
    let policy = json!([{ "resourceName": "memory", "restartPolicy": "RestartContainer" }]);
    let hook = json!({ "preStop": server.get() });
    let pod = sized("a", "500m", "64Mi").with("/spec/containers/0/resizePolicy", policy);
    let uid = world.running(pod.with("/spec/containers/0/lifecycle", hook)).await;
    resize(&world, "a", amounts("500m", "128Mi"));
    until("the hook is called", || server.asked() == 1).await;
    world.attempt(&uid, "main", 0).await;
    assert_eq!(world.runtime.calls(Verb::StopContainer), 0, "not before the hook is over");
    server.answer(200);
    world.attempt(&uid, "main", 1).await;
    until_done(&world, "a", &amounts("500m", "128Mi")).await;
    assert_eq!(server.asked(), 1);
}

#[tokio::test]
async fn who_asks_for_more_than_is_left_waits_for_it() {
    let world = World::with(Setup { room: (4, 110), ..Setup::default() });
    let uid = world.running(sized("a", "1", "64Mi")).await;
    world.running(sized("b", "2", "64Mi")).await;
    resize(&world, "a", amounts("3", "64Mi"));
    until("it waits", || condition(&world, "a", "PodResizePending")["reason"] == "Deferred").await;
    let pending = condition(&world, "a", "PodResizePending");
    let text = "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000";
    assert_eq!((&pending["status"], &pending["message"]), (&json!("True"), &json!(text)));
    assert_eq!(pending["observedGeneration"], 2);
    assert_eq!(world.api.container("a", 0)["allocatedResources"], json!({ "cpu": "1", "memory": "64Mi" }));
    assert_eq!(limits(&world, &uid).await.cpu_quota, Some(100_000));
    resize(&world, "a", amounts("5", "64Mi"));
    until("it can never be", || condition(&world, "a", "PodResizePending")["reason"] == "Infeasible").await;
    resize(&world, "a", amounts("3", "64Mi"));
    until("it waits again", || condition(&world, "a", "PodResizePending")["reason"] == "Deferred").await;
    // Meanwhile nobody else has what it waits for, and it keeps what it has.
    world.api.delete("b", 1);
    until_done(&world, "a", &amounts("3", "64Mi")).await;
    assert_eq!(limits(&world, &uid).await.cpu_quota, Some(300_000));
    let counts = || (told(&world, "a", "ResizeDeferred"), told(&world, "a", "ResizeInfeasible"));
    until("each was told", || counts() == (2, 1)).await;
}

#[tokio::test]
async fn a_restart_of_the_process_does_not_grant_what_has_to_wait() {
    let mut world = World::with(Setup { room: (4, 110), ..Setup::default() });
    let uid = world.running(sized("a", "1", "64Mi")).await;
    world.running(sized("b", "2", "64Mi")).await;
    resize(&world, "a", amounts("3", "64Mi"));
    until("it waits", || condition(&world, "a", "PodResizePending")["reason"] == "Deferred").await;
    world.crash();
    let before = world.api.state().statuses.len();
    world.start();
    // Its status is written anew once it was looked at.
    world.running(sized("c", "1", "1Mi")).await;
    until("they are known", || world.api.state().statuses.len() > before).await;
    assert_eq!(limits(&world, &uid).await.cpu_quota, Some(100_000));
    assert_eq!(condition(&world, "a", "PodResizePending")["reason"], "Deferred");
    assert_eq!(world.api.container("a", 0)["allocatedResources"]["cpu"], "1");
    world.api.delete("b", 1);
    until_done(&world, "a", &amounts("3", "64Mi")).await;
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_resize_finishes_it() {
    let mut world = World::new();
    let uid = world.running(sized("a", "1", "64Mi")).await;
    let hold = world.runtime.hang_next(Verb::UpdateContainerResources);
    resize(&world, "a", amounts("2", "64Mi"));
    until("it is under way", || condition(&world, "a", "PodResizeInProgress")["status"] == "True").await;
    world.crash();
    drop(hold);
    assert_eq!(limits(&world, &uid).await.cpu_quota, Some(100_000));
    world.start();
    until_done(&world, "a", &amounts("2", "64Mi")).await;
    assert_eq!(limits(&world, &uid).await.cpu_quota, Some(200_000));
}

#[tokio::test]
async fn memory_in_use_is_not_taken_and_what_fails_is_tried_again() {
    let world = World::new();
    let uid = world.running(sized("a", "1", "64Mi")).await;
    let main = world.attempt(&uid, "main", 0).await;
    let uses = |bytes: i64| Usage {
        memory: Some(MemoryUsage { usage: bytes as u64, ..MemoryUsage::default() }),
        ..Usage::default()
    };
    world.runtime.set_usage(&main.id, uses(40 * MI));
    resize(&world, "a", amounts("1", "32Mi"));
    until("it fails", || condition(&world, "a", "PodResizeInProgress")["reason"] == "Error").await;
    let text = condition(&world, "a", "PodResizeInProgress")["message"].as_str().unwrap().to_owned();
    let expected = "attempting to set container \"main\" memory limit (33554432) below current usage (41943040)";
    assert!(text.starts_with("cannot decrease memory limits: ") && text.contains(expected), "{text}");
    assert_eq!(limits(&world, &uid).await.memory_limit, Some(64 * MI));
    assert_eq!(world.api.container("a", 0)["resources"]["limits"]["memory"], "64Mi", "what is in effect");
    assert_eq!(world.api.container("a", 0)["allocatedResources"]["memory"], "32Mi", "what was granted");
    world.runtime.set_usage(&main.id, uses(MI));
    world.runtime.fail_next(Verb::UpdateContainerResources, unavailable());
    until_within(super::world::LATER * 2, "it is done", || {
        world.api.container("a", 0)["resources"]["limits"]["memory"] == "32Mi"
    })
    .await;
    until_done(&world, "a", &amounts("1", "32Mi")).await;
    until("each cause was told once", || told(&world, "a", "ResizeError") == 2).await;
}
