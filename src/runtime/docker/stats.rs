//! What sandboxes and containers use, from the kernel's files.
//!
//! Docker is asked for what never changes in a container's life (labels, process, layer), once in each life: a list
//! when this process has started or removed something since the last, an inspect for what is new in it. Between
//! changes no question goes to the daemon; a container that has ended is known by its cgroup being gone.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt, stream};

use super::DockerRuntime;
use super::container::{INSPECTS_IN_FLIGHT, pid, timestamp};
use super::labels;
use super::sandbox::Seen;
use crate::runtime::disk::Disk;
use crate::runtime::running::{Member, Members, collect, pod_cgroup, walk};
use crate::runtime::stats::{ImageFs, SandboxStats, StatsScope};
use crate::runtime::usage::{Trees, Watched};
use crate::runtime::{Result, blocking};

/// What is known for statistics.
#[derive(Debug)]
pub(super) struct Statistics {
    trees: Trees,
    /// Counts what this process started and removed.
    changes: AtomicU64,
    known: Mutex<Known>,
    /// Held while Docker is asked, so that one asks for all.
    asking: tokio::sync::Mutex<()>,
    disk: Arc<Disk>,
    /// Docker's own directory.
    docker_root: PathBuf,
}

#[derive(Debug, Default)]
struct Known {
    /// [`Statistics::changes`] as of the list, if there was one.
    as_of: Option<u64>,
    members: Members,
}

impl Statistics {
    pub(super) fn new(docker_root: PathBuf) -> Self {
        Self {
            trees: Trees::of_host(),
            changes: AtomicU64::new(0),
            known: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
            disk: Arc::default(),
            docker_root,
        }
    }

    /// To be called after each start and removal.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Docker keeps the size of each layer in a file, so nothing has to be walked or asked. Where it keeps none (as
    /// with the snapshots of containerd), only the place is told.
    pub(super) async fn image_fs(&self) -> Result<ImageFs> {
        let path = self.docker_root.clone();
        blocking("failed to read the sizes of image layers".to_owned(), move || {
            Ok(ImageFs { used: layer_bytes(&path.join("image")), path })
        })
        .await
    }

    fn current(&self) -> (Members, bool) {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        (Arc::clone(&known.members), known.as_of == Some(self.changes.load(Ordering::SeqCst)))
    }

    fn remember(&self, as_of: u64, members: Members) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Known { as_of: Some(as_of), members };
    }
}

impl DockerRuntime {
    pub(super) async fn read_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        let members = self.members().await?;
        let (trees, disk) = (self.statistics.trees.clone(), Arc::clone(&self.statistics.disk));
        if let Some(walk) = walk(&members, &self.statistics.disk, scope) {
            self.keepers.spawn(async move {
                // Of a walk that failed nothing is known, which is what is told then.
                let _ = tokio::task::spawn_blocking(walk).await;
            });
        }
        blocking("failed to read statistics".to_owned(), move || Ok(collect(&members, &trees, &disk, scope))).await
    }

    async fn members(&self) -> Result<Members> {
        let (members, current) = self.statistics.current();
        if current {
            return Ok(members);
        }
        let _asking = self.statistics.asking.lock().await;
        let (known, current) = self.statistics.current();
        if current {
            return Ok(known);
        }
        // Noted before the list: what changes meanwhile makes for another one.
        let as_of = self.statistics.changes.load(Ordering::SeqCst);
        let mut ids = self.list_ids(labels::KIND_SANDBOX, &[]).await?;
        ids.extend(self.list_ids(labels::KIND_CONTAINER, &[]).await?);
        let running = ids.into_iter().filter(|listed| listed.may_run).map(|listed| listed.id);
        let members: HashMap<_, _> = stream::iter(running)
            .map(|id| {
                let known = known.get(&id).cloned();
                async move {
                    let member = match known {
                        Some(member) => Some(member),
                        None => self.see(&id).await?.filter(Seen::running).map(|seen| Arc::new(self.member(seen))),
                    };
                    Ok(member.map(|member| (id, member)))
                }
            })
            .buffer_unordered(INSPECTS_IN_FLIGHT)
            .try_filter_map(|member| async move { Ok::<_, crate::runtime::RuntimeError>(member) })
            .try_collect()
            .await?;
        let members = Arc::new(members);
        self.statistics.remember(as_of, Arc::clone(&members));
        Ok(members)
    }

    fn member(&self, seen: Seen) -> Member {
        let id = seen.id().to_owned();
        let Seen { inspect, facts } = seen;
        let state = inspect.state.as_ref();
        Member {
            started_at: timestamp(state.and_then(|state| state.started_at.as_deref())),
            pid: pid(&inspect),
            cgroup: Arc::new(Watched::at(self.cgroups.container(&facts.cgroup, &id))),
            pod_cgroup: pod_cgroup(self.cgroups.relative(&facts.cgroup)),
            // Of the storage drivers in use, only overlay2 keeps what was written in a directory.
            layer: inspect.graph_driver.and_then(|mut driver| driver.data.remove("UpperDir")).map(PathBuf::from),
            log: self.statistics.docker_root.join("containers").join(&id).join("local-logs"),
            facts,
            id,
        }
    }
}

/// Below `images` each storage driver has `layerdb/sha256/<chain id>/size`.
fn layer_bytes(images: &Path) -> Option<u64> {
    let mut sum = None;
    for driver in fs::read_dir(images).ok()?.flatten() {
        for layer in fs::read_dir(driver.path().join("layerdb/sha256")).into_iter().flatten().flatten() {
            let size = fs::read_to_string(layer.path().join("size")).ok();
            if let Some(size) = size.and_then(|text| text.trim().parse::<u64>().ok()) {
                sum = Some(sum.unwrap_or(0) + size);
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_added_up_from_what_docker_notes_of_each() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(layer_bytes(root.path()), None);
        for (layer, size) in [("a", "4096"), ("b", "100\n"), ("half-made", "")] {
            let directory = root.path().join("overlay2/layerdb/sha256").join(layer);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("size"), size).unwrap();
        }
        assert_eq!(layer_bytes(root.path()), Some(4196));
        assert_eq!(layer_bytes(&root.path().join("none")), None);
    }
}
