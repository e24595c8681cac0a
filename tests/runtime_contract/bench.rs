//! One driver under test, what its containers can be told to do, and the cleaning up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures::{FutureExt, TryStreamExt};
use lambdalet::network::Cable;
use lambdalet::network::bridge::Bridge;
use lambdalet::runtime::Runtime;
use lambdalet::runtime::cri::{CriOptions, CriRuntime};
use lambdalet::runtime::docker::{DockerOptions, DockerRuntime, NoCable};
use lambdalet::runtime::fake::FakeRuntime;
use lambdalet::runtime::handler::{Handlers, Named};
use lambdalet::runtime::microvm::fake::FakeVms;
use lambdalet::runtime::microvm::host::{HostOptions, HostVms};
use lambdalet::runtime::microvm::image;
use lambdalet::runtime::microvm::logs::LogLimits;
use lambdalet::runtime::microvm::machine::VmmUser;
use lambdalet::runtime::microvm::machine::qemu::{AccelChoice, Qemu};
use lambdalet::runtime::microvm::volumes::Places;
use lambdalet::runtime::microvm::{MicrovmOptions, MicrovmRuntime};
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, ImageId, LogChunk, LogOptions, MachineFiles, Mount,
    NamespaceMode, PodRef, Resources, SandboxConfig, SandboxId, SandboxNetwork,
};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// Distinguishes the benches of one process.
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// Held by whoever looks for the template of all microVMs, and makes it if there is none.
static TEMPLATE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Longer than anything but a stuck driver takes on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The network of a bench with machines, in a namespace of its own.
pub(crate) const GATEWAY: [u8; 4] = [10, 99, 0, 1];
const RANGE: &str = "10.99.0.0/24";
const BRIDGE: &str = "lbcontract";
/// What the containers of a machine can write, in bytes.
pub(crate) const SCRATCH: u64 = 256 << 20;
/// The socket of a containerd.
const CONTAINERD: &str = "LAMBDALET_TEST_CONTAINERD";
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
    /// Whether its logs lose a carriage return before the end of a line, as those of containerd do.
    pub(crate) drops_carriage_returns: bool,
    fake: bool,
    machines: Option<Machines>,
    folder: TempDir,
}

/// What a bench makes machines of.
struct Machines {
    bundle: PathBuf,
    templates: PathBuf,
    /// How many guests wait for Pods.
    warm: usize,
    bridge: Bridge,
    /// Those of the driver under test, which nobody keeps but it.
    vms: Weak<HostVms>,
}

/// Whose templates the machines of a bench are restored from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Templates {
    /// Those of all benches, in which there is one.
    Shared,
    /// The same, and two guests that were restored from it wait.
    Waiting,
    /// Its own, of which there is none.
    Own,
}

/// Runs a case and cleans up whether it passes or not; without a bench it is skipped, and why was said.
pub(crate) async fn run(bench: Option<Bench>, case: impl AsyncFnOnce(&Bench)) {
    run_changing(bench, async |bench: &mut Bench| case(bench).await).await;
}

/// The same for a case that does something to the bench itself.
pub(crate) async fn run_changing(bench: Option<Bench>, case: impl AsyncFnOnce(&mut Bench)) {
    let Some(mut bench) = bench else { return };
    let result = AssertUnwindSafe(case(&mut bench)).catch_unwind().await;
    let left = bench.clean_up().await;
    if let Err(panic) = result {
        resume_unwind(panic);
    }
    assert_eq!(left, Vec::<String>::new(), "left behind");
}

/// Runs a test of machines on a thread with a network of its own, as if that were a host.
pub(crate) fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if std::env::var_os("LAMBDALET_TEST_GUEST").is_none() {
        println!("skipped: LAMBDALET_TEST_GUEST names no guest (hack/guest makes one)");
        return;
    }
    let run = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root may make a network namespace");
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        resume_unwind(panic);
    }
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
            drops_carriage_returns: false,
            fake: true,
            machines: None,
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
        Self { runtime, stranger, has_host_network: false, ..fake }
    }

    /// `None` unless the environment asks for it.
    pub(crate) async fn docker() -> Option<Self> {
        if std::env::var_os("LAMBDALET_TEST_DOCKER").is_none_or(|value| value != "1") {
            println!("skipped: set LAMBDALET_TEST_DOCKER=1 to run this case against the local Docker daemon");
            return None;
        }
        let owner = format!("contract-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let docker = Docker::connect_with_unix("/var/run/docker.sock", 120, bollard::API_DEFAULT_VERSION).unwrap();
        let (image, image_ref) = import_image(&docker, &owner).await;
        let stranger = DockerRuntime::connect(DockerOptions::new(format!("{owner}-other")), Arc::new(NoCable)).await;
        let bench = Self {
            runtime: connect(&owner, Arc::new(NoCable)).await,
            stranger: Arc::new(stranger.unwrap()),
            image,
            image_ref,
            docker: Some(docker),
            owner,
            handler: None,
            has_host_network: true,
            drops_carriage_returns: false,
            fake: false,
            machines: None,
            folder: tempfile::tempdir().unwrap(),
        };
        Some(bench)
    }

    /// A containerd, spoken to in CRI; `None` unless the environment names one.
    pub(crate) async fn cri() -> Option<Self> {
        let (Some(socket), Some(ctr)) = (std::env::var_os(CONTAINERD), std::env::var_os("LAMBDALET_TEST_CTR")) else {
            println!("skipped: {CONTAINERD} and LAMBDALET_TEST_CTR name no containerd (hack/containerd starts one)");
            return None;
        };
        let socket = PathBuf::from(socket);
        let owner = format!("contract-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::tempdir().unwrap();
        let (image, image_ref) = import_into(Path::new(&ctr), &socket, &owner, folder.path());
        let connect = async |owner: &str| {
            let options = CriOptions::new(owner, folder.path().join("logs").join(owner));
            let options = CriOptions { endpoint: format!("unix://{}", socket.display()), ..options };
            let runtime: Arc<dyn Runtime> = Arc::new(CriRuntime::connect(options, Arc::new(NoCable)).await.unwrap());
            runtime
        };
        let runtime = connect(&owner).await;
        let begun = Instant::now();
        // Its CRI half hears of the import by an event.
        while runtime.image_status(&image_ref).await.unwrap().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the image is not there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Some(Self {
            runtime,
            stranger: connect(&format!("{owner}-other")).await,
            image,
            image_ref,
            docker: None,
            owner,
            handler: None,
            has_host_network: true,
            drops_carriage_returns: true,
            fake: false,
            machines: None,
            folder,
        })
    }

    /// Machines of QEMU beside the Docker daemon, whose images they run, on one bridge; `None` unless the environment asks
    /// for it. To be made [`on_a_host`].
    pub(crate) async fn microvm(templates: Templates) -> Option<Self> {
        let bundle = std::env::var_os("LAMBDALET_TEST_GUEST").map(PathBuf::from)?;
        let docker = Self::docker().await?;
        let bridge = Bridge::ensure(BRIDGE, GATEWAY.into(), RANGE.parse().unwrap()).await.unwrap();
        let warm = if templates == Templates::Waiting { 2 } else { 0 };
        let templates = match templates {
            Templates::Shared | Templates::Waiting => Path::new(env!("CARGO_TARGET_TMPDIR")).join("microvm-templates"),
            Templates::Own => docker.folder.path().join("templates"),
        };
        let machines = Some(Machines { bundle, templates, warm, bridge, vms: Weak::new() });
        let mut bench = Self { machines, handler: Some("microvm".to_owned()), has_host_network: false, ..docker };
        bench.restart().await;
        Some(bench)
    }

    /// Ends the drivers, as with their process.
    pub(crate) fn hang_up(&mut self) {
        // The last one who has it.
        self.runtime = Arc::clone(&self.stranger);
    }

    /// What runs machines.
    pub(crate) fn qemu() -> Qemu {
        Qemu::new("/usr/bin/qemu-system-x86_64".into(), VmmUser::default(), AccelChoice::Auto)
    }

    /// Ends the drivers, and starts others.
    pub(crate) async fn restart(&mut self) {
        self.hang_up();
        let machines = self.machines.as_ref().expect("this bench has machines");
        let Machines { bundle, templates, warm, bridge, .. } = machines;
        let root = self.root();
        let images = image::Options { docker: Some("/var/run/docker.sock".into()), ..image::Options::default() };
        let images = image::Store::open(&root.join("images"), images).await.unwrap();
        let options = HostOptions {
            templates: templates.clone(),
            warm: *warm,
            cgroup: self.owner.clone(),
            scratch: SCRATCH,
            upkeep: Duration::from_millis(100),
            taps: Some(Arc::new(bridge.clone())),
            ..HostOptions::new(root.clone(), bundle.clone())
        };
        let vms = Arc::new(HostVms::open(options, Arc::new(Self::qemu())).await.unwrap());
        if !templates.starts_with(self.folder.path()) {
            // All cases have guests of one size.
            let _turn = TEMPLATE.lock().await;
            vms.prepare(&self.sandbox_config("p").resources).await.unwrap();
        }
        let places = Places { host_paths: vec![self.folder.path().to_owned()], ..Places::default() };
        let options = MicrovmOptions { owner: self.owner.clone(), root, places, logs: LogLimits::default() };
        let microvm = MicrovmRuntime::open(options, Arc::clone(&vms) as _, Arc::new(images)).await.unwrap();
        let named = |handler: &str, runtime| Named { handler: handler.to_owned(), runtime };
        let docker = named("docker", connect(&self.owner, Arc::new(bridge.clone())).await);
        self.runtime = Arc::new(Handlers::new(docker, vec![named("microvm", Arc::new(microvm))], "docker"));
        self.machines.as_mut().expect("as above").vms = Arc::downgrade(&vms);
    }

    /// Waits until as many guests wait for Pods as are to, and none is on its way.
    pub(crate) async fn all_wait(&self) {
        let Machines { warm, vms, .. } = self.machines.as_ref().expect("this bench has machines");
        let begun = Instant::now();
        loop {
            let waiting = vms.upgrade().expect("its driver is there").waiting();
            if waiting == Some(*warm) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{waiting:?} wait");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Where the driver of machines keeps what it has.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("microvm")
    }

    /// Where this bench's own templates are.
    pub(crate) fn own_templates(&self) -> PathBuf {
        self.folder.path().join("templates")
    }

    /// What there is of machines on this host: directories, interfaces, rules, mounts, cgroups, processes.
    pub(crate) fn of_machines(&self) -> Vec<String> {
        let Some(machines) = &self.machines else { return Vec::new() };
        let mut found = Vec::new();
        for place in ["vms/default", "vms/making", "sandboxes"] {
            let entries = std::fs::read_dir(self.root().join(place)).into_iter().flatten();
            found.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        let mut lines = |said: String, wanted: &str| {
            found.extend(said.lines().filter(|line| line.contains(wanted)).map(|line| line.trim().to_owned()));
        };
        lines(output("ip", &["-o", "link", "show", "master", machines.bridge.name()]), ": lt");
        lines(output("nft", &["list", "ruleset"]), "\"lt");
        lines(output("ip", &["-o", "route"]), "10.99.0.7 ");
        let folder = self.folder.path().display().to_string();
        lines(std::fs::read_to_string("/proc/self/mounts").unwrap(), &folder);
        for process in directories(Path::new("/proc")) {
            let cgroups = std::fs::read_to_string(process.join("cgroup")).unwrap_or_default();
            if cgroups.contains(&format!("/{}/", self.owner)) {
                let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
                found.push(format!("{} ({})", process.display(), name.trim()));
            }
        }
        found
    }

    /// A driver for the same owner, as after a restart of the process.
    pub(crate) async fn again(&self) -> Arc<dyn Runtime> {
        connect(&self.owner, Arc::new(NoCable)).await
    }

    /// Removes everything; what would not go is returned.
    async fn clean_up(&mut self) -> Vec<String> {
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
        if let Some(machines) = self.machines.as_mut().filter(|machines| machines.warm > 0) {
            // Guests that wait are nobody's to the next driver.
            machines.warm = 0;
            self.restart().await;
        }
        let begun = Instant::now();
        // A template may still be in the making.
        while !self.of_machines().is_empty() && begun.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        left.extend(self.of_machines());
        if !self.fake {
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
        self.fake
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
            network: SandboxNetwork::Pod { address: self.address(pod).into() },
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: format!("/{}/pod-{pod}", self.owner),
            resources: Resources { cpu_shares: Some(128), memory_limit: Some(256 << 20), ..Resources::default() },
            machine: MachineFiles::default(),
        }
    }

    /// Where a Pod is reached. Those that talk to each other have names of one letter.
    pub(crate) fn address(&self, pod: &str) -> [u8; 4] {
        match pod.as_bytes() {
            [b'p'] => [10, 99, 0, 7],
            [letter] => [10, 99, 0, *letter],
            several => [10, 99, 0, 128 + several.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) % 100],
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
        if self.handler.is_some() {
            // Nobody enters a guest from outside.
            let listen = self.script(&format!("exec busybox nc -ll -p {port} -e cat"));
            let config = self.container_config(pod, "echo", listen);
            let id = self.runtime.create_container(&sandbox, &config).await.unwrap();
            self.runtime.start_container(&id).await.unwrap();
            while self.runtime.port_forward(&sandbox, port).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
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
        Mount { host_path, container_path: "/data".into(), read_only: true, ..Mount::default() }
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

    /// The same, and says `ready` once a signal would not be lost.
    pub(crate) fn listens(&self) -> Vec<String> {
        self.says("print|ready|idle", "trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done")
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

async fn connect(owner: &str, cable: Arc<dyn Cable>) -> Arc<dyn Runtime> {
    Arc::new(DockerRuntime::connect(DockerOptions::new(owner), cable).await.unwrap())
}

/// What a program says, which is to succeed.
pub(crate) fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir())
}

/// An image of its own for each bench, so that one test's removal is no other's loss.
async fn import_image(docker: &Docker, owner: &str) -> (ImageId, String) {
    let options = CreateImageOptionsBuilder::new().from_src("-").repo("lambdalet.dev/contract").tag(owner).build();
    let body = bollard::body_full(layer(owner).into());
    docker.create_image(Some(options), Some(body), None).try_for_each(|_| async { Ok(()) }).await.unwrap();
    let reference = format!("lambdalet.dev/contract:{owner}");
    let id = docker.inspect_image(&reference).await.unwrap().id.unwrap();
    (ImageId::from(id), reference)
}

/// The same for a containerd, as an archive that `docker save` would write.
fn import_into(ctr: &Path, socket: &Path, owner: &str, folder: &Path) -> (ImageId, String) {
    let reference = format!("lambdalet.dev/contract:{owner}");
    let layer = layer(owner);
    let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(&layer))]},
    });
    let config = config.to_string().into_bytes();
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [&reference], "Layers": ["layer.tar"]}]);
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in
        [("manifest.json", manifest.to_string().as_bytes()), ("config.json", &config), ("layer.tar", &layer)]
    {
        add(&mut archive, name, 0o644, bytes);
    }
    let path = folder.join("image.tar");
    std::fs::write(&path, archive.into_inner().unwrap()).unwrap();
    let (ctr, socket, path) = (ctr.to_str().unwrap(), socket.to_str().unwrap(), path.to_str().unwrap());
    output(ctr, &["--address", socket, "--namespace", "k8s.io", "images", "import", path]);
    (ImageId::from(format!("sha256:{}", digest(&config))), reference)
}

/// The files of an image. They differ per bench, and so does the image's id.
fn layer(owner: &str) -> Vec<u8> {
    let busybox = std::fs::read(BUSYBOX).expect("a static busybox at /bin/busybox (Debian: busybox-static)");
    let mut archive = tar::Builder::new(Vec::new());
    add(&mut archive, "bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, format!("bin/{applet}"), "busybox").unwrap();
    }
    add(&mut archive, "etc/owner", 0o644, owner.as_bytes());
    archive.into_inner().unwrap()
}

fn add(archive: &mut tar::Builder<Vec<u8>>, name: &str, mode: u32, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, name, bytes).unwrap();
}
