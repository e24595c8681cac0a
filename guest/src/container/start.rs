//! The start of a container: a process of the agent's own binary is told what to become, and tells when it has.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use lambdalet_proto::agent::v1::{EventKind, Phase, PidMode, StartContainerReply};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::{Container, State};
use crate::clock;
use crate::error::{Error, Result};
use crate::fd::FdStream;
use crate::guest::Guest;
use crate::log;
use crate::reaper::{Child, PidNamespace};
use crate::stage::{Failure, Launch, Plan};

impl Guest {
    /// Starts a created container. A running one is fine.
    ///
    /// # Errors
    /// One that has exited. A command that cannot be executed is an answer.
    pub(crate) async fn start_container(self: Arc<Self>, id: String) -> Result<StartContainerReply> {
        let container = self.container(&id)?;
        let _turn = container.turn.lock().await;
        let phase = container.state.borrow().phase;
        match phase {
            Phase::Created => {}
            Phase::Running => return Ok(StartContainerReply { pid: container.told().pid, failure: String::new() }),
            Phase::Exited => return Err(Error::state(format!("container {id} has exited"))),
        }
        let (guest, starting) = (Arc::clone(&self), Arc::clone(&container));
        let launched = tokio::task::spawn_blocking(move || guest.launch(&starting)).await;
        match launched.unwrap_or_else(|panicked| Err(Failure::agent(io::Error::other(panicked)))) {
            Ok(child) => Ok(self.runs(Arc::clone(&container), child)),
            Err(failure) => {
                self.cgroups.kill(&id);
                container.log.close();
                container.state.send_modify(|state| {
                    *state = State {
                        phase: Phase::Exited,
                        created_ns: state.created_ns,
                        started_ns: clock::now_ns(),
                        finished_ns: clock::now_ns(),
                        exit_code: failure.code,
                        message: failure.message.clone(),
                        ..State::default()
                    };
                });
                self.events.tell(&id, EventKind::Exited, failure.code);
                Ok(StartContainerReply { pid: 0, failure: failure.message })
            }
        }
    }

    /// Notes that it runs, and waits for its end beside.
    fn runs(self: &Arc<Self>, container: Arc<Container>, child: Child) -> StartContainerReply {
        let Child { pid, pidfd, exit } = child;
        container.state.send_modify(|state| {
            state.phase = Phase::Running;
            state.pid = pid;
            state.started_ns = clock::now_ns();
            state.pidfd = Some(Arc::new(pidfd));
        });
        self.events.tell(&container.spec.id, EventKind::Started, 0);
        let guest = Arc::clone(self);
        tokio::task::spawn(async move {
            // The reaper lives as long as the guest.
            let code = exit.await.unwrap_or(128);
            guest.ended(&container, code).await;
        });
        StartContainerReply { pid: pid.unsigned_abs(), failure: String::new() }
    }

    fn launch(&self, container: &Container) -> Result<Child, Failure> {
        let spec = &container.spec;
        let mut plan = Plan {
            spec: Some(spec.clone()),
            root: self.paths.root(&spec.id).display().to_string(),
            cgroup: self.cgroups.path(&spec.id).display().to_string(),
            shared_memory: self.paths.shared_memory().display().to_string(),
            ..Plan::default()
        };
        for mount in &spec.mounts {
            plan.sources.push(self.source(mount).map_err(Failure::told)?.display().to_string());
        }
        let target;
        let namespace = match spec.pid() {
            PidMode::Container => PidNamespace::New,
            PidMode::Pod => {
                target = self.pause().map_err(Failure::agent)?;
                PidNamespace::Of(target.as_fd())
            }
            PidMode::Target => {
                let found = self.container(&spec.pid_target).map_err(Failure::told)?;
                let gone = || Failure::told(Error::state(format!("container {} does not run", spec.pid_target)));
                target = found.process().ok_or_else(gone)?;
                PidNamespace::Of(target.as_fd())
            }
        };
        let (launch, ours) = stdio(&mut plan, spec.stdin).map_err(Failure::agent)?;
        let launched = launch.run(&self.reaper, &plan, namespace)?;
        self.join(container, ours, launched.terminal).map_err(Failure::agent)?;
        Ok(launched.child)
    }

    /// Takes the agent's ends of the streams.
    fn join(&self, container: &Container, ours: Ours, terminal: Option<OwnedFd>) -> io::Result<()> {
        let log = Arc::clone(&container.log);
        let stdin = match (terminal, ours) {
            (Some(terminal), _) => {
                let stream = FdStream::new(terminal.try_clone()?)?;
                log::pump(log, terminal, None)?;
                let _ = container.terminal.set(stream.clone());
                container.spec.stdin.then_some(stream)
            }
            (None, Ours { stdin, output: Some((stdout, stderr)) }) => {
                log::pump(log, stdout, Some(stderr))?;
                stdin.map(FdStream::new).transpose()?
            }
            (None, Ours { output: None, .. }) => return Err(io::Error::other("the terminal was not handed over")),
        };
        *container.stdin.lock().unwrap_or_else(PoisonError::into_inner) = stdin;
        Ok(())
    }
}

/// The agent's ends of a container's streams.
struct Ours {
    stdin: Option<OwnedFd>,
    output: Option<(OwnedFd, OwnedFd)>,
}

/// Pipes, unless there will be a terminal.
fn stdio(plan: &mut Plan, stdin: bool) -> io::Result<(Launch, Ours)> {
    if plan.spec.as_ref().is_some_and(|spec| spec.tty) {
        plan.tty = true;
        return Ok((Launch::default(), Ours { stdin: None, output: None }));
    }
    let (read_in, write_in) = if stdin {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        (Some(read), Some(write))
    } else {
        (None, None)
    };
    let (read_out, write_out) = pipe2(OFlag::O_CLOEXEC)?;
    let (read_err, write_err) = pipe2(OFlag::O_CLOEXEC)?;
    let launch = Launch::new(read_in, Some(write_out), Some(write_err));
    Ok((launch, Ours { stdin: write_in, output: Some((read_out, read_err)) }))
}
