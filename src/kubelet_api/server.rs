//! Accepts connections, bounds them in number and time, and serves HTTP/1.1 over TLS on each.
//!
//! ```text
//! accept -> a slot? -> TLS handshake -> request head -> gate -> handler -> idle -> request head ...
//!             |           (bounded)      (bounded)                 |      (bounded)
//!             '- no: told so in HTTP, or closed                    '- 101: streams, in the same task and slot
//! ```

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::meters::{Lost, Meters};
use super::peer::Peer;
use super::seldom::{Last, Seldom};
use super::slots::{Admission, Slot, Slots, Work};
use super::streaming::upgrade::Handover;
use super::tls::Tls;
use crate::telemetry::chain;

/// After an accept that failed (no file descriptors left, most likely): long enough to let some be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For telling a client that there is no place.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes taken from a socket at once. rustls asks for a quarter of that, which would be four calls for each record that a
/// client who sends much has filled.
const READ_AHEAD: usize = 16 << 10;
/// For requests that are being answered when the server ends. A followed log never ends by itself, so not for long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// A silent client is asked whether it is there after this many seconds, ...
const KEEPALIVE_IDLE: u32 = 30;
/// ... again after this many, ...
const KEEPALIVE_INTERVAL: u32 = 10;
/// ... and given up after this many times. Without, a client whose host vanished would follow a log for ever.
///
/// One that vanishes while it owes acknowledgements is given up by the kernel after a quarter of an hour
/// (`net.ipv4.tcp_retries2`). `TCP_USER_TIMEOUT` would shorten that, but it also ends clients that are there and do not
/// read for as long, since it minds a window that stays shut, not whether its probes are answered.
const KEEPALIVE_PROBES: u32 = 3;

/// Bounds that keep one client from starving the others.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; each followed log and each exec is one. When they are all taken, one that never had a
    /// request let through gives way, else the one that has idled longest; if none idles the newcomer is answered 503.
    /// Default 1024.
    pub connections: usize,
    /// For the TLS handshake. Default 10 s.
    pub handshake: Duration,
    /// For a request head to arrive, from the end of the handshake or of the request before, so it bounds idling too.
    /// Default 90 s, as a kubelet's idle bound.
    pub request_head: Duration,
    /// Bytes of a request head, and of an answer held for a slow reader; at least 8192. A longer head is answered 431.
    /// Default 64 KiB.
    pub head_bytes: usize,
    /// Sessions of exec, attach, port-forward and run at once, out of the connections; one more is answered 503.
    /// Default 512.
    pub streams: usize,
    /// After this long in which nothing but pings came or went such a session ends. Default 4 h, as a kubelet's
    /// `streamingConnectionIdleTimeout`.
    pub stream_idle: Duration,
    /// How often changed certificate files are looked for. Default 5 s.
    pub reload: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            handshake: Duration::from_secs(10),
            request_head: Duration::from_secs(90),
            head_bytes: 64 << 10,
            streams: 512,
            stream_idle: Duration::from_secs(4 * 60 * 60),
            reload: Duration::from_secs(5),
        }
    }
}

/// What every connection needs.
pub(super) struct Server {
    tls: Arc<Tls>,
    router: Router,
    limits: Limits,
    meters: Meters,
    handshake_lines: Seldom,
    refusal_lines: Seldom,
}

/// Serves until `shutdown`, then lets what is being answered end, but not for long.
pub(super) async fn run(server: Arc<Server>, listener: TcpListener, shutdown: CancellationToken) {
    let slots = Slots::new(server.limits.connections);
    let mut tasks = JoinSet::new();
    tasks.spawn(reload(server.clone(), shutdown.clone()));
    loop {
        tokio::select! {
            // Cancel-safe: a connection is taken from the queue or left in it.
            accepted = listener.accept() => match accepted {
                Ok((tcp, address)) => place(&server, &slots, &mut tasks, (tcp, address, shutdown.clone())),
                Err(cause) => {
                    warn!(error = chain(&cause), "failed to accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            // Cancel-safe: a finished task stays in the set until it is taken.
            Some(ended) = tasks.join_next() => report(ended),
            // Cancel-safe: a token stays cancelled.
            () = shutdown.cancelled() => break,
        }
    }
    drop(listener);
    let drained = timeout(DRAIN_TIMEOUT, async {
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    });
    if drained.await.is_err() {
        debug!(connections = tasks.len(), "closing connections that are still busy");
    }
    tasks.shutdown().await;
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(cause) = ended.as_ref()
        && cause.is_panic()
    {
        error!(error = chain(cause), "a connection's task panicked");
    }
}

/// Gives a new connection its task, or closes it.
fn place(
    server: &Arc<Server>,
    slots: &Arc<Slots>,
    tasks: &mut JoinSet<()>,
    (tcp, address, shutdown): (TcpStream, SocketAddr, CancellationToken),
) {
    if let Err(cause) = prepare(&tcp) {
        debug!(peer = %address, error = chain(&cause), "failed to set socket options");
    }
    let server = server.clone();
    match slots.admit() {
        Admission::Serve { slot, evicted } => {
            if evicted {
                server.meters.lost(Lost::Evicted);
            }
            tasks.spawn(async move { server.serve(tcp, address, slot, shutdown).await });
        }
        Admission::Refuse(place) => {
            server.meters.lost(Lost::Full);
            tasks.spawn(async move {
                let _place = place;
                let limit = server.limits.connections;
                if let Some(Last(last)) = server.refusal_lines.allow(Instant::now()) {
                    warn!(peer = %address, limit, last_this_minute = last, "refused a connection: all are in use");
                }
                // An error here is the client's leaving, and it was not to be served anyway.
                let _ = timeout(REFUSAL_TIMEOUT, server.refuse(tcp)).await;
            });
        }
        Admission::Close => server.meters.lost(Lost::Full),
    }
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    // An answer is written as a whole; waiting for more to send would only delay followed logs.
    tcp.set_nodelay(true)?;
    let socket = tcp.as_fd();
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    Ok(())
}

/// Takes over changed certificate files.
async fn reload(server: Arc<Server>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = shutdown.cancelled() => return,
            // Cancel-safe: nothing was done yet.
            () = tokio::time::sleep(server.limits.reload) => {}
        }
        let tls = server.tls.clone();
        match tokio::task::spawn_blocking(move || tls.refresh()).await {
            Ok(Ok(true)) => info!("took over changed certificate files"),
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(cause)) => {
                warn!(error = chain(&cause), "changed certificate files are not usable; the ones before stay in use");
            }
        }
    }
}

impl Server {
    pub(super) fn new(tls: Arc<Tls>, router: Router, limits: Limits, meters: Meters) -> Self {
        let (handshake_lines, refusal_lines) = (Seldom::default(), Seldom::default());
        Self { tls, router, limits, meters, handshake_lines, refusal_lines }
    }

    async fn serve(&self, tcp: TcpStream, address: SocketAddr, slot: Slot, shutdown: CancellationToken) {
        self.meters.connections.inc();
        tokio::select! {
            // Not cancel-safe, and need not be: the connection is over.
            () = self.connection(tcp, address, &slot, shutdown) => {}
            // Cancel-safe: a token stays cancelled.
            () = slot.evicted() => debug!(peer = %address, "closed a connection that was not served, for another"),
        }
        self.meters.connections.dec();
    }

    async fn connection(&self, tcp: TcpStream, address: SocketAddr, slot: &Slot, shutdown: CancellationToken) {
        let tls = match timeout(self.limits.handshake, self.handshake(tcp)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(cause)) => return self.handshake_failed(address, &cause),
            Err(_) => {
                self.meters.lost(Lost::Handshake);
                return debug!(peer = %address, "TLS handshake took too long");
            }
        };
        let peer = Arc::new(Peer::new(address, tls.get_ref().1.peer_certificates(), slot.proof()));
        let router = TowerToHyperService::new(self.router.clone());
        let handover = Arc::new(Handover::default());
        let held = handover.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(held.clone());
            let (work, answered) = (slot.work(), router.call(request));
            async move { answered.await.map(|answer| answer.map(|body| Answer { body, _work: work })) }
        });
        let connection = self.http().serve_connection(TokioIo::new(tls), service).with_upgrades();
        tokio::pin!(connection);
        let ended = tokio::select! {
            // Not cancel-safe: it is only polled on, never dropped half-way, below.
            ended = connection.as_mut() => ended,
            // Cancel-safe: a token stays cancelled.
            () = shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(cause) = ended {
            debug!(peer = %address, error = chain(&cause), "connection ended early");
        }
        if let Some(upgraded) = handover.take() {
            let _streams = slot.work();
            tokio::select! {
                // Not cancel-safe, and must not be: what runs for the client ends with its connection.
                () = upgraded => {}
                // Cancel-safe: a token stays cancelled.
                () = shutdown.cancelled() => debug!(peer = %address, "cut off open streams"),
            }
        }
    }

    async fn handshake(&self, tcp: TcpStream) -> io::Result<TlsStream<BufReader<TcpStream>>> {
        let tcp = BufReader::with_capacity(READ_AHEAD, tcp);
        TlsAcceptor::from(self.tls.config()).accept(tcp).await
    }

    /// A connection that is opened and closed is a port check, anything else deserves a line.
    fn handshake_failed(&self, peer: SocketAddr, cause: &io::Error) {
        self.meters.lost(Lost::Handshake);
        if matches!(
            cause.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        ) {
            return debug!(%peer, error = chain(cause), "client left during the TLS handshake");
        }
        let Some(Last(last)) = self.handshake_lines.allow(Instant::now()) else { return };
        let inner = cause.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if matches!(inner, Some(rustls::Error::InvalidCertificate(_))) {
            warn!(%peer, error = chain(cause), last_this_minute = last, "refused a client certificate: the client CA file does not vouch for it");
        } else {
            warn!(%peer, error = chain(cause), last_this_minute = last, "TLS handshake failed");
        }
    }

    fn http(&self) -> http1::Builder {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.request_head)
            .max_buf_size(self.limits.head_bytes);
        builder
    }

    /// Answers one request, whatever it is, with 503.
    async fn refuse(&self, tcp: TcpStream) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let tls = self.handshake(tcp).await?;
        let limit = self.limits.connections;
        let service =
            service_fn(move |_: Request<Incoming>| async move { Ok::<_, std::convert::Infallible>(full(limit)) });
        Ok(self.http().keep_alive(false).serve_connection(TokioIo::new(tls), service).await?)
    }
}

/// An answer, which is under way until it is at its end.
struct Answer {
    body: Body,
    _work: Work,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn full(limit: usize) -> Response {
    let text = format!("too many connections: all {limit} are in use\n");
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], text).into_response()
}
