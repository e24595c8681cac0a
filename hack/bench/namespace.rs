//! A namespace of its own for one run of a bench.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::api::{Api, DeleteParams, PostParams, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

/// Longest time any one wait may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The cluster, and the namespace in it.
pub(crate) struct Place {
    pub(crate) client: Client,
    pub(crate) namespace: String,
}

impl Place {
    /// Makes the namespace, as whoever the kubeconfig stands for.
    pub(crate) async fn open(kubeconfig: &Path) -> anyhow::Result<Self> {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).context("failed to read the kubeconfig")?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let place = Self { client: Client::try_from(config)?, namespace: format!("bench-{}", std::process::id()) };
        let namespace = json!({ "metadata": { "name": place.namespace } });
        place.namespaces().create(&PostParams::default(), &serde_json::from_value(namespace)?).await?;
        place.wait_for_service_account().await?;
        Ok(place)
    }

    /// Removes it with all that is in it.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        self.namespaces().delete(&self.namespace, &DeleteParams::default()).await?;
        Ok(())
    }

    fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.client.clone())
    }

    /// Pods are refused until their namespace has its default ServiceAccount.
    async fn wait_for_service_account(&self) -> anyhow::Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut changes = accounts.watch(&WatchParams::default().fields("metadata.name=default"), "0").await?.boxed();
        let seen = tokio::time::timeout(PATIENCE, changes.next()).await;
        seen.context("the namespace got no default ServiceAccount")?.context("the watch ended")??;
        Ok(())
    }
}
