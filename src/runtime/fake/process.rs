//! A fake process at work: one step after the other, on whatever streams it has.

use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::program::Step;
use super::state::KILLED;
use super::{Shared, locked};
use crate::runtime::session::{Output, TerminalSize};
use crate::runtime::types::{ContainerId, ContainerState, LogSource};

/// Standard input as its process reads it.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) receiver: mpsc::Receiver<Bytes>,
    /// Received and not read.
    pub(super) rest: Bytes,
}

impl Input {
    async fn piece(&mut self) -> Option<Bytes> {
        if self.rest.has_remaining() { Some(std::mem::take(&mut self.rest)) } else { self.receiver.recv().await }
    }

    /// Reads up to the next newline, or to the end.
    async fn line(&mut self) {
        while let Some(mut piece) = self.piece().await {
            if let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
                piece.advance(end + 1);
                self.rest = piece;
                return;
            }
        }
    }
}

/// Where a process writes.
#[derive(Debug)]
pub(super) enum Console {
    /// Its container's log.
    Log,
    /// The session of its exec: standard output and standard error, where they are wanted.
    Session { stdout: Option<mpsc::Sender<Output>>, stderr: Option<mpsc::Sender<Output>>, tty: bool },
}

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) shared: Arc<Shared>,
    pub(super) container: ContainerId,
    pub(super) input: Option<Input>,
    pub(super) console: Console,
    pub(super) size: watch::Receiver<Option<TerminalSize>>,
}

impl Process {
    /// A container's own.
    pub(super) fn of_container(shared: Arc<Shared>, container: ContainerId) -> Self {
        let (mut input, mut size) = (None, watch::Sender::new(None).subscribe());
        if let Some(found) = locked(&shared.state).containers.get_mut(&container) {
            input = found.input.take().map(|receiver| Input { receiver, rest: Bytes::new() });
            size = found.size.subscribe();
        }
        Self { shared, container, input, console: Console::Log, size }
    }

    /// Lives the life of a container.
    pub(super) async fn live(mut self, steps: Vec<Step>) {
        if let Some(code) = self.run(steps).await {
            self.shared.end(&self.container, code, false);
        }
        // Its standard input stays open until it is stopped.
        self.shared.ended(&self.container).await;
    }

    /// The code it exits with; `None` if it goes on until it is stopped.
    pub(super) async fn run(&mut self, steps: Vec<Step>) -> Option<i32> {
        for step in steps {
            self.shared.thawed(&self.container).await;
            match step {
                Step::Write(source, bytes) => self.write(source, bytes.into()).await,
                Step::Cat(path) => self.cat(&path).await,
                Step::Copy => {
                    while let Some(piece) = match &mut self.input {
                        Some(input) => input.piece().await,
                        None => None,
                    } {
                        self.write(LogSource::Stdout, piece).await;
                    }
                }
                Step::Line => {
                    if let Some(input) = &mut self.input {
                        input.line().await;
                    }
                }
                Step::Size => self.tell_size().await,
                Step::Close => self.console = Console::Session { stdout: None, stderr: None, tty: false },
                Step::Listen(port) => self.shared.listen(&self.container, port),
                Step::Sleep(time) => sleep(time).await,
                Step::Exit(code) => return Some(code),
                Step::IgnoreStop => {
                    if let (Console::Log, Some(container)) =
                        (&self.console, locked(&self.shared.state).containers.get_mut(&self.container))
                    {
                        container.stubborn = true;
                    }
                }
            }
        }
        None
    }

    async fn write(&self, source: LogSource, bytes: Bytes) {
        match &self.console {
            Console::Log => self.shared.append_log(&self.container, source, &bytes),
            Console::Session { stdout, stderr, tty } => {
                let source = if *tty { LogSource::Stdout } else { source };
                let stream = if source == LogSource::Stderr { stderr } else { stdout };
                if let Some(stream) = stream {
                    // Nobody reads any more: as good as read.
                    let _ = stream.send(Output { source, bytes }).await;
                }
            }
        }
    }

    async fn cat(&self, path: &str) {
        let host = locked(&self.shared.state).containers.get(&self.container).and_then(|container| {
            let mount = container.config.mounts.iter().find(|mount| mount.container_path == path);
            mount.map(|mount| mount.host_path.clone())
        });
        match host.map(std::fs::read) {
            Some(Ok(bytes)) => self.write(LogSource::Stdout, bytes.into()).await,
            _ => self.write(LogSource::Stderr, format!("cat: {path}: not mounted\n").into()).await,
        }
    }

    async fn tell_size(&mut self) {
        let size = self.size.wait_for(Option::is_some).await.ok().and_then(|size| *size);
        if let Some(TerminalSize { width, height }) = size {
            self.write(LogSource::Stdout, format!("{height} {width}\n").into()).await;
        }
    }
}

impl Shared {
    fn listen(&self, id: &ContainerId, port: u16) {
        if let Some(container) = locked(&self.state).containers.get_mut(id) {
            container.ports.push(port);
        }
        self.touch();
    }

    /// Waits until the container is not frozen.
    async fn thawed(&self, id: &ContainerId) {
        self.until(|state| state.containers.get(id).is_none_or(|container| !container.status.frozen)).await;
    }

    /// Waits until the container does not run.
    pub(super) async fn ended(&self, id: &ContainerId) {
        self.until(|state| {
            state.containers.get(id).is_none_or(|container| container.status.state != ContainerState::Running)
        })
        .await;
    }

    /// The code a container has exited with; that of a killed process if it was removed.
    pub(super) async fn exit_code(&self, id: &ContainerId) -> i32 {
        self.ended(id).await;
        locked(&self.state).containers.get(id).map_or(KILLED, |container| container.status.exit_code)
    }
}
