//! The Node object: registered, kept fresh, and its lease.
//!
//! ```text
//! Settings + Machine --> object --+
//! runtime --health--> ------------+--> register --POST/PATCH--> API server
//! API server --watch own Node--> -+        |
//! host's route --look with each status----> +--> NodeFacts, Registration (watch channels) --> pod, network, identity
//!                                          '--> lease --PUT--> API server
//! ```
//! Both tasks are companions ([`crate::shutdown`]): they last until the Pods have had their time, so a node that drains
//! is not taken for dead meanwhile. A clean end sends nothing: the Node stays Ready until its lease runs out, because
//! an upgrade of the agent is no outage of its Pods.

pub mod health;
pub mod identity;
pub mod lease;
pub mod machine;
mod news;
pub mod object;
pub mod owner;
mod register;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use tokio::sync::watch;

use crate::apiserver::{ApiServer, RequestError};
use crate::config::{DEFAULT_POD_CIDR, NodeSettings};
use crate::events::Events;
use crate::runtime::Runtime;
use crate::shutdown::Tasks;
use machine::{Machine, MachineError};
use object::{Inputs, Pressure, RuntimeFacts};

/// How long after registration `spec.podCIDR` is waited for; a controller-manager that hands ranges out does so at once.
const POD_CIDR_PATIENCE: Duration = Duration::from_secs(5);

/// Whether Pods can be run, and if not, why, in words for the Ready condition.
pub type Health = Result<(), String>;

/// Facts about this node that Pods may ask for.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// The node's name.
    pub name: String,
    /// Its InternalIPs, the primary first. Without `--node-ip` they follow the host's.
    pub addresses: Vec<IpAddr>,
    /// What the host has of the same.
    pub capacity: std::collections::BTreeMap<String, crate::quantity::Quantity>,
    /// What Pods may use of it: `cpu`, `memory`, `ephemeral-storage`, `pods` (and `hugepages-*`), to a quantity each.
    pub allocatable: std::collections::BTreeMap<String, crate::quantity::Quantity>,
}

/// The Node object as the API server has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// `metadata.uid`; another one after the Node was deleted and registered again.
    pub uid: String,
    /// `spec.podCIDRs`, the primary first; empty until somebody hands them out.
    pub pod_cidrs: Vec<IpNet>,
    /// The Node's labels, which node affinity and the downward API of other rooms look at.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Whether it is cordoned.
    pub unschedulable: bool,
}

/// Why the node cannot go on. Everything else is retried.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The host could not be measured.
    #[error("failed to measure this host")]
    Machine(#[from] MachineError),
    /// No address was told or found.
    #[error("this host has no route to take its address from: pass --node-ip")]
    NoAddress,
    /// The reservations and thresholds take everything.
    #[error("nothing of {0} is left for Pods: lower --system-reserved, --kube-reserved or evictionHard")]
    NothingLeft(String),
    /// The credentials are those of another node.
    #[error(
        "the identity in {kubeconfig} is {identity}, which may only be the node {theirs:?}, but this node is called \
         {ours:?}: pass --node-name {theirs} or take credentials for system:node:{ours}"
    )]
    Identity {
        /// The kubeconfig.
        kubeconfig: String,
        /// Its user name.
        identity: String,
        /// The only name it may register.
        theirs: String,
        /// The name asked for.
        ours: String,
    },
    /// The API server can never be trusted with the CA at hand.
    #[error("failed to register node {name}")]
    Untrusted {
        /// The node.
        name: String,
        /// Why.
        #[source]
        source: RequestError,
    },
}

/// What the room needs.
#[derive(Clone)]
pub struct Params {
    /// The way to the API server.
    pub api: Arc<ApiServer>,
    /// What the node was told.
    pub settings: Arc<NodeSettings>,
    /// Asked for its version and images.
    pub runtime: Arc<dyn Runtime>,
    /// Whether Pods can be run.
    pub health: watch::Receiver<Health>,
    /// Takes what there is to tell of the Node.
    pub events: Events,
    /// True once the host goes down, and false again if it does not.
    pub shutting_down: watch::Receiver<bool>,
    /// Where the node's address comes from if none was told: [`default_route_address`], or a test's own.
    pub host_address: fn() -> Option<IpAddr>,
}

/// What the room gives to others.
#[derive(Clone, Debug)]
pub struct NodeHandle {
    /// Known before the API server was ever reached.
    pub facts: watch::Receiver<NodeFacts>,
    /// `None` until the Node is registered for the first time.
    pub registration: watch::Receiver<Option<Registration>>,
}

impl NodeHandle {
    /// The ranges of Pod addresses, one of each family at most: `told` if there are any, else what `spec.podCIDRs` says a
    /// few seconds after registration, else [`DEFAULT_POD_CIDR`]. Waits for the API server as long as that takes.
    pub async fn pod_ranges(&self, told: &[IpNet]) -> Vec<IpNet> {
        if !told.is_empty() {
            return told.to_vec();
        }
        match self.handed_out_ranges().await {
            none if none.is_empty() => vec![default_pod_range()],
            ranges => ranges,
        }
    }

    /// What `spec.podCIDRs` says a few seconds after registration, the primary first; none if nobody hands ranges out.
    /// Waits for the API server as long as that takes.
    pub async fn handed_out_ranges(&self) -> Vec<IpNet> {
        let mut registration = self.registration.clone();
        // An error means that the node task ended, and with it the process.
        let _ = registration.wait_for(Option::is_some).await;
        let handed_out = |known: &Option<Registration>| known.as_ref().is_some_and(|node| !node.pod_cidrs.is_empty());
        let known = tokio::time::timeout(POD_CIDR_PATIENCE, registration.wait_for(handed_out)).await;
        match known {
            Ok(Ok(known)) => known.as_ref().map(|node| node.pod_cidrs.clone()).unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

fn default_pod_range() -> IpNet {
    DEFAULT_POD_CIDR.parse().expect("the constant is a range")
}

/// What others are told of a node that is in no cluster: there is no Node object, and it never changes.
///
/// # Errors
/// If the host cannot be measured. Without a route to the outside its address is that of loopback.
pub fn standalone(settings: &NodeSettings) -> Result<NodeHandle, NodeError> {
    let addresses = match &settings.addresses[..] {
        [] => vec![default_route_address().unwrap_or(Ipv4Addr::LOCALHOST.into())],
        told => told.to_vec(),
    };
    let (_, facts) = measure(settings, addresses)?;
    let registration = Registration { labels: object::labels(settings), ..Registration::default() };
    Ok(NodeHandle { facts: watch::channel(facts).1, registration: watch::channel(Some(registration)).1 })
}

/// Measures the host and starts the room's two tasks.
///
/// # Errors
/// If the host cannot be measured or has no address; the API server is not waited for.
pub fn spawn(params: Params, tasks: &Tasks) -> Result<NodeHandle, NodeError> {
    let settings = Arc::clone(&params.settings);
    let addresses = match &settings.addresses[..] {
        [] => vec![(params.host_address)().ok_or(NodeError::NoAddress)?],
        told => told.to_vec(),
    };
    let (host, facts) = measure(&settings, addresses)?;
    let (facts_sender, facts) = watch::channel(facts);
    let (registration_sender, registration) = watch::channel(None);

    let lease = lease::Lease::new(Arc::clone(&params.api), &settings, registration.clone());
    let registrar = register::Registrar::new(params, host, (facts_sender, registration_sender));
    let (draining, closing) = (tasks.draining(), tasks.closing());
    tasks.spawn_companion("node", async move { registrar.run(draining, closing).await.map_err(Into::into) });
    let closing = tasks.closing();
    tasks.spawn_companion("lease", async move {
        lease.run(closing).await;
        Ok(())
    });
    Ok(NodeHandle { facts, registration })
}

/// The host, and what Pods may ask of it.
fn measure(settings: &NodeSettings, addresses: Vec<IpAddr>) -> Result<(register::Host, NodeFacts), NodeError> {
    let machine = Machine::measure(&settings.root_dir)?;
    let unknown = RuntimeFacts { version: None, images: Vec::new(), health: Ok(()) };
    let facts = object::facts(&Inputs {
        settings,
        addresses: &addresses,
        machine: &machine,
        runtime: &unknown,
        pressure: Pressure::default(),
        draining: false,
        previous: &[],
        now: Timestamp::now(),
    });
    for resource in ["cpu", "memory"] {
        if facts.allocatable.get(resource).is_none_or(|amount| amount.is_zero()) {
            return Err(NodeError::NothingLeft(resource.to_owned()));
        }
    }
    Ok((register::Host { machine, addresses }, facts))
}

/// The address this host would speak from to the outside. Connecting a UDP socket sends nothing; it only looks the
/// route up (the addresses are those RFC 5737 and RFC 3849 set aside for documentation).
pub fn default_route_address() -> Option<IpAddr> {
    let via = |from: IpAddr, to: IpAddr| -> Option<IpAddr> {
        let socket = UdpSocket::bind(SocketAddr::new(from, 0)).ok()?;
        socket.connect(SocketAddr::new(to, 9)).ok()?;
        let address = socket.local_addr().ok()?.ip();
        (!address.is_loopback() && !address.is_unspecified()).then_some(address)
    };
    via(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into())
        .or_else(|| via(Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()))
}
