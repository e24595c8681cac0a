//! The client of a resource manager: this node registers there, and tells of its replicas.
//!
//! ```text
//! connect --> RegisterFunctionNode --> UpdateStatus, one after the other, as there is news --> connect again
//!    ^                                    '- answer DESTROY: the replica is released              |
//!    '-------------------------------- lost, or refused: after a while ---------------------------'
//! ```
//! A node registers once for each connection: managers keep what they are told in memory, so one that went away and came
//! back has to be told again, and one that did not must not count the node twice. Nothing here ends the process.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::time::Duration;

use lambdalet_proto::resmngr::res_mngr_service_client::ResMngrServiceClient;
use lambdalet_proto::resmngr::status_update_reply::Action;
use lambdalet_proto::resmngr::status_update_request::Status as Told;
use lambdalet_proto::resmngr::{RegisterFunctionNodeRequest, StatusUpdateRequest};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tracing::{debug, info, warn};

use super::dial::{self, Line};
use super::service::Service;
use super::tls::{TlsError, TlsFiles};
use crate::retry::Retry;
use crate::telemetry::chain;

/// News that wait while the manager is away. Above that they are lost, and counted in the log.
const MOST_NEWS: usize = 1024;
/// For the way to the manager, TLS among it.
const CONNECT: Duration = Duration::from_secs(5);
/// For one call. A manager may connect back to this node before it answers a registration.
const CALL: Duration = Duration::from_secs(10);
/// A manager that fails one piece of news so often, on a connection that works, is not told it any more.
const MOST_TRIES: u32 = 5;
/// Bytes of one answer; a real one has two.
const LARGEST_ANSWER: usize = 64 << 10;

/// Where a resource manager is, and what it is told.
#[derive(Clone, Debug)]
pub struct ManagerParams {
    /// Its host: a name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The host's address under which the manager finds this node's function server.
    pub advertised: String,
    /// Name of this node.
    pub node: String,
    /// How both sides prove who they are; `None` for a manager on this host.
    pub tls: Option<TlsFiles>,
}

/// What became of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// It runs.
    Ready,
    /// It has ended, and nobody asked for that.
    Finished,
}

/// Where news go.
#[derive(Clone)]
pub(super) struct Reports(mpsc::Sender<Report>);

/// The other end of that.
pub(super) struct Inbox(mpsc::Receiver<Report>);

#[derive(Clone, Debug)]
struct Report {
    id: String,
    news: News,
    tries: u32,
}

/// The client.
pub(super) struct Manager {
    params: ManagerParams,
    port: u16,
    service: Service,
    news: mpsc::Receiver<Report>,
    /// Not told yet; a lost connection does not lose it.
    pending: Option<Report>,
    retry: Retry,
}

/// Why the manager does not hear of this node now.
#[derive(Debug, thiserror::Error)]
enum ManagerError {
    #[error("failed to use the certificates for resource manager {manager}")]
    Tls {
        manager: String,
        #[source]
        source: TlsError,
    },
    #[error("failed to connect to resource manager {manager}")]
    Connect {
        manager: String,
        #[source]
        source: io::Error,
    },
    #[error("resource manager {manager} refused {call}")]
    Refused {
        manager: String,
        call: &'static str,
        #[source]
        source: Box<Status>,
    },
    #[error("resource manager {manager} did not answer {call} within {} s", CALL.as_secs())]
    Late { manager: String, call: &'static str },
    #[error("lost the connection to resource manager {manager}")]
    Lost { manager: String },
}

// === impl Reports ===

impl Reports {
    /// A queue of news, and its other end.
    pub(super) fn queue() -> (Self, Inbox) {
        let (sender, receiver) = mpsc::channel(MOST_NEWS);
        (Self(sender), Inbox(receiver))
    }

    /// Notes news; they are lost if the manager has been away for too many.
    pub(super) fn send(&self, id: &str, news: News) {
        let report = Report { id: id.to_owned(), news, tries: 0 };
        if self.0.try_send(report).is_err() {
            warn!(replica = id, ?news, "the resource manager will not hear of this: too much waits for it already");
        }
    }
}

// === impl Manager ===

impl Manager {
    /// A client that tells the news of this queue; `port` is that of this node's function server.
    pub(super) fn new(params: ManagerParams, port: u16, service: Service, news: Inbox) -> Self {
        let retry = Retry::new("work with the resource manager");
        Self { params, port, service, news: news.0, pending: None, retry }
    }

    /// Works until `shutdown`; what goes wrong is logged, and tried again.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let error = tokio::select! {
                // Cancel-safe: the process ends, and what was not told yet is lost with it.
                Err(error) = self.session() => error,
                // Cancel-safe: a token stays cancelled.
                () = shutdown.cancelled() => return,
            };
            let pause = self.retry.failed(chain(&error));
            tokio::select! {
                // Cancel-safe: nothing is under way.
                () = sleep(pause) => {}
                // Cancel-safe: a token stays cancelled.
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// One connection, from its registration to its end.
    async fn session(&mut self) -> Result<Infallible, ManagerError> {
        let Line { channel, gone } = self.connect().await?;
        let mut client = ResMngrServiceClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
        self.register(&mut client).await?;
        self.retry.succeeded();
        info!(manager = %self.params, "registered with the resource manager");
        loop {
            let report = match self.pending.take() {
                Some(report) => report,
                None => tokio::select! {
                    // Cancel-safe: a message is taken from the queue or stays in it.
                    Some(report) = self.news.recv() => report,
                    // Cancel-safe: a token stays cancelled.
                    () = gone.cancelled() => return Err(ManagerError::Lost { manager: self.params.to_string() }),
                },
            };
            self.pending = Some(report.clone());
            match self.update(&mut client, &report).await {
                Ok(action) => {
                    self.pending = None;
                    self.retry.succeeded();
                    self.act(&report, action);
                }
                Err(error) => self.failed(report, error, &gone).await?,
            }
        }
    }

    async fn connect(&self) -> Result<Line, ManagerError> {
        let manager = || self.params.to_string();
        let tls = match self.params.tls.clone() {
            None => None,
            Some(files) => {
                let lost = |error| TlsError::Read { path: files.certificate.clone(), source: io::Error::other(error) };
                let reading = files.clone();
                let config = tokio::task::spawn_blocking(move || reading.client()).await.map_err(lost).flatten();
                Some(config.map_err(|source| ManagerError::Tls { manager: manager(), source })?)
            }
        };
        let line = timeout(CONNECT, dial::dial(&self.params.host, self.params.port, tls)).await;
        let line = line.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        line.map_err(|source| ManagerError::Connect { manager: manager(), source })
    }

    async fn register(&self, client: &mut Client) -> Result<(), ManagerError> {
        let request = RegisterFunctionNodeRequest {
            ip: self.params.advertised.clone(),
            port: u32::from(self.port),
            node_id: self.params.node.clone(),
        };
        self.within("RegisterFunctionNode", client.register_function_node(deadline(request))).await
    }

    /// What is to become of the replica.
    async fn update(&self, client: &mut Client, report: &Report) -> Result<i32, ManagerError> {
        let status = match report.news {
            News::Ready => Told::Ready,
            News::Finished => Told::Finished,
        };
        let request = StatusUpdateRequest { vmid: report.id.clone(), status: status.into() };
        Ok(self.within("UpdateStatus", client.update_status(deadline(request))).await?.action)
    }

    async fn within<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, ManagerError> {
        let manager = || self.params.to_string();
        match timeout(CALL, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(ManagerError::Refused { manager: manager(), call, source: Box::new(status) }),
            Err(_) => Err(ManagerError::Late { manager: manager(), call }),
        }
    }

    fn act(&self, report: &Report, action: i32) {
        match (Action::try_from(action), report.news) {
            (Ok(Action::Destroy), News::Ready) => {
                info!(replica = report.id, "the resource manager gives a replica up");
                self.service.destroy(report.id.clone());
            }
            // It is gone already.
            (Ok(Action::Destroy), News::Finished) | (Ok(Action::KeepAlive | Action::Ok), _) => {}
            (Err(_), _) => {
                warn!(
                    replica = report.id,
                    action, "the resource manager wants what this node does not know: nothing is done"
                );
            }
        }
    }

    /// After news that were not taken: goes on with a line that works, after a while, or gives it up with the error.
    async fn failed(
        &mut self,
        mut report: Report,
        error: ManagerError,
        gone: &CancellationToken,
    ) -> Result<(), ManagerError> {
        if gone.is_cancelled() {
            // Not the manager's judgement of these news.
            return Err(error);
        }
        report.tries += 1;
        let hopeless = matches!(&error, ManagerError::Refused { source, .. } if is_final(source.code()));
        if hopeless || report.tries >= MOST_TRIES {
            warn!(replica = report.id, news = ?report.news, error = chain(&error), "the resource manager does not take this");
            self.pending = None;
            return Ok(());
        }
        debug!(replica = report.id, error = chain(&error), "the resource manager did not take this yet");
        self.pending = Some(report);
        sleep(self.retry.failed(chain(&error))).await;
        Ok(())
    }
}

/// A call over one connection.
type Client = ResMngrServiceClient<Channel>;

/// So that the manager does not work for nobody.
fn deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL);
    request
}

/// Whether the same call would fare the same.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated
            | Code::DataLoss
    )
}

impl fmt::Display for ManagerParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}
