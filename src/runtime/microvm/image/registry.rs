//! Images from a registry.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{StreamExt, TryStreamExt, stream};
use oci_client::manifest::{OciDescriptor, OciImageManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::fs::File;
use tokio::io::AsyncWrite;

use super::Limits;
use super::layer::Blob;
use crate::runtime::registry::refused;
use crate::runtime::{Kind, Result, RuntimeError};

/// Layers fetched at once for one image.
const FETCHES: usize = 3;

/// What a reference stands for on this platform.
pub(super) struct Resolved {
    pub(super) manifest: OciImageManifest,
    /// Digests by which it can be named: its manifest's, and the index's it was chosen from.
    pub(super) digests: Vec<String>,
    /// Its config, as the manifest wants it.
    pub(super) config: Vec<u8>,
}

/// Asks what the reference stands for, and fetches its config.
///
/// # Errors
/// As [`ImageStore::pull_image`](crate::runtime::ImageStore::pull_image); [`Kind::Internal`] for an image beyond the
/// limits.
pub(super) async fn resolve(
    client: &Client,
    reference: &Reference,
    auth: &RegistryAuth,
    limits: &Limits,
) -> Result<Resolved> {
    let tried = format!("failed to pull image {}", reference.whole());
    let answer = client.pull_image_manifest_and_list_digest(reference, auth).await;
    let (manifest, digest, list) = answer.map_err(|error| refused(&tried, error))?;
    check(&manifest, limits).map_err(|why| RuntimeError::new(Kind::Internal, format!("{tried}: {why}")))?;
    let mut config = Vec::new();
    let capped = Capped { inner: &mut config, left: size(&manifest.config) };
    client.pull_blob(reference, &manifest.config, capped).await.map_err(|error| refused(&tried, error))?;
    Ok(Resolved { manifest, digests: [Some(digest), list].into_iter().flatten().collect(), config })
}

/// Fetches the layers into files below `folder`, each compared with its digest.
pub(super) async fn fetch(
    client: &Client,
    reference: &Reference,
    layers: Vec<OciDescriptor>,
    folder: &Path,
) -> Result<Vec<Blob>> {
    let mut fetches = Vec::new();
    for (at, layer) in layers.into_iter().enumerate() {
        fetches.push(fetch_one(client, reference, layer, folder.join(format!("layer-{at}"))));
    }
    stream::iter(fetches).buffered(FETCHES).try_collect().await
}

async fn fetch_one(client: &Client, reference: &Reference, layer: OciDescriptor, path: PathBuf) -> Result<Blob> {
    let tried = || format!("failed to pull layer {} of image {}", layer.digest, reference.whole());
    let local = |error: io::Error| RuntimeError::new(Kind::Internal, tried()).with_source(error);
    let file = File::create(&path).await.map_err(local)?;
    let capped = Capped { inner: file, left: size(&layer) };
    client.pull_blob(reference, &layer, capped).await.map_err(|error| refused(&tried(), error))?;
    Ok(Blob { path, offset: 0, length: size(&layer) })
}

fn size(blob: &OciDescriptor) -> u64 {
    u64::try_from(blob.size).unwrap_or(0)
}

/// What is too much about an image, by its manifest.
fn check(manifest: &OciImageManifest, limits: &Limits) -> Result<(), String> {
    if size(&manifest.config) > limits.config {
        return Err(format!("its config has {} bytes, at most {} are taken", manifest.config.size, limits.config));
    }
    if manifest.layers.len() > limits.layers {
        return Err(format!("it has {} layers, at most {} are taken", manifest.layers.len(), limits.layers));
    }
    let sum = manifest.layers.iter().fold(0, |sum: u64, layer| sum.saturating_add(size(layer)));
    if sum > limits.compressed {
        return Err(format!("its layers have {sum} bytes, at most {} are taken", limits.compressed));
    }
    Ok(())
}

/// Takes so many bytes and no more: a registry may send more than it said.
struct Capped<W> {
    inner: W,
    left: u64,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Capped<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.len() as u64 > self.left {
            return Poll::Ready(Err(io::Error::other("there is more of it than its manifest says")));
        }
        let written = std::task::ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.left -= written as u64;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
