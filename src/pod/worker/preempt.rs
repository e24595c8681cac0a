//! A critical Pod for which there is no room.

use std::time::Duration;

use super::Worker;
use crate::kubelet_api::targets::PodTargets as _;
use crate::pod::admission::preempt;
use crate::pod::eviction::{End, Order, is_critical};
use crate::pod::plan;
use crate::pod::status::{Trouble, is_terminal};

/// The least time that those who have to go are waited for; the most is half as much again as their grace.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);

impl Worker {
    /// Whether others can be made to go for the Pod, which was refused for this.
    pub(super) fn may_preempt(&self, refused: &Trouble) -> bool {
        refused.reason.starts_with("OutOf") && is_critical(&self.pod)
    }

    /// Lets the Pod in, and has others end for it; returns once they have, or have had their time, or the Pod itself is
    /// deleted.
    ///
    /// # Errors
    /// Nobody can be made to go whose place would be enough.
    pub(super) async fn preempt(&self) -> Result<(), Trouble> {
        let mut others = self.shared.directory.pods();
        others.retain(|pod| !is_terminal(pod) && pod.metadata.deletion_timestamp.is_none());
        let victims = self.shared.admission.preempt(&self.pod, &self.shared.node_view(), &others)?;
        let mut patience = LEAST_PATIENCE;
        for victim in &victims {
            let grace = plan::grace(victim);
            patience = patience.max(grace + grace / 2);
            let order = Order {
                trouble: Trouble::new(preempt::REASON, preempt::MESSAGE),
                grace,
                end: End::ForRoom,
                disruption: Some(preempt::DISRUPTED.to_owned()),
            };
            self.shared.evictions.give(victim.metadata.uid.as_deref().unwrap_or_default(), order);
        }
        let uids: Vec<String> = victims.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        let mut desired = self.desired.clone();
        tokio::select! {
            // Cancel-safe: who has left stays away.
            () = self.shared.admission.left(&uids) => {}
            // Cancel-safe: a watch channel keeps its value.
            _ = desired.wait_for(|d| d.gone || d.pod.metadata.deletion_timestamp.is_some()) => {}
            // Cancel-safe: a timer.
            () = tokio::time::sleep(patience) => {
                tracing::warn!(pod = %self.reference, ?uids, "Pods that had to make room have not ended in time");
            }
        }
        Ok(())
    }
}
