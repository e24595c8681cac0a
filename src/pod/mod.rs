//! The life of a Pod on this node.
//!
//! ```text
//! API server --watch--> watch --spec--> worker (one per Pod UID) --verb--> runtime
//!                        |                  |    ^
//!                        |                  |    '-- plan: what to do next (pure)
//!                 runtime events --wake-----'--status--> publish --PATCH--> API server
//! ```
//! A Pod is known by its UID. Its worker alone acts for it, from the first look at what the runtime already holds until
//! the Pod object and everything of it on this node are gone.

pub mod addresses;
pub mod admission;
pub mod backoff;
pub mod capacity;
pub mod classes;
pub mod crew;
pub mod directory;
pub mod drivers;
pub mod ephemeral;
pub mod eviction;
pub mod fakecloud;
pub mod files;
pub mod garbage;
pub mod guest;
pub mod hooks;
pub mod images;
pub mod inputs;
pub mod mirror;
pub mod node_shutdown;
pub mod observed;
pub mod plan;
pub mod probes;
pub mod publish;
pub mod qos;
pub mod resize;
pub mod static_pods;
pub mod status;
#[cfg(test)]
mod testing;
pub mod translate;
pub mod unsupported;
pub mod volumes;
mod watch;
mod worker;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch as channel;

use self::addresses::Addresses;
use self::admission::{Admission, NodeView};
use self::capacity::Capacity;
use self::classes::RuntimeClasses;
use self::crew::Environments;
use self::directory::Directory;
use self::drivers::Drivers;
use self::eviction::Orders;
use self::files::DnsSettings;
use self::images::Images;
use self::inputs::Inputs;
use self::publish::Publisher;
use self::translate::Host;
use self::volumes::VolumeManager;
pub use self::watch::PodLoop;
use crate::config::PodSettings;
use crate::events::Events;
use crate::failpoint;
use crate::function::{front, service};
use crate::metrics::Metrics;
use crate::node::{NodeFacts, Registration};
use crate::runtime::{Runtime, RuntimeError};

/// What inputs and volumes are computed from.
#[derive(Clone, Copy, Debug)]
pub struct PodContext<'a> {
    /// The Pod, its latest spec.
    pub pod: &'a Pod,
    /// Whose volumes: the Pod's UID, or the replica of a function Pod.
    pub key: &'a str,
    /// The node it runs on.
    pub node: &'a NodeFacts,
    /// The Pod's addresses; empty before the sandbox has one.
    pub addresses: &'a [IpAddr],
}

/// What the fronts of all functions of the node share.
pub struct Fronts {
    /// The bounds of each.
    pub limits: front::Limits,
    /// The bound on all their connections.
    pub connections: front::NodeConnections,
    /// What they count.
    pub meters: front::Meters,
    /// What the pools behind them count.
    pub pools: service::Meters,
}

/// Most clients' connections of all functions at once: each takes a file descriptor, and another for its environment.
const CONNECTIONS: usize = 8192;

impl Fronts {
    /// With every bound at its default.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            limits: front::Limits::default(),
            connections: front::NodeConnections::new(CONNECTIONS),
            meters: front::Meters::new(metrics),
            pools: service::Meters::new(metrics),
        }
    }
}

/// What every worker uses.
pub struct Shared {
    /// Runs the containers.
    pub runtime: Arc<dyn Runtime>,
    /// The scheme of container ids in Pod status, for those of the node's own driver.
    pub runtime_name: String,
    /// Who runs which Pods.
    pub drivers: Drivers,
    /// What RuntimeClasses mean.
    pub classes: RuntimeClasses,
    /// Writes statuses.
    pub publisher: Publisher,
    /// Takes events.
    pub events: Events,
    /// Makes volumes.
    pub volumes: VolumeManager,
    /// Reads ConfigMaps, Secrets and Services.
    pub inputs: Inputs,
    /// What the node knows about names.
    pub dns: DnsSettings,
    /// Who has which address.
    pub addresses: Addresses,
    /// Who was let in.
    pub admission: Admission,
    /// Who uses what of the node.
    pub capacity: Capacity,
    /// The environments of function Pods.
    pub environments: Environments,
    /// What the fronts of functions share.
    pub fronts: Fronts,
    /// Which Pods have to go.
    pub evictions: Orders,
    /// What is known of each Pod.
    pub directory: Arc<Directory>,
    /// Fetches images.
    pub images: Images,
    /// The bounds on all probes.
    pub probes: probes::Bounds,
    /// The node as Pods see it.
    pub facts: channel::Receiver<NodeFacts>,
    /// The Node object, whose labels a Pod's selectors are checked against.
    pub registration: channel::Receiver<Option<Registration>>,
    /// The node as translations see it.
    pub host: Host,
    /// What the operator told this node of Pods.
    pub settings: PodSettings,
    /// True once the node drains: every Pod ends.
    pub draining: channel::Receiver<bool>,
}

impl Shared {
    fn node_view(&self) -> NodeView {
        let facts = self.facts.borrow();
        let labels = self.registration.borrow().as_ref().map(|node| node.labels.clone()).unwrap_or_default();
        NodeView { labels, name: facts.name.clone(), allocatable: facts.allocatable.clone() }
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.settings.root_dir.join("pods").join(uid)
    }

    fn termination_log(&self, uid: &str, container: &str, attempt: u32) -> PathBuf {
        self.pod_dir(uid).join("containers").join(container).join(attempt.to_string())
    }

    /// Removes the Pod's sandboxes and containers.
    async fn remove_from_runtime(&self, uid: &str) -> Result<(), RuntimeError> {
        for sandbox in self.runtime.list_pod_sandboxes(Some(uid)).await? {
            self.runtime.remove_pod_sandbox(&sandbox.id).await?;
            failpoint::hit("remove");
        }
        // What is left has lost its sandbox.
        for container in self.runtime.list_containers(Some(uid)).await? {
            self.runtime.remove_container(&container.id).await?;
        }
        Ok(())
    }

    fn forget(&self, uid: &str) {
        self.admission.leave(uid);
        self.capacity.leave(uid);
        self.directory.remove(uid);
        drop(self.evictions.take(uid));
    }
}
