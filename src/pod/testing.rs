//! A node for unit tests: everything that workers use, over the runtime in memory and without an API server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::addresses::Addresses;
use super::admission::Admission;
use super::capacity::Capacity;
use super::classes::RuntimeClasses;
use super::crew::Environments;
use super::drivers::Drivers;
use super::eviction::Orders;
use super::files::DnsSettings;
use super::images::Images;
use super::inputs::Inputs;
use super::inputs::objects::Objects;
use super::probes;
use super::publish::{PublishCounters, Publisher};
use super::translate::Host;
use super::volumes::VolumeManager;
use super::worker::{Desired, Past, Signal, Worker};
use super::{Fronts, Shared};
use crate::apiserver::ApiServer;
use crate::config::PodSettings;
use crate::events;
use crate::metrics::Metrics;
use crate::network::ipam::Ipam;
use crate::node::{NodeFacts, Registration};
use crate::runtime::fake::FakeRuntime;
use crate::runtime::types::{ContainerState, ContainerStatus, PodRef};

/// The UID of [`pod`].
pub(super) const UID: &str = "u";

/// See the module text.
pub(super) struct Node {
    pub(super) shared: Arc<Shared>,
    pub(super) runtime: FakeRuntime,
    _root: tempfile::TempDir,
}

impl Node {
    /// To be made within a tokio runtime.
    pub(super) fn new() -> Self {
        // Secrets are never written to disk, and /dev/shm is memory that needs no right to mount.
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in ["pods", "secrets"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let runtime = FakeRuntime::new();
        let client = ApiServer::nowhere().client;
        let objects = Arc::new(Objects::new(client.clone(), Duration::ZERO));
        let ipam = Ipam::open(&root.path().join("addresses"), "10.77.0.0/24".parse().unwrap(), Duration::ZERO).unwrap();
        let addresses = vec!["10.0.0.5".parse().unwrap()];
        let (capacity, allocatable) = Default::default();
        let facts = NodeFacts { name: "n".to_owned(), addresses, capacity, allocatable };
        let shared = Shared {
            runtime: Arc::new(runtime.clone()),
            runtime_name: "fake".to_owned(),
            drivers: Drivers::only("fake"),
            classes: RuntimeClasses::of_manifests(),
            publisher: Publisher::new(client.clone(), PublishCounters::default()),
            events: events::events(client.clone(), "n", Default::default()).0,
            volumes: VolumeManager::new(client.clone(), Arc::clone(&objects), root.path()),
            inputs: Inputs::new(client, objects),
            dns: DnsSettings::default(),
            addresses: Addresses::new(Arc::new(ipam)),
            admission: Admission::default(),
            capacity: Capacity::new(&facts.allocatable),
            environments: Environments::default(),
            fronts: Fronts::new(&Metrics::default()),
            evictions: Orders::default(),
            directory: Arc::default(),
            images: Images::new(1),
            probes: probes::Bounds::default(),
            facts: watch::Sender::new(facts).subscribe(),
            registration: watch::Sender::new(Some(Registration::default())).subscribe(),
            host: Host {
                cgroup_root: "lambdalet-test".to_owned(),
                seccomp_root: root.path().join("seccomp"),
                memory: 8 << 30,
                cpu_quota: true,
                pids_limit: None,
            },
            settings: PodSettings { root_dir: root.path().to_owned(), ..PodSettings::default() },
            draining: watch::Sender::new(false).subscribe(),
        };
        Self { shared: Arc::new(shared), runtime, _root: root }
    }

    /// The owner of a Pod that nobody has touched yet.
    pub(super) fn worker(&self, pod: Pod) -> Worker {
        let desired = watch::Sender::new(Desired { pod: Arc::new(pod), gone: false }).subscribe();
        let signal = watch::Sender::new(Signal::default()).subscribe();
        Worker::new(Arc::clone(&self.shared), desired, signal, Past::None)
    }
}

/// A Pod of this spec.
pub(super) fn pod(spec: Value) -> Pod {
    let metadata = json!({ "name": "p", "namespace": "ns", "uid": UID });
    serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()
}

/// A function Pod of this spec.
pub(super) fn function(spec: Value) -> Pod {
    let mut pod = pod(spec);
    pod.metadata.labels = Some([("com.openfaas.scale.max".to_owned(), "1".to_owned())].into());
    pod
}

/// What is told of a container; nothing of its times, its image and how it ended.
pub(super) fn container_status(pod: &PodRef, id: &str, name: &str, state: ContainerState) -> ContainerStatus {
    ContainerStatus {
        id: id.into(),
        sandbox: "sandbox".into(),
        pod: pod.clone(),
        name: name.to_owned(),
        attempt: 0,
        state,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        started_at: None,
        finished_at: None,
        frozen: false,
        exit_code: 0,
        oom_killed: false,
        message: String::new(),
        image: "".into(),
        image_ref: String::new(),
        pid: None,
        resources: None,
        annotations: BTreeMap::new(),
    }
}
