//! What is promised of containers.

use std::time::Duration;

use lambdalet_proto::cri::v1;
use tonic::Code;

use super::real::{real, shell, starts};
use crate::support::{PATIENCE, World, map, refused};

#[tokio::test]
async fn a_created_container_does_not_run_yet_and_is_what_it_was_made_from() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "exit 0").await.unwrap();
    let status = world.status(&id).await.unwrap();
    assert_eq!((status.state(), status.started_at), (v1::ContainerState::ContainerCreated, 0));
    assert_eq!((status.labels, status.annotations), (world.labels(&[("container", "main")]), map(&[("hash", "1")])));
    assert_eq!(status.metadata.unwrap().name, "main");
    assert!(status.created_at > 0);
}

#[tokio::test]
async fn a_container_runs_and_its_end_is_told_with_its_code() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 50 exit 3").await;
    let status = world.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);
}

#[tokio::test]
async fn one_that_ends_well_has_completed() {
    let mut world = World::new().await;
    let id = world.started("a", "exit 0").await;
    let status = world.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
}

#[tokio::test]
async fn its_image_is_told_by_id_and_as_it_was_named() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let status = world.status(&id).await.unwrap();
    assert_eq!(status.image.unwrap().image, world.image);
    assert!(status.image_id.starts_with("sha256:") && status.image_ref.contains("sha256:"), "{:?}", status.image_ref);
}

#[tokio::test]
async fn a_container_that_is_stopped_gets_the_signal_first() {
    let mut world = World::new().await;
    let id = world.started("a", "print ready sleep 60000").await;
    world.lines("main.log", 1).await;
    world.stop(&id, 20).await.unwrap();
    assert_eq!(world.status(&id).await.unwrap().exit_code, 143);
}

#[tokio::test]
async fn a_container_that_ignores_the_signal_is_killed_after_its_grace() {
    let mut world = World::new().await;
    let id = world.started("a", "stubborn print ready sleep 60000").await;
    world.lines("main.log", 1).await;
    world.stop(&id, 1).await.unwrap();
    assert_eq!(world.status(&id).await.unwrap().exit_code, 137);
}

#[tokio::test]
async fn stopping_can_be_repeated() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    for _ in 0..2 {
        world.stop(&id, 5).await.unwrap();
    }
    assert_eq!(world.status(&id).await.unwrap().state(), v1::ContainerState::ContainerExited);
}

#[tokio::test]
async fn a_removed_container_is_not_found_and_removing_can_be_repeated() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    world.stop(&id, 0).await.unwrap();
    for _ in 0..2 {
        world.remove(&id).await.unwrap();
    }
    assert_eq!(refused(world.status(&id).await), Code::NotFound);
}

#[tokio::test]
async fn removing_a_container_that_never_was_is_fine() {
    let mut world = World::new().await;
    world.remove("never-was").await.unwrap();
}

#[tokio::test]
async fn stopping_a_container_that_never_was_is_fine() {
    let mut world = World::new().await;
    world.stop("never-was", 0).await.unwrap();
}

#[tokio::test]
async fn a_running_container_can_be_removed() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    world.remove(&id).await.unwrap();
    assert!(world.containers(v1::ContainerFilter::default()).await.is_empty());
}

#[tokio::test]
async fn a_command_that_cannot_run_says_why() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "missing").await.unwrap();
    refused(world.start(&id).await);
    let status = world.status(&id).await.unwrap();
    assert_eq!((status.state(), status.reason.as_str()), (v1::ContainerState::ContainerExited, "StartError"));
    let says = status.message.contains("not found") || status.message.contains("no such file");
    assert!(says && status.exit_code != 0, "{status:?}");
}

#[tokio::test]
async fn a_container_for_a_sandbox_that_is_not_there_is_not_found() {
    let mut world = World::new().await;
    let config = Some(world.container("main", "exit 0"));
    let sandbox_config = Some(world.config("a"));
    let request = v1::CreateContainerRequest { pod_sandbox_id: "never-was".into(), config, sandbox_config };
    assert_eq!(refused(world.runtime.create_container(request).await), Code::NotFound);
}

#[tokio::test]
async fn a_container_of_an_image_that_is_not_there_is_refused() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let image = Some(v1::ImageSpec { image: "docker.io/library/absent:1".into(), ..Default::default() });
    let config = v1::ContainerConfig { image, ..world.container("main", "exit 0") };
    refused(world.create_from(&sandbox, config).await);
}

#[tokio::test]
async fn starting_what_is_not_there_is_not_found() {
    let mut world = World::new().await;
    assert_eq!(refused(world.start("never-was").await), Code::NotFound);
}

#[tokio::test]
async fn a_container_that_has_ended_is_not_started_again() {
    let mut world = World::new().await;
    let id = world.started("a", "exit 0").await;
    world.ended(&id).await;
    refused(world.start(&id).await);
    assert_eq!(world.status(&id).await.unwrap().state(), v1::ContainerState::ContainerExited);
    let log = world.status(&id).await.unwrap().log_path;
    std::fs::remove_file(&log).unwrap();
    refused(world.start(&id).await);
    assert!(!std::path::Path::new(&log).exists(), "a refusal makes no file");
}

#[tokio::test]
async fn the_same_attempt_is_made_once() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let first = world.create(&sandbox, "main", "exit 0").await.unwrap();
    let again = world.create(&sandbox, "main", "exit 0").await;
    assert!(again.as_ref().is_err() || again.as_ref().ok() == Some(&first), "it is found, or refused: {again:?}");
    assert_eq!(world.containers(v1::ContainerFilter::default()).await, [first]);
}

#[tokio::test]
async fn containers_are_listed_by_sandbox_label_state_and_id() {
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
        assert_eq!(world.containers(filter.clone()).await, std::slice::from_ref(wanted), "{filter:?}");
    }
}

#[tokio::test]
async fn a_list_of_containers_can_come_as_a_stream() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let filter = Some(v1::ContainerFilter { id: id.clone(), ..Default::default() });
    let mut stream =
        world.runtime.stream_containers(v1::StreamContainersRequest { filter }).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        all.extend(part.containers.into_iter().map(|container| container.id));
    }
    assert_eq!(all, [id]);
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
}

#[tokio::test]
async fn limits_of_what_is_not_there_are_not_found() {
    let mut world = World::new().await;
    let linux = v1::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: "never-was".into(),
        linux: Some(linux),
        ..Default::default()
    };
    assert_eq!(refused(world.runtime.update_container_resources(request).await), Code::NotFound);
}

#[tokio::test]
async fn a_limit_of_memory_holds() {
    let mut world = World::new().await;
    if world.is_in_memory() {
        return println!("skipped: the runtime in memory has no limits");
    }
    let resources = v1::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() };
    let linux = v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() };
    let fill = "exec dd if=/dev/zero of=/dev/null bs=256M count=1";
    let command = ["sh", "-c", fill].map(str::to_owned).to_vec();
    let config = v1::ContainerConfig { linux: Some(linux), command, ..world.container("main", "exit 0") };
    let sandbox = world.sandbox("a").await;
    let id = world.create_from(&sandbox, config).await.unwrap();
    world.start(&id).await.unwrap();
    let status = world.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
}

#[tokio::test]
async fn a_directory_of_the_host_is_mounted_and_made_if_it_is_not_there() {
    let mut world = World::new().await;
    if world.is_in_memory() {
        return println!("skipped: the runtime in memory mounts nothing");
    }
    let folder = tempfile::tempdir().unwrap();
    let host_path = folder.path().join("made").display().to_string();
    let mounts = vec![v1::Mount { container_path: "/data".into(), host_path, ..Default::default() }];
    let command = ["sh", "-c", "echo kept >/data/file"].map(str::to_owned).to_vec();
    let config = v1::ContainerConfig { mounts, command, ..world.container("main", "exit 0") };
    let sandbox = world.sandbox("a").await;
    let id = world.create_from(&sandbox, config).await.unwrap();
    world.start(&id).await.unwrap();
    world.ended(&id).await;
    assert_eq!(std::fs::read_to_string(folder.path().join("made/file")).unwrap(), "kept\n");
}

#[tokio::test]
async fn containers_of_a_pod_share_its_network() {
    let mut world = World::new().await;
    if world.is_in_memory() {
        return println!("skipped: the runtime in memory has no network");
    }
    let sandbox = world.sandbox("a").await;
    let ip = world.ip(&sandbox).await;
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    world.start(&id).await.unwrap();
    let cmd = ["ip", "-o", "-4", "addr", "show", "eth0"].map(str::to_owned).to_vec();
    let request = v1::ExecSyncRequest { container_id: id, cmd, timeout: 20 };
    let text = String::from_utf8(world.runtime.exec_sync(request).await.unwrap().into_inner().stdout).unwrap();
    assert!(text.contains(&format!("inet {ip}/")), "{text}");
}

#[tokio::test]
async fn what_runs_tells_what_it_uses() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::ContainerStatsRequest { container_id: id };
    let stats = world.runtime.container_stats(request).await.unwrap().into_inner().stats.unwrap();
    assert_eq!(stats.attributes.unwrap().labels, world.labels(&[("container", "main")]));
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
}

#[tokio::test]
async fn statistics_are_listed_by_id() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    world.started("b", "sleep 60000").await;
    let filter = Some(v1::ContainerStatsFilter { id: id.clone(), ..Default::default() });
    let all = world.runtime.list_container_stats(v1::ListContainerStatsRequest { filter }).await.unwrap().into_inner();
    let ids: Vec<_> = all.stats.into_iter().map(|stats| stats.attributes.unwrap().id).collect();
    assert_eq!(ids, [id]);
}

#[tokio::test]
async fn statistics_of_what_is_not_there_are_not_found() {
    let mut world = World::new().await;
    let request = v1::ContainerStatsRequest { container_id: "never-was".into() };
    assert_eq!(refused(world.runtime.container_stats(request).await), Code::NotFound);
}

#[tokio::test]
async fn statistics_can_come_as_a_stream() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let filter = Some(v1::ContainerStatsFilter { id: id.clone(), ..Default::default() });
    let request = v1::StreamContainerStatsRequest { filter };
    let mut stream = world.runtime.stream_container_stats(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        all.extend(part.container_stats.into_iter().map(|stats| stats.attributes.unwrap().id));
    }
    assert_eq!(all, [id]);
}

#[tokio::test]
async fn what_is_written_to_its_root_is_counted() {
    const WRITTEN: u64 = 2 << 20;
    let Some(mut world) = real().await else { return };
    let (sandbox, of_sandbox) = (world.sandbox("a").await, world.config("a"));
    let main = shell(&world, "main", "head -c 2097152 /dev/urandom >/file; echo written; exec sleep 600");
    let container_id = starts(&mut world, (&sandbox, &of_sandbox), main).await;
    world.lines("main.log", 1).await;
    let counted = async {
        loop {
            let request = v1::ContainerStatsRequest { container_id: container_id.clone() };
            let stats = world.runtime.container_stats(request).await.unwrap().into_inner().stats.unwrap();
            let layer = stats.writable_layer.unwrap_or_default();
            if layer.used_bytes.is_some_and(|bytes| bytes.value >= WRITTEN) {
                return layer;
            }
            // It is counted now and then.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let layer = tokio::time::timeout(PATIENCE, counted).await.expect("it is counted some time");
    assert!(layer.inodes_used.is_some_and(|inodes| inodes.value > 0) && layer.timestamp > 0, "{layer:?}");
}
