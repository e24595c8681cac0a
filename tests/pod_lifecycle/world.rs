//! A node without a host: the Pod loop and everything behind it, over the fake runtime and the API server in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lambdalet::config::PodSettings;
use lambdalet::events;
use lambdalet::metrics::Metrics;
use lambdalet::network::ipam::Ipam;
use lambdalet::node::{NodeFacts, Registration};
use lambdalet::pod::addresses::Addresses;
use lambdalet::pod::admission::Admission;
use lambdalet::pod::capacity::Capacity;
use lambdalet::pod::classes::RuntimeClasses;
use lambdalet::pod::crew::Environments;
use lambdalet::pod::directory::Directory;
use lambdalet::pod::drivers::Drivers;
use lambdalet::pod::eviction::Orders;
use lambdalet::pod::files::DnsSettings;
use lambdalet::pod::images::Images;
use lambdalet::pod::inputs::Inputs;
use lambdalet::pod::inputs::objects::Objects;
use lambdalet::pod::mirror::{self, Mirrors};
use lambdalet::pod::publish::{PublishCounters, Publisher};
use lambdalet::pod::static_pods::StaticPods;
use lambdalet::pod::translate::Host;
use lambdalet::pod::volumes::VolumeManager;
use lambdalet::pod::{Fronts, PodLoop, Shared};
use lambdalet::quantity::Quantity;
use lambdalet::runtime::fake::FakeRuntime;
use lambdalet::runtime::handler::{Handlers, Named};
use lambdalet::runtime::types::{ContainerState, ContainerStatus, SandboxStatus};
use lambdalet::runtime::{Kind, Runtime, RuntimeError, SandboxRuntime};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::api::{Api, NODE};
use super::pods::PodBuilder;

/// How long anything may take that should happen "at once"; less than the ten seconds after which the Pod loop tries
/// again by itself, so that nothing that waits for those passes for a reaction.
pub(crate) const SOON: Duration = Duration::from_secs(8);
/// How long something may take that is tried again after ten seconds.
pub(crate) const LATER: Duration = Duration::from_secs(25);

/// What a test may choose.
pub(crate) struct Setup {
    /// Longest wait between two starts of a container that keeps ending.
    pub(crate) max_restart_backoff: Duration,
    /// Room for Pods: cpu, and their number.
    pub(crate) room: (i64, i64),
    /// The Pods' addresses.
    pub(crate) range: &'static str,
    /// Who runs which Pods.
    pub(crate) drivers: Drivers,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_restart_backoff: Duration::from_secs(300),
            room: (8, 110),
            range: "10.77.0.0/24",
            drivers: Drivers::only("fake"),
        }
    }
}

/// The node and what is around it. The Pod loop ends with it, or with [`World::crash`].
pub(crate) struct World {
    pub(crate) api: Api,
    pub(crate) runtime: FakeRuntime,
    /// What runs Pods of the handler `microvm`, where there is one.
    pub(crate) guests: FakeRuntime,
    pub(crate) setup: Setup,
    pub(crate) root: tempfile::TempDir,
    /// What the files of static Pods say.
    pub(crate) statics: watch::Sender<StaticPods>,
    process: Option<Process>,
}

/// What a restart loses.
struct Process {
    shared: Arc<Shared>,
    stop: CancellationToken,
    closing: CancellationToken,
    /// The Pod loop.
    pods: JoinSet<()>,
    /// Writers of statuses and events.
    writers: JoinSet<()>,
    // Kept so that the receivers stay open.
    _facts: watch::Sender<NodeFacts>,
    _registration: watch::Sender<Option<Registration>>,
}

pub(crate) fn unavailable() -> RuntimeError {
    RuntimeError::new(Kind::Unavailable, "the daemon is out to lunch")
}

impl World {
    /// A running node with an empty cluster.
    pub(crate) fn new() -> Self {
        Self::with(Setup::default())
    }

    pub(crate) fn with(setup: Setup) -> Self {
        let mut world = Self::stopped(setup);
        world.start();
        world
    }

    /// A node whose process does not run yet.
    pub(crate) fn stopped(setup: Setup) -> Self {
        // Secrets are never written to disk, and /dev/shm is memory that needs no right to mount.
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in ["pods", "secrets"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let statics = watch::Sender::new(StaticPods::none());
        let (runtime, guests) = (FakeRuntime::new(), FakeRuntime::new());
        Self { api: Api::new(), runtime, guests, setup, root, statics, process: None }
    }

    /// Starts the process; what an earlier one left is what it finds.
    pub(crate) fn start(&mut self) {
        let client = self.api.client();
        let (drain, draining) = watch::channel(false);
        let (facts, facts_seen) = watch::channel(self.facts());
        let (registration, registered) = watch::channel(Some(Registration {
            labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]),
            ..Registration::default()
        }));
        let publisher = Publisher::new(client.clone(), PublishCounters::default());
        let (events, event_writer) = events::events(client.clone(), NODE, Default::default());
        let objects = Arc::new(Objects::new(client.clone(), Duration::from_millis(1)));
        let range = self.setup.range.parse().unwrap();
        let ipam = Ipam::open(&self.root.path().join("addresses"), range, Duration::ZERO).unwrap();
        let shared = Arc::new(Shared {
            runtime: self.drivers(),
            runtime_name: "fake".to_owned(),
            drivers: self.setup.drivers.clone(),
            classes: RuntimeClasses::new(client.clone()),
            publisher: publisher.clone(),
            events,
            volumes: VolumeManager::new(client.clone(), Arc::clone(&objects), self.root.path()),
            inputs: Inputs::new(client.clone(), objects),
            dns: DnsSettings { cluster_domain: "cluster.local".to_owned(), ..DnsSettings::default() },
            addresses: Addresses::new(Arc::new(ipam)),
            admission: Admission::default(),
            capacity: Capacity::new(&self.facts().allocatable),
            evictions: Orders::default(),
            environments: Environments::default(),
            fronts: Fronts::new(&Metrics::default()),
            directory: Arc::default(),
            images: Images::new(1),
            probes: lambdalet::pod::probes::Bounds::default(),
            facts: facts_seen,
            registration: registered.clone(),
            host: self.host(),
            settings: PodSettings {
                root_dir: self.root.path().to_owned(),
                max_restart_backoff: self.setup.max_restart_backoff,
                ..PodSettings::default()
            },
            draining,
        });
        let (stop, closing) = (CancellationToken::new(), CancellationToken::new());
        let mut writers = JoinSet::new();
        let until = closing.clone();
        writers.spawn(async move { publisher.run(until).await });
        writers.spawn(event_writer.run(closing.clone()));
        let mut pods = JoinSet::new();
        let (work, worked) = watch::channel(mirror::Work::default());
        let mirrors = Mirrors::new(client.clone(), NODE, worked, registered);
        writers.spawn(mirrors.run(closing.clone()));
        let process = PodLoop::new(Arc::clone(&shared), client, drain);
        let process = process.with_static_pods(self.statics.subscribe(), work);
        pods.spawn(process.run(stop.clone(), true));
        let kept = (facts, registration);
        self.process = Some(Process { shared, stop, closing, pods, writers, _facts: kept.0, _registration: kept.1 });
    }

    fn drivers(&self) -> Arc<dyn Runtime> {
        if self.setup.drivers.offered.len() == 1 {
            return Arc::new(self.runtime.clone());
        }
        let named = |handler: &str, runtime: &FakeRuntime| Named {
            handler: handler.to_owned(),
            runtime: Arc::new(runtime.clone()),
        };
        let own = named(&self.setup.drivers.own, &self.runtime);
        Arc::new(Handlers::new(own, vec![named("microvm", &self.guests)], "fake"))
    }

    fn facts(&self) -> NodeFacts {
        let (cpu, pods) = self.setup.room;
        let room = [("cpu", cpu), ("memory", 8 << 30), ("pods", pods)];
        let room: BTreeMap<_, _> = room.into_iter().map(|(n, q)| (n.to_owned(), Quantity::from_units(q))).collect();
        let addresses = vec!["10.0.0.5".parse().unwrap()];
        NodeFacts { name: NODE.to_owned(), addresses, capacity: room.clone(), allocatable: room }
    }

    fn host(&self) -> Host {
        Host {
            cgroup_root: "lambdalet-test".to_owned(),
            seccomp_root: self.root.path().join("seccomp"),
            memory: 8 << 30,
            cpu_quota: true,
            pids_limit: None,
        }
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("the process runs")
    }

    pub(crate) fn directory(&self) -> Arc<Directory> {
        self.process().shared.directory.clone()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.process().shared
    }

    /// Ends the process as kill -9 does.
    pub(crate) fn crash(&mut self) {
        self.process = None;
    }

    /// Asks the process to drain and end.
    pub(crate) fn begin_drain(&self) {
        self.process().stop.cancel();
    }

    /// Waits until the process has ended, the last statuses included.
    pub(crate) async fn ended(&mut self) {
        let mut process = self.process.take().expect("the process runs");
        let end = async {
            while let Some(ended) = process.pods.join_next().await {
                ended.unwrap();
            }
            process.closing.cancel();
            while let Some(ended) = process.writers.join_next().await {
                ended.unwrap();
            }
        };
        tokio::time::timeout(LATER, end).await.expect("the process ends");
    }

    /// Creates the Pod; its UID.
    pub(crate) fn create(&self, pod: PodBuilder) -> String {
        self.api.create("pods", pod.build())
    }

    /// Creates the Pod and waits until it runs and the API server knows.
    pub(crate) async fn running(&self, pod: PodBuilder) -> String {
        let pod = pod.build();
        let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
        let uid = self.api.create("pods", pod);
        self.until_phase(&name, "Running").await;
        uid
    }

    pub(crate) async fn until_phase(&self, name: &str, phase: &str) {
        until(&format!("{name} is {phase}"), || self.api.phase(name) == phase).await;
    }

    /// Waits until the container of that name runs in this attempt, and gives it.
    pub(crate) async fn attempt(&self, uid: &str, name: &str, attempt: u32) -> ContainerStatus {
        let began = Instant::now();
        loop {
            let all = self.containers(uid).await;
            let found = all.iter().find(|c| c.name == name && c.attempt == attempt);
            if let Some(found) = found.filter(|c| c.state == ContainerState::Running) {
                return found.clone();
            }
            assert!(began.elapsed() < SOON, "waited in vain for attempt {attempt} of {name} of {uid}: {all:#?}");
            tokio::time::sleep(PAUSE).await;
        }
    }

    pub(crate) async fn containers(&self, uid: &str) -> Vec<ContainerStatus> {
        self.runtime.list_containers(Some(uid)).await.unwrap()
    }

    pub(crate) async fn sandboxes(&self, uid: &str) -> Vec<SandboxStatus> {
        self.runtime.list_pod_sandboxes(Some(uid)).await.unwrap()
    }

    /// How many sandboxes there are.
    pub(crate) async fn all_sandboxes(&self) -> usize {
        self.runtime.list_pod_sandboxes(None).await.unwrap().len()
    }

    /// A Pod of which the API server knows nothing runs; its UID. The process must not run, or it would end it.
    pub(crate) async fn leave_an_orphan(&mut self, name: &str) -> String {
        self.start();
        let uid = self.running(super::pods::pod(name)).await;
        self.crash();
        self.api.remove(name);
        uid
    }

    /// Waits until nothing of the Pod is left.
    pub(crate) async fn until_swept(&self, uid: &str) {
        until(&format!("{uid} is swept"), || self.shared().addresses.held().iter().all(|(_, holder)| holder != uid))
            .await;
        assert!(self.sandboxes(uid).await.is_empty() && self.containers(uid).await.is_empty());
    }

    /// After the process has ended: the runtime holds nothing.
    pub(crate) async fn assert_the_runtime_is_empty(&self) {
        let left = (self.runtime.list_pod_sandboxes(None).await, self.runtime.list_containers(None).await);
        let (sandboxes, containers) = (left.0.unwrap(), left.1.unwrap());
        assert!(sandboxes.is_empty() && containers.is_empty(), "this is left: {sandboxes:#?} {containers:#?}");
    }

    /// What is left of any Pod: in the runtime, on disk, among the addresses and in the directory.
    async fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let sandboxes = self.runtime.list_pod_sandboxes(None).await;
        left.extend(sandboxes.into_iter().flatten().map(|s| format!("sandbox {}", s.id)));
        let containers = self.runtime.list_containers(None).await;
        left.extend(containers.into_iter().flatten().map(|c| format!("container {} {}", c.name, c.id)));
        left.extend(self.on_disk().into_iter().map(|path| path.display().to_string()));
        if let Some(process) = &self.process {
            left.extend(process.shared.addresses.held().into_iter().map(|(address, _)| format!("address {address}")));
            let pods = lambdalet::kubelet_api::targets::PodTargets::pods(&*process.shared.directory);
            left.extend(pods.iter().map(|pod| format!("directory entry {:?}", pod.metadata.uid)));
        }
        left
    }

    fn on_disk(&self) -> Vec<PathBuf> {
        let places = ["pods", "secrets"].map(|name| self.root.path().join(name));
        places.iter().flat_map(|place| std::fs::read_dir(place).unwrap()).map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits until nothing is left of any Pod, within `limit`.
    pub(crate) async fn until_nothing_is_left_within(&self, limit: Duration) {
        let began = Instant::now();
        loop {
            let left = self.left().await;
            if left.is_empty() {
                return;
            }
            assert!(began.elapsed() < limit, "this is left: {left:#?}");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits until the API server has no Pod and nothing is left of any.
    pub(crate) async fn until_gone(&self, name: &str) {
        until(&format!("the object of {name} is gone"), || self.api.pod(name).is_none()).await;
        self.until_nothing_is_left_within(SOON).await;
    }
}

/// Time between two looks while waiting.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until it holds, at most [`SOON`].
pub(crate) async fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(SOON, what, holds).await;
}

pub(crate) async fn until_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "waited in vain until {what}");
        tokio::time::sleep(PAUSE).await;
    }
}
