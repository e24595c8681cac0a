//! One call in an environment: the request goes there, the answer comes back, and the environment is given back.
//!
//! Once a request is on its way the exchange outlives its client: see [`Survivor`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::answer::Refusal;
use super::headers;
use super::lease::{Lease, Outcome, Reason, TryAgain};
use super::places::State;
use super::replay::{self, Replay};
use super::reply::{Begun, Held, ReplyError, Source};
use super::upload::{Progress, Upload, Watch};
use super::wire::Wire;
use super::{LAMBDA_PAYLOAD, Shared};
use crate::telemetry::chain;

/// A request and where it goes.
pub(super) struct Sending {
    pub(super) lease: Lease,
    pub(super) wire: Wire,
    pub(super) request: Request<Upload>,
    /// On the path of the Lambda RIE.
    pub(super) lambda: bool,
    /// Whose it is.
    pub(super) client: Arc<State>,
}

/// What came of it.
pub(super) enum Exchanged {
    Answer(Response<()>, Begun),
    /// The connection is another protocol's now.
    Upgraded(Response<()>, Wire, Lease),
    Refused(Refusal),
    /// The client broke off its request.
    ClientGone,
}

/// Sends the request and waits for the answer to begin.
pub(super) async fn exchange(shared: Arc<Shared>, sending: Sending) -> Exchanged {
    let Sending { lease, mut wire, mut request, lambda, client } = sending;
    let environment = lease.environment().clone();
    let upload = request.body().watch();
    let upgrade = request.headers().contains_key(http::header::UPGRADE);
    if lambda && request.body_mut().gather(replay::KEPT).await.is_err() {
        return failed(&shared, lease, (upload, lambda), String::new()).await;
    }
    let mut replay = lambda.then(|| Replay::of(&request));
    let (mut sent, mut fresh) = (Instant::now(), false);
    let cause = loop {
        let result = tokio::select! {
            biased;
            // Not cancel-safe, and need not be: the connection is given up with it.
            result = wire.send(request) => result,
            // Cancel-safe: it stays lost.
            lost = environment.lost() => {
                lease.finish(Outcome::Lost(lost.reason.clone()));
                return Exchanged::Refused(Refusal::Lost(lost.reason));
            }
        };
        match result {
            Ok(response) if lambda && replay::is_unready(&response) => {
                drop(response);
                let again = async { replay.as_mut()?.again(&shared.limits, &client).await };
                let Some(message) = again.await else { return unready(lease, &client) };
                (request, fresh, sent) = (message, true, Instant::now());
                match Wire::connect(environment.address(), shared.limits.connect_timeout).await {
                    Ok(new) => wire = new,
                    Err(cause) => return unreachable(lease, &cause),
                }
            }
            Ok(response) => {
                let held = Held { wire, lease, upload, sent, lambda, client };
                return answered(shared, response, held, upgrade).await;
            }
            Err(mut error) => match error.take_message() {
                // A kept connection had been closed by the other side, and nothing of the request was taken.
                Some(message) if !fresh => {
                    (request, fresh) = (message, true);
                    match Wire::connect(environment.address(), shared.limits.connect_timeout).await {
                        Ok(new) => wire = new,
                        Err(cause) => return unreachable(lease, &cause),
                    }
                }
                _ => break chain(error.error()),
            },
        }
    };
    failed(&shared, lease, (upload, lambda), cause).await
}

fn unreachable(lease: Lease, cause: &std::io::Error) -> Exchanged {
    let reason: Arc<str> = chain(cause).into();
    lease.finish(Outcome::Unreachable(reason.clone()));
    Exchanged::Refused(Refusal::Lost(reason))
}

/// Its runtime did not ask for another call, so none of this one was begun.
fn unready(lease: Lease, client: &State) -> Exchanged {
    lease.finish(Outcome::CutOff { begun: false });
    if client.has_left() {
        return Exchanged::ClientGone;
    }
    let (reason, retry_after) = (Reason::Unready, Duration::from_secs(1));
    Exchanged::Refused(Refusal::TryAgain(TryAgain { reason, retry_after }))
}

/// No answer came.
async fn failed(shared: &Shared, lease: Lease, (upload, lambda): (Watch, bool), cause: String) -> Exchanged {
    let refusal = match upload.progress() {
        Progress::ClientGone => None,
        Progress::TooLarge => Some(Refusal::TooLarge(LAMBDA_PAYLOAD)),
        Progress::TooSlow => Some(Refusal::TooSlow),
        Progress::Going | Progress::Done => {
            let environment = lease.environment().clone();
            // The connection's end is seen at once; why the environment ended is known a little later.
            let lost = timeout(shared.limits.exit_wait, environment.lost()).await;
            let reason = lost.map_or_else(|_| Arc::from(cause.as_str()), |lost| lost.reason);
            debug!(environment = %environment.address(), error = cause, reason = &*reason, "a call was lost");
            lease.finish(Outcome::Lost(reason.clone()));
            return Exchanged::Refused(Refusal::Lost(reason));
        }
    };
    lease.finish(Outcome::CutOff { begun: !lambda });
    refusal.map_or(Exchanged::ClientGone, Exchanged::Refused)
}

async fn answered(shared: Arc<Shared>, response: Response<Incoming>, held: Held, upgrade: bool) -> Exchanged {
    let (mut parts, body) = response.into_parts();
    let switched = parts.status == StatusCode::SWITCHING_PROTOCOLS;
    if switched && !upgrade {
        let reason: Arc<str> = "it changed the protocol unasked".into();
        held.lease.finish(Outcome::Lost(reason.clone()));
        return Exchanged::Refused(Refusal::Lost(reason));
    }
    headers::to_client(&mut parts.headers, switched);
    parts.version = Version::HTTP_11;
    let head = Response::from_parts(parts, ());
    if switched {
        return Exchanged::Upgraded(head, held.wire, held.lease);
    }
    match Source::new(shared, body, held).begin().await {
        Ok(begun) => Exchanged::Answer(head, begun),
        Err(ReplyError(reason)) => Exchanged::Refused(Refusal::Lost(reason)),
    }
}

/// An exchange that goes on in the background if it is dropped, so that its environment comes back when it is idle.
pub(super) struct Survivor {
    exchange: Option<Pin<Box<dyn Future<Output = Exchanged> + Send>>>,
    shared: Arc<Shared>,
    lambda: bool,
    client: Arc<State>,
}

impl Survivor {
    pub(super) fn new(shared: Arc<Shared>, sending: Sending) -> Self {
        let (lambda, client) = (sending.lambda, sending.client.clone());
        Self { exchange: Some(Box::pin(exchange(shared.clone(), sending))), shared, lambda, client }
    }
}

impl Future for Survivor {
    type Output = Exchanged;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Exchanged> {
        let Some(exchange) = &mut self.exchange else { return Poll::Pending };
        let polled = exchange.as_mut().poll(cx);
        if polled.is_ready() {
            self.exchange = None;
        }
        polled
    }
}

impl Drop for Survivor {
    fn drop(&mut self) {
        let Some(exchange) = self.exchange.take() else { return };
        self.client.leave();
        let (lambda, patience) = (self.lambda, self.shared.limits.linger);
        self.shared.background.spawn(async move {
            // Other servers than Lambda's are told to stop by closing, but may have a moment to come to their end.
            let exchanged = if lambda { Some(exchange.await) } else { timeout(patience, exchange).await.ok() };
            if let Some(Exchanged::Answer(_, Begun::Part(source))) = exchanged {
                source.abandon();
            }
        });
    }
}
