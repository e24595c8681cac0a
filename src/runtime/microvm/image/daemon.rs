//! Images that the local Docker daemon has, so that one that was built or loaded there runs in a microVM too.
//!
//! Here a daemon's image is known by the digest of its config, which is what Docker calls its id. (Where Docker keeps its
//! images in containerd's store the id is another, and such an image is refused.)

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use bollard::{API_DEFAULT_VERSION, Docker};
use futures::TryStreamExt;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;

use super::Limits;
use super::archive::{Archive, Kind as EntryKind};
use super::error::LayerError;
use super::layer::{Blob, digest_of};
use crate::runtime::docker::image::described;
use crate::runtime::types::{Image, ImageId};
use crate::runtime::{Kind, Result, RuntimeError, blocking};
use crate::telemetry::chain;

/// Seconds until the daemon must have begun to answer.
const ANSWER_TIMEOUT: u64 = 60;
/// Most files of a saved image: a few per layer.
const MOST_PARTS: usize = 10_000;
/// Most links followed from one of them to the next (older daemons save a layer that occurs twice once).
const MOST_LINKS: usize = 4;

/// The daemon on this host, as a source of images.
#[derive(Clone, Debug)]
pub(super) struct Daemon {
    docker: Docker,
}

/// A saved image's `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    config: String,
    layers: Option<Vec<String>>,
}

/// A file of the archive in which an image was saved.
enum Part {
    File { offset: u64, length: u64 },
    Link(PathBuf),
}

/// An archive's files by name.
type Parts = BTreeMap<PathBuf, Part>;

impl Daemon {
    /// The daemon at this socket; nothing is asked of it yet.
    pub(super) fn at(socket: &Path) -> Result<Self> {
        let docker = Docker::connect_with_unix(&socket.to_string_lossy(), ANSWER_TIMEOUT, API_DEFAULT_VERSION);
        let docker = docker.map_err(|error| {
            RuntimeError::new(Kind::Invalid, format!("{} is no socket of Docker", socket.display())).with_source(error)
        })?;
        Ok(Self { docker })
    }

    /// The image, by name or id. A daemon that does not answer has none.
    pub(super) async fn image(&self, name: &str) -> Option<Image> {
        match self.docker.inspect_image(name).await {
            Ok(image) => Some(described(image)),
            Err(error) => {
                tracing::debug!(image = name, error = chain(&error), "the Docker daemon does not have the image");
                None
            }
        }
    }

    /// Saves the image to a file below `folder`: its config, and where its layers are in there.
    pub(super) async fn save(&self, id: &ImageId, folder: &Path, limits: &Limits) -> Result<(Vec<u8>, Vec<Blob>)> {
        let tried = format!("failed to get image {id} from the Docker daemon");
        let path = folder.join("saved.tar");
        self.copy(id, &path, limits).await.map_err(|error| error.into_runtime(&tried))?;
        let (id, limits) = (id.clone(), *limits);
        blocking(tried, move || saved(&id, &path, &limits).map_err(io::Error::other)).await
    }

    async fn copy(&self, id: &ImageId, path: &Path, limits: &Limits) -> Result<(), CopyError> {
        let mut file = tokio::fs::File::create(path).await?;
        let mut left = limits.unpacked;
        let mut stream = std::pin::pin!(self.docker.export_image(id.as_str()));
        while let Some(bytes) = stream.try_next().await? {
            left = left
                .checked_sub(bytes.len() as u64)
                .ok_or_else(|| io::Error::other(LayerError::TooMuch { what: "bytes", limit: limits.unpacked }))?;
            file.write_all(&bytes).await?;
        }
        Ok(file.flush().await?)
    }
}

/// Why an image could not be copied from the daemon.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("failed to write it")]
    Write(#[from] io::Error),
    #[error("the daemon did not send it")]
    Daemon(#[from] bollard::errors::Error),
}

impl CopyError {
    fn into_runtime(self, tried: &str) -> RuntimeError {
        let kind = match &self {
            Self::Daemon(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => Kind::NotFound,
            Self::Daemon(_) => Kind::Unavailable,
            Self::Write(_) => Kind::Internal,
        };
        RuntimeError::new(kind, tried).with_source(self)
    }
}

/// Config and layers of the image in an archive of `docker save`.
fn saved(id: &ImageId, path: &Path, limits: &Limits) -> Result<(Vec<u8>, Vec<Blob>), LayerError> {
    let file = File::open(path).map_err(LayerError::Read)?;
    let parts = parts(&file)?;
    let manifests = content(&file, &parts, "manifest.json", limits)?;
    let manifests: Vec<Manifest> =
        serde_json::from_slice(&manifests).map_err(|_| LayerError::Malformed("its manifest.json makes no sense"))?;
    for manifest in manifests {
        let config = content(&file, &parts, &manifest.config, limits)?;
        if digest_of(&config) != id.as_str() {
            continue;
        }
        let layers = manifest.layers.unwrap_or_default();
        if layers.len() > limits.layers {
            return Err(LayerError::TooMuch { what: "layers", limit: limits.layers as u64 });
        }
        let blob = |layer: &String| {
            let (offset, length) = find(&parts, layer)?;
            Ok(Blob { path: path.to_owned(), offset, length })
        };
        return Ok((config, layers.iter().map(blob).collect::<Result<_, LayerError>>()?));
    }
    Err(LayerError::Malformed("it holds no image of that id; does Docker keep its images in containerd's store?"))
}

fn parts(mut file: &File) -> Result<Parts, LayerError> {
    let mut parts = Parts::new();
    // Without a buffer: after a header the file stands where its content begins.
    let mut archive = Archive::new(file);
    while let Some(entry) = archive.next()? {
        let name = |bytes: &[u8]| PathBuf::from(String::from_utf8_lossy(bytes).into_owned());
        let part = match entry.kind {
            EntryKind::File => {
                Part::File { offset: file.stream_position().map_err(LayerError::Read)?, length: entry.size }
            }
            EntryKind::Symlink | EntryKind::HardLink => Part::Link(name(&entry.link)),
            _ => continue,
        };
        parts.insert(name(&entry.path), part);
        if parts.len() > MOST_PARTS {
            return Err(LayerError::TooMuch { what: "files", limit: MOST_PARTS as u64 });
        }
    }
    Ok(parts)
}

/// Where the content of a file is.
fn find(parts: &Parts, name: &str) -> Result<(u64, u64), LayerError> {
    let mut name = PathBuf::from(name);
    for _ in 0..=MOST_LINKS {
        match parts.get(&name) {
            Some(Part::File { offset, length }) => return Ok((*offset, *length)),
            Some(Part::Link(target)) => name = beside(&name, target),
            None => break,
        }
    }
    Err(LayerError::Malformed("a file that its manifest.json names is not there"))
}

/// What a link at `name` means, which is a name too and no path on this host.
fn beside(name: &Path, target: &Path) -> PathBuf {
    let mut meant = name.parent().unwrap_or(Path::new("")).to_owned();
    for part in target.components() {
        match part {
            Component::ParentDir => drop(meant.pop()),
            Component::Normal(part) => meant.push(part),
            _ => {}
        }
    }
    meant
}

fn content(mut file: &File, parts: &Parts, name: &str, limits: &Limits) -> Result<Vec<u8>, LayerError> {
    let (offset, length) = find(parts, name)?;
    if length > limits.config {
        return Err(LayerError::TooMuch { what: "bytes in a description", limit: limits.config });
    }
    file.seek(SeekFrom::Start(offset)).map_err(LayerError::Read)?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(LayerError::Read)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        for (name, target) in links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, name, target).unwrap();
        }
        let mut file = builder.into_inner().unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn files_are_found_where_they_are_and_by_way_of_links() {
        let file = archive(
            &[("a/layer.tar", b"first"), ("x.json", b"{}")],
            &[("b/layer.tar", "../a/layer.tar"), ("round", "round")],
        );
        let (parts, limits) = (parts(&file).unwrap(), Limits::default());
        for (name, bytes) in [("a/layer.tar", b"first".as_slice()), ("b/layer.tar", b"first"), ("x.json", b"{}")] {
            assert_eq!(content(&file, &parts, name, &limits).unwrap(), bytes);
        }
        for none in ["round", "absent", "../x.json", ""] {
            assert!(find(&parts, none).is_err(), "{none}");
        }
    }
}
