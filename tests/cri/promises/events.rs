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
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let id = world.started("a", "sleep 60000").await;
    world.stop(&id, 1).await.unwrap();
    world.remove(&id).await.unwrap();
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
async fn the_end_of_a_container_is_told_with_its_code() {
    let mut world = World::new().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let id = world.started("a", "sleep 100 exit 3").await;
    let stopped = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.container_id == id && event.container_event_type() == v1::ContainerEventType::ContainerStoppedEvent
            {
                return event;
            }
        }
    };
    let event = timeout(PATIENCE, stopped).await.expect("the event comes");
    let told = event.containers_statuses.iter().find(|container| container.id == id).expect("it is among them");
    assert_eq!((told.state(), told.exit_code), (v1::ContainerState::ContainerExited, 3));
}

#[tokio::test]
async fn sandboxes_have_events_too() {
    let mut world = World::new().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let id = world.sandbox("a").await;
    let started = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.container_id == id && event.container_event_type() == v1::ContainerEventType::ContainerStartedEvent
            {
                return;
            }
        }
    };
    timeout(PATIENCE, started).await.expect("the event comes");
}
