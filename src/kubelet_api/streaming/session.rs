//! A SPDY connection with its socket: one task reads, one writes, and streams come out.

use std::collections::HashMap;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
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
    hang_up: HangUp,
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
            hang_up: terms.hang_up.clone(),
        };
        let writer = Writer { io: writer, encoder: Encoder::default(), urgent, queue, last: 0, mark: None, idle };
        let mut tasks = JoinSet::new();
        tasks.spawn(reader.run());
        tasks.spawn(writer.run());
        Self { opened, writes, hang_up: terms.hang_up, tasks }
    }

    /// The next stream that the client opens; `None` once the client is gone. Cancel-safe.
    pub(super) async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Lets the client read to the end and close the connection, else closes it. What waits is the tail of an output
    /// and how its process ended: a client may take it as slowly as the idle limit allows, only its goodbye is due soon.
    pub(super) async fn close(self) {
        self.close_within(PATIENCE).await;
    }

    async fn close_within(self, patience: Duration) {
        let Self { mut opened, writes, hang_up, mut tasks } = self;
        let (mark, written) = oneshot::channel();
        tokio::select! {
            // Not cancel-safe, and need not be: nobody is left who would read.
            () = left(&mut opened) => {}
            // Not cancel-safe, and need not be: the client's host has all, or the writer is gone.
            () = async {
                let _ = writes.send(Write::Mark(mark)).await;
                if written.await.is_ok() {
                    hang_up.delivered().await;
                }
            } => {}
        }
        if timeout(patience, left(&mut opened)).await.is_err() {
            let _ = timeout(patience, async {
                let _ = writes.send(Write::Close).await;
                while tasks.join_next().await.is_some() {}
            })
            .await;
        }
        tasks.shutdown().await;
    }
}

/// Resolves when the client is gone; what it still opens is nobody's.
async fn left(opened: &mut mpsc::Receiver<Stream>) {
    while opened.recv().await.is_some() {}
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
        // One read may bring several streams: the next one shall find room.
        if self.connection.is_full() {
            self.forget_the_dead();
        }
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
    /// Who waits for all that was taken so far.
    mark: Option<oneshot::Sender<()>>,
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
            if let Some(mark) = self.mark.take() {
                // Whoever asked may have learned otherwise that the client is gone.
                let _ = mark.send(());
            }
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
        if !matches!(write, Some(Write::Beat | Write::Mark(_))) {
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
            Some(Write::Mark(mark)) => self.mark = Some(mark),
            Some(Write::Close) | None => {
                self.encoder.go_away(out, self.last);
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::io::{DuplexStream, duplex, split};
    use tokio::net::{TcpSocket, TcpStream};
    use tokio::time::{Instant, sleep};

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(60);
    /// More than the connection holds, in no more pieces than may wait.
    const TAIL: usize = 300_000;
    /// As one frame of at most a piece each, with the empty one that ends the stream.
    const FRAMED: usize = TAIL + 8 * (TAIL.div_ceil(MAX_PIECE) + 1);
    const GO_AWAY: usize = 16;
    const PING: [u8; 12] = [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];
    /// As much as a kernel holds for a client that does not read, and more than that client's own takes.
    const HELD: usize = 60_000;

    async fn begin(io: impl AsyncRead + AsyncWrite + Send + 'static, terms: Terms, tail: usize) -> Session {
        let (reader, writer) = split(io);
        let session = Session::start(reader, writer, terms);
        let (_, _, outbox) = stream(1, &Budget::default(), &session.writes);
        outbox.send(vec![7; tail].into()).await.unwrap();
        outbox.end().await;
        session
    }

    /// A session that has a tail to send, and its client.
    async fn with_tail(idle: Duration) -> (Session, DuplexStream) {
        let (ours, client) = duplex(1024);
        let terms = Terms { streams: 1, idle, hang_up: HangUp::of(None::<&TcpStream>) };
        (begin(ours, terms, TAIL).await, client)
    }

    /// One whose tail lies in the kernel.
    async fn with_tail_held(idle: Duration) -> (Session, TcpStream) {
        let listener = TcpSocket::new_v4().unwrap();
        listener.set_send_buffer_size(4 * u32::try_from(HELD).unwrap()).unwrap();
        listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = listener.listen(1).unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(4096).unwrap();
        let client = client.connect(listener.local_addr().unwrap()).await.unwrap();
        let (ours, _) = listener.accept().await.unwrap();
        let terms = Terms { streams: 1, idle, hang_up: HangUp::of(Some(&ours)) };
        (begin(ours, terms, HELD).await, client)
    }

    async fn read_all(client: &mut (impl AsyncRead + Unpin)) -> usize {
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        all.len()
    }

    #[tokio::test]
    async fn a_client_that_reads_late_gets_the_tail() {
        let (session, mut client) = with_tail(LONG).await;
        let late = async {
            sleep(6 * PATIENCE).await;
            read_all(&mut client).await
        };
        let (read, ()) = tokio::join!(late, session.close_within(PATIENCE));
        assert_eq!(read, FRAMED + GO_AWAY);
    }

    #[tokio::test]
    async fn a_client_that_has_all_and_stays_is_left_soon() {
        let (session, mut client) = with_tail(LONG).await;
        let began = Instant::now();
        let (read, ()) = tokio::join!(read_all(&mut client), session.close_within(PATIENCE));
        assert_eq!(read, FRAMED + GO_AWAY);
        assert!((2 * PATIENCE..LONG).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_never_reads_is_left_at_the_idle_limit() {
        let idle = 6 * PATIENCE;
        let (session, _client) = with_tail(idle).await;
        let began = Instant::now();
        timeout(LONG / 2, session.close_within(PATIENCE)).await.unwrap();
        assert!(began.elapsed() >= idle - PATIENCE, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_reads_late_and_sends_before_it_gets_what_the_kernel_held() {
        let (session, mut client) = with_tail_held(LONG).await;
        let eye = session.hang_up.clone();
        let late = async {
            sleep(6 * PATIENCE).await;
            assert!(eye.delivered().now_or_never().is_none(), "the kernel holds none of it");
            // It would keep the socket open.
            drop(eye);
            client.write_all(&PING).await.unwrap();
            // For the answer, or for a reset.
            sleep(PATIENCE).await;
            read_all(&mut client).await
        };
        let (read, ()) = tokio::join!(late, session.close_within(PATIENCE));
        assert_eq!(read, HELD + 8 * (HELD.div_ceil(MAX_PIECE) + 1) + PING.len() + GO_AWAY);
    }

    #[tokio::test]
    async fn what_the_kernel_holds_is_given_up_at_the_idle_limit() {
        let idle = 6 * PATIENCE;
        let (session, _client) = with_tail_held(idle).await;
        let began = Instant::now();
        timeout(LONG / 2, session.close_within(PATIENCE)).await.unwrap();
        assert!(began.elapsed() >= idle - PATIENCE, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_client_that_vanishes_or_a_node_that_ends_cuts_the_tail_off() {
        let (session, client) = with_tail(LONG).await;
        drop(client);
        timeout(LONG / 2, session.close_within(LONG)).await.unwrap();
        let (session, mut client) = with_tail(LONG).await;
        assert!(timeout(PATIENCE, session.close_within(PATIENCE)).await.is_err());
        let read = timeout(LONG / 2, read_all(&mut client)).await.unwrap();
        assert!(read < FRAMED, "{read} bytes");
    }
}
