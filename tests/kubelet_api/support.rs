//! A node's API on a free port, with an API server that answers reviews and a runtime that has logs and processes.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use lambdalet::kubelet_api::targets::{Entrance, LogTarget, PodTargets, PodVolume, ProbeCount, TargetError};
use lambdalet::kubelet_api::{About, Access, KubeletApi, Limits, Params, Serving, TlsParams};
use lambdalet::metrics::Metrics;
use lambdalet::runtime::session::{AttachRequest, Duplex, ExecRequest, Session};
use lambdalet::runtime::stats::{ImageFs, SandboxStats, StatsScope};
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions, RegistryAuth,
    Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use lambdalet::runtime::{ImageStore, Kind, Result as RuntimeResult, RuntimeError, SandboxRuntime};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::crypto::ring;
use rustls::{ClientConfig, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::processes::{Processes, Running};

#[path = "../../src/pod/probes/anybody.rs"]
mod anybody;

use anybody::Anybody;

/// The node in every test.
pub(crate) const NODE: &str = "node-1";

/// A certificate authority.
pub(crate) struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    fn sign(&self, adjust: impl FnOnce(&mut CertificateParams)) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        adjust(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A serving pair as PEM.
    pub(crate) fn serving(&self) -> (String, String) {
        let (certificate, key) =
            self.sign(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
        (certificate.pem(), key.serialize_pem())
    }

    /// A client's identity, good until `year`.
    pub(crate) fn client(&self, user: &str, group: &str, year: i32) -> Identity {
        let (certificate, key) = self.sign(|params| {
            params.distinguished_name.push(DnType::CommonName, user);
            params.distinguished_name.push(DnType::OrganizationName, group);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
        });
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Identity(certificate.der().clone(), Arc::new(key))
    }

    /// The usual caller.
    pub(crate) fn api_server(&self) -> Identity {
        self.client("kube-apiserver-kubelet-client", "kubeadm:cluster-admins", 4000)
    }
}

/// A client certificate and its key.
#[derive(Clone)]
pub(crate) struct Identity(CertificateDer<'static>, Arc<PrivateKeyDer<'static>>);

/// How the mock API server treats requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Every request fails on the way.
    Down,
    /// This node may not create reviews.
    Forbidding,
    /// A TokenReview is never answered.
    SlowForTokens,
}

/// The mock API server: the token `good` is `system:serviceaccount:ns:sa`, every right in `granted` is granted.
pub(crate) struct Cluster {
    pub(crate) mood: Mutex<Mood>,
    /// Subresources.
    pub(crate) granted: Mutex<Vec<&'static str>>,
    pub(crate) token_reviews: AtomicUsize,
    pub(crate) access_reviews: AtomicUsize,
    /// The spec last reviewed.
    pub(crate) last: Mutex<Value>,
}

impl Cluster {
    fn client(self: &Arc<Self>) -> kube::Client {
        let cluster = self.clone();
        let answer = move |request: Request<kube::client::Body>| {
            let cluster = cluster.clone();
            async move { cluster.answer(request).await }
        };
        kube::Client::new(tower::service_fn(answer), "default")
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> io::Result<Response<Full<Bytes>>> {
        let token = request.uri().path().ends_with("/tokenreviews");
        let counter = if token { &self.token_reviews } else { &self.access_reviews };
        counter.fetch_add(1, Ordering::SeqCst);
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut review: Value = serde_json::from_slice(&body).unwrap();
        // Long enough for callers at the same time to meet.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Down => return Err(io::Error::other("connection refused")),
            Mood::Forbidding => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "forbidden", "reason": "Forbidden", "code": 403});
                return Ok(Response::builder().status(403).body(Full::from(status.to_string())).unwrap());
            }
            Mood::SlowForTokens if token => std::future::pending().await,
            Mood::Well | Mood::SlowForTokens => {}
        }
        review["status"] = if token { token_status(&review["spec"]) } else { self.access_status(&review["spec"]) };
        *self.last.lock().unwrap() = review["spec"].clone();
        Ok(Response::builder().status(201).body(Full::from(review.to_string())).unwrap())
    }

    fn access_status(&self, spec: &Value) -> Value {
        let wanted = spec["resourceAttributes"]["subresource"].as_str().unwrap_or_default();
        json!({"allowed": self.granted.lock().unwrap().contains(&wanted)})
    }

    pub(crate) fn calls(&self) -> (usize, usize) {
        (self.token_reviews.load(Ordering::SeqCst), self.access_reviews.load(Ordering::SeqCst))
    }
}

fn token_status(spec: &Value) -> Value {
    if spec["token"] == "good" {
        json!({"authenticated": true, "user": {"username": "system:serviceaccount:ns:sa", "uid": "7",
            "groups": ["system:serviceaccounts", "system:authenticated"], "extra": {"k": ["v"]}}})
    } else {
        json!({"authenticated": false, "error": "invalid bearer token"})
    }
}

/// Makes the stream of one `logs` call.
type LogSource = Box<dyn Fn() -> RuntimeResult<BoxStream<'static, RuntimeResult<LogChunk>>> + Send + Sync>;

/// Pods and logs: container `c` of Pod `p` in namespace `ns`.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) stuck: Mutex<Option<String>>,
    pub(crate) log: Mutex<Option<LogSource>>,
    /// What `exec` and `attach` run.
    pub(crate) processes: Processes,
    /// What `attach` joins; `None` is `cat`.
    pub(crate) joined: Mutex<Option<&'static str>>,
    /// Callers that keep the container there.
    pub(crate) stays: Arc<AtomicUsize>,
    /// What runs; `None` fails.
    pub(crate) stats: Mutex<Option<Vec<SandboxStats>>>,
    /// The Pods' volumes.
    pub(crate) volumes: Mutex<BTreeMap<String, Vec<PodVolume>>>,
    /// A directory of images, and what they take.
    pub(crate) images: Mutex<Option<ImageFs>>,
    /// What `logs` was last asked.
    pub(crate) asked: Mutex<Option<(ContainerId, LogOptions)>>,
}

impl World {
    pub(crate) fn set_log<F>(&self, source: F)
    where
        F: Fn() -> RuntimeResult<BoxStream<'static, RuntimeResult<LogChunk>>> + Send + Sync + 'static,
    {
        *self.log.lock().unwrap() = Some(Box::new(source));
    }
}

#[async_trait]
impl PodTargets for World {
    async fn log_target(&self, ns: &str, pod: &str, container: &str, prev: bool) -> Result<LogTarget, TargetError> {
        let (pod, container) = (pod.to_owned(), container.to_owned());
        match (ns, pod.as_str(), container.as_str(), prev) {
            ("ns", "p", "c", false) => Ok(LogTarget::One(ContainerId::from("current"))),
            ("ns", "p", "c", true) => Ok(LogTarget::One(ContainerId::from("before"))),
            ("ns", "p", "new", true) => Err(TargetError::NoPrevious { pod, container }),
            ("ns", "p", "new", false) => {
                Err(TargetError::Waiting { pod, container, reason: "ContainerCreating".to_owned() })
            }
            ("ns", "p", ..) => Err(TargetError::NoContainer { pod, container }),
            _ => Err(TargetError::NoPod(pod)),
        }
    }

    async fn exec_target(
        &self,
        ns: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<Entrance, TargetError> {
        self.port_target(ns, pod, uid).await?;
        match container {
            "c" => {
                let stay = Some(Box::new(Running::among(&self.stays)) as _);
                Ok(Entrance { container: ContainerId::from("current"), stay })
            }
            other => Err(TargetError::NotRunning(other.to_owned())),
        }
    }

    async fn port_target(&self, ns: &str, pod: &str, uid: Option<&str>) -> Result<SandboxId, TargetError> {
        match (ns, pod, uid.unwrap_or("u")) {
            ("ns", "p", "u") => Ok(SandboxId::from("sandbox")),
            ("ns", "new", _) => Err(TargetError::NoSandbox("new_ns".to_owned())),
            _ => Err(TargetError::NoPod(pod.to_owned())),
        }
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        let pod = json!({"metadata": {"name": "p", "namespace": "ns"}, "status": {"phase": "Running"}});
        vec![Arc::new(serde_json::from_value(pod).unwrap())]
    }

    fn volumes(&self) -> BTreeMap<String, Vec<PodVolume>> {
        self.volumes.lock().unwrap().clone()
    }

    fn probes(&self) -> Vec<ProbeCount> {
        let pod =
            lambdalet::runtime::types::PodRef { uid: "u".to_owned(), namespace: "ns".to_owned(), name: "p".to_owned() };
        vec![ProbeCount { pod, container: "c".to_owned(), probe: "Liveness", result: "failed", count: 3 }]
    }

    fn healthy(&self) -> Result<(), String> {
        self.stuck.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

fn unsupported<T>() -> RuntimeResult<T> {
    Err(RuntimeError::new(Kind::Unsupported, "not in this test"))
}

#[async_trait]
impl SandboxRuntime for World {
    async fn version(&self) -> RuntimeResult<RuntimeVersion> {
        unsupported()
    }
    async fn ready(&self) -> RuntimeResult<()> {
        unsupported()
    }
    async fn run_pod_sandbox(&self, _: &SandboxConfig) -> RuntimeResult<SandboxId> {
        unsupported()
    }
    async fn stop_pod_sandbox(&self, _: &SandboxId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn remove_pod_sandbox(&self, _: &SandboxId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn pod_sandbox_status(&self, _: &SandboxId) -> RuntimeResult<SandboxStatus> {
        unsupported()
    }
    async fn list_pod_sandboxes(&self, _: Option<&str>) -> RuntimeResult<Vec<SandboxStatus>> {
        unsupported()
    }
    async fn create_container(&self, _: &SandboxId, _: &ContainerConfig) -> RuntimeResult<ContainerId> {
        unsupported()
    }
    async fn start_container(&self, _: &ContainerId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn stop_container(&self, _: &ContainerId, _: Grace) -> RuntimeResult<()> {
        unsupported()
    }
    async fn remove_container(&self, _: &ContainerId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn list_containers(&self, _: Option<&str>) -> RuntimeResult<Vec<ContainerStatus>> {
        unsupported()
    }
    async fn container_status(&self, _: &ContainerId) -> RuntimeResult<ContainerStatus> {
        unsupported()
    }
    async fn logs(
        &self,
        id: &ContainerId,
        options: &LogOptions,
    ) -> RuntimeResult<BoxStream<'static, RuntimeResult<LogChunk>>> {
        *self.asked.lock().unwrap() = Some((id.clone(), options.clone()));
        self.log.lock().unwrap().as_ref().map_or_else(unsupported, |source| source())
    }
    async fn exec(&self, _: &ContainerId, request: &ExecRequest) -> RuntimeResult<Session> {
        self.processes.start(request)
    }
    async fn attach(&self, _: &ContainerId, request: &AttachRequest) -> RuntimeResult<Session> {
        let AttachRequest { stdin, stdout, stderr } = *request;
        let command = vec![self.joined.lock().unwrap().unwrap_or("cat").to_owned()];
        self.processes.join(&ExecRequest { command, tty: false, stdin, stdout, stderr })
    }
    async fn port_forward(&self, _: &SandboxId, port: u16) -> RuntimeResult<Pin<Box<dyn Duplex>>> {
        match TcpStream::connect(("127.0.0.1", port)).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(error) => Err(RuntimeError::new(Kind::Invalid, format!("failed to connect to port {port}: {error}"))),
        }
    }
    async fn pause_container(&self, _: &ContainerId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn unpause_container(&self, _: &ContainerId) -> RuntimeResult<()> {
        unsupported()
    }
    async fn update_container_resources(&self, _: &ContainerId, _: &Resources) -> RuntimeResult<()> {
        unsupported()
    }
    async fn update_pod_sandbox_resources(&self, _: &SandboxId, _: &Resources) -> RuntimeResult<()> {
        unsupported()
    }
    async fn list_pod_sandbox_stats(&self, _: StatsScope) -> RuntimeResult<Vec<SandboxStats>> {
        self.stats.lock().unwrap().clone().ok_or_else(crate::statistics::no_stats)
    }
    async fn events(&self) -> RuntimeResult<BoxStream<'static, RuntimeEvent>> {
        unsupported()
    }
}

#[async_trait]
impl ImageStore for World {
    async fn pull_image(&self, _: &str, _: &[RegistryAuth]) -> RuntimeResult<ImageId> {
        unsupported()
    }
    async fn image_status(&self, _: &str) -> RuntimeResult<Option<Image>> {
        unsupported()
    }
    async fn list_images(&self) -> RuntimeResult<Vec<Image>> {
        unsupported()
    }
    async fn image_fs_info(&self) -> RuntimeResult<ImageFs> {
        self.images.lock().unwrap().clone().map_or_else(unsupported, Ok)
    }
    async fn remove_image(&self, _: &ImageId) -> RuntimeResult<()> {
        unsupported()
    }
}

/// What a test may change before the start.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) access: Access,
    pub(crate) limits: Limits,
    pub(crate) about: About,
}

/// The node under test; it ends with the value.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) authority: Authority,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) world: Arc<World>,
    pub(crate) directory: TempDir,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: JoinSet<()>,
}

impl Node {
    pub(crate) async fn start(setup: Setup) -> Self {
        let (directory, authority) = (tempfile::tempdir().unwrap(), Authority::new("cluster"));
        let path = |name: &str| directory.path().join(name);
        let (certificate, key) = authority.serving();
        std::fs::write(path("tls.crt"), certificate).unwrap();
        std::fs::write(path("tls.key"), key).unwrap();
        std::fs::write(path("ca.crt"), authority.pem()).unwrap();
        let serving = Serving::Files { certificate: path("tls.crt"), key: path("tls.key") };
        let tls = TlsParams { client_ca_file: Some(path("ca.crt")), ..TlsParams::new(serving) };
        Self::start_with(setup, tls, directory, authority).await
    }

    pub(crate) async fn start_with(setup: Setup, tls: TlsParams, directory: TempDir, authority: Authority) -> Self {
        let cluster = Arc::new(Cluster {
            mood: Mutex::new(Mood::Well),
            granted: Mutex::new(vec!["proxy", "metrics", "pods", "healthz"]),
            token_reviews: AtomicUsize::new(0),
            access_reviews: AtomicUsize::new(0),
            last: Mutex::default(),
        });
        let world = Arc::new(World::default());
        let params = Params {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            node_name: NODE.to_owned(),
            tls,
            access: setup.access,
            client: cluster.client(),
            targets: world.clone(),
            runtime: world.clone(),
            images: world.clone(),
            metrics: Metrics::new(),
            limits: setup.limits,
            about: setup.about,
        };
        let api = KubeletApi::bind(params).await.unwrap();
        let (address, shutdown, mut tasks) = (api.local_addr(), CancellationToken::new(), JoinSet::new());
        tasks.spawn(api.serve(shutdown.clone()));
        Self { address, authority, cluster, world, directory, shutdown, tasks }
    }

    /// A connection of a client with this certificate, or none.
    pub(crate) async fn connect(&self, identity: Option<Identity>) -> io::Result<Client> {
        Client::connect(self.address, identity, rustls::ALL_VERSIONS, &["http/1.1"]).await
    }

    /// A connection of the API server's.
    pub(crate) async fn api_server(&self) -> Client {
        self.connect(Some(self.authority.api_server())).await.unwrap()
    }

    /// One GET as the API server.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let (status, body) = self.api_server().await.get(path, None).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

/// One connection.
pub(crate) struct Client {
    sender: SendRequest<Empty<Bytes>>,
    /// The node's certificate.
    pub(crate) served: CertificateDer<'static>,
    /// The protocol agreed on.
    pub(crate) protocol: Option<Vec<u8>>,
    _driver: JoinSet<()>,
}

impl Client {
    pub(crate) async fn connect(
        address: SocketAddr,
        identity: Option<Identity>,
        versions: &[&'static SupportedProtocolVersion],
        protocols: &[&str],
    ) -> io::Result<Self> {
        let tls = tls(address, identity, versions, protocols).await?;
        let session = tls.get_ref().1;
        let served = session.peer_certificates().unwrap()[0].clone();
        let protocol = session.alpn_protocol().map(<[u8]>::to_vec);
        let (sender, connection) = handshake(TokioIo::new(tls)).await.map_err(io::Error::other)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { sender, served, protocol, _driver: driver })
    }

    pub(crate) async fn send(&mut self, request: Request<Empty<Bytes>>) -> hyper::Result<Response<Incoming>> {
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }

    /// The answer's head; the body is read by the caller.
    pub(crate) async fn open(&mut self, path: &str, token: Option<&str>) -> hyper::Result<Response<Incoming>> {
        self.send(request(Method::GET, path, token)).await
    }

    pub(crate) async fn get(&mut self, path: &str, token: Option<&str>) -> hyper::Result<(u16, Bytes)> {
        let response = self.open(path, token).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    pub(crate) async fn status(&mut self, path: &str, token: Option<&str>) -> u16 {
        self.get(path, token).await.unwrap().0
    }
}

/// A connection of a client with this certificate, or none, before any request.
pub(crate) async fn tls(
    address: SocketAddr,
    identity: Option<Identity>,
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&str],
) -> io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(ring::default_provider());
    // These tests look at the certificate themselves.
    let verifier = Arc::new(Anybody(Arc::clone(&provider)));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(Identity(certificate, key)) => builder.with_client_auth_cert(vec![certificate], key.clone_key()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

pub(crate) fn request(method: Method, path: &str, token: Option<&str>) -> Request<Empty<Bytes>> {
    let mut builder = Request::builder().method(method).uri(path).header("host", "localhost");
    if let Some(token) = token {
        builder = builder.header("authorization", format!("Bearer {token}"));
    }
    builder.body(Empty::new()).unwrap()
}

/// Waits until `done`, up to `seconds`.
pub(crate) async fn eventually(seconds: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = std::time::Instant::now() + Duration::from_secs(seconds);
    while !done() {
        if std::time::Instant::now() > end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}
