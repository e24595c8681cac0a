//! Statistics as a kubelet serves them: `/stats/summary` and the `/metrics/…` a scraper reads.
//!
//! ```text
//! SandboxRuntime::list_pod_sandbox_stats --+
//! the host's root cgroup, /proc -----------+--> Snapshot --> resource | cadvisor <-- disks | summary <-- space
//! ```

mod cadvisor;
mod disks;
pub(super) mod exposition;
mod fold;
mod resource;
mod space;
mod summary;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::header;
use jiff::Timestamp;

use disks::Disks;
use fold::Fold;
use space::Surveyor;

use super::targets::{PodTargets, ProbeCount};
use super::{App, internal, runtime_status};
use crate::node::machine::{Load, Machine};
use crate::runtime::stats::{CpuUsage, Interface, SandboxStats, StatsScope, Usage};
use crate::runtime::usage::{Trees, interfaces};
use crate::runtime::{self, ImageStore, SandboxRuntime};
use crate::telemetry::chain;

/// How old figures may be that are told again: a flood of questions reads the host's files only so often.
const REUSE: Duration = Duration::from_millis(500);
/// The shortest time that a rate is taken over.
const RATE_TIME: Duration = Duration::from_secs(1);
/// Interfaces of the host that belong to Pods and containers, by how their names begin: ports, taps and the bridge of
/// this node and its like, then those of others.
const INNER_INTERFACES: [&str; 7] = ["lv", "lt", "ll", "veth", "docker", "cni", "br-"];

/// Everything read at one time.
#[derive(Debug)]
struct Snapshot {
    scope: StatsScope,
    time: Timestamp,
    /// The whole host.
    node: Usage,
    network: Vec<Interface>,
    /// By namespace and name, each once.
    pods: Vec<SandboxStats>,
    /// As the runtime knows them, for [`StatsScope::All`]: of a function Pod there are several.
    sandboxes: Vec<SandboxStats>,
    /// CPU use in billionths of a core, by cgroup path; `/` is the host. Not of what is new.
    rates: HashMap<String, u64>,
}

/// Reads them.
pub(super) struct Collector {
    runtime: Arc<dyn SandboxRuntime>,
    trees: Trees,
    disks: Disks,
    surveyor: Surveyor,
    root_dir: PathBuf,
    machine: Option<Machine>,
    last: tokio::sync::Mutex<Option<(Instant, Arc<Snapshot>)>>,
    samples: Mutex<HashMap<String, Sample>>,
    fold: Mutex<Fold>,
}

/// CPU time of a cgroup at two moments, the later being the last read.
#[derive(Clone, Copy, Debug)]
struct Sample {
    before: Option<(Timestamp, u64)>,
    after: (Timestamp, u64),
}

impl Collector {
    /// `root_dir` names the file system that is the node's.
    pub(super) fn new(
        runtime: Arc<dyn SandboxRuntime>,
        images: Arc<dyn ImageStore>,
        targets: Arc<dyn PodTargets>,
        root_dir: PathBuf,
    ) -> Self {
        let machine = Machine::measure(&root_dir);
        let machine = machine.inspect_err(|error| {
            tracing::warn!(error = chain(error), "statistics will not tell what the host has");
        });
        Self {
            runtime,
            trees: Trees::of_host(),
            disks: Disks::of_host(),
            surveyor: Surveyor::new(targets, images, root_dir.clone()),
            root_dir,
            machine: machine.ok(),
            last: tokio::sync::Mutex::default(),
            samples: Mutex::default(),
            fold: Mutex::default(),
        }
    }

    async fn snapshot(&self, scope: StatsScope) -> runtime::Result<Arc<Snapshot>> {
        // Whoever waits for it finds what the one before has read.
        let mut last = self.last.lock().await;
        if let Some((read, snapshot)) = last.as_ref()
            && read.elapsed() < REUSE
            && snapshot.scope >= scope
        {
            return Ok(Arc::clone(snapshot));
        }
        let mut sandboxes = self.runtime.list_pod_sandbox_stats(scope).await?;
        sandboxes.sort_by(|a, b| {
            (&a.pod.namespace, &a.pod.name, &a.pod.uid).cmp(&(&b.pod.namespace, &b.pod.name, &b.pod.uid))
        });
        let kept = if scope == StatsScope::All { sandboxes.clone() } else { Vec::new() };
        let pods = self.fold.lock().unwrap_or_else(PoisonError::into_inner).pods(sandboxes);
        let node = self.trees.usage(Path::new(""), scope).unwrap_or_default();
        let mut network = if scope == StatsScope::All { own_interfaces() } else { Vec::new() };
        network.sort_by(|a, b| a.name.cmp(&b.name));
        let rates = self.rates(&node, &pods);
        let snapshot =
            Arc::new(Snapshot { scope, time: Timestamp::now(), node, network, pods, sandboxes: kept, rates });
        *last = Some((Instant::now(), Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    fn rates(&self, node: &Usage, pods: &[SandboxStats]) -> HashMap<String, u64> {
        let of_pods = pods.iter().flat_map(|pod| {
            let containers = pod.containers.iter().map(|container| (container.cgroup.as_str(), container.usage));
            containers.chain([(pod.cgroup.as_str(), pod.usage)])
        });
        let now = of_pods.chain([("/", *node)]).filter_map(|(cgroup, usage)| Some((cgroup, usage.time, usage.cpu?)));
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        // What is not read this time has ended.
        let new: HashMap<String, Sample> =
            now.map(|(cgroup, time, cpu)| (cgroup.to_owned(), Sample::next(samples.get(cgroup), time, cpu))).collect();
        *samples = new;
        samples.iter().filter_map(|(cgroup, sample)| Some((cgroup.clone(), sample.rate()?))).collect()
    }
}

impl Sample {
    fn next(known: Option<&Self>, time: Timestamp, cpu: CpuUsage) -> Self {
        let after = (time, cpu.total);
        let before = known.map(|known| match known.before {
            // Read again at once: the older one still makes the better rate.
            Some(before) if time.duration_since(known.after.0).unsigned_abs() < RATE_TIME => before,
            _ => known.after,
        });
        Self { before, after }
    }

    fn rate(&self) -> Option<u64> {
        let ((from, before), (to, after)) = (self.before?, self.after);
        let seconds = to.duration_since(from).as_secs_f64();
        (seconds >= RATE_TIME.as_secs_f64()).then(|| (after.saturating_sub(before) as f64 / seconds) as u64)
    }
}

fn own_interfaces() -> Vec<Interface> {
    let own = interfaces(&[i32::try_from(std::process::id()).ok()]);
    own.into_iter().flatten().flatten().filter(|interface| !is_inner(&interface.name)).collect()
}

/// Counted with the host's own, what goes to a Pod would be told twice.
fn is_inner(interface: &str) -> bool {
    INNER_INTERFACES.iter().any(|inner| interface.starts_with(inner))
}

/// GET `/metrics/resource`: what metrics-server scrapes. A runtime that does not answer is told as a metric too, as a
/// kubelet does, so that the node's own figures still come.
pub(super) async fn resource(State(app): State<App>) -> Response {
    match app.stats.snapshot(StatsScope::CpuAndMemory).await {
        Ok(snapshot) => exposition::answer(resource::render(&snapshot.node, Some(&snapshot.pods))),
        Err(error) => {
            tracing::warn!(error = chain(&error), "failed to read the Pods' statistics");
            let node = app.stats.trees.usage(Path::new(""), StatsScope::CpuAndMemory).unwrap_or_default();
            exposition::answer(resource::render(&node, None))
        }
    }
}

/// GET `/metrics/cadvisor`: the names that dashboards query.
pub(super) async fn cadvisor(State(app): State<App>) -> Response {
    let snapshot = match app.stats.snapshot(StatsScope::All).await {
        Ok(snapshot) => snapshot,
        Err(error) => return failed(&error),
    };
    let (disks, cgroups) = (app.stats.disks.clone(), cadvisor::cgroups(&snapshot));
    // If it is lost with a panic, nothing is told of disks.
    let disks = tokio::task::spawn_blocking(move || disks.read(cgroups)).await.unwrap_or_default();
    exposition::answer(cadvisor::render(&snapshot, &disks, app.stats.machine.as_ref()))
}

/// GET `/metrics/probes`: results of probes, with a kubelet's name and labels.
pub(super) async fn probes(State(app): State<App>) -> Response {
    let mut text = exposition::Exposition::default();
    let mut family = text.family("prober_probe_total", exposition::Kind::Counter, "Probes of containers, by result.");
    for ProbeCount { pod, container, probe, result, count } in app.targets.probes() {
        let labels = [
            ("container", container.as_str()),
            ("namespace", &pod.namespace),
            ("pod", &pod.name),
            ("pod_uid", &pod.uid),
            ("probe_type", probe),
            ("result", result),
        ];
        family.sample(&labels, count as f64, None);
    }
    exposition::answer(text.finish())
}

/// GET `/stats/summary[?only_cpu_and_memory=true]`.
pub(super) async fn summary(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    let brief = query.is_some_and(|query| query.split('&').any(|pair| pair == "only_cpu_and_memory=true"));
    let scope = if brief { StatsScope::CpuAndMemory } else { StatsScope::All };
    let snapshot = match app.stats.snapshot(scope).await {
        Ok(snapshot) => snapshot,
        Err(error) => return failed(&error),
    };
    let load = Load::measure(&app.stats.root_dir).ok();
    let space = if brief { None } else { Some(app.stats.surveyor.survey(&snapshot.sandboxes).await) };
    let host = summary::Host { name: &app.node_name, load, space: space.as_ref() };
    match serde_json::to_vec(&summary::summary(&snapshot, &host)) {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(cause) => internal("failed to write the summary", &cause),
    }
}

fn failed(error: &runtime::RuntimeError) -> Response {
    (runtime_status(error.kind()), format!("failed to read statistics: {}\n", chain(error))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(1_795_245_343_000 + milliseconds).unwrap()
    }

    fn cpu(total: u64) -> CpuUsage {
        CpuUsage { total, ..CpuUsage::default() }
    }

    #[test]
    fn the_bridge_and_what_hangs_on_it_are_not_the_hosts_network() {
        let bridge = crate::node::owner::bridge_name("0123456789ab");
        for inner in [bridge.as_str(), "lv0123456789ab", "lt0123456789ab", "docker0", "br-0123456789ab"] {
            assert!(is_inner(inner), "{inner}");
        }
        for own in ["eth0", "enp1s0", "wlan0", "bond0", "br0"] {
            assert!(!is_inner(own), "{own}");
        }
    }

    #[test]
    fn a_rate_needs_two_moments_apart() {
        let first = Sample::next(None, at(0), cpu(1_000));
        assert_eq!(first.rate(), None);
        let soon = Sample::next(Some(&first), at(100), cpu(2_000));
        assert_eq!(soon.rate(), None);
        let later = Sample::next(Some(&soon), at(2_000), cpu(1_000_002_000));
        assert_eq!(later.rate(), Some(526_315_789), "a billion in 1.9 s");
        let again = Sample::next(Some(&later), at(2_100), cpu(1_000_002_000));
        assert_eq!(again.rate(), Some(500_000_000), "the older moment is kept");
        let backwards = Sample::next(Some(&again), at(9_000), cpu(0));
        assert_eq!(backwards.rate(), Some(0), "another cgroup of the same name");
    }
}
