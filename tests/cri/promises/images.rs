//! What is promised of images.

use lambdalet_proto::cri::v1;

use crate::support::{World, refused};

fn spec(name: &str) -> Option<v1::ImageSpec> {
    Some(v1::ImageSpec { image: name.into(), ..Default::default() })
}

async fn status(world: &mut World, name: &str) -> Option<v1::Image> {
    let request = v1::ImageStatusRequest { image: spec(name), verbose: true };
    world.images.image_status(request).await.unwrap().into_inner().image
}

async fn list(world: &mut World, name: &str) -> Vec<v1::Image> {
    let filter = (!name.is_empty()).then(|| v1::ImageFilter { image: spec(name) });
    world.images.list_images(v1::ListImagesRequest { filter }).await.unwrap().into_inner().images
}

#[tokio::test]
async fn an_image_is_found_by_name_and_by_id() {
    let mut world = World::new().await;
    let name = world.image.clone();
    let found = status(&mut world, &name).await.expect("the image of the tests is there");
    assert!(found.id.starts_with("sha256:") && found.size > 0 && !found.repo_tags.is_empty(), "{found:?}");
    assert_eq!(status(&mut world, &found.id).await.map(|image| image.id), Some(found.id));
}

#[tokio::test]
async fn an_image_that_is_not_there_is_no_error() {
    let mut world = World::new().await;
    assert_eq!(status(&mut world, "docker.io/library/absent:1").await, None);
    for _ in 0..2 {
        let image = spec("docker.io/library/absent:1");
        world.images.remove_image(v1::RemoveImageRequest { image }).await.unwrap();
    }
}

#[tokio::test]
async fn images_are_listed_all_or_by_name() {
    let mut world = World::new().await;
    let name = world.image.clone();
    let found = list(&mut world, &name).await;
    assert_eq!(found.len(), 1);
    assert!(list(&mut world, "").await.iter().any(|image| image.id == found[0].id));
    assert!(list(&mut world, "docker.io/library/absent:1").await.is_empty());
}

#[tokio::test]
async fn a_list_of_images_can_come_as_a_stream() {
    let mut world = World::new().await;
    let filter = Some(v1::ImageFilter { image: spec(&world.image) });
    let mut stream = world.images.stream_images(v1::StreamImagesRequest { filter }).await.unwrap().into_inner();
    let mut all = 0;
    while let Some(part) = stream.message().await.unwrap() {
        all += part.images.len();
    }
    assert_eq!(all, 1);
}

#[tokio::test]
async fn a_pull_that_cannot_be_made_is_refused() {
    let mut world = World::new().await;
    for name in ["", "Not A Name"] {
        let request = v1::PullImageRequest { image: spec(name), ..Default::default() };
        refused(world.images.pull_image(request).await);
    }
}

#[tokio::test]
async fn the_place_of_images_is_told() {
    let mut world = World::new().await;
    if world.is_in_memory() {
        return println!("skipped: images in memory are nowhere");
    }
    let told = world.images.image_fs_info(v1::ImageFsInfoRequest {}).await.unwrap().into_inner();
    let place = &told.image_filesystems[0];
    assert!(place.used_bytes.is_some_and(|used| used.value > 0), "{place:?}");
    assert!(place.fs_id.as_ref().is_some_and(|id| std::path::Path::new(&id.mountpoint).is_dir()), "{place:?}");
}
