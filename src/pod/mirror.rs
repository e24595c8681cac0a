//! Mirror Pods: what the API server has in place of static Pods, so that they are seen there.
//!
//! One is made for each static Pod that runs, made anew if somebody deletes it, and removed once its static Pod has
//! ended. Deleting one ends nothing (Kubernetes documentation, "Create static Pods").

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::static_pods::{Key, MIRROR, mirrored};
use super::translate::pod_ref;
use crate::node::Registration;
use crate::retry::Retry;
use crate::runtime::types::PodRef;
use crate::telemetry::chain;

/// Longest time one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What there is to be mirrored, and what there is of mirrors.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Both are known: the API server's Pods were listed, and the files of static Pods read.
    pub complete: bool,
    /// The static Pods that run.
    pub pods: BTreeMap<Key, Arc<Pod>>,
    /// Those that are about to end; their mirrors show it until they have.
    pub ending: BTreeSet<Key>,
    /// The mirror Pods on the API server.
    pub mirrors: BTreeMap<Key, Arc<Pod>>,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make a mirror of this static Pod.
    Create(Arc<Pod>),
    /// Remove this mirror.
    Delete(PodRef),
}

/// What is missing and what is too much. A mirror of another file, or that somebody is deleting, goes first; what takes
/// its place is made once it is gone.
pub fn actions(work: &Work) -> Vec<Action> {
    if !work.complete {
        return Vec::new();
    }
    let stale = work.mirrors.iter().filter(|(key, mirror)| match work.pods.get(*key) {
        Some(pod) => mirrored(mirror) != pod.metadata.uid.as_deref() || mirror.metadata.deletion_timestamp.is_some(),
        None => !work.ending.contains(*key),
    });
    let missing = work.pods.iter().filter(|(key, _)| !work.mirrors.contains_key(*key));
    let deletions = stale.map(|(_, mirror)| Action::Delete(pod_ref(mirror)));
    deletions.chain(missing.map(|(_, pod)| Action::Create(Arc::clone(pod)))).collect()
}

/// Keeps the mirrors right.
pub struct Mirrors {
    client: kube::Client,
    node: String,
    work: watch::Receiver<Work>,
    registration: watch::Receiver<Option<Registration>>,
}

impl Mirrors {
    /// Of the node of that name.
    pub fn new(
        client: kube::Client,
        node: &str,
        work: watch::Receiver<Work>,
        registration: watch::Receiver<Option<Registration>>,
    ) -> Self {
        Self { client, node: node.to_owned(), work, registration }
    }

    /// Works until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut retry = Retry::new("keep mirror Pods");
        loop {
            let work = self.work.borrow_and_update().clone();
            self.registration.mark_unchanged();
            let mut pause = None;
            for action in actions(&work) {
                if let Err(error) = self.perform(&action).await {
                    pause = Some(retry.failed(error));
                }
            }
            if pause.is_none() {
                retry.succeeded();
            }
            let again = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Cancel-safe: a change not taken stays unseen.
                changed = self.work.changed() => if changed.is_err() {
                    // Who says what there is to do has ended, as the whole process is about to.
                    stop.cancelled().await;
                    return;
                },
                // Cancel-safe: likewise.
                Ok(()) = self.registration.changed() => {}
                // Cancel-safe: a timer.
                () = again => {}
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return,
            }
        }
    }

    async fn perform(&self, action: &Action) -> Result<(), String> {
        let done = match action {
            Action::Create(pod) => {
                // Its owner is the Node object, which is not there before.
                let Some(node) = self.registration.borrow().as_ref().map(|node| node.uid.clone()) else {
                    return Ok(());
                };
                tokio::time::timeout(TIMEOUT, self.create(pod, node)).await
            }
            Action::Delete(mirror) => tokio::time::timeout(TIMEOUT, self.delete(mirror)).await,
        };
        match done {
            Ok(done) => done.map_err(|error| chain(&error)),
            Err(_) => Err(format!("the API server did not answer within {TIMEOUT:?}")),
        }
    }

    async fn create(&self, pod: &Pod, node_uid: String) -> Result<(), kube::Error> {
        let mut mirror = pod.clone();
        let meta = &mut mirror.metadata;
        let hash = meta.uid.take().unwrap_or_default();
        meta.annotations.get_or_insert_default().insert(MIRROR.to_owned(), hash);
        // NodeRestriction asks for it: with the Node its mirrors go.
        meta.owner_references = Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: node_uid,
            controller: Some(true),
            block_owner_deletion: None,
        }]);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), meta.namespace.as_deref().unwrap_or_default());
        api.create(&PostParams::default(), &mirror).await.map(drop)
    }

    async fn delete(&self, mirror: &PodRef) -> Result<(), kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &mirror.namespace);
        let preconditions = Preconditions { uid: Some(mirror.uid.clone()), resource_version: None };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default().grace_period(0) };
        match api.delete(&mirror.name, &params).await {
            Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Ok(()),
            done => done.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::pod::static_pods::key;

    fn pod(name: &str, uid: &str, mirror_of: Option<&str>, going: bool) -> Arc<Pod> {
        let annotations = mirror_of.map(|hash| json!({ MIRROR: hash }));
        let deleted = going.then_some("2026-11-21T10:00:00Z");
        let meta = json!({ "namespace": "ns", "name": name, "uid": uid, "annotations": annotations, "deletionTimestamp": deleted });
        Arc::new(serde_json::from_value(json!({ "metadata": meta })).unwrap())
    }

    fn work(pods: &[Arc<Pod>], mirrors: &[Arc<Pod>]) -> Work {
        let keyed = |pods: &[Arc<Pod>]| pods.iter().map(|pod| (key(pod), Arc::clone(pod))).collect();
        Work { complete: true, pods: keyed(pods), ending: BTreeSet::new(), mirrors: keyed(mirrors) }
    }

    #[test]
    fn each_static_pod_has_one_mirror_of_what_it_is() {
        let web = pod("web", "h1", None, false);
        let mirror = pod("web", "u1", Some("h1"), false);
        assert_eq!(actions(&work(std::slice::from_ref(&web), &[])), [Action::Create(web.clone())]);
        assert_eq!(actions(&work(std::slice::from_ref(&web), std::slice::from_ref(&mirror))), []);
        let delete =
            |uid: &str| [Action::Delete(PodRef { uid: uid.into(), namespace: "ns".into(), name: "web".into() })];
        let deleted = pod("web", "u2", Some("h1"), true);
        assert_eq!(actions(&work(std::slice::from_ref(&web), &[deleted])), delete("u2"), "it is made anew then");
        let other = pod("web", "u3", Some("h0"), false);
        assert_eq!(actions(&work(&[web], &[other])), delete("u3"));
        let mut orphan = work(&[], &[mirror]);
        assert_eq!(actions(&orphan), delete("u1"));
        orphan.ending.insert(("ns".into(), "web".into()));
        assert_eq!(actions(&orphan), [], "its static Pod has not ended yet");
        orphan.ending.clear();
        orphan.complete = false;
        assert_eq!(actions(&orphan), [], "its file may not have been read yet");
    }

    proptest! {
        #[test]
        fn doing_what_is_to_be_done_leaves_nothing_to_do(
            statics in prop::collection::btree_map(0u8..6, 0u8..3, 0..6),
            mirrors in prop::collection::btree_map(0u8..6, (0u8..3, any::<bool>()), 0..6),
        ) {
            let statics: Vec<_> = statics.iter().map(|(n, h)| pod(&n.to_string(), &h.to_string(), None, false)).collect();
            let mirrors: Vec<_> =
                mirrors.iter().map(|(n, (h, going))| pod(&n.to_string(), &format!("m{n}"), Some(&h.to_string()), *going)).collect();
            let mut state = work(&statics, &mirrors);
            for _ in 0..2 {
                for action in actions(&state) {
                    match action {
                        Action::Delete(gone) => drop(state.mirrors.remove(&(gone.namespace, gone.name))),
                        Action::Create(made) => {
                            let (_, name) = key(&made);
                            let hash = made.metadata.uid.clone().unwrap();
                            prop_assert!(state.mirrors.insert(key(&made), pod(&name, "new", Some(&hash), false)).is_none());
                        }
                    }
                }
            }
            prop_assert_eq!(actions(&state), []);
            prop_assert_eq!(state.mirrors.len(), state.pods.len());
        }
    }
}
