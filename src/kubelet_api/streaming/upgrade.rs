//! From an HTTP request to a connection of another protocol: which one the client wants, the answer, the socket.

use std::io::Cursor;
use std::sync::{Mutex, PoisonError};

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, Method, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, BufReader, Chain, Join, ReadHalf, WriteHalf, join, split};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::either::Either;

use super::idle::HangUp;

const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// A connection as the node's API has it.
type Tls = TlsStream<BufReader<TcpStream>>;
/// And as the [plain server](super::plain) has it.
type Wire = Either<Tls, TcpStream>;
/// The side of a client's socket that is read: first what came with the request.
pub(in crate::kubelet_api) type Reader = Chain<Cursor<Bytes>, ReadHalf<Wire>>;
/// The side that is written.
pub(in crate::kubelet_api) type Writer = WriteHalf<Wire>;
/// Both sides as one.
pub(in crate::kubelet_api) type Joined = Join<Reader, Writer>;

/// A client's socket after the upgrade.
pub(in crate::kubelet_api) struct Socket {
    pub(in crate::kubelet_api) reader: Reader,
    pub(in crate::kubelet_api) writer: Writer,
    pub(in crate::kubelet_api) hang_up: HangUp,
}

impl Socket {
    fn new(upgraded: Upgraded) -> Option<Self> {
        let (wire, read_already) = match upgraded.downcast::<TokioIo<Tls>>() {
            Ok(parts) => (Wire::Left(parts.io.into_inner()), parts.read_buf),
            Err(upgraded) => {
                // Nothing else is served.
                let parts = upgraded.downcast::<TokioIo<TcpStream>>().ok()?;
                (Wire::Right(parts.io.into_inner()), parts.read_buf)
            }
        };
        let hang_up = HangUp::of(Some(match &wire {
            Wire::Left(tls) => tls.get_ref().0.get_ref(),
            Wire::Right(tcp) => tcp,
        }));
        let (reader, writer) = split(wire);
        Some(Self { reader: Cursor::new(read_already).chain(reader), writer, hang_up })
    }

    /// Both sides as one, and the eye on it.
    pub(in crate::kubelet_api) fn joined(self) -> (Joined, HangUp) {
        (join(self.reader, self.writer), self.hang_up)
    }
}

/// What becomes of a connection once its request is answered with 101. The task that serves the connection takes it
/// and does it, so that it ends with the connection's place and with the server.
#[derive(Default)]
pub(in crate::kubelet_api) struct Handover(Mutex<Option<BoxFuture<'static, ()>>>);

impl Handover {
    fn put(&self, work: BoxFuture<'static, ()>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(work);
    }

    /// What is to be done, if the connection was upgraded.
    pub(in crate::kubelet_api) fn take(&self) -> Option<BoxFuture<'static, ()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Why a connection is not upgraded. `Display` is the answer's body.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::kubelet_api) enum UpgradeError {
    #[error("upgrade request required: this endpoint speaks SPDY/3.1 or WebSocket")]
    Required,
    #[error("unable to upgrade: header X-Stream-Protocol-Version does not name a protocol")]
    NoProtocol,
    #[error("unable to upgrade: unable to negotiate protocol: client supports {client:?}, server accepts {server:?}")]
    Protocol { client: Vec<String>, server: Vec<&'static str> },
    #[error("unable to upgrade: a WebSocket handshake is a GET with Sec-WebSocket-Version 13 and a Sec-WebSocket-Key")]
    Handshake,
}

impl IntoResponse for UpgradeError {
    fn into_response(self) -> Response {
        let text = format!("{self}\n");
        match self {
            Self::Protocol { server, .. } => {
                let mut response = (StatusCode::FORBIDDEN, text).into_response();
                for name in server.iter().filter_map(|name| name.parse().ok()) {
                    response.headers_mut().append(ACCEPTED_PROTOCOLS, name);
                }
                response
            }
            Self::Required | Self::NoProtocol | Self::Handshake => (StatusCode::BAD_REQUEST, text).into_response(),
        }
    }
}

/// What a client wants and may have.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::kubelet_api) enum Upgrade {
    /// SPDY with the stream protocol that was agreed on.
    Spdy(&'static str),
    /// WebSocket with the subprotocol that was agreed on, possibly none (""), and the proof for the handshake.
    WebSocket(&'static str, String),
}

impl Upgrade {
    /// Reads a request. Of the protocols that the client names, in its order, the first that is served is taken.
    pub(in crate::kubelet_api) fn negotiate(
        request: &Request,
        spdy: &'static [&'static str],
        websocket: &'static [&'static str],
    ) -> Result<Self, UpgradeError> {
        let headers = request.headers();
        if !words(headers, &header::CONNECTION).iter().any(|word| word.eq_ignore_ascii_case("upgrade")) {
            return Err(UpgradeError::Required);
        }
        let wanted = words(headers, &header::UPGRADE);
        if wanted.iter().any(|word| word.eq_ignore_ascii_case("websocket")) {
            return Self::websocket(request, websocket);
        }
        if !wanted.iter().any(|word| word.eq_ignore_ascii_case(SPDY)) {
            return Err(UpgradeError::Required);
        }
        let client = words(headers, &STREAM_PROTOCOL);
        if client.is_empty() {
            return Err(UpgradeError::NoProtocol);
        }
        choose(client, spdy).map(Self::Spdy)
    }

    fn websocket(request: &Request, served: &'static [&'static str]) -> Result<Self, UpgradeError> {
        let headers = request.headers();
        let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or(UpgradeError::Handshake)?;
        let version = headers.get(header::SEC_WEBSOCKET_VERSION).map(|version| version.as_bytes());
        if request.method() != Method::GET || version != Some(b"13") {
            return Err(UpgradeError::Handshake);
        }
        let mut client = words(headers, &header::SEC_WEBSOCKET_PROTOCOL);
        if client.is_empty() {
            client.push(String::new());
        }
        Ok(Self::WebSocket(choose(client, served)?, derive_accept_key(key.as_bytes())))
    }

    /// The answer 101.
    fn answer(&self) -> Response {
        let mut response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
        response = response.header(header::CONNECTION, "Upgrade");
        response = match self {
            Self::Spdy(protocol) => response.header(header::UPGRADE, SPDY).header(STREAM_PROTOCOL, *protocol),
            Self::WebSocket(protocol, accept) => {
                let response =
                    response.header(header::UPGRADE, "websocket").header(header::SEC_WEBSOCKET_ACCEPT, accept);
                if protocol.is_empty() { response } else { response.header(header::SEC_WEBSOCKET_PROTOCOL, *protocol) }
            }
        };
        response.body(Body::empty()).unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
    }

    /// Answers 101 and leaves `work` for the connection's task.
    pub(in crate::kubelet_api) fn hand_over<F>(
        self,
        hold: Hold,
        work: impl FnOnce(Self, Socket) -> F + Send + 'static,
    ) -> Response
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let answer = self.answer();
        hold.handover.put(Box::pin(async move {
            // The client left in between.
            let Ok(upgraded) = hold.upgrade.await else { return };
            if let Some(socket) = Socket::new(upgraded) {
                work(self, socket).await;
            }
        }));
        answer
    }
}

/// What an upgrade needs of its request.
pub(in crate::kubelet_api) struct Hold {
    upgrade: OnUpgrade,
    handover: std::sync::Arc<Handover>,
}

impl Hold {
    /// Takes it out of the request; `None` if the connection cannot be upgraded (HTTP/1.0).
    pub(in crate::kubelet_api) fn of(request: &mut Request) -> Option<Self> {
        let extensions = request.extensions_mut();
        Some(Self { upgrade: extensions.remove()?, handover: extensions.remove()? })
    }
}

/// The words of a header that may come in several lines and is cut at commas.
fn words(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
    let words = lines.flat_map(|line| line.split(',')).map(str::trim);
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn choose(client: Vec<String>, served: &'static [&'static str]) -> Result<&'static str, UpgradeError> {
    let known = |name: &String| served.iter().find(|served| *served == name).copied();
    match client.iter().find_map(known) {
        Some(chosen) => Ok(chosen),
        None => Err(UpgradeError::Protocol { client, server: served.to_vec() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVED: &[&str] = &["v4.channel.k8s.io", "channel.k8s.io"];
    const SOCKETS: &[&str] = &["", "v5.channel.k8s.io", "v4.channel.k8s.io"];

    fn request(headers: &[(&str, &str)]) -> Request {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    }

    fn negotiate(headers: &[(&str, &str)]) -> Result<Upgrade, UpgradeError> {
        Upgrade::negotiate(&request(headers), SERVED, SOCKETS)
    }

    #[test]
    fn of_the_clients_protocols_the_first_that_is_served_is_taken() {
        let spdy = [("connection", "keep-alive, Upgrade"), ("upgrade", "spdy/3.1")];
        let with = |more: &[(&'static str, &'static str)]| negotiate(&[&spdy[..], more].concat());
        let (v5, v4, v1) = ("v5.channel.k8s.io", "v4.channel.k8s.io", "channel.k8s.io");
        let name = "x-stream-protocol-version";
        assert_eq!(with(&[(name, v5), (name, v4), (name, v1)]), Ok(Upgrade::Spdy(v4)));
        assert_eq!(with(&[(name, "channel.k8s.io, v4.channel.k8s.io")]), Ok(Upgrade::Spdy(v1)));
        assert_eq!(with(&[]), Err(UpgradeError::NoProtocol));
        let refused = with(&[(name, v5)]).unwrap_err().into_response();
        assert_eq!(refused.status(), StatusCode::FORBIDDEN);
        assert_eq!(refused.headers().get_all(ACCEPTED_PROTOCOLS).iter().collect::<Vec<_>>(), SERVED);
    }

    #[test]
    fn a_websocket_proves_the_handshake() {
        let base = [
            ("connection", "Upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-version", "13"),
            // The example of RFC 6455, section 1.3.
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned();
        assert_eq!(negotiate(&base), Ok(Upgrade::WebSocket("", accept.clone())));
        let v5 = [&base[..], &[("sec-websocket-protocol", "v5.channel.k8s.io,v4.channel.k8s.io")]].concat();
        assert_eq!(negotiate(&v5), Ok(Upgrade::WebSocket("v5.channel.k8s.io", accept)));
        assert_eq!(negotiate(&base[..3]), Err(UpgradeError::Handshake));
        let other = [&base[..], &[("sec-websocket-protocol", "mqtt")]].concat();
        assert!(matches!(negotiate(&other), Err(UpgradeError::Protocol { .. })));
    }

    #[test]
    fn what_is_no_upgrade_is_told_so() {
        assert_eq!(negotiate(&[]), Err(UpgradeError::Required));
        assert_eq!(negotiate(&[("connection", "close"), ("upgrade", "SPDY/3.1")]), Err(UpgradeError::Required));
        assert_eq!(negotiate(&[("connection", "upgrade"), ("upgrade", "h2c")]), Err(UpgradeError::Required));
    }
}
