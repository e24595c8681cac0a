//! Promises about images.

use lambdalet::runtime::Kind;
use lambdalet::runtime::types::ImageId;

use crate::bench::Bench;

pub(crate) async fn an_image_is_found_by_reference_and_by_id(bench: &Bench) {
    let by_reference = bench.runtime.image_status(&bench.image_ref).await.unwrap().unwrap();
    assert_eq!((&by_reference.id, by_reference.tags.as_slice()), (&bench.image, [bench.image_ref.clone()].as_slice()));
    assert!(by_reference.size > 0);
    let by_id = bench.runtime.image_status(bench.image.as_str()).await.unwrap();
    assert_eq!(by_id.as_ref(), Some(&by_reference));
    assert!(bench.runtime.list_images().await.unwrap().contains(&by_reference));
}

pub(crate) async fn an_absent_image_is_none_and_its_removal_is_fine(bench: &Bench) {
    assert_eq!(bench.runtime.image_status("lambdalet.dev/no-such-image:1").await.unwrap(), None);
    let id = ImageId::from(format!("sha256:{}", "0".repeat(64)));
    assert_eq!(bench.runtime.image_status(id.as_str()).await.unwrap(), None);
    bench.runtime.remove_image(&id).await.unwrap();
    for _ in 0..2 {
        bench.runtime.remove_image(&bench.image).await.unwrap();
        assert_eq!(bench.runtime.image_status(&bench.image_ref).await.unwrap(), None);
    }
}

pub(crate) async fn an_image_in_use_is_not_removed(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", bench.exits(0));
    bench.runtime.create_container(&sandbox, &config).await.unwrap();
    let error = bench.runtime.remove_image(&bench.image).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert!(bench.runtime.image_status(&bench.image_ref).await.unwrap().is_some());
}

pub(crate) async fn a_reference_that_does_not_parse_is_invalid(bench: &Bench) {
    for reference in ["", "UPPER/case", "a:b:c", "two words"] {
        let error = bench.runtime.pull_image(reference, &[]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{reference:?}");
    }
}
