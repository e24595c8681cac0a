//! The virtio-serial port to the node.
//!
//! The kernel lets a port be opened once. Reading gives 0 bytes while nobody has it open on the other side, writing fails
//! with "would block"; both come back to life when somebody opens it. Such a hang-up that ends again is not what tokio's
//! readiness is made for: it would report it for ever. So an epoll instance of our own stands between, which tells edges.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::sys::{Owned, polled};

/// One direction's edges.
struct Edges(AsyncFd<Owned<Epoll>>);

impl Edges {
    fn new(file: &File, flags: EpollFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(file.as_fd(), EpollEvent::new(flags | EpollFlags::EPOLLET, 0))?;
        Ok(Self(polled(epoll, Interest::READABLE)?))
    }

    /// Waits for the next edge; what it says is found out by trying.
    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let mut events = [EpollEvent::empty()];
            if self.0.get_ref().0.wait(&mut events, EpollTimeout::ZERO)? > 0 {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
        }
    }
}

/// How long the other side must be gone before that counts: a node that comes at once goes on where the last one was.
const HANG_UP: Duration = Duration::from_millis(200);

/// Who is on the other side. The kernel tells that beside the bytes, and may do so long after the first bytes of a node that
/// has just come: so it is no hang-up that nobody is there, before somebody was.
#[derive(Debug)]
enum Peer {
    /// Nobody, or somebody of whom the kernel has not told yet.
    Away,
    Here,
    /// Nobody any more; at that time it counts.
    Leaving(Pin<Box<Sleep>>),
}

/// The side that is read. A hang-up is one end of file; reading on waits for the next node.
pub(crate) struct PortReader {
    file: File,
    edges: Edges,
    peer: Peer,
}

/// The side that is written. While no node is there it waits.
pub(crate) struct PortWriter {
    file: File,
    edges: Edges,
}

/// Opens the port.
///
/// # Errors
/// What the kernel refused: it is open already, or there is none.
pub(crate) fn open(path: &Path) -> io::Result<(PortReader, PortWriter)> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file =
        std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true).write(true), flags).open(path)?;
    let reader =
        PortReader { file: file.try_clone()?, edges: Edges::new(&file, EpollFlags::EPOLLIN)?, peer: Peer::Away };
    let edges = Edges::new(&file, EpollFlags::EPOLLOUT)?;
    Ok((reader, PortWriter { file, edges }))
}

impl Peer {
    /// Bytes came. Once somebody was leaving they may be the next node's, of whom the kernel is still to tell.
    fn spoke(&mut self) {
        if matches!(self, Self::Leaving(_)) {
            *self = Self::Away;
        }
    }

    /// The kernel says that nobody is there: whether that has to be told, which is so once.
    fn is_gone(&mut self, cx: &mut Context<'_>) -> bool {
        if matches!(self, Self::Here) {
            *self = Self::Leaving(Box::pin(sleep(HANG_UP)));
        }
        let Self::Leaving(until) = self else { return false };
        let counts = until.as_mut().poll(cx).is_ready();
        if counts {
            *self = Self::Away;
        }
        counts
    }
}

impl AsyncRead for PortReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.file.read(buffer.initialize_unfilled()) {
                Ok(0) => {
                    if this.peer.is_gone(cx) {
                        return Poll::Ready(Ok(()));
                    }
                }
                Ok(read) => {
                    this.peer.spoke();
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                // Somebody is there, and says nothing.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => this.peer = Peer::Here,
                Err(error) => return Poll::Ready(Err(error)),
            }
            ready!(this.edges.poll_next(cx))?;
        }
    }
}

impl AsyncWrite for PortWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            match this.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
            ready!(this.edges.poll_next(cx))?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::time::advance;

    use super::*;

    /// What the kernel says, one after the other, and whether the reader is told of an end.
    async fn ends(peer: &mut Peer, after: Duration) -> bool {
        advance(after).await;
        peer.is_gone(&mut Context::from_waker(Waker::noop()))
    }

    const MOMENT: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn who_hangs_up_is_gone_after_a_while_and_once() {
        let mut peer = Peer::Here;
        peer.spoke();
        assert!(!ends(&mut peer, MOMENT).await);
        assert!(!ends(&mut peer, HANG_UP - MOMENT).await);
        assert!(ends(&mut peer, MOMENT).await);
        assert!(!ends(&mut peer, 2 * HANG_UP).await, "once is enough");
    }

    #[tokio::test(start_paused = true)]
    async fn who_speaks_before_the_kernel_tells_of_him_has_not_hung_up() {
        // The template's node has gone; the next one's first bytes are there before the news of him.
        for mut peer in [Peer::Away, Peer::Leaving(Box::pin(sleep(HANG_UP)))] {
            peer.spoke();
            assert!(!ends(&mut peer, MOMENT).await);
            assert!(!ends(&mut peer, 10 * HANG_UP).await, "{peer:?}");
        }
    }
}
