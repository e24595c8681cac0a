//! exec and attach: a process in a container, its streams, and word of how it ended.

pub(in crate::kubelet_api) mod options;
pub(in crate::kubelet_api) mod relay;
mod resize;
pub(in crate::kubelet_api) mod status;

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::timeout;
use tracing::debug;

use super::STREAM_CREATION;
use super::pipe::Outbox;
use super::session::{Session as Spdy, Stream, Terms};
use super::upgrade::Socket;
use super::websocket::channels::{Base, Protocol};
use super::websocket::socket::{Closing, WebSocket, Wiring};
use crate::runtime::Result;
use crate::runtime::session::Session;
use crate::telemetry::chain;
use options::Options;
use relay::{Ends, relay};
use status::{Outcome, StatusForm};

/// The subprotocols of exec and attach over SPDY, as CRI runtimes have them: v5 has a meaning only over WebSocket.
pub(in crate::kubelet_api) const SPDY_PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Streams that one client may open; it needs five.
const STREAMS: usize = 16;

/// A process to serve.
pub(in crate::kubelet_api) struct Command {
    /// What the client asked for.
    pub(in crate::kubelet_api) options: Options,
    /// Starts or joins it; not begun before the client's streams are there.
    pub(in crate::kubelet_api) session: BoxFuture<'static, Result<Session>>,
    /// What is being done, for an error's text.
    pub(in crate::kubelet_api) doing: &'static str,
    /// Whether it is the client's own, so that its exit code is told and it may outlast its input; a process that one
    /// only joined is its container's affair.
    pub(in crate::kubelet_api) own: bool,
    /// When the connection ends for want of traffic.
    pub(in crate::kubelet_api) idle: Duration,
}

impl Command {
    async fn run(session: BoxFuture<'static, Result<Session>>, doing: &str, own: bool, ends: &mut Ends) -> Outcome {
        let ended = match session.await {
            Ok(session) => relay(session, ends).await,
            Err(error) => Err(error),
        };
        match ended {
            Ok(code) if own && code != 0 => Outcome::ExitCode(code),
            Ok(_) => Outcome::Success,
            Err(error) => Outcome::Failed(format!("{doing}: {}", chain(&error))),
        }
    }

    /// Runs it and says how it ended.
    async fn serve(self, mut ends: Ends, errors: &Outbox, form: StatusForm) {
        let outcome = Self::run(self.session, self.doing, self.own, &mut ends).await;
        ends.end().await;
        // A client that gave its error stream up does not want to know.
        let _ = errors.send(outcome.write(form)).await;
        errors.end().await;
    }
}

/// Serves a client that speaks SPDY, until it or the process has ended.
pub(in crate::kubelet_api) async fn over_spdy(command: Command, socket: Socket, protocol: &str) {
    let Socket { reader, writer, hang_up } = socket;
    let mut session = Spdy::start(reader, writer, Terms { streams: STREAMS, idle: command.idle, hang_up });
    let resizes = matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let form = if protocol == "v4.channel.k8s.io" { StatusForm::Json } else { StatusForm::Text };
    let wanted = command.options.streams(resizes);
    let collected = timeout(STREAM_CREATION, collect(&mut session, wanted)).await;
    let Ok(Some(Streams { ends, errors: Some(errors), others })) = collected else {
        debug!(wanted, "the client did not open its streams");
        return session.close().await;
    };
    tokio::select! {
        // Not cancel-safe, and must not be: without a client the process ends.
        () = async {
            command.serve(ends, &errors, form).await;
            for outbox in &others {
                outbox.end().await;
            }
        } => {}
        // Not cancel-safe, and need not be: the other arm ends the session.
        () = turn_away(&mut session) => return,
    }
    session.close().await;
}

/// Streams beyond those that belong to the command; resolves when the client is gone.
async fn turn_away(session: &mut Spdy) {
    while let Some(stream) = session.accept().await {
        stream.outbox.fail().await;
    }
}

#[derive(Default)]
struct Streams {
    ends: Ends,
    errors: Option<Outbox>,
    /// The ways back of streams that only come, kept so that they stay open.
    others: Vec<Outbox>,
}

/// Takes the streams of a command; `None` if the client left before they were all there.
async fn collect(session: &mut Spdy, wanted: usize) -> Option<Streams> {
    let mut streams = Streams::default();
    let mut taken = 0;
    while taken < wanted {
        let Stream { headers, inbox, outbox, .. } = session.accept().await?;
        let kind = headers.get("streamtype").unwrap_or_default();
        let ends = &mut streams.ends;
        let free = match kind {
            "error" => streams.errors.is_none(),
            "stdin" => ends.stdin.is_none(),
            "stdout" => ends.stdout.is_none(),
            "stderr" => ends.stderr.is_none(),
            "resize" => ends.resize.is_none(),
            _ => false,
        };
        if !free {
            outbox.fail().await;
            continue;
        }
        outbox.reply().await.ok()?;
        taken += 1;
        match kind {
            "error" => streams.errors = Some(outbox),
            "stdout" => ends.stdout = Some(outbox),
            "stderr" => ends.stderr = Some(outbox),
            "stdin" => {
                ends.stdin = Some(inbox);
                streams.others.push(outbox);
            }
            _ => {
                ends.resize = Some(inbox);
                streams.others.push(outbox);
            }
        }
    }
    Some(streams)
}

/// The channels of a WebSocket.
mod channel {
    pub(super) const STDIN: u8 = 0;
    pub(super) const STDOUT: u8 = 1;
    pub(super) const STDERR: u8 = 2;
    pub(super) const ERROR: u8 = 3;
    pub(super) const RESIZE: u8 = 4;
}

/// Serves a client that speaks WebSocket, until it or the process has ended.
pub(in crate::kubelet_api) async fn over_websocket(command: Command, socket: Socket, protocol: Protocol) {
    let options = command.options;
    let read = |wanted: bool, channel: u8| wanted.then_some(channel);
    let feeds = [read(options.stdin, channel::STDIN), read(true, channel::RESIZE)].into_iter().flatten().collect();
    // Before v5 there is no other way to say that the input is at its end. A terminal has no such end: its client hung
    // up.
    let closing = match options.stdin && !options.tty && protocol.base() != Base::V5 {
        true if command.own => Closing::Ends(channel::STDIN),
        true => Closing::EndsAndLeaves(channel::STDIN),
        false => Closing::HangsUp,
    };
    let wiring = Wiring { feeds, closing, idle: command.idle };
    let (mut websocket, mut inboxes) = WebSocket::start(socket, protocol, wiring);
    let mut ends = Ends {
        stdin: inboxes.remove(&channel::STDIN),
        stdout: options.stdout.then(|| websocket.outbox(channel::STDOUT)),
        stderr: options.stderr.then(|| websocket.outbox(channel::STDERR)),
        resize: inboxes.remove(&channel::RESIZE),
    };
    let errors = websocket.outbox(channel::ERROR);
    let form = if protocol.base() == Base::V1 { StatusForm::Text } else { StatusForm::Json };
    tokio::select! {
        // Not cancel-safe, and must not be: without a client the process ends.
        () = async {
            // An empty message says that the connection stands.
            let first = ends.stdout.as_ref().or(ends.stderr.as_ref()).unwrap_or(&errors);
            let _ = first.greet().await;
            command.serve(std::mem::take(&mut ends), &errors, form).await;
        } => {}
        // Cancel-safe: it only looks.
        () = websocket.gone() => return,
    }
    websocket.close().await;
}
