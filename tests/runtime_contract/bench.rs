//! One driver under test, what its containers can be told to do, and the cleaning up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures::{FutureExt, TryStreamExt};
use lambdalet::runtime::Runtime;
use lambdalet::runtime::docker::{DockerOptions, DockerRuntime, NoCable};
use lambdalet::runtime::fake::FakeRuntime;
use lambdalet::runtime::handler::{Handlers, Named};
use lambdalet::runtime::microvm::fake::FakeVms;
use lambdalet::runtime::microvm::logs::LogLimits;
use lambdalet::runtime::microvm::volumes::Places;
use lambdalet::runtime::microvm::{MicrovmOptions, MicrovmRuntime};
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, ImageId, LogChunk, LogOptions, Mount,
    MountPropagation, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxId, SandboxNetwork,
};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// Distinguishes the benches of one process.
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// Longer than anything but a stuck driver takes on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 8] = ["sh", "sleep", "cat", "hostname", "id", "head", "tail", "ls"];

/// A driver with one image and nothing else in it.
pub(crate) struct Bench {
    pub(crate) runtime: Arc<dyn Runtime>,
    /// A second owner on the same engine.
    pub(crate) stranger: Arc<dyn Runtime>,
    pub(crate) image: ImageId,
    pub(crate) image_ref: String,
    pub(crate) docker: Option<Docker>,
    pub(crate) owner: String,
    /// What its sandboxes name as their handler.
    handler: Option<String>,
    /// Whether a sandbox can be on the host's network.
    pub(crate) has_host_network: bool,
    /// Whether what runs can be given other limits.
    pub(crate) resizes: bool,
    folder: TempDir,
}

/// Runs a case and cleans up whether it passes or not; `None` says why it is skipped.
pub(crate) async fn run(bench: Option<Bench>, case: impl AsyncFnOnce(&Bench)) {
    let Some(bench) = bench else {
        println!("skipped: set LAMBDALET_TEST_DOCKER=1 to run this case against the local Docker daemon");
        return;
    };
    let result = AssertUnwindSafe(case(&bench)).catch_unwind().await;
    let left = bench.clean_up().await;
    if let Err(panic) = result {
        resume_unwind(panic);
    }
    assert_eq!(left, Vec::<String>::new(), "left behind");
}

impl Bench {
    pub(crate) fn fake() -> Self {
        let fake = FakeRuntime::new();
        let image_ref = "contract:1".to_owned();
        let image = fake.add_image(&image_ref);
        Self {
            runtime: Arc::new(fake),
            stranger: Arc::new(FakeRuntime::new()),
            image,
            image_ref,
            docker: None,
            owner: String::new(),
            handler: None,
            has_host_network: true,
            resizes: true,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Two fakes side by side, of which the second is under test.
    pub(crate) fn handled() -> Self {
        let (own, other) = (FakeRuntime::new(), FakeRuntime::new());
        let fake = Self::fake();
        for runtime in [&own, &other] {
            assert_eq!(runtime.add_image(&fake.image_ref), fake.image);
        }
        let named = |handler: &str, runtime| Named { handler: handler.to_owned(), runtime: Arc::new(runtime) };
        let runtime = Handlers::new(named("own", own), vec![named("other", other)], "own");
        Self { runtime: Arc::new(runtime), handler: Some("other".to_owned()), ..fake }
    }

    /// The microVM driver on VMs in memory.
    pub(crate) async fn microvm_in_memory() -> Self {
        let fake = Self::fake();
        let driver = async |name: &str| {
            let vms = FakeVms::new();
            assert_eq!(vms.engine.add_image(&fake.image_ref), fake.image);
            let root = fake.folder.path().join(name);
            let places = Places { host_paths: vec![fake.folder.path().to_owned()], ..Places::default() };
            let options = MicrovmOptions { owner: name.to_owned(), root, places, logs: LogLimits::default() };
            let images = Arc::new(vms.engine.clone());
            Arc::new(MicrovmRuntime::open(options, Arc::new(vms), images).await.unwrap())
        };
        let (runtime, stranger) = (driver("own").await, driver("stranger").await);
        Self { runtime, stranger, has_host_network: false, resizes: false, ..fake }
    }

    /// `None` unless the environment asks for it.
    pub(crate) async fn docker() -> Option<Self> {
        if std::env::var_os("LAMBDALET_TEST_DOCKER").is_none_or(|value| value != "1") {
            return None;
        }
        let owner = format!("contract-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let docker = Docker::connect_with_unix("/var/run/docker.sock", 120, bollard::API_DEFAULT_VERSION).unwrap();
        let (image, image_ref) = import_image(&docker, &owner).await;
        let stranger = DockerRuntime::connect(DockerOptions::new(format!("{owner}-other")), Arc::new(NoCable)).await;
        let bench = Self {
            runtime: connect(&owner).await,
            stranger: Arc::new(stranger.unwrap()),
            image,
            image_ref,
            docker: Some(docker),
            owner,
            handler: None,
            has_host_network: true,
            resizes: true,
            folder: tempfile::tempdir().unwrap(),
        };
        Some(bench)
    }

    /// A driver for the same owner, as after a restart of the process.
    pub(crate) async fn again(&self) -> Arc<dyn Runtime> {
        connect(&self.owner).await
    }

    /// Removes everything; what would not go is returned.
    async fn clean_up(&self) -> Vec<String> {
        let mut left = Vec::new();
        for runtime in [&self.runtime, &self.stranger] {
            for sandbox in runtime.list_pod_sandboxes(None).await.unwrap() {
                runtime.remove_pod_sandbox(&sandbox.id).await.unwrap();
            }
            for container in runtime.list_containers(None).await.unwrap() {
                runtime.remove_container(&container.id).await.unwrap();
            }
            left.extend(runtime.list_pod_sandboxes(None).await.unwrap().into_iter().map(|left| format!("{left:?}")));
            left.extend(runtime.list_containers(None).await.unwrap().into_iter().map(|left| format!("{left:?}")));
        }
        let _ = self.runtime.remove_image(&self.image).await;
        if self.docker.is_some() {
            for tree in std::fs::read_dir("/sys/fs/cgroup").unwrap() {
                let root = tree.unwrap().path().join(&self.owner);
                if root.is_dir() {
                    left.extend(directories(&root).map(|path| path.display().to_string()));
                    let _ = std::fs::remove_dir(root);
                }
            }
        }
        left
    }

    pub(crate) fn is_fake(&self) -> bool {
        self.docker.is_none()
    }

    pub(crate) fn pod(&self, name: &str) -> PodRef {
        PodRef { uid: format!("uid-{name}"), namespace: "contract".into(), name: name.into() }
    }

    pub(crate) fn sandbox_config(&self, pod: &str) -> SandboxConfig {
        SandboxConfig {
            pod: self.pod(pod),
            handler: self.handler.clone(),
            attempt: 0,
            hostname: format!("host-{pod}"),
            network: SandboxNetwork::Pod { address: [10, 99, 0, 7].into() },
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: format!("/{}/pod-{pod}", self.owner),
            resources: Resources { cpu_shares: Some(128), memory_limit: Some(256 << 20), ..Resources::default() },
        }
    }

    pub(crate) async fn sandbox(&self, pod: &str) -> SandboxId {
        self.runtime.run_pod_sandbox(&self.sandbox_config(pod)).await.unwrap()
    }

    pub(crate) fn container_config(&self, pod: &str, name: &str, command: Vec<String>) -> ContainerConfig {
        ContainerConfig {
            image_ref: self.image_ref.clone(),
            cgroup_parent: format!("/{}/pod-{pod}", self.owner),
            ..ContainerConfig::new(self.pod(pod), name, self.image.clone(), command)
        }
    }

    /// The sandbox of a Pod in which something sends back what comes to a port of 127.0.0.1.
    pub(crate) async fn echoes(&self, pod: &str, port: u16) -> SandboxId {
        let sandbox = self.sandbox(pod).await;
        if self.is_fake() {
            let config = self.container_config(pod, "echo", vec!["listen".into(), port.to_string()]);
            let id = self.runtime.create_container(&sandbox, &config).await.unwrap();
            self.runtime.start_container(&id).await.unwrap();
            // It listens once its program has come so far.
            while self.runtime.port_forward(&sandbox, port).await.is_err() {
                tokio::task::yield_now().await;
            }
            return sandbox;
        }
        let pid = self.runtime.pod_sandbox_status(&sandbox).await.unwrap().pid.unwrap();
        self.listen(pid, SocketAddr::from(([127, 0, 0, 1], port)));
        sandbox
    }

    /// Listens in the network namespace of a process, and sends back what comes, until the test ends.
    // The tasks end with the test, as its runtime does.
    #[allow(clippy::disallowed_methods)]
    pub(crate) fn listen(&self, pid: i32, address: SocketAddr) {
        // No cable was plugged in, and that is what sets loopback up.
        let up = ["-t", &pid.to_string(), "-n", "ip", "link", "set", "lo", "up"].map(str::to_owned);
        assert!(Command::new("nsenter").args(up).status().unwrap().success());
        let enter = move || {
            let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            std::net::TcpListener::bind(address).unwrap()
        };
        let listener = std::thread::spawn(enter).join().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
    }

    /// A container of Pod "p" that has been started.
    pub(crate) async fn started(&self, name: &str, command: Vec<String>) -> ContainerId {
        let sandbox = self.sandbox("p").await;
        let id = self.runtime.create_container(&sandbox, &self.container_config("p", name, command)).await.unwrap();
        self.runtime.start_container(&id).await.unwrap();
        id
    }

    /// A container that wrote `bytes` to standard output and exited.
    pub(crate) async fn wrote(&self, name: &str, bytes: &[u8]) -> ContainerId {
        let sandbox = self.sandbox("p").await;
        let config =
            ContainerConfig { mounts: vec![self.file(name, bytes)], ..self.container_config("p", name, self.cats()) };
        let id = self.runtime.create_container(&sandbox, &config).await.unwrap();
        self.runtime.start_container(&id).await.unwrap();
        self.exited(&id).await;
        id
    }

    /// A file with this content, mounted at /data.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> Mount {
        let host_path: PathBuf = self.folder.path().join(name);
        std::fs::write(&host_path, bytes).unwrap();
        Mount { host_path, container_path: "/data".into(), read_only: true, propagation: MountPropagation::Private }
    }

    /// Waits until the container has exited.
    pub(crate) async fn exited(&self, id: &ContainerId) -> ContainerStatus {
        let begun = Instant::now();
        loop {
            let status = self.runtime.container_status(id).await.unwrap();
            if status.state == ContainerState::Exited {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "still {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn log(&self, id: &ContainerId, options: LogOptions) -> Vec<LogChunk> {
        let stream = self.runtime.logs(id, &options).await.unwrap();
        tokio::time::timeout(PATIENCE, stream.try_collect()).await.expect("the log ends").unwrap()
    }

    /// A command in the fake's words (by `|`), or as a shell script.
    pub(crate) fn says(&self, fake: &str, shell: &str) -> Vec<String> {
        if self.is_fake() {
            fake.split('|').map(str::to_owned).collect()
        } else {
            ["/bin/sh", "-c", shell].map(str::to_owned).to_vec()
        }
    }

    /// Runs until it is asked to end, then does at once.
    pub(crate) fn idles(&self) -> Vec<String> {
        self.says("idle", "trap 'exit 143' TERM; while :; do sleep 0.05; done")
    }

    /// Runs until it is killed.
    pub(crate) fn stubborn(&self) -> Vec<String> {
        self.says("stubborn", "trap '' TERM; while :; do sleep 1; done")
    }

    pub(crate) fn exits(&self, code: i32) -> Vec<String> {
        self.says(&format!("exit|{code}"), &format!("exit {code}"))
    }

    /// Writes two lines to standard output and one to standard error, a moment between each, and exits.
    pub(crate) fn speaks(&self) -> Vec<String> {
        self.says(
            "print|one|sleep|100|warn|two|sleep|100|print|three|exit|0",
            "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three",
        )
    }

    fn cats(&self) -> Vec<String> {
        self.says("cat|/data|exit|0", "cat /data")
    }

    pub(crate) fn missing(&self) -> Vec<String> {
        if self.is_fake() { vec!["missing".into()] } else { vec!["/no/such/command".into()] }
    }

    /// A command that exists and is no program.
    pub(crate) fn refused(&self) -> Vec<String> {
        if self.is_fake() { vec!["refused".into()] } else { vec!["/bin".into()] }
    }

    /// A shell script, on a real engine.
    pub(crate) fn script(&self, text: &str) -> Vec<String> {
        self.says("exit|0", text)
    }
}

pub(crate) fn text(chunks: &[LogChunk]) -> Vec<u8> {
    chunks.iter().flat_map(|chunk| chunk.bytes.iter().copied()).collect()
}

async fn connect(owner: &str) -> Arc<dyn Runtime> {
    Arc::new(DockerRuntime::connect(DockerOptions::new(owner), Arc::new(NoCable)).await.unwrap())
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir())
}

/// An image of its own for each bench, so that one test's removal is no other's loss.
async fn import_image(docker: &Docker, owner: &str) -> (ImageId, String) {
    let busybox = std::fs::read(BUSYBOX).expect("a static busybox at /bin/busybox (Debian: busybox-static)");
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(busybox.len() as u64);
    archive.append_data(&mut header, "bin/busybox", busybox.as_slice()).unwrap();
    for applet in APPLETS {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, format!("bin/{applet}"), "busybox").unwrap();
    }
    // Differs per bench, and so does the image's id.
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(owner.len() as u64);
    archive.append_data(&mut header, "etc/owner", owner.as_bytes()).unwrap();
    let options = CreateImageOptionsBuilder::new().from_src("-").repo("lambdalet.dev/contract").tag(owner).build();
    let body = bollard::body_full(archive.into_inner().unwrap().into());
    docker.create_image(Some(options), Some(body), None).try_for_each(|_| async { Ok(()) }).await.unwrap();
    let reference = format!("lambdalet.dev/contract:{owner}");
    let id = docker.inspect_image(&reference).await.unwrap().id.unwrap();
    (ImageId::from(id), reference)
}
