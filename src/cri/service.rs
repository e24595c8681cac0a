//! The services as gRPC has them: each call is a verb of [`Core`] and its answer in an envelope.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::image_service_server::ImageService;
use lambdalet_proto::cri::v1::runtime_service_server::RuntimeService;
use tonic::{Code, Request, Response, Status};

use super::core::Core;
use super::exec_sync::exec_sync;
use super::failure::status;
use super::translate::invalid;
use super::{runtime_status, stats};
use crate::runtime::types::CgroupDriver;

/// The only version there is since Kubernetes 1.26.
const API_VERSION: &str = "v1";
/// Things in one message of a stream: a message holds at most 16 MiB, and the largest thing is a few hundred KiB.
const AT_ONCE: usize = 32;

/// Both services.
#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Core>);

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = BoxStream<'static, Result<T, Status>>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

/// A list in several messages.
fn in_parts<T: Send + 'static, M: Send + 'static>(all: Vec<T>, part: fn(Vec<T>) -> M) -> Answer<Streamed<M>> {
    let mut rest = all.into_iter();
    let parts = std::iter::from_fn(move || {
        let some: Vec<T> = rest.by_ref().take(AT_ONCE).collect();
        (!some.is_empty()).then(|| Ok(part(some)))
    });
    answer(futures::stream::iter(parts).boxed())
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _request: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        let engine = self.0.runtime.version().await?;
        answer(v1::VersionResponse {
            // The version of a kubelet's side of the protocol before there was an API version.
            version: "0.1.0".to_owned(),
            runtime_name: "lambdalet".to_owned(),
            runtime_version: format!("{}+{}-{}", env!("CARGO_PKG_VERSION"), engine.name, engine.version),
            runtime_api_version: API_VERSION.to_owned(),
        })
    }

    async fn run_pod_sandbox(&self, request: Request<v1::RunPodSandboxRequest>) -> Answer<v1::RunPodSandboxResponse> {
        let verb = Arc::clone(&self.0).run_pod_sandbox(request.into_inner());
        let pod_sandbox_id = self.0.to_the_end(verb).await?;
        answer(v1::RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let verb = Arc::clone(&self.0).stop_pod_sandbox(request.into_inner().pod_sandbox_id);
        self.0.to_the_end(verb).await?;
        answer(v1::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let verb = Arc::clone(&self.0).remove_pod_sandbox(request.into_inner().pod_sandbox_id);
        self.0.to_the_end(verb).await?;
        answer(v1::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let v1::PodSandboxStatusRequest { pod_sandbox_id, verbose } = request.into_inner();
        answer(self.0.pod_sandbox_status(&pod_sandbox_id, verbose).await?)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        answer(v1::ListPodSandboxResponse { items: self.0.list_pod_sandbox(request.into_inner().filter).await? })
    }

    type StreamPodSandboxesStream = Streamed<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let all = self.0.list_pod_sandbox(request.into_inner().filter).await?;
        in_parts(all, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes })
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let verb = Arc::clone(&self.0).create_container(request.into_inner());
        answer(v1::CreateContainerResponse { container_id: self.0.to_the_end(verb).await? })
    }

    async fn start_container(&self, request: Request<v1::StartContainerRequest>) -> Answer<v1::StartContainerResponse> {
        let verb = Arc::clone(&self.0).start_container(request.into_inner().container_id);
        self.0.to_the_end(verb).await?;
        answer(v1::StartContainerResponse {})
    }

    async fn stop_container(&self, request: Request<v1::StopContainerRequest>) -> Answer<v1::StopContainerResponse> {
        let v1::StopContainerRequest { container_id, timeout } = request.into_inner();
        self.0.stop_container(&container_id, timeout).await?;
        answer(v1::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let verb = Arc::clone(&self.0).remove_container(request.into_inner().container_id);
        self.0.to_the_end(verb).await?;
        answer(v1::RemoveContainerResponse {})
    }

    async fn list_containers(&self, request: Request<v1::ListContainersRequest>) -> Answer<v1::ListContainersResponse> {
        answer(v1::ListContainersResponse { containers: self.0.list_containers(request.into_inner().filter).await? })
    }

    type StreamContainersStream = Streamed<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let all = self.0.list_containers(request.into_inner().filter).await?;
        in_parts(all, |containers| v1::StreamContainersResponse { containers })
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let v1::ContainerStatusRequest { container_id, verbose } = request.into_inner();
        answer(self.0.container_status(&container_id, verbose).await?)
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        self.0.update_container_resources(request.into_inner()).await?;
        answer(v1::UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        self.0.reopen_container_log(&request.get_ref().container_id).await?;
        answer(v1::ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let v1::ExecSyncRequest { container_id, cmd, timeout } = request.into_inner();
        self.0.adopted().await?;
        let container = self.0.running(&container_id).await?;
        answer(exec_sync(self.0.runtime.as_ref(), &container.id, cmd, timeout).await?)
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        answer(v1::ExecResponse { url: self.0.exec_url(request.into_inner()).await? })
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        answer(v1::AttachResponse { url: self.0.attach_url(request.into_inner()).await? })
    }

    async fn port_forward(&self, request: Request<v1::PortForwardRequest>) -> Answer<v1::PortForwardResponse> {
        answer(v1::PortForwardResponse { url: self.0.port_forward_url(request.into_inner()).await? })
    }

    async fn container_stats(&self, request: Request<v1::ContainerStatsRequest>) -> Answer<v1::ContainerStatsResponse> {
        let stats = self.0.container_stats(&request.get_ref().container_id).await?;
        answer(v1::ContainerStatsResponse { stats: Some(stats) })
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        answer(v1::ListContainerStatsResponse {
            stats: self.0.list_container_stats(request.into_inner().filter).await?,
        })
    }

    type StreamContainerStatsStream = Streamed<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let all = self.0.list_container_stats(request.into_inner().filter).await?;
        in_parts(all, |container_stats| v1::StreamContainerStatsResponse { container_stats })
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let stats = self.0.pod_sandbox_stats(&request.get_ref().pod_sandbox_id).await?;
        answer(v1::PodSandboxStatsResponse { stats: Some(stats) })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        answer(v1::ListPodSandboxStatsResponse {
            stats: self.0.list_pod_sandbox_stats(request.into_inner().filter).await?,
        })
    }

    type StreamPodSandboxStatsStream = Streamed<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let all = self.0.list_pod_sandbox_stats(request.into_inner().filter).await?;
        in_parts(all, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        let text = network.map(|network| network.pod_cidr).unwrap_or_default();
        // A kubelet of two families sends both; sandboxes have one address.
        if let Some(range) = text.split(',').next().filter(|range| !range.is_empty()) {
            let range = range.trim().parse().map_err(|_| invalid(format!("{range:?} is no range of addresses")))?;
            let core = Arc::clone(&self.0);
            let verb = async move {
                core.adopted().await?;
                core.network.set_range(range).await
            };
            self.0.to_the_end(verb).await?;
        }
        answer(v1::UpdateRuntimeConfigResponse {})
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        answer(runtime_status::status(&self.0, request.get_ref().verbose).await)
    }

    async fn checkpoint_container(
        &self,
        _request: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        Err(status(Code::Unimplemented, "lambdalet does not checkpoint containers"))
    }

    type GetContainerEventsStream = Streamed<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        self.0.adopted().await?;
        answer(self.0.events.listen(self.0.tasks.draining()))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        answer(v1::ListMetricDescriptorsResponse { descriptors: stats::descriptors() })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        answer(v1::ListPodSandboxMetricsResponse { pod_metrics: self.0.list_pod_sandbox_metrics().await? })
    }

    type StreamPodSandboxMetricsStream = Streamed<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let all = self.0.list_pod_sandbox_metrics().await?;
        in_parts(all, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics })
    }

    async fn runtime_config(&self, _request: Request<v1::RuntimeConfigRequest>) -> Answer<v1::RuntimeConfigResponse> {
        let cgroup_driver = match self.0.runtime.cgroup_driver().await? {
            CgroupDriver::Cgroupfs => v1::CgroupDriver::Cgroupfs.into(),
            CgroupDriver::Systemd => v1::CgroupDriver::Systemd.into(),
        };
        answer(v1::RuntimeConfigResponse { linux: Some(v1::LinuxRuntimeConfiguration { cgroup_driver }) })
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        self.0.update_pod_sandbox_resources(request.into_inner()).await?;
        answer(v1::UpdatePodSandboxResourcesResponse {})
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        answer(v1::ListImagesResponse { images: self.0.list_images(request.into_inner().filter).await? })
    }

    type StreamImagesStream = Streamed<v1::StreamImagesResponse>;

    async fn stream_images(&self, request: Request<v1::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        let all = self.0.list_images(request.into_inner().filter).await?;
        in_parts(all, |images| v1::StreamImagesResponse { images })
    }

    async fn image_status(&self, request: Request<v1::ImageStatusRequest>) -> Answer<v1::ImageStatusResponse> {
        let v1::ImageStatusRequest { image, verbose } = request.into_inner();
        answer(self.0.image_status(image, verbose).await?)
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        answer(v1::PullImageResponse { image_ref: self.0.pull_image(request.into_inner()).await? })
    }

    async fn remove_image(&self, request: Request<v1::RemoveImageRequest>) -> Answer<v1::RemoveImageResponse> {
        self.0.remove_image(request.into_inner().image).await?;
        answer(v1::RemoveImageResponse {})
    }

    async fn image_fs_info(&self, _request: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        answer(self.0.image_fs_info().await?)
    }
}
