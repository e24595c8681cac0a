//! A client whose credentials follow their files: a kubeconfig, or a file it names, that changes is taken over without
//! a restart. Requests in flight and open watches end on the connection they began on.
//!
//! Clients of one file share its connections, and each has a limit of its own: one whose requests all wait holds up no
//! other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use kube::Client;
use kube::config::Kubeconfig;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::limit::ConcurrencyLimit;
use tracing::{info, warn};

use super::{ApiServer, ConnectError, REQUESTS_AT_ONCE};
use crate::telemetry::chain;

/// How often the files are looked at; they are a few kilobytes.
const LOOK: Duration = Duration::from_secs(5);

/// Exchanges the client behind an [`ApiServer`] when its files change.
pub struct Reload {
    kubeconfig: PathBuf,
    current: Arc<ArcSwap<Client>>,
    /// Of the contents last tried, good or bad, so that each is tried and complained about once.
    tried: [u8; 32],
}

impl ApiServer {
    /// As [`ApiServer::from_kubeconfig`], with what keeps the credentials those of the files.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn reloading(path: &Path) -> Result<(Self, Reload), ConnectError> {
        let tried = digest(path);
        let first = unlimited(path).await?;
        let reload =
            Reload { kubeconfig: path.to_owned(), current: Arc::new(ArcSwap::from_pointee(first.client)), tried };
        Ok((Self { client: reload.client(REQUESTS_AT_ONCE), ..first }, reload))
    }
}

/// The client that others stand before, each with its limit.
async fn unlimited(path: &Path) -> Result<ApiServer, ConnectError> {
    ApiServer::limited(path, Semaphore::MAX_PERMITS).await
}

impl Reload {
    /// A client of its own, of which so many requests may wait for an answer at once.
    pub fn client(&self, requests: usize) -> Client {
        let current = Arc::clone(&self.current);
        let namespace = current.load().default_namespace().to_owned();
        let service = tower::service_fn(move |request| {
            let client = current.load_full();
            async move { client.send(request).await }
        });
        Client::new(ConcurrencyLimit::new(service, requests), namespace)
    }

    /// Looks at the files every few seconds until `closing`.
    pub async fn run(mut self, closing: CancellationToken) {
        loop {
            tokio::select! {
                // Cancel-safe: a token stays cancelled.
                () = closing.cancelled() => return,
                // Cancel-safe: nothing was done yet.
                () = tokio::time::sleep(LOOK) => {}
            }
            self.look().await;
        }
    }

    /// Takes over what changed since the last look; says whether it did.
    pub async fn look(&mut self) -> bool {
        let digest = digest(&self.kubeconfig);
        if digest == self.tried {
            return false;
        }
        self.tried = digest;
        let path = self.kubeconfig.display();
        match unlimited(&self.kubeconfig).await {
            Ok(fresh) => {
                self.current.store(Arc::new(fresh.client));
                info!(kubeconfig = %path, "took over changed credentials");
                true
            }
            Err(error) => {
                warn!(error = chain(&error), "changed credentials are not usable; the ones before stay in use");
                false
            }
        }
    }
}

/// The contents of the kubeconfig and of every certificate and key it names. What cannot be read counts as empty.
fn digest(path: &Path) -> [u8; 32] {
    let mut files = vec![path.to_owned()];
    if let Ok(kubeconfig) = Kubeconfig::read_from(path) {
        let users = kubeconfig.auth_infos.into_iter().filter_map(|user| user.auth_info);
        files.extend(users.flat_map(|user| [user.client_certificate, user.client_key]).flatten().map(PathBuf::from));
        let clusters = kubeconfig.clusters.into_iter().filter_map(|cluster| cluster.cluster);
        files.extend(clusters.filter_map(|cluster| cluster.certificate_authority).map(PathBuf::from));
    }
    let mut digest = Sha256::new();
    for file in files {
        let content = std::fs::read(file).unwrap_or_default();
        digest.update((content.len() as u64).to_le_bytes());
        digest.update(content);
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::Json;
    use http::HeaderMap;
    use serde_json::json;

    use super::*;

    fn write(path: &Path, server: SocketAddr, token: &str) {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://{server}") } }],
            "users": [{ "name": "u", "user": { "token": token } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        std::fs::write(path, kubeconfig.to_string()).unwrap();
    }

    /// Tells each caller its own token, as if that were its name.
    async fn review(headers: HeaderMap) -> Json<serde_json::Value> {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        Json(json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview", "metadata": {},
            "status": { "userInfo": { "username": token } },
        }))
    }

    #[tokio::test]
    async fn a_client_whose_requests_all_wait_holds_up_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.kubeconfig");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        write(&path, listener.local_addr().unwrap(), "one");
        // Whatever is no review of oneself takes for ever.
        let own = axum::routing::post(review);
        let (reached, mut waiting) = tokio::sync::mpsc::channel(64);
        let stuck = move || {
            let reached = reached.clone();
            async move {
                reached.send(()).await.unwrap();
                std::future::pending::<()>().await;
            }
        };
        let router =
            axum::Router::new().route("/apis/authentication.k8s.io/v1/selfsubjectreviews", own).fallback(stuck);
        let test = async {
            let (api, reload) = ApiServer::reloading(&path).await.unwrap();
            let other = reload.client(2);
            let nodes = kube::Api::<k8s_openapi::api::core::v1::Node>::all(other);
            let stuck = futures::future::join_all((0..20).map(|_| nodes.get("a")));
            let asked = async {
                waiting.recv().await.unwrap();
                waiting.recv().await.unwrap();
                assert_eq!(api.whoami().await.unwrap(), "Bearer one");
                assert!(waiting.try_recv().is_err(), "more than two at once");
            };
            tokio::select! {
                _ = stuck => panic!("nobody answers these"),
                () = asked => {}
            }
        };
        tokio::select! {
            () = test => {}
            ended = axum::serve(listener, router) => panic!("{ended:?}"),
        }
    }

    #[tokio::test]
    async fn changed_credentials_are_used_from_the_next_request_on_and_broken_ones_never() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.kubeconfig");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let router = axum::Router::new().fallback(review);
        write(&path, server, "one");
        let test = async {
            let (api, mut reload) = ApiServer::reloading(&path).await.unwrap();
            // What rooms hold is a clone made at the start.
            let held = api.clone();
            assert_eq!(held.whoami().await.unwrap(), "Bearer one");
            assert!(!reload.look().await);
            write(&path, server, "two");
            assert!(reload.look().await);
            assert_eq!(held.whoami().await.unwrap(), "Bearer two");
            std::fs::write(&path, "rubbish: [").unwrap();
            assert!(!reload.look().await);
            assert_eq!(held.whoami().await.unwrap(), "Bearer two");
            write(&path, server, "three");
            assert!(reload.look().await);
            assert_eq!(held.whoami().await.unwrap(), "Bearer three");
        };
        tokio::select! {
            () = test => {}
            ended = axum::serve(listener, router) => panic!("{ended:?}"),
        }
    }
}
