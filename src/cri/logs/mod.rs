//! The logs of containers as files in CRI's format, where the client wants them.
//!
//! The driver keeps each log itself. A pump for each container follows it and writes the file; after a restart of this
//! process, or of the engine, it goes on where the file ends. So nothing is lost and nothing is there twice.

mod pump;
mod record;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::failure::CriError;
use crate::runtime::Runtime;
use crate::runtime::types::{ContainerId, ContainerStatus};
use crate::shutdown::Tasks;
pub(super) use pump::Pump;
use pump::Reopen;

/// Requests to reopen that may wait for a pump.
const REOPENS_WAITING: usize = 4;
/// How long the end of a log is waited for once its container has ended: who sees the end reads the log.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// How long a request to reopen may take: the file system may be slow.
const REOPEN_PATIENCE: Duration = Duration::from_secs(10);

/// Where a log goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The file.
    pub(super) path: PathBuf,
    /// A directory of ours, for what must survive a restart.
    pub(super) place: PathBuf,
}

/// All pumps.
pub(super) struct Logs {
    runtime: Arc<dyn Runtime>,
    tasks: Tasks,
    pumps: Arc<Mutex<HashMap<ContainerId, Handle>>>,
}

/// A way to one pump.
struct Handle {
    reopen: mpsc::Sender<Reopen>,
    /// Closed when all is written.
    running: watch::Receiver<()>,
    stop: CancellationToken,
    /// That it is slow was told.
    told: bool,
}

impl Logs {
    pub(super) fn new(runtime: Arc<dyn Runtime>, tasks: Tasks) -> Self {
        Self { runtime, tasks, pumps: Arc::default() }
    }

    /// Opens the file of a container that is about to start.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) async fn open(&self, id: &ContainerId, target: Target) -> Result<Pump, CriError> {
        Pump::open(Arc::clone(&self.runtime), id.clone(), target).await
    }

    /// Begins to write, unless that is being done already.
    pub(super) fn begin(&self, pump: Pump) {
        let (id, stop) = (pump.id().clone(), self.tasks.draining().child_token());
        let (reopen, reopens) = mpsc::channel(REOPENS_WAITING);
        let (ended, running) = watch::channel(());
        {
            let mut pumps = self.pumps();
            if pumps.contains_key(&id) {
                return;
            }
            pumps.insert(id.clone(), Handle { reopen, running, stop: stop.clone(), told: false });
        }
        let pumps = Arc::clone(&self.pumps);
        self.tasks.spawn_finite("container log", async move {
            pump.run(reopens, stop).await;
            pumps.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            drop(ended);
            Ok(())
        });
    }

    /// Closes the file and opens it anew by its name, so that it can be moved away.
    ///
    /// # Errors
    /// `None` if nothing is written for this container (any more), else why it cannot be opened.
    pub(super) async fn reopen(&self, id: &ContainerId) -> Result<(), Option<CriError>> {
        let reopen = self.pumps().get(id).map(|handle| handle.reopen.clone()).ok_or(None)?;
        let (answer, answered) = oneshot::channel();
        let asked = timeout(REOPEN_PATIENCE, async {
            reopen.send(answer).await.ok()?;
            answered.await.ok()
        });
        match asked.await {
            Ok(Some(done)) => done.map_err(Some),
            Ok(None) | Err(_) => Err(None),
        }
    }

    /// Whether this container's log is being written.
    pub(super) fn is_written(&self, id: &ContainerId) -> bool {
        self.pumps().contains_key(id)
    }

    /// Waits until all is written of a container that has ended, but for 2 s at most.
    pub(super) async fn written(&self, id: &ContainerId) {
        self.written_by(id, Instant::now() + PATIENCE).await;
    }

    /// The same, of several at once.
    pub(super) async fn all_written(&self, ended: impl Iterator<Item = &ContainerStatus>) {
        join_all(ended.map(|container| self.written(&container.id))).await;
    }

    /// The same, until then at most.
    pub(super) async fn written_by(&self, id: &ContainerId, limit: Instant) {
        // One that was slow before, since a disk is full, say, is not waited for by each who asks.
        let waited_for = |handle: &Handle| (!handle.told).then(|| handle.running.clone());
        let Some(mut running) = self.pumps().get(id).and_then(waited_for) else { return };
        // Nothing is ever sent: it ends when the pump does.
        if timeout_at(limit, running.changed()).await.is_err()
            && let Some(handle) = self.pumps().get_mut(id)
            && !std::mem::replace(&mut handle.told, true)
        {
            warn!(container = %id, "the end of a container is told although its log is not written to its end");
        }
    }

    /// The container is gone.
    pub(super) fn end(&self, id: &ContainerId) {
        if let Some(handle) = self.pumps().get(id) {
            handle.stop.cancel();
        }
    }

    fn pumps(&self) -> MutexGuard<'_, HashMap<ContainerId, Handle>> {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
