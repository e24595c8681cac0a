//! What our server promises of images besides, and what only a runtime that can be told to fail shows.

use lambdalet::runtime::verb::Verb;
use lambdalet::runtime::{Kind, RuntimeError};
use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, refused};

fn spec(name: &str) -> Option<v1::ImageSpec> {
    Some(v1::ImageSpec { image: name.into(), ..Default::default() })
}

async fn pull(world: &mut World, name: &str, auth: Option<v1::AuthConfig>) -> Result<String, tonic::Status> {
    let request = v1::PullImageRequest { image: spec(name), auth, sandbox_config: None };
    Ok(world.images.pull_image(request).await?.into_inner().image_ref)
}

async fn status(world: &mut World, name: &str) -> Option<v1::Image> {
    let request = v1::ImageStatusRequest { image: spec(name), verbose: true };
    world.images.image_status(request).await.unwrap().into_inner().image
}

#[tokio::test]
async fn an_image_is_pulled_found_and_removed() {
    let mut world = World::inside().await;
    let id = pull(&mut world, "docker.io/library/busybox:1", None).await.unwrap();
    let found = status(&mut world, "docker.io/library/busybox:1").await.unwrap();
    assert!(found.id == id && found.size > 0 && found.repo_tags == ["docker.io/library/busybox:1"]);
    assert_eq!(status(&mut world, &id).await.map(|image| image.id), Some(id.clone()));
    for _ in 0..2 {
        world.images.remove_image(v1::RemoveImageRequest { image: spec(&id) }).await.unwrap();
    }
    assert_eq!(status(&mut world, &id).await, None, "an image that is not there is no error");
}

#[tokio::test]
async fn an_image_that_holds_sandboxes_is_told_as_pinned_and_goes_if_a_client_insists() {
    let mut world = World::inside().await;
    let id = pull(&mut world, "registry.k8s.io/pause:1", None).await.unwrap();
    assert!(!status(&mut world, &id).await.unwrap().pinned);
    world.fake().pin_image(&id.as_str().into());
    assert!(status(&mut world, &id).await.unwrap().pinned);
    let listed = world.images.list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner().images;
    let pinned: Vec<_> = listed.iter().filter(|image| image.pinned).map(|image| image.id.as_str()).collect();
    assert_eq!(pinned, [id.as_str()]);
    world.images.remove_image(v1::RemoveImageRequest { image: spec(&id) }).await.unwrap();
    assert_eq!(status(&mut world, &id).await, None);
}

#[tokio::test]
async fn failures_of_a_pull_have_their_codes() {
    let mut world = World::inside().await;
    let table = [
        (Kind::NotFound, Code::NotFound),
        (Kind::Unauthorized, Code::Unauthenticated),
        (Kind::Unavailable, Code::Unavailable),
        (Kind::Invalid, Code::InvalidArgument),
    ];
    for (kind, code) in table {
        world.fake().fail_next(Verb::PullImage, RuntimeError::new(kind, "no"));
        assert_eq!(refused(pull(&mut world, "docker.io/library/busybox:1", None).await), code);
    }
    assert_eq!(refused(pull(&mut world, "", None).await), Code::InvalidArgument);
    let token = v1::AuthConfig { identity_token: "t".into(), ..Default::default() };
    assert_eq!(refused(pull(&mut world, "docker.io/library/busybox:1", Some(token)).await), Code::Unimplemented);
}
