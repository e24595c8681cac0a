//! How the process ends: the first signal drains, the second aborts, and a task that fails takes the rest with it.
//!
//! ```text
//! running --signal or failed task--> draining --all tasks ended, or too late--> closing --companions ended--> exit
//!    |                                  |
//!    '----------------------------------'--second signal--> exit at once
//! ```
//! A *task* ends in the draining phase (it watches [`Tasks::draining`]). A *companion* is what tasks still need while
//! they drain, such as the node's lease: it ends in the closing phase (it watches [`Tasks::closing`]).

use std::borrow::Cow;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing::{debug, info, warn};

/// How long companions have to end, after the tasks have.
const CLOSING_TIME: Duration = Duration::from_secs(5);

/// Failures that may wait to be read; the first decides, so losing later ones loses nothing.
const FAILURE_QUEUE: usize = 16;

/// The process's named tasks; clones are handles to the same set.
#[derive(Clone, Debug)]
pub struct Tasks {
    tasks: TaskTracker,
    companions: TaskTracker,
    draining: CancellationToken,
    closing: CancellationToken,
    failures: mpsc::Sender<anyhow::Error>,
}

/// The other end of a [`Tasks`]: waits for its end.
#[derive(Debug)]
pub struct Supervisor {
    tasks: Tasks,
    failures: mpsc::Receiver<anyhow::Error>,
}

/// What the end of a task means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It runs until the drain; ending earlier is a failure.
    Lasting,
    /// It may end when its work is done.
    Finite,
}

impl Tasks {
    /// An empty set and its supervisor.
    pub fn new() -> (Self, Supervisor) {
        let (failures, receiver) = mpsc::channel(FAILURE_QUEUE);
        let tasks = Self {
            tasks: TaskTracker::new(),
            companions: TaskTracker::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            failures,
        };
        (tasks.clone(), Supervisor { tasks, failures: receiver })
    }

    /// Cancelled by the first signal or failure: take no new work, end.
    pub fn draining(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// Cancelled when every task has ended or had its time: companions end.
    pub fn closing(&self) -> CancellationToken {
        self.closing.clone()
    }

    /// Runs a task that lasts until [`Tasks::draining`]. If it fails, panics or ends earlier the process drains and
    /// exits with that cause.
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, future: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.tasks.spawn(self.supervised(name.into(), Role::Lasting, &self.draining, future));
    }

    /// Runs a task that may end by itself (one Pod's, one connection's). A failure or panic ends the process.
    pub fn spawn_finite<F>(&self, name: impl Into<Cow<'static, str>>, future: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.tasks.spawn(self.supervised(name.into(), Role::Finite, &self.draining, future));
    }

    /// Runs a companion: it lasts until [`Tasks::closing`], and is otherwise as [`Tasks::spawn`].
    pub fn spawn_companion<F>(&self, name: impl Into<Cow<'static, str>>, future: F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.companions.spawn(self.supervised(name.into(), Role::Lasting, &self.closing, future));
    }

    /// Starts `future` and returns the watching over it.
    fn supervised<F>(
        &self,
        name: Cow<'static, str>,
        role: Role,
        end: &CancellationToken,
        future: F,
    ) -> impl Future<Output = ()> + Send + 'static
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let task = start(future);
        let (failures, end) = (self.failures.clone(), end.clone());
        async move {
            let failure = match task.await {
                Ok(Ok(())) if role == Role::Finite || end.is_cancelled() => {
                    debug!(task = %name, "ended");
                    return;
                }
                Ok(Ok(())) => anyhow!("task {name} ended unexpectedly"),
                Ok(Err(error)) => error.context(format!("task {name} failed")),
                Err(error) => anyhow!("task {name} was lost: {error}"),
            };
            // A full queue holds earlier failures already, and a closed one means the process is ending.
            let _ = failures.try_send(failure);
        }
    }
}

/// The beats of work that is done again and again until it is to stop.
#[derive(Debug)]
pub struct Ticks {
    ticks: Interval,
    stop: CancellationToken,
}

impl Ticks {
    /// A beat every `period`, the first at once. One that comes late does not hurry the next.
    pub fn new(period: Duration, stop: CancellationToken) -> Self {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ticks, stop }
    }

    /// Waits for the next beat; false once it is to stop.
    pub async fn next(&mut self) -> bool {
        tokio::select! {
            biased;
            // Cancel-safe: a token stays cancelled.
            () = self.stop.cancelled() => false,
            // Cancel-safe: a tick not taken comes at once.
            _ = self.ticks.tick() => true,
        }
    }

    /// What the work comes to, unless it is to stop sooner: it is dropped then.
    pub async fn within<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // Whoever asks for it has work that may be dropped.
            done = work => Some(done),
            // Cancel-safe: a token stays cancelled.
            () = self.stop.cancelled() => None,
        }
    }
}

/// The one place where a task is started; everything else goes through [`Tasks`].
#[allow(clippy::disallowed_methods)]
fn start<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}

impl Supervisor {
    /// Waits for a signal or the first failure, then for the tasks to end, at most `patience`.
    ///
    /// # Errors
    /// The first failure, if there was one, also while draining.
    pub async fn run(mut self, patience: Duration) -> anyhow::Result<()> {
        let mut interrupts = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let mut terminations = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        // Cancel-safe: signal streams and mpsc receivers lose nothing when a branch is dropped.
        let mut failure = tokio::select! {
            _ = interrupts.recv() => { info!("SIGINT: ending; a second signal ends at once"); None }
            _ = terminations.recv() => { info!("SIGTERM: ending; a second signal ends at once"); None }
            failure = self.failures.recv() => failure,
        };
        let end = self.end(patience);
        tokio::pin!(end);
        // Cancel-safe: the first branch is pinned outside, the others as above.
        let late = tokio::select! {
            late = &mut end => late,
            _ = interrupts.recv() => abort(SignalKind::interrupt()),
            _ = terminations.recv() => abort(SignalKind::terminate()),
        };
        if failure.is_none() {
            failure = late;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Drains, then closes; a failure on the way is returned.
    async fn end(&mut self, patience: Duration) -> Option<anyhow::Error> {
        let tasks = &self.tasks;
        tasks.draining.cancel();
        tasks.tasks.close();
        if tokio::time::timeout(patience, tasks.tasks.wait()).await.is_err() {
            warn!(left = tasks.tasks.len(), ?patience, "tasks did not end in time and are left behind");
        }
        tasks.closing.cancel();
        tasks.companions.close();
        if tokio::time::timeout(CLOSING_TIME, tasks.companions.wait()).await.is_err() {
            warn!(left = tasks.companions.len(), "companions did not end in time and are left behind");
        }
        self.failures.try_recv().ok()
    }
}

/// Ends the process at once, with the exit code a shell gives to one killed by that signal.
fn abort(kind: SignalKind) -> ! {
    warn!("second signal: ending at once");
    std::process::exit(128 + kind.as_raw_value())
}

/// Runs a task that belongs to the value which keeps the handle, and ends with it. Only for work whose failure is its
/// owner's affair; anything else belongs to [`Tasks`].
pub fn owned<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    #[allow(clippy::disallowed_methods)]
    AbortOnDropHandle::new(tokio::spawn(task))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn a_failing_task_ends_the_process_with_its_cause() {
        let (tasks, supervisor) = Tasks::new();
        let draining = tasks.draining();
        tasks.spawn("patient", async move {
            draining.cancelled().await;
            Ok(())
        });
        tasks.spawn("lease", async { Err(anyhow!("no route to host")) });
        let error = supervisor.run(SOON).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "task lease failed: no route to host");
    }

    #[tokio::test]
    async fn a_lasting_task_may_not_end_by_itself_but_a_finite_one_may() {
        let (tasks, supervisor) = Tasks::new();
        tasks.spawn_finite("pod a", async { Ok(()) });
        tasks.spawn("watch", async { Ok(()) });
        let error = supervisor.run(SOON).await.unwrap_err();
        assert_eq!(error.to_string(), "task watch ended unexpectedly");
    }

    #[tokio::test]
    async fn beats_end_when_it_is_to_stop_and_drop_what_is_under_way() {
        let stop = CancellationToken::new();
        let mut ticks = Ticks::new(Duration::from_millis(1), stop.clone());
        assert!(ticks.next().await && ticks.next().await);
        assert_eq!(ticks.within(async { 1 }).await, Some(1));
        stop.cancel();
        assert_eq!(ticks.within(std::future::pending::<()>()).await, None);
        assert!(!ticks.next().await);
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let (tasks, supervisor) = Tasks::new();
        tasks.spawn_finite("pod b", async { panic!("index out of bounds") });
        let error = supervisor.run(SOON).await.unwrap_err();
        assert!(error.to_string().starts_with("task pod b was lost"), "{error}");
    }

    #[tokio::test]
    async fn companions_outlive_tasks_and_stragglers_are_left_behind() {
        let (tasks, supervisor) = Tasks::new();
        let (ended, mut order) = mpsc::channel(4);
        let (draining, companion_end, companion_sender) = (tasks.draining(), tasks.closing(), ended.clone());
        tasks.spawn_companion("lease", async move {
            companion_end.cancelled().await;
            let _ = companion_sender.send("lease").await;
            Ok(())
        });
        tasks.spawn("pods", async move {
            draining.cancelled().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = ended.send("pods").await;
            Ok(())
        });
        tasks.spawn("stuck", std::future::pending());
        tasks.spawn("failing", async { Err(anyhow!("broken")) });
        assert!(supervisor.run(SOON).await.is_err());
        assert_eq!((order.recv().await, order.recv().await), (Some("pods"), Some("lease")));
    }
}
