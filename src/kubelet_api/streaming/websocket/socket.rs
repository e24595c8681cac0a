//! A WebSocket with its socket: messages are read into channels, and written from them.
//!
//! That is no task of its own: whoever holds the connection also runs it, beside what it is for. So a piece goes from the
//! socket to a process, or back, without another thread being woken up for it.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, Fuse, FusedFuture};
use futures::stream::{SplitSink, SplitStream};
use futures::{FutureExt, SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{Error, Message as Frame};
use tracing::debug;

use super::channels::{ChannelError, Message, Payload, Protocol};
use super::config;
use crate::kubelet_api::streaming::idle::{HangUp, Idle};
use crate::kubelet_api::streaming::pipe::{Budget, Feed, Inbox, Outbox, WRITES_WAITING, Write, stream};
use crate::kubelet_api::streaming::upgrade::{Joined, Socket};
use crate::telemetry::chain;

/// For a client to answer the last message and close the connection.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a client means by closing the connection in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kubelet_api) enum Closing {
    /// This channel is at its end, if it was still open; what runs may run to its end.
    Ends(u8),
    /// This channel is at its end, and with it the session, once what came on it is handed on.
    EndsAndLeaves(u8),
    /// It does not want anything any more.
    HangsUp,
}

/// How a connection is set up.
pub(in crate::kubelet_api) struct Wiring {
    /// The channels that are read from; what comes for others is dropped.
    pub(in crate::kubelet_api) feeds: Vec<u8>,
    /// See [`Closing`].
    pub(in crate::kubelet_api) closing: Closing,
    /// When the connection ends for want of traffic.
    pub(in crate::kubelet_api) idle: Duration,
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
enum SocketError {
    #[error("the WebSocket broke")]
    WebSocket(#[from] Error),
    #[error("the client broke the channel protocol")]
    Channel(#[from] ChannelError),
    #[error("the client hung up")]
    HungUp,
    #[error("the connection was idle for too long")]
    Idle,
}

impl SocketError {
    /// What the client is told of it, if it still listens.
    fn code(&self) -> Option<CloseCode> {
        match self {
            Self::Channel(ChannelError::Base64(_)) => Some(CloseCode::Invalid),
            Self::Channel(ChannelError::Close(_)) => Some(CloseCode::Protocol),
            Self::WebSocket(Error::Capacity(_)) => Some(CloseCode::Size),
            Self::Idle => Some(CloseCode::Away),
            Self::WebSocket(_) | Self::HungUp => None,
        }
    }
}

/// The connection. It stands still while nobody waits for [`WebSocket::gone`] or [`WebSocket::close`]. Dropping it
/// closes the socket.
pub(in crate::kubelet_api) struct WebSocket {
    writes: mpsc::Sender<Write>,
    budget: Budget,
    work: Fuse<BoxFuture<'static, ()>>,
}

impl WebSocket {
    /// The connection, and an inbox for each channel that is read from.
    pub(in crate::kubelet_api) fn start(
        socket: Socket,
        protocol: Protocol,
        wiring: Wiring,
    ) -> (Self, BTreeMap<u8, Inbox>) {
        let (writes, queue) = mpsc::channel(WRITES_WAITING);
        let (budget, idle) = (Budget::default(), Idle::new(wiring.idle));
        let (mut feeds, mut inboxes) = (BTreeMap::new(), BTreeMap::new());
        for channel in wiring.feeds {
            let (feed, inbox, _) = stream(channel.into(), &budget, &writes);
            feeds.insert(channel, feed);
            inboxes.insert(channel, inbox);
        }
        let (joined, hang_up) = socket.joined();
        let beats = writes.downgrade();
        let work = async move {
            let stream = WebSocketStream::from_raw_socket(joined, Role::Server, Some(config())).await;
            let (sink, stream) = stream.split();
            let reader = Reader { stream, protocol, feeds, writes: beats, hang_up, idle: idle.clone() };
            let writer = Writer { sink, protocol, queue, idle: idle.clone() };
            run(reader, writer, wiring.closing, idle).await;
        };
        (Self { writes, budget, work: work.boxed().fuse() }, inboxes)
    }

    /// The end of a channel that is written to.
    pub(in crate::kubelet_api) fn outbox(&self, channel: u8) -> Outbox {
        stream(channel.into(), &self.budget, &self.writes).2
    }

    /// Reads and writes until the client has left and nothing is to be done for it any more. Cancel-safe.
    pub(in crate::kubelet_api) async fn gone(&mut self) {
        if !self.work.is_terminated() {
            (&mut self.work).await;
        }
    }

    /// Sends what waits and closes the connection in good order. A client may take it as slowly as the idle limit
    /// allows.
    pub(in crate::kubelet_api) async fn close(mut self) {
        let writes = self.writes.clone();
        // Nobody takes the order from a connection that is over.
        let order = async { drop(writes.send(Write::Close).await) };
        tokio::join!(order, self.gone());
    }
}

/// Both directions, until the connection is at its end.
async fn run(mut reader: Reader, mut writer: Writer, closing: Closing, idle: Idle) {
    let ended = tokio::select! {
        // Not cancel-safe, and need not be: no arm is resumed.
        ended = reader.run() => ended.map(|orderly| Some(if orderly { closing } else { Closing::HangsUp })),
        // Not cancel-safe, as above. A message that was cut short is the last of its connection.
        ended = writer.run() => ended.map(|()| None),
        // Cancel-safe: it only looks.
        () = idle.expired() => Err(SocketError::Idle),
    };
    match ended {
        // Closed by this side: what the client still sends is read until it answers. That is due soon once it has all.
        Ok(None) => {
            let Reader { stream, hang_up, .. } = &mut reader;
            tokio::select! {
                // Not cancel-safe, and need not be: the connection is over either way.
                () = async { while let Some(Ok(_)) = stream.next().await {} } => {}
                // Cancel-safe: it only looks and waits.
                () = async {
                    hang_up.delivered().await;
                    sleep(PATIENCE).await;
                } => {}
                // Cancel-safe: it only looks.
                () = idle.expired() => {}
            }
        }
        Ok(Some(Closing::Ends(channel))) if reader.feeds.contains_key(&channel) => {
            let _ = timeout(PATIENCE, writer.sink.flush()).await;
            let feed = reader.feeds.remove(&channel);
            let end = async {
                if let Some(feed) = &feed {
                    feed.end().await;
                }
            };
            tokio::select! {
                // Not cancel-safe, and need not be: the connection is over either way.
                ((), ()) = async { tokio::join!(end, writer.discard()) } => {}
                // Cancel-safe: it only looks.
                () = idle.expired() => {}
            }
        }
        Ok(Some(closing)) => {
            let _ = timeout(PATIENCE, writer.sink.flush()).await;
            if let Closing::EndsAndLeaves(channel) = closing
                && let Some(feed) = reader.feeds.remove(&channel)
            {
                tokio::select! {
                    // Not cancel-safe, and need not be: the connection is over either way.
                    () = feed.finish(PATIENCE) => {}
                    // Not cancel-safe, as above: what runs has ended.
                    () = writer.discard() => {}
                }
            }
        }
        Err(cause) => {
            debug!(error = chain(&cause), "a WebSocket ended early");
            if let Some(code) = cause.code() {
                let frame = CloseFrame { code, reason: cause.to_string().into() };
                let _ = timeout(PATIENCE, writer.sink.send(Frame::Close(Some(frame)))).await;
            }
        }
    }
    for feed in reader.feeds.values() {
        feed.reset();
    }
}

struct Reader {
    stream: SplitStream<WebSocketStream<Joined>>,
    protocol: Protocol,
    feeds: BTreeMap<u8, Feed>,
    writes: mpsc::WeakSender<Write>,
    hang_up: HangUp,
    idle: Idle,
}

impl Reader {
    /// Until the client closes the connection; whether in good order (RFC 6455, section 7.4.1: any other code says that
    /// it goes away, or failed).
    async fn run(&mut self) -> Result<bool, SocketError> {
        loop {
            match self.stream.next().await.ok_or(SocketError::HungUp)?? {
                Frame::Binary(message) => self.take(message).await?,
                Frame::Text(message) => self.take(message.into()).await?,
                Frame::Close(frame) => return Ok(frame.is_none_or(|frame| frame.code == CloseCode::Normal)),
                // The library answers pings. That a client is there does not mean that it does anything.
                Frame::Ping(_) | Frame::Pong(_) | Frame::Frame(_) => continue,
            }
            self.idle.touch();
        }
    }

    async fn take(&mut self, message: Bytes) -> Result<(), SocketError> {
        let given = async {
            match self.protocol.read(message)? {
                Message::Data(channel, bytes) => {
                    if let Some(feed) = self.feeds.get(&channel) {
                        feed.data(bytes).await;
                    }
                }
                Message::Close(channel) => {
                    if let Some(feed) = self.feeds.remove(&channel) {
                        feed.end().await;
                    }
                }
                Message::Nothing => {}
            }
            Ok(())
        };
        let beat = || drop(self.writes.upgrade().map(|writes| writes.try_send(Write::Beat)));
        tokio::select! {
            biased;
            // Not cancel-safe, and need not be: the other arm ends the connection.
            given = given => given,
            // Cancel-safe: it only looks.
            () = self.hang_up.happened(beat) => Err(SocketError::HungUp),
        }
    }
}

struct Writer {
    sink: SplitSink<WebSocketStream<Joined>, Frame>,
    protocol: Protocol,
    queue: mpsc::Receiver<Write>,
    idle: Idle,
}

impl Writer {
    /// Until it is told to close, or nobody is left who could write.
    async fn run(&mut self) -> Result<(), SocketError> {
        while let Some(mut write) = self.queue.recv().await {
            loop {
                match write {
                    Write::Data(channel, bytes) => {
                        let channel = u8::try_from(channel).unwrap_or(u8::MAX);
                        let frame = match self.protocol.write(channel, &bytes) {
                            Payload::Binary(bytes) => Frame::Binary(bytes),
                            Payload::Text(text) => Frame::text(text),
                        };
                        self.sink.feed(frame).await?;
                        self.idle.touch();
                    }
                    Write::Close => {
                        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                        return Ok(self.sink.send(Frame::Close(Some(frame))).await?);
                    }
                    // An unsolicited Pong (RFC 6455, section 5.5.3).
                    Write::Beat => self.sink.feed(Frame::Pong(Bytes::new())).await?,
                    // There are no such messages, and nobody waits for a mark here: channels are there from the start and
                    // end with the connection.
                    Write::Reply(_) | Write::End(_) | Write::Reset(_) | Write::Mark(_) => {}
                }
                match self.queue.try_recv() {
                    Ok(next) => write = next,
                    Err(_) => break,
                }
            }
            self.sink.flush().await?;
        }
        Ok(())
    }

    /// Lets those who write go on although nobody listens.
    async fn discard(&mut self) {
        while let Some(write) = self.queue.recv().await {
            if matches!(write, Write::Close) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use tokio::io::{AsyncReadExt, split};
    use tokio::net::{TcpSocket, TcpStream};
    use tokio::time::Instant;
    use tokio_util::either::Either;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    /// Of each side's socket; the kernel takes twice as much.
    const BUFFER: u32 = 64 << 10;
    /// More than both sockets hold; with the status in no more pieces than may wait.
    const TAIL: usize = (WRITES_WAITING - 1) * (64 << 10);
    /// More than the client's socket holds, and no more than both.
    const HELD: usize = 2 * (64 << 10);

    /// A connection that has a tail and a status to send, and its client.
    async fn with_tail(idle: Duration, tail: usize) -> (WebSocket, TcpStream) {
        let listener = TcpSocket::new_v4().unwrap();
        listener.set_send_buffer_size(BUFFER).unwrap();
        listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = listener.listen(1).unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(BUFFER).unwrap();
        let client = client.connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let hang_up = HangUp::of(Some(&tcp));
        let (reader, writer) = split(Either::Right(tcp));
        let socket = Socket { reader: Cursor::new(Bytes::new()).chain(reader), writer, hang_up };
        let wiring = Wiring { feeds: Vec::new(), closing: Closing::HangsUp, idle };
        let (websocket, _) = WebSocket::start(socket, Protocol::named("v5.channel.k8s.io").unwrap(), wiring);
        websocket.outbox(1).send(vec![7; tail].into()).await.unwrap();
        websocket.outbox(3).send(Bytes::from_static(b"status")).await.unwrap();
        (websocket, client)
    }

    #[tokio::test]
    async fn a_client_that_reads_late_gets_the_tail() {
        for tail in [TAIL, HELD] {
            reads_late(tail).await;
        }
    }

    async fn reads_late(tail: usize) {
        let (websocket, client) = with_tail(LONG, tail).await;
        let late = async {
            sleep(PATIENCE + PATIENCE / 2).await;
            let mut client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
            // What comes to a socket that was closed is answered with a reset.
            client.send(Frame::Ping(Bytes::new())).await.unwrap();
            sleep(PATIENCE / 10).await;
            let (mut output, mut status) = (0, Vec::new());
            while let Some(Ok(message)) = client.next().await {
                match message {
                    Frame::Binary(bytes) if bytes[0] == 1 => output += bytes.len() - 1,
                    Frame::Binary(bytes) => status.extend_from_slice(&bytes),
                    Frame::Close(frame) => assert_eq!(frame.unwrap().code, CloseCode::Normal),
                    Frame::Pong(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            (output, status)
        };
        let (came, ()) = tokio::join!(late, websocket.close());
        assert_eq!(came, (tail, b"\x03status".to_vec()));
    }

    #[tokio::test]
    async fn a_client_that_never_reads_is_left_at_the_idle_limit() {
        let idle = Duration::from_millis(300);
        let (websocket, _client) = with_tail(idle, TAIL).await;
        let began = Instant::now();
        timeout(LONG / 2, websocket.close()).await.unwrap();
        // It is told why, which does not reach it either.
        assert!(began.elapsed() >= PATIENCE, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_does_not_answer_the_close_is_left_soon() {
        let (websocket, mut client) = with_tail(LONG, TAIL).await;
        let mut all = Vec::new();
        let (read, ()) = tokio::join!(timeout(LONG / 2, client.read_to_end(&mut all)), websocket.close());
        assert!(read.unwrap().unwrap() > TAIL);
    }
}
