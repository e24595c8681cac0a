//! What is there, as lists tell it. Clients list every second, and hardly anything has changed since the last time: so only
//! Pods to which something happened are looked at again, as the engine's events and this process's own verbs say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};

use crate::runtime::types::{ContainerId, ContainerStatus, SandboxId, SandboxStatus};
use crate::runtime::{Result, Runtime};

/// Pods that are looked at at once.
const AT_ONCE: usize = 4;

/// Sandboxes and containers, in no order.
pub(super) type Seen = (Vec<Arc<SandboxStatus>>, Vec<Arc<ContainerStatus>>);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct View {
    inner: Mutex<Inner>,
    /// One look at a time: who waits for it sees what it finds.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: HashMap<SandboxId, Arc<SandboxStatus>>,
    containers: HashMap<ContainerId, Arc<ContainerStatus>>,
    /// Counts what happened, so that what happens during a look is not taken for seen.
    count: u64,
    /// Pods to which something happened, and when it last did.
    stale: HashMap<String, u64>,
    /// When it was last possible to miss something; before that nothing is known. `None` once all was looked at since.
    missed: Option<u64>,
    /// Whether events come. Without them all may be different at any time.
    watched: bool,
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }
}

impl View {
    /// Something happened to this Pod.
    pub(super) fn changed(&self, pod_uid: &str) {
        let mut inner = self.lock();
        let at = inner.next();
        inner.stale.insert(pod_uid.to_owned(), at);
    }

    /// From now on every change is told to [`changed`](Self::changed), or not any more. What was before may have been missed.
    pub(super) fn watched(&self, watched: bool) {
        let mut inner = self.lock();
        inner.missed = Some(inner.next());
        inner.watched = watched;
    }

    /// What is there now, all or of one Pod. Cancel-safe: what was not looked at to the end is looked at the next time.
    ///
    /// # Errors
    /// Those of the runtime.
    pub(super) async fn seen(&self, runtime: &dyn Runtime, pod_uid: Option<&str>) -> Result<Seen> {
        let _looking = self.looking.lock().await;
        let (all, stale, missed) = {
            let inner = self.lock();
            let all = !inner.watched || inner.missed.is_some();
            let wanted = inner.stale.iter().filter(|(uid, _)| pod_uid.is_none_or(|wanted| wanted == *uid));
            (all, wanted.map(|(uid, at)| (uid.clone(), *at)).collect::<Vec<_>>(), inner.missed)
        };
        match (all, pod_uid) {
            // Not worth a look at all the others.
            (true, Some(uid)) => return look(runtime, Some(uid)).await,
            (true, None) => {
                let found = look(runtime, None).await?;
                let mut inner = self.lock();
                inner.sandboxes.clear();
                inner.containers.clear();
                inner.put(found, &stale);
                if inner.missed == missed {
                    inner.missed = None;
                }
            }
            (false, _) => {
                let uids: Vec<String> = stale.iter().map(|(uid, _)| uid.clone()).collect();
                let looks = stream::iter(uids).map(|uid| async move { look(runtime, Some(&uid)).await });
                let found: Vec<Seen> = looks.buffer_unordered(AT_ONCE).try_collect().await?;
                let mut inner = self.lock();
                inner.sandboxes.retain(|_, sandbox| !stale.iter().any(|(uid, _)| *uid == sandbox.pod.uid));
                inner.containers.retain(|_, container| !stale.iter().any(|(uid, _)| *uid == container.pod.uid));
                found.into_iter().for_each(|found| inner.put(found, &stale));
            }
        }
        let inner = self.lock();
        let of_pod = |uid: &str| pod_uid.is_none_or(|wanted| wanted == uid);
        Ok((
            inner.sandboxes.values().filter(|sandbox| of_pod(&sandbox.pod.uid)).cloned().collect(),
            inner.containers.values().filter(|container| of_pod(&container.pod.uid)).cloned().collect(),
        ))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is made in one go.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Notes what was found, and that these Pods were looked at, unless something happened to one since.
    fn put(&mut self, (sandboxes, containers): Seen, looked_at: &[(String, u64)]) {
        self.sandboxes.extend(sandboxes.into_iter().map(|sandbox| (sandbox.id.clone(), sandbox)));
        self.containers.extend(containers.into_iter().map(|container| (container.id.clone(), container)));
        for (uid, at) in looked_at {
            if self.stale.get(uid) == Some(at) {
                self.stale.remove(uid);
            }
        }
    }
}

async fn look(runtime: &dyn Runtime, pod_uid: Option<&str>) -> Result<Seen> {
    let (sandboxes, containers) =
        tokio::try_join!(runtime.list_pod_sandboxes(pod_uid), runtime.list_containers(pod_uid))?;
    Ok((sandboxes.into_iter().map(Arc::new).collect(), containers.into_iter().map(Arc::new).collect()))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test's tasks end with it")]
mod tests {
    use super::*;
    use crate::runtime::fake::FakeRuntime;
    use crate::runtime::types::{
        MachineFiles, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxNetwork, SandboxState,
    };
    use crate::runtime::verb::Verb;
    use crate::runtime::{Kind, RuntimeError, SandboxRuntime as _};

    async fn sandbox(runtime: &FakeRuntime, uid: &str) -> SandboxId {
        let config = SandboxConfig {
            pod: PodRef { uid: uid.into(), namespace: "n".into(), name: uid.into() },
            attempt: 0,
            handler: None,
            hostname: uid.into(),
            network: SandboxNetwork::Host,
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            resources: Resources::default(),
            machine: MachineFiles::default(),
        };
        runtime.run_pod_sandbox(&config).await.unwrap()
    }

    async fn states(view: &View, runtime: &FakeRuntime, uid: Option<&str>) -> Vec<(String, SandboxState)> {
        let (sandboxes, _) = view.seen(runtime, uid).await.unwrap();
        let mut states: Vec<_> = sandboxes.iter().map(|one| (one.pod.uid.clone(), one.state)).collect();
        states.sort_by(|one, other| one.0.cmp(&other.0));
        states
    }

    #[tokio::test]
    async fn only_what_changed_is_looked_at_again() {
        let (view, runtime) = (View::default(), FakeRuntime::new());
        view.watched(true);
        let (a, _) = (sandbox(&runtime, "a").await, sandbox(&runtime, "b").await);
        assert_eq!(states(&view, &runtime, None).await.len(), 2);
        let before = runtime.calls(Verb::ListPodSandboxes);
        states(&view, &runtime, None).await;
        assert_eq!(runtime.calls(Verb::ListPodSandboxes), before, "nothing has happened");
        runtime.stop_pod_sandbox(&a).await.unwrap();
        view.changed("a");
        assert_eq!(states(&view, &runtime, Some("b")).await, [("b".to_owned(), SandboxState::Ready)]);
        assert_eq!(runtime.calls(Verb::ListPodSandboxes), before, "not to this Pod");
        assert_eq!(states(&view, &runtime, None).await[0].1, SandboxState::NotReady);
        runtime.remove_pod_sandbox(&a).await.unwrap();
        view.changed("a");
        assert_eq!(states(&view, &runtime, None).await, [("b".to_owned(), SandboxState::Ready)]);
        assert_eq!(runtime.calls(Verb::ListPodSandboxes), before + 2);
    }

    #[tokio::test]
    async fn without_events_all_is_looked_at_each_time() {
        let (view, runtime) = (View::default(), FakeRuntime::new());
        sandbox(&runtime, "a").await;
        assert_eq!(states(&view, &runtime, None).await.len(), 1);
        sandbox(&runtime, "b").await;
        assert_eq!(states(&view, &runtime, None).await.len(), 2);
        view.watched(true);
        assert_eq!(states(&view, &runtime, None).await.len(), 2);
        view.watched(false);
        sandbox(&runtime, "c").await;
        assert_eq!(states(&view, &runtime, None).await.len(), 3);
    }

    #[tokio::test]
    async fn what_could_not_be_looked_at_is_looked_at_the_next_time() {
        let (view, runtime) = (View::default(), FakeRuntime::new());
        view.watched(true);
        let a = sandbox(&runtime, "a").await;
        states(&view, &runtime, None).await;
        runtime.stop_pod_sandbox(&a).await.unwrap();
        view.changed("a");
        runtime.fail_next(Verb::ListPodSandboxes, RuntimeError::new(Kind::Unavailable, "no"));
        view.seen(&runtime, None).await.unwrap_err();
        assert_eq!(states(&view, &runtime, None).await[0].1, SandboxState::NotReady);
    }

    #[tokio::test]
    async fn what_happens_during_a_look_is_seen_after_it() {
        let (view, runtime) = (Arc::new(View::default()), FakeRuntime::new());
        view.watched(true);
        let a = sandbox(&runtime, "a").await;
        states(&view, &runtime, None).await;
        view.changed("a");
        let hold = runtime.hang_next(Verb::ListContainers);
        let look = tokio::spawn({
            let (view, runtime) = (Arc::clone(&view), runtime.clone());
            async move { view.seen(&runtime, None).await.map(drop) }
        });
        while runtime.calls(Verb::ListContainers) < 2 {
            tokio::task::yield_now().await;
        }
        runtime.stop_pod_sandbox(&a).await.unwrap();
        view.changed("a");
        drop(hold);
        look.await.unwrap().unwrap();
        assert_eq!(states(&view, &runtime, None).await[0].1, SandboxState::NotReady);
    }
}
