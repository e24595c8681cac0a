//! A runtime that only tells its version and images.

use std::pin::Pin;

use async_trait::async_trait;
use futures::stream::BoxStream;
use lambdalet::runtime::session::{AttachRequest, Duplex, ExecRequest, Session};
use lambdalet::runtime::stats::{ImageFs, SandboxStats, StatsScope};
use lambdalet::runtime::types::*;
use lambdalet::runtime::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime};

pub(crate) struct Silent;

fn unsupported<T>() -> Result<T> {
    Err(RuntimeError::new(Kind::Unsupported, "only the node is tested here"))
}

#[async_trait]
impl SandboxRuntime for Silent {
    async fn version(&self) -> Result<RuntimeVersion> {
        Ok(RuntimeVersion { name: "docker".to_owned(), version: "20.10.24".to_owned() })
    }
    async fn ready(&self) -> Result<()> {
        Ok(())
    }
    async fn run_pod_sandbox(&self, _: &SandboxConfig) -> Result<SandboxId> {
        unsupported()
    }
    async fn stop_pod_sandbox(&self, _: &SandboxId) -> Result<()> {
        unsupported()
    }
    async fn remove_pod_sandbox(&self, _: &SandboxId) -> Result<()> {
        unsupported()
    }
    async fn pod_sandbox_status(&self, _: &SandboxId) -> Result<SandboxStatus> {
        unsupported()
    }
    async fn list_pod_sandboxes(&self, _: Option<&str>) -> Result<Vec<SandboxStatus>> {
        unsupported()
    }
    async fn create_container(&self, _: &SandboxId, _: &ContainerConfig) -> Result<ContainerId> {
        unsupported()
    }
    async fn start_container(&self, _: &ContainerId) -> Result<()> {
        unsupported()
    }
    async fn stop_container(&self, _: &ContainerId, _: Grace) -> Result<()> {
        unsupported()
    }
    async fn remove_container(&self, _: &ContainerId) -> Result<()> {
        unsupported()
    }
    async fn list_containers(&self, _: Option<&str>) -> Result<Vec<ContainerStatus>> {
        unsupported()
    }
    async fn container_status(&self, _: &ContainerId) -> Result<ContainerStatus> {
        unsupported()
    }
    async fn logs(&self, _: &ContainerId, _: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        unsupported()
    }
    async fn exec(&self, _: &ContainerId, _: &ExecRequest) -> Result<Session> {
        unsupported()
    }
    async fn attach(&self, _: &ContainerId, _: &AttachRequest) -> Result<Session> {
        unsupported()
    }
    async fn port_forward(&self, _: &SandboxId, _: u16) -> Result<Pin<Box<dyn Duplex>>> {
        unsupported()
    }
    async fn pause_container(&self, _: &ContainerId) -> Result<()> {
        unsupported()
    }
    async fn unpause_container(&self, _: &ContainerId) -> Result<()> {
        unsupported()
    }
    async fn update_container_resources(&self, _: &ContainerId, _: &Resources) -> Result<()> {
        unsupported()
    }
    async fn update_pod_sandbox_resources(&self, _: &SandboxId, _: &Resources) -> Result<()> {
        unsupported()
    }
    async fn list_pod_sandbox_stats(&self, _: StatsScope) -> Result<Vec<SandboxStats>> {
        unsupported()
    }
    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        unsupported()
    }
}

#[async_trait]
impl ImageStore for Silent {
    async fn pull_image(&self, _: &str, _: &[RegistryAuth]) -> Result<ImageId> {
        unsupported()
    }
    async fn image_status(&self, _: &str) -> Result<Option<Image>> {
        unsupported()
    }
    async fn image_fs_info(&self) -> Result<ImageFs> {
        unsupported()
    }
    async fn list_images(&self) -> Result<Vec<Image>> {
        let tags = vec!["busybox:1.36".to_owned()];
        Ok(vec![Image { tags, size: 4096, ..Image::new("sha256:1") }])
    }
    async fn remove_image(&self, _: &ImageId) -> Result<()> {
        unsupported()
    }
}
