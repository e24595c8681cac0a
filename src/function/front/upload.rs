//! The body of a request on its way to an environment: bounded, kept to a pace, and known to be complete or not.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep, timeout};

/// Bytes that must arrive within one time-out of waiting.
const PACE_BYTES: usize = 64 << 10;
/// Most bytes read of a body that is refused. Closing with bytes unread resets the connection, and a client that is
/// still writing would lose the answer.
const DISCARD: u64 = 16 << 20;

/// How far a body got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Progress {
    Going,
    Done,
    ClientGone,
    TooLarge,
    TooSlow,
}

/// Why a body ends early.
#[derive(Debug, thiserror::Error)]
#[error("the request was not received to its end: {0:?}")]
pub(super) struct CutOff(pub(super) Progress);

/// Where a body's progress can be looked up while it is being sent.
#[derive(Clone, Debug)]
pub(super) struct Watch(Option<Arc<AtomicU8>>);

/// A request's body.
pub(super) struct Upload {
    /// What was read before it was asked for.
    ahead: VecDeque<Frame<Bytes>>,
    /// None when it was read to its end.
    rest: Option<Incoming>,
    /// Bytes that may still come.
    room: u64,
    /// Bytes to be thrown away before the client is told that they are too many.
    discard: u64,
    pace: Option<Pace>,
    progress: Watch,
}

/// Counts only the time spent waiting for the client, so that a slow environment does not make the client late.
struct Pace {
    limit: Duration,
    waited: Duration,
    since: Option<Instant>,
    bytes: usize,
    sleep: Pin<Box<Sleep>>,
}

impl Progress {
    fn of(byte: u8) -> Self {
        [Self::Going, Self::Done, Self::ClientGone, Self::TooLarge, Self::TooSlow][usize::from(byte).min(4)]
    }
}

impl Watch {
    pub(super) fn progress(&self) -> Progress {
        self.0.as_ref().map_or(Progress::Done, |state| Progress::of(state.load(Ordering::Relaxed)))
    }

    fn set(&self, progress: Progress) {
        if let Some(state) = &self.0 {
            state.store(progress as u8, Ordering::Relaxed);
        }
    }
}

impl Upload {
    /// A body of at most `limit` bytes, if there is a limit. With a `pace`, 64 KiB must come in each such time of waiting.
    pub(super) fn new(body: Incoming, limit: Option<u64>, pace: Option<Duration>) -> Self {
        let rest = Some(body).filter(|body| !body.is_end_stream());
        let progress = Watch(rest.as_ref().map(|_| Arc::new(AtomicU8::new(Progress::Going as u8))));
        let pace = pace.filter(|_| rest.is_some()).map(Pace::new);
        Self { ahead: VecDeque::new(), rest, room: limit.unwrap_or(u64::MAX), discard: DISCARD, pace, progress }
    }

    pub(super) fn watch(&self) -> Watch {
        self.progress.clone()
    }

    /// Length, where the client said it.
    pub(super) fn length(&self) -> Option<u64> {
        self.size_hint().exact()
    }

    /// Reads the first part: what is there already or, with `patience`, the first that comes. A body that fits in one
    /// is then complete, so that the client's leaving is noticed while its call waits.
    pub(super) async fn begin(&mut self, patience: Option<Duration>) -> Result<(), Progress> {
        if self.rest.is_none() {
            return Ok(());
        }
        let first = match patience {
            Some(patience) => match timeout(patience, poll_fn(|cx| self.read(cx))).await {
                Ok(first) => first,
                Err(_) => return Err(Progress::TooSlow),
            },
            None => match poll_fn(|cx| Poll::Ready(self.read(cx))).await {
                Poll::Ready(first) => first,
                Poll::Pending => return Ok(()),
            },
        };
        self.ahead.extend(first.transpose().map_err(|CutOff(progress)| progress)?);
        Ok(())
    }

    /// Reads on until all of it is here, or `most` bytes are.
    pub(super) async fn gather(&mut self, most: usize) -> Result<(), CutOff> {
        while self.rest.is_some() && self.ahead_bytes() < most {
            let frame = poll_fn(|cx| self.read(cx)).await;
            self.ahead.extend(frame.transpose()?);
        }
        Ok(())
    }

    /// The same body once more, if all of it is here. Its bytes are shared, not copied.
    pub(super) fn copy(&self) -> Option<Self> {
        let copied = |frame: &Frame<Bytes>| match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => Some(Frame::data(data.clone())),
            (None, trailers) => trailers.map(|trailers| Frame::trailers(trailers.clone())),
        };
        let ahead = self.ahead.iter().filter_map(copied).collect();
        let progress = self.progress.clone();
        self.rest.is_none().then_some(Self { ahead, rest: None, room: 0, discard: 0, pace: None, progress })
    }

    fn ahead_bytes(&self) -> usize {
        self.ahead.iter().filter_map(Frame::data_ref).map(Bytes::len).sum()
    }

    /// Reads on and throws away, so that the answer reaches a client that only then looks for one.
    pub(super) async fn discard(mut self, patience: Duration) {
        let read = async {
            while self.discard > 0 && self.rest.is_some() {
                let frame = poll_fn(|cx| self.read(cx)).await;
                let Some(Ok(frame)) = frame else { return };
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.discard = self.discard.saturating_sub(length);
            }
        };
        // Late or not, the answer goes out.
        let _ = timeout(patience, read).await;
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        loop {
            let Some(body) = &mut self.rest else { return Poll::Ready(None) };
            let frame = match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    ready!(self.pace.as_mut().map_or(Poll::Pending, |pace| pace.poll_late(cx)));
                    return Poll::Ready(Some(Err(self.cut(Progress::TooSlow))));
                }
            };
            let ended = body.is_end_stream();
            let Some(frame) = frame else {
                return Poll::Ready(self.end());
            };
            let Ok(frame) = frame else {
                return Poll::Ready(Some(Err(self.cut(Progress::ClientGone))));
            };
            let length = frame.data_ref().map_or(0, Bytes::len);
            if let Some(pace) = &mut self.pace {
                pace.note(length);
            }
            if self.progress.progress() == Progress::TooLarge || length as u64 > self.room {
                self.progress.set(Progress::TooLarge);
                self.discard = self.discard.saturating_sub(length as u64);
                if ended || self.discard == 0 {
                    return Poll::Ready(Some(Err(self.cut(Progress::TooLarge))));
                }
                continue;
            }
            self.room -= length as u64;
            if ended {
                let _ = self.end();
            }
            return Poll::Ready(Some(Ok(frame)));
        }
    }

    fn end(&mut self) -> Option<Result<Frame<Bytes>, CutOff>> {
        if self.progress.progress() == Progress::TooLarge {
            return Some(Err(self.cut(Progress::TooLarge)));
        }
        self.progress.set(Progress::Done);
        self.rest = None;
        None
    }

    fn cut(&mut self, progress: Progress) -> CutOff {
        self.progress.set(progress);
        self.rest = None;
        CutOff(progress)
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.read(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.rest.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let ahead = self.ahead_bytes() as u64;
        match self.rest.as_ref().map(Body::size_hint) {
            None => SizeHint::with_exact(ahead),
            Some(rest) => rest.exact().map_or_else(SizeHint::default, |rest| SizeHint::with_exact(ahead + rest)),
        }
    }
}

impl Pace {
    fn new(limit: Duration) -> Self {
        Self { limit, waited: Duration::ZERO, since: None, bytes: 0, sleep: Box::pin(sleep(limit)) }
    }

    /// Bytes came.
    fn note(&mut self, bytes: usize) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
        self.bytes += bytes;
        if self.bytes >= PACE_BYTES {
            (self.bytes, self.waited) = (0, Duration::ZERO);
        }
    }

    /// None came; ready when they have been waited for too long.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.since.is_none() {
            let now = Instant::now();
            self.since = Some(now);
            self.sleep.as_mut().reset(now + self.limit.saturating_sub(self.waited));
        }
        pin!(&mut self.sleep).as_mut().poll(cx)
    }
}
