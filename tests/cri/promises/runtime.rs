//! What is promised of the runtime itself.

use bytes::{Buf as _, BufMut as _};
use lambdalet_proto::cri::{Message as _, v1};
use tokio::time::timeout;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

use crate::support::{PATIENCE, World, map};

#[tokio::test]
async fn the_version_of_the_protocol_is_v1() {
    let mut world = World::new().await;
    let version = world.runtime.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!(version.runtime_api_version, "v1");
    assert!(!version.runtime_name.is_empty() && !version.runtime_version.is_empty());
}

#[tokio::test]
async fn runtime_and_network_are_ready() {
    let mut world = World::new().await;
    let status = world.runtime.status(v1::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    for wanted in ["RuntimeReady", "NetworkReady"] {
        assert!(conditions.iter().any(|about| about.r#type == wanted && about.status), "{conditions:?}");
    }
    assert!(!status.info.is_empty(), "verbose says more");
}

#[tokio::test]
async fn the_default_handler_is_among_those_that_are_told() {
    let mut world = World::new().await;
    let status = world.runtime.status(v1::StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.runtime_handlers.iter().any(|handler| handler.name.is_empty()), "{:?}", status.runtime_handlers);
}

#[tokio::test]
async fn every_handler_that_is_told_of_can_be_asked_for_and_is_told() {
    let mut world = World::new().await;
    let status = world.runtime.status(v1::StatusRequest::default()).await.unwrap().into_inner();
    let named = status.runtime_handlers.into_iter().map(|handler| handler.name).find(|name| !name.is_empty());
    let runtime_handler = named.expect("there is one with a name");
    let request =
        v1::RunPodSandboxRequest { config: Some(world.config("a")), runtime_handler: runtime_handler.clone() };
    let id = world.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    assert_eq!(world.sandbox_status(&id).await.unwrap().status.unwrap().runtime_handler, runtime_handler);
}

#[tokio::test]
async fn a_kubelet_is_told_the_cgroup_driver() {
    let mut world = World::new().await;
    let config = world.runtime.runtime_config(v1::RuntimeConfigRequest {}).await.unwrap().into_inner();
    assert!(config.linux.is_some());
}

#[tokio::test]
async fn metrics_are_described() {
    let mut world = World::new().await;
    let described = world.runtime.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}).await.unwrap();
    assert!(!described.into_inner().descriptors.is_empty());
}

#[tokio::test]
async fn a_thousand_calls_at_once_are_all_answered() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let filter = Some(v1::ContainerFilter { id, ..Default::default() });
    let calls =
        (0..1000).map(|_| {
            let (mut client, filter) = (world.runtime.clone(), filter.clone());
            async move {
                client.list_containers(v1::ListContainersRequest { filter }).await.unwrap().into_inner().containers
            }
        });
    let answers = timeout(PATIENCE, futures::future::join_all(calls)).await.expect("all are answered");
    assert!(answers.len() == 1000 && answers.iter().all(|found| found.len() == 1));
}

#[tokio::test]
async fn a_request_of_fifteen_megabytes_is_taken_and_one_of_seventeen_is_refused() {
    let mut world = World::new().await;
    let with = |bytes: usize| v1::PodSandboxConfig {
        annotations: map(&[("large", &"x".repeat(bytes))]),
        ..world.config(&format!("p{bytes}"))
    };
    let (large, too_large) = (with(15 << 20), with(17 << 20));
    let id = world.run(large).await.unwrap();
    let status = world.sandbox_status(&id).await.unwrap().status.unwrap();
    assert_eq!(status.annotations["large"].len(), 15 << 20);
    // Which code it is depends on whether the client is still sending when it is answered.
    assert!(world.run(too_large).await.is_err());
    world.sandbox("after").await;
}

/// Messages as they are on the wire.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

#[tokio::test]
async fn fields_of_a_later_version_are_no_error() {
    /// Field 9999, three bytes.
    const LATER: &[u8] = &[0xfa, 0xf0, 0x04, 3, b'n', b'e', b'w'];
    let mut world = World::new().await;
    // In the message, and in one that is a field of it: the first of `RunPodSandboxRequest`.
    let mut config = world.config("a").encode_to_vec();
    config.extend(LATER);
    let mut request = vec![0x0a];
    let mut length = config.len();
    while length > 0x7f {
        request.push(length as u8 | 0x80);
        length >>= 7;
    }
    request.push(length as u8);
    request.extend(config);
    request.extend(LATER);
    let mut client = tonic::client::Grpc::new(world.channel.clone());
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/runtime.v1.RuntimeService/RunPodSandbox");
    let answer: Vec<u8> = client.unary(Request::new(request), path, Raw).await.unwrap().into_inner();
    let id = v1::RunPodSandboxResponse::decode(&*answer).unwrap().pod_sandbox_id;
    let status = world.sandbox_status(&id).await.unwrap().status.unwrap();
    assert_eq!(status.metadata, world.config("a").metadata);
}
