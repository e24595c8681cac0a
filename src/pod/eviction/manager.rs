//! Looks every ten seconds whether Pods have to go, and says which.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use tokio_util::sync::CancellationToken;

use super::{ContainerUse, End, IMMEDIATELY, Judge, Limit, Observation, Order, REASON, Shortage, Signal, Use};
use crate::config::NodeSettings;
use crate::kubelet_api::targets::PodTargets as _;
use crate::node::machine::{Load, Machine, MachineError};
use crate::node::object::{Pressure, PressureMemory};
use crate::pod::garbage::Collector;
use crate::pod::status::{Trouble, is_terminal};
use crate::pod::{Shared, crew, plan};
use crate::runtime::RuntimeError;
use crate::runtime::disk::Disk;
use crate::runtime::stats::{DiskUsage, SandboxStats, StatsScope};
use crate::shutdown::Ticks;
use crate::telemetry::chain;

/// How often it is looked (the kubelet's value).
pub const INTERVAL: Duration = Duration::from_secs(10);
/// How long a Pod that was told to go is waited for before it is looked again.
const CLEANUP: Duration = Duration::from_secs(30);
/// Pace of that.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What is left of the host's resources.
pub type Observe = dyn Fn() -> Result<BTreeMap<Signal, Observation>, MachineError> + Send + Sync;

/// The limits that the settings come to.
pub fn limits(settings: &NodeSettings) -> Vec<Limit> {
    let reclaim = |name: &str| settings.eviction_minimum_reclaim.get(name).copied();
    let hard = settings.eviction_hard.iter().map(|(name, threshold)| (name, threshold, Duration::ZERO));
    let soft = settings.eviction_soft.iter().filter_map(|(name, threshold)| {
        let grace = settings.eviction_soft_grace_period.get(name)?;
        Some((name, threshold, (*grace).max(Duration::from_millis(1))))
    });
    let limit = |(name, threshold, grace): (&String, &_, _)| {
        Some(Limit { signal: Signal::named(name)?, threshold: *threshold, grace, reclaim: reclaim(name) })
    };
    hard.chain(soft).filter_map(limit).collect()
}

/// What this host tells of itself; `root` names the file system that is watched.
///
/// # Errors
/// If it cannot be measured at all.
pub fn observer(root: PathBuf) -> Result<Box<Observe>, MachineError> {
    let machine = Machine::measure(&root)?;
    Ok(Box::new(move || {
        let load = Load::measure(&root)?;
        let of = |available, capacity| Observation { available, capacity };
        Ok(BTreeMap::from([
            (Signal::Memory, of(load.memory_available, machine.memory)),
            (Signal::Disk, of(load.storage_available, machine.storage)),
            (Signal::Inodes, of(load.inodes_free, machine.inodes)),
            (Signal::Pids, of(load.pids_available, load.pids)),
        ]))
    }))
}

/// Looks, and orders.
pub struct Manager {
    shared: Arc<Shared>,
    observe: Arc<Observe>,
    judge: Judge,
    pressure: PressureMemory,
    transition: Duration,
    max_grace: Duration,
    images: Arc<tokio::sync::Mutex<Collector>>,
    volumes: Arc<Disk>,
}

/// What one Pod uses.
#[derive(Clone, Debug, Default)]
struct PodUse {
    all: Use,
    containers: Vec<ContainerUse>,
    volumes: BTreeMap<String, u64>,
}

impl Manager {
    /// One that goes by the settings and what `observe` tells; `images` makes space on disk before any Pod has to.
    pub fn new(
        shared: Arc<Shared>,
        settings: &NodeSettings,
        observe: Box<Observe>,
        images: Arc<tokio::sync::Mutex<Collector>>,
    ) -> Self {
        Self {
            shared,
            observe: observe.into(),
            judge: Judge::new(limits(settings)),
            pressure: PressureMemory::default(),
            transition: settings.pressure_transition,
            max_grace: settings.eviction_max_pod_grace_period,
            images,
            volumes: Arc::default(),
        }
    }

    /// Looks every `interval` until `stop`.
    pub async fn run(mut self, interval: Duration, stop: CancellationToken) {
        let mut ticks = Ticks::new(interval, stop);
        while ticks.next().await {
            // May be dropped: the next process looks again, and an order that was given stays.
            if let Some(Err(error)) = ticks.within(self.look()).await {
                tracing::warn!(error, "failed to look whether Pods have to be evicted");
            }
        }
    }

    async fn look(&mut self) -> Result<(), String> {
        let seen = self.observed().await?;
        let now = Timestamp::now();
        let mut shortage = self.judge.judge(&seen, now);
        let pressure = self.pressure.observe(pressure(&self.judge), self.transition, now);
        self.shared.admission.set_pressure(pressure);
        let pods = self.active();
        let measured = pods.iter().any(|pod| pod.spec.as_ref().is_some_and(super::limits_disk));
        if shortage.is_none() && !measured {
            return Ok(());
        }
        let uses = self.uses().await.map_err(|error| chain(&error))?;
        let gone = self.end_outgrown(&pods, &uses);
        if !gone.is_empty() {
            self.ended(&gone).await;
            return Ok(());
        }
        if let Some(shortage) = &shortage {
            let resource = shortage.signal.resource();
            self.shared.events.node_warning("EvictionThresholdMet", format!("Attempting to reclaim {resource}"));
        }
        if shortage.as_ref().is_some_and(|short| matches!(short.signal, Signal::Disk | Signal::Inodes)) {
            self.images.lock().await.delete_unused(now).await.map_err(|error| chain(&error))?;
            shortage = self.judge.judge(&self.observed().await?, now);
        }
        if let Some(shortage) = shortage {
            let gone = self.end_one(&shortage, &pods, &uses);
            self.ended(&gone).await;
        }
        Ok(())
    }

    async fn observed(&self) -> Result<BTreeMap<Signal, Observation>, String> {
        let observe = Arc::clone(&self.observe);
        let seen = tokio::task::spawn_blocking(move || observe()).await;
        seen.map_err(|error| chain(&error))?.map_err(|error| chain(&error))
    }

    /// Pods that run or are about to, and were not told to go.
    fn active(&self) -> Vec<Arc<Pod>> {
        let told = self.shared.evictions.open();
        let lives = |pod: &Arc<Pod>| {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            !is_terminal(pod) && pod.metadata.deletion_timestamp.is_none() && told.iter().all(|told| told != uid)
        };
        self.shared.directory.pods().into_iter().filter(lives).collect()
    }

    /// What each Pod uses, by UID; environments count for their function.
    async fn uses(&self) -> Result<HashMap<String, PodUse>, RuntimeError> {
        let mut uses: HashMap<String, PodUse> = HashMap::new();
        let sandboxes = self.shared.runtime.list_pod_sandbox_stats(StatsScope::Usage).await?;
        for stats in &sandboxes {
            add(uses.entry(crew::base(&stats.pod.uid).to_owned()).or_default(), stats);
        }
        let volumes = self.shared.directory.volumes();
        let on_disk = volumes.values().flatten().filter(|volume| volume.on_disk);
        if let Some(walk) = Disk::walk(&self.volumes, on_disk.map(|volume| volume.path.clone()).collect()) {
            // A walk that failed leaves the volumes unmeasured.
            let _ = tokio::task::spawn_blocking(walk).await;
        }
        for (uid, volumes) in volumes {
            let known = uses.entry(uid).or_default();
            for volume in volumes.into_iter().filter(|volume| volume.on_disk) {
                let Some(usage) = self.volumes.usage(&volume.path) else { continue };
                let usage = usage.with_sandboxes(&sandboxes, &volume.path);
                known.all.disk = Some(known.all.disk.unwrap_or(0) + usage.bytes);
                known.all.inodes = Some(known.all.inodes.unwrap_or(0) + usage.inodes);
                known.volumes.insert(volume.name, usage.bytes);
            }
        }
        Ok(uses)
    }

    /// Ends Pods that outgrew limits of their own.
    fn end_outgrown(&self, pods: &[Arc<Pod>], uses: &HashMap<String, PodUse>) -> Vec<String> {
        let of = |pod: &Arc<Pod>| {
            let (spec, uid) = (pod.spec.as_ref()?, pod.metadata.uid.clone()?);
            let used = uses.get(&uid)?;
            let message = super::outgrown(spec, used.all.disk, &used.containers, &used.volumes)?;
            self.order(pod, message, IMMEDIATELY, false).then_some(uid)
        };
        pods.iter().filter_map(of).collect()
    }

    /// Ends the Pod that is to go next for want of something.
    fn end_one(&self, shortage: &Shortage, pods: &[Arc<Pod>], uses: &HashMap<String, PodUse>) -> Vec<String> {
        tracing::warn!(available = shortage.available, threshold = shortage.threshold, "a Pod has to go");
        let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
        let known = |pod: &Arc<Pod>| (pod.spec.clone().unwrap_or_default(), used(uses, &uid(pod)).all);
        let candidates: Vec<(PodSpec, Use)> = pods.iter().map(known).collect();
        for at in super::rank(&candidates, shortage.signal) {
            let pod = &pods[at];
            let grace = if shortage.hard { IMMEDIATELY } else { self.max_grace.min(plan::grace(pod)) };
            let message = super::message(shortage, &candidates[at].0, &used(uses, &uid(pod)).containers);
            if self.order(pod, message, grace, true) {
                return vec![uid(pod)];
            }
        }
        tracing::warn!("no Pod can be evicted");
        Vec::new()
    }

    /// Whether the Pod was told to go: a critical one is not.
    fn order(&self, pod: &Pod, message: String, grace: Duration, disruption: bool) -> bool {
        if super::is_critical(pod) {
            tracing::warn!(pod = pod.metadata.name, "a critical Pod would have to be evicted, and is not");
            return false;
        }
        let disruption = disruption.then(|| message.clone());
        let order = Order { trouble: Trouble::new(REASON, message), grace, end: End::ForRoom, disruption };
        self.shared.evictions.give(pod.metadata.uid.as_deref().unwrap_or_default(), order);
        true
    }

    /// Waits until the Pods have ended, so that what they gave back is counted before the next has to go.
    async fn ended(&self, uids: &[String]) {
        let lives = || {
            let told = self.shared.evictions.open();
            let pods = self.shared.directory.pods();
            let live = pods.iter().filter(|pod| !is_terminal(pod)).filter_map(|pod| pod.metadata.uid.as_ref());
            let left: Vec<_> = live.chain(&told).collect();
            uids.iter().any(|uid| left.contains(&uid))
        };
        let gone = async {
            while lives() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        if tokio::time::timeout(CLEANUP, gone).await.is_err() {
            tracing::warn!(?uids, "evicted Pods have not ended within {CLEANUP:?}");
        }
    }
}

fn used(uses: &HashMap<String, PodUse>, uid: &str) -> PodUse {
    uses.get(uid).cloned().unwrap_or_default()
}

fn pressure(judge: &Judge) -> Pressure {
    let crossed = judge.crossed();
    let any = |signals: &[Signal]| signals.iter().any(|signal| crossed.contains(signal));
    Pressure { memory: any(&[Signal::Memory]), disk: any(&[Signal::Disk, Signal::Inodes]), pids: any(&[Signal::Pids]) }
}

fn add(known: &mut PodUse, stats: &SandboxStats) {
    let sum =
        |total: &mut Option<u64>, more: Option<u64>| *total = more.map(|more| total.unwrap_or(0) + more).or(*total);
    sum(&mut known.all.memory, stats.usage.memory.map(|memory| memory.working_set));
    sum(&mut known.all.pids, stats.usage.tasks);
    for container in &stats.containers {
        let parts: Vec<DiskUsage> = [container.writable_layer, container.log].into_iter().flatten().collect();
        let disk = (!parts.is_empty()).then(|| parts.iter().map(|part| part.bytes).sum());
        sum(&mut known.all.disk, disk);
        sum(&mut known.all.inodes, (!parts.is_empty()).then(|| parts.iter().map(|part| part.inodes).sum()));
        let memory = container.usage.memory.map(|memory| memory.working_set);
        known.containers.push(ContainerUse { name: container.name.clone(), memory, disk });
    }
}
