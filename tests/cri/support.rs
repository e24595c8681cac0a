//! A server on a socket, and a client of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lambdalet::cri::{About, Cri, Params};
use lambdalet::runtime::fake::FakeRuntime;
use lambdalet::shutdown::{Supervisor, Tasks};
use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::image_service_client::ImageServiceClient;
use lambdalet_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The image that containers run.
pub(crate) const IMAGE: &str = "docker.io/library/app:1";

/// A server, and the directory it lives in.
pub(crate) struct World {
    pub(crate) fake: FakeRuntime,
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    pub(crate) root: TempDir,
    serving: Serving,
}

/// The server; it ends with the test.
struct Serving {
    tasks: Tasks,
    // Dropped, it would close the queue that failures go to.
    _supervisor: Supervisor,
    server: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.tasks.draining().cancel();
        self.server.abort();
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        let fake = FakeRuntime::new();
        fake.add_pulled_image(IMAGE);
        Self::of(fake, tempfile::tempdir().unwrap()).await
    }

    async fn of(fake: FakeRuntime, root: TempDir) -> Self {
        let (tasks, supervisor) = Tasks::new();
        let socket = root.path().join("cri.sock");
        let params = Params {
            listen: socket.clone(),
            streams: "127.0.0.1:0".parse().unwrap(),
            root: root.path().join("root"),
            runtime: std::sync::Arc::new(fake.clone()),
            about: About {
                handlers: vec!["fake".into()],
                cgroup_root: "lambdalet-test".into(),
                hostname: "host".into(),
            },
            range: (None, "10.188.0.0/16".parse().unwrap()),
            plug: None,
        };
        let cri = Cri::bind(params, &tasks).await.unwrap();
        let draining = tasks.draining();
        let server = tokio::spawn(async move { cri.serve(draining).await.unwrap() });
        let channel = connect(socket).await;
        let runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(16 << 20);
        let serving = Serving { tasks, _supervisor: supervisor, server };
        Self { fake, runtime, images: ImageServiceClient::new(channel), root, serving }
    }

    /// Ends the server as a signal does, and starts another in its place.
    pub(crate) async fn restarted(self) -> Self {
        let Self { fake, runtime, images, root, mut serving } = self;
        drop((runtime, images));
        serving.tasks.draining().cancel();
        tokio::time::timeout(PATIENCE, &mut serving.server).await.expect("the server ends").unwrap();
        assert!(!root.path().join("cri.sock").exists(), "the socket goes with the server");
        Self::of(fake, root).await
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.path().join("logs")
    }

    /// A sandbox of this Pod.
    pub(crate) fn config(&self, uid: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: format!("pod-{uid}"),
                uid: uid.into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            log_directory: self.logs().display().to_string(),
            labels: map(&[("app", uid), ("io.kubernetes.pod.uid", uid)]),
            annotations: map(&[("note", "kept")]),
            ..Default::default()
        }
    }

    pub(crate) async fn run(&mut self, config: v1::PodSandboxConfig) -> Result<String, Status> {
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub(crate) async fn sandbox(&mut self, uid: &str) -> String {
        let config = self.config(uid);
        self.run(config).await.unwrap()
    }

    /// A container that does what these words say (see the table of the fake runtime).
    pub(crate) async fn create(&mut self, sandbox: &str, name: &str, words: &str) -> Result<String, Status> {
        let config = container(name, words);
        self.create_from(sandbox, config).await
    }

    pub(crate) async fn create_from(&mut self, sandbox: &str, config: v1::ContainerConfig) -> Result<String, Status> {
        let request =
            v1::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: None };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, id: &str) -> Result<(), Status> {
        self.runtime.start_container(v1::StartContainerRequest { container_id: id.into() }).await.map(|_| ())
    }

    pub(crate) async fn started(&mut self, uid: &str, words: &str) -> String {
        let sandbox = self.sandbox(uid).await;
        let id = self.create(&sandbox, "main", words).await.unwrap();
        self.start(&id).await.unwrap();
        id
    }

    pub(crate) async fn sandbox_status(&mut self, id: &str) -> Result<v1::PodSandboxStatusResponse, Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        self.runtime.pod_sandbox_status(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn status(&mut self, id: &str) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
        Ok(self.runtime.container_status(request).await?.into_inner().status.unwrap())
    }

    /// The status once the container has ended.
    pub(crate) async fn ended(&mut self, id: &str) -> v1::ContainerStatus {
        let ended = async {
            loop {
                let status = self.status(id).await.unwrap();
                if status.state() == v1::ContainerState::ContainerExited {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("it ends")
    }
}

pub(crate) async fn connect(socket: PathBuf) -> Channel {
    let dial = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(dial).await.unwrap()
}

pub(crate) fn container(name: &str, words: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: words.split_whitespace().map(str::to_owned).collect(),
        envs: vec![v1::KeyValue { key: "PASSWORD".into(), value: b"s3cret".to_vec() }],
        labels: map(&[("container", name)]),
        annotations: map(&[("hash", "1")]),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

pub(crate) fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The code of a call that must fail.
pub(crate) fn refused<T>(result: Result<T, Status>) -> Code {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(status) => {
            assert!(!status.message().is_empty(), "a refusal says why");
            status.code()
        }
    }
}
