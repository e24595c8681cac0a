//! A runtime that may not be there yet: the node starts, registers and says why it is not ready, and connects as soon
//! as the engine answers.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};
use tokio::task::JoinSet;

use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::{ImageStore, Kind, Result, Runtime, RuntimeError, SandboxRuntime};

/// Makes a connection to an engine, or says why there is none.
type Connect = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Runtime>>> + Send + Sync>;

/// Connects at the first verb that succeeds in doing so; until then every verb fails with the reason.
pub struct Late {
    connect: Connect,
    runtime: OnceCell<Arc<dyn Runtime>>,
    /// The one attempt under way: it goes on when whoever asked stops waiting, and ends with this.
    attempt: AsyncMutex<JoinSet<Result<Arc<dyn Runtime>>>>,
}

impl Late {
    /// A runtime that is connected to by `connect`, which is asked again at each verb until it succeeds.
    pub fn new(connect: impl Fn() -> BoxFuture<'static, Result<Arc<dyn Runtime>>> + Send + Sync + 'static) -> Self {
        Self { connect: Box::new(connect), runtime: OnceCell::new(), attempt: AsyncMutex::default() }
    }

    async fn get(&self) -> Result<&Arc<dyn Runtime>> {
        self.runtime.get_or_try_init(|| self.attempt()).await
    }

    /// What the attempt under way comes to, or a new one. Cancel-safe: the next who asks waits for the same.
    async fn attempt(&self) -> Result<Arc<dyn Runtime>> {
        let mut attempt = self.attempt.lock().await;
        if attempt.is_empty() {
            attempt.spawn((self.connect)());
        }
        let lost = || RuntimeError::new(Kind::Internal, "failed to connect to the runtime");
        match attempt.join_next().await {
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => Err(lost().with_source(error)),
            None => Err(lost()),
        }
    }
}

#[async_trait]
impl SandboxRuntime for Late {
    async fn version(&self) -> Result<RuntimeVersion> {
        self.get().await?.version().await
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        self.get().await?.cgroup_driver().await
    }

    async fn ready(&self) -> Result<()> {
        self.get().await?.ready().await
    }

    /// What was never connected to has made nothing.
    async fn close(&self) {
        if let Some(runtime) = self.runtime.get() {
            runtime.close().await;
        }
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        self.get().await?.run_pod_sandbox(config).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.get().await?.stop_pod_sandbox(id).await
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.get().await?.remove_pod_sandbox(id).await
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.get().await?.pod_sandbox_status(id).await
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        self.get().await?.list_pod_sandboxes(pod_uid).await
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        self.get().await?.create_container(sandbox, config).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        self.get().await?.start_container(id).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        self.get().await?.stop_container(id, grace).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.get().await?.remove_container(id).await
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        self.get().await?.list_containers(pod_uid).await
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.get().await?.container_status(id).await
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        self.get().await?.logs(id, options).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        self.get().await?.exec(id, request).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        self.get().await?.attach(id, request).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.get().await?.port_forward(id, port).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        self.get().await?.pause_container(id).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        self.get().await?.unpause_container(id).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        self.get().await?.update_container_resources(id, resources).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        self.get().await?.update_pod_sandbox_resources(id, resources).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        self.get().await?.list_pod_sandbox_stats(scope).await
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        self.get().await?.events().await
    }
}

#[async_trait]
impl ImageStore for Late {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.get().await?.pull_image(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.get().await?.image_status(reference).await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.get().await?.list_images().await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.get().await?.image_fs_info().await
    }

    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        self.get().await?.unpack_image(id, into).await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.get().await?.remove_image(id).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;
    use tokio::time::timeout;

    use super::*;
    use crate::runtime::fake::FakeRuntime;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// An engine that answers once it is let to; each attempt holds a share of what is returned.
    fn late() -> (Late, Arc<Notify>, Arc<AtomicUsize>) {
        let (let_go, attempts) = (Arc::<Notify>::default(), Arc::<AtomicUsize>::default());
        let (waits, counts) = (Arc::clone(&let_go), Arc::clone(&attempts));
        let late = Late::new(move || {
            let (waits, counts) = (Arc::clone(&waits), Arc::clone(&counts));
            Box::pin(async move {
                let first = counts.fetch_add(1, Ordering::SeqCst) == 0;
                waits.notified().await;
                if first {
                    return Err(RuntimeError::new(Kind::Unavailable, "not yet"));
                }
                Ok(Arc::new(FakeRuntime::new()) as Arc<dyn Runtime>)
            })
        });
        (late, let_go, attempts)
    }

    #[tokio::test]
    async fn an_attempt_outlives_whoever_stops_waiting_for_it() {
        let (late, let_go, attempts) = late();
        for _ in 0..3 {
            assert!(timeout(Duration::from_millis(5), late.ready()).await.is_err());
        }
        let_go.notify_one();
        assert_eq!(late.ready().await.unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(attempts.load(Ordering::SeqCst), 1, "the one that goes on is told of");
        let_go.notify_one();
        late.ready().await.unwrap();
        late.ready().await.unwrap();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn an_attempt_ends_with_what_it_is_for() {
        let (late, let_go, _) = late();
        assert!(timeout(Duration::from_millis(5), late.ready()).await.is_err());
        drop(late);
        let gone = async {
            while Arc::strong_count(&let_go) > 1 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, gone).await.expect("it is dropped");
    }
}
