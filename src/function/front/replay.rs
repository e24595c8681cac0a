//! Sending a Lambda's call again that its environment could not take yet.
//!
//! The emulator with managed concurrency (`AWS_LAMBDA_MAX_CONCURRENCY`) answers its caller before the runtime has asked
//! for its next call, and refuses a call that comes in between: 400 with `Error-Type: Runtime.Unavailable`. None of such a
//! call was begun, so it is sent again a moment later. The classic emulator drops that field and holds a call instead.

use std::time::Duration;

use http::{Request, Response, StatusCode};
use tokio::time::{Instant, sleep};

use super::Limits;
use super::places::State;
use super::upload::Upload;

/// Most bytes of a payload that are kept to be sent again: what Lambda itself takes of an asynchronous call. One that is
/// larger, and met by a runtime that is not ready, is answered 503.
pub(super) const KEPT: usize = 256 << 10;

/// Pauses before a call is sent again: the first, and the longest of those that follow, each twice the one before.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];

/// A call that may have to be sent again.
pub(super) struct Replay {
    /// None if its payload is too large to be kept.
    request: Option<Request<Upload>>,
    since: Instant,
    pause: Duration,
}

impl Replay {
    pub(super) fn of(request: &Request<Upload>) -> Self {
        Self { request: copy(request), since: Instant::now(), pause: PAUSES[0] }
    }

    /// Waits a moment, then gives the call once more. None when there is no use in it: the client left, or the runtime
    /// has had its time.
    pub(super) async fn again(&mut self, limits: &Limits, client: &State) -> Option<Request<Upload>> {
        let request = self.request.as_ref().filter(|_| self.since.elapsed() < limits.ready_wait)?;
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES[1]);
        copy(request).filter(|_| !client.has_left())
    }
}

fn copy(request: &Request<Upload>) -> Option<Request<Upload>> {
    let body = request.body().copy()?;
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

/// Whether the emulator says that no runtime waits for a call.
pub(super) fn is_unready<B>(response: &Response<B>) -> bool {
    let said = response.headers().get("error-type");
    response.status() == StatusCode::BAD_REQUEST && said.is_some_and(|kind| kind == "Runtime.Unavailable")
}
