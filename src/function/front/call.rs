//! One request of a client, from its head to the head of its answer.
//!
//! ```text
//! head -> may it be forwarded? -> first part of the body -> lease -> connection -> exchange -> answer
//!            400, 413, 501            408, 413             429, 503   (next lease)    502
//! ```

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use super::answer::{Answer, Content, Refusal};
use super::exchange::{Exchanged, Sending, Survivor};
use super::headers;
use super::lease::{Lease, Leases, Outcome};
use super::meters::Ended;
use super::places::{Phase, Seat};
use super::tally::Tally;
use super::tunnel;
use super::upload::{Progress, Upload};
use super::wire::Wire;
use super::{LAMBDA_PATH, LAMBDA_PAYLOAD, Shared};
use crate::telemetry::chain;

/// Environments that are tried for a call none of which can be connected to. Nothing was sent, so nothing runs twice.
const ATTEMPTS: usize = 3;

/// A client's connection, also as another protocol's.
pub(super) struct Peer {
    seat: Seat,
    pub(super) shared: Arc<Shared>,
    /// Its address, as a header field's value.
    client: HeaderValue,
    /// What it connected to, for those that do not say whom they want.
    host: String,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.meters.connections.dec();
    }
}

/// There is nobody to answer.
#[derive(Debug, thiserror::Error)]
#[error("the client left")]
pub(super) struct ClientLeft;

/// Why a call gets no answer from an environment.
enum Failed {
    Refused(Refusal),
    ClientLeft,
}

/// A lease of which no use was made yet: dropped, the environment is as it was.
struct Unused(Option<Lease>);

impl Peer {
    pub(super) fn new(seat: Seat, shared: Arc<Shared>, client: HeaderValue, host: String) -> Arc<Self> {
        shared.meters.connections.inc();
        Arc::new(Self { seat, shared, client, host })
    }
}

/// Answers a request.
pub(super) async fn answer<L: Leases>(
    peer: Arc<Peer>,
    leases: Arc<L>,
    request: Request<Incoming>,
) -> Result<Response<Answer>, ClientLeft> {
    peer.seat.state.enter(Phase::Call);
    let mut tally = Tally::new(peer.shared.meters.clone());
    let lambda = request.uri().path() == LAMBDA_PATH;
    let called = Call { peer: &peer, leases: &*leases, lambda }.run(request).await;
    let mut idle_after = Some(peer.seat.state.clone());
    let response = match called {
        Ok(Called::Answer(head, begun)) => head.map(|()| begun.content(tally)),
        Ok(Called::Upgraded(head)) => {
            tally.ended(Ended::Answered);
            // The connection stays in use, as another protocol's.
            idle_after = None;
            head.map(|()| Content::Whole(None))
        }
        Err(Failed::Refused(refusal)) => {
            tally.ended(ended(&refusal));
            refusal.response(lambda)
        }
        Err(Failed::ClientLeft) => return Err(ClientLeft),
    };
    Ok(response.map(|content| Answer::new(content, idle_after)))
}

fn ended(refusal: &Refusal) -> Ended {
    match refusal {
        Refusal::TryAgain(again) if again.is_busy() => Ended::Busy,
        Refusal::TryAgain(_) | Refusal::Full => Ended::Unavailable,
        Refusal::TooLarge(_) | Refusal::TooSlow | Refusal::Bad(_) => Ended::Refused,
        Refusal::Lost(_) => Ended::Lost,
    }
}

/// A call that got somewhere.
enum Called {
    Answer(Response<()>, super::reply::Begun),
    Upgraded(Response<()>),
}

struct Call<'a, L> {
    peer: &'a Arc<Peer>,
    leases: &'a L,
    lambda: bool,
}

impl<L: Leases> Call<'_, L> {
    async fn run(&self, mut request: Request<Incoming>) -> Result<Called, Failed> {
        let waits = headers::waits_to_send(request.headers());
        let upgrade = request.headers().contains_key(http::header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
        headers::to_environment(&mut request, &self.peer.client, &self.peer.host).map_err(Refusal::Bad)?;
        let (parts, body) = request.into_parts();
        let upload = self.begin(body, waits).await?;
        let request = Request::from_parts(parts, upload);
        let (arrived, mut waited) = (Instant::now(), Duration::ZERO);
        let mut unreachable: Arc<str> = "".into();
        for _ in 0..ATTEMPTS {
            let asked = Instant::now();
            let lease = match self.leases.lease().await {
                Ok(lease) => Unused(Some(lease)),
                Err(again) => return self.refuse(request.into_body(), waits, Refusal::TryAgain(again)).await,
            };
            waited += asked.elapsed();
            match lease.connect(&self.peer.shared).await {
                Ok((wire, lease)) => {
                    let shared = self.peer.shared.clone();
                    shared.meters.waited(waited);
                    shared.meters.added(arrived.elapsed().saturating_sub(waited));
                    let (lambda, client) = (self.lambda, self.peer.seat.state.clone());
                    let sending = Sending { lease, wire, request, lambda, client };
                    return self.finish(Survivor::new(shared, sending).await, upgrade);
                }
                Err(reason) => unreachable = reason,
            }
        }
        self.refuse(request.into_body(), waits, Refusal::Lost(unreachable)).await
    }

    /// Receives the first part of the body, so that a client that sends none takes no environment.
    async fn begin(&self, body: Incoming, waits: bool) -> Result<Upload, Failed> {
        let patience = self.peer.shared.limits.body_timeout;
        let (limit, pace) = if self.lambda { (Some(LAMBDA_PAYLOAD), Some(patience)) } else { (None, None) };
        let mut upload = Upload::new(body, limit, pace);
        let length = upload.length();
        if let (Some(length), Some(limit)) = (length, limit)
            && length > limit
        {
            return self.refuse(upload, waits, Refusal::TooLarge(limit)).await;
        }
        if waits {
            // Asking for the body is telling the client to send it, which is for the environment to decide.
            return Ok(upload);
        }
        // One who says neither how long the body is nor calls a Lambda may be waiting for the answer to begin.
        let wait = (self.lambda || length.is_some()).then_some(patience);
        match upload.begin(wait).await {
            Ok(()) => Ok(upload),
            Err(Progress::TooSlow) => Err(Refusal::TooSlow.into()),
            Err(Progress::TooLarge) => Err(Refusal::TooLarge(LAMBDA_PAYLOAD).into()),
            Err(Progress::ClientGone | Progress::Going | Progress::Done) => Err(Failed::ClientLeft),
        }
    }

    /// Refuses, having read what a client who does not wait is sending meanwhile.
    async fn refuse<T>(&self, upload: Upload, waits: bool, refusal: Refusal) -> Result<T, Failed> {
        if !waits {
            upload.discard(self.peer.shared.limits.body_timeout).await;
        }
        Err(refusal.into())
    }

    fn finish(&self, exchanged: Exchanged, upgrade: Option<OnUpgrade>) -> Result<Called, Failed> {
        match exchanged {
            Exchanged::Answer(head, begun) => Ok(Called::Answer(head, begun)),
            Exchanged::Upgraded(head, wire, lease) => {
                if let Some(upgrade) = upgrade {
                    tunnel::spawn(self.peer.clone(), upgrade, wire, lease);
                }
                Ok(Called::Upgraded(head))
            }
            Exchanged::Refused(refusal) => Err(refusal.into()),
            Exchanged::ClientGone => Err(Failed::ClientLeft),
        }
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

// === impl Unused ===

impl Unused {
    /// A connection to the environment: one kept from an earlier call, or a new one.
    async fn connect(mut self, shared: &Shared) -> Result<(Wire, Lease), Arc<str>> {
        let environment = self.0.as_ref().map(|lease| lease.environment().clone());
        let environment = environment.ok_or_else(|| Arc::from("it was given back"))?;
        if let Some(wire) = environment.take(shared.limits.keep_environment)
            && !wire.is_stale()
            && let Some(lease) = self.0.take()
        {
            return Ok((wire, lease));
        }
        let connected = Wire::connect(environment.address(), shared.limits.connect_timeout).await;
        match (connected, self.0.take()) {
            (Ok(wire), Some(lease)) => Ok((wire, lease)),
            (Ok(_), None) => Err(Arc::from("it was given back")),
            (Err(cause), lease) => {
                let reason: Arc<str> = chain(&cause).into();
                if let Some(lease) = lease {
                    lease.finish(Outcome::Unreachable(reason.clone()));
                }
                Err(reason)
            }
        }
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if let Some(lease) = self.0.take() {
            lease.finish(Outcome::CutOff { begun: false });
        }
    }
}
