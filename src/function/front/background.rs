//! What goes on without a client: answers read to their end, and connections that became another protocol's.

use std::future::Future;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The tasks of one front. They end by themselves, or when the front is closed.
#[derive(Clone, Debug)]
pub(super) struct Background {
    tracker: TaskTracker,
    closing: CancellationToken,
    /// Destructors start tasks too, wherever they run.
    runtime: Handle,
}

impl Background {
    /// Within a runtime, which is the one that the tasks run on.
    pub(super) fn new() -> Self {
        Self { tracker: TaskTracker::new(), closing: CancellationToken::new(), runtime: Handle::current() }
    }

    /// Runs `work` until its end or until the front is closed, whichever comes first.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let closing = self.closing.clone();
        let task = async move {
            // Cancelled means dropped, which each kind of work allows for: that is how its lease comes back.
            let _ = closing.run_until_cancelled(work).await;
        };
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// Runs what ends by itself when the front is closed: a client's connection hears of that by its place, and need not
    /// look at a token that all share each time it is woken.
    pub(super) fn spawn_told(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn_on(work, &self.runtime);
    }

    /// Drops all work, and what is still to come.
    pub(super) fn close(&self) {
        self.closing.cancel();
    }

    /// Waits until there is none.
    pub(super) async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    pub(super) fn len(&self) -> usize {
        self.tracker.len()
    }
}
