//! Answers as the API server gives them.

use std::convert::Infallible;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::store::Refusal;

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

pub(super) fn success(object: &Value) -> Answer {
    Response::new(Full::from(object.to_string()).boxed_unsync())
}

pub(super) fn failure(code: StatusCode, reason: &str, message: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(), "reason": reason,
        "message": message,
    });
    Response::builder().status(code).body(Full::from(status.to_string()).boxed_unsync()).unwrap()
}

pub(super) fn result(result: Result<Value, Refusal>) -> Answer {
    match result {
        Ok(object) => success(&object),
        Err(refusal) => failure(refusal.code, refusal.reason, &refusal.message),
    }
}

/// A watch that says one thing and ends.
pub(super) fn line(event: &Value) -> Answer {
    Response::new(Full::from(format!("{event}\n")).boxed_unsync())
}

/// A watch.
pub(super) fn lines(events: impl Stream<Item = Value> + Send + 'static) -> Answer {
    let frames = events.map(|event| Ok(hyper::body::Frame::data(Bytes::from(format!("{event}\n")))));
    Response::new(StreamBody::new(frames).boxed_unsync())
}

/// A token good for an hour.
pub(super) fn token() -> Answer {
    let now = Timestamp::now().as_second();
    let claims = URL_SAFE_NO_PAD.encode(json!({ "iat": now, "exp": now + 3600 }).to_string());
    let status = json!({ "token": format!("h.{claims}.s"), "expirationTimestamp": "2100-01-01T00:00:00Z" });
    success(&json!({
        "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {}, "spec": { "audiences": [] },
        "status": status,
    }))
}
