//! How a worker learns what the runtime holds.

use std::time::Duration;

use tokio::time::Instant;

use super::clock::spread;
use super::{LOOK_AGAIN, Worker};
use crate::pod::backoff;
use crate::pod::observed::Observed;
use crate::runtime::types::ContainerId;
use crate::telemetry::chain;

impl Worker {
    /// Asks the runtime about what ran when last seen.
    pub(super) async fn look(&mut self) {
        let relists = self.signal.borrow().relists;
        if relists != self.relists {
            self.relists = relists;
            return self.relist().await;
        }
        self.look_at = Instant::now() + spread(LOOK_AGAIN);
        let running: Vec<ContainerId> = self.observed.running().map(|c| c.id.clone()).collect();
        let sandbox = self.observed.ready_sandbox().map(|s| s.id.clone());
        for id in running {
            self.look_at_container(&id).await;
        }
        if let Some(id) = sandbox {
            match self.shared.runtime.pod_sandbox_status(&id).await {
                Ok(status) => self.observed.put_sandbox(status),
                Err(error) if error.is_not_found() => self.observed.drop_sandbox(&id),
                Err(error) => tracing::debug!(pod = %self.reference, error = chain(&error), "failed to look"),
            }
        }
    }

    pub(super) async fn look_at_container(&mut self, id: &ContainerId) {
        match self.shared.runtime.container_status(id).await {
            Ok(status) => self.observed.put_container(status),
            Err(error) if error.is_not_found() => self.observed.drop_container(id),
            Err(error) => tracing::debug!(pod = %self.reference, error = chain(&error), "failed to look"),
        }
    }

    /// Lists everything of the Pod; tries until the runtime answers.
    pub(super) async fn relist(&mut self) {
        let mut wait = Duration::from_millis(200);
        loop {
            let uid = Some(self.reference.uid.as_str());
            let listed =
                tokio::try_join!(self.shared.runtime.list_pod_sandboxes(uid), self.shared.runtime.list_containers(uid));
            match listed {
                Ok((sandboxes, containers)) => {
                    self.observed = Observed::new(sandboxes, containers);
                    break;
                }
                Err(error) => {
                    tracing::debug!(pod = %self.reference, error = chain(&error), "failed to list; trying again");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(backoff::RETRY);
                }
            }
        }
        self.look_at = Instant::now() + spread(LOOK_AGAIN);
        let found = self.observed.sandbox().map(|sandbox| sandbox.addresses.clone()).unwrap_or_default();
        if !found.is_empty() {
            self.learn_addresses(found);
        }
    }
}
