//! The streams of a container's own process.
//!
//! A client that both speaks and listens has two connections where its input stays open for the next client: on one,
//! containerd takes the end of either output for the end of the input, and with the input it ends the other output, last
//! words and all.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use lambdalet_proto::cri::v1;
use tokio::io::{AsyncWrite, sink};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::CriRuntime;
use super::client::{CriClient, ask};
use super::container::Looked;
use super::info::Place;
use super::streams::{self, EndOfInput, SpdyTerminal, Stdin, Streams, Wanted};
use crate::runtime::Result;
use crate::runtime::process::Process;
use crate::runtime::session::{AttachRequest, Output, Session};
use crate::runtime::types::{ContainerId, LogSource};

/// The runtime takes note of an end a moment after the kernel told it.
const ASK: Duration = Duration::from_millis(20);
/// How often a process that cannot be seen from here is asked about.
const UNSEEN: Duration = Duration::from_millis(500);

impl CriRuntime {
    pub(super) async fn join_streams(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        let tried = format!("failed to attach to container {id}");
        let (looked, place) = self.look_at_running(id, &tried).await?;
        let (tty, open) = (looked.has("tty"), looked.has("stdin"));
        let stdin = request.stdin && open;
        let stderr = request.stderr && !tty;
        // One stream at least is asked for; what nobody wants of it is dropped.
        let wanted = Wanted { stdin, stdout: request.stdout || (!stdin && !stderr), stderr, tty };
        let mixes = stdin && !tty && !looked.has("once") && (wanted.stdout || wanted.stderr);
        // It listens before it speaks: an answer may come at once.
        let (writes, output) = self.connect_to(id, Wanted { stdin: stdin && !mixes, ..wanted }, &tried).await?;
        let writes =
            if mixes { self.connect_to(id, Wanted { stdin, ..Wanted::default() }, &tried).await?.0 } else { writes };
        let exit = exit_code(self.client.clone(), id.clone(), place);
        let (stdout, stderr) = (request.stdout, request.stderr);
        Ok(Session {
            stdin: self.input(request, &looked, writes.clone()),
            output: streams::output(output, move |source| if source == LogSource::Stdout { stdout } else { stderr }),
            terminal: Box::new(SpdyTerminal { writes, present: tty }),
            exit: exit.boxed(),
        })
    }

    /// One connection; until the server ends it, or the client has left.
    async fn connect_to(
        &self,
        id: &ContainerId,
        wanted: Wanted,
        tried: &str,
    ) -> Result<(mpsc::Sender<Bytes>, mpsc::Receiver<Output>)> {
        let Wanted { stdin, stdout, stderr, tty } = wanted;
        let asked = v1::AttachRequest { container_id: id.to_string(), stdin, tty, stdout, stderr };
        let answer = ask!(self.client.runtime, attach(asked), || tried.to_owned()).await?;
        let Streams { writes, output, progress: _, pump } = streams::connect(&answer.url, wanted, tried).await?;
        self.options.keepers.spawn(pump.run(true));
        Ok((writes, output))
    }

    fn input(
        &self,
        request: &AttachRequest,
        looked: &Looked,
        writes: mpsc::Sender<Bytes>,
    ) -> Option<Pin<Box<dyn AsyncWrite + Send>>> {
        let end = match (looked.has("once"), looked.has("tty")) {
            (false, _) => EndOfInput::Nothing,
            (true, false) => EndOfInput::Closed,
            (true, true) => EndOfInput::Typed,
        };
        match (request.stdin, looked.has("stdin")) {
            (true, true) => Some(Box::pin(Stdin::new(writes, end))),
            // A process without standard input reads nothing, and nobody should wait for it.
            (true, false) => Some(Box::pin(sink())),
            (false, _) => None,
        }
    }
}

/// Waits for the end of the container's process.
async fn exit_code(client: CriClient, id: ContainerId, place: Arc<Place>) -> Result<i32> {
    let process = Process::open(place.pid, id.as_str());
    loop {
        match &process {
            Some(process) => process.ended().await,
            None => sleep(UNSEEN).await,
        }
        let request = v1::ContainerStatusRequest { container_id: id.to_string(), verbose: false };
        let tried = || format!("failed to wait for container {id}, which is attached to");
        let status = ask!(client.runtime, container_status(request), tried).await?.status.unwrap_or_default();
        if status.state() != v1::ContainerState::ContainerRunning {
            return Ok(status.exit_code);
        }
        sleep(ASK).await;
    }
}
