//! What is promised of events.

use lambdalet_proto::cri::v1;
use tokio::time::timeout;

use crate::support::{PATIENCE, World};

#[tokio::test]
async fn the_life_of_a_container_is_told_in_order_and_once() {
    use v1::ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    let mut world = World::new().await;
    // What is there before somebody listens is no news.
    world.sandbox("before").await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let id = world.started("a", "sleep 60000").await;
    world.runtime.stop_container(v1::StopContainerRequest { container_id: id.clone(), timeout: 1 }).await.unwrap();
    world.runtime.remove_container(v1::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
    let mut seen = Vec::new();
    let all = async {
        while seen.last() != Some(&ContainerDeletedEvent) {
            let event = events.message().await.unwrap().unwrap();
            if event.container_id == id {
                seen.push(event.container_event_type());
                let sandbox = event.pod_sandbox_status.expect("an event has its sandbox");
                assert_eq!(sandbox.metadata, world.config("a").metadata);
            }
        }
    };
    timeout(PATIENCE, all).await.expect("the events come");
    assert_eq!(seen, [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent]);
}

#[tokio::test]
async fn an_engine_that_goes_away_and_comes_back_costs_no_event() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    world.fake.end_events();
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

#[tokio::test]
async fn a_listener_is_let_go_when_the_server_ends() {
    let mut world = World::new().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    // This would never end if the stream did not.
    let _world = world.restarted().await;
    assert!(!matches!(timeout(PATIENCE, events.message()).await, Ok(Ok(Some(_))) | Err(_)));
}
