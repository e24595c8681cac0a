//! What the commands of people have in common: the way to the API server, and the namespace.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::apiserver::ApiServer;

/// Flags that kubectl has too.
#[derive(Debug, Args)]
pub(super) struct ClientArgs {
    /// Kubeconfig with the API server's address and your credentials [default: ~/.kube/config]
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Namespace [default: that of the kubeconfig's current context, or "default"]
    #[arg(long, short, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

impl ClientArgs {
    /// The API server, and the namespace that is meant.
    pub(super) async fn connect(self) -> anyhow::Result<(ApiServer, String)> {
        let Self { kubeconfig, namespace } = self;
        let usual = || std::env::home_dir().map(|home| home.join(".kube/config"));
        let path = kubeconfig.filter(|path| !path.as_os_str().is_empty()).or_else(usual);
        let path = path.context("there is no way to the API server: pass --kubeconfig FILE")?;
        let api = ApiServer::from_kubeconfig(&path).await?;
        let namespace = namespace.unwrap_or_else(|| api.client.default_namespace().to_owned());
        Ok((api, namespace))
    }
}
