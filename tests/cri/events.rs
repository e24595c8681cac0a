//! What our server promises of events besides.

use std::time::Duration;

use lambdalet::runtime::verb::Verb;
use lambdalet::runtime::{Kind, RuntimeError};
use lambdalet_proto::cri::v1;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{PATIENCE, World, map};

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

#[tokio::test]
async fn an_engine_that_does_not_answer_delays_an_event_by_seconds_only() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    // One may go to a look at what was before.
    for _ in 0..3 {
        world.fake().fail_next(Verb::ListContainers, RuntimeError::new(Kind::Unavailable, "not now"));
    }
    world.fake().exit_container(&id.as_str().into(), 3);
    let stopped = async {
        while events.message().await.unwrap().unwrap().container_event_type()
            != v1::ContainerEventType::ContainerStoppedEvent
        {}
    };
    // All is looked at once a minute anyway.
    timeout(Duration::from_secs(20), stopped).await.expect("the event comes");
}

#[tokio::test]
async fn a_listener_that_does_not_keep_up_is_told_so_and_may_listen_again() {
    /// Two events each, of this many bytes: more than wait for a listener, and more than are on their way to it.
    const PODS: usize = 800;
    const LARGE: usize = 16 << 10;
    let mut world = World::inside().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let text = "x".repeat(LARGE);
    // One after the other: what happened is told by the time that the last is made.
    for number in 0..PODS {
        let annotations = map(&[("large", &text)]);
        world.run(v1::PodSandboxConfig { annotations, ..world.config(&format!("pod{number}")) }).await.unwrap();
    }
    let told = async {
        loop {
            if let Err(status) = events.message().await.map(|event| event.expect("it does not end without a word")) {
                return status;
            }
        }
    };
    let status = timeout(PATIENCE, told).await.expect("it is told");
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("lost"), "{status:?}");
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let late = world.sandbox("late").await;
    let heard = async { while events.message().await.unwrap().unwrap().container_id != late {} };
    timeout(PATIENCE, heard).await.expect("the event comes");
}
