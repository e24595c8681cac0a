//! What our server says of itself.

use lambdalet::runtime::verb::Verb;
use lambdalet::runtime::{Kind, RuntimeError};
use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, refused};

#[tokio::test]
async fn the_runtime_says_what_it_is_and_can() {
    let mut world = World::inside().await;
    let version = world.runtime.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert!(version.runtime_name == "lambdalet" && version.runtime_version.contains("+fake-"), "{version:?}");
    let status = world.runtime.status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(handlers, ["", "fake"]);
    assert!(status.info["config"].contains("podCIDR"));
    let config = world.runtime.runtime_config(v1::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert_eq!(config.linux.unwrap().cgroup_driver(), v1::CgroupDriver::Cgroupfs);
}

#[tokio::test]
async fn an_engine_in_trouble_is_told_with_its_words() {
    let mut world = World::inside().await;
    world.fake().fail_next(Verb::Ready, RuntimeError::new(Kind::Unavailable, "the engine sleeps"));
    let status = world.runtime.status(v1::StatusRequest::default()).await.unwrap().into_inner().status.unwrap();
    assert!(!status.conditions[0].status && status.conditions[0].message.contains("the engine sleeps"));
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::CheckpointContainerRequest { container_id: id, location: "/tmp/x".into(), timeout: 1 };
    assert_eq!(refused(world.runtime.checkpoint_container(request).await), Code::Unimplemented);
}
