//! Volumes that show an image (`volumes[].image`): its files, read-only, in a directory that all Pods of the node share.
//!
//! ```text
//! <root>/image-volumes/<digest>                          the files of an image; there only if it is whole
//! <root>/image-volumes/.<number>                         being unpacked
//! <root>/pods/<uid>/volumes/kubernetes.io~image/<name>   a link to the first: this Pod uses it
//! ```
//! A directory goes when its image has gone from the node and no Pod uses it. (The kubelet's documentation promises that
//! nothing in such a volume can be executed. Docker has no such mount, so here it can.)

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

use super::{VolumeError, blocking, component, host_error, places};
use crate::file;
use crate::runtime::types::ImageId;
use crate::runtime::{ImageStore, RuntimeError};
use crate::telemetry::chain;

/// Why a volume does not show its image.
#[derive(Debug, thiserror::Error)]
pub enum ImageVolumeError {
    /// The runtime does not give the image's files.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The host does not take them.
    #[error(transparent)]
    Host(#[from] VolumeError),
}

/// The images that volumes show.
#[derive(Debug)]
pub struct ImageVolumes {
    root: PathBuf,
    /// Images are unpacked one after the other, and removed in between.
    turn: Mutex<()>,
    next: AtomicU64,
}

impl ImageVolumes {
    /// Those of a node with this `--root-dir`.
    pub(super) fn of_root(root: &Path) -> Self {
        Self { root: root.to_owned(), turn: Mutex::default(), next: AtomicU64::new(0) }
    }

    /// The directory with the image's files, unpacked if it is not there; from now on this Pod's volume uses it, until
    /// the Pod's directory is removed.
    ///
    /// # Errors
    /// The runtime cannot give the files, or the host does not take them. It can be tried again.
    pub async fn mount(
        &self,
        store: &dyn ImageStore,
        image: &ImageId,
        (key, volume): (&str, &str),
    ) -> Result<PathBuf, ImageVolumeError> {
        let place = self.place(image)?;
        let link = places::image(&self.root, component(key)?, component(volume)?);
        let _turn = self.turn.lock().await;
        let (target, all) = (place.clone(), self.all());
        let is_there = blocking(move || {
            // The link first: what it names is not removed.
            point(&link, &target).map_err(|source| host_error("make link", &link, source))?;
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&all);
            made.map_err(|source| host_error("make directory", &all, source))?;
            Ok(target.is_dir())
        })
        .await?;
        if is_there {
            return Ok(place);
        }
        let making = self.all().join(format!(".{}", self.next.fetch_add(1, Ordering::Relaxed)));
        // Left by an earlier process, or by a call that was dropped.
        remove(&making).await?;
        let unpacked = store.unpack_image(image, &making).await;
        let from = making.clone();
        let done = match unpacked {
            Ok(()) => {
                let to = place.clone();
                let rename = move || fs::rename(&from, &to).map_err(|source| host_error("rename", &from, source));
                blocking(rename).await.map_err(ImageVolumeError::from)
            }
            Err(error) => Err(error.into()),
        };
        if done.is_err() {
            remove(&making).await?;
        }
        done.map(|()| place)
    }

    /// Whether the path is that of an image's files.
    pub(super) fn holds(&self, path: &Path) -> bool {
        path.starts_with(self.all())
    }

    /// Which of these images are shown by a Pod's volume.
    ///
    /// # Errors
    /// The Pods' directories cannot be read.
    pub async fn used<'a>(&self, images: impl Iterator<Item = &'a ImageId>) -> Result<BTreeSet<ImageId>, VolumeError> {
        let used = self.linked().await?;
        Ok(images.filter(|image| used.contains(name(image))).cloned().collect())
    }

    /// Removes the files of images that are not among these and that no Pod uses.
    ///
    /// # Errors
    /// A directory cannot be read or removed.
    pub async fn prune<'a>(&self, present: impl Iterator<Item = &'a ImageId>) -> Result<(), VolumeError> {
        let present: BTreeSet<String> = present.map(|image| name(image).to_owned()).collect();
        let _turn = self.turn.lock().await;
        let used = self.linked().await?;
        for entry in entries(self.all()).await? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !present.contains(&name) && !used.contains(&name) {
                tracing::info!(image = name, "removing the files of an image that no volume shows any more");
                remove(&entry).await?;
            }
        }
        Ok(())
    }

    /// The names of the directories that Pods use.
    async fn linked(&self) -> Result<BTreeSet<String>, VolumeError> {
        let mut linked = BTreeSet::new();
        for pod in entries(places::pods(&self.root)).await? {
            for link in entries(pod.join(places::IMAGES)).await? {
                if let Ok(target) = fs::read_link(&link) {
                    linked.extend(target.file_name().map(|name| name.to_string_lossy().into_owned()));
                }
            }
        }
        Ok(linked)
    }

    fn all(&self) -> PathBuf {
        self.root.join("image-volumes")
    }

    fn place(&self, image: &ImageId) -> Result<PathBuf, VolumeError> {
        Ok(self.all().join(component(name(image))?))
    }
}

/// What the directory of an image is called.
fn name(image: &ImageId) -> &str {
    image.as_str().trim_start_matches("sha256:")
}

/// Makes the link, or lets it point there.
fn point(link: &Path, target: &Path) -> io::Result<()> {
    if fs::read_link(link).is_ok_and(|there| there == target) {
        return Ok(());
    }
    file::remove(link)?;
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent)?;
    }
    symlink(target, link)
}

/// What is in a directory; nothing if there is none.
async fn entries(directory: PathBuf) -> Result<Vec<PathBuf>, VolumeError> {
    blocking(move || {
        let failed = |source| host_error("read directory", &directory, source);
        match fs::read_dir(&directory) {
            Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect(),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(Vec::new())
            }
            Err(error) => Err(failed(error)),
        }
    })
    .await
}

async fn remove(directory: &Path) -> Result<(), VolumeError> {
    let directory = directory.to_owned();
    blocking(move || match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host_error("remove", &directory, error)),
        _ => Ok(()),
    })
    .await
    .inspect_err(|error| tracing::warn!(error = chain(error), "the files of an image are left behind"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Kind;
    use crate::runtime::fake::FakeRuntime;
    use crate::runtime::verb::Verb;

    async fn pulled(fake: &FakeRuntime, reference: &str) -> ImageId {
        fake.pull_image(reference, &[]).await.unwrap()
    }

    #[tokio::test]
    async fn an_image_is_unpacked_once_and_stays_while_it_is_used_or_present() {
        let (root, fake) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
        let volumes = ImageVolumes::of_root(root.path());
        let image = pulled(&fake, "data:1").await;
        let first = volumes.mount(&fake, &image, ("u1", "v")).await.unwrap();
        let second = volumes.mount(&fake, &image, ("u2", "v")).await.unwrap();
        assert_eq!((&first, fake.calls(Verb::UnpackImage)), (&second, 1));
        assert!(first.join("reference").is_file() && volumes.holds(&first));
        assert_eq!(volumes.used([&image].into_iter()).await.unwrap().len(), 1);
        fs::remove_dir_all(root.path().join("pods/u1")).unwrap();
        volumes.prune(std::iter::empty()).await.unwrap();
        assert!(first.is_dir(), "u2 uses it");
        fs::remove_dir_all(root.path().join("pods/u2")).unwrap();
        volumes.prune([&image].into_iter()).await.unwrap();
        assert!(first.is_dir(), "its image is there");
        volumes.prune(std::iter::empty()).await.unwrap();
        assert!(!first.exists());
        assert!(volumes.used([&image].into_iter()).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_could_not_be_unpacked_leaves_nothing_and_is_tried_again() {
        let (root, fake) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
        let volumes = ImageVolumes::of_root(root.path());
        let image = pulled(&fake, "data:1").await;
        fake.fail_next(Verb::UnpackImage, RuntimeError::new(Kind::Unavailable, "out to lunch"));
        let error = volumes.mount(&fake, &image, ("u1", "v")).await.unwrap_err();
        assert!(error.to_string().contains("out to lunch"), "{error}");
        assert_eq!(fs::read_dir(root.path().join("image-volumes")).unwrap().count(), 0);
        volumes.mount(&fake, &image, ("u1", "v")).await.unwrap();
    }

    #[tokio::test]
    async fn what_an_earlier_process_left_half_done_is_removed() {
        let (root, fake) = (tempfile::tempdir().unwrap(), FakeRuntime::new());
        let volumes = ImageVolumes::of_root(root.path());
        fs::create_dir_all(root.path().join("image-volumes/.0/x")).unwrap();
        fs::create_dir_all(root.path().join("image-volumes/.7")).unwrap();
        let image = pulled(&fake, "data:1").await;
        volumes.mount(&fake, &image, ("u1", "v")).await.unwrap();
        volumes.prune([&image].into_iter()).await.unwrap();
        assert_eq!(fs::read_dir(root.path().join("image-volumes")).unwrap().count(), 1);
    }
}
