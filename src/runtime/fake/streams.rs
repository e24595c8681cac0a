//! Logs, exec, attach and port-forward of the fake: in memory, each with no more under way than a few writes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::io::{CopyToBytes, SinkWriter};
use tokio_util::sync::PollSender;

use super::process::{Console, Input, Process};
use super::program::{self, Program, Step};
use super::state::{KILLED, WRITES_AHEAD};
use super::{FakeRuntime, Shared, locked};
use crate::runtime::session::{AttachRequest, Duplex, ExecRequest, Output, Session, Terminal, TerminalSize};
use crate::runtime::types::{ContainerId, ContainerState, LogChunk, LogOptions, LogSource, SandboxId};
use crate::runtime::verb::Verb;
use crate::runtime::{Kind, Result, RuntimeError};

/// Bytes under way in each direction of a forwarded connection.
const CONNECTION_BUFFER: usize = 64 << 10;

impl FakeRuntime {
    /// How many execs run in the container.
    pub fn running_execs(&self, id: &ContainerId) -> usize {
        locked(&self.shared.state).containers.get(id).map_or(0, |container| container.execs)
    }

    /// Waits until no exec runs in the container.
    pub async fn execs_ended(&self, id: &ContainerId) {
        self.shared.until(|state| state.containers.get(id).is_none_or(|container| container.execs == 0)).await;
    }

    pub(super) fn read_log(
        &self,
        id: &ContainerId,
        options: &LogOptions,
    ) -> Result<BoxStream<'static, Result<LogChunk>>> {
        if self.shared.faults.is_cut(Verb::Logs) {
            return Ok(futures::stream::empty().boxed());
        }
        let start = locked(&self.shared.state).container(id)?.log.start(options);
        let (shared, id, options) = (Arc::clone(&self.shared), id.clone(), options.clone());
        let changed = shared.changed.subscribe();
        let chunks = stream::unfold((shared, changed, start), move |(shared, mut changed, mut at)| {
            let (id, options) = (id.clone(), options.clone());
            async move {
                loop {
                    let (chunk, more) = {
                        let state = locked(&shared.state);
                        let container = state.containers.get(&id)?;
                        (container.log.get(at), container.status.state != ContainerState::Exited)
                    };
                    match chunk {
                        Some(chunk) => {
                            at += 1;
                            if options.since.is_none_or(|since| chunk.time >= since) {
                                return Some((Ok(chunk), (shared, changed, at)));
                            }
                        }
                        None if options.follow && more => changed.changed().await.ok()?,
                        None => return None,
                    }
                }
            }
        });
        Ok(chunks.boxed())
    }

    pub(super) fn run_exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        let steps = match program::read(&request.command) {
            Program::Runs(steps) => steps,
            Program::CannotStart { message, .. } => {
                let name = request.command.first().map_or("", |name| name);
                let text = format!("failed to execute {name:?} in container {id}: {message}");
                locked(&self.shared.state).running(id, "execute in")?;
                return Err(RuntimeError::new(Kind::Invalid, text));
            }
        };
        let counted = Counted::new(&self.shared, id)?;
        let (sender, receiver) = mpsc::channel(WRITES_AHEAD);
        let (written, output) = mpsc::channel(WRITES_AHEAD);
        let (exit, exited) = oneshot::channel();
        let size = watch::Sender::new(None);
        let process = Process {
            shared: Arc::clone(&self.shared),
            container: id.clone(),
            input: request.stdin.then(|| Input { receiver, rest: Bytes::new() }),
            console: Console::Session {
                stdout: request.stdout.then(|| written.clone()),
                stderr: request.stderr.then_some(written),
                tty: request.tty,
            },
            size: size.subscribe(),
        };
        self.spawn(live(process, steps, exit, counted));
        let lost = |error| RuntimeError::new(Kind::Unavailable, "the fake has ended").with_source(error);
        Ok(Session {
            stdin: request.stdin.then(|| writer(sender)),
            output: stream::unfold(output, |mut output| async move { Some((Ok(output.recv().await?), output)) })
                .boxed(),
            terminal: Box::new(Size { size, present: request.tty }),
            exit: exited.map(move |code| code.map_err(lost)).boxed(),
        })
    }

    pub(super) fn join_streams(&self, id: &ContainerId, request: AttachRequest) -> Result<Session> {
        let mut state = locked(&self.shared.state);
        let container = state.running(id, "attach to")?;
        let (tty, size) = (container.config.tty, container.size.clone());
        let once = container.config.stdin_once;
        let stdin = if !request.stdin {
            None
        } else if once {
            container.stdin.take()
        } else {
            container.stdin.clone()
        };
        drop(state);
        let stdin: Option<Pin<Box<dyn AsyncWrite + Send>>> = match stdin {
            Some(stdin) => Some(writer(stdin)),
            None if request.stdin => Some(Box::pin(tokio::io::sink())),
            None => None,
        };
        let wanted = move |chunk: &LogChunk| match chunk.source {
            LogSource::Stderr if !tty => request.stderr,
            _ => request.stdout,
        };
        let from_now = LogOptions { follow: true, tail: Some(0), since: None };
        let output = self.read_log(id, &from_now)?;
        let output = output.try_filter(move |chunk| std::future::ready(wanted(chunk))).map_ok(move |chunk| Output {
            source: if tty { LogSource::Stdout } else { chunk.source },
            bytes: chunk.bytes,
        });
        let (shared, id) = (Arc::clone(&self.shared), id.clone());
        Ok(Session {
            stdin,
            output: output.boxed(),
            terminal: Box::new(Size { size, present: tty }),
            exit: async move { Ok(shared.exit_code(&id).await) }.boxed(),
        })
    }

    pub(super) fn connect_inside(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        if !locked(&self.shared.state).listens(id, port)? {
            let text =
                format!("failed to connect to localhost:{port} inside namespace {:?}: connection refused", id.as_str());
            return Err(RuntimeError::new(Kind::Invalid, text));
        }
        let (ours, theirs) = tokio::io::duplex(CONNECTION_BUFFER);
        self.spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(theirs);
            // The other side may leave at any time.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        });
        Ok(Box::pin(ours))
    }
}

async fn live(mut process: Process, steps: Vec<Step>, mut exit: oneshot::Sender<i32>, counted: Counted) {
    let (shared, container) = (Arc::clone(&process.shared), process.container.clone());
    let running = async {
        match process.run(steps).await {
            Some(code) => code,
            None => std::future::pending().await,
        }
    };
    let code = tokio::select! {
        // Whichever comes first is the end of the process; what the others were about ends with it.
        code = running => code,
        () = shared.ended(&container) => KILLED,
        () = exit.closed() => KILLED,
    };
    drop(process);
    drop(counted);
    // The session may be gone.
    let _ = exit.send(code);
}

/// One exec of a container, for as long as it lives.
struct Counted {
    shared: Arc<Shared>,
    container: ContainerId,
}

impl Counted {
    fn new(shared: &Arc<Shared>, id: &ContainerId) -> Result<Self> {
        let mut state = locked(&shared.state);
        let container = state.running(id, "execute in")?;
        if container.status.frozen {
            return Err(RuntimeError::new(Kind::Invalid, format!("container {id} is paused")));
        }
        container.execs += 1;
        drop(state);
        Ok(Self { shared: Arc::clone(shared), container: id.clone() })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(container) = locked(&self.shared.state).containers.get_mut(&self.container) {
            container.execs -= 1;
        }
        self.shared.touch();
    }
}

fn writer(sender: mpsc::Sender<Bytes>) -> Pin<Box<dyn AsyncWrite + Send>> {
    let sink = PollSender::new(sender).sink_map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe));
    Box::pin(SinkWriter::new(CopyToBytes::new(sink)))
}

struct Size {
    size: watch::Sender<Option<TerminalSize>>,
    present: bool,
}

#[async_trait]
impl Terminal for Size {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        if self.present && size.width > 0 && size.height > 0 {
            self.size.send_replace(Some(size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::runtime::SandboxRuntime;
    use crate::runtime::types::{
        ContainerConfig, MachineFiles, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxNetwork,
    };

    async fn running(fake: &FakeRuntime) -> ContainerId {
        let pod = PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        let sandbox = SandboxConfig {
            pod: pod.clone(),
            handler: None,
            attempt: 0,
            hostname: String::new(),
            network: SandboxNetwork::Host,
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: String::new(),
            resources: Resources::default(),
            machine: MachineFiles::default(),
        };
        let sandbox = fake.run_pod_sandbox(&sandbox).await.unwrap();
        let container = ContainerConfig::new(pod, "c", fake.add_image("i"), vec!["idle".into()]);
        let id = fake.create_container(&sandbox, &container).await.unwrap();
        fake.start_container(&id).await.unwrap();
        id
    }

    #[tokio::test]
    async fn a_session_that_is_dropped_ends_its_exec() {
        let fake = FakeRuntime::new();
        let id = running(&fake).await;
        let request = ExecRequest { command: vec!["idle".into()], stdout: true, ..ExecRequest::default() };
        let session = fake.exec(&id, &request).await.unwrap();
        assert_eq!(fake.running_execs(&id), 1);
        drop(session);
        fake.execs_ended(&id).await;
        assert_eq!(fake.running_execs(&id), 0);
    }
}
