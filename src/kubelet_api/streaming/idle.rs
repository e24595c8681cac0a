//! Connections on which nothing happens any more, clients that left while they were being waited for, and those that
//! have not yet got all.

use std::ffi::c_int;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::libc::TIOCOUTQ;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::ioctl::{Getter, Opcode, ioctl};
use tokio::time::{Instant, sleep, sleep_until};

/// How often a connection is looked at that nobody reads, or whose client reads late.
const LOOK: Duration = Duration::from_millis(250);

/// When a connection last carried anything; clones share it. What only keeps a connection alive (a PING) is nothing:
/// every client of today sends one each few seconds, and no connection would ever be idle.
#[derive(Clone, Debug)]
pub(super) struct Idle {
    begun: Instant,
    limit: Duration,
    /// Milliseconds after `begun`.
    last: Arc<AtomicU64>,
}

impl Idle {
    pub(super) fn new(limit: Duration) -> Self {
        Self { begun: Instant::now(), limit, last: Arc::default() }
    }

    /// Something came or went.
    pub(super) fn touch(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Resolves when nothing came or went for the limit. Cancel-safe.
    pub(super) async fn expired(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let end = self.begun + last + self.limit;
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    }
}

/// Sees that a client hung up although there is something left to read, so that a process which does not take its
/// input is ended all the same; and that it has got all. Clones share the look.
#[derive(Clone, Debug)]
pub(in crate::kubelet_api) struct HangUp(Option<Arc<OwnedFd>>);

impl HangUp {
    /// Looks at this socket; `None` never hangs up. A descriptor of its own, since the socket is busy elsewhere.
    pub(super) fn of(socket: Option<&impl AsFd>) -> Self {
        Self(socket.and_then(|socket| socket.as_fd().try_clone_to_owned().ok()).map(Arc::new))
    }

    /// Resolves soon after the other end has closed or reset the connection. Cancel-safe.
    ///
    /// The news of that may stand behind bytes that the kernel has no room for. So now and then `beat` must send
    /// something that needs no answer: what comes to a socket that its owner has closed is answered with a reset.
    pub(super) async fn happened(&self, beat: impl Fn()) {
        let Some(socket) = &self.0 else { return std::future::pending().await };
        loop {
            // First, so that a wait that is soon over costs nothing.
            sleep(LOOK).await;
            if closed(socket) {
                return;
            }
            beat();
        }
    }

    /// Resolves once the client's host has all that was written. Before that a socket must not be closed: what the
    /// client sends to a closed one is answered with a reset, which takes along what still waits to be sent. Cancel-safe.
    pub(super) async fn delivered(&self) {
        let Some(socket) = &self.0 else { return };
        while unacknowledged(socket) > 0 {
            sleep(LOOK).await;
        }
    }
}

/// Whether the other end sends no more. That is the only event asked for, besides those that always come and mean more
/// of the same; nix has no name for it and gives `None`.
fn closed(socket: &OwnedFd) -> bool {
    let half_closed = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
    let mut looked = [PollFd::new(socket.as_fd(), half_closed)];
    poll(&mut looked, PollTimeout::ZERO).is_ok() && looked[0].revents().is_none_or(|events| !events.is_empty())
}

/// Bytes that were written and that the other end did not acknowledge yet (tcp(7), SIOCOUTQ); none where that cannot be
/// said.
fn unacknowledged(socket: &OwnedFd) -> c_int {
    // SAFETY: what is asked for by this number is an `int`, and that is what the kernel writes.
    #[allow(unsafe_code)]
    let asked = unsafe { ioctl(socket, Getter::<{ TIOCOUTQ as Opcode }, c_int>::new()) };
    asked.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_connection_is_idle_after_the_limit_from_the_last_touch() {
        let (limit, began) = (Duration::from_millis(300), Instant::now());
        let idle = Idle::new(limit);
        assert!(timeout(Duration::from_millis(200), idle.expired()).await.is_err());
        idle.touch();
        idle.expired().await;
        assert!(began.elapsed() >= Duration::from_millis(200) + limit);
    }

    #[tokio::test]
    async fn a_hang_up_is_seen_behind_unread_bytes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        client.write_all(b"unread").await.unwrap();
        let hang_up = HangUp::of(Some(&server));
        assert!(timeout(2 * LOOK, hang_up.happened(|| {})).await.is_err());
        drop(client);
        timeout(4 * LOOK, hang_up.happened(|| {})).await.unwrap();
    }
}
