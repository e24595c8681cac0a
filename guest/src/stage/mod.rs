//! What a process does between its birth in the agent and its life as a workload.
//!
//! ```text
//! agent --plan, streams--> stage: cgroup, namespaces, root, terminal, user, rights --exec--> workload
//!   ^---- terminal, failure ---'                                    (the socket closes: it runs)
//! ```
//! It is the agent's binary, started anew: it has one thread and nothing of the agent's memory. Until it has become the
//! workload nothing in the container can look into it (it is not dumpable).

mod identity;
mod rights;
mod root;
mod seccomp;

use std::ffi::CString;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use lambdalet_proto::agent::v1::ContainerSpec;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

use crate::error::Error;
use crate::reaper::{Child, PidNamespace, Reaper};

/// The name it is started with.
pub(crate) const CONTAINER: &str = "lambdalet-container";
/// The name of the process that holds a PID namespace.
pub(crate) const PAUSE: &str = "lambdalet-pause";
/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes of a plan; a message of the protocol has fewer.
const MAX_PLAN: u32 = 4 << 20;
/// Most descriptors that go with a plan: three streams and a process.
const MAX_FDS: usize = 4;
const OOM_SCORE: &str = "/proc/self/oom_score_adj";
/// What the stage says: the terminal is attached to this, or it has failed.
const TERMINAL: u8 = b'T';
const FAILED: u8 = b'F';
/// A command that is not there, and any other that could not be started.
const NOT_FOUND: i32 = 127;
const NOT_STARTED: i32 = 128;

/// What to become.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Plan {
    #[prost(message, optional, tag = "1")]
    pub(crate) spec: Option<ContainerSpec>,
    /// The mounted root file system.
    #[prost(string, tag = "2")]
    pub(crate) root: String,
    #[prost(string, tag = "3")]
    pub(crate) cgroup: String,
    /// Where each of the spec's mounts comes from.
    #[prost(string, repeated, tag = "4")]
    pub(crate) sources: Vec<String>,
    #[prost(bool, tag = "5")]
    pub(crate) tty: bool,
    /// A command in a container that runs: its first process comes as a descriptor.
    #[prost(bool, tag = "6")]
    pub(crate) join: bool,
    /// Which of the three streams come as descriptors, a bit each.
    #[prost(uint32, tag = "7")]
    pub(crate) streams: u32,
    /// The Pod's /dev/shm.
    #[prost(string, tag = "8")]
    pub(crate) shared_memory: String,
    #[prost(uint32, tag = "9")]
    pub(crate) columns: u32,
    #[prost(uint32, tag = "10")]
    pub(crate) rows: u32,
}

/// Why there is no workload.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// As the container's exit code: 127 for a command that is not there, else 128.
    pub(crate) code: i32,
    /// For people.
    pub(crate) message: String,
}

impl Failure {
    /// The agent's own doing.
    pub(crate) fn agent(error: io::Error) -> Self {
        Self { code: NOT_STARTED, message: format!("failed to start a process: {error}") }
    }

    /// A refusal in words.
    pub(crate) fn told(error: Error) -> Self {
        Self { code: NOT_STARTED, message: tonic::Status::from(error).message().to_owned() }
    }

    fn at(step: &str, error: impl Into<io::Error>) -> Self {
        Self { code: NOT_STARTED, message: format!("failed to {step}: {}", error.into()) }
    }
}

/// The streams of a process to be.
#[derive(Debug, Default)]
pub(crate) struct Launch {
    streams: [Option<OwnedFd>; 3],
    join: Option<OwnedFd>,
}

/// A workload.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) child: Child,
    /// The agent's side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

impl Launch {
    /// With these ends of pipes as its streams; what is missing is /dev/null.
    pub(crate) fn new(stdin: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd>) -> Self {
        Self { streams: [stdin, stdout, stderr], join: None }
    }

    /// In the namespaces of this process.
    pub(crate) fn joining(mut self, process: OwnedFd) -> Self {
        self.join = Some(process);
        self
    }

    /// Starts it, and returns once it runs.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn run(self, reaper: &Reaper, plan: &Plan, namespace: PidNamespace<'_>) -> Result<Launched, Failure> {
        let (mut ours, theirs) = UnixStream::pair().map_err(Failure::agent)?;
        ours.set_read_timeout(Some(PATIENCE)).map_err(Failure::agent)?;
        let mut command = Command::new("/proc/self/exe");
        // The stage itself goes to its directory: a library linked statically can only do that for it by copying the agent.
        command.arg0(CONTAINER).env_clear();
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::null());
        let child = reaper.spawn(&mut command, namespace).map_err(Failure::agent)?;
        // The command holds the stage's end of the socket.
        drop(command);
        let answered = self.send(&mut ours, plan).and_then(|()| answer(&mut ours));
        match answered {
            Ok(Ok(terminal)) => Ok(Launched { child, terminal }),
            Ok(Err(failure)) => Err(failure),
            Err(error) => {
                // Whatever became of it, it is nobody's.
                let _ = reaper.signal(child.pid, false, Signal::SIGKILL);
                Err(Failure::agent(error))
            }
        }
    }

    fn send(self, socket: &mut UnixStream, plan: &Plan) -> io::Result<()> {
        let mut plan = plan.clone();
        plan.streams = (0..3).map(|at| u32::from(self.streams[at].is_some()) << at).sum();
        plan.join = self.join.is_some();
        let bytes = plan.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
        let fds: Vec<BorrowedFd<'_>> = self.streams.iter().chain([&self.join]).flatten().map(AsFd::as_fd).collect();
        send_fds(socket, &length, &fds)?;
        socket.write_all(&bytes)
    }
}

/// The terminal, if any, once it runs.
fn answer(socket: &mut UnixStream) -> io::Result<Result<Option<OwnedFd>, Failure>> {
    let mut terminal = None;
    loop {
        let mut said = [0; 1];
        let (read, mut fds) = receive_fds(socket, &mut said)?;
        match said[0] {
            _ if read == 0 => return Ok(Ok(terminal)),
            TERMINAL => terminal = fds.pop(),
            _ => {
                let mut failure = Vec::new();
                socket.take(4096).read_to_end(&mut failure)?;
                let (code, message) = failure.split_first().unwrap_or((&128, &[]));
                let message = String::from_utf8_lossy(message).into_owned();
                return Ok(Err(Failure { code: i32::from(*code), message }));
            }
        }
    }
}

fn send_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_fds(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((received.bytes, rights.flatten().collect()))
}

/// The stage itself.
pub(crate) fn run() -> ExitCode {
    let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3) else { return ExitCode::FAILURE };
    let mut socket = UnixStream::from(socket);
    let failure = match become_workload(&mut socket) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let code = u8::try_from(failure.code).unwrap_or(128);
    // An agent that no longer listens needs no reason.
    let _ = socket.write_all(&[&[FAILED, code], failure.message.as_bytes()].concat());
    ExitCode::from(code)
}

fn become_workload(socket: &mut UnixStream) -> Result<std::convert::Infallible, Failure> {
    std::env::set_current_dir("/").map_err(|error| Failure::at("begin", error))?;
    let (plan, mut fds) = receive(socket).map_err(|error| Failure::at("read the plan", error))?;
    let spec = plan.spec.as_ref().ok_or_else(|| Failure::at("read the plan", io::Error::other("it has no spec")))?;
    let process = if plan.join { fds.pop() } else { None };
    settle(&plan, spec.oom_score_adj).map_err(|error| Failure::at("enter the cgroup", error))?;
    match &process {
        Some(process) => root::join(process).map_err(|error| Failure::at("enter the container", error))?,
        None => root::make(&plan, spec)?,
    }
    let identity = identity::of(spec).map_err(|error| Failure { code: NOT_STARTED, message: error })?;
    if plan.tty {
        terminal(socket, &plan, &identity).map_err(|error| Failure::at("open a terminal", error))?;
    } else {
        streams(plan.streams, fds).map_err(|error| Failure::at("take the streams", error))?;
    }
    let directory = if spec.cwd.is_empty() { "/" } else { &spec.cwd };
    let entered = fs::create_dir_all(directory).and_then(|()| std::env::set_current_dir(directory));
    let environment = environment(spec, &identity, plan.tty);
    rights::take(spec, &identity)?;
    // As the user: a directory that only root may enter does not become the workload's.
    entered.map_err(|error| Failure::at(&format!("change to the directory {directory}"), error))?;
    execute(&spec.args, &environment)
}

fn receive(socket: &mut UnixStream) -> io::Result<(Plan, Vec<OwnedFd>)> {
    let mut length = [0; 4];
    let (read, fds) = receive_fds(socket, &mut length)?;
    if read < length.len() {
        socket.read_exact(&mut length[read..])?;
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_PLAN {
        return Err(io::Error::other("it is too long"));
    }
    let mut bytes = vec![0; length as usize];
    socket.read_exact(&mut bytes)?;
    Ok((Plan::decode(&bytes[..]).map_err(io::Error::other)?, fds))
}

/// Into the cgroup, out of the agent's protection, out of sight.
fn settle(plan: &Plan, oom_score_adj: i32) -> io::Result<()> {
    fs::write(format!("{}/cgroup.procs", plan.cgroup), "0")?;
    fs::write(OOM_SCORE, oom_score_adj.to_string())?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    rustix::process::setsid()?;
    // The agent blocks and ignores what it likes; the workload begins with nothing of that.
    SigSet::all().thread_unblock()?;
    Ok(())
}

/// A terminal of the container's own /dev/pts; the agent gets the other side.
fn terminal(socket: &UnixStream, plan: &Plan, identity: &identity::Identity) -> io::Result<()> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    if let (Ok(ws_col @ 1..), Ok(ws_row @ 1..)) = (u16::try_from(plan.columns), u16::try_from(plan.rows)) {
        let size = rustix::termios::Winsize { ws_col, ws_row, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal, size)?;
    }
    rustix::fs::fchown(&terminal, Some(rustix::fs::Uid::from_raw(identity.uid)), None)?;
    rustix::process::ioctl_tiocsctty(&terminal)?;
    dup(&terminal, &terminal, &terminal)?;
    send_fds(socket, &[TERMINAL], &[master.as_fd()])
}

fn streams(given: u32, fds: Vec<OwnedFd>) -> io::Result<()> {
    let null = || fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let mut fds = fds.into_iter();
    let mut next = |at: u32| match if given & 1 << at == 0 { None } else { fds.next() } {
        Some(fd) => Ok(fd),
        None => null(),
    };
    let (stdin, stdout, stderr) = (next(0)?, next(1)?, next(2)?);
    dup(&stdin, &stdout, &stderr)
}

fn dup(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> io::Result<()> {
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    Ok(())
}

/// The spec's, the last of a name, and what every process expects to find.
fn environment(spec: &ContainerSpec, identity: &identity::Identity, tty: bool) -> Vec<(String, String)> {
    let mut environment =
        vec![("PATH".to_owned(), rights::PATH.to_owned()), ("HOME".to_owned(), identity.home.clone())];
    if let Ok(name) = nix::unistd::gethostname() {
        environment.push(("HOSTNAME".to_owned(), name.to_string_lossy().into_owned()));
    }
    if tty {
        environment.push(("TERM".to_owned(), "xterm".to_owned()));
    }
    for said in &spec.env {
        let (name, value) = said.split_once('=').unwrap_or((said, ""));
        environment.retain(|(known, _)| known != name);
        environment.push((name.to_owned(), value.to_owned()));
    }
    environment
}

fn execute(args: &[String], environment: &[(String, String)]) -> Result<std::convert::Infallible, Failure> {
    let command = args.first().map_or("", String::as_str);
    let text =
        |text: String| CString::new(text).map_err(|error| Failure::at("read the command", io::Error::other(error)));
    let argv = args.iter().cloned().map(text).collect::<Result<Vec<_>, _>>()?;
    let envp =
        environment.iter().map(|(name, value)| text(format!("{name}={value}"))).collect::<Result<Vec<_>, _>>()?;
    let mut refused = Errno::ENOENT;
    for path in candidates(command, environment) {
        match nix::unistd::execve(&text(path)?, &argv, &envp) {
            Ok(never) => return Ok(never),
            // As shells do: a later directory may have one that can be executed.
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => refused = error,
        }
    }
    let code = if refused == Errno::ENOENT { NOT_FOUND } else { NOT_STARTED };
    Err(Failure { code, message: format!("failed to execute {command:?}: {}", refused.desc().to_lowercase()) })
}

/// Where a command may be.
fn candidates(command: &str, environment: &[(String, String)]) -> Vec<String> {
    if command.is_empty() || command.contains('/') {
        return vec![command.to_owned()];
    }
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or(rights::PATH, |(_, value)| value);
    path.split(':')
        .map(|directory| format!("{}/{command}", if directory.is_empty() { "." } else { directory }))
        .collect()
}

/// Process 1 of a PID namespace that containers share: it collects their orphans until it is killed. Whoever looks into it
/// finds an empty root and no rights.
pub(crate) fn pause() -> ExitCode {
    let ended = SigSet::from(Signal::SIGCHLD);
    let hidden = || Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?);
    let left =
        fs::write(OOM_SCORE, "0").and_then(|()| root::leave()).and_then(|()| rights::none()).and_then(|()| hidden());
    if left.is_err() || ended.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        // Interrupted or not, the next round looks.
        let _ = ended.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_a_slash_is_looked_for() {
        let path = [("PATH".to_owned(), "/bin::/usr/bin".to_owned())];
        assert_eq!(candidates("sh", &path), ["/bin/sh", "./sh", "/usr/bin/sh"]);
        assert_eq!(candidates("./sh", &path), ["./sh"]);
        assert_eq!(candidates("", &path), [""]);
    }

    #[test]
    fn the_last_of_a_name_counts_and_the_spec_is_before_the_rest() {
        let spec = ContainerSpec { env: vec!["A=1".into(), "HOME=/x".into(), "A=2=3".into()], ..Default::default() };
        let all = environment(&spec, &identity::Identity::default(), true);
        let of = |name: &str| {
            all.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>()
        };
        assert_eq!((of("A"), of("HOME"), of("TERM")), (vec!["2=3"], vec!["/x"], vec!["xterm"]));
    }
}
