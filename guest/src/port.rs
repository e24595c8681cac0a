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

/// How long the other side must be gone before that counts. The kernel tells of a hang-up beside the bytes, and may do so
/// after the first bytes of the next node have come.
const HANG_UP: Duration = Duration::from_millis(200);

/// The side that is read. A hang-up is one end of file; reading on waits for the next node.
pub(crate) struct PortReader {
    file: File,
    edges: Edges,
    away: bool,
    hanging: Option<Pin<Box<Sleep>>>,
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
    let reader = PortReader {
        file: file.try_clone()?,
        edges: Edges::new(&file, EpollFlags::EPOLLIN)?,
        away: true,
        hanging: None,
    };
    let edges = Edges::new(&file, EpollFlags::EPOLLOUT)?;
    Ok((reader, PortWriter { file, edges }))
}

impl AsyncRead for PortReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.file.read(buffer.initialize_unfilled()) {
                Ok(0) if this.away => {}
                Ok(0) => {
                    let hanging = this.hanging.get_or_insert_with(|| Box::pin(sleep(HANG_UP)));
                    if hanging.as_mut().poll(cx).is_ready() {
                        (this.away, this.hanging) = (true, None);
                        return Poll::Ready(Ok(()));
                    }
                }
                Ok(read) => {
                    (this.away, this.hanging) = (false, None);
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                // Somebody is there, and says nothing.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (this.away, this.hanging) = (false, None),
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
