//! The front's own answers, and the body of every answer.
//!
//! On the path of the Lambda RIE they have Lambda's shape, `{"errorMessage", "errorType"}`; elsewhere they are a line of
//! text.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use hyper::body::{Body, Frame, SizeHint};

use super::lease::TryAgain;
use super::places::{Phase, State};
use super::reply::{Reply, ReplyError};

/// Why a call is answered by the front itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// There is no environment now: 429 or 503.
    TryAgain(TryAgain),
    /// Too many connections: 503, and the connection closes.
    Full,
    /// The request body exceeds this many bytes: 413.
    TooLarge(u64),
    /// The request body did not come: 408.
    TooSlow,
    /// The request cannot be forwarded: 400 or 501.
    Bad(StatusCode),
    /// The environment ended, broke off or cannot be reached: 502.
    Lost(Arc<str>),
}

/// Body of an answer. While it lives, its connection is not idle.
pub(super) struct Answer {
    content: Content,
    state: Option<Arc<State>>,
}

pub(super) enum Content {
    /// None when it was given away.
    Whole(Option<Bytes>),
    Reply(Reply),
}

impl Refusal {
    pub(super) fn response(&self, lambda: bool) -> Response<Content> {
        let (status, error_type, text) = match self {
            Self::TryAgain(again) if again.is_busy() => {
                (StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsException", again.to_string())
            }
            Self::TryAgain(again) => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", again.to_string()),
            Self::Full => {
                (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "too many connections are open".to_owned())
            }
            Self::TooLarge(limit) => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "RequestEntityTooLarge",
                format!("the payload is larger than {limit} bytes"),
            ),
            Self::TooSlow => {
                (StatusCode::REQUEST_TIMEOUT, "RequestTimeout", "the request body came too slowly".to_owned())
            }
            Self::Bad(status) => {
                let text = status.canonical_reason().unwrap_or("the request cannot be forwarded");
                (*status, "InvalidRequest", text.to_lowercase())
            }
            Self::Lost(reason) => {
                let text = format!("the function ended without an answer: {reason}");
                (StatusCode::BAD_GATEWAY, "Runtime.ExitError", text)
            }
        };
        let (kind, text) = if lambda {
            let json = serde_json::json!({ "errorMessage": text, "errorType": error_type });
            ("application/json", json.to_string())
        } else {
            ("text/plain; charset=utf-8", text + "\n")
        };
        let mut response = Response::new(Content::Whole(Some(Bytes::from(text))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::Full | Self::TooLarge(_) | Self::TooSlow | Self::Bad(_)) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn retry_after(&self) -> Option<u64> {
        match self {
            Self::TryAgain(again) => Some(again.retry_after_seconds()),
            Self::Full => Some(1),
            Self::TooLarge(_) | Self::TooSlow | Self::Bad(_) | Self::Lost(_) => None,
        }
    }
}

impl Answer {
    /// `state` of the connection becomes idle with the end of the answer.
    pub(super) fn new(content: Content, state: Option<Arc<State>>) -> Self {
        Self { content, state }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(state) = &self.state {
            state.enter(Phase::Idle);
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = ReplyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        match &mut self.content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Reply(reply) => reply.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Content::Reply(reply) => reply.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Content::Reply(reply) => reply.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::lease::Reason;
    use super::*;

    fn parts(refusal: &Refusal, lambda: bool) -> (u16, Option<String>, String) {
        let response = refusal.response(lambda);
        let retry = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
        let Content::Whole(Some(text)) = response.body() else { panic!("a text") };
        (response.status().as_u16(), retry, String::from_utf8(text.to_vec()).unwrap())
    }

    #[test]
    fn a_full_queue_is_429_and_a_replica_that_cannot_start_is_503() {
        let again = |reason| Refusal::TryAgain(TryAgain { reason, retry_after: Duration::from_millis(1500) });
        for (reason, status) in [
            (Reason::QueueFull, 429),
            (Reason::Deadline, 429),
            (Reason::CannotStart("no image".into()), 503),
            (Reason::ShuttingDown, 503),
        ] {
            let (said, retry, _) = parts(&again(reason.clone()), true);
            assert_eq!((said, retry.as_deref()), (status, Some("2")), "{reason:?}");
        }
        let (_, _, text) = parts(&again(Reason::CannotStart("no image".into())), false);
        assert_eq!(text, "no environment is available: none can start: no image\n");
    }

    #[test]
    fn an_exit_reason_is_told_in_lambdas_shape_on_its_path_and_as_text_elsewhere() {
        let lost = Refusal::Lost("exit status 137 (OOMKilled)".into());
        let (status, retry, json) = parts(&lost, true);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((status, retry), (502, None));
        assert_eq!(json["errorType"], "Runtime.ExitError");
        assert_eq!(json["errorMessage"], "the function ended without an answer: exit status 137 (OOMKilled)");
        let (_, _, text) = parts(&lost, false);
        assert_eq!(text, "the function ended without an answer: exit status 137 (OOMKilled)\n");
    }

    #[test]
    fn a_large_payload_is_named_as_lambdas_runtime_names_it() {
        let (status, _, json) = parts(&Refusal::TooLarge(6_291_556), true);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((status, json["errorType"].as_str()), (413, Some("RequestEntityTooLarge")));
    }
}
