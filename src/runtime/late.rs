//! A runtime that may not be there yet: the node starts, registers and says why it is not ready, and connects as soon
//! as the engine answers.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::OnceCell;

use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::{ImageStore, Result, Runtime, SandboxRuntime};

/// Makes a connection to an engine, or says why there is none.
type Connect = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Runtime>>> + Send + Sync>;

/// Connects at the first verb that succeeds in doing so; until then every verb fails with the reason.
pub struct Late {
    connect: Connect,
    runtime: OnceCell<Arc<dyn Runtime>>,
}

impl Late {
    /// A runtime that is connected to by `connect`, which is asked again at each verb until it succeeds.
    pub fn new(connect: impl Fn() -> BoxFuture<'static, Result<Arc<dyn Runtime>>> + Send + Sync + 'static) -> Self {
        Self { connect: Box::new(connect), runtime: OnceCell::new() }
    }

    async fn get(&self) -> Result<&Arc<dyn Runtime>> {
        self.runtime.get_or_try_init(|| (self.connect)()).await
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
