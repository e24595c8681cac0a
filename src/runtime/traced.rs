//! Span, log line, metrics and a limit of patience around every verb, once, at the seam.

use std::fmt::Display;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tracing::Instrument;

use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::verb::Verb;
use super::{ImageStore, Kind, Result, RuntimeError, SandboxRuntime};
use crate::telemetry::chain;

/// Seconds: from 1 ms (a status) doubling to 33 s (a pull).
fn buckets() -> impl Iterator<Item = f64> {
    exponential_buckets(0.001, 2.0, 16)
}

/// How long a runtime may be silent on a question before it counts as not answering: what a kubelet grants
/// (`runtimeRequestTimeout`). On a busy host a look waits for the start that is under way.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether the verb only asks, so that asking again is all there is to be done. How long the others may take is for the
/// work, or the caller, to say.
fn is_question(verb: Verb) -> bool {
    use Verb::*;
    match verb {
        Version | Ready | PodSandboxStatus | ListPodSandboxes | ListContainers | ContainerStatus | ImageStatus
        | ListImages | ImageFsInfo | ListPodSandboxStats | Events => true,
        RunPodSandbox
        | StopPodSandbox
        | RemovePodSandbox
        | CreateContainer
        | StartContainer
        | StopContainer
        | RemoveContainer
        | Logs
        | Exec
        | Attach
        | PortForward
        | PauseContainer
        | UnpauseContainer
        | UpdateContainerResources
        | UpdatePodSandboxResources
        | PullImage
        | UnpackImage
        | RemoveImage => false,
    }
}

/// How a verb ended: closed, so that the number of time series is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Outcome {
    Ok,
    Failed(Kind),
    /// The caller dropped it.
    Cancelled,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Failed(kind) => match kind {
                Kind::NotFound => "not_found",
                Kind::AlreadyExists => "already_exists",
                Kind::Invalid => "invalid",
                Kind::Unavailable => "unavailable",
                Kind::Unsupported => "unsupported",
                Kind::Unauthorized => "unauthorized",
                Kind::Internal => "internal",
            },
        }
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        self.name().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    verb: Verb,
    outcome: Outcome,
}

type Durations = Family<Labels, Histogram, fn() -> Histogram>;

/// A runtime that says what it is asked, and that answers every question in time: a `runtime` span with verb and subject around each call, a debug line at its
/// end, and `lambdalet_runtime_operation_duration_seconds{verb,outcome}`. Of streams it measures the opening.
/// A look or a list that takes longer than two minutes fails with [`Kind::Unavailable`].
pub struct Traced<R> {
    inner: R,
    durations: Durations,
    patience: Duration,
}

impl<R> Traced<R> {
    /// Wraps `inner` and registers the histogram.
    pub fn new(inner: R, registry: &mut Registry) -> Self {
        let durations = Durations::new_with_constructor(|| Histogram::new(buckets()));
        registry.register_with_unit(
            "runtime_operation_duration",
            "Time runtime verbs took, by verb and outcome",
            Unit::Seconds,
            durations.clone(),
        );
        Self { inner, durations, patience: PATIENCE }
    }

    /// The runtime inside.
    pub fn inner(&self) -> &R {
        &self.inner
    }

    fn silence(&self, verb: Verb, subject: &str) -> RuntimeError {
        let asked = if subject.is_empty() { verb.name().to_owned() } else { format!("{} ({subject})", verb.name()) };
        RuntimeError::new(Kind::Unavailable, format!("the runtime did not answer {asked} within {:?}", self.patience))
    }

    async fn observe<T>(
        &self,
        verb: Verb,
        subject: impl Display,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let subject = subject.to_string();
        let span = tracing::debug_span!("runtime", verb = verb.name(), subject);
        let mut watch = Watch { durations: &self.durations, verb, begun: Instant::now(), outcome: Outcome::Cancelled };
        let watched = async {
            let result = if is_question(verb) {
                let answer = tokio::time::timeout(self.patience, work).await;
                answer.unwrap_or_else(|_| Err(self.silence(verb, &subject)))
            } else {
                work.await
            };
            watch.outcome = result.as_ref().map_or_else(|error| Outcome::Failed(error.kind()), |_| Outcome::Ok);
            let milliseconds = watch.begun.elapsed().as_millis();
            match &result {
                Ok(_) => tracing::debug!(milliseconds, "done"),
                Err(error) => tracing::debug!(milliseconds, error = chain(error), "failed"),
            }
            result
        };
        watched.instrument(span).await
    }
}

/// Notes the duration when the call ends, also by being dropped.
struct Watch<'a> {
    durations: &'a Durations,
    verb: Verb,
    begun: Instant,
    outcome: Outcome,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let labels = Labels { verb: self.verb, outcome: self.outcome };
        self.durations.get_or_create(&labels).observe(self.begun.elapsed().as_secs_f64());
    }
}

/// What a list is of.
fn scope(pod_uid: Option<&str>) -> &str {
    pod_uid.unwrap_or("all")
}

#[async_trait]
impl<R: SandboxRuntime> SandboxRuntime for Traced<R> {
    async fn version(&self) -> Result<RuntimeVersion> {
        self.observe(Verb::Version, "", self.inner.version()).await
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        self.inner.cgroup_driver().await
    }

    async fn ready(&self) -> Result<()> {
        self.observe(Verb::Ready, "", self.inner.ready()).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        self.observe(Verb::RunPodSandbox, &config.pod, self.inner.run_pod_sandbox(config)).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.observe(Verb::StopPodSandbox, id, self.inner.stop_pod_sandbox(id)).await
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.observe(Verb::RemovePodSandbox, id, self.inner.remove_pod_sandbox(id)).await
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        self.observe(Verb::PodSandboxStatus, id, self.inner.pod_sandbox_status(id)).await
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        self.observe(Verb::ListPodSandboxes, scope(pod_uid), self.inner.list_pod_sandboxes(pod_uid)).await
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        let subject = format!("{}/{}", config.pod, config.name);
        self.observe(Verb::CreateContainer, subject, self.inner.create_container(sandbox, config)).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        self.observe(Verb::StartContainer, id, self.inner.start_container(id)).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        self.observe(Verb::StopContainer, id, self.inner.stop_container(id, grace)).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.observe(Verb::RemoveContainer, id, self.inner.remove_container(id)).await
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        self.observe(Verb::ListContainers, scope(pod_uid), self.inner.list_containers(pod_uid)).await
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        self.observe(Verb::ContainerStatus, id, self.inner.container_status(id)).await
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        self.observe(Verb::Logs, id, self.inner.logs(id, options)).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        self.observe(Verb::Exec, id, self.inner.exec(id, request)).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        self.observe(Verb::Attach, id, self.inner.attach(id, request)).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        self.observe(Verb::PortForward, format!("{id}:{port}"), self.inner.port_forward(id, port)).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        self.observe(Verb::PauseContainer, id, self.inner.pause_container(id)).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        self.observe(Verb::UnpauseContainer, id, self.inner.unpause_container(id)).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        let work = self.inner.update_container_resources(id, resources);
        self.observe(Verb::UpdateContainerResources, id, work).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        let work = self.inner.update_pod_sandbox_resources(id, resources);
        self.observe(Verb::UpdatePodSandboxResources, id, work).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        self.observe(Verb::ListPodSandboxStats, "all", self.inner.list_pod_sandbox_stats(scope)).await
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        self.observe(Verb::Events, "", self.inner.events()).await
    }
}

#[async_trait]
impl<R: ImageStore> ImageStore for Traced<R> {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.observe(Verb::PullImage, reference, self.inner.pull_image(reference, auths)).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.observe(Verb::ImageStatus, reference, self.inner.image_status(reference)).await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        self.observe(Verb::ListImages, "", self.inner.list_images()).await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        self.observe(Verb::ImageFsInfo, "", self.inner.image_fs_info()).await
    }

    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        self.observe(Verb::UnpackImage, id, self.inner.unpack_image(id, into)).await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.observe(Verb::RemoveImage, id, self.inner.remove_image(id)).await
    }
}

/// So that one runtime chosen at start can be wrapped and shared.
#[async_trait]
impl<R: SandboxRuntime + ?Sized> SandboxRuntime for Arc<R> {
    async fn version(&self) -> Result<RuntimeVersion> {
        (**self).version().await
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        (**self).cgroup_driver().await
    }

    async fn ready(&self) -> Result<()> {
        (**self).ready().await
    }

    async fn close(&self) {
        (**self).close().await;
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        (**self).run_pod_sandbox(config).await
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        (**self).stop_pod_sandbox(id).await
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        (**self).remove_pod_sandbox(id).await
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        (**self).pod_sandbox_status(id).await
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        (**self).list_pod_sandboxes(pod_uid).await
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        (**self).create_container(sandbox, config).await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        (**self).start_container(id).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        (**self).stop_container(id, grace).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        (**self).remove_container(id).await
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        (**self).list_containers(pod_uid).await
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        (**self).container_status(id).await
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        (**self).logs(id, options).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        (**self).exec(id, request).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        (**self).attach(id, request).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        (**self).port_forward(id, port).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        (**self).pause_container(id).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        (**self).unpause_container(id).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        (**self).update_container_resources(id, resources).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        (**self).update_pod_sandbox_resources(id, resources).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        (**self).list_pod_sandbox_stats(scope).await
    }

    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        (**self).events().await
    }
}

/// As for [`SandboxRuntime`].
#[async_trait]
impl<R: ImageStore + ?Sized> ImageStore for Arc<R> {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        (**self).pull_image(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        (**self).image_status(reference).await
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        (**self).list_images().await
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        (**self).image_fs_info().await
    }

    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        (**self).unpack_image(id, into).await
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        (**self).remove_image(id).await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::runtime::fake::FakeRuntime;

    #[tokio::test]
    async fn each_call_is_counted_with_how_it_ended() {
        let mut registry = Registry::with_prefix("lambdalet");
        let traced = Traced::new(Arc::new(FakeRuntime::new()), &mut registry);
        traced.ready().await.unwrap();
        traced.inner().fail_next(Verb::Ready, RuntimeError::new(Kind::Unavailable, "down"));
        traced.ready().await.unwrap_err();
        let _hold = traced.inner().hang_next(Verb::Ready);
        assert!(traced.ready().now_or_never().is_none());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for outcome in ["ok", "unavailable", "cancelled"] {
            let line =
                format!("lambdalet_runtime_operation_duration_seconds_count{{verb=\"ready\",outcome=\"{outcome}\"}} 1");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
    /// One that loses patience soon.
    fn impatient() -> Traced<Arc<FakeRuntime>> {
        let mut registry = Registry::with_prefix("lambdalet");
        let traced = Traced::new(Arc::new(FakeRuntime::new()), &mut registry);
        Traced { patience: Duration::from_millis(20), ..traced }
    }

    #[tokio::test]
    async fn a_question_that_hangs_for_ever_fails_in_time_and_says_which() {
        let traced = impatient();
        let _holds = [Verb::ListContainers, Verb::PodSandboxStatus].map(|verb| traced.inner().hang_next(verb));
        let error = traced.list_containers(Some("uid-7")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert_eq!(error.to_string(), "the runtime did not answer list_containers (uid-7) within 20ms");
        let error = traced.pod_sandbox_status(&SandboxId::from("s1")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "not taken for a sandbox that is gone");
        traced.list_containers(None).await.unwrap();
    }

    #[tokio::test]
    async fn work_takes_as_long_as_it_takes() {
        let traced = impatient();
        let hold = traced.inner().hang_next(Verb::PullImage);
        let release = async {
            tokio::time::sleep(3 * traced.patience).await;
            drop(hold);
        };
        let (pulled, ()) = tokio::join!(traced.pull_image("busybox:1.36", &[]), release);
        pulled.unwrap();
    }
}
