//! Function Pods: environments that are prepared, used, renewed and removed. No front listens here, for there is no network
//! namespace to listen in; who wants an environment comes as `kubectl exec` does.

use lambdalet::kubelet_api::targets::{Entrance, PodTargets as _};
use lambdalet::runtime::types::{ContainerState, ContainerStatus};
use serde_json::json;
use tokio::net::TcpListener;

use super::pods::{PodBuilder, pod};
use super::server::Server;
use super::world::{LATER, SOON, Setup, World, until};

/// A node whose Pods have addresses at which this process listens.
async fn node() -> (World, TcpListener) {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    (World::with(Setup { range: "127.77.0.0/24", ..Setup::default() }), listener)
}

/// A function that keeps no replica, and whose environments listen there.
fn function(listener: &TcpListener) -> PodBuilder {
    let port = listener.local_addr().unwrap().port().to_string();
    pod("f")
        .with("/metadata/labels", json!({ "com.openfaas.scale.max": "3" }))
        .with("/metadata/annotations", json!({ "lambdalet.dev/invocation-port": port }))
}

/// Waits until the environment's container is made, and not started.
async fn prepared(world: &World, uid: &str, environment: &str) -> ContainerStatus {
    in_state(world, uid, environment, ContainerState::Created).await
}

async fn in_state(world: &World, uid: &str, environment: &str, state: ContainerState) -> ContainerStatus {
    let key = format!("{uid}.{environment}");
    let began = std::time::Instant::now();
    loop {
        let mut found = world.containers(&key).await;
        found.retain(|container| container.state == state);
        if let Some(found) = found.pop() {
            return found;
        }
        assert!(began.elapsed() < SOON, "waited in vain for {key} to be {state:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn enter(world: &World) -> Entrance {
    world.directory().exec_target("default", "f", None, "main").await.unwrap()
}

#[tokio::test]
async fn what_is_prepared_is_what_is_used_and_the_next_is_prepared_then() {
    let (world, listener) = node().await;
    let uid = world.create(function(&listener));
    let first = prepared(&world, &uid, "0.0").await;
    assert_eq!(world.all_sandboxes().await, 2, "the Pod's own, and that of one environment");
    let visit = enter(&world).await;
    assert_eq!(visit.container, first.id);
    prepared(&world, &uid, "1.0").await;
    assert_eq!(world.sandboxes(&format!("{uid}.0.0")).await.len(), 1);
    // Both end with the Pod: the one that runs, and the one that never did.
    drop(visit);
    world.api.delete("f", 1);
    world.until_gone("f").await;
}

#[tokio::test]
async fn what_is_prepared_is_made_anew_once_it_would_be_told_something_else() {
    let (world, listener) = node().await;
    world
        .api
        .create("configmaps", json!({ "metadata": { "namespace": "default", "name": "c" }, "data": { "k": "old" } }));
    let from = json!([{ "name": "K", "valueFrom": { "configMapKeyRef": { "name": "c", "key": "k" } } }]);
    let uid = world.create(function(&listener).with("/spec/containers/0/env", from));
    let old = prepared(&world, &uid, "0.0").await;
    world
        .api
        .create("configmaps", json!({ "metadata": { "namespace": "default", "name": "c" }, "data": { "k": "new" } }));
    let visit = enter(&world).await;
    assert_ne!(visit.container, old.id, "it has the old value");
    assert!(world.containers(&format!("{uid}.0.0")).await.iter().all(|container| container.id != old.id));
    drop(visit);
    world.api.delete("f", 1);
    world.until_gone("f").await;
}

#[tokio::test]
async fn labels_and_images_that_change_renew_what_is_prepared() {
    let (world, listener) = node().await;
    let uid = world.create(function(&listener));
    let old = prepared(&world, &uid, "0.0").await;
    world.api.edit("f", |pod| pod["metadata"]["labels"]["app"] = json!("other"));
    until("the old one is gone", || {
        let found = futures::executor::block_on(world.containers(&format!("{uid}.0.0")));
        found.iter().all(|container| container.id != old.id)
    })
    .await;
    prepared(&world, &uid, "0.0").await;
    world.api.edit("f", |pod| pod["metadata"]["annotations"]["lambdalet.dev/reserve"] = json!("0"));
    until("nothing is prepared", || futures::executor::block_on(world.all_sandboxes()) == 1).await;
    world.api.delete("f", 1);
    world.until_gone("f").await;
}

#[tokio::test]
async fn what_is_prepared_survives_the_loss_of_its_sandbox_and_no_crash_of_the_node_agent() {
    let (mut world, listener) = node().await;
    let uid = world.create(function(&listener));
    let first = prepared(&world, &uid, "0.0").await;
    world.runtime.kill_sandbox(&first.sandbox);
    until("another sandbox", || {
        let found = futures::executor::block_on(world.containers(&format!("{uid}.0.0")));
        found.iter().any(|container| container.state == ContainerState::Created && container.sandbox != first.sandbox)
    })
    .await;
    let second = prepared(&world, &uid, "0.0").await;
    world.crash();
    world.start();
    until("the one of before is removed", || {
        let found = futures::executor::block_on(world.containers(&format!("{uid}.0.0")));
        found.iter().all(|container| container.id != second.id)
    })
    .await;
    let third = prepared(&world, &uid, "0.0").await;
    assert_eq!(enter(&world).await.container, third.id);
    world.api.delete("f", 1);
    world.until_gone("f").await;
}

#[tokio::test]
async fn an_image_that_is_missing_prepares_nothing_and_leaves_nothing() {
    let (world, listener) = node().await;
    world.create(
        function(&listener)
            .with("/spec/containers/0/imagePullPolicy", json!("Never"))
            .with("/spec/containers/0/image", json!("missing:1")),
    );
    until("it is told", || world.api.container("f", 0)["state"]["waiting"]["reason"] == "ErrImageNeverPull").await;
    world.api.delete("f", 1);
    world.until_gone("f").await;
}

#[tokio::test]
async fn probes_ask_environments_that_run_and_a_dead_one_is_replaced() {
    let (world, listener) = node().await;
    let (alive, ready) = (Server::new(200).await, Server::new(503).await);
    let probed = function(&listener).with("/spec/containers/0/livenessProbe", alive.probe());
    let uid = world.create(probed.with("/spec/containers/0/readinessProbe", ready.probe()));
    let first = prepared(&world, &uid, "0.0").await;
    assert_eq!((alive.asked(), ready.asked()), (0, 0), "neither the front nor what is only prepared is asked");
    let mut entering = std::pin::pin!(enter(&world));
    tokio::select! {
        _ = &mut entering => panic!("it was not ready"),
        () = until("its readiness is asked", || ready.asked() > 6) => {}
    }
    ready.answer(200);
    let visit = entering.await;
    assert_eq!(visit.container, first.id);
    alive.answer(500);
    until("the dead one is removed", || {
        let found = futures::executor::block_on(world.containers(&format!("{uid}.0.0")));
        found.iter().all(|container| container.id != first.id || container.state == ContainerState::Exited)
    })
    .await;
    alive.answer(200);
    drop(visit);
    // As after any crash, the next start may be held back for a while.
    let next = async {
        loop {
            match world.directory().exec_target("default", "f", None, "main").await {
                Ok(entrance) => return entrance,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    };
    let next = tokio::time::timeout(LATER, next).await.expect("another environment");
    assert_ne!(next.container, first.id);
    drop(next);
    world.api.delete("f", 1);
    world.until_gone("f").await;
}
