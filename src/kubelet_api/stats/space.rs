//! File systems and volumes for `/stats/summary`. Directories are walked in the background and remembered for a minute,
//! so that a question never waits for a disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use crate::kubelet_api::targets::{PodTargets, PodVolume};
use crate::node::machine::Extent;
use crate::runtime::ImageStore;
use crate::runtime::disk::Disk;
use crate::runtime::stats::{DiskUsage, SandboxStats};

/// What there is of it at one time. What is not known is `None`.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// The file system of the node's directory.
    pub(super) node: Option<Extent>,
    /// That of images and containers.
    pub(super) images: Option<Extent>,
    /// Bytes that images take there.
    pub(super) image_bytes: Option<u64>,
    /// Volumes by Pod UID; not those that were not measured yet.
    pub(super) volumes: HashMap<String, Vec<VolumeSpace>>,
}

/// One volume.
#[derive(Debug)]
pub(super) struct VolumeSpace {
    pub(super) name: String,
    /// Whether it counts as the Pod's ephemeral storage.
    pub(super) on_disk: bool,
    /// The file system it is on.
    pub(super) around: Extent,
    pub(super) usage: DiskUsage,
}

/// Measures it.
pub(super) struct Surveyor {
    targets: Arc<dyn PodTargets>,
    images: Arc<dyn ImageStore>,
    root_dir: PathBuf,
    disk: Arc<Disk>,
    /// At most one walk is under way.
    walks: Mutex<JoinSet<()>>,
}

impl Surveyor {
    pub(super) fn new(targets: Arc<dyn PodTargets>, images: Arc<dyn ImageStore>, root_dir: PathBuf) -> Self {
        Self { targets, images, root_dir, disk: Arc::default(), walks: Mutex::default() }
    }

    /// With what `sandboxes` hold of volumes.
    pub(super) async fn survey(&self, sandboxes: &[SandboxStats]) -> Space {
        let images = self.images.image_fs_info().await.ok();
        let volumes = self.targets.volumes();
        let paths = volumes.values().flatten().map(|volume| volume.path.clone());
        if let Some(walk) = Disk::walk(&self.disk, paths.collect()) {
            let mut walks = self.walks.lock().unwrap_or_else(PoisonError::into_inner);
            while walks.try_join_next().is_some() {}
            walks.spawn_blocking(walk);
        }
        let measured = |path: &Path| self.disk.usage(path).filter(|_| path.exists());
        let of_pod = |(uid, volumes): (String, Vec<_>)| {
            let volumes = volumes.into_iter().filter_map(|volume: PodVolume| {
                let (usage, around) = (measured(&volume.path)?, Extent::measure(&volume.path).ok()?);
                let usage = usage.with_sandboxes(sandboxes, &volume.path);
                Some(VolumeSpace { name: volume.name, on_disk: volume.on_disk, around, usage })
            });
            (uid, volumes.collect())
        };
        Space {
            node: Extent::measure(&self.root_dir).ok(),
            images: images.as_ref().and_then(|images| Extent::measure(&images.path).ok()),
            image_bytes: images.and_then(|images| images.used),
            volumes: volumes.into_iter().map(of_pod).collect(),
        }
    }
}
