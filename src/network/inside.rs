//! Sockets that live in the network namespace of a sandbox.
//!
//! A socket stays in the namespace it was made in, whoever uses it afterwards. So one thread goes from namespace to
//! namespace and makes sockets, and they are connected and used on the async threads.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::thread;

use nix::sched::{CloneFlags, setns};
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, oneshot};

use super::NetworkError;

/// Requests that may wait for the thread; each takes some ten microseconds.
const WAITING: usize = 64;

/// Makes sockets inside sandboxes. The thread starts with the first one and ends with this value.
#[derive(Debug, Default)]
pub struct Sockets {
    thread: OnceLock<mpsc::Sender<Request>>,
}

#[derive(Debug)]
struct Request {
    pid: i32,
    ipv6: bool,
    answer: oneshot::Sender<io::Result<TcpSocket>>,
}

impl Sockets {
    /// A TCP socket, neither bound nor connected, in the network namespace of process `pid` (the host's own too), of
    /// the family of `address`.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`] if the process is gone or the socket is refused there.
    pub async fn inside(&self, pid: i32, address: IpAddr) -> Result<TcpSocket, NetworkError> {
        let outside = |source| NetworkError::Namespace { pid, source };
        let (answer, answered) = oneshot::channel();
        let thread = match self.thread.get() {
            Some(thread) => thread,
            None => {
                let started = start().map_err(outside)?;
                // If another call was faster its thread is used, and ours ends.
                self.thread.get_or_init(|| started)
            }
        };
        let ended = || outside(io::Error::other("the thread that makes sockets has ended"));
        thread.send(Request { pid, ipv6: address.is_ipv6(), answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?.map_err(outside)
    }
}

fn start() -> io::Result<mpsc::Sender<Request>> {
    let (sender, mut requests) = mpsc::channel::<Request>(WAITING);
    let run = move || {
        while let Some(request) = requests.blocking_recv() {
            // Nobody waits any more: fine.
            let _ = request.answer.send(make(request.pid, request.ipv6));
        }
    };
    thread::Builder::new().name("sockets".to_owned()).spawn(run)?;
    Ok(sender)
}

fn make(pid: i32, ipv6: bool) -> io::Result<TcpSocket> {
    setns(File::open(format!("/proc/{pid}/ns/net"))?, CloneFlags::CLONE_NEWNET)?;
    if ipv6 { TcpSocket::new_v6() } else { TcpSocket::new_v4() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_is_gone_has_no_namespace() {
        let sockets = Sockets::default();
        for _ in 0..2 {
            let error = sockets.inside(i32::MAX, [127, 0, 0, 1].into()).await.unwrap_err();
            assert!(matches!(error, NetworkError::Namespace { pid: i32::MAX, .. }), "{error}");
        }
    }
}
