//! File work off the async threads.

use super::{Kind, Result, RuntimeError};

/// Runs file work that may wait for the kernel off the async threads. Dropping the future does not end the work.
pub(super) async fn blocking<T: Send + 'static>(
    tried: String,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(RuntimeError::new(Kind::Internal, tried).with_source(error)),
        Err(error) => Err(RuntimeError::new(Kind::Internal, tried).with_source(error)),
    }
}
