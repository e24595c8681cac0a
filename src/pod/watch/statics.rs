//! Static Pods in the Pod loop: a worker for each, and what is known of their mirrors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch as channel;

use super::super::mirror::Work;
use super::super::static_pods::{Key, StaticPods, key, mirrored};
use super::super::worker::{Desired, Past};
use super::PodLoop;

/// What the loop knows of them.
pub(super) struct Statics {
    source: channel::Receiver<StaticPods>,
    work: channel::Sender<Work>,
    /// The Pods that have workers, those that are ending too, by UID.
    hired: BTreeMap<String, Arc<Pod>>,
    /// The mirrors of the LIST under way, or of the last one and the watch since.
    mirrors: BTreeMap<Key, Arc<Pod>>,
    listed: bool,
}

impl Statics {
    /// Those that `source` tells; `work` is what a [`super::super::mirror::Mirrors`] goes by.
    pub(super) fn new(source: channel::Receiver<StaticPods>, work: channel::Sender<Work>) -> Self {
        let mut source = source;
        // What is known already is a change too.
        source.mark_changed();
        Self { source, work, hired: BTreeMap::new(), mirrors: BTreeMap::new(), listed: false }
    }

    /// None, and nobody to keep mirrors.
    pub(super) fn none() -> Self {
        Self::new(channel::channel(StaticPods::none()).1, channel::channel(Work::default()).0)
    }

    /// Returns when the files say something else.
    pub(super) async fn changed(&mut self) {
        if self.source.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the files were read: before that, what runs of an earlier process may be theirs.
    pub(super) fn are_known(&self) -> bool {
        self.source.borrow().read
    }

    /// Whether the UID is a static Pod's, or one's that is still to come.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.hired.contains_key(uid) || self.source.borrow().pods.contains_key(uid)
    }

    pub(super) fn begin_list(&mut self) {
        self.mirrors.clear();
        self.listed = false;
    }
}

impl PodLoop {
    /// Also runs the Pods that `source` tells, and says in `work` what of them is to be mirrored.
    #[must_use]
    pub fn with_static_pods(self, source: channel::Receiver<StaticPods>, work: channel::Sender<Work>) -> Self {
        Self { statics: Statics::new(source, work), ..self }
    }

    /// Runs static Pods only.
    #[must_use]
    pub fn without_api_server(self) -> Self {
        Self { alone: true, ..self }
    }

    /// Ends static Pods whose files are gone, and begins with those that are new.
    pub(super) fn apply_statics(&mut self) {
        let StaticPods { read, pods: wanted } = self.statics.source.borrow_and_update().clone();
        if !read {
            return;
        }
        let ending: Vec<_> = self.statics.hired.keys().filter(|uid| !wanted.contains_key(*uid)).cloned().collect();
        ending.iter().for_each(|uid| self.gone(uid));
        // An edited file's Pod waits for the one before it: they share a name, and maybe ports and directories.
        let mut taken: BTreeSet<Key> = self.statics.hired.values().map(|pod| key(pod)).collect();
        for (uid, pod) in wanted {
            if !self.workers.contains_key(&uid) && taken.insert(key(&pod)) {
                tracing::info!(pod = pod.metadata.name, uid, "a static Pod begins");
                self.shared.publisher.expect_mirror(&uid);
                self.statics.hired.insert(uid.clone(), Arc::clone(&pod));
                self.hire(Duration::ZERO, uid, Desired { pod, gone: false }, Past::Unknown);
            }
        }
        self.tell_mirrors();
    }

    /// A worker has ended: was it a static Pod's, its name is free.
    pub(super) fn static_ended(&mut self, uid: &str) {
        if self.statics.hired.remove(uid).is_some() {
            self.shared.publisher.forget_mirror(uid);
            self.apply_statics();
        }
    }

    /// The API server's Pods are listed.
    pub(super) fn mirrors_listed(&mut self) {
        self.statics.listed = true;
        let missing = self.statics.hired.iter().filter(|(_, pod)| !self.statics.mirrors.contains_key(&key(pod)));
        missing.for_each(|(uid, _)| self.shared.publisher.mirror(uid, None));
        self.tell_mirrors();
    }

    /// A mirror Pod is there, or has changed.
    pub(super) fn mirror_seen(&mut self, mirror: Pod) {
        if let Some(hash) = mirrored(&mirror) {
            let live = mirror.metadata.deletion_timestamp.is_none();
            self.shared.publisher.mirror(hash, Some(&mirror).filter(|_| live));
        }
        self.statics.mirrors.insert(key(&mirror), Arc::new(mirror));
        self.tell_mirrors();
    }

    /// A Pod that was a mirror is gone.
    pub(super) fn mirror_gone(&mut self, mirror: &Pod) {
        if let Some(hash) = mirrored(mirror) {
            self.shared.publisher.mirror(hash, None);
        }
        let same = |known: &Arc<Pod>| known.metadata.uid == mirror.metadata.uid;
        if self.statics.mirrors.get(&key(mirror)).is_some_and(same) {
            self.statics.mirrors.remove(&key(mirror));
        }
        self.tell_mirrors();
    }

    fn tell_mirrors(&self) {
        let statics = &self.statics;
        let wanted = statics.source.borrow().pods.clone();
        let (stay, end): (Vec<_>, Vec<_>) = statics.hired.iter().partition(|(uid, _)| wanted.contains_key(*uid));
        statics.work.send_replace(Work {
            complete: statics.listed && statics.are_known(),
            pods: stay.into_iter().map(|(_, pod)| (key(pod), Arc::clone(pod))).collect(),
            ending: end.into_iter().map(|(_, pod)| key(pod)).collect(),
            mirrors: statics.mirrors.clone(),
        });
    }
}
