//! What our server promises of events besides.

use lambdalet_proto::cri::v1;
use tokio::time::timeout;

use crate::support::{PATIENCE, World};

#[tokio::test]
async fn what_is_there_before_somebody_listens_is_no_news() {
    let mut world = World::inside().await;
    let before = world.sandbox("before").await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let after = world.sandbox("after").await;
    let event = timeout(PATIENCE, events.message()).await.expect("an event comes").unwrap().unwrap();
    assert!(event.container_id == after && event.container_id != before, "{event:?}");
}

#[tokio::test]
async fn an_engine_that_goes_away_and_comes_back_costs_no_event() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    world.fake().end_events();
    world.start(&id).await.unwrap();
    let started = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.container_id == id && event.container_event_type() == v1::ContainerEventType::ContainerStartedEvent
            {
                return event;
            }
        }
    };
    let event = timeout(PATIENCE, started).await.expect("the event comes");
    assert!(event.containers_statuses.iter().any(|container| container.id == id));
}

/// More Pods than wait for a look at a time.
#[tokio::test]
async fn a_crowd_of_pods_that_leave_at_once_costs_no_event() {
    const PODS: usize = 600;
    let mut world = World::inside().await;
    let mut all = std::collections::HashSet::new();
    for number in 0..PODS {
        all.insert(world.sandbox(&format!("pod{number}")).await);
    }
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let listen = tokio::spawn(async move {
        while !all.is_empty() {
            let event = events.message().await.unwrap().unwrap();
            if event.container_event_type() == v1::ContainerEventType::ContainerDeletedEvent {
                all.remove(&event.container_id);
            }
        }
    });
    let ids = world.sandboxes(v1::PodSandboxFilter::default()).await;
    let removals = ids.into_iter().map(|pod_sandbox_id| {
        let mut client = world.runtime.clone();
        async move { client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap() }
    });
    futures::future::join_all(removals).await;
    timeout(PATIENCE, listen).await.expect("every removal is told").unwrap();
}

#[tokio::test]
async fn a_listener_is_let_go_when_the_server_ends() {
    let mut world = World::inside().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    // This would never end if the stream did not.
    let _world = world.restarted().await;
    assert!(!matches!(timeout(PATIENCE, events.message()).await, Ok(Ok(Some(_))) | Err(_)));
}
