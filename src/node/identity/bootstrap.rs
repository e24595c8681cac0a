//! TLS bootstrap: with a bootstrap token to a kubeconfig of the node's own
//! (Kubernetes documentation, "TLS bootstrapping").

use std::path::Path;

use jiff::Timestamp;
use kube::config::Kubeconfig;
use serde_json::json;
use tracing::info;

use super::store::{self, Store};
use super::{IdentityError, Kind, request, user};
use crate::apiserver::{ApiServer, ConnectError, RequestError, Trouble};
use crate::certificate::Names;
use crate::retry::Retry;
use crate::telemetry::chain;

/// What a node that has no identity yet knows.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap<'a> {
    /// The node's name.
    pub node: &'a str,
    /// `--bootstrap-kubeconfig`: the API server, and a token that may create requests.
    pub from: &'a Path,
    /// `--kubeconfig`: written if it is not there or its certificate cannot be used any more.
    pub kubeconfig: &'a Path,
    /// `--cert-dir`.
    pub directory: &'a Path,
}

impl Bootstrap<'_> {
    /// Makes sure that the kubeconfig is there and its certificate holds; waits for approval as long as that takes.
    ///
    /// # Errors
    /// What a retry cannot mend: files, a refused request, an API server that is not the one expected.
    pub async fn ensure(&self) -> Result<(), IdentityError> {
        use ConnectError::{Credentials, Expired, Missing, Unusable};
        let reason = match ApiServer::from_kubeconfig(self.kubeconfig).await {
            Ok(_) => return Ok(()),
            Err(reason @ (Missing(_) | Expired { .. } | Credentials { .. } | Unusable { .. })) => chain(&reason),
            Err(source) => return Err(IdentityError::Kubeconfig(source)),
        };
        let store = Store::new(self.directory, Kind::Client);
        let usable = store
            .current()
            .is_ok_and(|current| current.not_after > Timestamp::now() && current.common_name == user(self.node));
        if !usable {
            info!(from = %self.from.display(), reason, "asking for an identity with the bootstrap kubeconfig");
            self.obtain(&store).await?;
        }
        let text = kubeconfig(self.from, self.node, &store.path()).map_err(IdentityError::Bootstrap)?;
        store::write(self.kubeconfig, text.as_bytes())?;
        info!(kubeconfig = %self.kubeconfig.display(), "wrote the node's kubeconfig");
        Ok(())
    }

    async fn obtain(&self, store: &Store) -> Result<(), IdentityError> {
        let api = ApiServer::from_kubeconfig(self.from).await.map_err(IdentityError::Bootstrap)?;
        let mut retry = Retry::new("get an identity for this node");
        loop {
            match request::obtain(&api, store, self.node, &Names::default()).await {
                Ok(()) => return Ok(()),
                Err(error) if lasting(&error) => return Err(error),
                Err(error) => tokio::time::sleep(retry.failed(chain(&error))).await,
            }
        }
    }
}

/// Whether only a person can mend it.
fn lasting(error: &IdentityError) -> bool {
    match error {
        IdentityError::Create { source: RequestError { trouble, .. }, .. } => *trouble == Trouble::UnknownAuthority,
        IdentityError::Gone(_) => false,
        _ => true,
    }
}

/// A kubeconfig to the same API server with the pair in that file.
fn kubeconfig(from: &Path, node: &str, pair: &Path) -> Result<String, ConnectError> {
    let unusable = |source| ConnectError::Unusable { path: from.to_owned(), source };
    let read = Kubeconfig::read_from(from).map_err(unusable)?;
    let context = read.contexts.iter().find(|context| Some(&context.name) == read.current_context.as_ref());
    let cluster = context.and_then(|context| context.context.as_ref()).map(|context| &context.cluster);
    // The client was made from this context, so it is there.
    let cluster =
        read.clusters.iter().find(|known| Some(&known.name) == cluster).and_then(|known| known.cluster.as_ref());
    let user = user(node);
    // JSON is YAML, and kubectl and every client read it; this way no key needs quoting.
    let written = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "default", "cluster": cluster }],
        "users": [{ "name": user, "user": { "client-certificate": pair, "client-key": pair } }],
        "contexts": [{ "name": "default", "context": { "cluster": "default", "user": user } }],
        "current-context": "default",
    });
    Ok(format!("{written:#}\n"))
}

/// Whether a kubeconfig's user shows the certificate of that file.
pub fn names_file(kubeconfig: &Path, pair: &Path) -> bool {
    let Ok(read) = Kubeconfig::read_from(kubeconfig) else { return false };
    let mut users = read.auth_infos.into_iter().filter_map(|user| user.auth_info);
    users.any(|user| user.client_certificate.is_some_and(|file| Path::new(&file) == pair))
}
