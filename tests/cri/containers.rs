//! What is promised of containers.

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, container, map, refused};

async fn list(world: &mut World, filter: v1::ContainerFilter) -> Vec<String> {
    let request = v1::ListContainersRequest { filter: Some(filter) };
    let found = world.runtime.list_containers(request).await.unwrap().into_inner().containers;
    found.into_iter().map(|container| container.id).collect()
}

async fn stop(world: &mut World, id: &str, timeout: i64) {
    world.runtime.stop_container(v1::StopContainerRequest { container_id: id.into(), timeout }).await.unwrap();
}

async fn remove(world: &mut World, id: &str) {
    world.runtime.remove_container(v1::RemoveContainerRequest { container_id: id.into() }).await.unwrap();
}

#[tokio::test]
async fn a_container_is_created_runs_and_ends() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "sleep 50 exit 3").await.unwrap();
    let status = world.status(&id).await.unwrap();
    assert_eq!((status.state(), status.started_at), (v1::ContainerState::ContainerCreated, 0));
    assert_eq!((status.labels, status.annotations), (map(&[("container", "main")]), map(&[("hash", "1")])));
    world.start(&id).await.unwrap();
    let status = world.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);
    assert!(status.image_id.starts_with("sha256:") && status.image.unwrap().image.ends_with("app:1"));
    assert_eq!(status.metadata.unwrap().name, "main");
}

#[tokio::test]
async fn stopping_and_removing_can_be_repeated_and_unknown_is_fine() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    for _ in 0..2 {
        stop(&mut world, &id, 5).await;
    }
    assert_eq!(world.status(&id).await.unwrap().exit_code, 143);
    for _ in 0..2 {
        remove(&mut world, &id).await;
    }
    stop(&mut world, "never-was", 0).await;
    remove(&mut world, "never-was").await;
    assert_eq!(refused(world.status(&id).await), Code::NotFound);
    assert_eq!(std::fs::read_dir(world.root.path().join("root/containers")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_container_that_ignores_the_signal_is_killed_after_its_grace() {
    let mut world = World::new().await;
    let id = world.started("a", "stubborn sleep 60000").await;
    stop(&mut world, &id, 1).await;
    assert_eq!(world.status(&id).await.unwrap().exit_code, 137);
}

#[tokio::test]
async fn a_running_container_can_be_removed() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    remove(&mut world, &id).await;
    assert!(list(&mut world, v1::ContainerFilter::default()).await.is_empty());
}

#[tokio::test]
async fn a_command_that_cannot_run_says_why() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "missing").await.unwrap();
    assert_eq!(refused(world.start(&id).await), Code::InvalidArgument);
    let status = world.status(&id).await.unwrap();
    assert_eq!((status.state(), status.reason.as_str()), (v1::ContainerState::ContainerExited, "StartError"));
    assert!(status.message.contains("not found") && status.exit_code != 0, "{status:?}");
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    assert_eq!(refused(world.create("never-was", "main", "exit 0").await), Code::NotFound);
    let image = Some(v1::ImageSpec { image: "docker.io/library/absent:1".into(), ..Default::default() });
    let config = v1::ContainerConfig { image, ..container("main", "exit 0") };
    assert_eq!(refused(world.create_from(&sandbox, config).await), Code::NotFound);
    assert_eq!(refused(world.start("never-was").await), Code::NotFound);
}

#[tokio::test]
async fn the_same_request_finds_the_same_container_and_another_is_refused() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let first = world.create(&sandbox, "main", "exit 0").await.unwrap();
    assert_eq!(world.create(&sandbox, "main", "exit 0").await.unwrap(), first);
    let other = v1::ContainerConfig { labels: map(&[("x", "y")]), ..container("main", "exit 0") };
    assert_eq!(refused(world.create_from(&sandbox, other).await), Code::AlreadyExists);
}

#[tokio::test]
async fn lists_are_filtered() {
    let mut world = World::new().await;
    let (a, b) = (world.sandbox("a").await, world.sandbox("b").await);
    let of_a = world.create(&a, "one", "exit 0").await.unwrap();
    let of_b = world.create(&b, "two", "sleep 60000").await.unwrap();
    world.start(&of_b).await.unwrap();
    let running = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() };
    let table = [
        (v1::ContainerFilter { pod_sandbox_id: a, ..Default::default() }, &of_a),
        (v1::ContainerFilter { label_selector: map(&[("container", "two")]), ..Default::default() }, &of_b),
        (v1::ContainerFilter { state: Some(running), ..Default::default() }, &of_b),
        (v1::ContainerFilter { id: of_a.clone(), ..Default::default() }, &of_a),
    ];
    for (filter, wanted) in table {
        assert_eq!(list(&mut world, filter.clone()).await, std::slice::from_ref(wanted), "{filter:?}");
    }
}

#[tokio::test]
async fn limits_are_changed_and_told() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let linux = v1::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let request =
        v1::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
    world.runtime.update_container_resources(request.clone()).await.unwrap();
    let limits = world.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!(limits.memory_limit_in_bytes, 64 << 20);
    let unknown = v1::UpdateContainerResourcesRequest { container_id: "never-was".into(), ..request };
    assert_eq!(refused(world.runtime.update_container_resources(unknown).await), Code::NotFound);
}

#[tokio::test]
async fn what_runs_tells_what_it_uses() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::ContainerStatsRequest { container_id: id.clone() };
    let stats = world.runtime.container_stats(request).await.unwrap().into_inner().stats.unwrap();
    assert_eq!(stats.attributes.unwrap().labels, map(&[("container", "main")]));
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let all = world.runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default()).await.unwrap();
    let sandbox = all.into_inner().stats.remove(0);
    assert_eq!(sandbox.attributes.unwrap().metadata, world.config("a").metadata);
    assert_eq!(sandbox.linux.unwrap().containers.len(), 1);
    let metrics =
        world.runtime.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    assert!(!metrics.pod_metrics[0].container_metrics[0].metrics.is_empty());
    let request = v1::ContainerStatsRequest { container_id: "never-was".into() };
    assert_eq!(refused(world.runtime.container_stats(request).await), Code::NotFound);
}

#[tokio::test]
async fn secrets_are_not_kept_beside_the_container() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let folder = std::fs::read_dir(world.root.path().join("root/containers")).unwrap().next().unwrap().unwrap().path();
    let record = std::fs::read(folder.join("record")).unwrap();
    assert!(!record.windows(6).any(|bytes| bytes == b"s3cret") && record.windows(4).any(|bytes| bytes == b"main"));
}
