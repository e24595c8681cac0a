//! Starts the rooms and waits for the end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tracing::info;

use super::flags::Plan;
use crate::apiserver::ApiServer;
use crate::config::{RuntimeSettings, Settings};
use crate::node::{self, health};
use crate::runtime::Runtime;
use crate::shutdown::Tasks;

/// How long tasks have to end when Pods are left running: time to finish a request, not to end a Pod.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long they have with `--drain-on-exit`: the longest grace period that is honoured then.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// Runs the node until a signal or a failure.
pub(super) async fn node(plan: Plan) -> anyhow::Result<()> {
    let Plan { settings, kubeconfig, warnings: _ } = plan;
    let kubeconfig = kubeconfig.context("there is no way to the API server: pass --kubeconfig FILE")?;
    let api = Arc::new(ApiServer::from_kubeconfig(&kubeconfig).await?);
    info!(node = %settings.node.name, server = %api.url, runtime = settings.runtime.kind.name(), "starting");
    let (tasks, supervisor) = Tasks::new();
    let patience = if settings.node.drain_on_exit { DRAIN_PATIENCE } else { PATIENCE };
    start_rooms(settings, api, &tasks)?;
    supervisor.run(patience).await
}

/// Wires every room to its neighbours.
fn start_rooms(settings: Settings, api: Arc<ApiServer>, tasks: &Tasks) -> anyhow::Result<()> {
    let runtime = driver(&settings.runtime)?;
    let health = health::spawn(Arc::clone(&runtime), health::INTERVAL, tasks);
    let params = node::Params { api, settings: Arc::new(settings.node), runtime, health };
    let _node = node::spawn(params, tasks)?;
    Ok(())
}

/// The driver that was asked for.
fn driver(settings: &RuntimeSettings) -> anyhow::Result<Arc<dyn Runtime>> {
    anyhow::bail!("the runtime {} is not part of this build", settings.kind.name())
}
