//! Images for microVMs, from the daemon.

use lambdalet::runtime::ImageStore;
use lambdalet::runtime::microvm::image::{Blocks, Options, Store};
use tempfile::TempDir;

use crate::bench::Bench;
use crate::registry::Registry;

/// A store that may ask the daemon; `None` says why there is none.
async fn store() -> Option<(Store, TempDir)> {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { docker: Some("/var/run/docker.sock".into()), ..Options::default() };
    match Store::open(folder.path(), options).await {
        Ok(store) => Some((store, folder)),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

pub(crate) async fn an_image_of_the_daemon_is_present_and_becomes_a_block_image(bench: &Bench) {
    let Some((store, folder)) = store().await else { return };
    let known = store.image_status(&bench.image_ref).await.unwrap().unwrap();
    let by_docker = bench.runtime.image_status(&bench.image_ref).await.unwrap().unwrap();
    assert_eq!(known, by_docker);
    assert!(store.list_images().await.unwrap().is_empty(), "nothing is copied for a question");
    let block = store.block(&bench.image).await.unwrap();
    let extracted = folder.path().join("extracted");
    let extract = format!("--extract={}", extracted.display());
    let checked = std::process::Command::new("fsck.erofs").arg(extract).arg(&block.path).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    assert_eq!(std::fs::read_to_string(extracted.join("etc/owner")).unwrap(), bench.owner);
    assert_eq!(std::fs::read(extracted.join("bin/busybox")).unwrap(), std::fs::read("/bin/busybox").unwrap());
    assert_eq!(std::fs::read_link(extracted.join("bin/sh")).unwrap().to_str(), Some("busybox"));
    // Once copied it needs the daemon no more.
    bench.runtime.remove_image(&bench.image).await.unwrap();
    assert!(store.image_status(bench.image.as_str()).await.unwrap().is_some());
    drop(block);
    store.remove_image(&bench.image).await.unwrap();
    assert_eq!(store.image_status(&bench.image_ref).await.unwrap(), None);
}

/// By them it is known that a registry has it, so that it may be removed once nobody uses it.
pub(crate) async fn a_block_image_keeps_the_digests_of_its_original(bench: &Bench) {
    let Some((store, _folder)) = store().await else { return };
    let registry = Registry::start(&bench.owner, None).await;
    let id = bench.runtime.pull_image(&format!("{}/team/app:1", registry.host), &[]).await.unwrap();
    drop(store.block(&id).await.unwrap());
    bench.runtime.remove_image(&id).await.unwrap();
    let left = store.list_images().await.unwrap();
    let digest = format!("{}/team/app@{}", registry.host, registry.manifest_digest);
    assert_eq!((left.len(), &left[0].id, &left[0].digests, &left[0].tags), (1, &id, &vec![digest], &Vec::new()));
    store.remove_image(&id).await.unwrap();
    assert!(store.list_images().await.unwrap().is_empty());
}
