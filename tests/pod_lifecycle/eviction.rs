//! Eviction: the node is short of memory, and one Pod after the other has to go until it is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lambdalet::config::{ImageSettings, NodeSettings};
use lambdalet::node::machine::MachineError;
use lambdalet::pod::eviction::manager::Manager;
use lambdalet::pod::eviction::{Observation, Signal};
use lambdalet::pod::garbage::Collector;
use lambdalet::runtime::stats::{MemoryUsage, Usage};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::pods::{PodBuilder, pod};
use super::world::{SOON, World, until};

const MI: u64 = 1 << 20;

/// A host of one gibibyte whose free memory a test sets.
struct Host {
    free: Arc<AtomicU64>,
    _manager: AbortOnDropHandle<()>,
}

fn watch_over(world: &World, free: u64) -> Host {
    let free = Arc::new(AtomicU64::new(free));
    let seen = Arc::clone(&free);
    let observe = move || -> Result<_, MachineError> {
        let memory = Observation { available: seen.load(Ordering::SeqCst), capacity: 1024 * MI };
        Ok(BTreeMap::from([(Signal::Memory, memory)]))
    };
    let images = Collector::new(Arc::new(world.runtime.clone()), &ImageSettings::default());
    let settings = NodeSettings { pressure_transition: Duration::ZERO, ..NodeSettings::default() };
    let images = Arc::new(tokio::sync::Mutex::new(images));
    let manager = Manager::new(Arc::clone(world.shared()), &settings, Box::new(observe), images);
    let running = manager.run(Duration::from_millis(20), CancellationToken::new());
    Host { free, _manager: lambdalet::shutdown::owned(running) }
}

async fn uses(world: &World, uid: &str, memory: u64) {
    let main = world.attempt(uid, "main", 0).await;
    let memory = MemoryUsage { usage: memory, working_set: memory, ..MemoryUsage::default() };
    world.runtime.set_usage(&main.id, Usage { memory: Some(memory), ..Usage::default() });
}

fn asking(name: &str, memory: &str) -> PodBuilder {
    pod(name).with("/spec/containers/0/resources", json!({ "requests": { "memory": memory } }))
}

#[tokio::test]
async fn the_pod_that_took_most_beyond_its_request_goes_and_no_other() {
    let world = World::new();
    let modest = world.running(asking("modest", "500Mi")).await;
    let greedy = world.running(asking("greedy", "10Mi").with("/spec/terminationGracePeriodSeconds", json!(600))).await;
    uses(&world, &modest, 400 * MI).await;
    uses(&world, &greedy, 200 * MI).await;
    let host = watch_over(&world, 101 * MI);
    host.free.store(50 * MI, Ordering::SeqCst);
    until("the node is relieved", || {
        let gone = world.api.phase("greedy") == "Failed";
        if gone {
            host.free.store(500 * MI, Ordering::SeqCst);
        }
        gone
    })
    .await;
    let status = world.api.pod("greedy").unwrap()["status"].clone();
    assert_eq!(status["reason"], "Evicted");
    let message = status["message"].as_str().unwrap();
    assert!(message.starts_with("The node was low on resource: memory. Threshold quantity: "), "{message}");
    assert!(message.contains("Container main was using 204800Ki, request is 10Mi"), "{message}");
    assert_eq!(world.api.condition("greedy", "DisruptionTarget"), "True");
    until("it was told", || world.api.state().reasons("greedy").iter().any(|reason| reason == "Evicted")).await;
    until("nothing of it is left", || !world.root.path().join("pods").join(&greedy).exists()).await;
    assert!(world.containers(&greedy).await.is_empty(), "its layers would go on taking space");
    world.attempt(&modest, "main", 0).await;
    assert_eq!(world.api.phase("modest"), "Running");
}

#[tokio::test]
async fn under_pressure_nothing_that_asks_for_nothing_is_let_in_and_critical_pods_stay() {
    let world = World::new();
    let critical = world.running(pod("critical").with("/spec/priority", json!(2_000_000_000))).await;
    uses(&world, &critical, 900 * MI).await;
    let host = watch_over(&world, 50 * MI);
    let mut number = 0;
    let refused = loop {
        // The first look may still be to come.
        number += 1;
        let name = format!("late-{number}");
        world.create(pod(&name));
        until("it has a phase", || ["Running", "Failed"].contains(&world.api.phase(&name).as_str())).await;
        if world.api.pod(&name).unwrap()["status"]["message"]
            == "Pod was rejected: The node had condition: [MemoryPressure]. "
        {
            break name;
        }
    };
    assert_eq!(world.api.pod(&refused).unwrap()["status"]["reason"], "Evicted");
    world.running(asking("asks", "1Mi").with("/spec/priority", json!(2_000_000_001))).await;
    assert_eq!(world.api.phase("critical"), "Running");
    host.free.store(500 * MI, Ordering::SeqCst);
    let begun = std::time::Instant::now();
    loop {
        number += 1;
        let name = format!("later-{number}");
        world.create(pod(&name));
        until("it has a phase", || ["Running", "Failed"].contains(&world.api.phase(&name).as_str())).await;
        if world.api.phase(&name) == "Running" {
            break;
        }
        assert!(begun.elapsed() < SOON, "the pressure does not end");
    }
}
