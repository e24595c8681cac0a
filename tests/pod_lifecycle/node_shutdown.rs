//! The host goes down: Pods end by their priority, nobody new is let in, and the host waits until all have ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use lambdalet::config::node_shutdown::ShutdownGrace;
use lambdalet::pod::node_shutdown::{Host, HostError, Lock, Manager};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::pods::pod;
use super::world::{World, until};

/// A host that a test takes down.
#[derive(Default)]
struct Machine {
    locks: Arc<AtomicU64>,
    patience: AtomicU64,
    said: std::sync::Mutex<Option<mpsc::Sender<bool>>>,
}

struct Held(Arc<AtomicU64>);

impl Lock for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Host for Machine {
    async fn be_patient(&self, delay: Duration) -> Result<(), HostError> {
        self.patience.store(delay.as_secs(), Ordering::SeqCst);
        Ok(())
    }

    async fn hold_back(&self) -> Result<Box<dyn Lock>, HostError> {
        self.locks.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Held(Arc::clone(&self.locks))))
    }

    async fn signals(&self) -> Result<BoxStream<'static, bool>, HostError> {
        let (sender, receiver) = mpsc::channel(8);
        *self.said.lock().unwrap() = Some(sender);
        Ok(ReceiverStream::new(receiver).boxed())
    }
}

impl Machine {
    fn says(&self, goes_down: bool) {
        self.said.lock().unwrap().as_ref().unwrap().try_send(goes_down).unwrap();
    }

    fn is_held(&self) -> bool {
        self.locks.load(Ordering::SeqCst) == 1
    }
}

struct Watched {
    machine: Arc<Machine>,
    told: watch::Receiver<bool>,
    _manager: AbortOnDropHandle<()>,
}

/// The host is watched; other Pods have `all` less `critical`, and critical ones that.
async fn watched(world: &World, all: u64, critical: u64) -> Watched {
    let machine = Arc::new(Machine::default());
    let (told, seen) = watch::channel(false);
    let [all, critical] = [all, critical].map(Duration::from_secs);
    let grace = ShutdownGrace { all, critical, ..ShutdownGrace::default() };
    let manager = Manager::new(Arc::clone(world.shared()), machine.clone(), grace, told);
    let manager = lambdalet::shutdown::owned(manager.run(CancellationToken::new()));
    until("the host is held back", || machine.is_held()).await;
    Watched { machine, told: seen, _manager: manager }
}

#[tokio::test]
async fn pods_end_in_the_order_of_their_priority_and_then_the_host_may_go() {
    let world = World::new();
    let node = watched(&world, 30, 10).await;
    assert_eq!(node.machine.patience.load(Ordering::SeqCst), 30);
    let critical = world.running(pod("critical").with("/spec/priority", json!(2_000_000_000))).await;
    world.running(pod("plain").runs("stubborn").with("/spec/terminationGracePeriodSeconds", json!(1))).await;
    node.machine.says(true);
    until("the critical Pod goes", || {
        let held = node.machine.is_held();
        let gone = world.api.phase("critical") == "Failed";
        assert!(gone || held, "the host waits");
        gone
    })
    .await;
    assert_eq!(world.api.phase("plain"), "Failed", "it went first");
    until("the host may go", || !node.machine.is_held()).await;
    let status = world.api.pod("plain").unwrap()["status"].clone();
    let text = "Pod was terminated in response to imminent node shutdown.";
    assert_eq!((&status["reason"], &status["message"]), (&json!("Terminated"), &json!(text)));
    assert_eq!(world.api.condition("plain", "DisruptionTarget"), "True");
    assert!(!world.containers(&critical).await.is_empty(), "its logs can be read as long as the node is there");
    assert!(*node.told.borrow(), "the Node is told");
    let events = world.api.state().reasons("critical");
    assert!(!events.contains(&"Terminated".to_owned()), "{events:?}");
}

#[tokio::test]
async fn a_pod_that_is_bound_meanwhile_is_refused_until_the_host_stays_after_all() {
    let world = World::new();
    let mut node = watched(&world, 2, 1).await;
    node.machine.says(true);
    node.told.wait_for(|told| *told).await.unwrap();
    world.create(pod("late"));
    world.until_phase("late", "Failed").await;
    let status = world.api.pod("late").unwrap()["status"].clone();
    let text = "Pod was rejected: Pod was rejected as the node is shutting down.";
    assert_eq!((&status["reason"], &status["message"]), (&json!("NodeShutdown"), &json!(text)));
    until("the host may go", || !node.machine.is_held()).await;
    node.machine.says(false);
    node.told.wait_for(|told| !*told).await.unwrap();
    until("the host is held back again", || node.machine.is_held()).await;
    world.running(pod("next")).await;
    until("both were told", || {
        let state = world.api.state();
        state
            .events
            .iter()
            .filter(|event| event["reason"] == "NodeShutdown" && event["involvedObject"]["kind"] == "Node")
            .count()
            == 2
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_does_not_end_does_not_hold_the_host_up_longer_than_its_group_has() {
    let world = World::new();
    let node = watched(&world, 1, 0).await;
    world.running(pod("stubborn").runs("stubborn").with("/spec/terminationGracePeriodSeconds", json!(600))).await;
    let began = std::time::Instant::now();
    node.machine.says(true);
    until("the host may go", || !node.machine.is_held()).await;
    assert!(began.elapsed() >= Duration::from_secs(1));
    world.until_phase("stubborn", "Failed").await;
}
