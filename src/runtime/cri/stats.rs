//! What sandboxes and containers use, from the kernel's files. The runtime is asked what runs, with two calls, and where
//! each is, once in its life.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use lambdalet_proto::cri::v1;

use super::CriRuntime;
use super::client::ask;
use super::info::writable_layer;
use super::sandbox::CALLS_IN_FLIGHT;
use crate::runtime::labels::Facts;
use crate::runtime::running::{Member, collect, walk};
use crate::runtime::stats::{ImageFs, SandboxStats, StatsScope};
use crate::runtime::{Kind, Result, RuntimeError, blocking};

impl CriRuntime {
    pub(super) async fn read_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        let members = self.members(scope).await?;
        if let Some(walk) = walk(&members, &self.disk, scope) {
            self.options.keepers.spawn(async move {
                // Of a walk that failed nothing is known, which is what is told then.
                let _ = tokio::task::spawn_blocking(walk).await;
            });
        }
        let (trees, disk, members) = (self.trees.clone(), Arc::clone(&self.disk), Arc::new(members));
        blocking("failed to read statistics".to_owned(), move || Ok(collect(&members, &trees, &disk, scope))).await
    }

    /// All that runs.
    async fn members(&self, scope: StatsScope) -> Result<HashMap<String, Arc<Member>>> {
        let (sandboxes, containers) = futures::try_join!(self.see_sandboxes(&[]), self.see_containers(&[]))?;
        let ready = sandboxes.into_iter().filter(|seen| seen.ready).map(|seen| (seen.id, seen.facts));
        let running = containers.into_iter().filter(|listed| listed.running).map(|listed| (listed.id, listed.facts));
        let running: Vec<_> = ready.chain(running).collect();
        self.places.keep(&running.iter().map(|(id, _)| id.as_str()).collect::<HashSet<_>>());
        let members = running.into_iter().map(|(id, facts)| self.member(id, facts, scope));
        let members = stream::iter(members).buffer_unordered(CALLS_IN_FLIGHT);
        members
            .try_filter_map(|member| async move { Ok(member.map(|member| (member.id.clone(), Arc::new(member)))) })
            .try_collect()
            .await
    }

    /// `None` for what has ended since.
    async fn member(&self, id: String, facts: Facts, scope: StatsScope) -> Result<Option<Member>> {
        let place = match facts.sandbox_itself {
            true => self.sandbox_place(&id).await?,
            false => self.place(&id).await?,
        };
        let Some(place) = place else { return Ok(None) };
        let layer =
            (scope > StatsScope::CpuAndMemory && !facts.sandbox_itself).then(|| writable_layer(place.pid)).flatten();
        let log = self.logs.of_container(&facts.pod.uid, &facts.container, facts.attempt);
        Ok(Some(Member {
            started_at: place.started_at,
            pid: Some(place.pid),
            cgroup: Arc::clone(&place.cgroup),
            pod_cgroup: place.pod_cgroup.clone(),
            layer,
            log: log.parent().unwrap_or(&log).to_owned(),
            facts,
            id,
        }))
    }

    pub(super) async fn image_fs(&self) -> Result<ImageFs> {
        let request = v1::ImageFsInfoRequest {};
        let tried = || "failed to ask for the file system of images".to_owned();
        let answer = ask!(self.client.images, image_fs_info(request), tried).await?;
        let first = answer.image_filesystems.into_iter().next();
        let first =
            first.ok_or_else(|| RuntimeError::new(Kind::Unsupported, "the runtime tells of no image file system"))?;
        let path = first.fs_id.unwrap_or_default().mountpoint.into();
        Ok(ImageFs { path, used: first.used_bytes.map(|used| used.value) })
    }
}
