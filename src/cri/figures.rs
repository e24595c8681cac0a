//! The verbs that tell what is used.

use lambdalet_proto::cri::v1;
use tonic::{Code, Status};

use super::core::Core;
use super::failure::status;
use super::shelf::Key;
use super::{filter, stats};
use crate::runtime::RuntimeError;
use crate::runtime::stats::{SandboxStats, StatsScope};

impl Core {
    async fn figures(&self, scope: StatsScope) -> Result<Vec<SandboxStats>, Status> {
        self.adopted().await?;
        Ok(self.runtime.list_pod_sandbox_stats(scope).await?)
    }

    /// Where writable layers are: with the images. An engine does not move them while it is served.
    async fn mountpoint(&self) -> &str {
        let path =
            async || Ok::<_, RuntimeError>(self.runtime.image_fs_info().await?.path.to_string_lossy().into_owned());
        self.mountpoint.get_or_try_init(path).await.map_or("", String::as_str)
    }

    fn told(&self, sandbox: &SandboxStats, mountpoint: &str) -> Vec<v1::ContainerStats> {
        let kept = |name: &str, attempt: u32| {
            self.containers.of(&Key { uid: sandbox.pod.uid.clone(), container: name.to_owned(), attempt })
        };
        let containers = sandbox.containers.iter();
        containers.map(|one| stats::container(one, kept(&one.name, one.attempt).as_deref(), mountpoint)).collect()
    }

    /// What the containers use that a client wants; only running ones use anything.
    pub(super) async fn list_container_stats(
        &self,
        wanted: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, Status> {
        let figures = self.figures(StatsScope::Containers).await?;
        let mountpoint = self.mountpoint().await;
        let wanted = wanted.map(|filter| v1::ContainerStatsFilter {
            id: self.containers.id(&filter.id),
            pod_sandbox_id: self.sandboxes.id(&filter.pod_sandbox_id),
            ..filter
        });
        let mut all = Vec::new();
        for sandbox in &figures {
            let told = self.told(sandbox, mountpoint).into_iter();
            all.extend(told.filter(|one| filter::container_stats(one, sandbox.id.as_str(), wanted.as_ref())));
        }
        Ok(all)
    }

    /// What one container uses; of one that does not run only whose it is.
    pub(super) async fn container_stats(&self, asked: &str) -> Result<v1::ContainerStats, Status> {
        let id = self.container_id(asked).to_string();
        let filter = v1::ContainerStatsFilter { id: id.clone(), ..Default::default() };
        if let Some(found) = self.list_container_stats(Some(filter)).await?.pop() {
            return Ok(found);
        }
        let found = self.runtime.container_status(&id.into()).await?;
        let v1::Container { id, metadata, labels, annotations, .. } = self.tell_container(&found);
        let attributes = Some(v1::ContainerAttributes { id, metadata, labels, annotations });
        Ok(v1::ContainerStats { attributes, ..Default::default() })
    }

    /// What the ready sandboxes use that a client wants.
    pub(super) async fn list_pod_sandbox_stats(
        &self,
        wanted: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, Status> {
        let figures = self.figures(StatsScope::Usage).await?;
        let mountpoint = self.mountpoint().await;
        let wanted = wanted.map(|filter| v1::PodSandboxStatsFilter { id: self.sandboxes.id(&filter.id), ..filter });
        let told = figures
            .iter()
            .map(|sandbox| stats::sandbox(sandbox, self.about_sandbox(sandbox), self.told(sandbox, mountpoint)));
        Ok(told.filter(|one| filter::sandbox_stats(one, wanted.as_ref())).collect())
    }

    fn about_sandbox(&self, sandbox: &SandboxStats) -> v1::PodSandboxAttributes {
        let key = self.sandboxes.key_of(sandbox.id.as_str());
        let kept = key.as_ref().and_then(|key| self.sandboxes.of(key));
        let config = kept.as_ref().and_then(|kept| kept.config.as_ref());
        v1::PodSandboxAttributes {
            id: sandbox.id.to_string(),
            metadata: Some(v1::PodSandboxMetadata {
                name: sandbox.pod.name.clone(),
                uid: sandbox.pod.uid.clone(),
                namespace: sandbox.pod.namespace.clone(),
                attempt: key.as_ref().map_or(0, |key| key.attempt),
            }),
            labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
            annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        }
    }

    /// What one sandbox uses.
    pub(super) async fn pod_sandbox_stats(&self, asked: &str) -> Result<v1::PodSandboxStats, Status> {
        let id = self.sandbox_id(asked);
        let filter = v1::PodSandboxStatsFilter { id: id.to_string(), ..Default::default() };
        if let Some(found) = self.list_pod_sandbox_stats(Some(filter)).await?.pop() {
            return Ok(found);
        }
        self.runtime.pod_sandbox_status(&id).await?;
        Err(status(Code::FailedPrecondition, &format!("sandbox {id} is not ready, so it uses nothing")))
    }

    /// The metrics of all ready sandboxes.
    pub(super) async fn list_pod_sandbox_metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>, Status> {
        Ok(self.figures(StatsScope::Usage).await?.iter().map(stats::metrics).collect())
    }
}
