//! Who owns what this node makes on the host: a word that no other node, of this cluster or another, has here.
//!
//! It is derived from the cluster (the UID of the Service `default/kubernetes`, which every node may read and which
//! lives as long as the cluster) and the node's name, and kept in `<root-dir>/owner.json`: a restart finds its Pods
//! without the API server, and a root directory is never used for two clusters.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::Api;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

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
    #[error("failed to ask which cluster this is (Service default/kubernetes)")]
    Refused(#[source] RequestError),
}

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    cluster: String,
    node: String,
}

impl Record {
    fn word(&self) -> String {
        let hash = Sha256::digest(format!("{}/{}", self.cluster, self.node));
        hash.iter().take(WORD_BYTES).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The owner's word: twelve hex digits. Waits for the API server only if this node was never here before.
///
/// # Errors
/// See [`OwnerError`].
pub async fn owner(api: &ApiServer, root: &Path, node: &str) -> Result<String, OwnerError> {
    let path = root.join("owner.json");
    let known = read(&path)?;
    loop {
        match (cluster(api).await, &known) {
            (Ok(cluster), _) => return settle(&path, known, Record { cluster, node: node.to_owned() }),
            (Err(error), _) if matches!(error.trouble, Trouble::Forbidden | Trouble::UnknownAuthority) => {
                return Err(OwnerError::Refused(error));
            }
            (Err(error), Some(record)) => {
                info!(error = chain(&error), "going on without the API server");
                let ours = Record { cluster: record.cluster.clone(), node: node.to_owned() };
                return settle(&path, known, ours);
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
    settle(&path, read(&path)?, Record { cluster: STANDALONE.to_owned(), node: node.to_owned() })
}

async fn cluster(api: &ApiServer) -> Result<String, RequestError> {
    let services: Api<Service> = Api::namespaced(api.client.clone(), "default");
    let service = api.request(services.get("kubernetes")).await?;
    Ok(service.metadata.uid.unwrap_or_default())
}

fn settle(path: &Path, known: Option<Record>, ours: Record) -> Result<String, OwnerError> {
    match known {
        Some(record) if record == ours => Ok(ours.word()),
        Some(record) => Err(OwnerError::Foreign {
            path: path.to_owned(),
            theirs: record.node,
            their_cluster: record.cluster,
            ours: ours.node,
            our_cluster: ours.cluster,
        }),
        None => {
            write(path, &ours)?;
            Ok(ours.word())
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
    file::replace(path, &aside, &text, Synced::No).map_err(failed)
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
    use super::*;

    fn record(cluster: &str, node: &str) -> Record {
        Record { cluster: cluster.into(), node: node.into() }
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
        let word = settle(&path, read(&path).unwrap(), record("a", "n")).unwrap();
        assert_eq!(settle(&path, read(&path).unwrap(), record("a", "n")).unwrap(), word);
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
