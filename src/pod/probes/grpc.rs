//! `grpc.health.v1.Health/Check` as a client: one unary call over HTTP/2, without TLS.
//!
//! The request has one field (1, the service's name) and the answer one (1, an enum of which 1 is SERVING), see "GRPC
//! Health Checking Protocol" of the gRPC project; a stub generator for that would be more code than this.

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request};

use super::action::PROBE_AGENT;
use super::http::dial;
use crate::telemetry::chain;

/// The status of a server that takes calls.
const SERVING: u64 = 1;
/// gRPC's codes that have words of their own here (`google/rpc/code.proto`).
const UNIMPLEMENTED: i32 = 12;
/// Most of an answer that is read, in bytes; a health answer has two.
const LONGEST: usize = 4 << 10;

/// Asks; the error says why it does not serve.
pub(super) async fn check(host: &str, port: u16, service: &str) -> Result<(), String> {
    let stream = dial(host, port).await?;
    let handshake = h2::client::handshake(stream).await;
    let (sender, connection) =
        handshake.map_err(|error| format!("error: health rpc probe failed: {}", chain(&error)))?;
    let mut connection = Box::pin(connection);
    let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let mut call = std::pin::pin!(call(sender, &authority, service));
    tokio::select! {
        biased;
        // Both are polled until the answer is there, and dropped together.
        answer = &mut call => answer,
        // What it ended with, the call says in its own words; it is told by the drop.
        _ = &mut connection => {
            drop(connection);
            call.await
        }
    }
}

async fn call(sender: SendRequest<Bytes>, authority: &str, service: &str) -> Result<(), String> {
    let answer = unary(sender, authority, service).await;
    let (headers, message) = answer.map_err(|error| format!("error: health rpc probe failed: {}", chain(&error)))?;
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let code = text("grpc-status").and_then(|code| code.parse().ok());
    match code {
        Some(0) => {}
        Some(UNIMPLEMENTED) => {
            let words = "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)";
            return Err(format!("{words}: {}", text("grpc-message").unwrap_or_default()));
        }
        Some(code) => {
            let words = text("grpc-message").unwrap_or_default();
            return Err(format!("error: health rpc probe failed: rpc error: code = {code} desc = {words}"));
        }
        None => return Err("error: health rpc probe failed: the answer has no grpc-status".to_owned()),
    }
    match status(&message) {
        Some(SERVING) => Ok(()),
        Some(status) => Err(format!("service unhealthy (responded with {:?})", name(status))),
        None => Err("error: health rpc probe failed: the answer is no HealthCheckResponse".to_owned()),
    }
}

/// The call; the headers that hold its status, and its message with the prefix.
async fn unary(sender: SendRequest<Bytes>, authority: &str, service: &str) -> Result<(HeaderMap, Vec<u8>), h2::Error> {
    let mut sender = sender.ready().await?;
    let request = Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", PROBE_AGENT)
        .body(())
        // An authority that is none is the server's fault as much as ours.
        .map_err(|_| h2::Error::from(h2::Reason::PROTOCOL_ERROR))?;
    let (answer, mut body) = sender.send_request(request, false)?;
    body.send_data(message(service), true)?;
    let (head, mut body) = answer.await?.into_parts();
    let mut message = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        message.extend_from_slice(&piece[..piece.len().min(LONGEST - message.len())]);
    }
    let trailers = body.trailers().await?;
    // A server that fails at once says so where others say nothing yet.
    Ok((trailers.unwrap_or(head.headers), message))
}

/// A HealthCheckRequest with its length before it.
fn message(service: &str) -> Bytes {
    let mut request = BytesMut::new();
    if !service.is_empty() {
        request.put_u8(1 << 3 | 2);
        let mut length = service.len();
        while length >= 0x80 {
            request.put_u8((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        request.put_u8(length as u8);
        request.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(request.len() + 5);
    framed.put_u8(0);
    framed.put_u32(request.len() as u32);
    framed.put_slice(&request);
    framed.freeze()
}

/// The status of a HealthCheckResponse with its length before it.
fn status(framed: &[u8]) -> Option<u64> {
    let (prefix, rest) = framed.split_at_checked(5)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    let mut message = rest.get(..usize::try_from(length).ok()?).filter(|_| prefix[0] == 0)?;
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match (key >> 3, key & 7) {
            (1, 0) => status = varint(&mut message)?,
            (_, 0) => drop(varint(&mut message)?),
            (_, 2) => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            (_, 1) => message = message.get(8..)?,
            (_, 5) => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn name(status: u64) -> &'static str {
    match status {
        0 => "UNKNOWN",
        2 => "NOT_SERVING",
        3 => "SERVICE_UNKNOWN",
        _ => "another status",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    /// Answers one call with this message and status, and checks what was asked.
    async fn asked(reply: &'static [u8], code: &'static str, service: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let answer = async {
                let mut body = request.into_body();
                let sent = body.data().await.unwrap().unwrap();
                assert_eq!(sent, message(service));
                let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
                stream.send_data(Bytes::from_static(reply), false).unwrap();
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", code.parse().unwrap());
                stream.send_trailers(trailers).unwrap();
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = answer => {}
                _ = connection.accept() => {}
            }
        };
        tokio::select! {
            answer = check("127.0.0.1", port, service) => answer,
            () = serve => panic!("the server ended first"),
        }
    }

    #[tokio::test]
    async fn only_serving_is_healthy() {
        assert_eq!(asked(&[0, 0, 0, 0, 2, 8, 1], "0", "s").await, Ok(()));
        let not = asked(&[0, 0, 0, 0, 2, 8, 2], "0", "").await.unwrap_err();
        assert_eq!(not, "service unhealthy (responded with \"NOT_SERVING\")");
        let unknown = asked(&[0, 0, 0, 0, 0], "0", "").await.unwrap_err();
        assert!(unknown.contains("UNKNOWN"), "{unknown}");
        let absent = asked(&[], "12", "").await.unwrap_err();
        assert!(absent.contains("does not implement"), "{absent}");
        let other = asked(&[], "5", "nobody").await.unwrap_err();
        assert!(other.contains("code = 5"), "{other}");
    }

    #[tokio::test]
    async fn what_speaks_no_http2_is_unhealthy() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let hang_up = async { drop(listener.accept().await.unwrap()) };
        let (answer, ()) = tokio::join!(check("127.0.0.1", port, ""), hang_up);
        assert!(answer.unwrap_err().starts_with("error: health rpc probe failed"));
    }

    proptest! {
        #[test]
        fn whatever_is_answered_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = status(&bytes);
        }
    }
}
