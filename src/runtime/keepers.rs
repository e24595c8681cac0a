//! Tasks that outlive the call that began them.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;

use tokio::task::JoinSet;

/// The tasks that look after running execs, and other work that nobody waits for. Clones share them; they end with the
/// last.
#[derive(Clone, Debug, Default)]
pub struct Keepers(Arc<Mutex<JoinSet<()>>>);

impl Keepers {
    /// Resolves once none is left: with every session dropped, when the processes of all execs have ended. Cancel-safe.
    pub async fn idle(&self) {
        let next = |cx: &mut Context<'_>| {
            let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            tasks.poll_join_next(cx)
        };
        while poll_fn(next).await.is_some() {}
    }

    pub(super) fn spawn(&self, keeper: impl Future<Output = ()> + Send + 'static) {
        // A set of tasks is never half changed, so a panic elsewhere does not spoil it.
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(keeper);
    }
}
