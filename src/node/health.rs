//! Whether the runtime can run Pods, asked again and again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::Health;
use crate::runtime::Runtime;
use crate::shutdown::{Tasks, Ticks};
use crate::telemetry::chain;

/// How often the runtime is asked; a Node is NotReady at most this long after its runtime went down.
pub const INTERVAL: Duration = Duration::from_secs(2);

/// A runtime that takes longer to answer counts as down.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts asking; the channel's value changes only when the answer does.
pub fn spawn(runtime: Arc<dyn Runtime>, interval: Duration, tasks: &Tasks) -> watch::Receiver<Health> {
    let (sender, receiver) = watch::channel(Err("the runtime has not been asked yet".to_owned()));
    let closing = tasks.closing();
    tasks.spawn_companion("runtime health", async move {
        let mut ticks = Ticks::new(interval, closing);
        while ticks.next().await {
            let health = ask(&*runtime).await;
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
