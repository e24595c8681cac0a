//! What is written on the host, as messages to the guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use lambdalet_proto::MAX_PIECE;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

/// Pieces on their way, each of at most [`MAX_PIECE`] bytes.
pub(super) const QUEUE: usize = 4;

/// One direction of a stream: pieces, then one end.
pub(super) struct Outlet<M> {
    messages: PollSender<M>,
    piece: fn(Bytes) -> M,
    end: fn() -> M,
}

// === impl Outlet ===

impl<M: Send + 'static> Outlet<M> {
    pub(super) fn new(messages: mpsc::Sender<M>, piece: fn(Bytes) -> M, end: fn() -> M) -> Self {
        Self { messages: PollSender::new(messages), piece, end }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, message: impl FnOnce() -> M) -> Poll<io::Result<()>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.messages.poll_reserve(cx)).map_err(gone)?;
        Poll::Ready(self.messages.send_item(message()).map_err(gone))
    }
}

impl<M: Send + 'static> AsyncWrite for Outlet<M> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (head, piece) = (&bytes[..bytes.len().min(MAX_PIECE)], self.piece);
        ready!(self.poll_send(cx, || piece(Bytes::copy_from_slice(head))))?;
        Poll::Ready(Ok(head.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.messages.is_closed() {
            return Poll::Ready(Ok(()));
        }
        let end = self.end;
        ready!(self.poll_send(cx, end))?;
        self.messages.close();
        Poll::Ready(Ok(()))
    }
}
