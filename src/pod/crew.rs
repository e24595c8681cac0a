//! The replicas and environments of one function Pod, made as Pods are made.
//!
//! ```text
//! Service --start_replica-----> capacity, volumes             (key: <uid>.<replica>)
//!         --start_environment-> a Worker with a Seat          (key: <uid>.<replica>.<ordinal>)
//! ```
//! A key takes the place of a Pod's UID wherever the runtime, the addresses or the disk remember something, so what a
//! crash leaves of an environment is found and removed as what it leaves of a Pod is.

mod adopt;
pub(super) mod kept;
pub(super) mod pools;
mod prepare;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::{BoxFuture, join_all, try_join_all};
use futures::stream::{self, BoxStream};
use futures::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{OnceCell, Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

use self::prepare::Reserve;
use self::verdict::{is_ready, verdict};
use super::inputs::following::Following;
use super::volumes::{Freshness, MountedVolume};
use super::worker::{Desired, Past, Seat, Signal, Worker};
use super::{PodContext, Shared, qos, translate};
use crate::function::pool_state::{EnvironmentId, Exit, ReplicaId};
use crate::function::service::{NotStarted, Replicas, Started};
use crate::function::settings::{Settings, Size};
use crate::runtime::types::{ContainerId, PodRef, Resources};
use crate::shutdown::owned;
use crate::telemetry::chain;

/// How long an environment may take to run, its init containers included.
const START_PATIENCE: Duration = Duration::from_secs(600);
/// Wait before something that must be removed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Period of a CPU limit in microseconds, as everywhere.
const CPU_PERIOD: i64 = 100_000;

/// Makes what the pool of one function Pod asks for.
pub(super) struct Crew {
    shared: Arc<Shared>,
    uid: String,
    pod: watch::Receiver<Desired>,
    settings: watch::Receiver<Settings>,
    /// The images of its environments, in the order of the Pod's init and main containers; empty until they are here.
    made_of: watch::Receiver<Vec<String>>,
    replicas: Mutex<HashMap<ReplicaId, Arc<OnceCell<Replica>>>>,
    members: Mutex<HashMap<EnvironmentId, Member>>,
    reserve: Reserve,
    /// Each environment is a microVM with the limits of a replica.
    in_guests: bool,
}

/// A replica whose volumes are there.
struct Replica {
    volumes: BTreeMap<String, (PathBuf, bool)>,
    size: Size,
    /// Keeps tokens and the like fresh.
    _refresh: AbortOnDropHandle<()>,
}

/// An environment and its owner.
struct Member {
    desired: watch::Sender<Desired>,
    statuses: watch::Receiver<Option<PodStatus>>,
    go: watch::Sender<bool>,
    worker: AbortOnDropHandle<()>,
}

/// What the owner of an environment is hired for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    Start,
    /// To have it ready, and to start it when told.
    Prepare,
    /// To take over one that runs.
    Adopt,
    /// Only to remove what there is of it.
    Remove,
}

/// The environments of this node that runtime events are for.
pub struct Environments {
    signals: Mutex<HashMap<String, watch::Sender<Signal>>>,
    /// So many more may be prepared on this node.
    prepared: Arc<Semaphore>,
}

impl Default for Environments {
    fn default() -> Self {
        Self { signals: Mutex::default(), prepared: Arc::new(Semaphore::new(prepare::MOST)) }
    }
}

impl Environments {
    /// Something happened to an environment, if it is one.
    pub(super) fn signal(&self, key: &str) {
        if let Some(signal) = self.signals().get(key) {
            signal.send_modify(|signal| signal.events += 1);
        }
    }

    /// Events may have been lost.
    pub(super) fn relist(&self) {
        self.signals().values().for_each(|signal| signal.send_modify(|signal| signal.relists += 1));
    }

    fn signals(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Signal>>> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The UID of the Pod that a key belongs to; a UID is its own.
pub(super) fn base(key: &str) -> &str {
    key.split('.').next().unwrap_or(key)
}

fn replica_key(uid: &str, replica: ReplicaId) -> String {
    format!("{uid}.{replica}")
}

fn environment_key(uid: &str, id: EnvironmentId) -> String {
    format!("{uid}.{}.{}", id.replica, id.ordinal)
}

/// What a function Pod tells its crew: itself, its settings, and the images of it that are here.
pub(super) type Wishes = (watch::Receiver<Desired>, watch::Receiver<Settings>, watch::Receiver<Vec<String>>);

/// How the owner of an environment is told to start it, and says how it is.
type Lines = (watch::Receiver<bool>, watch::Sender<Option<PodStatus>>);

/// What a key means, after its Pod's UID.
enum Part {
    Replica(ReplicaId),
    Environment(EnvironmentId),
}

/// Reads a key of this Pod.
fn part(uid: &str, key: &str) -> Option<Part> {
    let rest = key.strip_prefix(uid)?.strip_prefix('.')?;
    let replica = |text: &str| text.parse().ok().map(ReplicaId);
    match rest.split_once('.') {
        None => replica(rest).map(Part::Replica),
        Some((first, ordinal)) => {
            Some(Part::Environment(EnvironmentId { replica: replica(first)?, ordinal: ordinal.parse().ok()? }))
        }
    }
}

impl Crew {
    pub(super) fn new(shared: Arc<Shared>, uid: &str, (pod, settings, made_of): Wishes, in_guests: bool) -> Arc<Self> {
        let (replicas, members, reserve) = (Mutex::default(), Mutex::default(), Reserve::default());
        Arc::new(Self { shared, uid: uid.to_owned(), pod, settings, made_of, replicas, members, reserve, in_guests })
    }

    /// What one replica takes from the node: its limits, as often as it has machines.
    fn taken(&self) -> Size {
        let settings = self.settings.borrow();
        let Size { cpu_millis, memory_bytes } = settings.size;
        let machines = if self.in_guests { u64::from(settings.environments) } else { 1 };
        Size { cpu_millis: cpu_millis.saturating_mul(machines), memory_bytes: memory_bytes.saturating_mul(machines) }
    }

    /// The Pod that an environment runs: the function's, but it ends when a process of it ends, and the pool decides
    /// what follows. Its images are those that are here, which may be older than those that the Pod names.
    fn derived(&self) -> Arc<Pod> {
        let mut pod = Pod::clone(&self.pod.borrow().pod);
        pod.status = None;
        pod.metadata.deletion_timestamp = None;
        pod.metadata.deletion_grace_period_seconds = None;
        if let Some(spec) = &mut pod.spec {
            spec.restart_policy = Some("Never".to_owned());
            spec.active_deadline_seconds = None;
            spec.ephemeral_containers = None;
            for container in &mut spec.containers {
                (container.restart_policy, container.restart_policy_rules) = (None, None);
            }
            let all = spec.init_containers.iter_mut().flatten().chain(&mut spec.containers);
            let named = all.filter_map(|container| container.image.as_mut());
            named.zip(self.made_of.borrow().iter()).for_each(|(image, here)| image.clone_from(here));
        }
        Arc::new(pod)
    }

    /// The same for an environment that is to end. It has what the Pod has left of its own grace, should that end too:
    /// calls have used up the rest.
    fn ending(&self) -> Arc<Pod> {
        let mut pod = self.derived();
        let meta = &self.pod.borrow().pod.metadata;
        if let (Some(by), Some(spec)) = (&meta.deletion_timestamp, &mut Arc::make_mut(&mut pod).spec) {
            let least = if meta.deletion_grace_period_seconds == Some(0) { 0 } else { 1 };
            let left = by.0.duration_since(Timestamp::now()).as_secs().max(least);
            spec.termination_grace_period_seconds =
                Some(spec.termination_grace_period_seconds.unwrap_or(left).min(left));
        }
        pod
    }

    /// Hires the owner of an environment.
    fn hire(&self, id: EnvironmentId, errand: Errand) -> watch::Receiver<Option<PodStatus>> {
        let member = self.owner(id, errand);
        let statuses = member.statuses.clone();
        self.members().insert(id, member);
        statuses
    }

    fn owner(&self, id: EnvironmentId, errand: Errand) -> Member {
        let key = environment_key(&self.uid, id);
        let pod = self.derived();
        let (status, statuses) = watch::channel(None);
        let (go, goes) = watch::channel(errand != Errand::Prepare);
        let seat = self.seat(&pod, id, key.clone(), (goes, status));
        let (desired, wanted) = watch::channel(Desired { pod, gone: errand == Errand::Remove });
        let (signal, signals) = watch::channel(Signal::default());
        let past = match errand {
            Errand::Start | Errand::Prepare => Past::None,
            Errand::Adopt | Errand::Remove => Past::Unknown,
        };
        let worker = Worker::of_environment(Arc::clone(&self.shared), seat, wanted, signals, past);
        self.shared.environments.signals().insert(key.clone(), signal);
        let shared = Arc::clone(&self.shared);
        let work = async move {
            worker.run().await;
            shared.environments.signals().remove(&key);
        };
        Member { desired, statuses, go, worker: owned(work) }
    }

    fn seat(&self, pod: &Pod, id: EnvironmentId, key: String, (go, status): Lines) -> Seat {
        let replicas = self.replicas();
        let replica = replicas.get(&id.replica).and_then(|replica| replica.get());
        let spec = pod.spec.clone().unwrap_or_default();
        let host = &self.shared.host;
        let mut resources = qos::pod_resources(&spec, host.cpu_quota);
        resources.pids_limit = host.pids_limit;
        limit(
            &mut resources,
            replica.map_or_else(|| self.settings.borrow().size, |replica| replica.size),
            host.cpu_quota,
        );
        Seat {
            reference: PodRef { uid: key, ..translate::pod_ref(pod) },
            cgroup: translate::cgroup_parent(host, &replica_key(&self.uid, id.replica), &spec),
            resources,
            volumes: replica.map(|replica| replica.volumes.clone()).unwrap_or_default(),
            go,
            status,
        }
    }

    /// Makes a replica's volumes and keeps them fresh, unless they are there.
    async fn furnish(&self, id: ReplicaId) -> Result<(), Exit> {
        let replica = Arc::clone(self.replicas().entry(id).or_default());
        replica.get_or_try_init(|| self.furnished(id)).await.map(drop)
    }

    async fn furnished(&self, id: ReplicaId) -> Result<Replica, Exit> {
        let key = replica_key(&self.uid, id);
        let (pod, facts) = (self.derived(), self.shared.facts.borrow().clone());
        let context = PodContext { pod: &pod, key: &key, node: &facts, addresses: &[] };
        let made = self.shared.volumes.set_up(context).await.map_err(|error| failed("FailedMount", chain(&error)))?;
        let paths = |(name, volume): (String, MountedVolume)| (name, (volume.host_path, volume.read_only));
        let mut following = Following::default();
        self.shared.volumes.follow(&mut following, made.uses);
        let refresh = refresh(Arc::clone(&self.shared), self.pod.clone(), key, following);
        Ok(Replica {
            volumes: made.volumes.into_iter().map(paths).collect(),
            size: self.settings.borrow().size,
            _refresh: owned(refresh),
        })
    }

    /// How an environment ends, once it does.
    fn end(statuses: &watch::Receiver<Option<PodStatus>>) -> BoxFuture<'static, Exit> {
        let mut statuses = statuses.clone();
        async move {
            let ended = statuses
                .wait_for(|status| status.as_ref().is_some_and(|status| verdict::ended(status).is_some()))
                .await;
            let exit = ended.ok().and_then(|status| status.as_ref().and_then(verdict::ended));
            exit.unwrap_or_else(|| failed("Lost", "its owner is gone".to_owned()))
        }
        .boxed()
    }

    fn running(&self, id: EnvironmentId) -> Vec<ContainerId> {
        self.shared.directory.pools.running(&environment_key(&self.uid, id))
    }

    async fn tear_down(&self, key: &str) {
        while let Err(error) = self.shared.volumes.tear_down(key).await {
            tracing::warn!(key, error = chain(&error), "failed to remove a replica's volumes; trying again");
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    fn replicas(&self) -> MutexGuard<'_, HashMap<ReplicaId, Arc<OnceCell<Replica>>>> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> MutexGuard<'_, HashMap<EnvironmentId, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Replicas for Crew {
    async fn start_replica(&self, replica: ReplicaId) -> Result<(), NotStarted> {
        if !self.shared.capacity.lend(&self.uid, replica, self.taken()) {
            return Err(NotStarted::Denied);
        }
        self.claim_replica(replica).await;
        self.furnish(replica).await.map_err(NotStarted::Failed)
    }

    async fn stop_replica(&self, replica: ReplicaId) {
        self.dismiss_replica(replica).await;
        drop(self.replicas().remove(&replica));
        self.tear_down(&replica_key(&self.uid, replica)).await;
        self.shared.capacity.give_back(&self.uid, replica);
    }

    async fn start_environment(&self, environment: EnvironmentId) -> Result<Started, Exit> {
        let (mut statuses, prepared) = match self.claim(environment).await {
            Some(statuses) => (statuses, true),
            None => (self.hire(environment, Errand::Start), false),
        };
        let decided = statuses.wait_for(|status| status.as_ref().is_some_and(|status| verdict(status).is_some()));
        let status = match tokio::time::timeout(START_PATIENCE, decided).await {
            Ok(Ok(status)) => status.clone(),
            Ok(Err(_)) => None,
            Err(_) => return Err(failed("StartTimeout", format!("not running after {} s", START_PATIENCE.as_secs()))),
        };
        let verdict = status.as_ref().and_then(verdict);
        let address = verdict.unwrap_or_else(|| Err(failed("Lost", "its owner is gone".to_owned())))?;
        let address = SocketAddr::new(address, self.settings.borrow().port);
        Ok(Started { address, ended: Self::end(&statuses), prepared })
    }

    async fn stop_environment(&self, environment: EnvironmentId) {
        let known = self.members().remove(&environment);
        // Nobody may own it since a stop of it was dropped half-way: what that left is removed by another.
        let Member { desired, mut worker, .. } = known.unwrap_or_else(|| self.owner(environment, Errand::Remove));
        let mut pod = self.pod.clone();
        let ended = loop {
            pod.mark_unchanged();
            desired.send_replace(Desired { pod: self.ending(), gone: true });
            let changed = async {
                if pod.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                // Cancel-safe: a handle that is waited for again.
                ended = &mut worker => break ended,
                // Cancel-safe: a change not taken stays. The Pod may have to end sooner than was said.
                () = changed => {}
            }
        };
        if let Err(error) = ended {
            tracing::error!(%environment, uid = self.uid, error = chain(&error), "an environment's owner was lost");
            // Likewise.
            let _ = self.owner(environment, Errand::Remove).worker.await;
        }
    }

    async fn freeze(&self, environment: EnvironmentId) {
        let running = self.running(environment);
        let frozen = join_all(running.iter().map(|id| self.shared.runtime.pause_container(id))).await;
        for error in frozen.into_iter().filter_map(Result::err) {
            // It goes on running; a call thaws it all the same.
            tracing::warn!(uid = self.uid, %environment, error = chain(&error), "an environment could not be frozen");
        }
    }

    async fn thaw(&self, environment: EnvironmentId) -> Result<(), Exit> {
        let running = self.running(environment);
        let thawed = try_join_all(running.iter().map(|id| self.shared.runtime.unpause_container(id))).await;
        thawed.map(drop).map_err(|error| failed("FailedThaw", chain(&error)))
    }

    fn readiness(&self, environment: EnvironmentId) -> BoxStream<'static, bool> {
        let statuses = self.members().get(&environment).map(|member| member.statuses.clone());
        let changes = stream::unfold((statuses, true), |(statuses, known)| async move {
            let mut statuses = statuses?;
            let differs = |status: &Option<PodStatus>| status.as_ref().is_some_and(|s| is_ready(s) != known);
            statuses.wait_for(differs).await.ok()?;
            Some((!known, (Some(statuses), !known)))
        });
        changes.boxed()
    }

    async fn prepare(&self, environment: EnvironmentId) {
        self.prepare_one(environment).await;
    }

    async fn dismiss_all_but(&self, kept: &BTreeSet<EnvironmentId>) {
        self.dismiss_others(kept).await;
    }

    fn set_idle(&self, replica: ReplicaId, since: Option<Instant>) {
        self.shared.capacity.set_idle(&self.uid, replica, since);
    }
}

/// Renews what a replica's volumes hold, for as long as the replica is there.
async fn refresh(shared: Arc<Shared>, pod: watch::Receiver<Desired>, key: String, mut following: Following) {
    let mut wait = Duration::from_secs(30);
    loop {
        tokio::select! {
            // Cancel-safe: a timer.
            () = tokio::time::sleep(wait) => {}
            // Cancel-safe: a change not taken stays unseen.
            () = following.changed() => {}
        }
        let (pod, facts) = (pod.borrow().pod.clone(), shared.facts.borrow().clone());
        let context = PodContext { pod: &pod, key: &key, node: &facts, addresses: &[] };
        wait = match shared.volumes.refresh(context).await {
            Ok(Freshness { period: Some(next), uses }) => {
                shared.volumes.follow(&mut following, uses);
                next
            }
            Ok(_) => return,
            Err(error) => {
                shared.events.warning(&pod, None, "FailedMount", chain(&error));
                super::backoff::RETRY
            }
        };
    }
}

/// A replica's limits where the Pod gives none of its own.
fn limit(resources: &mut Resources, size: Size, cpu_quota: bool) {
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    resources.memory_limit.get_or_insert(whole(size.memory_bytes));
    if cpu_quota && resources.cpu_quota.is_none() {
        resources.cpu_period = Some(CPU_PERIOD);
        resources.cpu_quota = Some(whole(size.cpu_millis).saturating_mul(CPU_PERIOD / 1000));
    }
}

fn failed(reason: &str, message: String) -> Exit {
    Exit { code: None, reason: reason.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::function::labels;
    use crate::pod::testing::{Node, UID, function};
    use crate::runtime::SandboxRuntime as _;
    use crate::runtime::types::{SandboxConfig, SandboxNetwork};
    use crate::runtime::verb::Verb;

    /// A crew whose Pod names the second version of its images, of which these are here.
    fn crew(node: &Node, here: &watch::Sender<Vec<String>>) -> Arc<Crew> {
        let pod = function(json!({
            "initContainers": [{ "name": "setup", "image": "setup:2" }],
            "containers": [{ "name": "code", "image": "code:2" }],
        }));
        let settings = watch::Sender::new(labels::read(&pod, None).unwrap().settings).subscribe();
        let desired = watch::Sender::new(Desired { pod: Arc::new(pod), gone: false }).subscribe();
        Crew::new(Arc::clone(&node.shared), UID, (desired, settings, here.subscribe()), false)
    }

    fn images(pod: &Pod) -> Vec<String> {
        let spec = pod.spec.as_ref().unwrap();
        let all = spec.init_containers.iter().flatten().chain(&spec.containers);
        all.filter_map(|container| container.image.clone()).collect()
    }

    #[tokio::test]
    async fn environments_are_made_of_the_images_that_are_here() {
        let node = Node::new();
        let [old, new] = [1, 2].map(|version| vec![format!("setup:{version}"), format!("code:{version}")]);
        let here = watch::Sender::new(old.clone());
        let crew = crew(&node, &here);
        assert_eq!((images(&crew.derived()), images(&crew.ending())), (old.clone(), old));
        here.send_replace(new.clone());
        assert_eq!(images(&crew.derived()), new);
    }

    #[tokio::test]
    async fn what_was_prepared_of_an_older_image_is_not_started() {
        let node = Node::new();
        let here = watch::Sender::new(vec!["setup:1".to_owned(), "code:1".to_owned()]);
        let crew = crew(&node, &here);
        let id = EnvironmentId { replica: ReplicaId(0), ordinal: 0 };
        for version in [1, 2] {
            crew.prepare_one(id).await;
            assert!(crew.members().contains_key(&id), "it is prepared");
            here.send_replace(vec!["setup:2".to_owned(), "code:2".to_owned()]);
            assert_eq!(crew.claim(id).await.is_some(), version == 2, "of version {version}");
        }
    }

    #[tokio::test]
    async fn what_a_stop_that_was_dropped_half_way_left_is_removed_by_the_next() {
        let (node, here) = (Node::new(), watch::Sender::default());
        let crew = crew(&node, &here);
        let id = EnvironmentId { replica: ReplicaId(0), ordinal: 0 };
        let key = environment_key(UID, id);
        let pod = crew.derived();
        let plain = translate::sandbox(&node.shared.host, &pod, pod.spec.as_ref().unwrap(), "h", SandboxNetwork::Host);
        let reference = PodRef { uid: key.clone(), ..plain.pod.clone() };
        node.runtime.run_pod_sandbox(&SandboxConfig { pod: reference, ..plain }).await.unwrap();
        crew.hire(id, Errand::Remove);
        let _never = node.runtime.hang_next(Verb::RemovePodSandbox);
        let hangs = async {
            while node.runtime.calls(Verb::RemovePodSandbox) == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = crew.stop_environment(id) => panic!("it cannot have been removed"),
            () = hangs => {}
        }
        crew.stop_environment(id).await;
        assert!(node.runtime.list_pod_sandboxes(Some(&key)).await.unwrap().is_empty());
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let id = EnvironmentId { replica: ReplicaId(7), ordinal: 3 };
        let key = environment_key("u-1", id);
        assert_eq!(base(&key), "u-1");
        assert!(matches!(part("u-1", &key), Some(Part::Environment(read)) if read == id));
        assert!(matches!(part("u-1", &replica_key("u-1", id.replica)), Some(Part::Replica(ReplicaId(7)))));
        for other in ["u-1", "u-11.7.3", "u-1.x.3", "u-1.7.", "u-1."] {
            assert!(part("u-1", other).is_none(), "{other}");
        }
    }
}
