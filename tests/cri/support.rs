//! A server on a socket, and a client of it.
//!
//! The server is one of this process over a runtime in memory, or the one that `LAMBDALET_TEST_CRI` names: the path of a
//! socket of any runtime that speaks CRI v1. There `LAMBDALET_TEST_CRI_IMAGE` is the name of an image with a shell.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
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

use crate::script::script;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The socket of the server that promises are asked of.
pub(crate) const ENDPOINT: &str = "LAMBDALET_TEST_CRI";
/// The image there.
pub(crate) const ENDPOINT_IMAGE: &str = "LAMBDALET_TEST_CRI_IMAGE";
/// The image that containers run of the runtime in memory.
const IMAGE: &str = "docker.io/library/app:1";
/// Bytes of an answer: a kubelet takes as much.
const LONGEST_ANSWER: usize = 16 << 20;
/// The label by which a test knows what is its own, among that of others on the same server.
const MINE: &str = "lambdalet.dev/test";

/// A client of a server.
pub(crate) struct World {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    /// What both use.
    pub(crate) channel: Channel,
    /// Name of the image that containers run.
    pub(crate) image: String,
    /// A word that no other test has.
    word: String,
    folder: TempDir,
    server: Server,
}

/// Who answers.
enum Server {
    Inside(Inside),
    Elsewhere(#[expect(dead_code, reason = "held for its end")] Elsewhere),
}

/// A server in this process; it ends with the test.
struct Inside {
    fake: FakeRuntime,
    tasks: Tasks,
    // Dropped, it would close the queue that failures go to.
    _supervisor: Supervisor,
    server: JoinHandle<()>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.tasks.draining().cancel();
        self.server.abort();
    }
}

/// A server that others use too: what the test made there goes with it.
struct Elsewhere {
    socket: PathBuf,
    word: String,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let (socket, word) = (self.socket.clone(), self.word.clone());
        let clean = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, clean(socket, &word)).await });
            if !matches!(done, Ok(Ok(()))) {
                println!("not all is removed that the test made: {done:?}");
            }
        };
        // A test's own runtime may not be blocked on, and this one may be about to end.
        std::thread::spawn(clean).join().unwrap();
    }
}

async fn clean(socket: PathBuf, word: &str) -> Result<(), Status> {
    let mut client = RuntimeServiceClient::new(connect(socket).await).max_decoding_message_size(LONGEST_ANSWER);
    let filter = v1::PodSandboxFilter { label_selector: map(&[(MINE, word)]), ..Default::default() };
    let listed = client.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }).await?.into_inner();
    for v1::PodSandbox { id, .. } in listed.items {
        client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await?;
        client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id }).await?;
    }
    Ok(())
}

impl World {
    /// A client of the server that promises are asked of.
    pub(crate) async fn new() -> Self {
        let Some(socket) = std::env::var_os(ENDPOINT) else { return Self::inside().await };
        let word: String = rand::random::<[u8; 4]>().iter().map(|byte| format!("{byte:02x}")).collect();
        let elsewhere = Elsewhere { socket: socket.into(), word: word.clone() };
        let channel = connect(elsewhere.socket.clone()).await;
        let image = std::env::var(ENDPOINT_IMAGE).unwrap_or_else(|_| "docker.io/library/busybox:1.36".to_owned());
        Self::of(channel, tempfile::tempdir().unwrap(), Server::Elsewhere(elsewhere), (image, word))
    }

    /// A client of a server in this process, over a runtime in memory.
    pub(crate) async fn inside() -> Self {
        let fake = FakeRuntime::new();
        fake.add_pulled_image(IMAGE);
        Self::over(fake, tempfile::tempdir().unwrap()).await
    }

    async fn over(fake: FakeRuntime, folder: TempDir) -> Self {
        let (tasks, supervisor) = Tasks::new();
        let socket = folder.path().join("cri.sock");
        let params = Params {
            listen: socket.clone(),
            streams: "127.0.0.1:0".parse().unwrap(),
            root: folder.path().join("root"),
            runtime: std::sync::Arc::new(fake.clone()),
            about: About {
                handlers: vec!["fake".into()],
                cgroup_root: "lambdalet-test".into(),
                hostname: "host".into(),
                selinux: false,
            },
            range: (None, "10.188.0.0/16".parse().unwrap()),
            plug: None,
        };
        let cri = Cri::bind(params, &tasks).await.unwrap();
        let draining = tasks.draining();
        let server = tokio::spawn(async move { cri.serve(draining).await.unwrap() });
        let inside = Inside { fake, tasks, _supervisor: supervisor, server };
        Self::of(connect(socket).await, folder, Server::Inside(inside), (IMAGE.to_owned(), "inside".to_owned()))
    }

    fn of(channel: Channel, folder: TempDir, server: Server, (image, word): (String, String)) -> Self {
        // A kubelet makes it too.
        std::fs::create_dir_all(folder.path().join("logs")).unwrap();
        let runtime = RuntimeServiceClient::new(channel.clone());
        let runtime = runtime.max_decoding_message_size(LONGEST_ANSWER).max_encoding_message_size(usize::MAX);
        Self { runtime, images: ImageServiceClient::new(channel.clone()), channel, image, word, folder, server }
    }

    fn within(&self) -> &Inside {
        match &self.server {
            Server::Inside(inside) => inside,
            Server::Elsewhere(_) => panic!("only a server of this process can be asked for this"),
        }
    }

    /// Whether what runs is not real.
    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(self.server, Server::Inside(_))
    }

    /// The runtime in memory.
    pub(crate) fn fake(&self) -> &FakeRuntime {
        &self.within().fake
    }

    /// The directory of the server in this process.
    pub(crate) fn root(&self) -> &Path {
        self.within();
        self.folder.path()
    }

    /// Ends the server as a signal does, and starts another in its place.
    pub(crate) async fn restarted(self) -> Self {
        let Self { runtime, images, channel, folder, server, .. } = self;
        drop((runtime, images, channel));
        let Server::Inside(mut inside) = server else { panic!("a server elsewhere is not ours to end") };
        inside.tasks.draining().cancel();
        tokio::time::timeout(PATIENCE, &mut inside.server).await.expect("the server ends").unwrap();
        assert!(!folder.path().join("cri.sock").exists(), "the socket goes with the server");
        Self::over(inside.fake.clone(), folder).await
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.folder.path().join("logs")
    }

    /// A Pod's UID here.
    pub(crate) fn uid(&self, name: &str) -> String {
        format!("{}-{name}", self.word)
    }

    /// A sandbox of this Pod.
    pub(crate) fn config(&self, name: &str) -> v1::PodSandboxConfig {
        let uid = self.uid(name);
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: format!("pod-{uid}"),
                uid: uid.clone(),
                namespace: "default".into(),
                attempt: 0,
            }),
            log_directory: self.logs().display().to_string(),
            labels: self.labels(&[("app", name), ("io.kubernetes.pod.uid", &uid)]),
            annotations: map(&[("note", "kept")]),
            ..Default::default()
        }
    }

    /// These labels, and the one that says whose it is: no list of a test has what others made.
    pub(crate) fn labels(&self, pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let mut labels = map(pairs);
        labels.insert(MINE.to_owned(), self.word.clone());
        labels
    }

    /// A container that does what these words say (see the table of the fake runtime).
    pub(crate) fn container(&self, name: &str, words: &str) -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: self.command(words),
            envs: vec![v1::KeyValue { key: "PASSWORD".into(), value: b"s3cret".to_vec() }],
            labels: self.labels(&[("container", name)]),
            annotations: map(&[("hash", "1")]),
            log_path: format!("{name}.log"),
            ..Default::default()
        }
    }

    /// The words as a command of the image.
    pub(crate) fn command(&self, words: &str) -> Vec<String> {
        match &self.server {
            Server::Inside(_) => words.split_whitespace().map(str::to_owned).collect(),
            Server::Elsewhere(_) => script(words),
        }
    }

    pub(crate) async fn run(&mut self, config: v1::PodSandboxConfig) -> Result<String, Status> {
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    pub(crate) async fn sandbox(&mut self, name: &str) -> String {
        let config = self.config(name);
        self.run(config).await.unwrap()
    }

    pub(crate) async fn create(&mut self, sandbox: &str, name: &str, words: &str) -> Result<String, Status> {
        let config = self.container(name, words);
        self.create_from(sandbox, config).await
    }

    /// Makes a container in the sandbox; of the Pod's config the request has what a kubelet repeats and runtimes want.
    pub(crate) async fn create_from(&mut self, sandbox: &str, config: v1::ContainerConfig) -> Result<String, Status> {
        let status = self.sandbox_status(sandbox).await?.status.unwrap();
        let sandbox_config = v1::PodSandboxConfig {
            metadata: status.metadata,
            labels: status.labels,
            log_directory: self.logs().display().to_string(),
            ..Default::default()
        };
        self.create_in(sandbox, sandbox_config, config).await
    }

    /// Makes a container in the sandbox that was made from this config.
    pub(crate) async fn create_in(
        &mut self,
        sandbox: &str,
        of_sandbox: v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<String, Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(of_sandbox),
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, id: &str) -> Result<(), Status> {
        self.runtime.start_container(v1::StartContainerRequest { container_id: id.into() }).await.map(|_| ())
    }

    pub(crate) async fn started(&mut self, name: &str, words: &str) -> String {
        let sandbox = self.sandbox(name).await;
        let id = self.create(&sandbox, "main", words).await.unwrap();
        self.start(&id).await.unwrap();
        id
    }

    pub(crate) async fn stop(&mut self, id: &str, timeout: i64) -> Result<(), Status> {
        self.runtime.stop_container(v1::StopContainerRequest { container_id: id.into(), timeout }).await.map(|_| ())
    }

    pub(crate) async fn remove(&mut self, id: &str) -> Result<(), Status> {
        self.runtime.remove_container(v1::RemoveContainerRequest { container_id: id.into() }).await.map(|_| ())
    }

    pub(crate) async fn stop_sandbox(&mut self, id: &str) -> Result<(), Status> {
        self.runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.map(|_| ())
    }

    pub(crate) async fn remove_sandbox(&mut self, id: &str) -> Result<(), Status> {
        self.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.map(|_| ())
    }

    pub(crate) async fn sandbox_status(&mut self, id: &str) -> Result<v1::PodSandboxStatusResponse, Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        self.runtime.pod_sandbox_status(request).await.map(tonic::Response::into_inner)
    }

    /// The address of the sandbox.
    pub(crate) async fn ip(&mut self, id: &str) -> String {
        self.sandbox_status(id).await.unwrap().status.unwrap().network.unwrap_or_default().ip
    }

    /// This test's sandboxes that are also so, by id.
    pub(crate) async fn sandboxes(&mut self, filter: v1::PodSandboxFilter) -> Vec<String> {
        let mut label_selector = self.labels(&[]);
        label_selector.extend(filter.label_selector);
        let filter = v1::PodSandboxFilter { label_selector, ..filter };
        let listed = self.runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }).await.unwrap();
        let mut ids: Vec<_> = listed.into_inner().items.into_iter().map(|sandbox| sandbox.id).collect();
        ids.sort();
        ids
    }

    /// This test's containers that are also so, by id.
    pub(crate) async fn containers(&mut self, filter: v1::ContainerFilter) -> Vec<String> {
        let mut label_selector = self.labels(&[]);
        label_selector.extend(filter.label_selector);
        let filter = v1::ContainerFilter { label_selector, ..filter };
        let listed = self.runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await.unwrap();
        let mut ids: Vec<_> = listed.into_inner().containers.into_iter().map(|container| container.id).collect();
        ids.sort();
        ids
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

    /// The lines of a log without their times, once there are as many as wanted.
    pub(crate) async fn lines(&self, file: &str, wanted: usize) -> Vec<String> {
        let path = self.logs().join(file);
        let read = async {
            loop {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                if text.ends_with('\n') && text.lines().count() >= wanted {
                    return text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("the lines come")
    }

    pub(crate) async fn reopen(&mut self, id: &str) -> Result<(), Status> {
        let request = v1::ReopenContainerLogRequest { container_id: id.into() };
        self.runtime.reopen_container_log(request).await.map(|_| ())
    }
}

pub(crate) async fn connect(socket: PathBuf) -> Channel {
    let dial = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(dial).await.unwrap()
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
