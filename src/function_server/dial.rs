//! A gRPC channel over exactly one connection, that says when the connection is gone.
//!
//! A channel of tonic connects again by itself and tells nobody. Here a lost connection stays lost, since whoever is at
//! the other end then may know nothing of what the one before was told.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Channel, Endpoint};

use crate::runtime::session::Duplex;

/// A silent peer is asked whether it is there so often, and has as long to say so.
const ALIVE_PAUSE: Duration = Duration::from_secs(20);
/// Bytes of the headers of one answer.
const MAX_HEADERS: u32 = 16 << 10;

/// A channel, and its connection's end.
pub(super) struct Line {
    /// Once the connection is gone each call fails.
    pub(super) channel: Channel,
    /// Cancelled when the connection is gone.
    pub(super) gone: CancellationToken,
}

/// Connects to a gRPC server.
///
/// # Errors
/// It does not answer, or does not show a certificate of an authority and this name.
pub(super) async fn dial(host: &str, port: u16, tls: Option<ClientConfig>) -> io::Result<Line> {
    let tcp = TcpStream::connect((host, port)).await?;
    tcp.set_nodelay(true)?;
    let io: Pin<Box<dyn Duplex>> = match tls {
        None => Box::pin(tcp),
        Some(config) => {
            let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
            Box::pin(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
        }
    };
    let gone = CancellationToken::new();
    let mut io = Some(TokioIo::new(Watched { io, _gone: gone.clone().drop_guard() }));
    let connector = tower::service_fn(move |_| {
        std::future::ready(io.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted)))
    });
    // The name is for messages; what is connected is what is above.
    let endpoint = Endpoint::from_static("http://resource-manager")
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keep_alive_interval(ALIVE_PAUSE)
        .keep_alive_timeout(ALIVE_PAUSE)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect_with_connector(connector).await.map_err(io::Error::other)?;
    Ok(Line { channel, gone })
}

/// A stream that tells its end.
struct Watched {
    io: Pin<Box<dyn Duplex>>,
    _gone: DropGuard,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_shutdown(cx)
    }
}
