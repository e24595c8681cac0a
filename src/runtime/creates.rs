//! Creates on their way to an engine.
//!
//! A create cannot be taken back: the engine carries it out whether or not somebody still waits for the answer. So it
//! runs on when its caller is dropped, and whoever lists a Pod's objects (to remove them, say) waits for the Pod's
//! creates to land first. Otherwise a Pod deleted at the wrong moment would leave a container that nobody looks for.
//! Starts go the same way where an engine that is called off halfway would fail the container.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::task::JoinError;

/// How many creates of each Pod are under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Creates {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    counts: Mutex<HashMap<String, usize>>,
    landed: Notify,
}

/// One create; it has landed when this is dropped.
struct InFlight {
    shared: Arc<Shared>,
    pod_uid: String,
}

impl Creates {
    /// Runs `create` to its end, also when the caller does not wait for it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        pod_uid: &str,
        create: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, JoinError> {
        let shared = Arc::clone(&self.shared);
        *shared.counts().entry(pod_uid.to_owned()).or_default() += 1;
        let in_flight = InFlight { shared, pod_uid: pod_uid.to_owned() };
        finish(async move {
            let _in_flight = in_flight;
            create.await
        })
        .await
    }

    /// Returns once no create of this Pod is under way.
    pub(super) async fn landed(&self, pod_uid: &str) {
        loop {
            let mut landed = std::pin::pin!(self.shared.landed.notified());
            landed.as_mut().enable();
            if !self.shared.counts().contains_key(pod_uid) {
                return;
            }
            landed.await;
        }
    }
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // A count is never half changed, so a panic elsewhere does not spoil it.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut counts = self.shared.counts();
        if let Some(count) = counts.get_mut(&self.pod_uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.pod_uid);
            }
        }
        drop(counts);
        self.shared.landed.notify_waiters();
    }
}

/// A task of its own, since it has to outlive its caller; it ends by itself within the client's time limit, and what a
/// process that ends meanwhile leaves is found at the next start.
#[allow(clippy::disallowed_methods)]
async fn finish<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Result<T, JoinError> {
    tokio::spawn(future).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_create_lands_although_its_caller_is_gone_and_lists_wait_for_it() {
        let creates = Creates::default();
        let (answer, daemon) = oneshot::channel::<()>();
        let soon = Duration::from_millis(20);
        let caller = creates.run("u", async move { daemon.await.is_ok() });
        assert!(tokio::time::timeout(soon, caller).await.is_err(), "the caller was to give up");
        assert!(tokio::time::timeout(soon, creates.landed("u")).await.is_err(), "the create is still under way");
        creates.landed("another").await;
        answer.send(()).expect("the create runs on");
        creates.landed("u").await;
    }

    #[tokio::test]
    async fn every_create_of_a_pod_is_waited_for() {
        let creates = Creates::default();
        assert!(creates.run("u", async { true }).await.unwrap());
        let (first, second) = (creates.clone(), creates.clone());
        let both =
            tokio::join!(first.run("u", tokio::time::sleep(Duration::from_millis(5))), second.run("u", async {}),);
        assert!(both.0.is_ok() && both.1.is_ok());
        creates.landed("u").await;
    }
}
