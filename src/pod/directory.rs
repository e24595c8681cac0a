//! Which Pods are here and what is known of them, for whoever asks from outside the Pod loop.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodSpec, PodStatus};
use tokio::sync::watch;

use super::crew::pools::Pools;
use super::ephemeral;
use super::observed::Observed;
use super::probes::Tally;
use super::volumes::places;
use crate::kubelet_api::targets::{Entrance, LogTarget, PodTargets, PodVolume, ProbeCount, TargetError};
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus as Attempt, SandboxId};

/// The Pod loop counts as stuck when it has not come round for this long; it comes round at least every
/// [`HEARTBEAT`].
const STUCK: Duration = Duration::from_secs(120);
/// How often the loop says that it lives.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(20);
/// How long whoever asks for a Pod waits for a node that has just started to have looked at its Pods.
const STARTING: Duration = Duration::from_secs(10);

/// What is known of each Pod, by UID. Written by the workers, read by the node's API.
#[derive(Debug)]
pub struct Directory {
    entries: RwLock<BTreeMap<String, Entry>>,
    /// The Pods of the first complete LIST that were not looked at yet; `None` before there is one.
    awaited: watch::Sender<Option<BTreeSet<String>>>,
    patience: Duration,
    /// How often probes said what.
    pub(super) probes: Tally,
    /// The environments of function Pods.
    pub(super) pools: Arc<Pools>,
    heartbeat: RwLock<Instant>,
    /// Where volumes are.
    root: PathBuf,
}

#[derive(Clone, Debug)]
struct Entry {
    pod: Arc<Pod>,
    status: Arc<PodStatus>,
    containers: Vec<Attempt>,
    /// The sandbox, while it is ready.
    sandbox: Option<SandboxId>,
}

impl Default for Directory {
    fn default() -> Self {
        Self {
            entries: RwLock::default(),
            awaited: watch::Sender::default(),
            patience: STARTING,
            probes: Tally::default(),
            pools: Arc::default(),
            heartbeat: RwLock::new(Instant::now()),
            root: PathBuf::new(),
        }
    }
}

impl Directory {
    /// An empty one, of a node with this `--root-dir`.
    pub fn of_root(root: &Path) -> Self {
        // As the volumes themselves are made.
        Self { root: std::path::absolute(root).unwrap_or_else(|_| root.to_owned()), ..Self::default() }
    }

    /// Notes what a worker knows now.
    pub(super) fn put(&self, pod: &Arc<Pod>, status: &PodStatus, observed: &Observed) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let (pod, status) = (Arc::clone(pod), Arc::new(status.clone()));
        let sandbox = observed.ready_sandbox().map(|sandbox| sandbox.id.clone());
        let entry = Entry { pod, status, containers: observed.containers().cloned().collect(), sandbox };
        self.entries.write().unwrap_or_else(PoisonError::into_inner).insert(uid.clone(), entry);
        self.looked_at(&uid);
    }

    /// These Pods were here when the node started: of any other it can be said that it is not, once these were looked at.
    /// Later calls mean nothing.
    pub(super) fn expect(&self, uids: impl IntoIterator<Item = String>) {
        self.awaited.send_if_modified(|awaited| {
            let is_first = awaited.is_none();
            let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
            awaited.get_or_insert_with(|| uids.into_iter().filter(|uid| !entries.contains_key(uid)).collect());
            is_first
        });
    }

    fn looked_at(&self, uid: &str) {
        self.awaited.send_if_modified(|awaited| awaited.as_mut().is_some_and(|awaited| awaited.remove(uid)));
    }

    /// Forgets a Pod.
    pub(super) fn remove(&self, uid: &str) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.pools.remove(uid);
        self.probes.forget(uid);
        self.looked_at(uid);
    }

    /// The loop lives.
    pub(super) fn beat(&self) {
        *self.heartbeat.write().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// The Pod of that name, if it also has that UID where one is given. A node that has just started is waited for: it may
    /// be one that it has not looked at yet.
    async fn look_up(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<Entry, TargetError> {
        let same = |entry: &Entry| uid.is_none_or(|uid| entry.pod.metadata.uid.as_deref() == Some(uid));
        let mut awaited = self.awaited.subscribe();
        let looking = async {
            loop {
                // Asked first: what was looked at between the two is found.
                let knows_all = awaited.borrow_and_update().as_ref().is_some_and(BTreeSet::is_empty);
                match self.find(namespace, name).filter(same) {
                    Some(entry) => return Ok(entry),
                    None if knows_all => return Err(TargetError::NoPod(name.to_owned())),
                    None => awaited.changed().await.expect("its sender is borrowed here"),
                }
            }
        };
        let not_yet = || Err(TargetError::NotYet(name.to_owned()));
        tokio::time::timeout(self.patience, looking).await.unwrap_or_else(|_| not_yet())
    }

    /// The Pod of that name; of several (an old one that is still being removed) the newest.
    fn find(&self, namespace: &str, name: &str) -> Option<Entry> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let named = entries.values().filter(|e| {
            e.pod.metadata.namespace.as_deref() == Some(namespace) && e.pod.metadata.name.as_deref() == Some(name)
        });
        named.max_by_key(|e| e.pod.metadata.creation_timestamp.clone()).cloned()
    }
}

#[async_trait]
impl PodTargets for Directory {
    async fn log_target(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<LogTarget, TargetError> {
        let entry = self.look_up(namespace, pod, None).await?;
        let named = |spec: &PodSpec| {
            let lasting = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| &c.name);
            lasting.chain(ephemeral::all(spec).map(|c| &c.name)).any(|name| name == container)
        };
        if !entry.pod.spec.as_ref().is_some_and(named) {
            return Err(TargetError::NoContainer { pod: pod.to_owned(), container: container.to_owned() });
        }
        let no_previous = || TargetError::NoPrevious { pod: pod.to_owned(), container: container.to_owned() };
        if let Some(span) = self.pools.log_span(uid_of(&entry.pod), container, previous).await {
            return span.map(LogTarget::Many).ok_or_else(no_previous);
        }
        if previous {
            return previous_attempt(&entry.status, container).map(LogTarget::One).ok_or_else(no_previous);
        }
        let mut attempts: Vec<_> = entry.containers.iter().filter(|c| c.name == container).collect();
        attempts.sort_by_key(|c| c.attempt);
        match attempts.iter().rev().find(|c| c.state != ContainerState::Created) {
            Some(attempt) => Ok(LogTarget::One(attempt.id.clone())),
            None => Err(TargetError::Waiting {
                pod: pod.to_owned(),
                container: container.to_owned(),
                reason: waiting_reason(&entry.status, container),
            }),
        }
    }

    async fn exec_target(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<Entrance, TargetError> {
        let entry = self.look_up(namespace, pod, uid).await?;
        if let Some(service) = self.pools.service(uid_of(&entry.pod)) {
            return self.pools.enter(&service, &entry.pod, container).await;
        }
        let running = entry.containers.iter().filter(|c| c.name == container && c.state == ContainerState::Running);
        let newest = running.max_by_key(|c| c.attempt);
        let newest = newest.map(|c| Entrance { container: c.id.clone(), stay: None });
        newest.ok_or_else(|| TargetError::NotRunning(container.to_owned()))
    }

    async fn port_target(&self, namespace: &str, pod: &str, uid: Option<&str>) -> Result<SandboxId, TargetError> {
        let entry = self.look_up(namespace, pod, uid).await?;
        entry.sandbox.ok_or_else(|| TargetError::NoSandbox(format!("{pod}_{namespace}")))
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        let with_status = |e: &Entry| Arc::new(Pod { status: Some((*e.status).clone()), ..(*e.pod).clone() });
        self.entries.read().unwrap_or_else(PoisonError::into_inner).values().map(with_status).collect()
    }

    fn volumes(&self) -> BTreeMap<String, Vec<PodVolume>> {
        let of_pod = |(uid, entry): (&String, &Entry)| (uid.clone(), places::measured(&self.root, &entry.pod));
        self.entries.read().unwrap_or_else(PoisonError::into_inner).iter().map(of_pod).collect()
    }

    fn probes(&self) -> Vec<ProbeCount> {
        self.probes.counts()
    }

    fn healthy(&self) -> Result<(), String> {
        let age = self.heartbeat.read().unwrap_or_else(PoisonError::into_inner).elapsed();
        if age > STUCK {
            return Err(format!("the Pod loop has not come round for {} s", age.as_secs()));
        }
        Ok(())
    }
}

/// The attempt that the container's status calls its last state; while it waits for a restart that is the newest.
fn previous_attempt(status: &PodStatus, container: &str) -> Option<ContainerId> {
    let id = container_status(status, container)?.last_state.as_ref()?.terminated.as_ref()?.container_id.as_ref()?;
    id.split_once("://").map(|(_, id)| ContainerId::from(id))
}

fn uid_of(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

fn waiting_reason(status: &PodStatus, container: &str) -> String {
    let waiting = container_status(status, container).and_then(|c| c.state.as_ref()?.waiting.as_ref()?.reason.clone());
    waiting.unwrap_or_else(|| "ContainerCreating".to_owned())
}

fn container_status<'a>(status: &'a PodStatus, container: &str) -> Option<&'a ContainerStatus> {
    let lists = [&status.init_container_statuses, &status.container_statuses, &status.ephemeral_container_statuses];
    lists.into_iter().flat_map(|list| list.iter().flatten()).find(|c| c.name == container)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    fn pod(name: &str) -> Arc<Pod> {
        let some = |text: &str| Some(text.to_owned());
        let metadata = ObjectMeta {
            name: some(name),
            namespace: some("ns"),
            uid: some(&format!("uid-{name}")),
            ..ObjectMeta::default()
        };
        Arc::new(Pod { metadata, spec: Some(PodSpec::default()), status: None })
    }

    fn put(directory: &Directory, name: &str) {
        directory.put(&pod(name), &PodStatus::default(), &Observed::default());
    }

    async fn found(directory: &Directory, name: &str) -> Result<String, TargetError> {
        let entry = directory.look_up("ns", name, None).await?;
        Ok(entry.pod.metadata.name.clone().unwrap())
    }

    #[tokio::test]
    async fn a_node_that_has_just_started_is_waited_for() {
        let directory = Directory { patience: Duration::from_millis(10), ..Directory::default() };
        let no_pod = |name: &str| Err(TargetError::NoPod(name.to_owned()));
        put(&directory, "early");
        assert_eq!(found(&directory, "early").now_or_never().unwrap(), Ok("early".to_owned()));
        // Nothing was listed: it may be there.
        assert_eq!(found(&directory, "p").await, Err(TargetError::NotYet("p".to_owned())));
        let (mut p, mut other) = (Box::pin(found(&directory, "p")), Box::pin(found(&directory, "other")));
        assert!(p.as_mut().now_or_never().is_none() && other.as_mut().now_or_never().is_none());
        directory.expect(["uid-early", "uid-p", "uid-q"].map(str::to_owned));
        assert!(p.as_mut().now_or_never().is_none() && other.as_mut().now_or_never().is_none());
        put(&directory, "p");
        assert_eq!(p.now_or_never(), Some(Ok("p".to_owned())));
        assert!(other.as_mut().now_or_never().is_none(), "q was not looked at");
        directory.remove("uid-q");
        assert_eq!(other.now_or_never(), Some(no_pod("other")));
        // From here on what is not known is not there.
        directory.expect(["uid-late".to_owned()]);
        assert_eq!(found(&directory, "late").now_or_never(), Some(no_pod("late")));
    }

    #[tokio::test]
    async fn a_node_without_pods_says_so_at_once() {
        let directory = Directory::default();
        directory.expect([]);
        let target = directory.port_target("ns", "p", None).now_or_never().unwrap();
        assert_eq!(target, Err(TargetError::NoPod("p".to_owned())));
        put(&directory, "p");
        let of_another = directory.look_up("ns", "p", Some("uid-old")).now_or_never().unwrap();
        assert_eq!(of_another.err(), Some(TargetError::NoPod("p".to_owned())));
    }
}
