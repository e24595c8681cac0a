//! Logs on their way from a guest to the files of the host.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::sleep;

use super::logs::LogBook;
use super::vm::Vm;
use crate::retry::Retry;
use crate::runtime::{Kind, RuntimeError, blocking};
use crate::telemetry::chain;

/// Pause before a guest is asked again.
const AGAIN: Duration = Duration::from_millis(200);

/// Copies a log from the guest to the host until the container has exited, or its VM, or the book is closed.
pub(super) async fn fetch_log(vm: &dyn Vm, (id, name): (&str, &str), book: &Arc<LogBook>) {
    let mut retry = Retry::new("write the log of a container");
    loop {
        let pause = match copy_log(vm, (id, name), book, &mut retry).await {
            Ok(None) => return,
            Ok(Some(pause)) => pause,
            // The session was lost: the next one goes on where this one was.
            Err(error) if error.kind() == Kind::Unavailable => {
                tracing::debug!(container = id, error = chain(&error), "its log is asked for again");
                AGAIN
            }
            Err(error) => {
                tracing::warn!(container = id, error = chain(&error), "its log is fetched no further");
                return;
            }
        };
        // Both are cancel-safe: they only wait.
        tokio::select! {
            () = sleep(pause) => {}
            () = vm.exited() => return,
        }
        // The container was removed, or its sandbox has ended.
        if book.is_closed() {
            return;
        }
    }
}

/// Copies what the guest has from where the book is; `None` once that is all, or how long to wait before it is asked again
/// because the host refuses a batch, as with a full disk.
///
/// The guest keeps what is not in the book, so a batch that was refused is dropped with all that follows: a stream that
/// nobody reads would hold up whatever else the session with the guest carries.
async fn copy_log(
    vm: &dyn Vm,
    (id, name): (&str, &str),
    book: &Arc<LogBook>,
    retry: &mut Retry,
) -> Result<Option<Duration>, RuntimeError> {
    let mut batches = vm.logs(id, book.next()).await?;
    while let Some(batch) = batches.next().await {
        let batch = batch?;
        let (lost, taker) = (batch.lost, Arc::clone(book));
        let tried = format!("failed to write the log of container {id}");
        if let Err(error) = blocking(tried, move || taker.append(&batch.chunks, batch.next)).await {
            return Ok(Some(retry.failed(chain(&error))));
        }
        retry.succeeded();
        if lost > 0 {
            tracing::warn!(container = id, name, bytes = lost, "its guest dropped log that was not fetched yet");
        }
    }
    Ok(None)
}
