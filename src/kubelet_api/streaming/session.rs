//! A SPDY connection with its socket: one task reads, one writes, and streams come out.

use std::collections::HashMap;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::idle::{HangUp, Idle};
use super::pipe::{Budget, Feed, Inbox, Outbox, WRITES_WAITING, Write, stream};
use crate::spdy::SpdyError;
use crate::spdy::connection::{Connection, Event};
use crate::spdy::frame::{Encoder, MAX_PIECE, ResetReason};
use crate::spdy::headers::Headers;
use crate::telemetry::chain;

/// Room that is made for each read.
const READ: usize = 64 << 10;
/// Bytes that are gathered for one write.
const BATCH: usize = 64 << 10;
/// Answers that may wait for a client that does not read; one that asks for more is not a client of ours.
const ANSWERS_WAITING: usize = 1024;
/// Opened streams that may wait to be looked at.
const STREAMS_WAITING: usize = 16;
/// For a client to close the connection once it has all.
const PATIENCE: Duration = Duration::from_secs(2);

/// A stream that the client opened. It waits for a [reply](Outbox::reply) or a [refusal](Outbox::fail).
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    pub(super) headers: Headers,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
}

/// What a connection is given.
pub(super) struct Terms {
    /// Streams at once.
    pub(super) streams: usize,
    /// When it ends for want of traffic.
    pub(super) idle: Duration,
    /// How to see that the client left.
    pub(super) hang_up: HangUp,
}

/// The connection. Dropping it closes the socket.
pub(super) struct Session {
    opened: mpsc::Receiver<Stream>,
    writes: mpsc::Sender<Write>,
    tasks: JoinSet<Result<(), SpdyError>>,
}

impl Session {
    /// Starts reading and writing.
    pub(super) fn start<R, W>(reader: R, writer: W, terms: Terms) -> Self
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (writes, queue) = mpsc::channel(WRITES_WAITING);
        let (answers, urgent) = mpsc::channel(ANSWERS_WAITING);
        let (sender, opened) = mpsc::channel(STREAMS_WAITING);
        let idle = Idle::new(terms.idle);
        let reader = Reader {
            io: reader,
            connection: Connection::new(terms.streams),
            feeds: HashMap::new(),
            budget: Budget::default(),
            opened: sender,
            answers,
            writes: writes.downgrade(),
            idle: idle.clone(),
            hang_up: terms.hang_up,
        };
        let writer = Writer { io: writer, encoder: Encoder::default(), urgent, queue, last: 0, idle };
        let mut tasks = JoinSet::new();
        tasks.spawn(reader.run());
        tasks.spawn(writer.run());
        Self { opened, writes, tasks }
    }

    /// The next stream that the client opens; `None` once the client is gone. Cancel-safe.
    pub(super) async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Lets the client read to the end and close the connection, else closes it.
    pub(super) async fn close(mut self) {
        let gone = async { while self.opened.recv().await.is_some() {} };
        if timeout(PATIENCE, gone).await.is_err() {
            let _ = timeout(PATIENCE, async {
                let _ = self.writes.send(Write::Close).await;
                while self.tasks.join_next().await.is_some() {}
            })
            .await;
        }
        self.tasks.shutdown().await;
    }
}

struct Reader<R> {
    io: R,
    connection: Connection,
    feeds: HashMap<u32, Feed>,
    budget: Budget,
    opened: mpsc::Sender<Stream>,
    answers: mpsc::Sender<Answer>,
    writes: mpsc::WeakSender<Write>,
    idle: Idle,
    hang_up: HangUp,
}

/// What the reader itself has to have sent, ahead of all data.
#[derive(Debug)]
enum Answer {
    Ping(u32),
    Reset(u32, ResetReason),
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Until the client closes, breaks the rules, hangs up or falls silent. Its end closes every inbox.
    async fn run(mut self) -> Result<(), SpdyError> {
        let idle = self.idle.clone();
        let mut input = BytesMut::with_capacity(READ);
        let ended = tokio::select! {
            // Not cancel-safe, and need not be: the connection is over.
            ended = self.read(&mut input) => ended,
            // Cancel-safe: it only looks.
            () = idle.expired() => Err(SpdyError::Idle),
        };
        for feed in self.feeds.values() {
            feed.reset();
        }
        if let Err(cause) = &ended {
            debug!(error = chain(cause), "a SPDY connection ended early");
        }
        ended
    }

    async fn read(&mut self, input: &mut BytesMut) -> Result<(), SpdyError> {
        loop {
            while let Some(event) = self.connection.next(input)? {
                self.handle(event).await?;
            }
            input.reserve(READ);
            if self.io.read_buf(input).await.map_err(SpdyError::Io)? == 0 {
                return Ok(());
            }
            if self.connection.is_full() {
                self.forget_the_dead();
            }
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), SpdyError> {
        if !matches!(event, Event::Ping(_)) {
            self.idle.touch();
        }
        match event {
            Event::Opened { id, headers, ended } => self.open(id, headers, ended).await?,
            Event::Data { id, bytes, ended } => {
                let Some(feed) = self.feeds.get(&id) else { return Ok(()) };
                let given = async {
                    feed.data(bytes).await;
                    if ended {
                        feed.end().await;
                    }
                };
                let beat = || drop(self.writes.upgrade().map(|writes| writes.try_send(Write::Beat)));
                tokio::select! {
                    biased;
                    // Not cancel-safe, and need not be: the other arm ends the connection.
                    () = given => {}
                    // Cancel-safe: it only looks. What is still unread would have been of no use to a client that left.
                    () = self.hang_up.happened(beat) => return Err(SpdyError::HungUp),
                }
            }
            Event::Reset { id } => {
                if let Some(feed) = self.feeds.remove(&id) {
                    feed.reset();
                }
            }
            Event::Ping(id) => self.answer(Answer::Ping(id))?,
            Event::Refused { id, reason } => self.answer(Answer::Reset(id, reason))?,
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, headers: Headers, ended: bool) -> Result<(), SpdyError> {
        // The writer is gone, and with it the connection.
        let writes = self.writes.upgrade().ok_or(SpdyError::HungUp)?;
        let (feed, inbox, outbox) = stream(id, &self.budget, &writes);
        if ended {
            feed.end().await;
        }
        self.feeds.insert(id, feed);
        // Nobody takes streams any more: the session is being closed, and the client is told by that.
        let _ = self.opened.send(Stream { id, headers, inbox, outbox }).await;
        Ok(())
    }

    /// Streams that were served to the end here leave the table, even if the client never said that it is done.
    fn forget_the_dead(&mut self) {
        let dead: Vec<_> = self.feeds.iter().filter(|(_, feed)| !feed.is_alive()).map(|(id, _)| *id).collect();
        for id in dead {
            self.feeds.remove(&id);
            self.connection.forget(id);
        }
    }

    fn answer(&self, answer: Answer) -> Result<(), SpdyError> {
        self.answers.try_send(answer).map_err(|_| SpdyError::Flood)
    }
}

struct Writer<W> {
    io: W,
    encoder: Encoder,
    urgent: mpsc::Receiver<Answer>,
    queue: mpsc::Receiver<Write>,
    /// The last stream that was replied to.
    last: u32,
    idle: Idle,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Until it is told to close, or nobody is left who could write.
    async fn run(mut self) -> Result<(), SpdyError> {
        let mut out = BytesMut::with_capacity(BATCH + MAX_PIECE);
        loop {
            let mut open = tokio::select! {
                biased;
                // Cancel-safe: receiving takes a message or leaves it.
                Some(answer) = self.urgent.recv() => self.answer(&mut out, answer),
                // Cancel-safe: as above.
                write = self.queue.recv() => self.write(&mut out, write),
            };
            while open && out.len() < BATCH {
                if let Ok(answer) = self.urgent.try_recv() {
                    open = self.answer(&mut out, answer);
                } else if let Ok(write) = self.queue.try_recv() {
                    open = self.write(&mut out, Some(write));
                } else {
                    break;
                }
            }
            self.io.write_all(&out).await.map_err(SpdyError::Io)?;
            self.io.flush().await.map_err(SpdyError::Io)?;
            out.clear();
            if !open {
                return self.io.shutdown().await.map_err(SpdyError::Io);
            }
        }
    }

    fn answer(&mut self, out: &mut BytesMut, answer: Answer) -> bool {
        match answer {
            Answer::Ping(id) => self.encoder.ping(out, id),
            Answer::Reset(id, reason) => self.encoder.reset(out, id, reason),
        }
        true
    }

    /// Whether the connection stays open.
    fn write(&mut self, out: &mut BytesMut, write: Option<Write>) -> bool {
        if !matches!(write, Some(Write::Beat)) {
            self.idle.touch();
        }
        match write {
            Some(Write::Reply(id)) => {
                self.last = self.last.max(id);
                self.encoder.reply(out, id);
            }
            Some(Write::Data(id, bytes)) => self.encoder.data(out, id, &bytes, false),
            Some(Write::End(id)) => self.encoder.data(out, id, &[], true),
            Some(Write::Reset(id)) => self.encoder.reset(out, id, ResetReason::Internal),
            Some(Write::Beat) => self.encoder.no_settings(out),
            Some(Write::Close) | None => {
                self.encoder.go_away(out, self.last);
                return false;
            }
        }
        true
    }
}
