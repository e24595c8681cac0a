//! The front of a function: HTTP on the Pod's own address, and one leased environment for each call.
//!
//! ```text
//! listen_in(Pod's netns) --> accept --> a place? --> watch(hyper server) --request--> call::answer
//!                                        | no: 503, or closed                            |
//!                                        '                      lease <-- Leases --------+
//!                                                               wire  <-- Environment ---+
//! client <-- Answer <-- Reply <-- exchange(wire, request) <------------------------------'
//!                         '--client left--> background: read on, then Outcome::ClientGone
//! ```
//! A connection without bytes takes no lease, so a TCP probe wakes nothing. A call runs in one task, that of its client's
//! connection, which drives the environment's connection too. Nothing is kept per path, client or request once answered.
//!
//! Bounds: connections per function and per node (the one that idled longest gives way, else 503 and close), request heads
//! (431), the Lambda path's payload (413), the time for heads, bodies, idling and taking an answer. None bounds how long a
//! function may take: that is the pool's, which ends calls by [`Environment::lose`].

mod answer;
mod background;
mod call;
mod connection;
mod exchange;
mod headers;
mod lease;
mod listen;
mod meters;
mod places;
mod replay;
mod reply;
mod tally;
mod tunnel;
mod upload;
mod wakes;
mod wire;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1::UpgradeableConnection;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

pub use self::lease::{Environment, Lease, LeaseLost, Leases, Leaves, Outcome, Reason, TryAgain};
pub use self::listen::{ListenError, listen_in};
pub use self::meters::{FunctionLabels, Meters};
pub use self::places::NodeConnections;

use self::answer::{Answer, Refusal};
use self::background::Background;
use self::call::Peer;
use self::connection::{End, Serving, Watched};
use self::meters::{FunctionMeters, Lost};
use self::places::{Admission, Places, Refusing, Seat, Signal};
use crate::telemetry::chain;

/// Where the Lambda runtime interface emulator takes calls.
pub const LAMBDA_PATH: &str = "/2015-03-31/functions/function/invocations";
/// Most bytes of a call's payload on [`LAMBDA_PATH`]: 6 MiB and 100 bytes, as Lambda's runtime API has it.
pub const LAMBDA_PAYLOAD: u64 = (6 << 20) + 100;

/// After an accept that failed (no file descriptors left, most likely): long enough to let some be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For telling a client that there is no place.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The bounds of one function's front.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Clients' connections at once. Default 1024.
    pub connections: usize,
    /// Bytes of a request head (more: 431), and held for a slow reader; at least 8192. Default 64 KiB.
    pub head_bytes: usize,
    /// From the first byte of a request head to its last; then the connection closes. Default 10 s.
    pub head_timeout: Duration,
    /// For the first part of a request body, and on [`LAMBDA_PATH`] for each 64 KiB of it; then 408. Default 10 s.
    pub body_timeout: Duration,
    /// Between requests, and before the first; then the connection closes. Default 120 s.
    pub idle_timeout: Duration,
    /// For a client to take some of its answer; then it is held to have left. Default 60 s.
    pub write_timeout: Duration,
    /// For connecting to an environment. Default 5 s.
    pub connect_timeout: Duration,
    /// How long an idle connection to an environment is used again: less than any usual server keeps one, so that none
    /// is closed by the other side just as a request is sent. Default 1 s.
    pub keep_environment: Duration,
    /// For the reason of an environment's end to become known after its connection broke. Default 1 s.
    pub exit_wait: Duration,
    /// For a Lambda runtime with managed concurrency to ask for its next call; then that call is answered 503. Default 5 s.
    pub ready_wait: Duration,
    /// How long an answer is read on after its client left, where a server can be told to stop by closing. A Lambda's
    /// is read to its end. Default 30 s.
    pub linger: Duration,
}

/// A function's front, before it runs.
pub struct Front<L> {
    leases: Arc<L>,
    places: Arc<Places>,
    shared: Arc<Shared>,
}

/// What every call of a front needs.
struct Shared {
    limits: Limits,
    meters: Arc<FunctionMeters>,
    background: Background,
}

/// How a front ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Calls that were cut off by the deadline, those read on in the background included.
    pub cut: usize,
}

/// Closes everything when a front is dropped half-way.
struct CloseOnDrop<'a>(&'a Places, &'a Background);

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head_bytes: 64 << 10,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            write_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            keep_environment: Duration::from_secs(1),
            exit_wait: Duration::from_secs(1),
            ready_wait: Duration::from_secs(5),
            linger: Duration::from_secs(30),
        }
    }
}

impl<L: Leases> Front<L> {
    /// A front that gets its environments from `leases`. To be made within the runtime that it runs on.
    pub fn new(leases: Arc<L>, limits: Limits, node: NodeConnections, meters: &Meters, labels: FunctionLabels) -> Self {
        let places = Places::new(limits.connections, node);
        let shared = Shared { limits, meters: meters.function(labels), background: Background::new() };
        Self { leases, places, shared: Arc::new(shared) }
    }

    /// Serves until `drain` says by when to have ended. From then on nothing is accepted, calls that are being made are
    /// answered, and at the deadline what is left is cut off. A later value moves the deadline; the sender's end is a
    /// deadline of now. Cancel-safe: dropped, everything is cut off at once.
    ///
    /// # Errors
    /// If a listener cannot be used with the runtime.
    pub async fn run(
        self,
        listeners: Vec<StdListener>,
        mut drain: watch::Receiver<Option<Instant>>,
    ) -> io::Result<Drained> {
        let close = CloseOnDrop(&self.places, &self.shared.background);
        let listeners = listeners.into_iter().map(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        {
            let accepting = !listeners.is_empty();
            let accept = futures::future::join_all(listeners.into_iter().map(|listener| self.accept(listener)));
            tokio::select! {
                // Cancel-safe: a connection is taken and placed without a pause in between.
                _ = accept, if accepting => {}
                // Cancel-safe: it waits for a value that stays.
                _ = drain.wait_for(Option::is_some) => {}
            }
        }
        self.places.tell(Signal::Drain);
        let cut = tokio::select! {
            biased;
            // Cancel-safe: it only waits.
            () = self.shared.background.ended() => 0,
            // Cancel-safe: it only waits.
            () = deadline(&mut drain) => self.calls_left(),
        };
        drop(close);
        self.shared.background.ended().await;
        Ok(Drained { cut })
    }

    /// Tasks that are not merely a connection that idles.
    fn calls_left(&self) -> usize {
        self.shared.background.len().saturating_sub(self.places.idle())
    }

    async fn accept(&self, listener: TcpListener) -> Infallible {
        loop {
            match listener.accept().await {
                Ok((stream, client)) => self.place(stream, client),
                Err(cause) => {
                    warn!(error = chain(&cause), "failed to accept a connection of a function");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Gives a connection its task, or closes it.
    fn place(&self, stream: TcpStream, client: SocketAddr) {
        if let Err(cause) = connection::prepare(&stream) {
            debug!(%client, error = chain(&cause), "failed to set socket options");
        }
        let shared = self.shared.clone();
        match self.places.admit() {
            Admission::Serve { seat, evicted } => {
                if evicted {
                    shared.meters.lost(Lost::Evicted);
                }
                let serve = serve(stream, client, (seat, shared), self.leases.clone());
                self.shared.background.spawn_told(serve);
            }
            Admission::Refuse(place) => {
                shared.meters.lost(Lost::Full);
                self.shared.background.spawn(refuse(stream, place, shared));
            }
            Admission::Close => shared.meters.lost(Lost::Full),
        }
    }
}

/// Resolves at the deadline that was said last.
async fn deadline(drain: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let at = drain.borrow_and_update().unwrap_or_else(Instant::now);
        tokio::select! {
            // Cancel-safe: it only waits.
            () = sleep_until(at) => return,
            // Cancel-safe: what changed is looked at above.
            changed = drain.changed() => if changed.is_err() {
                // Nobody can move it any more.
                return sleep_until(at).await;
            },
        }
    }
}

/// One client's connection, to its end.
async fn serve<L: Leases>(stream: TcpStream, client: SocketAddr, (seat, shared): (Seat, Arc<Shared>), leases: Arc<L>) {
    let host = stream.local_addr().map(|address| address.to_string()).unwrap_or_default();
    // An address is always a valid value.
    let address = HeaderValue::from_str(&client.ip().to_canonical().to_string());
    let Ok(address) = address else { return };
    let state = seat.state.clone();
    let peer = Peer::new(seat, shared.clone(), address, host);
    let io = TokioIo::new(Watched::new(stream, state.clone()));
    let service = service_fn(move |request: Request<Incoming>| call::answer(peer.clone(), leases.clone(), request));
    let mut connection = connection::server(&shared.limits).serve_connection(io, service).with_upgrades();
    let end = connection::watch(&mut connection, &state, &shared.limits).await;
    match end {
        End::Closed => {}
        End::Misread => {
            if let Some(parts) = connection.into_parts() {
                connection::hear_out(parts.io.into_inner()).await;
            }
        }
        End::SlowHead => shared.meters.lost(Lost::SlowHead),
        End::SlowReader => shared.meters.lost(Lost::SlowReader),
    }
    debug!(%client, ?end, "a client's connection ended");
}

/// Answers one request, whatever it is, with 503.
async fn refuse(stream: TcpStream, place: Refusing, shared: Arc<Shared>) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = Refusal::Full.response(request.uri().path() == LAMBDA_PATH);
        std::future::ready(Ok::<Response<Answer>, Infallible>(response.map(|content| Answer::new(content, None))))
    });
    let mut server = connection::server(&shared.limits);
    let connection = server.keep_alive(false).serve_connection(TokioIo::new(stream), service);
    // An error here is the client's leaving, and it was not to be served anyway.
    let _ = timeout(REFUSAL_TIMEOUT, connection.map(drop)).await;
    drop(place);
}

impl<I, S> Serving for UpgradeableConnection<I, S>
where
    S: HttpService<Incoming>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::ResBody: 'static,
    <S::ResBody as hyper::body::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    Self: Future<Output = hyper::Result<()>> + Unpin,
{
    fn drain(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.tell(Signal::Close);
        self.1.close();
    }
}
