//! A connection that became another protocol's (RFC 9110, 7.8), such as a WebSocket: bytes both ways until both are done.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tracing::debug;

use super::call::Peer;
use super::lease::{Lease, Outcome};
use super::wire::Wire;
use crate::telemetry::chain;

/// The environment's side: first what was read with the answer's head, then what comes.
struct Rest {
    read: Bytes,
    stream: TcpStream,
}

/// Carries bytes in the background, with the lease and the client's place held, until both sides have ended, one breaks,
/// or the environment is lost.
pub(super) fn spawn(peer: Arc<Peer>, upgrade: OnUpgrade, wire: Wire, lease: Lease) {
    let background = peer.shared.background.clone();
    background.spawn(async move {
        let _place = &peer;
        let environment = lease.environment().clone();
        let outcome = tokio::select! {
            // Not cancel-safe, and need not be: both connections end with it.
            outcome = carry(upgrade, wire) => outcome,
            // Cancel-safe: it stays lost.
            lost = environment.lost() => Outcome::Lost(lost.reason),
        };
        lease.finish(outcome);
    });
}

async fn carry(upgrade: OnUpgrade, wire: Wire) -> Outcome {
    // The client's side is handed over when it has the answer's head.
    let (client, Some((stream, read))) = (upgrade.await, wire.into_stream()) else { return Outcome::Answered };
    let Ok(client) = client else { return Outcome::ClientGone };
    let mut client = TokioIo::new(client);
    if let Err(cause) = copy_bidirectional(&mut client, &mut Rest { read, stream }).await {
        debug!(error = chain(&cause), "an upgraded connection broke off");
    }
    Outcome::Answered
}

impl AsyncRead for Rest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..length]);
        self.read.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
