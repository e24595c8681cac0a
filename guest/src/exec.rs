//! Commands in containers that run.
//!
//! A command has two calls: the one that carries its streams, and the one that waits for its end. It is ended when the
//! second is dropped, or the first while nobody waits.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lambdalet_proto::agent::v1::process_input::Message as Input;
use lambdalet_proto::agent::v1::process_output::Message as Outcome;
use lambdalet_proto::agent::v1::{Empty, ExecStart, ProcessInput, ProcessOutput};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::pipe2;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};

use crate::container::check_name;
use crate::error::{Error, Result};
use crate::fd::FdStream;
use crate::guest::Guest;
use crate::reaper::PidNamespace;
use crate::stage::{Launch, Plan};
use crate::streams::PIECE;

/// Commands at once.
const MAX_EXECS: usize = 512;
/// How long output may come after the end of the command; something it left behind may hold its streams for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long an exit code is kept for somebody to ask.
const KEPT: Duration = Duration::from_secs(30);

/// What comes from the node.
pub(crate) trait Inputs: Stream<Item = Result<ProcessInput, Status>> + Unpin {}

impl<S: Stream<Item = Result<ProcessInput, Status>> + Unpin> Inputs for S {}

/// Where the output goes.
pub(crate) type Output = mpsc::Sender<Result<ProcessOutput, Status>>;

/// A command that was started.
#[derive(Debug)]
pub(crate) struct Exec {
    pid: i32,
    exit: watch::Receiver<Option<i32>>,
    waited: AtomicBool,
}

/// Commands by the node's name for them.
#[derive(Debug, Default)]
pub(crate) struct Execs(Mutex<HashMap<String, Arc<Exec>>>);

impl Execs {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        // A map is never half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent's ends of a command's streams.
struct Ends {
    stdin: Option<FdStream>,
    stdout: Option<FdStream>,
    stderr: Option<FdStream>,
    terminal: Option<FdStream>,
}

impl Guest {
    /// Starts a command, and carries its streams until both have ended.
    ///
    /// # Errors
    /// A container that does not run, or a command that cannot be executed.
    pub(crate) async fn exec(
        self: Arc<Self>,
        start: ExecStart,
        input: Streaming<ProcessInput>,
        output: Output,
    ) -> Result<()> {
        let guest = Arc::clone(&self);
        let started = tokio::task::spawn_blocking(move || guest.start_exec(&start)).await;
        let (place, ends) =
            started.map_err(|panicked| Error::failed("failed to start a command", io::Error::other(panicked)))??;
        let started = ProcessOutput { message: Some(Outcome::Started(Empty {})) };
        // A node that has gone already is noticed below.
        let _ = output.send(Ok(started)).await;
        tokio::task::spawn(async move {
            carry(&self, &place.exec, ends, input, &output).await;
            drop(output);
            let mut exit = place.exec.exit.clone();
            // Cancel-safe: only looks.
            let _ = exit.wait_for(Option::is_some).await;
            tokio::time::sleep(KEPT).await;
            drop(place);
        });
        Ok(())
    }

    fn start_exec(self: &Arc<Self>, start: &ExecStart) -> Result<(Place, Ends)> {
        check_name("command", &start.exec_id)?;
        let container = self.container(&start.container)?;
        let process = container.process();
        let process = process.ok_or_else(|| Error::state(format!("container {} does not run", start.container)))?;
        if self.execs.lock().len() >= MAX_EXECS {
            return Err(Error::state(format!("{MAX_EXECS} commands run already")));
        }
        let mut spec = container.spec.clone();
        spec.args.clone_from(&start.args);
        let size = start.size.unwrap_or_default();
        let plan = Plan {
            spec: Some(spec),
            cgroup: self.cgroups.path(&start.container).display().to_string(),
            tty: start.tty,
            columns: size.columns,
            rows: size.rows,
            ..Plan::default()
        };
        let tried = |error: io::Error| Error::failed("failed to prepare a command", error);
        let (launch, mut ends) = streams(start).map_err(tried)?;
        let launch = launch.joining(process.try_clone().map_err(tried)?);
        let launched = launch.run(&self.reaper, &plan, PidNamespace::Of(process.as_fd()));
        let launched = launched.map_err(|failure| Error::state(failure.message))?;
        let (told, exit) = watch::channel(None);
        let ended = launched.child.exit;
        tokio::task::spawn(async move { told.send_replace(Some(ended.await.unwrap_or(128))) });
        let place = self.place(&start.exec_id, launched.child.pid, exit);
        if let Some(terminal) = launched.terminal {
            let terminal = FdStream::new(terminal).map_err(tried)?;
            ends.stdin = start.stdin.then(|| terminal.clone());
            ends.stdout = Some(terminal.clone());
            ends.terminal = Some(terminal);
        }
        Ok((place, ends))
    }

    fn place(self: &Arc<Self>, id: &str, pid: i32, exit: watch::Receiver<Option<i32>>) -> Place {
        let exec = Arc::new(Exec { pid, exit, waited: AtomicBool::new(false) });
        self.execs.lock().insert(id.to_owned(), Arc::clone(&exec));
        Place { guest: Arc::clone(self), id: id.to_owned(), exec }
    }

    /// Waits for the end of a command, which is now if it is to `end`. Dropped before, it ends the command.
    ///
    /// # Errors
    /// An unknown command.
    pub(crate) async fn exec_exit(&self, id: &str, end: bool) -> Result<i32> {
        let exec = self.execs.lock().get(id).cloned();
        let exec = exec.ok_or_else(|| Error::not_found(format!("there is no command {id}")))?;
        exec.waited.store(true, Ordering::Relaxed);
        let _ends = EndsWith { guest: self, exec: &exec };
        if end {
            self.end_exec(&exec);
        }
        let mut exit = exec.exit.clone();
        let code = exit.wait_for(Option::is_some).await.ok().and_then(|code| *code);
        self.execs.lock().remove(id);
        Ok(code.unwrap_or(128))
    }

    fn end_exec(&self, exec: &Exec) {
        if exec.exit.borrow().is_none() {
            // What is gone needs no end.
            let _ = self.reaper.signal(exec.pid, true, Signal::SIGKILL);
        }
    }
}

/// A command's place among all. Dropped, it is free again, and the command has ended with it: whoever wanted the command
/// may go while it starts, and then nobody else would know of it.
struct Place {
    guest: Arc<Guest>,
    id: String,
    exec: Arc<Exec>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.guest.end_exec(&self.exec);
        self.guest.execs.lock().remove(&self.id);
    }
}

/// Ends a command when nobody waits for it any more.
struct EndsWith<'a> {
    guest: &'a Guest,
    exec: &'a Exec,
}

impl Drop for EndsWith<'_> {
    fn drop(&mut self) {
        self.guest.end_exec(self.exec);
    }
}

/// Pipes for what is wanted, unless there will be a terminal.
fn streams(start: &ExecStart) -> io::Result<(Launch, Ends)> {
    let mut ends = Ends { stdin: None, stdout: None, stderr: None, terminal: None };
    if start.tty {
        return Ok((Launch::default(), ends));
    }
    let pipe = |wanted: bool| if wanted { pipe2(OFlag::O_CLOEXEC).map(Some) } else { Ok(None) };
    let split = |pipe: Option<(OwnedFd, OwnedFd)>| pipe.map_or((None, None), |(read, write)| (Some(read), Some(write)));
    let (stdin, write) = split(pipe(start.stdin)?);
    let (read_out, stdout) = split(pipe(start.stdout)?);
    let (read_err, stderr) = split(pipe(start.stderr)?);
    ends.stdin = write.map(FdStream::new).transpose()?;
    ends.stdout = read_out.map(FdStream::new).transpose()?;
    ends.stderr = read_err.map(FdStream::new).transpose()?;
    Ok((Launch::new(stdin, stdout, stderr), ends))
}

async fn carry(guest: &Guest, exec: &Exec, ends: Ends, input: impl Inputs, output: &Output) {
    let Ends { stdin, stdout, stderr, terminal } = ends;
    // Who wants no output may let go of it at once, and ask how the command ends only then.
    let is_heard = stdout.is_some() || stderr.is_some();
    let exited = || async {
        let _ = exec.exit.clone().wait_for(Option::is_some).await;
    };
    let ended = async {
        exited().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    let all = async {
        tokio::join!(drain(stdout, output, Outcome::Stdout), drain(stderr, output, Outcome::Stderr));
        // One that has closed its outputs may still read.
        exited().await;
    };
    // Nothing is polled again after the first that is ready, but the input ends long before the rest.
    tokio::select! {
        () = all => {}
        () = ended => {}
        () = async { feed(input, stdin, terminal, || true).await; std::future::pending().await } => {}
        () = output.closed() => {
            if is_heard && !exec.waited.load(Ordering::Relaxed) {
                guest.end_exec(exec);
            }
        }
    }
}

/// Sends what a process writes; waits for nobody but the node.
async fn drain(source: Option<FdStream>, output: &Output, message: impl Fn(bytes::Bytes) -> Outcome) {
    let Some(source) = source else { return };
    let mut piece = vec![0; PIECE];
    while let Ok(read @ 1..) = source.read(&mut piece).await {
        let message = message(bytes::Bytes::copy_from_slice(&piece[..read]));
        if output.send(Ok(ProcessOutput { message: Some(message) })).await.is_err() {
            return;
        }
    }
}

/// Gives a process what the node sends. The input is closed when the node goes, or says so: then `ended` is asked whether
/// that is the end for the process too.
pub(crate) async fn feed(
    mut input: impl Inputs,
    mut stdin: Option<FdStream>,
    terminal: Option<FdStream>,
    ended: impl Fn() -> bool,
) {
    let mut mid_line = false;
    while let Some(Ok(message)) = input.next().await {
        match message.message {
            Some(Input::Stdin(bytes)) => {
                if let Some(writer) = &stdin
                    && writer.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
                mid_line = bytes.last().map_or(mid_line, |last| !matches!(last, b'\n' | b'\r'));
            }
            Some(Input::StdinEnd(_)) => {
                if ended()
                    && let (Some(_), Some(terminal)) = (&stdin, &terminal)
                {
                    // A terminal that is gone has nobody to tell.
                    let _ = terminal.write_all(&terminal.end_of_file(mid_line)).await;
                }
                stdin = None;
            }
            Some(Input::Resize(size)) => {
                if let Some(terminal) = &terminal {
                    terminal.resize(size.columns, size.rows);
                }
            }
            Some(Input::Exec(_) | Input::Attach(_)) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command};

    use bytes::Bytes;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::guest::Paths;

    fn guest() -> Arc<Guest> {
        Arc::new(Guest::new(Paths::default(), true).unwrap())
    }

    /// A process that the guest's reaper knows, and its number.
    fn sleeping(guest: &Guest) -> (Child, i32) {
        let child = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
        let pid = child.id().cast_signed();
        guest.reaper.adopt(pid);
        (child, pid)
    }

    #[tokio::test]
    async fn a_command_ends_and_gives_up_its_place_if_nobody_takes_it() {
        let guest = guest();
        let (mut child, pid) = sleeping(&guest);
        let (_told, exit) = watch::channel(None);
        let starting = Arc::clone(&guest);
        // What is started on a thread of its own goes on when its caller does not wait.
        let started = tokio::task::spawn_blocking(move || starting.place("one", pid, exit));
        let place = started.await.unwrap();
        assert_eq!(guest.execs.lock().len(), 1);
        drop(place);
        assert!(guest.execs.lock().is_empty());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_command_that_nobody_wants_any_more_is_ended() {
        let guest = guest();
        let (mut child, pid) = sleeping(&guest);
        let (told, exit) = watch::channel(None);
        let _place = guest.place("one", pid, exit);
        let ends = async {
            let signal = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap().signal();
            told.send_replace(signal.map(|signal| 128 + signal));
        };
        let (code, ()) = tokio::join!(guest.exec_exit("one", true), ends);
        assert_eq!(code.unwrap(), 137);
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_has_closed_its_outputs_reads_on_until_it_ends() {
        let guest = guest();
        let (told, exit) = watch::channel(None);
        let exec = Exec { pid: 0, exit, waited: AtomicBool::new(false) };
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (stdout, closed) = pipe2(OFlag::O_CLOEXEC).unwrap();
        drop(closed);
        let (stdin, stdout) = (FdStream::new(write).unwrap(), FdStream::new(stdout).unwrap());
        let ends = Ends { stdin: Some(stdin), stdout: Some(stdout), stderr: None, terminal: None };
        let (sender, input) = mpsc::channel(1);
        let (output, _listener) = mpsc::channel(1);
        let mut carried = Box::pin(carry(&guest, &exec, ends, ReceiverStream::new(input), &output));
        assert!(tokio::time::timeout(2 * LAST_WORDS, &mut carried).await.is_err(), "it ends with its outputs");
        let speaks = async {
            for message in [Input::Stdin(Bytes::from_static(b"late")), Input::StdinEnd(Empty {})] {
                sender.send(Ok(ProcessInput { message: Some(message) })).await.unwrap();
            }
            let (command, mut piece) = (FdStream::new(read).unwrap(), [0; 8]);
            let length = command.read(&mut piece).await.unwrap();
            assert_eq!(&piece[..length], b"late");
            assert_eq!(command.read(&mut piece).await.unwrap(), 0);
            told.send_replace(Some(0));
        };
        tokio::join!(carried, speaks);
    }
}
