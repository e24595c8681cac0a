//! What is promised of sandboxes.

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, map, refused};

async fn list(world: &mut World, filter: v1::PodSandboxFilter) -> Vec<String> {
    let request = v1::ListPodSandboxRequest { filter: Some(filter) };
    let items = world.runtime.list_pod_sandbox(request).await.unwrap().into_inner().items;
    let mut ids: Vec<_> = items.into_iter().map(|sandbox| sandbox.id).collect();
    ids.sort();
    ids
}

async fn stop(world: &mut World, id: &str) {
    world.runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.unwrap();
}

async fn remove(world: &mut World, id: &str) {
    world.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_is_ready_and_has_an_address_and_all_that_it_was_made_from() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    let answer = world.sandbox_status(&id).await.unwrap();
    let status = answer.status.unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(status.metadata, world.config("a").metadata);
    assert_eq!((status.labels, status.annotations), (world.config("a").labels, map(&[("note", "kept")])));
    assert!(status.network.unwrap().ip.starts_with("10.188.0."));
    assert!(status.created_at > 0 && answer.timestamp > 0 && answer.info.contains_key("info"));
}

#[tokio::test]
async fn each_pod_has_an_address_of_its_own_and_the_hosts_network_none() {
    let mut world = World::new().await;
    let (a, b) = (world.sandbox("a").await, world.sandbox("b").await);
    let options = v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..Default::default() };
    let context = v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let host = v1::PodSandboxConfig { linux: Some(linux), ..world.config("c") };
    let c = world.run(host).await.unwrap();
    let mut ips = Vec::new();
    for id in [a, b, c] {
        ips.push(world.sandbox_status(&id).await.unwrap().status.unwrap().network.unwrap().ip);
    }
    assert!(ips[0] != ips[1] && !ips[0].is_empty() && ips[2].is_empty(), "{ips:?}");
}

#[tokio::test]
async fn stopping_and_removing_can_be_repeated_and_unknown_is_fine() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    for _ in 0..2 {
        stop(&mut world, &id).await;
    }
    let status = world.sandbox_status(&id).await.unwrap().status.unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
    assert_eq!(status.network.unwrap().ip, "", "a stopped sandbox has no address");
    for _ in 0..2 {
        remove(&mut world, &id).await;
    }
    stop(&mut world, "never-was").await;
    remove(&mut world, "never-was").await;
    assert_eq!(refused(world.sandbox_status(&id).await), Code::NotFound);
    let left = std::fs::read_dir(world.root.path().join("root/sandboxes")).unwrap().count();
    assert_eq!(left, 0, "nothing is kept of what is gone");
}

#[tokio::test]
async fn removing_a_sandbox_removes_its_containers() {
    let mut world = World::new().await;
    let container = world.started("a", "sleep 60000").await;
    let sandbox = list(&mut world, v1::PodSandboxFilter::default()).await.remove(0);
    remove(&mut world, &sandbox).await;
    assert_eq!(refused(world.status(&container).await), Code::NotFound);
}

#[tokio::test]
async fn the_same_request_finds_the_same_sandbox_and_another_is_refused() {
    let mut world = World::new().await;
    let config = world.config("a");
    let first = world.run(config.clone()).await.unwrap();
    assert_eq!(world.run(config.clone()).await.unwrap(), first);
    let other = v1::PodSandboxConfig { labels: map(&[("app", "other")]), ..config.clone() };
    assert_eq!(refused(world.run(other.clone()).await), Code::AlreadyExists);
    let metadata = config.metadata.map(|metadata| v1::PodSandboxMetadata { attempt: 1, ..metadata });
    let second = world.run(v1::PodSandboxConfig { metadata, ..other }).await.unwrap();
    let status = world.sandbox_status(&second).await.unwrap().status.unwrap();
    assert_eq!((status.metadata.unwrap().attempt, status.labels), (1, map(&[("app", "other")])));
    let status = world.sandbox_status(&first).await.unwrap().status.unwrap();
    assert_eq!(status.labels, world.config("a").labels, "the first keeps its own");
}

#[tokio::test]
async fn lists_are_filtered() {
    let mut world = World::new().await;
    let (a, b) = (world.sandbox("a").await, world.sandbox("b").await);
    stop(&mut world, &b).await;
    let by_label = v1::PodSandboxFilter { label_selector: map(&[("app", "a")]), ..Default::default() };
    let by_uid = v1::PodSandboxFilter { label_selector: map(&[("io.kubernetes.pod.uid", "b")]), ..Default::default() };
    let ready = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady.into() };
    let by_state = v1::PodSandboxFilter { state: Some(ready), ..Default::default() };
    let by_id = v1::PodSandboxFilter { id: b.clone(), ..Default::default() };
    assert_eq!(list(&mut world, by_label).await, std::slice::from_ref(&a));
    assert_eq!(list(&mut world, by_uid).await, std::slice::from_ref(&b));
    assert_eq!(list(&mut world, by_state).await, std::slice::from_ref(&a));
    assert_eq!(list(&mut world, by_id).await, std::slice::from_ref(&b));
    assert_eq!(list(&mut world, v1::PodSandboxFilter::default()).await.len(), 2);
}

#[tokio::test]
async fn a_list_can_come_in_parts() {
    let mut world = World::new().await;
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
async fn a_handler_that_is_not_there_is_refused_and_one_that_is_there_is_told() {
    let mut world = World::new().await;
    let config = world.config("a");
    let request =
        |handler: &str| v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
    assert_eq!(refused(world.runtime.run_pod_sandbox(request("kata")).await), Code::InvalidArgument);
    let id = world.runtime.run_pod_sandbox(request("fake")).await.unwrap().into_inner().pod_sandbox_id;
    assert_eq!(world.sandbox_status(&id).await.unwrap().status.unwrap().runtime_handler, "fake");
}

#[tokio::test]
async fn a_failed_start_leaves_nothing() {
    use lambdalet::runtime::verb::Verb;
    use lambdalet::runtime::{Kind, RuntimeError};
    let mut world = World::new().await;
    world.fake.fail_next(Verb::RunPodSandbox, RuntimeError::new(Kind::Unavailable, "no engine"));
    let config = world.config("a");
    assert_eq!(refused(world.run(config).await), Code::Unavailable);
    assert!(list(&mut world, v1::PodSandboxFilter::default()).await.is_empty());
    assert_eq!(std::fs::read_dir(world.root.path().join("root/sandboxes")).unwrap().count(), 0);
    // Nobody holds an address, so the range can be another.
    change_range(&mut world, "10.99.0.0/24").await.unwrap();
    let id = world.sandbox("a").await;
    assert!(world.sandbox_status(&id).await.unwrap().status.unwrap().network.unwrap().ip.starts_with("10.99.0."));
    assert_eq!(refused(change_range(&mut world, "10.98.0.0/24").await), Code::FailedPrecondition);
}

async fn change_range(world: &mut World, range: &str) -> Result<(), tonic::Status> {
    let network_config = Some(v1::NetworkConfig { pod_cidr: range.into() });
    let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
    world.runtime.update_runtime_config(request).await.map(|_| ())
}
