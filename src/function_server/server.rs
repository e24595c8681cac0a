//! Accepts connections, bounds them in number and time, and serves gRPC (HTTP/2) on each.
//!
//! Without TLS only whoever is on this host can come; from anywhere else a client certificate is what lets one in.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lambdalet_proto::functionserver::function_server::FunctionServer as Calls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::service::Service;
use super::tls::{TlsError, TlsFiles};
use crate::telemetry::chain;

/// After an accept that failed (no file descriptors left, most likely): long enough to let some be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A silent client is asked whether it is there so often ...
const ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// ... and given up when it does not answer within this.
const ALIVE_PATIENCE: Duration = Duration::from_secs(20);
/// Calls at once on one connection.
const MAX_STREAMS: u32 = 128;
/// Bytes of the headers of one call.
const MAX_HEADERS: u32 = 16 << 10;
/// Bytes of one request: the longest fields together have half of that.
const MAX_MESSAGE: usize = 64 << 10;
/// What a client may send ahead on a stream, and on a connection.
const STREAM_WINDOW: u32 = MAX_MESSAGE as u32;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// For calls that are under way when the server ends.
const DRAIN: Duration = Duration::from_secs(5);

/// Bounds of the server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; one more is closed. Default 64.
    pub connections: usize,
    /// For the TLS handshake. Default 10 s.
    pub handshake: Duration,
    /// Replicas that are being started at once, for all callers; one more call is told to try again. Default 8.
    pub creating: usize,
    /// The same for those that are being released. Default 32.
    pub releasing: usize,
    /// How long a caller that says nothing waits for a replica, and the longest that one may say. Default 2 min.
    pub create: Duration,
    /// The same for a release. Default 30 s.
    pub release: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            handshake: Duration::from_secs(10),
            creating: 8,
            releasing: 32,
            create: Duration::from_secs(120),
            release: Duration::from_secs(30),
        }
    }
}

/// Serves one listener.
pub(super) struct Server {
    pub(super) service: Service,
    pub(super) tls: Option<TlsFiles>,
    pub(super) limits: Limits,
}

/// Why a connection was not served.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("failed to load the certificates")]
    Certificates(#[from] TlsError),
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    #[error("the TLS handshake took too long")]
    Late,
    #[error("the connection broke")]
    Broken(#[from] hyper::Error),
}

impl Server {
    /// Serves until `shutdown`, and then what is under way, but not for long.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener, shutdown: CancellationToken) {
        let places = Arc::new(Semaphore::new(self.limits.connections));
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                // Cancel-safe: a connection is taken from the queue or left in it.
                accepted = listener.accept() => match accepted {
                    Ok((tcp, peer)) => self.place(&places, &mut tasks, (tcp, peer), &shutdown),
                    Err(cause) => {
                        warn!(error = chain(&cause), "failed to accept a connection of the function server");
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
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    }

    fn place(
        self: &Arc<Self>,
        places: &Arc<Semaphore>,
        tasks: &mut JoinSet<()>,
        (tcp, peer): (TcpStream, SocketAddr),
        shutdown: &CancellationToken,
    ) {
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            warn!(%peer, limit = self.limits.connections, "closed a connection of the function server: all places are taken");
            return;
        };
        let (server, shutdown) = (Arc::clone(self), shutdown.clone());
        tasks.spawn(async move {
            if let Err(cause) = server.serve(tcp, place, shutdown).await {
                debug!(%peer, error = chain(&cause), "a connection of the function server ended");
            }
        });
    }

    async fn serve(
        &self,
        tcp: TcpStream,
        _place: OwnedSemaphorePermit,
        shutdown: CancellationToken,
    ) -> Result<(), ConnectionError> {
        // An answer is written as a whole.
        let _ = tcp.set_nodelay(true);
        match self.tls.clone() {
            None => self.http(tcp, shutdown).await,
            Some(files) => {
                let handshake = async {
                    let config = tokio::task::spawn_blocking(move || files.server()).await;
                    let config = config.map_err(|error| ConnectionError::Handshake(io::Error::other(error)))??;
                    TlsAcceptor::from(Arc::new(config)).accept(tcp).await.map_err(ConnectionError::Handshake)
                };
                let tls = tokio::select! {
                    // Cancel-safe: nothing was asked yet.
                    tls = timeout(self.limits.handshake, handshake) => tls.map_err(|_| ConnectionError::Late)??,
                    // Cancel-safe: a token stays cancelled.
                    () = shutdown.cancelled() => return Ok(()),
                };
                self.http(tls, shutdown).await
            }
        }
    }

    async fn http<S>(&self, io: S, shutdown: CancellationToken) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let calls = Calls::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE);
        let mut connection = std::pin::pin!(
            http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(ALIVE_INTERVAL)
                .keep_alive_timeout(ALIVE_PATIENCE)
                .max_concurrent_streams(MAX_STREAMS)
                // Calls given up before they were begun: a client may give up all of its calls at once.
                .max_pending_accept_reset_streams(MAX_STREAMS as usize)
                .max_header_list_size(MAX_HEADERS)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .serve_connection(TokioIo::new(io), TowerToHyperService::new(calls))
        );
        tokio::select! {
            // Cancel-safe: it is pinned outside.
            ended = &mut connection => return Ok(ended?),
            // Cancel-safe: a token stays cancelled.
            () = shutdown.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        // Whoever is still waiting then is answered by the end of the connection.
        timeout(DRAIN, connection).await.unwrap_or(Ok(())).map_err(Into::into)
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(cause) = ended.as_ref()
        && cause.is_panic()
    {
        error!(error = chain(cause), "the task of a connection of the function server panicked");
    }
}
