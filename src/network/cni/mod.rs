//! The Pod network of somebody else: plugins of the Container Network Interface (CNI), called as kubelets had them called.
//!
//! ```text
//! plug    record (what, with which configuration) -> namespace kept -> ADD, ADD, ADD (each noted) -> record complete
//! unplug  DEL, DEL, DEL, in reverse, as the record says -> namespace let go -> record removed
//! ```
//! A record that is not complete is of a sandbox that a crash left half plugged in: it is undone and made anew. Each step can
//! be repeated, so whatever is interrupted is finished by the next who tries.
//!
//! Both go on to their end when their caller stops waiting, one at a time for each sandbox: plugins find what they made by
//! what is left of it, so one that is killed half-way leaves what none finds again (Debian's bridge, once its interface is
//! gone, a rule that masquerades the address).
//!
//! Nothing is asked to collect garbage (GC of version 1.1.0): a network may be shared with other nodes of this host, whose
//! sandboxes this one cannot know. What sandboxes of this node have left is taken away one by one ([`Cni::sweep`]).

mod config;
mod error;
mod namespace;
mod plugin;
mod record;
mod result;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use self::config::{Network, type_of};
pub use self::error::{CniError, Refusal};
use self::namespace::Namespaces;
use self::plugin::{About, Call, Plugins};
use self::record::{Record, Records};
use super::bridge::{ended, on_thread};
use super::ports::HostPort;
use super::{Cable, NetworkError};
use crate::failpoint;
use crate::telemetry::chain;
use crate::turns::Turns;

/// Name of the interface inside a sandbox, as every Pod network has it.
const INTERFACE: &str = "eth0";
/// How long one call of a plugin may take before it is killed.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long an answer to STATUS holds.
const STATUS_HOLDS: Duration = Duration::from_secs(10);
/// Sandboxes worked on at once; each has one plugin running.
const AT_ONCE: usize = 8;

/// What plugins are told of a sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// Namespace of its Pod.
    pub namespace: String,
    /// The Pod's name.
    pub name: String,
    /// The Pod's UID.
    pub uid: String,
    /// What the Pod wants.
    pub wish: Wish,
}

/// What a Pod wants of its network, as far as a plugin gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Ports of the host that lead to it (capability `portMappings`).
    pub ports: Vec<HostPort>,
    /// Bits per second that it may receive (capability `bandwidth`).
    pub ingress: Option<u64>,
    /// Bits per second that it may send.
    pub egress: Option<u64>,
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct CniOptions {
    /// The directory of the network's configuration (`--cni-conf-dir`); it is read at each use.
    pub conf_dir: PathBuf,
    /// The directories of the plugins (`--cni-bin-dir`); the first that has one counts.
    pub bin_dirs: Vec<PathBuf>,
    /// Where records and namespaces are kept; one per node.
    pub root: PathBuf,
    /// How long one call may take; [`PATIENCE`] outside tests.
    pub patience: Duration,
}

/// The network that plugins make. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Cni {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    conf_dir: PathBuf,
    plugins: Plugins,
    records: Records,
    namespaces: Namespaces,
    permits: Semaphore,
    turns: Turns<String>,
    /// What is under way.
    work: TaskTracker,
    /// Those of the node, once they are known.
    ranges: watch::Sender<Option<Vec<IpNet>>>,
    /// The network whose plugins were found to work, and when they last said so.
    proven: Mutex<Option<(Network, Instant)>>,
}

// === impl Cni ===

impl Cni {
    /// Nothing is read or called yet.
    pub fn new(options: CniOptions) -> Self {
        let CniOptions { conf_dir, bin_dirs, root, patience } = options;
        let inner = Inner {
            conf_dir,
            plugins: Plugins { dirs: bin_dirs, patience },
            records: Records::new(root.join("results")),
            namespaces: Namespaces::new(root.join("namespaces")),
            permits: Semaphore::new(AT_ONCE),
            turns: Turns::default(),
            work: TaskTracker::new(),
            ranges: watch::Sender::default(),
            proven: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The ranges of the node, for plugins that ask for them (capability `ipRanges`): until they are told, no sandbox is
    /// plugged in by such a plugin.
    pub fn set_ranges(&self, ranges: Vec<IpNet>) {
        self.inner.ranges.send_replace(Some(ranges));
    }

    /// Whether Pods can be plugged in: there is a configuration, and its plugins are there, know its version and (since
    /// 1.1.0) say that they are ready.
    ///
    /// # Errors
    /// What is missing.
    pub async fn ready(&self) -> Result<(), CniError> {
        let network = config::load(&self.inner.conf_dir)?;
        for plugin in network.types() {
            self.inner.plugins.find(plugin)?;
        }
        let proven = self.proven().clone();
        let known = proven.as_ref().filter(|(known, _)| *known == network);
        if known.is_some_and(|(_, at)| !network.version.has_status() || at.elapsed() < STATUS_HOLDS) {
            return Ok(());
        }
        let is_new = known.is_none();
        *self.proven() = None;
        if is_new {
            for plugin in network.types().collect::<BTreeSet<_>>() {
                self.prove(plugin, &network).await?;
            }
        }
        if network.version.has_status() {
            for plugin in &network.plugins {
                let call = Call { command: "STATUS", about: None };
                let told = network.told(plugin, &self.ranges(), None);
                self.inner.plugins.call(type_of(plugin), call, &told).await?;
            }
        }
        if is_new {
            info!(network = network.name, version = %network.version, "the CNI configuration is in use");
        }
        *self.proven() = Some((network, Instant::now()));
        Ok(())
    }

    fn proven(&self) -> std::sync::MutexGuard<'_, Option<(Network, Instant)>> {
        // It is replaced whole, so a panic elsewhere does not spoil it.
        self.inner.proven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a plugin for the versions it knows.
    async fn prove(&self, plugin: &str, network: &Network) -> Result<(), CniError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Versions {
            #[serde(default)]
            supported_versions: Vec<String>,
        }
        let (command, wanted) = ("VERSION", network.version.name());
        let told = json!({ "cniVersion": wanted });
        let answer = self.inner.plugins.call(plugin, Call { command, about: None }, &told).await?;
        let garbled = |error: serde_json::Error| garbled(plugin, command, error.to_string());
        let versions: Versions = serde_json::from_slice(&answer).map_err(garbled)?;
        if versions.supported_versions.iter().any(|version| version == wanted) {
            return Ok(());
        }
        let supported = versions.supported_versions.join(", ");
        Err(CniError::Unsupported { plugin: plugin.to_owned(), wanted: wanted.to_owned(), supported })
    }

    /// The sandboxes that were plugged in, or half so.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn known(&self) -> Result<Vec<String>, NetworkError> {
        self.inner.records.sandboxes()
    }

    /// Takes away what sandboxes have left that are not there any more: of those `known` (asked for before the sandboxes
    /// were listed, so that none is just being made), every one that is not in `there`. How many there were. What fails
    /// is told in the log and tried the next time.
    pub async fn sweep(&self, known: Vec<String>, there: &BTreeSet<String>) -> usize {
        let mut swept = 0;
        for sandbox in known.iter().filter(|sandbox| !there.contains(*sandbox)) {
            match self.unplug(sandbox).await {
                Ok(()) => swept += 1,
                Err(error) => warn!(sandbox, error = chain(&error), "what a sandbox had of its network is still there"),
            }
        }
        swept
    }

    /// Does what is to be done with one sandbox, to its end also if the caller stops waiting.
    async fn whole<T, W>(&self, sandbox: &str, work: impl FnOnce(Self, String) -> W) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, NetworkError>> + Send + 'static,
    {
        let (cni, name) = (self.clone(), sandbox.to_owned());
        let work = work(self.clone(), name.clone());
        let turn = async move {
            let _turn = cni.inner.turns.turn(&name).await;
            work.await
        };
        self.inner.work.spawn(turn).await.map_err(|_| ended())?
    }

    async fn plug_in(self, record: Record, pid: i32) -> Result<Vec<IpAddr>, NetworkError> {
        match self.inner.records.read(&record.sandbox)? {
            Some(there) if there.complete => return Ok(addresses(&there)?),
            Some(_) => self.clone().take_out(record.sandbox.clone()).await?,
            None => {}
        }
        let _permit = self.permit().await?;
        self.inner.records.write(&record)?;
        failpoint::hit("cni-record");
        self.finish(record, pid).await
    }

    async fn take_out(self, sandbox: String) -> Result<(), NetworkError> {
        if let Some(record) = self.inner.records.read(&sandbox)? {
            let _permit = self.permit().await?;
            let namespace = self.inner.namespaces.find(&sandbox);
            let about = About { sandbox: &sandbox, namespace: namespace.as_deref(), args: &record.args };
            self.each("DEL", &record, about).await?;
            failpoint::hit("cni-del");
        }
        let (namespaces, name) = (self.inner.namespaces.clone(), sandbox.clone());
        on_thread(move || namespaces.let_go(&name)).await?;
        // Last: as long as there is a namespace or anything else, there is a record.
        self.inner.records.remove(&sandbox)
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, NetworkError> {
        // Never closed.
        let ended = |source| NetworkError::Kernel { action: "wait for a turn".to_owned(), source };
        self.inner.permits.acquire().await.map_err(|error| ended(std::io::Error::other(error)))
    }

    fn ranges(&self) -> Map<String, Value> {
        let ranges = self.inner.ranges.borrow().clone().unwrap_or_default();
        let sets: Vec<Value> = ranges.iter().map(|range| json!([{ "subnet": range.to_string() }])).collect();
        let filled = (!sets.is_empty()).then(|| ("ipRanges".to_owned(), Value::Array(sets)));
        filled.into_iter().collect()
    }

    /// Calls ADD of each plugin with the result of the one before, and notes each result.
    async fn add(&self, record: &mut Record, namespace: &Path) -> Result<(), NetworkError> {
        let command = "ADD";
        for plugin in record.network.plugins.clone() {
            let about = About { sandbox: &record.sandbox, namespace: Some(namespace), args: &record.args };
            let told = record.network.told(&plugin, &record.capabilities, record.result.as_ref());
            let answer = self.inner.plugins.call(type_of(&plugin), Call { command, about: Some(about) }, &told).await?;
            let answer = serde_json::from_slice::<Value>(&answer)
                .map_err(|error| garbled(type_of(&plugin), command, error.to_string()))?;
            record.result = Some(answer);
            self.inner.records.note(record)?;
        }
        Ok(())
    }

    /// Calls every plugin with the result of all, the last first if it is to undo what they did.
    async fn each(&self, command: &'static str, record: &Record, about: About<'_>) -> Result<(), CniError> {
        let before = record.result.as_ref().filter(|_| record.network.version.has_check());
        let mut plugins: Vec<_> = record.network.plugins.iter().collect();
        if command == "DEL" {
            plugins.reverse();
        }
        for plugin in plugins {
            let told = record.network.told(plugin, &record.capabilities, before);
            self.inner.plugins.call(type_of(plugin), Call { command, about: Some(about) }, &told).await?;
        }
        Ok(())
    }

    /// What is to be plugged in; it waits for the node's ranges, if a plugin asks for them.
    async fn record(&self, sandbox: &str, attachment: &Attachment) -> Result<Record, CniError> {
        let network = config::load(&self.inner.conf_dir)?;
        if network.wants("ipRanges") {
            // The sender lives as long as this does.
            let _ = self.inner.ranges.subscribe().wait_for(Option::is_some).await;
        }
        let mut capabilities = capabilities(&attachment.wish);
        capabilities.append(&mut self.ranges());
        for (name, _) in capabilities.iter().filter(|(name, _)| *name != "ipRanges" && !network.wants(name)) {
            let Attachment { namespace, name: pod, .. } = attachment;
            warn!(namespace, pod, network = network.name, capability = name, "no CNI plugin does what a Pod asks for");
        }
        let (sandbox, args) = (sandbox.to_owned(), args(sandbox, attachment));
        Ok(Record { sandbox, args, capabilities, network, result: None, complete: false })
    }

    /// The end of a plugging: the record is complete.
    async fn finish(&self, mut record: Record, pid: i32) -> Result<Vec<IpAddr>, NetworkError> {
        let (namespaces, name) = (self.inner.namespaces.clone(), record.sandbox.clone());
        let namespace = on_thread(move || namespaces.keep(&name, pid)).await?;
        self.add(&mut record, &namespace).await?;
        failpoint::hit("cni");
        let addresses = addresses(&record)?;
        record.complete = true;
        self.inner.records.write(&record)?;
        Ok(addresses)
    }

    /// Whether the plugins still find what they made.
    async fn check(&self, record: &Record) -> Result<(), CniError> {
        if record.network.disable_check || !record.network.version.has_check() {
            return Ok(());
        }
        let namespace = self.inner.namespaces.find(&record.sandbox);
        let about = About { sandbox: &record.sandbox, namespace: namespace.as_deref(), args: &record.args };
        self.each("CHECK", record, about).await
    }
}

fn garbled(plugin: &str, command: &'static str, reason: String) -> CniError {
    CniError::Garbled { plugin: plugin.to_owned(), command, reason }
}

/// What the last of a sandbox's plugins has answered.
fn addresses(record: &Record) -> Result<Vec<IpAddr>, CniError> {
    let (network, result) = (&record.network, record.result.as_ref().unwrap_or(&Value::Null));
    let last = network.types().next_back().unwrap_or_default();
    let addresses = result::addresses(result).map_err(|reason| garbled(last, "ADD", reason))?;
    if addresses.is_empty() {
        return Err(CniError::NoAddress { network: network.name.clone() });
    }
    Ok(addresses)
}

/// `CNI_ARGS` as kubelets and containerd have them.
fn args(sandbox: &str, attachment: &Attachment) -> String {
    let Attachment { namespace, name, uid, .. } = attachment;
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={sandbox};K8S_POD_UID={uid}"
    )
}

/// What plugins may ask for, in the words of the conventions
/// (<https://github.com/containernetworking/cni/blob/main/CONVENTIONS.md>).
fn capabilities(wish: &Wish) -> Map<String, Value> {
    let mut all = Map::new();
    if !wish.ports.is_empty() {
        let ports = wish.ports.iter().map(|port| {
            let host_ip = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
            let protocol = port.protocol.name();
            json!({"hostPort": port.host_port, "containerPort": port.pod_port, "protocol": protocol, "hostIP": host_ip})
        });
        all.insert("portMappings".to_owned(), ports.collect());
    }
    let mut bandwidth = Map::new();
    for (name, rate) in [("ingress", wish.ingress), ("egress", wish.egress)] {
        if let Some(rate) = rate {
            bandwidth.insert(format!("{name}Rate"), json!(rate));
            // As containerd has it: the rate is the limit, bursts are not.
            bandwidth.insert(format!("{name}Burst"), json!(u32::MAX));
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".to_owned(), Value::Object(bandwidth));
    }
    all
}

#[async_trait]
impl Cable for Cni {
    async fn plug(&self, _pid: i32, sandbox: &str, _addresses: &[IpAddr]) -> Result<(), NetworkError> {
        let reason = "it has an address of the node's own range, and the node uses CNI plugins now";
        Err(CniError::OtherNetwork { sandbox: sandbox.to_owned(), reason }.into())
    }

    async fn attach(&self, pid: i32, sandbox: &str, attachment: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        if let Some(there) = self.inner.records.read(sandbox)?.filter(|there| there.complete) {
            return Ok(addresses(&there)?);
        }
        let record = self.record(sandbox, attachment).await?;
        self.whole(sandbox, |cni, _| cni.plug_in(record, pid)).await
    }

    async fn attached(&self, sandbox: &str) -> Result<Vec<IpAddr>, NetworkError> {
        let half = || CniError::HalfPlugged { sandbox: sandbox.to_owned() };
        let record = self.inner.records.read(sandbox)?.ok_or_else(half)?;
        if !record.complete {
            return Err(half().into());
        }
        let addresses = addresses(&record)?;
        let _permit = self.permit().await?;
        // Plugins in use say no of sandboxes that work (Debian's portmap of those with two families), so this ends none.
        if let Err(error) = self.check(&record).await {
            warn!(sandbox, error = chain(&error), "CNI plugins do not find a sandbox's network as they left it");
        }
        Ok(addresses)
    }

    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError> {
        self.whole(sandbox, Self::take_out).await
    }
}

#[cfg(test)]
mod tests;
