//! `run --pod-manifest-path PATH` without a kubeconfig: the static Pods of one host, and no cluster.
//!
//! Nobody can be asked who a caller of the node's API is and what he may do. So there is one credential, a token in a
//! file that only the node's own user can read, and whoever shows it (or a certificate of `--client-ca-file`) may do
//! everything.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tracing::info;

use super::drivers::{self, Made};
use super::{DRAIN_PATIENCE, PATIENCE, Parts, events, function_server, network, raise_open_files, serve};
use crate::apiserver::ApiServer;
use crate::config::{ServingSettings, Settings};
use crate::file::{self, Synced};
use crate::metrics::Metrics;
use crate::network::uplink::Uplink;
use crate::node::{self, owner};
use crate::pod::directory::Directory;
use crate::runtime::keepers::Keepers;
use crate::shutdown::Tasks;

/// Name of the file below the root directory.
const TOKEN_FILE: &str = "api-token";
/// Bytes of randomness in it.
const TOKEN_BYTES: usize = 32;

/// Runs until a signal or a failure.
pub(super) async fn node(mut settings: Settings) -> anyhow::Result<()> {
    let path = settings.pods.static_pod_path.clone().context(
        "there is no way to the API server: pass --kubeconfig FILE, or --pod-manifest-path PATH to run the Pods in it \
         without one",
    )?;
    ask_nobody(&mut settings.serving);
    let root = settings.pods.root_dir.clone();
    let token = token(&root)?;
    info!(
        node = %settings.node.name, pods = %path.display(), token = %root.join(TOKEN_FILE).display(),
        runtime = settings.runtime.kind.name(), "starting without a cluster"
    );
    let owner = owner::standalone(&root, &settings.node.name)?;
    let patience = if settings.node.drain_on_exit { DRAIN_PATIENCE } else { PATIENCE };
    raise_open_files();
    let (tasks, supervisor) = Tasks::new();
    let (metrics, keepers) = (Metrics::new(), Keepers::default());
    let plugins = network::plugins(&settings);
    let (uplink, bridge) = Uplink::by_plugins(plugins.clone());
    let api = Arc::new(ApiServer::nowhere());
    let Made { runtime, drivers } = drivers::make(&settings, (&owner, &keepers), uplink, &metrics).await;
    let parts = Parts {
        events: events(&settings, &api, &metrics, &tasks),
        shutting_down: watch::Sender::new(false),
        supply: function_server::supply(),
        runtime,
        drivers,
        plugins,
        reviews: api.client.clone(),
        api,
        directory: Arc::new(Directory::of_root(&root)),
        node: node::standalone(&settings.node)?,
        settings: Arc::new(settings),
        local_token: Some(Sha256::digest(token).into()),
        tasks: tasks.clone(),
        owner,
        metrics,
        keepers,
    };
    serve(parts, bridge).await?;
    supervisor.run(patience).await
}

/// Whoever is let in may do everything, so nobody is without showing who he is, whatever the file says.
fn ask_nobody(serving: &mut ServingSettings) {
    serving.token_review = false;
    serving.authorize = false;
    serving.anonymous = false;
}

/// The token, made if it is not there.
fn token(root: &Path) -> anyhow::Result<String> {
    let path = root.join(TOKEN_FILE);
    let tried = || format!("failed to read or make the API token {}", path.display());
    std::fs::create_dir_all(root).with_context(tried)?;
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    if !known.trim().is_empty() {
        return Ok(known.trim().to_owned());
    }
    let token: String = rand::random::<[u8; TOKEN_BYTES]>().iter().map(|byte| format!("{byte:02x}")).collect();
    let aside = path.with_extension("new");
    file::replace(&path, &aside, token.as_bytes(), Synced::No).with_context(tried)?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn without_a_cluster_nobody_is_let_in_who_shows_nothing() {
        let mut serving = ServingSettings { anonymous: true, ..ServingSettings::default() };
        ask_nobody(&mut serving);
        assert!(!serving.anonymous && !serving.authorize && !serving.token_review, "{serving:?}");
    }

    #[test]
    fn the_token_is_made_once_and_for_its_owner_alone() {
        let root = tempfile::tempdir().unwrap();
        let made = token(&root.path().join("new")).unwrap();
        assert_eq!(made.len(), 2 * TOKEN_BYTES);
        assert_eq!(token(&root.path().join("new")).unwrap(), made);
        let mode = std::fs::metadata(root.path().join("new").join(TOKEN_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_ne!(token(root.path()).unwrap(), made);
    }
}
