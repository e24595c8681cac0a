//! port-forward: connections to ports inside a sandbox, many over one connection of the client's.

mod pair;
mod pairs;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::idle::HangUp;
use super::session::{Session as Spdy, Stream, Terms};
use super::upgrade::Socket;
use super::websocket::channels::Protocol;
use super::websocket::socket::{Closing, WebSocket, Wiring};
use super::websocket::tunnel::Tunnel;
use crate::runtime::Result;
use crate::runtime::session::Duplex;
use pair::{HalfClose, Pair};
use pairs::{Added, Claim, Pairs};

/// The subprotocol over SPDY.
pub(in crate::kubelet_api) const SPDY_PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];
/// SPDY in the messages of a WebSocket.
pub(in crate::kubelet_api) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Streams that one client may have at once: two for each connection to a port.
const STREAMS: usize = 4096;
/// How long a port may go on once its client is done sending. A client whose own user left in the middle of a download
/// says no more than one that waits for its answer (`nc -N`), then drops what comes without a sign: what never stops
/// would be carried for ever. Container runtimes allow a second, which is little for an answer.
const LINGER: Duration = Duration::from_secs(60);
/// Ports that have two channels each with numbers of one byte, the last of which is taken.
const MOST_PORTS: usize = 127;

/// Connects to a port of one sandbox.
type Dial = Arc<dyn Fn(u16) -> BoxFuture<'static, Result<Pin<Box<dyn Duplex>>>> + Send + Sync>;

/// A sandbox to forward to.
#[derive(Clone)]
pub(in crate::kubelet_api) struct Forward {
    /// The Pod's name, for texts.
    pub(in crate::kubelet_api) pod: String,
    /// Connects to a port of it.
    pub(in crate::kubelet_api) dial: Dial,
    /// When the connection ends for want of traffic.
    pub(in crate::kubelet_api) idle: Duration,
}

/// Serves a client that speaks SPDY, until it leaves.
pub(in crate::kubelet_api) async fn over_spdy(forward: Forward, socket: Socket) {
    let Socket { reader, writer, hang_up } = socket;
    serve(forward, reader, writer, hang_up).await;
}

/// Serves a client that speaks SPDY inside a WebSocket, until it leaves.
pub(in crate::kubelet_api) async fn over_tunnel(forward: Forward, socket: Socket) {
    let (joined, hang_up) = socket.joined();
    let (reader, writer) = tokio::io::split(Tunnel::through(joined).await);
    serve(forward, reader, writer, hang_up).await;
}

async fn serve<R, W>(forward: Forward, reader: R, writer: W, hang_up: HangUp)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let mut session = Spdy::start(reader, writer, Terms { streams: STREAMS, idle: forward.idle, hang_up });
    let (mut pairs, mut running) = (Pairs::default(), JoinSet::new());
    loop {
        let deadline = pairs.deadline();
        tokio::select! {
            // Cancel-safe: a stream is taken or left.
            stream = session.accept() => match stream {
                Some(stream) => admit(stream, &mut pairs, &mut running, &forward).await,
                None => break,
            },
            // Cancel-safe: a task's end is taken or left.
            Some(_) = running.join_next() => {}
            // Cancel-safe: it only waits.
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                for half in pairs.expired(Instant::now()) {
                    half.give_up().await;
                }
            }
        }
    }
    running.shutdown().await;
    session.close().await;
}

async fn admit(stream: Stream, pairs: &mut Pairs, running: &mut JoinSet<()>, forward: &Forward) {
    let Some(claim) = Claim::of(stream.id, &stream.headers) else { return stream.outbox.fail().await };
    if stream.outbox.reply().await.is_err() {
        return;
    }
    match pairs.add(claim, (stream.inbox, stream.outbox), Instant::now()) {
        Added::Waiting => {}
        Added::Complete(pair) => {
            let forward = forward.clone();
            running.spawn(async move { pair.run(&forward, HalfClose::Kept(LINGER)).await });
        }
        Added::Twice(outbox) => outbox.fail().await,
    }
}

/// Serves a client that names its ports beforehand and has two channels for each (v4 over WebSocket), until it leaves
/// or all ports are closed.
pub(in crate::kubelet_api) async fn over_websocket(
    forward: Forward,
    socket: Socket,
    protocol: Protocol,
    ports: Vec<u16>,
) {
    let channels = (0..).step_by(2).take(ports.len());
    let wiring = Wiring { feeds: channels.clone().collect(), closing: Closing::HangsUp, idle: forward.idle };
    let (mut websocket, mut inboxes) = WebSocket::start(socket, protocol, wiring);
    let mut running = JoinSet::new();
    for (channel, port) in channels.zip(ports) {
        let Some(inbox) = inboxes.remove(&channel) else { continue };
        let pair = Pair { port, inbox, data: websocket.outbox(channel), errors: websocket.outbox(channel + 1) };
        let forward = forward.clone();
        running.spawn(async move {
            // Each channel begins with the port, so that a client knows which is which.
            let begun = Bytes::copy_from_slice(&port.to_le_bytes());
            if pair.data.send(begun.clone()).await.is_ok() && pair.errors.send(begun).await.is_ok() {
                pair.run(&forward, HalfClose::Unknown).await;
            }
        });
    }
    tokio::select! {
        // Cancel-safe: a task's end is taken or left.
        () = async { while running.join_next().await.is_some() {} } => websocket.close().await,
        // Cancel-safe: it only looks.
        () = websocket.gone() => running.shutdown().await,
    }
}

/// The ports of a query: `port`, as API servers write it, or `ports`; several, or one with commas.
///
/// # Errors
/// The text of the answer 400.
pub(in crate::kubelet_api) fn ports(pairs: &[(String, String)]) -> std::result::Result<Vec<u16>, String> {
    let named = pairs.iter().filter(|(name, _)| name == "port" || name == "ports");
    let mut ports = Vec::new();
    for text in named.flat_map(|(_, value)| value.split(',')) {
        match text.parse() {
            Ok(port) if port > 0 => ports.push(port),
            _ => return Err(format!("unable to parse {text:?} as a port")),
        }
    }
    match ports.len() {
        0 => Err("query parameter \"port\" is required".to_owned()),
        1..=MOST_PORTS => Ok(ports),
        many => Err(format!("{many} ports are more than the {MOST_PORTS} that have channels")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(values: &[(&str, &str)]) -> Vec<(String, String)> {
        values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn ports_come_in_any_spelling() {
        assert_eq!(ports(&query(&[("port", "80,81"), ("ports", "443")])), Ok(vec![80, 81, 443]));
        for wrong in ["", "0", "65536", "80,", "http"] {
            assert!(ports(&query(&[("port", wrong)])).is_err(), "{wrong:?}");
        }
        assert!(ports(&[]).is_err());
        assert!(ports(&query(&[("port", "1"); 128])).is_err());
    }
}
