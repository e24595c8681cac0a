//! Wires the node's credentials: bootstrap, the client that follows its files, the keepers of both certificates.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use crate::apiserver::ApiServer;
use crate::apiserver::reload::Reload;
use crate::config::Settings;
use crate::kubelet_api::{SelfSigned, Serving};
use crate::node::NodeFacts;
use crate::node::identity::{Bootstrap, Keeper, Kind, Store, names_file};
use crate::shutdown::Tasks;

/// `--cert-dir`, or `pki` below the root directory. Absolute: a kubeconfig's paths count from its own directory.
fn directory(settings: &Settings) -> PathBuf {
    let told = settings.identity.cert_dir.clone().unwrap_or_else(|| settings.pods.root_dir.join("pki"));
    std::path::absolute(&told).unwrap_or(told)
}

/// The way to the API server, asked for first if there is none yet.
pub(super) async fn connect(settings: &Settings, kubeconfig: &Path) -> anyhow::Result<(ApiServer, Reload)> {
    if let Some(from) = &settings.identity.bootstrap_kubeconfig {
        let directory = directory(settings);
        Bootstrap { node: &settings.node.name, from, kubeconfig, directory: &directory }.ensure().await?;
    }
    Ok(ApiServer::reloading(kubeconfig).await?)
}

/// What the node's API shows.
pub(super) fn serving(settings: &Settings, facts: &watch::Receiver<NodeFacts>) -> Serving {
    let files = settings.serving.tls_cert_file.clone().zip(settings.serving.tls_private_key_file.clone());
    if let Some((certificate, key)) = files {
        return Serving::Files { certificate, key };
    }
    let directory = directory(settings);
    let file = Store::new(&directory, Kind::Serving).path();
    let own = SelfSigned { directory, node: facts.clone() };
    if settings.identity.server_tls_bootstrap {
        Serving::Requested { file, meanwhile: own }
    } else {
        Serving::SelfSigned(own)
    }
}

/// Starts what keeps the credentials fresh.
pub(super) fn keep(
    settings: &Settings,
    api: &Arc<ApiServer>,
    reload: Reload,
    facts: &watch::Receiver<NodeFacts>,
    tasks: &Tasks,
) {
    let closing = tasks.closing();
    tasks.spawn_companion("credentials", async move {
        reload.run(closing).await;
        Ok(())
    });
    let directory = directory(settings);
    let client = Store::new(&directory, Kind::Client);
    // A certificate that somebody else manages is not ours to renew.
    let rotate = settings.identity.rotate_certificates && names_file(&api.kubeconfig, &client.path());
    let files = settings.serving.tls_cert_file.is_some();
    let request = settings.identity.server_tls_bootstrap && !files;
    let wanted = [
        (rotate, "client certificate", client),
        (request, "serving certificate", Store::new(&directory, Kind::Serving)),
    ];
    for (_, name, store) in wanted.into_iter().filter(|(wanted, ..)| *wanted) {
        let keeper = Keeper::new(Arc::clone(api), store, facts.clone());
        let keeper = keeper.with_bootstrap(settings.identity.bootstrap_kubeconfig.clone());
        let closing = tasks.closing();
        tasks.spawn_companion(name, async move { keeper.run(closing).await.map_err(Into::into) });
    }
}
