//! What the node's API finds of function Pods: their environments' containers, and a way in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::{base, environment_key, kept};
use crate::function::service::Service;
use crate::kubelet_api::targets::{Entrance, LogSpan, TargetError};
use crate::pod::observed::Observed;
use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus, LogChunk};
use crate::telemetry::chain;

/// The function Pods of the node, by UID. Written by workers, read by the node's API.
#[derive(Debug, Default)]
pub(in crate::pod) struct Pools {
    pools: Mutex<BTreeMap<String, Pool>>,
    /// Wakes whoever follows a log.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Pool {
    service: Weak<Service>,
    /// Where lines of removed environments are; `None` while there is no service yet.
    logs: Option<PathBuf>,
    /// The containers of each environment, by its key.
    members: BTreeMap<String, Vec<ContainerStatus>>,
}

impl Pools {
    /// A pool is at work.
    pub(in crate::pod) fn open(&self, uid: &str, service: &Arc<Service>, logs: PathBuf) {
        let mut pools = self.pools();
        let pool = pools.entry(uid.to_owned()).or_default();
        pool.service = Arc::downgrade(service);
        pool.logs = Some(logs);
    }

    /// What is known of an environment now.
    pub(in crate::pod) fn note(&self, key: &str, observed: &Observed) {
        let containers = observed.containers().cloned().collect();
        self.pools().entry(base(key).to_owned()).or_default().members.insert(key.to_owned(), containers);
        self.changed.send_replace(());
    }

    /// A Pod or an environment is gone.
    pub(in crate::pod) fn remove(&self, key: &str) {
        let mut pools = self.pools();
        if base(key) == key {
            pools.remove(key);
        } else if let Some(pool) = pools.get_mut(base(key)) {
            pool.members.remove(key);
        }
        drop(pools);
        self.changed.send_replace(());
    }

    /// The running containers of an environment.
    pub(super) fn running(&self, key: &str) -> Vec<ContainerId> {
        let pools = self.pools();
        let members = pools.get(base(key)).and_then(|pool| pool.members.get(key));
        let running = members.into_iter().flatten().filter(|container| container.state == ContainerState::Running);
        running.map(|container| container.id.clone()).collect()
    }

    /// The pool of a function Pod, if it is at work.
    pub(in crate::pod) fn service(&self, uid: &str) -> Option<Arc<Service>> {
        self.pools().get(uid)?.service.upgrade()
    }

    /// Lets a visitor into a container of the environment that has been ready longest.
    pub(in crate::pod) async fn enter(
        &self,
        service: &Arc<Service>,
        pod: &Pod,
        container: &str,
    ) -> Result<Entrance, TargetError> {
        let spec = pod.spec.iter().flat_map(|spec| &spec.containers);
        if !spec.into_iter().any(|named| named.name == container) {
            return Err(TargetError::NotRunning(container.to_owned()));
        }
        let meta = &pod.metadata;
        let visit = service.visit().await.map_err(|refusal| TargetError::Refused {
            pod: meta.name.clone().unwrap_or_default(),
            reason: refusal.reason.to_string(),
        })?;
        let key = environment_key(meta.uid.as_deref().unwrap_or_default(), visit.environment());
        let found = self.members(base(&key)).into_iter().flatten().find(|(member, status)| {
            *member == key && status.name == container && status.state == ContainerState::Running
        });
        let (_, status) = found.ok_or_else(|| TargetError::NotRunning(container.to_owned()))?;
        Ok(Entrance { container: status.id, stay: Some(Box::new(visit)) })
    }

    /// Everything that containers of that name have written; with `previous` only those that are gone. `None` if this is
    /// no function Pod, or its pool is not at work yet; in it `None` if nothing is gone.
    pub(in crate::pod) async fn log_span(
        self: &Arc<Self>,
        uid: &str,
        container: &str,
        previous: bool,
    ) -> Option<Option<LogSpan>> {
        let logs = self.pools().get(uid)?.logs.clone()?;
        // What changes from here on is seen as later; what is there is listed before what is kept of it, so that
        // nothing falls in between.
        let changed = self.changed.subscribe();
        let present = self.started(uid, container).unwrap_or_default();
        let kept = read_kept(logs, container.to_owned()).await;
        if previous {
            let present = Vec::new();
            let kept: Vec<_> = kept.into_iter().map(|(_, chunks)| chunks).collect();
            if kept.is_empty() {
                return Some(None);
            }
            return Some(Some(LogSpan { kept, present, later: stream::empty().boxed() }));
        }
        let seen = present.iter().map(|(_, id)| id.clone()).collect();
        let is_kept = |key: &String| kept.iter().any(|(name, _)| key.strip_prefix(uid) == Some(&format!(".{name}")));
        let present = present.iter().filter(|(key, _)| !is_kept(key)).map(|(_, id)| id.clone()).collect();
        let kept = kept.into_iter().map(|(_, chunks)| chunks).collect();
        let names = (uid.to_owned(), container.to_owned());
        Some(Some(LogSpan { kept, present, later: self.later(names, seen, changed) }))
    }

    /// Containers that are started from now on, until the Pod is gone.
    fn later(
        self: &Arc<Self>,
        (uid, container): (String, String),
        seen: BTreeSet<ContainerId>,
        changed: watch::Receiver<()>,
    ) -> BoxStream<'static, ContainerId> {
        let state = (Arc::clone(self), seen, changed, VecDeque::new());
        let names = Arc::new((uid, container));
        let later = stream::unfold(state, move |(pools, mut seen, mut changed, mut fresh)| {
            let names = Arc::clone(&names);
            async move {
                loop {
                    if let Some(id) = fresh.pop_front() {
                        return Some((id, (pools, seen, changed, fresh)));
                    }
                    let now: BTreeSet<_> = pools.started(&names.0, &names.1)?.into_iter().map(|(_, id)| id).collect();
                    fresh.extend(now.difference(&seen).cloned());
                    seen = now;
                    if fresh.is_empty() {
                        changed.changed().await.ok()?;
                    }
                }
            }
        });
        later.boxed()
    }

    /// The containers of that name that have been started, each with its environment's key; `None` if there is no such
    /// Pod any more.
    fn started(&self, uid: &str, container: &str) -> Option<Vec<(String, ContainerId)>> {
        let members = self.members(uid)?;
        let named = members.into_iter().filter(|(_, c)| c.name == container && c.state != ContainerState::Created);
        Some(named.map(|(key, status)| (key, status.id)).collect())
    }

    fn members(&self, uid: &str) -> Option<Vec<(String, ContainerStatus)>> {
        let pools = self.pools();
        let members = &pools.get(uid)?.members;
        let each = members.iter().flat_map(|(key, containers)| containers.iter().map(|c| (key.clone(), c.clone())));
        Some(each.collect())
    }

    fn pools(&self) -> MutexGuard<'_, BTreeMap<String, Pool>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read_kept(logs: PathBuf, container: String) -> Vec<(String, Vec<LogChunk>)> {
    let place = logs.display().to_string();
    match tokio::task::spawn_blocking(move || kept::kept(&logs, &container)).await {
        Ok(Ok(kept)) => kept,
        Ok(Err(error)) => {
            tracing::warn!(place, error = chain(&error), "failed to read the kept logs of a function");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::pod::testing;
    use crate::runtime::types::PodRef;

    const UID: &str = "u-1";

    fn container(id: &str, name: &str, state: ContainerState) -> ContainerStatus {
        let pod = PodRef { uid: UID.to_owned(), namespace: "default".to_owned(), name: "f".to_owned() };
        testing::container_status(&pod, id, name, state)
    }

    /// A pool at work, with these environments.
    fn pools(place: &Path) -> Arc<Pools> {
        let pools = Arc::new(Pools::default());
        pools.pools().entry(UID.to_owned()).or_default().logs = Some(place.to_owned());
        pools
    }

    fn note(pools: &Pools, environment: &str, containers: Vec<ContainerStatus>) {
        pools.note(&format!("{UID}.{environment}"), &Observed::new(Vec::new(), containers));
    }

    fn keep(place: &Path, environment: &str, text: &str) {
        let folder = place.join("main");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(environment), format!("2026-11-21T10:00:00.000000000Z stdout F {text}\n")).unwrap();
    }

    async fn span(pools: &Arc<Pools>, previous: bool) -> LogSpan {
        pools.log_span(UID, "main", previous).await.expect("a pool").expect("logs")
    }

    fn texts(span: &LogSpan) -> Vec<&str> {
        span.kept.iter().flatten().map(|chunk| std::str::from_utf8(&chunk.bytes).unwrap().trim_end()).collect()
    }

    #[tokio::test]
    async fn what_was_kept_comes_with_what_runs_and_nothing_twice() {
        let place = tempfile::tempdir().unwrap();
        let pools = pools(place.path());
        keep(place.path(), "0.0", "gone");
        keep(place.path(), "1.0", "being removed");
        let main = |id, state| vec![container(id, "main", state), container("other", "side", ContainerState::Running)];
        note(&pools, "1.0", main("one", ContainerState::Exited));
        note(&pools, "2.0", main("two", ContainerState::Running));
        note(&pools, "3.0", main("three", ContainerState::Created));
        let found = span(&pools, false).await;
        assert_eq!(texts(&found), ["gone", "being removed"]);
        assert_eq!(found.present, ["two".into()], "what is prepared has written nothing");
    }

    #[tokio::test]
    async fn the_previous_ones_are_those_that_are_gone() {
        let place = tempfile::tempdir().unwrap();
        let pools = pools(place.path());
        note(&pools, "1.0", vec![container("one", "main", ContainerState::Running)]);
        assert!(pools.log_span(UID, "main", true).await.expect("a pool").is_none(), "nothing is gone");
        keep(place.path(), "0.0", "gone");
        let mut found = span(&pools, true).await;
        assert_eq!((texts(&found), found.present.len()), (vec!["gone"], 0));
        assert_eq!(found.later.next().await, None);
    }

    #[tokio::test]
    async fn who_follows_is_told_of_what_starts_later_until_the_pod_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let pools = pools(place.path());
        note(&pools, "0.0", vec![container("zero", "main", ContainerState::Running)]);
        let mut found = span(&pools, false).await;
        note(&pools, "1.0", vec![container("one", "main", ContainerState::Created)]);
        note(&pools, "2.0", vec![container("two", "main", ContainerState::Running)]);
        assert_eq!(found.later.next().await, Some("two".into()));
        note(&pools, "1.0", vec![container("one", "main", ContainerState::Running)]);
        assert_eq!(found.later.next().await, Some("one".into()), "once it is started");
        pools.remove(&format!("{UID}.0.0"));
        pools.remove(UID);
        assert_eq!(found.later.next().await, None);
    }

    #[tokio::test]
    async fn there_are_no_logs_of_what_is_no_function_or_not_at_work() {
        let pools = Arc::new(Pools::default());
        assert!(pools.log_span(UID, "main", false).await.is_none());
        note(&pools, "0.0", Vec::new());
        assert!(pools.log_span(UID, "main", false).await.is_none(), "its pool is not at work yet");
    }
}
