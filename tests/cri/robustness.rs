//! The runtime itself, and clients that are many, gone, or ask for what is not there.

use std::os::unix::fs::PermissionsExt as _;

use lambdalet::runtime::verb::Verb;
use lambdalet::runtime::{Kind, RuntimeError};
use lambdalet_proto::cri::v1;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{PATIENCE, World, refused};

#[tokio::test]
async fn the_runtime_says_what_it_is_and_can() {
    let mut world = World::new().await;
    let version = world.runtime.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("lambdalet", "v1"));
    let status = world.runtime.status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    assert_eq!(
        conditions.iter().map(|about| about.r#type.as_str()).collect::<Vec<_>>(),
        ["RuntimeReady", "NetworkReady"]
    );
    assert!(conditions.iter().all(|about| about.status), "{conditions:?}");
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(handlers, ["", "fake"]);
    assert!(status.info["config"].contains("podCIDR"));
    let config = world.runtime.runtime_config(v1::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver(), v1::CgroupDriver::Cgroupfs);
    let described = world.runtime.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}).await.unwrap();
    assert!(!described.into_inner().descriptors.is_empty());
}

#[tokio::test]
async fn an_engine_in_trouble_is_told_with_its_words() {
    let mut world = World::new().await;
    world.fake.fail_next(Verb::Ready, RuntimeError::new(Kind::Unavailable, "the engine sleeps"));
    let status = world.runtime.status(v1::StatusRequest::default()).await.unwrap().into_inner().status.unwrap();
    assert!(!status.conditions[0].status && status.conditions[0].message.contains("the engine sleeps"));
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::CheckpointContainerRequest { container_id: id, location: "/tmp/x".into(), timeout: 1 };
    assert_eq!(refused(world.runtime.checkpoint_container(request).await), Code::Unimplemented);
}

#[tokio::test]
async fn only_the_owner_of_the_socket_may_connect() {
    let world = World::new().await;
    let mode = std::fs::metadata(world.root.path().join("cri.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_thousand_calls_at_once_are_all_answered() {
    let mut world = World::new().await;
    world.started("a", "sleep 60000").await;
    let calls = (0..1000).map(|_| {
        let mut client = world.runtime.clone();
        async move {
            client.list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner().containers.len()
        }
    });
    let answers = timeout(PATIENCE, futures::future::join_all(calls)).await.expect("all are answered");
    assert!(answers.len() == 1000 && answers.iter().all(|found| *found == 1));
}

#[tokio::test]
async fn a_large_request_is_taken_and_one_too_large_is_refused() {
    let mut world = World::new().await;
    let with = |bytes: usize| {
        let annotations = crate::support::map(&[("large", &"x".repeat(bytes))]);
        v1::PodSandboxConfig { annotations, ..world.config(&format!("p{bytes}")) }
    };
    let (large, too_large) = (with(15 << 20), with(17 << 20));
    let id = world.run(large).await.unwrap();
    let status = world.sandbox_status(&id).await.unwrap().status.unwrap();
    assert_eq!(status.annotations["large"].len(), 15 << 20);
    // Which code it is depends on whether the client is still sending when it is answered.
    assert!(world.run(too_large).await.is_err());
    world.sandbox("after").await;
}

#[tokio::test]
async fn a_client_that_leaves_half_way_finds_a_whole_sandbox_later() {
    let mut world = World::new().await;
    let hold = world.fake.hang_next(Verb::RunPodSandbox);
    let (mut client, config) = (world.runtime.clone(), world.config("a"));
    let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
    let call = tokio::spawn(async move { client.run_pod_sandbox(request).await.map(|_| ()) });
    let begun = async {
        while world.fake.calls(Verb::RunPodSandbox) == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("it begins");
    call.abort();
    assert!(call.await.is_err());
    drop(hold);
    let found = async {
        loop {
            let list = world.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner();
            if let Some(sandbox) = list.items.into_iter().next() {
                return sandbox;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let sandbox = timeout(PATIENCE, found).await.expect("it is there");
    assert_eq!(sandbox.labels, world.config("a").labels);
}

#[tokio::test]
async fn a_restart_finds_everything_again() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let sandbox =
        world.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    let before = (world.sandbox_status(&sandbox[0].id).await.unwrap().status, world.status(&id).await.unwrap());
    let mut world = world.restarted().await;
    let after = (world.sandbox_status(&sandbox[0].id).await.unwrap().status, world.status(&id).await.unwrap());
    assert_eq!(before, after);
    let mut ips = vec![after.0.unwrap().network.unwrap().ip];
    let other = world.sandbox("b").await;
    ips.push(world.sandbox_status(&other).await.unwrap().status.unwrap().network.unwrap().ip);
    assert_ne!(ips[0], ips[1], "an address is not given twice");
}
