//! The body of an environment's response on its way to the client. Its end gives the environment back.
//!
//! Dropped before, because the client left, it is read on in the background: a Lambda runtime cannot be told to stop, and
//! only the end of its answer says that it may take the next call.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, timeout};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tracing::debug;

use super::Shared;
use super::answer::Content;
use super::lease::{Lease, Outcome};
use super::meters::Ended;
use super::places::State;
use super::tally::Tally;
use super::upload::{Progress, Watch};
use super::wire::Wire;
use crate::telemetry::chain;

/// Why an answer breaks off.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the function's answer broke off: {0}")]
pub(super) struct ReplyError(pub(super) Arc<str>);

/// An answer being passed on.
pub(super) struct Reply {
    /// None at its end.
    source: Option<Box<Source>>,
    tally: Tally,
}

/// Where an answer comes from.
pub(super) struct Source {
    pub(super) shared: Arc<Shared>,
    /// The call is a Lambda one.
    pub(super) lambda: bool,
    pub(super) sent: Instant,
    body: Incoming,
    /// What was read before the answer began.
    ahead: VecDeque<Frame<Bytes>>,
    upload: Watch,
    /// Both are given back at the end.
    held: Option<(Wire, Lease)>,
    gone: Pin<Box<WaitForCancellationFutureOwned>>,
    client: Arc<State>,
}

/// What a [`Source`] is made of.
pub(super) struct Held {
    pub(super) wire: Wire,
    pub(super) lease: Lease,
    pub(super) upload: Watch,
    pub(super) sent: Instant,
    pub(super) lambda: bool,
    pub(super) client: Arc<State>,
}

// === impl Source ===

impl Source {
    pub(super) fn new(shared: Arc<Shared>, body: Incoming, held: Held) -> Box<Self> {
        let Held { wire, lease, upload, sent, lambda, client } = held;
        let gone = Box::pin(lease.environment().gone());
        let held = Some((wire, lease));
        Box::new(Self { shared, lambda, sent, body, ahead: VecDeque::new(), upload, held, gone, client })
    }

    /// Takes what is there already. A short answer is complete with that, and its environment free before the client
    /// has it.
    ///
    /// # Errors
    /// If it broke off before anything of it had to be passed on.
    pub(super) async fn begin(mut self: Box<Self>) -> Result<Begun, ReplyError> {
        if self.body.is_end_stream() {
            self.finish();
            return Ok(Begun::Whole(None));
        }
        let first = poll_fn(|cx| Poll::Ready(self.poll_frame(cx))).await;
        match first {
            Poll::Pending => return Ok(Begun::Part(self)),
            Poll::Ready(None) => return Ok(Begun::Whole(None)),
            Poll::Ready(Some(frame)) => self.ahead.push_back(frame?),
        }
        if self.held.is_some() {
            match poll_fn(|cx| Poll::Ready(self.poll_wire(cx))).await {
                Poll::Ready(Some(frame)) => self.ahead.push_back(frame?),
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
        if self.held.is_none() && self.ahead.len() == 1 && self.ahead[0].is_data() {
            let whole = self.ahead.pop_front().and_then(|frame| frame.into_data().ok());
            return Ok(Begun::Whole(whole));
        }
        Ok(Begun::Part(self))
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.poll_wire(cx),
        }
    }

    fn poll_wire(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        // The second time is for what the body, by being asked, made the wire read; it saves a change of task.
        for _ in 0..2 {
            let Some((wire, _)) = &mut self.held else { return Poll::Ready(None) };
            wire.drive(cx);
            // What the wire has read wakes nobody: it is looked at right here.
            match Pin::new(&mut self.body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(frame))) => {
                    if self.body.is_end_stream() {
                        self.finish();
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(Some(Err(cause))) => return Poll::Ready(Some(Err(self.fail(chain(&cause).into())))),
                Poll::Ready(None) => {
                    self.finish();
                    return Poll::Ready(None);
                }
                Poll::Pending => {}
            }
        }
        if self.gone.as_mut().poll(cx).is_ready() {
            let reason = self.held.as_ref().map(|(_, lease)| lease.environment().why_lost().reason);
            return Poll::Ready(Some(Err(self.fail(reason.unwrap_or_default()))));
        }
        Poll::Pending
    }

    /// The answer was read to its end: gives connection and environment back, in this order.
    fn finish(&mut self) {
        let Some((mut wire, lease)) = self.held.take() else { return };
        self.shared.meters.ran(self.sent.elapsed());
        if wire.rest() {
            lease.environment().keep(wire);
        }
        lease.finish(if self.client.has_left() { Outcome::ClientGone } else { Outcome::Answered });
    }

    fn fail(&mut self, reason: Arc<str>) -> ReplyError {
        if let Some((_, lease)) = self.held.take() {
            self.shared.meters.ran(self.sent.elapsed());
            match self.upload.progress() {
                Progress::Done | Progress::Going => {
                    debug!(environment = %lease.environment().address(), reason = &*reason, "an answer broke off");
                    lease.finish(Outcome::Lost(reason.clone()));
                }
                // It broke because we could not send on.
                Progress::ClientGone | Progress::TooLarge | Progress::TooSlow => {
                    lease.finish(Outcome::CutOff { begun: true });
                }
            }
        }
        ReplyError(reason)
    }

    /// Reads on without a client. Cancel-safe: the lease comes back as dropped.
    async fn read_on(mut self: Box<Self>) {
        let patience = self.shared.limits.linger;
        let lambda = self.lambda;
        let rest = async move { while let Some(Ok(_)) = poll_fn(|cx| self.poll_frame(cx)).await {} };
        if lambda {
            rest.await;
        } else {
            // Closing is how any other server is told to stop, and some answers never end.
            let _ = timeout(patience, rest).await;
        }
    }
}

/// How much of an answer was there at once.
pub(super) enum Begun {
    Whole(Option<Bytes>),
    Part(Box<Source>),
}

impl Begun {
    pub(super) fn content(self, mut tally: Tally) -> Content {
        match self {
            Self::Whole(bytes) => {
                tally.ended(Ended::Answered);
                Content::Whole(bytes)
            }
            Self::Part(source) => Content::Reply(Reply { source: Some(source), tally }),
        }
    }
}

// === impl Reply ===

impl Reply {
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        let polled = source.poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Err(_))) => self.end(Ended::Lost),
            Poll::Ready(None) => self.end(Ended::Answered),
            Poll::Ready(Some(Ok(_))) if source.is_end() => self.end(Ended::Answered),
            Poll::Ready(Some(Ok(_))) | Poll::Pending => {}
        }
        polled
    }

    fn end(&mut self, how: Ended) {
        self.tally.ended(how);
        self.source = None;
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.source.is_none()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.source.as_ref().map_or_else(|| SizeHint::with_exact(0), |source| source.size_hint())
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            source.abandon();
        }
    }
}

impl Source {
    fn is_end(&self) -> bool {
        self.held.is_none() && self.ahead.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let ahead: u64 = self.ahead.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum();
        match self.body.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(ahead + rest),
            None => SizeHint::default(),
        }
    }

    /// The client left.
    pub(super) fn abandon(self: Box<Self>) {
        self.client.leave();
        let background = self.shared.background.clone();
        background.spawn(self.read_on());
    }
}
