//! Listening sockets inside a Pod's network namespace.
//!
//! A socket belongs to the namespace of the thread that made it, for as long as it lives, and so does what it accepts.
//! So a thread of its own enters the namespace, makes the sockets and ends; they are then served from out here.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt};
use nix::sys::socket::{bind, listen, setsockopt, socket};

/// Connections that wait to be accepted; the kernel lowers it to `net.core.somaxconn` of the namespace.
const BACKLOG: i32 = 1024;

/// What can fail before a front listens.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The namespace is gone, or we may not enter it.
    #[error("failed to enter network namespace {}", namespace.display())]
    Namespace {
        /// Where it was looked for.
        namespace: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The address is in use, or not the namespace's.
    #[error("failed to listen on {address}")]
    Address {
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread to do it on.
    #[error("failed to start a thread that listens")]
    Thread(#[source] io::Error),
}

/// Listens on each of the addresses, in the network namespace at `namespace` (such as `/proc/PID/ns/net`) or, without,
/// in the caller's own. Either all are listened on or none. Addresses of closed connections do not stand in the way
/// (SO_REUSEADDR), so a restarted process can listen again at once. An unspecified address also takes what comes by the
/// namespace's loopback interface, which `kubectl port-forward` uses.
///
/// # Errors
/// [`ListenError`]: the namespace could not be entered, or an address not be listened on.
pub async fn listen_in(
    namespace: Option<PathBuf>,
    addresses: Vec<SocketAddr>,
) -> Result<Vec<TcpListener>, ListenError> {
    let listen = move || enter(namespace.as_deref()).and_then(|()| addresses.iter().map(listen_on).collect());
    // Not a thread of a pool: it must never serve anything else once it is in another namespace. If nobody waits any more, the
    // sockets close with the result.
    let answered = crate::thread::begin("front-listen", listen, drop).map_err(ListenError::Thread)?;
    answered.await.unwrap_or_else(|_| Err(ListenError::Thread(io::Error::other("it ended early"))))
}

fn enter(namespace: Option<&Path>) -> Result<(), ListenError> {
    let Some(path) = namespace else { return Ok(()) };
    let failed = |source| ListenError::Namespace { namespace: path.to_owned(), source };
    let namespace = File::open(path).map_err(failed)?;
    setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))
}

fn listen_on(address: &SocketAddr) -> Result<TcpListener, ListenError> {
    let failed = |errno: nix::Error| ListenError::Address { address: *address, source: errno.into() };
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(family, SockType::Stream, flags, None).map_err(failed)?;
    setsockopt(&socket.as_fd(), sockopt::ReuseAddr, &true).map_err(failed)?;
    if address.is_ipv6() {
        // Or it would stand in the way of the IPv4 address beside it.
        setsockopt(&socket.as_fd(), sockopt::Ipv6V6Only, &true).map_err(failed)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(*address)).map_err(failed)?;
    listen(&socket, Backlog::new(BACKLOG).map_err(failed)?).map_err(failed)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let first = listen_in(None, vec![taken]).await.unwrap();
        let error = listen_in(None, vec![taken]).await.unwrap_err();
        assert_eq!(error.to_string(), format!("failed to listen on {taken}"));
        drop(first);
        listen_in(None, vec![taken]).await.unwrap();
    }

    #[tokio::test]
    async fn a_namespace_that_is_gone_is_named() {
        let namespace = PathBuf::from("/proc/0/ns/net");
        let error = listen_in(Some(namespace), Vec::new()).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to enter network namespace /proc/0/ns/net");
    }
}
