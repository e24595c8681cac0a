//! The two ends of a stream, whichever protocol carries it.
//!
//! ```text
//! reader of the connection -- Feed --> Inbox ---> process or port
//! writer of the connection <-- queue -- Outbox <-- process or port
//! ```
//!
//! Both directions are bounded in bytes, per connection: a reader that finds no room waits, and so does the client.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Most bytes in one piece.
pub(super) const PIECE: usize = 64 << 10;
/// Pieces that one stream may have waiting.
const PIECES_WAITING: usize = 8;
/// Bytes that may wait on all streams of one connection together.
const BYTES_WAITING: usize = 1 << 20;
/// Pieces that may wait to be written to one connection.
pub(super) const WRITES_WAITING: usize = 8;

/// Room for what waits on one connection; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BYTES_WAITING)))
    }
}

#[derive(Debug)]
enum Piece {
    Data(Bytes, OwnedSemaphorePermit),
    End,
}

/// What comes next on a stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Some bytes, never none.
    Data(Bytes),
    /// The client is done sending.
    End,
    /// The client gave the stream up, or is gone.
    Reset,
}

/// What a client sends on one stream.
#[derive(Debug)]
pub(super) struct Inbox {
    pieces: mpsc::Receiver<Piece>,
    ended: bool,
    reset: CancellationToken,
    _alive: Arc<()>,
}

impl Inbox {
    /// Cancel-safe: what is not returned stays.
    pub(super) async fn next(&mut self) -> Next {
        if self.ended {
            return Next::End;
        }
        if self.reset.is_cancelled() {
            return Next::Reset;
        }
        match self.pieces.recv().await {
            Some(Piece::Data(bytes, _room)) => Next::Data(bytes),
            Some(Piece::End) => {
                self.ended = true;
                Next::End
            }
            None => Next::Reset,
        }
    }

    /// Bytes that are here already, and the room that they take for as long as they are held.
    pub(super) fn waiting(&mut self) -> Option<(Bytes, OwnedSemaphorePermit)> {
        if self.ended || self.reset.is_cancelled() {
            return None;
        }
        match self.pieces.try_recv() {
            Ok(Piece::Data(bytes, room)) => Some((bytes, room)),
            Ok(Piece::End) => {
                self.ended = true;
                None
            }
            Err(_) => None,
        }
    }

    /// Cancelled when the client gives the stream up, whatever is still waiting here.
    pub(super) fn reset(&self) -> CancellationToken {
        self.reset.clone()
    }

    /// Whether the client gave it up.
    pub(super) fn is_reset(&self) -> bool {
        self.reset.is_cancelled()
    }
}

/// Where the connection's reader puts what came for one stream.
#[derive(Debug)]
pub(super) struct Feed {
    pieces: mpsc::Sender<Piece>,
    budget: Budget,
    reset: CancellationToken,
    alive: Weak<()>,
}

impl Feed {
    /// Waits for room. If nobody takes the bytes any more they are dropped.
    pub(super) async fn data(&self, bytes: Bytes) {
        let mut rest = bytes;
        while !rest.is_empty() && !self.pieces.is_closed() {
            let piece = rest.split_to(rest.len().min(PIECE));
            tokio::select! {
                // Cancel-safe: the stream's other end is gone for good.
                () = self.pieces.closed() => return,
                // Not cancel-safe: the piece is lost, which is right where nobody is left to take it.
                () = self.put(piece) => {}
            }
        }
    }

    async fn put(&self, piece: Bytes) {
        let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        // Neither fails: the budget is never closed, and a receiver that is gone wants nothing.
        if let Ok(room) = self.budget.0.clone().acquire_many_owned(length).await {
            let _ = self.pieces.send(Piece::Data(piece, room)).await;
        }
    }

    /// The client is done sending.
    pub(super) async fn end(&self) {
        let _ = self.pieces.send(Piece::End).await;
    }

    /// The client is done sending and left. Resolves once whoever takes the bytes is done with all of them, or has
    /// taken none for `patience`.
    pub(super) async fn finish(&self, patience: Duration) {
        if timeout(patience, self.end()).await.is_err() {
            return;
        }
        let mut room = self.budget.0.available_permits();
        while timeout(patience, self.pieces.closed()).await.is_err() && self.budget.0.available_permits() > room {
            room = self.budget.0.available_permits();
        }
    }

    /// The client gave it up.
    pub(super) fn reset(&self) {
        self.reset.cancel();
    }

    /// Whether anybody still holds an end of the stream.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.strong_count() > 0
    }
}

/// What the connection's writer is asked to send.
#[derive(Debug)]
pub(super) enum Write {
    /// The stream is taken.
    Reply(u32),
    /// Bytes of a stream.
    Data(u32, Bytes),
    /// Nothing more will be sent on it.
    End(u32),
    /// What it was for failed.
    Reset(u32),
    /// Something that needs no answer (see [`HangUp`](super::idle::HangUp)).
    Beat,
    /// Nothing; it is answered once all that was asked for before it is written.
    Mark(oneshot::Sender<()>),
    /// No more streams are taken; then the connection is closed.
    Close,
}

/// The stream cannot be written to any more: the client gave it up or is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// What this side sends on one stream.
#[derive(Debug)]
pub(super) struct Outbox {
    id: u32,
    writes: mpsc::Sender<Write>,
    reset: CancellationToken,
    _alive: Arc<()>,
}

impl Outbox {
    /// Waits for room in the connection's queue.
    ///
    /// # Errors
    /// See [`Gone`].
    pub(super) async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(PIECE));
            self.write(Write::Data(self.id, piece)).await?;
        }
        Ok(())
    }

    /// Opens the stream for the client, before anything else is sent.
    pub(super) async fn reply(&self) -> Result<(), Gone> {
        self.write(Write::Reply(self.id)).await
    }

    /// An empty message, which WebSocket clients take for the beginning.
    pub(super) async fn greet(&self) -> Result<(), Gone> {
        self.write(Write::Data(self.id, Bytes::new())).await
    }

    /// Nothing more comes.
    pub(super) async fn end(&self) {
        // A client that is gone knows.
        let _ = self.write(Write::End(self.id)).await;
    }

    /// What the stream was for failed, or the client may not have it.
    pub(super) async fn fail(self) {
        let _ = self.write(Write::Reset(self.id)).await;
    }

    async fn write(&self, write: Write) -> Result<(), Gone> {
        tokio::select! {
            biased;
            // Cancel-safe: a token stays cancelled.
            () = self.reset.cancelled() => Err(Gone),
            // Cancel-safe: what was not queued is not sent, which is right for a stream that the client gave up.
            sent = self.writes.send(write) => sent.map_err(|_| Gone),
        }
    }
}

/// A stream's ends: the connection's, and the two of whoever serves it.
pub(super) fn stream(id: u32, budget: &Budget, writes: &mpsc::Sender<Write>) -> (Feed, Inbox, Outbox) {
    let (sender, pieces) = mpsc::channel(PIECES_WAITING);
    let (reset, alive) = (CancellationToken::new(), Arc::new(()));
    let feed = Feed { pieces: sender, budget: budget.clone(), reset: reset.clone(), alive: Arc::downgrade(&alive) };
    let inbox = Inbox { pieces, ended: false, reset: reset.clone(), _alive: alive.clone() };
    (feed, inbox, Outbox { id, writes: writes.clone(), reset, _alive: alive })
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::time::{Instant, sleep};

    use super::*;

    fn ends() -> (Feed, Inbox, Outbox, mpsc::Receiver<Write>) {
        let (writes, queue) = mpsc::channel(WRITES_WAITING);
        let (feed, inbox, outbox) = stream(1, &Budget::default(), &writes);
        (feed, inbox, outbox, queue)
    }

    #[tokio::test]
    async fn bytes_come_in_order_and_then_the_end() {
        let (feed, mut inbox, _outbox, _queue) = ends();
        feed.data(Bytes::from(vec![7; PIECE + 1])).await;
        feed.end().await;
        assert_eq!(inbox.next().await, Next::Data(Bytes::from(vec![7; PIECE])));
        assert_eq!(inbox.next().await, Next::Data(Bytes::from(vec![7; 1])));
        assert_eq!((inbox.next().await, inbox.next().await), (Next::End, Next::End));
    }

    #[tokio::test]
    async fn a_reset_overtakes_what_waits() {
        let (feed, mut inbox, outbox, _queue) = ends();
        feed.data(Bytes::from_static(b"x")).await;
        feed.reset();
        assert_eq!(inbox.next().await, Next::Reset);
        assert_eq!(outbox.send(Bytes::from_static(b"y")).await, Err(Gone));
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_holds_its_sender_up() {
        let (feed, inbox, outbox, _queue) = ends();
        for _ in 0..PIECES_WAITING {
            assert!(feed.data(Bytes::from_static(b"x")).now_or_never().is_some());
        }
        let mut stuck = Box::pin(feed.data(Bytes::from_static(b"x")));
        assert!((&mut stuck).now_or_never().is_none());
        assert!(feed.is_alive());
        drop(inbox);
        stuck.await;
        assert!(feed.is_alive(), "it can still be written to");
        drop(outbox);
        assert!(!feed.is_alive());
    }

    #[tokio::test]
    async fn what_a_client_that_left_has_sent_is_handed_on_while_somebody_takes_it() {
        let patience = Duration::from_millis(400);
        let (feed, mut inbox, _outbox, _queue) = ends();
        for _ in 0..PIECES_WAITING {
            feed.data(Bytes::from_static(b"x")).await;
        }
        // Slowly, yet all of it.
        let taken = async {
            let mut taken = 0;
            while let Next::Data(bytes) = inbox.next().await {
                taken += bytes.len();
                sleep(patience / 4).await;
            }
            drop(inbox);
            taken
        };
        let all = async {
            feed.finish(patience).await;
            feed.pieces.is_closed()
        };
        assert_eq!(tokio::join!(taken, all), (PIECES_WAITING, true));
        // Nobody takes any.
        let (feed, _inbox, _outbox, _queue) = ends();
        feed.data(Bytes::from_static(b"x")).await;
        let began = Instant::now();
        timeout(patience * 100, feed.finish(patience)).await.unwrap();
        assert!(began.elapsed() >= patience);
    }

    #[tokio::test]
    async fn streams_of_a_connection_share_the_room() {
        let (writes, _queue) = mpsc::channel(WRITES_WAITING);
        let budget = Budget::default();
        let streams: Vec<_> = (0..3).map(|id| stream(id, &budget, &writes)).collect();
        let full = vec![0; PIECE];
        let mut taken = 0;
        for (feed, ..) in &streams {
            while taken < BYTES_WAITING && feed.data(Bytes::from(full.clone())).now_or_never().is_some() {
                taken += PIECE;
            }
        }
        assert_eq!(taken, BYTES_WAITING);
        assert!(streams[2].0.data(Bytes::from_static(b"x")).now_or_never().is_none());
    }
}
