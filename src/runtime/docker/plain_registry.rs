//! Pulls from registries that speak plain HTTP. The daemon refuses them unless its own configuration names them, and
//! may not even reach them; so this process fetches the image and loads it into Docker.

use std::io;
use std::path::{Path, PathBuf};

use bollard::query_parameters::ImportImageOptions;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use oci_client::Reference;
use oci_client::manifest::OciImageManifest;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::DockerRuntime;
use super::failure::failed;
use crate::runtime::registry::{client, credentials, refused};
use crate::runtime::types::{ImageId, RegistryAuth};
use crate::runtime::{Kind, Result, RuntimeError, blocking};

/// Bytes of a block of a tar archive.
const TAR_BLOCK: usize = 512;

/// The name under which an image pulled by digest is kept: Docker keeps digests only of what it pulled itself.
pub(super) fn stand_in(reference: &Reference) -> Option<String> {
    let digest = reference.digest()?.replace(':', "-");
    Some(format!("{}/{}:{digest}", reference.registry(), reference.repository()))
}

/// Fetches the image and loads it into Docker.
pub(super) async fn pull(
    runtime: &DockerRuntime,
    reference: &Reference,
    auth: Option<&RegistryAuth>,
) -> Result<ImageId> {
    let tried = format!("failed to pull image {}", reference.whole());
    let local = |error: io::Error| RuntimeError::new(Kind::Internal, tried.clone()).with_source(error);
    let client = client(&runtime.options.insecure_registries);
    let auth = credentials(auth);
    let refused = |error| refused(&tried, error);
    let (manifest, _, config) = client.pull_manifest_and_config(reference, &auth).await.map_err(refused)?;
    let folder = tempfile::tempdir().map_err(local)?;
    let mut layers = Vec::new();
    for (at, layer) in manifest.layers.iter().enumerate() {
        let path = folder.path().join(at.to_string());
        let mut file = File::create(&path).await.map_err(local)?;
        client.pull_blob(reference, layer, &mut file).await.map_err(refused)?;
        file.flush().await.map_err(local)?;
        layers.push(path);
    }
    load(runtime, &tried, archive(reference, &manifest, config, layers)).await?;
    // A tree of layers may be large: its removal is not for an async thread.
    blocking(format!("{tried}: clean up"), move || folder.close()).await?;
    let gone = || RuntimeError::new(Kind::Internal, format!("{tried}: it is not there after loading"));
    Ok(runtime.inspect_image(&manifest.config.digest).await?.ok_or_else(gone)?.id)
}

async fn load(runtime: &DockerRuntime, tried: &str, entries: Vec<Entry>) -> Result<()> {
    let archive = stream::iter(entries).map(Ok).and_then(Entry::into_tar).try_flatten();
    let end = stream::once(async { Ok(Bytes::from_static(&[0; 2 * TAR_BLOCK])) });
    runtime
        .docker
        .import_image_stream(ImportImageOptions::default(), archive.chain(end), None)
        .try_for_each(|_| async { Ok(()) })
        .await
        .map_err(|error| failed(tried, error))
}

/// One file of the archive that is loaded.
struct Entry {
    name: String,
    content: Content,
}

enum Content {
    Memory(Bytes),
    File(PathBuf),
}

/// The archive's files in Docker's own layout: the image's config, its layers (compressed ones are understood), and
/// `manifest.json`, which names them.
fn archive(reference: &Reference, manifest: &OciImageManifest, config: String, layers: Vec<PathBuf>) -> Vec<Entry> {
    let tag = stand_in(reference).unwrap_or_else(|| {
        format!("{}/{}:{}", reference.registry(), reference.repository(), reference.tag().unwrap_or("latest"))
    });
    let config_name = format!("{}.json", manifest.config.digest.trim_start_matches("sha256:"));
    let layer_name = |at: usize| format!("{at}/layer.tar");
    let index = serde_json::json!([{
        "Config": config_name,
        "RepoTags": [tag],
        "Layers": (0..layers.len()).map(layer_name).collect::<Vec<_>>(),
    }]);
    let memory = |name: &str, text: String| Entry { name: name.into(), content: Content::Memory(text.into()) };
    let mut entries = vec![memory("manifest.json", index.to_string()), memory(&config_name, config)];
    entries.extend(
        layers.into_iter().enumerate().map(|(at, path)| Entry { name: layer_name(at), content: Content::File(path) }),
    );
    entries
}

impl Entry {
    async fn into_tar(self) -> io::Result<BoxStream<'static, io::Result<Bytes>>> {
        let (size, content) = match self.content {
            Content::Memory(bytes) => (bytes.len() as u64, stream::once(async { Ok(bytes) }).boxed()),
            Content::File(path) => open(&path).await?,
        };
        let mut header = tar::Header::new_ustar();
        header.set_path(&self.name)?;
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        let padding = (TAR_BLOCK - (size % TAR_BLOCK as u64) as usize) % TAR_BLOCK;
        let head = stream::once(async move { Ok(Bytes::copy_from_slice(header.as_bytes())) });
        let tail = stream::once(async move { Ok(Bytes::from(vec![0; padding])) });
        Ok(head.chain(content).chain(tail).boxed())
    }
}

async fn open(path: &Path) -> io::Result<(u64, BoxStream<'static, io::Result<Bytes>>)> {
    let file = File::open(path).await?;
    Ok((file.metadata().await?.len(), ReaderStream::new(file).boxed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_archive_streamed_by_hand_reads_as_tar() {
        let folder = tempfile::tempdir().unwrap();
        let layer = folder.path().join("0");
        std::fs::write(&layer, vec![7; 1000]).unwrap();
        let manifest =
            OciImageManifest { config: oci_client::manifest::OciDescriptor::default(), ..OciImageManifest::default() };
        let reference: Reference = "localhost:5000/app:1".parse().unwrap();
        let entries = archive(&reference, &manifest, "{}".into(), vec![layer]);
        let parts = stream::iter(entries).map(Ok).and_then(Entry::into_tar).try_flatten();
        let bytes: Vec<Bytes> = parts.try_collect().await.unwrap();
        let bytes = bytes.concat();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let seen: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.map(|entry| (entry.path().unwrap().display().to_string(), entry.size())).unwrap())
            .collect();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0].0, "manifest.json");
        assert_eq!(seen[2], ("0/layer.tar".to_owned(), 1000));
    }

    #[test]
    fn a_digest_is_kept_as_a_tag() {
        let reference: Reference = format!("r:5000/a@sha256:{}", "b".repeat(64)).parse().unwrap();
        assert_eq!(stand_in(&reference), Some(format!("r:5000/a:sha256-{}", "b".repeat(64))));
        assert_eq!(stand_in(&"r:5000/a:1".parse().unwrap()), None);
    }
}
