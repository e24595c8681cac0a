//! Whether the runtime can run Pods, asked again and again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::Health;
use crate::network::cni::Cni;
use crate::runtime::Runtime;
use crate::shutdown::{Tasks, Ticks};
use crate::telemetry::chain;

/// How often the runtime is asked; a Node is NotReady at most this long after its runtime went down.
pub const INTERVAL: Duration = Duration::from_secs(2);

/// A runtime that takes longer to answer counts as down.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts asking the runtime, and the plugins that make the network if there are any; the channel's value changes only
/// when the answer does.
pub fn spawn(
    (runtime, plugins): (Arc<dyn Runtime>, Option<Cni>),
    interval: Duration,
    tasks: &Tasks,
) -> watch::Receiver<Health> {
    let (sender, receiver) = watch::channel(Err("the runtime has not been asked yet".to_owned()));
    let closing = tasks.closing();
    tasks.spawn_companion("runtime health", async move {
        let mut ticks = Ticks::new(interval, closing);
        while ticks.next().await {
            let health = match ask(&*runtime).await {
                Ok(()) => ask_plugins(plugins.as_ref()).await,
                down => down,
            };
            sender.send_if_modified(|known| {
                if *known == health {
                    return false;
                }
                match &health {
                    Ok(()) => info!("the runtime can run Pods"),
                    Err(problem) => warn!("the node cannot run Pods: {problem}"),
                }
                *known = health;
                true
            });
        }
        Ok(())
    });
    receiver
}

async fn ask(runtime: &dyn Runtime) -> Health {
    match tokio::time::timeout(PATIENCE, runtime.ready()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("container runtime is down: {}", chain(&error))),
        Err(_) => Err(format!("container runtime is down: it did not answer within {PATIENCE:?}")),
    }
}

/// A kubelet's words for a network that is not ready.
async fn ask_plugins(plugins: Option<&Cni>) -> Health {
    let Some(plugins) = plugins else { return Ok(()) };
    match tokio::time::timeout(PATIENCE, plugins.ready()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("container runtime network not ready: {}", chain(&error))),
        Err(_) => {
            Err(format!("container runtime network not ready: its CNI plugins did not answer within {PATIENCE:?}"))
        }
    }
}
