//! What our server promises of sandboxes besides, and what only a runtime that can be told to fail shows.

use std::time::Duration;

use lambdalet::runtime::verb::Verb;
use lambdalet::runtime::{Kind, RuntimeError};
use lambdalet_proto::cri::v1;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{PATIENCE, World, refused};

fn records(world: &World) -> usize {
    std::fs::read_dir(world.root().join("root/sandboxes")).unwrap().count()
}

#[tokio::test]
async fn nothing_is_kept_of_what_is_gone() {
    let mut world = World::inside().await;
    let id = world.sandbox("a").await;
    assert_eq!(records(&world), 1);
    world.remove_sandbox(&id).await.unwrap();
    assert_eq!(records(&world), 0);
    // Nobody holds an address, so the range can be another.
    change_range(&mut world, "10.99.0.0/24").await.unwrap();
}

#[tokio::test]
async fn the_same_request_finds_the_same_sandbox_and_another_is_refused() {
    let mut world = World::inside().await;
    let config = world.config("a");
    let first = world.run(config.clone()).await.unwrap();
    assert_eq!(world.run(config.clone()).await.unwrap(), first);
    let other = v1::PodSandboxConfig { labels: world.labels(&[("app", "other")]), ..config };
    assert_eq!(refused(world.run(other).await), Code::AlreadyExists);
    let status = world.sandbox_status(&first).await.unwrap().status.unwrap();
    assert_eq!(status.labels, world.config("a").labels, "the first keeps its own");
}

#[tokio::test]
async fn a_list_can_come_in_parts() {
    let mut world = World::inside().await;
    for number in 0..70 {
        world.sandbox(&format!("pod{number}")).await;
    }
    let request = v1::StreamPodSandboxesRequest { filter: None };
    let mut stream = world.runtime.stream_pod_sandboxes(request).await.unwrap().into_inner();
    let (mut all, mut parts) = (0, 0);
    while let Some(part) = stream.message().await.unwrap() {
        (all, parts) = (all + part.pod_sandboxes.len(), parts + 1);
    }
    assert!(all == 70 && parts > 1, "{all} in {parts}");
}

#[tokio::test]
async fn a_handler_that_is_not_there_is_an_invalid_argument() {
    let mut world = World::inside().await;
    let config = Some(world.config("a"));
    let request = v1::RunPodSandboxRequest { config, runtime_handler: "kata".into() };
    assert_eq!(refused(world.runtime.run_pod_sandbox(request).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_failed_start_leaves_nothing() {
    let mut world = World::inside().await;
    world.fake().fail_next(Verb::RunPodSandbox, RuntimeError::new(Kind::Unavailable, "no engine"));
    let config = world.config("a");
    assert_eq!(refused(world.run(config).await), Code::Unavailable);
    assert!(world.sandboxes(v1::PodSandboxFilter::default()).await.is_empty());
    assert_eq!(records(&world), 0);
    change_range(&mut world, "10.99.0.0/24").await.unwrap();
    let id = world.sandbox("a").await;
    assert!(world.ip(&id).await.starts_with("10.99.0."));
    assert_eq!(refused(change_range(&mut world, "10.98.0.0/24").await), Code::FailedPrecondition);
}

#[tokio::test]
async fn an_engine_that_is_away_when_a_start_fails_keeps_no_address_once_it_is_back() {
    let mut world = World::inside().await;
    let before = world.sandbox("a").await;
    world.remove_sandbox(&before).await.unwrap();
    let away = || RuntimeError::new(Kind::Unavailable, "no engine");
    let mut strange = world.config("a");
    let context = strange.linux.get_or_insert_default().security_context.get_or_insert_default();
    let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), ..Default::default() };
    context.namespace_options.get_or_insert_default().userns_options = Some(users);
    let config = world.config("a");
    let starts = [(config, Code::Unavailable, "10.99.0.0/24"), (strange, Code::Unimplemented, "10.98.0.0/24")];
    for (config, code, range) in starts {
        if code == Code::Unavailable {
            world.fake().fail_next(Verb::RunPodSandbox, away());
        }
        // More than one: a look at what was before may be under way.
        for _ in 0..3 {
            world.fake().fail_next(Verb::ListPodSandboxes, away());
        }
        assert_eq!(refused(world.run(config).await), code);
        assert_eq!(records(&world), 1, "nobody knows what is left of it");
        world.fake().end_events();
        let settled = async {
            while change_range(&mut world, range).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, settled).await.expect("nobody holds an address");
        assert_eq!(records(&world), 0);
    }
}

async fn change_range(world: &mut World, range: &str) -> Result<(), tonic::Status> {
    let network_config = Some(v1::NetworkConfig { pod_cidr: range.into() });
    let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
    world.runtime.update_runtime_config(request).await.map(|_| ())
}
