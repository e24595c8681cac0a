//! Commands run in a running container.
//!
//! ```text
//! create -> start (hijacked) -> resize: answered once it runs or could not be started -> inspect: its process
//! ```
//! A keeper per exec does that, waits for the end of the process and fetches its exit code. If the session is dropped
//! first (a client that vanished), it ends the process, which Docker has no verb for. What a process of this node that was
//! killed leaves behind is ended by the next (see [`left`](super::left)).
//!
//! As with `docker exec`, the exit code is there when the process has ended, and its output ends within two seconds of
//! that, also if something it left in the background still holds its streams.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bollard::Docker;
use bollard::exec::{CreateExecOptions, ResizeExecOptions};
use futures::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::failure::{failed, is_absent, status as http_status, words};
use super::process::Process;
use super::wire::{self, EndOfInput, Stdin, Wire};
use super::{DockerRuntime, http};
use crate::runtime::session::{ExecRequest, Session, Terminal, TerminalSize};
use crate::runtime::types::ContainerId;
use crate::runtime::{Kind, Result, RuntimeError};

/// With a terminal the daemon watches its input for keys that mean "let go", and cannot be told not to. So they are
/// some that nobody types, and the first, which is held back until the next key, is one that few programs know.
pub(super) const DETACH_KEYS: &str = "ctrl-@,ctrl-^,ctrl-_,ctrl-],ctrl-^,ctrl-_,ctrl-],ctrl-^,ctrl-_,ctrl-]";
/// The same as the daemon keeps them. Execs without a terminal have them too, where they mean nothing but whose they are
/// (see [`left`](super::left)).
pub(super) const DETACH_BYTES: [u8; 10] = [0, 30, 31, 29, 30, 31, 29, 30, 31, 29];
/// Exit codes that Docker notes for a command that could not be started.
const CANNOT_START: [i64; 2] = [126, 127];
/// Most of its words about that.
const LONGEST_WORDS: usize = 4 << 10;
const WORDS_PATIENCE: Duration = Duration::from_secs(5);
/// Exit code of a process that went with its container.
const KILLED: i32 = 137;
/// The daemon notes the end of a process a moment after the kernel tells it: the pause between two looks, for as long as
/// that mostly takes; then pauses grow to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const A_MOMENT: Duration = Duration::from_millis(40);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the daemon may take to note a start or an end.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a process that cannot be seen from here (a daemon on another host) is asked about.
const UNSEEN_PAUSE: Duration = Duration::from_millis(200);

impl DockerRuntime {
    pub(super) async fn run_exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        let tried =
            format!("failed to execute {:?} in container {id}", request.command.first().map_or("", |name| name));
        let seen = self.see(id.as_str()).await?.filter(|seen| !seen.facts.sandbox_itself);
        let seen =
            seen.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("{tried}: there is no such container")))?;
        if !seen.running() {
            return Err(RuntimeError::new(Kind::Invalid, format!("{tried}: the container does not run")));
        }
        let exec = Exec {
            docker: self.docker.clone(),
            socket: self.options.socket.clone(),
            container: id.to_string(),
            request: request.clone(),
            tried,
        };
        let (answer, answered) = oneshot::channel();
        // Of its own: the daemon carries a start out whether or not somebody still waits for it.
        self.keepers.spawn(exec.keep(answer));
        let ending = |lost| RuntimeError::new(Kind::Unavailable, "the runtime is ending").with_source(lost);
        answered.await.unwrap_or_else(|lost| Err(ending(lost)))
    }
}

/// One command, from its creation to its end.
struct Exec {
    docker: Docker,
    socket: PathBuf,
    container: String,
    request: ExecRequest,
    /// Begins the message of each failure.
    tried: String,
}

/// What Docker says of an exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Running(i32),
    CannotStart,
    Ended(i32),
}

impl Exec {
    async fn keep(self, answer: oneshot::Sender<Result<Session>>) {
        let id = match self.create().await {
            Ok(id) => id,
            Err(error) => return drop(answer.send(Err(error))),
        };
        // One that was not started costs nothing: the daemon forgets it.
        if answer.is_closed() {
            return;
        }
        let (wire, process) = match self.begin(&id).await {
            Ok(begun) => begun,
            Err(error) => {
                drop(answer.send(Err(error)));
                return self.give_up(&id).await;
            }
        };
        let (exit, exited) = oneshot::channel();
        // If nobody takes it, it is dropped here, and so is the receiver.
        drop(answer.send(Ok(self.session(&id, &wire, exited))));
        self.watch(&id, wire, process, exit).await;
    }

    async fn create(&self) -> Result<String> {
        let request = &self.request;
        let options = CreateExecOptions {
            cmd: Some(request.command.clone()),
            tty: Some(request.tty),
            attach_stdin: Some(request.stdin),
            attach_stdout: Some(request.stdout),
            attach_stderr: Some(request.stderr && !request.tty),
            detach_keys: Some(DETACH_KEYS.to_owned()),
            ..CreateExecOptions::default()
        };
        match self.docker.create_exec(&self.container, options).await {
            Ok(made) => Ok(made.id),
            // It has stopped, or is paused.
            Err(error) if http_status(&error) == Some(409) => {
                let words = words(&error).unwrap_or_default();
                Err(RuntimeError::new(Kind::Invalid, format!("{}: {}", self.tried, words.trim())))
            }
            Err(error) => Err(failed(&self.tried, error)),
        }
    }

    /// Starts it; returns once it runs or is over already.
    async fn begin(&self, id: &str) -> Result<(Arc<Wire>, Option<Process>)> {
        let tty = self.request.tty;
        let body = if tty { r#"{"Detach":false,"Tty":true}"# } else { r#"{"Detach":false,"Tty":false}"# };
        let hijacked = http::hijack(&self.socket, &self.tried, &format!("/exec/{id}/start"), body).await?;
        let wire = Wire::new(hijacked, !tty, self.request.stdout || self.request.stderr);
        // The daemon answers this once the process was started or could not be, with or without a terminal; the size
        // itself is the one it has. What the answer is does not matter.
        let _ = self.docker.resize_exec(id, ResizeExecOptions { height: 0, width: 0 }).await;
        match self.settled(id).await? {
            State::CannotStart => {
                let words = timeout(WORDS_PATIENCE, wire::text(&wire, LONGEST_WORDS)).await.unwrap_or_default();
                Err(RuntimeError::new(Kind::Invalid, format!("{}: {words}", self.tried)))
            }
            State::Running(pid) => Ok((wire, Process::open(pid, &self.container))),
            State::Starting | State::Ended(_) => Ok((wire, None)),
        }
    }

    fn session(&self, id: &str, wire: &Arc<Wire>, exited: oneshot::Receiver<Result<i32>>) -> Session {
        let end = if self.request.tty { EndOfInput::Typed } else { EndOfInput::HalfClose };
        let stdin = self.request.stdin.then(|| Stdin::new(Arc::clone(wire), end));
        let lost = |error| RuntimeError::new(Kind::Unavailable, "the runtime is ending").with_source(error);
        let exit = async move { exited.await.unwrap_or_else(|error| Err(lost(error))) };
        let terminal = ExecTerminal { docker: self.docker.clone(), exec: id.to_owned(), present: self.request.tty };
        Session {
            stdin: stdin.map(|stdin| Box::pin(stdin) as _),
            output: wire::output(Arc::clone(wire), format!("failed to read from exec {id}")),
            terminal: Box::new(terminal),
            exit: exit.boxed(),
        }
    }

    /// Waits for the end of the process, or of the session.
    async fn watch(&self, id: &str, wire: Arc<Wire>, process: Option<Process>, mut exit: oneshot::Sender<Result<i32>>) {
        let ended = async {
            match &process {
                Some(process) => process.ended().await,
                None => self.ended_unseen(id).await,
            }
        };
        tokio::select! {
            biased;
            // Both arms only watch: nothing is lost with the one that is dropped.
            () = ended => {}
            () = exit.closed() => {
                drop(wire);
                return match process {
                    Some(process) => process.hang_up().await,
                    None => self.give_up(id).await,
                };
            }
        }
        let tell = async {
            // The session may be gone by now; so is the process.
            let _ = exit.send(self.code(id).await);
        };
        tokio::join!(tell, wire.read_ahead());
    }

    /// For a process that ended before it could be looked at, or that is not on this host.
    async fn ended_unseen(&self, id: &str) {
        while let Ok(State::Starting | State::Running(_)) = self.state(id).await {
            sleep(UNSEEN_PAUSE).await;
        }
    }

    /// Ends a process that nobody may have seen start.
    async fn give_up(&self, id: &str) {
        if let Ok(State::Running(pid)) = self.settled(id).await
            && let Some(process) = Process::open(pid, &self.container)
        {
            process.hang_up().await;
        }
    }

    async fn code(&self, id: &str) -> Result<i32> {
        let settled = |state: State| match state {
            State::Ended(code) => Some(code),
            State::CannotStart => Some(CANNOT_START[0] as i32),
            State::Starting | State::Running(_) => None,
        };
        self.looked(id, settled).await
    }

    async fn settled(&self, id: &str) -> Result<State> {
        self.looked(id, |state| (state != State::Starting).then_some(state)).await
    }

    /// Looks until what is seen is what is waited for.
    async fn looked<T>(&self, id: &str, wanted: impl Fn(State) -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(seen) = wanted(self.state(id).await?) {
                return Ok(seen);
            }
            if begun.elapsed() >= PATIENCE {
                let text = format!("{}: Docker does not say what became of it", self.tried);
                return Err(RuntimeError::new(Kind::Unavailable, text));
            }
            sleep(pause).await;
            if begun.elapsed() > A_MOMENT {
                pause = LONGEST_PAUSE.min(pause * 2);
            }
        }
    }

    async fn state(&self, id: &str) -> Result<State> {
        let seen = match self.docker.inspect_exec(id).await {
            Ok(seen) => seen,
            // The container was removed under it.
            Err(error) if is_absent(&error) => return Ok(State::Ended(KILLED)),
            Err(error) => return Err(failed(&self.tried, error)),
        };
        let pid = seen.pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 0);
        Ok(match (seen.running.unwrap_or(false), seen.exit_code, pid) {
            (true, _, Some(pid)) => State::Running(pid),
            (true, _, None) | (false, None, _) => State::Starting,
            (false, Some(code), None) if CANNOT_START.contains(&code) => State::CannotStart,
            (false, Some(code), _) => State::Ended(code as i32),
        })
    }
}

struct ExecTerminal {
    docker: Docker,
    exec: String,
    present: bool,
}

#[async_trait]
impl Terminal for ExecTerminal {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        if !self.present || size.width == 0 || size.height == 0 {
            return Ok(());
        }
        let options = ResizeExecOptions { height: size.height, width: size.width };
        only_unavailable(self.docker.resize_exec(&self.exec, options).await, "failed to resize the terminal of an exec")
    }
}

/// A terminal that is gone needs no size, so only a daemon that does not answer is a failure.
pub(super) fn only_unavailable(result: Result<(), bollard::errors::Error>, tried: &str) -> Result<()> {
    match result.map_err(|error| failed(tried, error)) {
        Err(error) if error.kind() == Kind::Unavailable => Err(error),
        Err(error) => {
            tracing::debug!(error = crate::telemetry::chain(&error), "the process has ended, it seems");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}
