//! `lambdalet controller`: its flags, and its start.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::flags::LoggingArgs;
use crate::apiserver::ApiServer;
use crate::controller::{self, Election};
use crate::shutdown::Tasks;

/// Time to finish a request and give the lease back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Every flag of `controller`.
#[derive(Debug, Args)]
pub(super) struct ControllerArgs {
    /// Kubeconfig with the API server's address and rights as in manifests/controller-rbac.yaml [default: the Pod's
    /// ServiceAccount]
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of the Lease by which replicas agree who works
    #[arg(long, value_name = "NAMESPACE", default_value = "kube-system")]
    leader_elect_resource_namespace: String,
    /// Name of that Lease
    #[arg(long, value_name = "NAME", default_value = "lambdalet-controller")]
    leader_elect_resource_name: String,
    #[command(flatten)]
    pub(super) logging: LoggingArgs,
}

impl ControllerArgs {
    /// Runs until a signal.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let api = match &self.kubeconfig {
            Some(path) => ApiServer::from_kubeconfig(path).await?,
            None => ApiServer::in_cluster()?,
        };
        let host = nix::unistd::gethostname().context("failed to read the host's name")?;
        let election = Election {
            namespace: self.leader_elect_resource_namespace,
            lease: self.leader_elect_resource_name,
            // As Kubernetes' own controllers: two processes of one host differ.
            identity: format!("{}_{:016x}", host.to_string_lossy(), rand::random::<u64>()),
        };
        let (tasks, supervisor) = Tasks::new();
        let draining = tasks.draining();
        tasks.spawn("controller", async move {
            controller::run(api.client, &election, draining).await;
            Ok(())
        });
        supervisor.run(PATIENCE).await
    }
}
