//! The same streams over plain HTTP, for whoever shows a ticket: a CRI runtime's streaming server.
//!
//! ```text
//! gRPC Exec -> a ticket, in a URL -> a kubelet, or crictl -> GET or POST /exec/{ticket} -> 101 -> the streams
//! ```
//! Who may stream was decided when the ticket was given; it is good for one connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::endpoints::{Room, hand_over_command, hand_over_ports};
use super::remote_command::options::Options;
use super::upgrade::Handover;
use crate::runtime::SandboxRuntime;
use crate::runtime::session::{AttachRequest, ExecRequest};
use crate::runtime::types::{ContainerId, SandboxId};
use crate::telemetry::chain;

/// Connections at once. A newcomer beyond them waits to be accepted.
const CONNECTIONS: usize = 1024;
/// For a request head to arrive.
const REQUEST_HEAD: Duration = Duration::from_secs(30);
/// After an accept that failed: long enough to let some files be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// When a session ends for want of traffic.
const IDLE: Duration = Duration::from_secs(4 * 60 * 60);

/// What a ticket is good for.
#[derive(Clone, Debug)]
pub enum Work {
    /// Run a command in a container.
    Exec(ContainerId, ExecRequest),
    /// Join a container's process, which has a terminal or not.
    Attach(ContainerId, AttachRequest, bool),
    /// Connect to ports of a sandbox; those that were named beforehand, if any.
    PortForward(SandboxId, Vec<u16>),
}

impl Work {
    /// The first part of the path that leads to it.
    pub fn path(&self) -> &'static str {
        match self {
            Self::Exec(..) => "exec",
            Self::Attach(..) => "attach",
            Self::PortForward(..) => "portforward",
        }
    }
}

/// Gives out what tickets are good for.
pub trait Tickets: Send + Sync + 'static {
    /// What this ticket is good for. It is not good for anything from then on.
    fn take(&self, ticket: &str) -> Option<Work>;
}

/// What every connection needs.
struct Plain {
    tickets: Arc<dyn Tickets>,
    runtime: Arc<dyn SandboxRuntime>,
    room: Room,
}

/// Serves tickets until `shutdown`, which cuts off what is open.
pub async fn serve(
    listener: TcpListener,
    tickets: Arc<dyn Tickets>,
    runtime: Arc<dyn SandboxRuntime>,
    shutdown: CancellationToken,
) {
    let plain = Arc::new(Plain { tickets, runtime, room: Room::new(CONNECTIONS, IDLE) });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Cancel-safe: a connection is taken from the queue or left in it.
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((tcp, _)) => {
                    let plain = plain.clone();
                    connections.spawn(async move { plain.connection(tcp).await });
                }
                Err(cause) => {
                    warn!(error = chain(&cause), "failed to accept a connection for streams");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            // Cancel-safe: a finished task stays in the set until it is taken.
            Some(_) = connections.join_next() => {}
            // Cancel-safe: a token stays cancelled.
            () = shutdown.cancelled() => break,
        }
    }
    connections.shutdown().await;
}

impl Plain {
    async fn connection(self: Arc<Self>, tcp: TcpStream) {
        // What does not become a stream is short anyway, so this only matters for streams.
        if let Err(cause) = tcp.set_nodelay(true) {
            debug!(error = chain(&cause), "failed to set a socket option");
        }
        let handover = Arc::new(Handover::default());
        let held = handover.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(held.clone());
            let answer = self.answer(request.map(Body::new));
            async move { Ok::<_, Infallible>(answer) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(REQUEST_HEAD);
        let ended = http.serve_connection(TokioIo::new(tcp), service).with_upgrades().await;
        if let Err(cause) = ended {
            debug!(error = chain(&cause), "a connection for streams ended early");
        }
        if let Some(upgraded) = handover.take() {
            upgraded.await;
        }
    }

    fn answer(&self, request: Request<Body>) -> Response {
        let found = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        let work = found.and_then(|(kind, ticket)| {
            let work = self.tickets.take(ticket)?;
            (work.path() == kind).then_some(work)
        });
        let Some(work) = work else {
            return (StatusCode::NOT_FOUND, "no such stream: a ticket is good once, and for a minute\n")
                .into_response();
        };
        let (room, runtime) = (&self.room, self.runtime.clone());
        let answered = match work {
            Work::Exec(id, exec) => hand_over_command(request, room.exec(runtime, id, exec), || room.enter()),
            Work::Attach(id, AttachRequest { stdin, stdout, stderr }, tty) => {
                let options = Options { stdin, stdout, stderr, tty };
                hand_over_command(request, room.attach(runtime, id, options), || room.enter())
            }
            Work::PortForward(id, ports) => {
                let forward = room.forward(runtime, id.clone(), id.to_string());
                hand_over_ports(request, forward, |_| Ok(ports), || room.enter())
            }
        };
        answered.unwrap_or_else(IntoResponse::into_response)
    }
}
