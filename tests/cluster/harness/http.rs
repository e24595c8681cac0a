//! Plain HTTP/1.1 to what runs in a Pod, or to fakecloud.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Sends one request to `address` (`host:port`) over a connection of its own.
pub(crate) async fn send(
    address: &str,
    request: http::request::Builder,
    body: impl Into<Bytes>,
    within: Duration,
) -> Result<Answer, String> {
    let exchange = async {
        let stream = TcpStream::connect(address).await.map_err(|e| format!("connecting to {address}: {e}"))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        let driver = tokio::spawn(connection);
        let request: Request<Full<Bytes>> =
            request.header("host", address).body(Full::new(body.into())).map_err(|e| e.to_string())?;
        let answer = sender.send_request(request).await.map_err(|e| format!("asking {address}: {e}"))?;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.map_err(|e| format!("reading from {address}: {e}"))?.to_bytes();
        driver.abort();
        Ok(Answer { status: head.status, headers: head.headers, body })
    };
    match tokio::time::timeout(within, exchange).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("no answer from {address} within {within:?}")),
    }
}

/// GET, with a short deadline.
pub(crate) async fn get(address: &str, path: &str) -> Result<Answer, String> {
    send(address, Request::get(path), Bytes::new(), Duration::from_secs(5)).await
}
