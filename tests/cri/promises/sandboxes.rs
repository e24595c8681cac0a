//! What is promised of sandboxes.

use std::net::IpAddr;

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, map, refused};

#[tokio::test]
async fn a_sandbox_is_ready_and_has_an_address_and_all_that_it_was_made_from() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    let answer = world.sandbox_status(&id).await.unwrap();
    let status = answer.status.unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
    assert_eq!(status.metadata, world.config("a").metadata);
    assert_eq!((status.labels, status.annotations), (world.config("a").labels, map(&[("note", "kept")])));
    assert!(status.network.unwrap().ip.parse::<IpAddr>().is_ok());
    assert!(status.created_at > 0);
}

#[tokio::test]
async fn a_verbose_status_has_more_and_another_has_not() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    assert!(!world.sandbox_status(&id).await.unwrap().info.is_empty());
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id, verbose: false };
    assert!(world.runtime.pod_sandbox_status(request).await.unwrap().into_inner().info.is_empty());
}

#[tokio::test]
async fn each_pod_has_an_address_of_its_own() {
    let mut world = World::new().await;
    let (a, b) = (world.sandbox("a").await, world.sandbox("b").await);
    assert_ne!(world.ip(&a).await, world.ip(&b).await);
}

#[tokio::test]
async fn a_sandbox_on_the_hosts_network_has_no_address() {
    let mut world = World::new().await;
    let options = v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..Default::default() };
    let context = v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..world.config("a") };
    let id = world.run(config).await.unwrap();
    assert_eq!(world.ip(&id).await, "");
}

#[tokio::test]
async fn a_stopped_sandbox_is_not_ready_and_stopping_can_be_repeated() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    for _ in 0..2 {
        world.stop_sandbox(&id).await.unwrap();
    }
    let status = world.sandbox_status(&id).await.unwrap().status.unwrap();
    assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
    assert_eq!(status.network.unwrap_or_default().ip, "", "a stopped sandbox has no address");
}

#[tokio::test]
async fn stopping_a_sandbox_ends_its_containers() {
    let mut world = World::new().await;
    let container = world.started("a", "stubborn sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.stop_sandbox(&sandbox).await.unwrap();
    assert_eq!(world.status(&container).await.unwrap().state(), v1::ContainerState::ContainerExited);
}

#[tokio::test]
async fn a_removed_sandbox_is_not_found_and_removing_can_be_repeated() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    world.stop_sandbox(&id).await.unwrap();
    for _ in 0..2 {
        world.remove_sandbox(&id).await.unwrap();
    }
    assert_eq!(refused(world.sandbox_status(&id).await), Code::NotFound);
    assert!(world.sandboxes(v1::PodSandboxFilter::default()).await.is_empty());
}

#[tokio::test]
async fn stopping_and_removing_a_sandbox_that_never_was_is_fine() {
    let mut world = World::new().await;
    world.stop_sandbox("never-was").await.unwrap();
    world.remove_sandbox("never-was").await.unwrap();
}

#[tokio::test]
async fn removing_a_sandbox_removes_its_containers_even_if_it_runs() {
    let mut world = World::new().await;
    let container = world.started("a", "sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(refused(world.status(&container).await), Code::NotFound);
}

#[tokio::test]
async fn another_attempt_is_another_sandbox_and_each_keeps_its_own() {
    let mut world = World::new().await;
    let config = world.config("a");
    let first = world.run(config.clone()).await.unwrap();
    world.stop_sandbox(&first).await.unwrap();
    let metadata = config.metadata.map(|metadata| v1::PodSandboxMetadata { attempt: 1, ..metadata });
    let labels = world.labels(&[("app", "other")]);
    let second = world.run(v1::PodSandboxConfig { metadata, labels, ..world.config("a") }).await.unwrap();
    let status = world.sandbox_status(&second).await.unwrap().status.unwrap();
    assert_eq!((status.metadata.unwrap().attempt, status.labels), (1, world.labels(&[("app", "other")])));
    let status = world.sandbox_status(&first).await.unwrap().status.unwrap();
    assert_eq!(status.labels, world.config("a").labels);
}

#[tokio::test]
async fn the_same_attempt_is_made_once() {
    let mut world = World::new().await;
    let config = world.config("a");
    let first = world.run(config.clone()).await.unwrap();
    let again = world.run(config).await;
    assert!(again.as_ref().is_err() || again.as_ref().ok() == Some(&first), "it is found, or refused: {again:?}");
    assert_eq!(world.sandboxes(v1::PodSandboxFilter::default()).await, [first]);
}

#[tokio::test]
async fn sandboxes_are_listed_by_label_state_and_id() {
    let mut world = World::new().await;
    let (a, b) = (world.sandbox("a").await, world.sandbox("b").await);
    world.stop_sandbox(&b).await.unwrap();
    let uid = world.uid("b");
    let by_label = v1::PodSandboxFilter { label_selector: map(&[("app", "a")]), ..Default::default() };
    let by_uid = v1::PodSandboxFilter { label_selector: map(&[("io.kubernetes.pod.uid", &uid)]), ..Default::default() };
    let ready = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady.into() };
    let by_state = v1::PodSandboxFilter { state: Some(ready), ..Default::default() };
    let by_id = v1::PodSandboxFilter { id: b.clone(), ..Default::default() };
    for (filter, wanted) in [(by_label, &a), (by_uid, &b), (by_state, &a), (by_id, &b)] {
        assert_eq!(world.sandboxes(filter.clone()).await, std::slice::from_ref(wanted), "{filter:?}");
    }
    assert_eq!(world.sandboxes(v1::PodSandboxFilter::default()).await.len(), 2);
}

#[tokio::test]
async fn the_beginning_of_an_id_is_enough_for_a_list() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    if world.is_in_memory() {
        return println!("skipped: ids of the runtime in memory are too short");
    }
    let filter = v1::PodSandboxFilter { id: id[..id.len() / 2].to_owned(), ..Default::default() };
    assert_eq!(world.sandboxes(filter).await, [id]);
}

#[tokio::test]
async fn a_list_of_sandboxes_can_come_as_a_stream() {
    let mut world = World::new().await;
    let id = world.sandbox("a").await;
    let filter = Some(v1::PodSandboxFilter { id: id.clone(), ..Default::default() });
    let mut stream =
        world.runtime.stream_pod_sandboxes(v1::StreamPodSandboxesRequest { filter }).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        all.extend(part.pod_sandboxes.into_iter().map(|sandbox| sandbox.id));
    }
    assert_eq!(all, [id]);
}

#[tokio::test]
async fn a_handler_that_is_not_there_is_refused() {
    let mut world = World::new().await;
    let config = Some(world.config("a"));
    let request = v1::RunPodSandboxRequest { config, runtime_handler: "no-such-handler".into() };
    refused(world.runtime.run_pod_sandbox(request).await);
    assert!(world.sandboxes(v1::PodSandboxFilter::default()).await.is_empty(), "nothing is left of it");
}

#[tokio::test]
async fn a_sandbox_without_metadata_is_refused() {
    let mut world = World::new().await;
    let config = v1::PodSandboxConfig { metadata: None, ..world.config("a") };
    refused(world.run(config).await);
}

#[tokio::test]
async fn names_and_dns_are_as_the_config_says() {
    let mut world = World::new().await;
    let dns = v1::DnsConfig { servers: vec!["10.96.0.10".into()], searches: vec!["a.b".into()], ..Default::default() };
    let config = v1::PodSandboxConfig { hostname: "a-name".into(), dns_config: Some(dns), ..world.config("a") };
    if world.is_in_memory() {
        return println!("skipped: the runtime in memory has no files");
    }
    let sandbox = world.run(config).await.unwrap();
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    world.start(&id).await.unwrap();
    let cmd = ["sh", "-c", "hostname; cat /etc/resolv.conf"].map(str::to_owned).to_vec();
    let request = v1::ExecSyncRequest { container_id: id, cmd, timeout: 20 };
    let text = String::from_utf8(world.runtime.exec_sync(request).await.unwrap().into_inner().stdout).unwrap();
    assert!(
        text.starts_with("a-name\n") && text.contains("nameserver 10.96.0.10") && text.contains("search a.b"),
        "{text}"
    );
}

#[tokio::test]
async fn a_ready_sandbox_tells_what_it_uses() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let filter = v1::PodSandboxStatsFilter { label_selector: world.labels(&[]), ..Default::default() };
    let request = v1::ListPodSandboxStatsRequest { filter: Some(filter) };
    let mut all = world.runtime.list_pod_sandbox_stats(request).await.unwrap().into_inner().stats;
    assert_eq!(all.len(), 1);
    let sandbox = all.remove(0);
    assert_eq!(sandbox.attributes.unwrap().metadata, world.config("a").metadata);
    assert_eq!(sandbox.linux.unwrap().containers.len(), 1);
}

#[tokio::test]
async fn metrics_of_sandboxes_are_listed() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let all = world.runtime.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    let found = all.pod_metrics.iter().find(|pod| pod.pod_sandbox_id == sandbox).expect("the sandbox is among them");
    assert!(!found.container_metrics[0].metrics.is_empty());
}

#[tokio::test]
async fn two_attempts_that_run_at_once_have_an_address_each() {
    let mut world = World::new().await;
    let first = world.sandbox("a").await;
    let config = world.config("a");
    let metadata = config.metadata.clone().map(|metadata| v1::PodSandboxMetadata { attempt: 1, ..metadata });
    let second = world.run(v1::PodSandboxConfig { metadata, ..config }).await.unwrap();
    let address = world.ip(&second).await;
    assert!(!address.is_empty() && world.ip(&first).await != address, "{address}");
    world.stop_sandbox(&first).await.unwrap();
    assert_eq!(world.ip(&second).await, address);
}

#[tokio::test]
async fn a_label_is_only_a_label() {
    let mut world = World::new().await;
    let labels = world.labels(&[("io.kubernetes.pod.uid", "another")]);
    let id = world.run(v1::PodSandboxConfig { labels: labels.clone(), ..world.config("a") }).await.unwrap();
    let container = v1::ContainerConfig { labels, ..world.container("main", "exit 0") };
    let container = world.create_from(&id, container).await.unwrap();
    let label_selector = map(&[("io.kubernetes.pod.uid", "another")]);
    let filter = v1::PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() };
    assert_eq!(world.sandboxes(filter).await, [id]);
    let filter = v1::ContainerFilter { label_selector, ..Default::default() };
    assert_eq!(world.containers(filter).await, [container]);
}

#[tokio::test]
async fn limits_of_a_sandbox_can_be_changed() {
    let mut world = World::new().await;
    let pod_sandbox_id = world.sandbox("a").await;
    let limits = v1::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let request =
        v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id, resources: Some(limits), ..Default::default() };
    world.runtime.update_pod_sandbox_resources(request.clone()).await.unwrap();
    let unknown = v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id: "never-was".into(), ..request };
    assert_eq!(refused(world.runtime.update_pod_sandbox_resources(unknown).await), Code::NotFound);
}

#[tokio::test]
async fn one_sandbox_tells_what_it_uses() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let pod_sandbox_id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod_sandbox_id.clone() };
    let stats = world.runtime.pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap();
    assert_eq!(stats.attributes.unwrap().id, pod_sandbox_id);
    assert_eq!(stats.linux.unwrap().containers.len(), 1);
}

#[tokio::test]
async fn what_a_sandbox_uses_that_is_not_there_is_not_found() {
    let mut world = World::new().await;
    let unknown = v1::PodSandboxStatsRequest { pod_sandbox_id: "never-was".into() };
    assert_eq!(refused(world.runtime.pod_sandbox_stats(unknown).await), Code::NotFound);
}

#[tokio::test]
async fn what_sandboxes_use_can_come_as_a_stream() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let filter = Some(v1::PodSandboxStatsFilter { id: id.clone(), ..Default::default() });
    let request = v1::StreamPodSandboxStatsRequest { filter };
    let mut stream = world.runtime.stream_pod_sandbox_stats(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        all.extend(part.pod_sandbox_stats.into_iter().map(|stats| stats.attributes.unwrap().id));
    }
    assert_eq!(all, [id]);
}

#[tokio::test]
async fn metrics_of_sandboxes_can_come_as_a_stream() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let request = v1::StreamPodSandboxMetricsRequest {};
    let mut stream = world.runtime.stream_pod_sandbox_metrics(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        all.extend(part.pod_sandbox_metrics.into_iter().map(|metrics| metrics.pod_sandbox_id));
    }
    assert!(all.contains(&id), "{all:?}");
}
