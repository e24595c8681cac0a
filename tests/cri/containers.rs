//! What our server promises of containers besides.

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, refused};

fn records(world: &World) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(world.root().join("root/containers")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn the_same_request_finds_the_same_container_and_another_is_refused() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let first = world.create(&sandbox, "main", "exit 0").await.unwrap();
    assert_eq!(world.create(&sandbox, "main", "exit 0").await.unwrap(), first);
    let other = v1::ContainerConfig { labels: world.labels(&[("x", "y")]), ..world.container("main", "exit 0") };
    assert_eq!(refused(world.create_from(&sandbox, other).await), Code::AlreadyExists);
}

#[tokio::test]
async fn what_cannot_be_started_has_a_code_of_its_own() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "missing").await.unwrap();
    assert_eq!(refused(world.start(&id).await), Code::InvalidArgument);
    let image = Some(v1::ImageSpec { image: "docker.io/library/absent:1".into(), ..Default::default() });
    let config = v1::ContainerConfig { image, ..world.container("other", "exit 0") };
    assert_eq!(refused(world.create_from(&sandbox, config).await), Code::NotFound);
}

#[tokio::test]
async fn secrets_are_not_kept_beside_the_container_and_nothing_of_what_is_gone() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let record = std::fs::read(records(&world)[0].join("record")).unwrap();
    assert!(!record.windows(6).any(|bytes| bytes == b"s3cret") && record.windows(4).any(|bytes| bytes == b"main"));
    world.remove(&id).await.unwrap();
    assert!(records(&world).is_empty());
}
