//! One HTTP/1.1 connection to an environment, driven by the call that uses it.
//!
//! A connection that a task of its own drives would cost each call two changes of task. So it has none: whoever holds
//! the [`Wire`] polls it, with the task of the client's connection, and in between nobody does.
//!
//! All that happens on a wire happens in [`Wire::drive`]. So only the socket may wake a task: what drives a wire need not
//! be woken by the response that it has just read itself, and an idle wire wakes nobody.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::pin::{Pin, pin};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::connection::prepare;
use super::upload::Upload;

/// Most bytes read ahead of a slow client, and of a response head.
const BUFFER: usize = 64 << 10;

/// A connection, and the right to send on it.
pub(super) struct Wire(Box<Inner>);

struct Inner {
    /// The socket once more, to look at it when nobody has driven the wire for a while.
    socket: OwnedFd,
    sender: SendRequest<Upload>,
    /// None once it ended, unless it became another protocol's.
    connection: Option<Connection<TokioIo<TcpStream>, Upload>>,
    ended: bool,
}

impl Wire {
    /// Connects within `patience`.
    pub(super) async fn connect(address: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = timeout(patience, TcpStream::connect(address)).await??;
        prepare(&stream)?;
        let socket = stream.as_fd().try_clone_to_owned()?;
        let handshake = Builder::new().max_buf_size(BUFFER).handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(io::Error::other)?;
        Ok(Self(Box::new(Inner { socket, sender, connection: Some(connection), ended: false })))
    }

    /// Reads and writes what is there to be read and written.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        let Inner { connection, ended, .. } = &mut *self.0;
        if !*ended && let Some(connection) = connection {
            // What goes wrong is told to the call, through its response or that one's body.
            *ended = Pin::new(connection).poll(cx).is_ready();
        }
    }

    /// Brings it to rest after an answer: from then on it wakes nobody. Says whether it can take another request.
    pub(super) fn rest(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        !self.0.ended && self.0.sender.is_ready()
    }

    /// Whether the other side has closed it, or said something unasked, since it came to rest. Asks the kernel, because
    /// the runtime may not have looked at its sockets yet: some servers close without saying so in their answer, and a
    /// request sent after that would be lost.
    pub(super) fn is_stale(&self) -> bool {
        let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.0.socket.as_raw_fd(), &mut [0], look) != Err(Errno::EAGAIN)
    }

    /// Sends a request and waits for the head of the response. The request comes back with the error if none of it was
    /// taken. Not cancel-safe: dropped half-way, the wire is of no more use.
    pub(super) async fn send(
        &mut self,
        request: Request<Upload>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Upload>>> {
        let mut response = pin!(self.0.sender.try_send_request(request));
        poll_fn(|cx| {
            self.drive(cx);
            let look = &mut Context::from_waker(Waker::noop());
            let mut polled = response.as_mut().poll(look);
            if polled.is_pending() && self.0.ended {
                // It ended before it took the request; letting go of it gives the request back.
                self.0.connection = None;
                polled = response.as_mut().poll(look);
            }
            polled
        })
        .await
    }

    /// The connection after it became another protocol's, and what of that was already read.
    pub(super) fn into_stream(self) -> Option<(TcpStream, Bytes)> {
        let parts = self.0.connection?.into_parts();
        Some((parts.io.into_inner(), parts.read_buf))
    }
}
