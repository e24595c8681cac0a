//! One client's connection: its socket, what it may take its time for, and how it ends.
//!
//! ```text
//! accepted -> Idle --byte--> Head --whole head--> Call --answer written or dropped--> Idle ...
//!              |              |                     |
//!         idle time-out   head time-out      write time-out (only while the client takes nothing)
//! ```
//! Each phase has its bound; a call itself has none, for only the function knows how long it may take.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::server::conn::http1;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::Limits;
use super::places::{Phase, Signal, State};
use super::wakes::Wakes;

/// A silent peer is asked whether it is there after this many seconds, ...
const KEEPALIVE_IDLE: u32 = 30;
/// ... again after this many, ...
const KEEPALIVE_INTERVAL: u32 = 10;
/// ... and given up after this many times. Without, a call for a host that vanished would keep its environment.
const KEEPALIVE_PROBES: u32 = 3;

/// Bounds of what is read of a client that was told off.
const HEAR_OUT_BYTES: u64 = 1 << 20;
const HEAR_OUT_TIME: Duration = Duration::from_secs(1);

/// A client's socket that notes what passes.
pub(super) struct Watched {
    stream: TcpStream,
    state: Arc<State>,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// In good order, or the client left, or it was told to.
    Closed,
    /// What was received is no request that can be read; the client was told so.
    Misread,
    /// A request head took too long.
    SlowHead,
    /// The client did not take its answer.
    SlowReader,
}

/// Socket options for both sides of the front.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // What is written is complete; waiting for more would only delay it.
    stream.set_nodelay(true)?;
    let socket = stream.as_fd();
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    Ok(())
}

/// The server's settings. Times are kept by [`watch`], which tells idling from dawdling.
pub(super) fn server(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.header_read_timeout(None).max_buf_size(limits.head_bytes).max_header_size(limits.head_bytes);
    builder
}

/// Something that answers requests until it ends; hyper's connections are made one in `mod.rs`.
pub(super) trait Serving: Future<Output = hyper::Result<()>> + Unpin {
    /// Answers what was begun and ends.
    fn drain(self: Pin<&mut Self>);
}

/// Runs a connection until it ends, is told to, or is late.
pub(super) async fn watch<C: Serving>(connection: &mut C, state: &State, limits: &Limits) -> End {
    let mut connection = Pin::new(connection);
    let tick = limits.head_timeout.min(limits.idle_timeout).min(limits.write_timeout);
    let mut alarm = pin!(sleep_until(Instant::now() + tick));
    let (wakes, mut draining) = (Wakes::new(), false);
    poll_fn(move |cx| {
        match state.listen(cx.waker()) {
            Signal::Close => return Poll::Ready(End::Closed),
            Signal::Drain if !draining => {
                draining = true;
                connection.as_mut().drain();
            }
            Signal::Drain | Signal::Serve => {}
        }
        if let Poll::Ready(ended) = wakes.poll(cx, |cx| connection.as_mut().poll(cx)) {
            return Poll::Ready(End::of(&ended));
        }
        loop {
            let due = due(state, limits);
            if let Some((at, end)) = due
                && at <= Instant::now()
            {
                if end != End::Closed || draining {
                    return Poll::Ready(end);
                }
                // It idles. In this very moment it may cease to, so it is asked to end rather than cut.
                draining = true;
                connection.as_mut().drain();
                if let Poll::Ready(ended) = wakes.poll(cx, |cx| connection.as_mut().poll(cx)) {
                    return Poll::Ready(End::of(&ended));
                }
                continue;
            }
            if !wait(alarm.as_mut(), due.map(|(at, _)| at), tick, cx) {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// When the connection is late, and at what.
fn due(state: &State, limits: &Limits) -> Option<(Instant, End)> {
    if let Some(since) = state.stalled() {
        return Some((since + limits.write_timeout, End::SlowReader));
    }
    match state.phase() {
        Phase::Idle => Some((state.since() + limits.idle_timeout, End::Closed)),
        Phase::Head => Some((state.since() + limits.head_timeout, End::SlowHead)),
        Phase::Call => None,
    }
}

/// Whether the alarm went off. It is set at most a tick ahead, and not anew for each request: setting it is dear.
fn wait(mut alarm: Pin<&mut Sleep>, due: Option<Instant>, tick: Duration, cx: &mut Context<'_>) -> bool {
    if let Some(due) = due
        && due < alarm.deadline()
    {
        alarm.as_mut().reset(due);
    }
    if alarm.as_mut().poll(cx).is_pending() {
        return false;
    }
    alarm.reset(Instant::now() + tick);
    true
}

/// Reads what a client is still sending that was told off already: to close with bytes unread resets the connection, and
/// the client would lose the answer.
pub(super) async fn hear_out(mut stream: Watched) {
    let mut rest = (&mut stream).take(HEAR_OUT_BYTES);
    // Heard out or not, it is closed.
    let _ = timeout(HEAR_OUT_TIME, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

// === impl End ===

impl End {
    fn of(ended: &hyper::Result<()>) -> Self {
        match ended {
            Err(cause) if cause.is_parse() => Self::Misread,
            Ok(()) | Err(_) => Self::Closed,
        }
    }
}

// === impl Watched ===

impl Watched {
    pub(super) fn new(stream: TcpStream, state: Arc<State>) -> Self {
        Self { stream, state }
    }

    fn written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.state.wrote(written.is_ready());
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before && self.state.phase() == Phase::Idle {
            self.state.enter(Phase::Head);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(written)
    }
}
