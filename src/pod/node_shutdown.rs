//! Graceful node shutdown: the host goes down, and Pods have their time before.
//!
//! ```text
//! logind --"prepare for shutdown"--> Manager --told--> Node (NotReady), admission (nobody is let in)
//!    ^                                  '--Orders, one group of priorities after the other--> workers
//!    '------- lock released -------- once all have ended, or had their time
//! ```
//! Groups, grace and texts are the kubelet's (Kubernetes documentation, "Graceful node shutdown"; KEP-2000, KEP-2712).

pub mod logind;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::eviction::{End, Order};
use super::plan;
use super::status::{Trouble, is_terminal};
use crate::config::node_shutdown::ShutdownGrace;
use crate::kubelet_api::targets::PodTargets as _;
use crate::retry::Retry;
use crate::telemetry::chain;

/// Reason of a Pod that ended with its node.
pub const REASON: &str = "Terminated";
/// The message beside it.
pub const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Reason of the Node's events.
const EVENT: &str = "NodeShutdown";
/// How long the last statuses may take after the last group has ended; the host waits no longer for them.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why the host's going down would go unnoticed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// What has to be asked is not there, or does not answer.
    #[error("failed to {tried}")]
    Failed {
        /// What was tried.
        tried: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// It answers something else than expected.
    #[error("failed to {tried}: {said}")]
    Refused {
        /// What was tried.
        tried: String,
        /// What was said instead.
        said: String,
    },
    /// The host does not wait as long as Pods were promised.
    #[error("the host waits {has:?} at most before it goes down, less than the {wanted:?} that Pods were promised")]
    Impatient {
        /// What it was asked for.
        wanted: Duration,
        /// What it grants.
        has: Duration,
    },
    /// Nothing is heard any more.
    #[error("the host's signals have ended")]
    Silent,
}

/// Holds the host back as long as it is kept.
pub trait Lock: Send {}

/// The host, as far as its going down goes.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Has it wait at least so long for locks.
    ///
    /// # Errors
    /// It cannot be asked, or does not wait so long.
    async fn be_patient(&self, delay: Duration) -> Result<(), HostError>;

    /// It does not go down as long as what is returned is kept, and its patience lasts.
    ///
    /// # Errors
    /// It cannot be asked, or refuses.
    async fn hold_back(&self) -> Result<Box<dyn Lock>, HostError>;

    /// True when it begins to go down, false when it does not go down after all. Heard from the return on.
    ///
    /// # Errors
    /// It cannot be listened to.
    async fn signals(&self) -> Result<BoxStream<'static, bool>, HostError>;
}

/// Ends Pods before the host goes down.
pub struct Manager {
    shared: Arc<Shared>,
    host: Arc<dyn Host>,
    grace: ShutdownGrace,
    told: watch::Sender<bool>,
}

impl Manager {
    /// One that gives Pods this much time; `told` is true from when the host begins to go down.
    pub fn new(shared: Arc<Shared>, host: Arc<dyn Host>, grace: ShutdownGrace, told: watch::Sender<bool>) -> Self {
        Self { shared, host, grace, told }
    }

    /// Watches the host until `stop`. Where it cannot be watched that is logged, and tried again.
    pub async fn run(self, stop: CancellationToken) {
        let mut retry = Retry::new("watch for the host's shutdown");
        loop {
            tokio::select! {
                // Cancel-safe: a lock that is dropped is released, and the Pods' orders stay.
                error = self.watch(&mut retry) => {
                    let pause = retry.failed(chain(&error));
                    tokio::select! {
                        // Cancel-safe: a timer.
                        () = tokio::time::sleep(pause) => {}
                        // Cancel-safe: a token stays cancelled.
                        () = stop.cancelled() => return,
                    }
                }
                // Cancel-safe: as above.
                () = stop.cancelled() => return,
            }
        }
    }

    /// Watches until that is impossible.
    async fn watch(&self, retry: &mut Retry) -> HostError {
        match self.try_watch(retry).await {
            Ok(()) => HostError::Silent,
            Err(error) => error,
        }
    }

    async fn try_watch(&self, retry: &mut Retry) -> Result<(), HostError> {
        self.host.be_patient(self.grace.total()).await?;
        let mut signals = self.host.signals().await?;
        let mut lock = Some(self.host.hold_back().await?);
        retry.succeeded();
        tracing::info!(grace = ?self.grace.total(), "Pods have their time before the host goes down");
        while let Some(goes_down) = signals.next().await {
            self.tell(goes_down);
            if goes_down {
                tokio::select! {
                    // Cancel-safe: what was ordered stays so.
                    () = self.end_pods() => {}
                    // Cancel-safe: one that was not taken is there the next time round.
                    () = cancelled(&mut signals) => {
                        self.tell(false);
                        continue;
                    }
                }
                lock = None;
            } else if lock.is_none() {
                lock = Some(self.host.hold_back().await?);
            }
        }
        drop(lock);
        Ok(())
    }

    /// The host begins to go down, or does not after all.
    fn tell(&self, goes_down: bool) {
        let what = if goes_down { "event" } else { "cancellation" };
        self.shared.events.node_normal(EVENT, format!("Shutdown manager detected shutdown {what}"));
        self.shared.admission.set_shutting_down(goes_down);
        self.told.send_replace(goes_down);
    }

    /// Ends one group after the other; each has its own time.
    async fn end_pods(&self) {
        let pods: Vec<_> = self.shared.directory.pods().into_iter().filter(|pod| !is_terminal(pod)).collect();
        for (period, group) in grouped(&self.grace.groups(), &pods) {
            if group.is_empty() {
                continue;
            }
            tracing::info!(pods = group.len(), ?period, "the host goes down: ending Pods");
            let uids: Vec<String> = group.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
            for pod in group {
                let order = Order {
                    trouble: Trouble::new(REASON, MESSAGE),
                    grace: plan::grace(pod).min(period),
                    end: End::WithNode,
                    disruption: Some(MESSAGE.to_owned()),
                };
                self.shared.evictions.give(pod.metadata.uid.as_deref().unwrap_or_default(), order);
            }
            if tokio::time::timeout(period, self.shared.admission.left(&uids)).await.is_err() {
                tracing::warn!(?uids, ?period, "Pods have not ended in the time they had");
            }
            let written = join_all(uids.iter().map(|uid| self.shared.publisher.flushed(uid)));
            let _ = tokio::time::timeout(LAST_WORDS, written).await;
        }
    }
}

/// Returns once the host does not go down after all; never if nothing is heard any more.
async fn cancelled(signals: &mut BoxStream<'static, bool>) {
    loop {
        match signals.next().await {
            Some(false) => return,
            Some(true) => {}
            None => std::future::pending().await,
        }
    }
}

/// Which Pods have which time, in the order of `groups`, which is that of their priorities. A Pod belongs to the highest
/// group that it reaches, or to the lowest there is.
fn grouped<'a>(groups: &[(i32, Duration)], pods: &'a [Arc<Pod>]) -> Vec<(Duration, Vec<&'a Arc<Pod>>)> {
    let mut of: Vec<_> = groups.iter().map(|(_, period)| (*period, Vec::new())).collect();
    for pod in pods {
        let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
        let at = groups.iter().rposition(|(least, _)| *least <= priority).unwrap_or(0);
        if let Some((_, members)) = of.get_mut(at) {
            members.push(pod);
        }
    }
    of
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_in_the_highest_group_that_it_reaches() {
        let pods: Vec<Arc<Pod>> = [-5, 0, 999, 1000, 5000]
            .map(|priority| json!({ "metadata": { "uid": priority.to_string() }, "spec": { "containers": [], "priority": priority } }))
            .map(|pod| Arc::new(serde_json::from_value(pod).unwrap()))
            .into();
        let groups = [(0, Duration::from_secs(60)), (1000, Duration::from_secs(5)), (9000, Duration::from_secs(1))];
        let found: Vec<_> = grouped(&groups, &pods)
            .into_iter()
            .map(|(period, pods)| {
                let uids: Vec<_> = pods.iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect();
                (period.as_secs(), uids.join(" "))
            })
            .collect();
        let wanted = [(60, "-5 0 999"), (5, "1000 5000"), (1, "")].map(|(period, uids)| (period, uids.to_owned()));
        assert_eq!(found, wanted);
    }
}
