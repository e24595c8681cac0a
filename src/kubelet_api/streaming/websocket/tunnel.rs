//! A byte stream in the binary messages of a WebSocket, as port-forward has it for SPDY (KEP-4006).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::config;
use crate::kubelet_api::streaming::upgrade::Joined;

/// Most bytes in one message.
const MESSAGE: usize = 64 << 10;

/// The byte stream.
pub(in crate::kubelet_api) struct Tunnel {
    socket: WebSocketStream<Joined>,
    /// What is left of the message being read.
    rest: Bytes,
    ended: bool,
}

impl Tunnel {
    /// The tunnel through this connection.
    pub(in crate::kubelet_api) async fn through(joined: Joined) -> Self {
        let socket = WebSocketStream::from_raw_socket(joined, Role::Server, Some(config())).await;
        Self { socket, rest: Bytes::new(), ended: false }
    }

    fn socket(self: Pin<&mut Self>) -> Pin<&mut WebSocketStream<Joined>> {
        Pin::new(&mut self.get_mut().socket)
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.rest.is_empty() && !self.ended {
            match ready!(self.as_mut().socket().poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a text message in a tunnel")));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => self.ended = true,
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
            }
        }
        let taken = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..taken]);
        self.rest.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.as_mut().socket().poll_ready(cx)).map_err(to_io)?;
        let taken = bytes.len().min(MESSAGE);
        let message = Message::Binary(Bytes::copy_from_slice(&bytes[..taken]));
        self.socket().start_send(message).map_err(to_io)?;
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_flush(cx).map_err(to_io)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_close(cx).map_err(to_io)
    }
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}
