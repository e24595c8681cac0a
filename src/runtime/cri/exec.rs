//! Commands run in a running container.
//!
//! ```text
//! Exec -> URL -> SPDY connection -> its process is found, or it wrote something, or its end is told
//! ```
//! A keeper per exec does that and moves the bytes until the end of the process is told. If the session is dropped first
//! (a client that vanished), it ends the process, which CRI has no call for and runtimes do not do.
//!
//! The exit code comes with the end of the streams: containerd tells it once nothing holds them any more, unless its
//! `drain_exec_sync_io_timeout` says otherwise.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use lambdalet_proto::cri::v1;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use super::CriRuntime;
use super::client::{CriClient, ask};
use super::info::Place;
use super::leaders::leaders;
use super::streams::{self, EndOfInput, Ending, Progress, SpdyTerminal, Stdin, Streams, Wanted};
use crate::runtime::cgroup::Cgroups;
use crate::runtime::process::Process;
use crate::runtime::session::{ExecRequest, Output, Session};
use crate::runtime::types::{ContainerId, LogSource};
use crate::runtime::{Kind, Result, RuntimeError};

/// How often it is looked whether a command runs yet: a start takes some 30 ms.
const LOOK: Duration = Duration::from_millis(2);
/// A command of which nothing is seen for so long is taken to run: it may be out of sight (a machine below).
const PATIENCE: Duration = Duration::from_secs(10);
/// Exit code of a process that went with its container.
const KILLED: i32 = 137;

impl CriRuntime {
    pub(super) async fn run_exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        let tried =
            format!("failed to execute {:?} in container {id}", request.command.first().map_or("", |name| name));
        let (_, place) = self.look_at_running(id, &tried).await?;
        if self.cgroups.is_frozen(place.cgroup.path()) {
            return Err(RuntimeError::new(Kind::Invalid, format!("{tried}: the container is paused")));
        }
        let turn = self.turns.turn(id.as_str()).await;
        let exec = Exec {
            client: self.client.clone(),
            cgroups: self.cgroups.clone(),
            container: id.clone(),
            place,
            request: request.clone(),
            tried,
        };
        let (answer, answered) = oneshot::channel();
        // Of its own: the runtime carries a start out whether or not somebody still waits for it.
        self.options.keepers.spawn(async move {
            let begun = exec.begin().await;
            drop(turn);
            match begun {
                Ok(begun) => exec.keep(begun, answer).await,
                // Whoever asked may have left.
                Err(error) => drop(answer.send(Err(error))),
            }
        });
        let ending = |lost| RuntimeError::new(Kind::Unavailable, "the runtime is ending").with_source(lost);
        answered.await.unwrap_or_else(|lost| Err(ending(lost)))
    }
}

/// One command.
struct Exec {
    client: CriClient,
    cgroups: Cgroups,
    container: ContainerId,
    place: Arc<Place>,
    request: ExecRequest,
    /// Begins the message of each failure.
    tried: String,
}

/// One that runs, or has run.
struct Begun {
    writes: mpsc::Sender<bytes::Bytes>,
    output: mpsc::Receiver<Output>,
    progress: watch::Receiver<Progress>,
    pump: futures::future::BoxFuture<'static, ()>,
    process: Option<Process>,
}

impl Exec {
    /// Starts it; returns once it runs or is over already.
    async fn begin(&self) -> Result<Begun> {
        let before = self.leaders().await;
        let asked = &self.request;
        let silent = !asked.stdin && !asked.stdout && !asked.stderr;
        let stderr = asked.stderr && !asked.tty;
        // One stream at least is asked for; what nobody wants of it is dropped.
        let stdout = asked.stdout || silent || (asked.tty && !asked.stdin);
        let wanted = Wanted { stdin: asked.stdin, stdout, stderr, tty: asked.tty };
        let request = v1::ExecRequest {
            container_id: self.container.to_string(),
            cmd: asked.command.clone(),
            tty: wanted.tty,
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
        };
        let answer = ask!(self.client.runtime, exec(request), || self.tried.clone()).await?;
        let Streams { writes, output, progress, pump } = streams::connect(&answer.url, wanted, &self.tried).await?;
        let mut begun = Begun { writes, output, progress, pump: pump.run(false).boxed(), process: None };
        self.await_start(&mut begun, &before).await?;
        Ok(begun)
    }

    async fn await_start(&self, begun: &mut Begun, before: &HashSet<i32>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut progress = begun.progress.clone();
        loop {
            let told = progress.borrow_and_update().clone();
            match told {
                // It is over, one way or the other.
                Progress::Ended(Ending::Failed(words)) => {
                    return Err(RuntimeError::new(Kind::Invalid, format!("{}: {words}", self.tried)));
                }
                Progress::Ended(Ending::Lost) => {
                    let text = format!("{}: the runtime closed the streams", self.tried);
                    return Err(RuntimeError::new(Kind::Unavailable, text));
                }
                Progress::Ended(Ending::Code(_)) => return Ok(()),
                Progress::Quiet | Progress::Wrote => {}
            }
            if let Some(pid) = self.leaders().await.difference(before).next() {
                begun.process = Process::open(*pid, self.container.as_str());
                return Ok(());
            }
            // What wrote something runs, or has; it is looked for once more.
            if told == Progress::Wrote || Instant::now() >= deadline {
                return Ok(());
            }
            tokio::select! {
                // Cancel-safe: what is not moved now is moved by the next call. It ends after it has told the end.
                () = &mut begun.pump => begun.pump = std::future::pending().boxed(),
                // Cancel-safe: it only waits.
                () = sleep(LOOK) => {}
            }
        }
    }

    async fn leaders(&self) -> HashSet<i32> {
        let (cgroups, place) = (self.cgroups.clone(), Arc::clone(&self.place));
        tokio::task::spawn_blocking(move || leaders(&cgroups, place.cgroup.path())).await.unwrap_or_default()
    }

    /// Moves the bytes until the end of the process is told, or the session is dropped.
    async fn keep(self, begun: Begun, answer: oneshot::Sender<Result<Session>>) {
        let Begun { writes, output, progress, pump, process } = begun;
        let (mut exit, exited) = oneshot::channel();
        // If nobody takes it, it is dropped here, and so is the receiver.
        drop(answer.send(Ok(self.session(writes, output, exited))));
        let moving = async {
            pump.await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            // The arms only watch, but for the one that moves bytes, which is polled until the end.
            ending = told(progress) => {
                // The session may be gone by now; so is the process.
                let _ = exit.send(self.code(ending).await);
            }
            () = moving => {}
            () = exit.closed() => {
                if let Some(process) = process {
                    process.hang_up().await;
                }
            }
        }
    }

    fn session(
        &self,
        writes: mpsc::Sender<bytes::Bytes>,
        output: mpsc::Receiver<Output>,
        exited: oneshot::Receiver<Result<i32>>,
    ) -> Session {
        let (stdout, stderr, tty) = (self.request.stdout, self.request.stderr, self.request.tty);
        let end = if tty { EndOfInput::Typed } else { EndOfInput::Closed };
        let stdin = self.request.stdin.then(|| Box::pin(Stdin::new(writes.clone(), end)) as _);
        let lost = |error| RuntimeError::new(Kind::Unavailable, "the runtime is ending").with_source(error);
        let exit = async move { exited.await.unwrap_or_else(|error| Err(lost(error))) };
        Session {
            stdin,
            output: streams::output(output, move |source| if source == LogSource::Stdout { stdout } else { stderr }),
            terminal: Box::new(SpdyTerminal { writes, present: tty }),
            exit: exit.boxed(),
        }
    }

    async fn code(&self, ending: Ending) -> Result<i32> {
        let words = match ending {
            Ending::Code(code) => return Ok(code),
            Ending::Failed(words) => words,
            Ending::Lost => "the runtime closed the streams".to_owned(),
        };
        // It went with its container, if that is gone.
        let request = v1::ContainerStatusRequest { container_id: self.container.to_string(), verbose: false };
        match ask!(self.client.runtime, container_status(request), || self.tried.clone()).await {
            Ok(answer) if answer.status.as_ref().is_some_and(runs) => {
                Err(RuntimeError::new(Kind::Unavailable, format!("{}: {words}", self.tried)))
            }
            Ok(_) => Ok(KILLED),
            Err(error) if error.is_not_found() => Ok(KILLED),
            Err(error) => Err(error),
        }
    }
}

/// Waits until the end is told. Cancel-safe.
async fn told(mut progress: watch::Receiver<Progress>) -> Ending {
    match progress.wait_for(|progress| matches!(progress, Progress::Ended(_))).await.as_deref() {
        Ok(Progress::Ended(ending)) => ending.clone(),
        Ok(_) | Err(_) => Ending::Lost,
    }
}

fn runs(status: &v1::ContainerStatus) -> bool {
    status.state() == v1::ContainerState::ContainerRunning
}
