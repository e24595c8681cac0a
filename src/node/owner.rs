//! Who owns what this node makes on the host: a word that no other node, of this cluster or another, has here.
//!
//! It is derived from the cluster (the UID of the Service `default/kubernetes`, which every node may read) and the node's
//! name, and kept in `<root-dir>/owner.json`: a restart finds its Pods without the API server, and a root directory is
//! never used for two clusters.
//!
//! The Service can be deleted (`kubectl delete svc --all`) and is then made anew with another UID. So the record has a
//! second witness, the UID of the Node: where one of the two is the same, so is the cluster, and the word stays.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Service};
use kube::Api;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Registration;
use crate::apiserver::{ApiServer, RequestError, Trouble};
use crate::file::{self, Synced};
use crate::telemetry::chain;

/// Wait between two questions to an API server that cannot be reached.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// What stands for a cluster where there is none; no UID is like it.
const STANDALONE: &str = "none (standalone)";
/// Bytes of the hash that the word shows: 48 bits tell any number of nodes on one host apart.
const WORD_BYTES: usize = 6;

/// Why there is no owner.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The root directory is another's.
    #[error(
        "{path} says that this root directory belongs to node {theirs:?} of cluster {their_cluster}, not to node \
         {ours:?} of cluster {our_cluster}: pass another --root-dir, or remove this one once nothing of it runs"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The node in it.
        theirs: String,
        /// The cluster in it.
        their_cluster: String,
        /// This node.
        ours: String,
        /// This cluster.
        our_cluster: String,
    },
    /// The file cannot be read or written.
    #[error("failed to {action} {path}")]
    File {
        /// `read`, `write` or `understand`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The API server refuses to say which cluster it is.
    #[error("failed to ask which cluster this is (Service default/kubernetes, and the Node)")]
    Refused(#[source] RequestError),
}

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// What the word is derived from, and so never changed: the UID that the Service had when the record was made.
    cluster: String,
    node: String,
    /// The UID of the Node that was last seen in that cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node_uid: Option<String>,
}

impl Record {
    fn new(cluster: impl Into<String>, node: &str) -> Self {
        Self { cluster: cluster.into(), node: node.to_owned(), node_uid: None }
    }

    fn word(&self) -> String {
        let hash = Sha256::digest(format!("{}/{}", self.cluster, self.node));
        hash.iter().take(WORD_BYTES).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Who owns what this node makes.
#[derive(Debug)]
pub struct Owner {
    /// Twelve hex digits.
    pub word: String,
    /// `None` if the API server did not tell which cluster this is: a Node that it shows later may be another cluster's.
    pub witness: Option<Witness>,
}

/// Keeps the UID of the Node in the record.
#[derive(Debug)]
pub struct Witness {
    path: PathBuf,
    record: Record,
}

impl Witness {
    /// Notes the Node that is registered, and each that takes its place, until `closing`.
    pub async fn run(mut self, registration: watch::Receiver<Option<Registration>>, closing: CancellationToken) {
        // Cancel-safe: the next start notes what this one has not.
        closing.run_until_cancelled(self.follow(registration)).await;
        closing.cancelled().await;
    }

    /// Ends with the task that registers.
    async fn follow(&mut self, mut registration: watch::Receiver<Option<Registration>>) {
        loop {
            let uid = registration.borrow_and_update().as_ref().map(|node| node.uid.clone());
            if let Some(uid) = uid.filter(|uid| !uid.is_empty()) {
                self.note(uid);
            }
            if registration.changed().await.is_err() {
                return;
            }
        }
    }

    fn note(&mut self, uid: String) {
        if self.record.node_uid.as_ref() == Some(&uid) {
            return;
        }
        self.record.node_uid = Some(uid);
        if let Err(error) = write(&self.path, &self.record) {
            // It is only missed if the Service is made anew as well.
            warn!(error = chain(&error), "failed to note the Node's UID");
        }
    }
}

/// The owner. Waits for the API server only if this node was never here before.
///
/// # Errors
/// See [`OwnerError`].
pub async fn owner(api: &ApiServer, root: &Path, node: &str) -> Result<Owner, OwnerError> {
    let path = root.join("owner.json");
    let known = read(&path)?;
    loop {
        match (cluster(api, known.as_ref(), node).await, &known) {
            (Ok(cluster), _) => {
                let record = settle(&path, known, Record::new(cluster, node))?;
                return Ok(Owner { word: record.word(), witness: Some(Witness { path, record }) });
            }
            (Err(error), _) if matches!(error.trouble, Trouble::Forbidden | Trouble::UnknownAuthority) => {
                return Err(OwnerError::Refused(error));
            }
            (Err(error), Some(record)) => {
                info!(error = chain(&error), "going on without the API server");
                let ours = Record::new(&record.cluster, node);
                return Ok(Owner { word: settle(&path, known, ours)?.word(), witness: None });
            }
            (Err(error), None) => {
                warn!(error = chain(&error), "waiting for the API server: it must tell which cluster this is");
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    }
}

/// The same for a node that is in no cluster.
///
/// # Errors
/// As [`owner`]; the root directory of a node that was in a cluster is a foreign one.
pub fn standalone(root: &Path, node: &str) -> Result<String, OwnerError> {
    let path = root.join("owner.json");
    settle(&path, read(&path)?, Record::new(STANDALONE, node)).map(|record| record.word())
}

/// The UID that stands for the cluster: the Service's, or the recorded one if it is the cluster of the record after all.
async fn cluster(api: &ApiServer, known: Option<&Record>, node: &str) -> Result<String, RequestError> {
    let services: Api<Service> = Api::namespaced(api.client.clone(), "default");
    let service = api.request(services.get("kubernetes")).await?.metadata.uid.unwrap_or_default();
    let doubted = |record: &&Record| record.node == node && record.cluster != service && record.node_uid.is_some();
    let Some(record) = known.filter(doubted) else { return Ok(service) };
    let nodes: Api<Node> = Api::all(api.client.clone());
    let there = loop {
        match api.request(nodes.get_opt(node)).await {
            Ok(there) => break there.and_then(|node| node.metadata.uid),
            Err(error) if matches!(error.trouble, Trouble::Forbidden | Trouble::UnknownAuthority) => return Err(error),
            // To go on as in the cluster of the record would be to remove that one's Pods if this is another.
            Err(error) => {
                warn!(
                    error = chain(&error),
                    "waiting for the API server: the Node must tell whether the cluster is the same"
                );
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    };
    if there != record.node_uid {
        return Ok(service);
    }
    info!("the Service default/kubernetes was made anew, but the Node is the same, and so is the cluster");
    Ok(record.cluster.clone())
}

/// The record to go by: the one that is there if it says the same, or ours if there is none.
fn settle(path: &Path, known: Option<Record>, ours: Record) -> Result<Record, OwnerError> {
    match known {
        Some(record) if (&record.cluster, &record.node) == (&ours.cluster, &ours.node) => Ok(record),
        Some(record) => Err(OwnerError::Foreign {
            path: path.to_owned(),
            theirs: record.node,
            their_cluster: record.cluster,
            ours: ours.node,
            our_cluster: ours.cluster,
        }),
        None => {
            write(path, &ours)?;
            Ok(ours)
        }
    }
}

fn read(path: &Path) -> Result<Option<Record>, OwnerError> {
    let failed = |action| move |source| OwnerError::File { action, path: path.to_owned(), source };
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::from).map_err(failed("understand")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read")(error)),
    }
}

fn write(path: &Path, record: &Record) -> Result<(), OwnerError> {
    let failed = |source| OwnerError::File { action: "write", path: path.to_owned(), source };
    let text = serde_json::to_vec(record).map_err(io::Error::from).map_err(failed)?;
    let aside = path.with_extension("json.new");
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    // It is written again in its life, and half of one would keep the node from starting.
    file::replace(path, &aside, &text, Synced::Content).map_err(failed)
}

/// The cgroup right below the cgroup root that all of an owner's are in.
pub fn cgroup_root(owner: &str) -> String {
    format!("lambdalet-{owner}")
}

/// Name of the bridge that an owner's sandboxes hang on; an interface's name has room for fifteen characters.
pub fn bridge_name(owner: &str) -> String {
    format!("ll{}", owner.chars().take(8).collect::<String>())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(cluster: &str, node: &str) -> Record {
        Record::new(cluster, node)
    }

    fn registered(uid: &str) -> Option<Registration> {
        Some(Registration { uid: uid.to_owned(), ..Registration::default() })
    }

    /// An API server with these two: the UIDs of the Service and, if it is there, of the Node `n`.
    fn server(service: &'static str, node: Option<&'static str>) -> ApiServer {
        let answer = move |request: http::Request<kube::client::Body>| async move {
            let object = |kind: &str, name: &str, uid: &str| {
                let object = json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "uid": uid}});
                (http::StatusCode::OK, object)
            };
            let (status, body) = match (request.uri().path(), node) {
                ("/api/v1/namespaces/default/services/kubernetes", _) => object("Service", "kubernetes", service),
                ("/api/v1/nodes/n", Some(uid)) => object("Node", "n", uid),
                _ => {
                    let status = json!({
                        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound",
                    });
                    (http::StatusCode::NOT_FOUND, status)
                }
            };
            http::Response::builder().status(status).body(kube::client::Body::from(body.to_string().into_bytes()))
        };
        let client = kube::Client::new(tower::service_fn(answer), "default");
        ApiServer { client, url: "https://api.test/".to_owned(), kubeconfig: PathBuf::new() }
    }

    /// A node that was registered with a Node of the UID `node`, in the cluster whose Service had the UID `service`.
    async fn settled(root: &Path, service: &'static str, node: &'static str) -> String {
        let Owner { word, witness } = owner(&server(service, None), root, "n").await.unwrap();
        let (sender, registration) = watch::channel(registered(node));
        drop(sender);
        witness.unwrap().follow(registration).await;
        word
    }

    #[tokio::test]
    async fn a_service_made_anew_changes_no_owner_while_the_node_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let word = settled(dir.path(), "s1", "n1").await;
        for service in ["s1", "s2"] {
            let again = owner(&server(service, Some("n1")), dir.path(), "n").await.unwrap();
            assert_eq!(again.word, word, "{service}");
        }
        let deleted = owner(&server("s1", None), dir.path(), "n").await.unwrap();
        assert_eq!(deleted.word, word, "a Node that is to be registered anew");
        for node in [None, Some("n2")] {
            let refused = owner(&server("s2", node), dir.path(), "n").await.unwrap_err();
            assert!(matches!(refused, OwnerError::Foreign { .. }), "{node:?}: {refused}");
        }
        let renamed = owner(&server("s1", Some("n1")), dir.path(), "m").await.unwrap_err();
        assert!(matches!(renamed, OwnerError::Foreign { .. }), "{renamed}");
    }

    #[tokio::test]
    async fn the_node_that_takes_anothers_place_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let word = settled(dir.path(), "s1", "n1").await;
        let mut witness = owner(&server("s2", Some("n1")), dir.path(), "n").await.unwrap().witness.unwrap();
        let (sender, registration) = watch::channel(None);
        tokio::join!(witness.follow(registration), async move {
            sender.send_replace(registered("n2"));
            drop(sender);
        });
        assert_eq!(owner(&server("s2", Some("n2")), dir.path(), "n").await.unwrap().word, word);
    }

    #[tokio::test]
    async fn without_the_api_server_the_record_counts_and_nothing_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let word = settled(dir.path(), "s1", "n1").await;
        let offline = owner(&ApiServer::nowhere(), dir.path(), "n").await.unwrap();
        assert_eq!(offline.word, word);
        assert!(offline.witness.is_none(), "whose Node comes later nobody knows");
    }

    #[test]
    fn a_record_of_before_there_was_a_second_witness_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner.json");
        std::fs::write(&path, r#"{"cluster":"a","node":"n"}"#).unwrap();
        assert_eq!(read(&path).unwrap(), Some(record("a", "n")));
    }

    #[test]
    fn the_word_differs_by_cluster_and_by_node() {
        let words = [record("a", "n"), record("b", "n"), record("a", "m")].map(|r| r.word());
        assert!(words[0] != words[1] && words[0] != words[2] && words[1] != words[2]);
        assert_eq!(words[0].len(), 12);
    }

    #[test]
    fn the_record_is_kept_and_a_foreign_root_directory_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root/owner.json");
        let made = settle(&path, read(&path).unwrap(), record("a", "n")).unwrap();
        assert_eq!(settle(&path, read(&path).unwrap(), record("a", "n")).unwrap(), made);
        let refused = settle(&path, read(&path).unwrap(), record("b", "n")).unwrap_err();
        assert!(refused.to_string().contains("belongs to node \"n\" of cluster a"), "{refused}");
    }

    #[test]
    fn a_node_without_a_cluster_keeps_to_its_own_root_directory() {
        let dir = tempfile::tempdir().unwrap();
        let word = standalone(dir.path(), "n").unwrap();
        assert_eq!(standalone(dir.path(), "n").unwrap(), word);
        let path = dir.path().join("owner.json");
        assert!(settle(&path, read(&path).unwrap(), record("a", "n")).is_err(), "nor does a cluster take it over");
    }

    #[test]
    fn a_broken_record_is_an_error_and_not_a_fresh_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner.json");
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().to_string().starts_with("failed to understand"));
    }
}
