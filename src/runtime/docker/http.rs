//! Requests to the daemon's socket that the client library cannot make as we need them: logs by the nanosecond and by
//! the frame, events without its closed enums, pulls with credentials in the encoding Docker reads, connections that
//! become the streams of a process.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, Either, join, select};
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use http_body_util::{Empty, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, upgrade};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{ANSWER_TIMEOUT, failure};
use crate::runtime::{Kind, Result, RuntimeError};

/// Longest JSON line that is read (an event carries every label of its object).
const LONGEST_LINE: usize = 1 << 20;
/// Most of an error's body that is read.
const LONGEST_ERROR: usize = 64 << 10;

/// An answer's body. It owns the connection and drives it: reading is what moves it, so a reader that stops makes the
/// daemon wait.
pub(super) struct Body {
    connection: Option<BoxFuture<'static, hyper::Result<()>>>,
    incoming: Incoming,
}

impl Stream for Body {
    type Item = hyper::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(connection) = &mut this.connection
            && connection.poll_unpin(cx).is_ready()
        {
            // Its failure shows in the body too.
            this.connection = None;
        }
        loop {
            return match Pin::new(&mut this.incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Poll::Ready(Some(Ok(data))),
                    Err(_trailers) => continue,
                },
                Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            };
        }
    }
}

/// One request on a connection of its own; the answer's body if its status says success.
///
/// # Errors
/// By status code with Docker's words, or [`Kind::Unavailable`]. `tried` begins the message.
pub(super) async fn request(
    socket: &Path,
    tried: &str,
    method: Method,
    target: &str,
    registry_auth: Option<&str>,
) -> Result<Body> {
    let unavailable = |error: Box<dyn std::error::Error + Send + Sync>| {
        RuntimeError::new(Kind::Unavailable, tried).with_source(error)
    };
    let mut request = Request::builder().method(method).uri(target).header("host", "docker");
    if let Some(auth) = registry_auth {
        request = request.header("x-registry-auth", auth);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| RuntimeError::new(Kind::Invalid, tried).with_source(error))?;
    let io = UnixStream::connect(socket).await.map_err(|error| unavailable(error.into()))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(io)).await.map_err(|error| unavailable(error.into()))?;
    let answer = async move {
        match select(connection.boxed(), sender.send_request(request).boxed()).await {
            Either::Left((ended, answer)) => {
                ended?;
                Ok((None, answer.await?))
            }
            Either::Right((answer, connection)) => Ok((Some(connection), answer?)),
        }
    };
    let answer: hyper::Result<_> =
        timeout(Duration::from_secs(ANSWER_TIMEOUT), answer).await.map_err(|elapsed| unavailable(elapsed.into()))?;
    let (connection, response) = answer.map_err(|error| unavailable(error.into()))?;
    let (head, incoming) = response.into_parts();
    let body = Body { connection, incoming };
    if head.status.is_success() {
        return Ok(body);
    }
    let words = error_words(body).await;
    Err(RuntimeError::new(failure::of_status(head.status.as_u16()), format!("{tried}: {words}")))
}

/// A connection that the daemon has handed over: from here on it carries the streams of a process.
pub(super) struct Hijacked {
    pub(super) socket: UnixStream,
    /// What came together with the answer's head.
    pub(super) ahead: Bytes,
}

/// One POST whose connection becomes a stream of bytes.
///
/// # Errors
/// As [`request`].
pub(super) async fn hijack(socket: &Path, tried: &str, target: &str, json: &'static str) -> Result<Hijacked> {
    let unavailable = |error: Box<dyn std::error::Error + Send + Sync>| {
        RuntimeError::new(Kind::Unavailable, tried).with_source(error)
    };
    let request = Request::post(target)
        .header("host", "docker")
        .header("content-type", "application/json")
        .header("connection", "Upgrade")
        .header("upgrade", "tcp")
        .body(Full::<Bytes>::from(json))
        .map_err(|error| RuntimeError::new(Kind::Invalid, tried).with_source(error))?;
    let io = UnixStream::connect(socket).await.map_err(|error| unavailable(error.into()))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(io)).await.map_err(|error| unavailable(error.into()))?;
    // The sender goes with this future, and with the sender the connection ends unless it was upgraded.
    let exchange = async move {
        let mut response = sender.send_request(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return upgrade::on(&mut response).await.map(Ok);
        }
        let (head, incoming) = response.into_parts();
        Ok(Err((head.status, error_words(Body { connection: None, incoming }).await)))
    };
    let both = timeout(Duration::from_secs(ANSWER_TIMEOUT), join(connection.with_upgrades(), exchange));
    let (_, answer): (_, hyper::Result<_>) = both.await.map_err(|elapsed| unavailable(elapsed.into()))?;
    let upgraded = match answer.map_err(|error| unavailable(error.into()))? {
        Ok(upgraded) => upgraded,
        Err((status, words)) => {
            return Err(RuntimeError::new(failure::of_status(status.as_u16()), format!("{tried}: {words}")));
        }
    };
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| RuntimeError::new(Kind::Internal, format!("{tried}: not the connection that was made")))?;
    Ok(Hijacked { socket: parts.io.into_inner(), ahead: parts.read_buf })
}

async fn error_words(body: Body) -> String {
    #[derive(serde::Deserialize)]
    struct Message {
        message: String,
    }
    let read = body.try_fold(BytesMut::new(), |mut all, part| async move {
        let room = LONGEST_ERROR.saturating_sub(all.len());
        all.extend_from_slice(&part[..part.len().min(room)]);
        Ok(all)
    });
    let bytes = read.await.unwrap_or_default();
    match serde_json::from_slice::<Message>(&bytes) {
        Ok(body) => body.message,
        Err(_) => String::from_utf8_lossy(&bytes).trim().to_owned(),
    }
}

/// A body of JSON values, one to a line.
pub(super) fn json_lines<T: DeserializeOwned + Send + 'static>(
    body: Body,
    tried: &'static str,
) -> BoxStream<'static, Result<T>> {
    let lines = stream::try_unfold((body, BytesMut::new()), move |(mut body, mut buffer)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let value = serde_json::from_slice(&line)
                    .map_err(|error| RuntimeError::new(Kind::Internal, tried).with_source(error))?;
                return Ok(Some((value, (body, buffer))));
            }
            if buffer.len() > LONGEST_LINE {
                return Err(RuntimeError::new(
                    Kind::Internal,
                    format!("{tried}: a line is longer than {LONGEST_LINE}"),
                ));
            }
            match body.next().await {
                Some(Ok(part)) => buffer.extend_from_slice(&part),
                Some(Err(error)) => return Err(RuntimeError::new(Kind::Unavailable, tried).with_source(error)),
                None => return Ok(None),
            }
        }
    });
    lines.boxed()
}

/// `text` as one value in a query.
pub(super) fn query_value(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}

/// The process that listens on the socket, if the kernel tells.
pub(super) async fn peer_pid(socket: &Path) -> Option<u32> {
    let pid = UnixStream::connect(socket).await.ok()?.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_value_is_encoded() {
        assert_eq!(query_value("a{\"b c\":1}/~"), "a%7B%22b%20c%22%3A1%7D%2F~");
    }
}
