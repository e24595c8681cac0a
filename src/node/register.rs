//! The owner of the Node object: makes it, adopts it, keeps its status true.
//!
//! ```text
//! absent --POST--> present --PATCH status (changed, or five minutes old)--> present
//!   ^                 '--watch says deleted, or a PATCH meets 404--> absent
//! ```

use std::net::IpAddr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::machine::{Load, Machine};
use super::news::news;
use super::object::{self, Inputs, Pressure, PressureMemory, RuntimeFacts};
use super::{NodeError, NodeFacts, Params, Registration};
use crate::apiserver::{RequestError, Trouble};
use crate::retry::{Delays, Retry};
use crate::telemetry::chain;

/// How often the runtime's images are listed; they are in the status only for the scheduler's image locality.
const IMAGES_INTERVAL: Duration = Duration::from_secs(30);

/// A runtime that takes longer to list images or tell its version keeps the last answer.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(5);

/// How long the end waits for the last status; shorter than what companions have to end.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(3);

/// Pause before conditions that somebody else wrote are put right again, so that two agents of one name do not race.
const CONTEST_PAUSE: Duration = Duration::from_secs(1);

/// How long the first registration waits for the runtime's first answer, so that a healthy node is never seen NotReady.
const HEALTH_PATIENCE: Duration = Duration::from_secs(2);

/// What was measured before the tasks started.
pub(super) struct Host {
    pub(super) machine: Machine,
    pub(super) addresses: Vec<IpAddr>,
}

/// The owner task's state.
pub(super) struct Registrar {
    params: Params,
    nodes: Api<Node>,
    host: Host,
    facts: watch::Sender<NodeFacts>,
    registration: watch::Sender<Option<Registration>>,
    /// The object as last seen; `None` before registration and after a deletion.
    known: Option<Node>,
    /// The status last sent, and when.
    sent: Option<(NodeStatus, Instant)>,
    runtime: RuntimeFacts,
    images_at: Option<Instant>,
    pressure: PressureMemory,
    short: Pressure,
    /// The API server accepted something from us before.
    met: bool,
    draining: bool,
}

/// Why an attempt failed.
enum Failure {
    Final(NodeError),
    Again(String),
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Self::Again(chain(&error))
    }
}

impl Registrar {
    pub(super) fn new(
        params: Params,
        host: Host,
        (facts, registration): (watch::Sender<NodeFacts>, watch::Sender<Option<Registration>>),
    ) -> Self {
        let nodes = Api::all(params.api.client.clone());
        let health = params.health.borrow().clone();
        Self {
            params,
            nodes,
            host,
            facts,
            registration,
            known: None,
            sent: None,
            runtime: RuntimeFacts { version: None, images: Vec::new(), health },
            images_at: None,
            pressure: PressureMemory::default(),
            short: Pressure::default(),
            met: false,
            draining: false,
        }
    }

    /// Keeps the Node until `closing`.
    pub(super) async fn run(
        mut self,
        draining: CancellationToken,
        closing: CancellationToken,
    ) -> Result<(), NodeError> {
        let (mut health, mut shutting_down) = (self.params.health.clone(), self.params.shutting_down.clone());
        self.params.events.node_normal("Starting", "Starting lambdalet.");
        // The default waits up to 30 s, and so long a deletion would go unnoticed after an outage.
        let own = watcher::watch_object(self.nodes.clone(), &self.params.settings.name).backoff(Delays::default());
        let mut own = Box::pin(own);
        let mut retry = Retry::new("keep the Node object");
        let mut retry_at: Option<Instant> = None;
        if health.borrow().is_err() {
            // A timeout is fine: the Node is then registered as not ready.
            let _ = tokio::time::timeout(HEALTH_PATIENCE, health.changed()).await;
        }
        loop {
            self.observe(&mut health).await;
            if retry_at.is_none_or(|at| at <= Instant::now()) {
                // Cancel-safe: this is the end, and the next start takes the Node as it finds it.
                let outcome = tokio::select! {
                    () = closing.cancelled() => break,
                    outcome = self.reconcile() => outcome,
                };
                retry_at = match outcome {
                    Ok(()) => {
                        retry.succeeded();
                        None
                    }
                    Err(Failure::Final(error)) => return Err(error),
                    Err(Failure::Again(text)) => Some(Instant::now() + retry.failed(text)),
                };
            }
            let next = Instant::now() + self.params.settings.status_update_frequency;
            let next = retry_at.map_or(next, |at| at.min(next));
            // Cancel-safe: tokens and watch channels keep their state, the stream keeps its position, a dropped sleep
            // is computed anew.
            tokio::select! {
                () = closing.cancelled() => break,
                () = draining.cancelled(), if !self.draining && self.params.settings.drain_on_exit => {
                    self.draining = true;
                }
                event = own.next() => match event {
                    Some(Ok(node)) => self.seen(node),
                    // The stream backs off and starts again by itself; requests report what is wrong.
                    Some(Err(error)) => debug!("watch of the Node object failed: {}", chain(&error)),
                    None => {}
                },
                Ok(()) = shutting_down.changed() => {}
                // Only the end takes the sender away.
                changed = health.changed() => if changed.is_err() { break },
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
        self.farewell().await;
        Ok(())
    }

    /// With `--drain-on-exit` the Node ends as not ready, also if there was nothing to drain.
    async fn farewell(&mut self) {
        if !self.params.settings.drain_on_exit || self.known.is_none() {
            return;
        }
        self.draining = true;
        match tokio::time::timeout(FAREWELL_PATIENCE, self.send_status()).await {
            Ok(Ok(())) => info!("the Node is left as not ready"),
            Ok(Err(Failure::Again(text))) => warn!("the Node is not ready only when its lease ends: {text}"),
            _ => warn!("the Node is not ready only when its lease ends: no answer in {FAREWELL_PATIENCE:?}"),
        }
    }

    /// Takes in what a watch tells of the Node.
    fn seen(&mut self, node: Option<Node>) {
        let version = |node: &Node| node.resource_version().and_then(|version| version.parse::<u64>().ok());
        match (&self.known, node) {
            // The answer to a newer write overtook this event.
            (Some(known), Some(node)) if known.uid() == node.uid() && version(&node) < version(known) => {}
            (_, Some(node)) => self.remember(node),
            // Deleted, or listed before it was made: registering finds out which.
            (_, None) => self.known = None,
        }
    }

    fn remember(&mut self, node: Node) {
        let spec = node.spec.clone().unwrap_or_default();
        let ranges = spec.pod_cidrs.or_else(|| spec.pod_cidr.map(|range| vec![range])).unwrap_or_default();
        let registration = Registration {
            uid: node.uid().unwrap_or_default(),
            pod_cidrs: ranges.iter().filter_map(|range| range.parse().ok()).collect(),
            labels: node.labels().clone(),
            unschedulable: spec.unschedulable.unwrap_or_default(),
        };
        let before = self.registration.borrow().as_ref().map(|known| known.unschedulable);
        if before.is_some_and(|before| before != registration.unschedulable) {
            let now = if registration.unschedulable { "NodeNotSchedulable" } else { "NodeSchedulable" };
            self.params.events.node_is_now(now);
        }
        self.known = Some(node);
        self.registration.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&registration);
            *known = Some(registration);
            changed
        });
    }

    /// Measures the host and asks the runtime.
    async fn observe(&mut self, health: &mut watch::Receiver<super::Health>) {
        self.follow_address();
        self.runtime.health = health.borrow_and_update().clone();
        let settings = &self.params.settings;
        let root_dir = settings.root_dir.clone();
        // A file system that hangs must not hold the heartbeat up.
        let measured = tokio::task::spawn_blocking(move || Load::measure(&root_dir));
        match tokio::time::timeout(RUNTIME_PATIENCE, measured).await {
            Ok(Ok(Ok(load))) => {
                let seen = Pressure::of(settings, &self.host.machine, &load);
                self.short = self.pressure.observe(seen, settings.pressure_transition, Timestamp::now());
            }
            Ok(Ok(Err(error))) => warn!("conditions stay as they are: {}", chain(&error)),
            _ => warn!("conditions stay as they are: measuring the host took more than {RUNTIME_PATIENCE:?}"),
        }
        if self.runtime.health.is_err() {
            // The version may be another one when it comes back.
            self.images_at = None;
        } else if self.images_at.is_none_or(|at| at.elapsed() >= IMAGES_INTERVAL) {
            self.ask_runtime().await;
        }
    }

    /// Takes over the host's address where it has lost the one it had, unless it was told. Another route alone is no
    /// reason, and a host that has none at the moment is between two, or without its cable.
    fn follow_address(&mut self) {
        let is_here = |address: &IpAddr| std::net::UdpSocket::bind((*address, 0)).is_ok();
        if !self.params.settings.addresses.is_empty() || self.host.addresses.iter().any(is_here) {
            return;
        }
        let Some(address) = (self.params.host_address)().filter(|address| self.host.addresses != [*address]) else {
            return;
        };
        info!(before = ?self.host.addresses, now = %address, "the host's address changed");
        self.host.addresses = vec![address];
        self.facts.send_modify(|facts| facts.addresses.clone_from(&self.host.addresses));
    }

    async fn ask_runtime(&mut self) {
        let runtime = &self.params.runtime;
        let both = async { (runtime.version().await, runtime.list_images().await) };
        let Ok((version, images)) = tokio::time::timeout(RUNTIME_PATIENCE, both).await else { return };
        self.images_at = Some(Instant::now());
        match version {
            Ok(version) => self.runtime.version = Some(version),
            Err(error) => debug!("the runtime's version is unknown: {}", chain(&error)),
        }
        match images {
            Ok(images) => self.runtime.images = images,
            Err(error) => debug!("the runtime's images are unknown: {}", chain(&error)),
        }
    }

    fn inputs<'a>(&'a self, previous: &'a [NodeCondition]) -> Inputs<'a> {
        Inputs {
            settings: &self.params.settings,
            addresses: &self.host.addresses,
            machine: &self.host.machine,
            runtime: &self.runtime,
            pressure: self.short,
            draining: self.draining || *self.params.shutting_down.borrow(),
            previous,
            now: Timestamp::now(),
        }
    }

    /// Makes the Node on the API server what it should be.
    async fn reconcile(&mut self) -> Result<(), Failure> {
        if self.known.is_none() {
            if !self.met {
                self.check_identity().await?;
            }
            let node = self.ensure().await?;
            self.met = true;
            self.remember(node);
        }
        self.send_status().await
    }

    /// A `system:node:` identity may only be the node it names (the NodeRestriction admission plugin and the Node
    /// authorizer see to that); saying so beats a 403 for every request.
    async fn check_identity(&self) -> Result<(), Failure> {
        let (api, ours) = (&self.params.api, &self.params.settings.name);
        let identity = match api.whoami().await {
            Ok(identity) => identity,
            Err(error) if error.trouble == Trouble::UnknownAuthority => {
                return Err(Failure::Final(NodeError::Untrusted { name: ours.clone(), source: error }));
            }
            // Not every identity may ask; the registration itself then tells.
            Err(error) if matches!(error.trouble, Trouble::Forbidden | Trouble::NotFound) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match identity.strip_prefix("system:node:") {
            Some(theirs) if theirs != ours => Err(Failure::Final(NodeError::Identity {
                kubeconfig: api.kubeconfig.display().to_string(),
                identity: identity.clone(),
                theirs: theirs.to_owned(),
                ours: ours.clone(),
            })),
            _ => Ok(()),
        }
    }

    /// The Node on the API server: made, or the one that is there with our labels set right.
    async fn ensure(&mut self) -> Result<Node, Failure> {
        let (api, name) = (&self.params.api, &self.params.settings.name);
        if self.params.settings.register {
            let wanted = object::node(&self.inputs(&[]));
            match api.request(self.nodes.create(&PostParams::default(), &wanted)).await {
                Ok(node) => {
                    info!(node = %name, uid = node.uid().unwrap_or_default(), "registered the Node");
                    let told = node.status.as_ref().and_then(|status| status.conditions.as_ref());
                    self.tell(&[], told.map(Vec::as_slice).unwrap_or_default());
                    self.sent = wanted.status.map(|status| (status, Instant::now()));
                    return Ok(node);
                }
                Err(error) if error.trouble == Trouble::Conflict => {}
                Err(error) => return Err(error.into()),
            }
        }
        let Some(node) = api.request(self.nodes.get_opt(name)).await? else {
            // With register it was deleted between the two requests.
            let text = format!("the Node {name} does not exist (and --register-node=false leaves it to others)");
            return Err(Failure::Again(text));
        };
        // Whatever was sent went to an object that may be another one.
        self.sent = None;
        let boot = node.status.as_ref().and_then(|status| status.node_info.as_ref()).map(|info| &info.boot_id);
        let ours = &self.host.machine.boot_id;
        if boot.is_some_and(|boot| !boot.is_empty() && boot != ours) {
            let text = format!("Node {name} has been rebooted, boot id: {ours}");
            self.params.events.node_warning("Rebooted", text);
        }
        self.adopt(node).await
    }

    /// Events tell what has changed.
    fn tell(&self, before: &[NodeCondition], now: &[NodeCondition]) {
        news(before, now).into_iter().for_each(|reason| self.params.events.node_is_now(reason));
    }

    async fn adopt(&self, node: Node) -> Result<Node, Failure> {
        let name = &self.params.settings.name;
        let wanted = object::labels(&self.params.settings);
        if wanted.iter().all(|(key, value)| node.labels().get(key) == Some(value)) {
            debug!(node = %name, "the Node exists");
            return Ok(node);
        }
        info!(node = %name, "the Node exists; setting its labels right");
        let patch = Patch::Strategic(json!({ "metadata": { "labels": wanted } }));
        Ok(self.params.api.request(self.nodes.patch(name, &PatchParams::default(), &patch)).await?)
    }

    /// Sends the status if there is a reason to.
    async fn send_status(&mut self) -> Result<(), Failure> {
        let previous = self.known.as_ref().and_then(|node| node.status.clone()?.conditions).unwrap_or_default();
        let wanted = object::status(&self.inputs(&previous));
        let due = match &self.sent {
            None => true,
            Some((sent, at)) => {
                at.elapsed() >= self.params.settings.status_report_frequency
                    || steady(sent) != steady(&wanted)
                    // Somebody else wrote them: the node lifecycle controller, when we were silent for too long.
                    || at.elapsed() >= CONTEST_PAUSE && !conditions_hold(&wanted, &previous)
            }
        };
        if !due {
            return Ok(());
        }
        let (name, patch) = (&self.params.settings.name, Patch::Strategic(status_patch(&wanted)));
        let answer = self.params.api.request(self.nodes.patch_status(name, &PatchParams::default(), &patch)).await;
        match answer {
            Ok(node) => {
                debug!("sent the Node's status");
                self.tell(&previous, wanted.conditions.as_deref().unwrap_or_default());
                self.sent = Some((wanted, Instant::now()));
                self.remember(node);
                Ok(())
            }
            Err(error) => {
                if error.trouble == Trouble::NotFound {
                    self.known = None;
                }
                Err(error.into())
            }
        }
    }
}

/// The status without what differs each time although nothing happened.
fn steady(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for condition in status.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
        condition.last_transition_time = None;
    }
    status
}

/// Whether the conditions on the API server say what ours say.
fn conditions_hold(wanted: &NodeStatus, there: &[NodeCondition]) -> bool {
    wanted.conditions.iter().flatten().all(|ours| {
        there.iter().any(|theirs| {
            theirs.type_ == ours.type_
                && theirs.status == ours.status
                && theirs.reason == ours.reason
                && theirs.message == ours.message
        })
    })
}

/// A strategic merge patch of the status. Addresses merge by type, so one that went away (or a second InternalIP)
/// would stay: the list is replaced as a whole.
fn status_patch(status: &NodeStatus) -> serde_json::Value {
    let mut status = json!(status);
    if let Some(addresses) = status.get_mut("addresses").and_then(|addresses| addresses.as_array_mut()) {
        addresses.push(json!({ "$patch": "replace" }));
    }
    json!({ "status": status })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeAddress;

    use super::*;

    fn status(ready: &str) -> NodeStatus {
        let condition = NodeCondition {
            type_: "Ready".to_owned(),
            status: ready.to_owned(),
            last_heartbeat_time: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now())),
            ..NodeCondition::default()
        };
        let address = NodeAddress { type_: "InternalIP".to_owned(), address: "10.0.0.5".to_owned() };
        NodeStatus { conditions: Some(vec![condition]), addresses: Some(vec![address]), ..NodeStatus::default() }
    }

    #[test]
    fn addresses_are_replaced_and_not_merged() {
        let patch = status_patch(&status("True"));
        let expected = json!([{ "type": "InternalIP", "address": "10.0.0.5" }, { "$patch": "replace" }]);
        assert_eq!(patch["status"]["addresses"], expected);
    }

    #[test]
    fn a_heartbeat_alone_is_no_change_but_a_condition_is() {
        let (first, second) = (status("True"), status("True"));
        assert_ne!(first, second);
        assert_eq!(steady(&first), steady(&second));
        assert_ne!(steady(&first), steady(&status("False")));
    }

    #[test]
    fn conditions_hold_only_if_each_of_ours_is_there_as_it_is() {
        let ours = status("True");
        assert!(conditions_hold(&ours, &ours.conditions.clone().unwrap()));
        assert!(!conditions_hold(&ours, &status("Unknown").conditions.unwrap()));
        assert!(!conditions_hold(&ours, &[]));
    }
}
