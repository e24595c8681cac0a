//! The way to the node: a virtio-serial port, or vsock. Over it come sessions, and in each speaks HTTP/2.

use std::fs;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use lambdalet_proto::MAX_MESSAGE;
use lambdalet_proto::agent::v1::agent_server::AgentServer;
use lambdalet_proto::session::link::{CONNECTION_WINDOW, SessionError, serve_sessions};
use lambdalet_proto::session::{SERIAL_PORT, VSOCK_PORT};
use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_HOST};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};
use rustix::net::SocketFlags;
use tokio::io::{DuplexStream, Interest};
use tokio::net::UnixListener;
use tokio::time::{Instant, sleep};

use crate::guest::Guest;
use crate::port;
use crate::service::Service;
use crate::sys::polled;

/// What the kernel command line names the way with: `lambdalet.agent=serial` or `vsock`. If it does not, the port is taken
/// where the machine has any.
const PARAMETER: &str = "lambdalet.agent=";
/// Where the kernel lists virtio-serial ports.
const PORTS: &str = "/sys/class/virtio-ports";
/// How long the port may take to appear, and how often it is looked for.
const APPEARS: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// What the node may send ahead on one stream.
const STREAM_WINDOW: u32 = 128 << 10;
/// Streams at once.
const MAX_STREAMS: u32 = 1000;

/// How the node comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The virtio-serial port named [`SERIAL_PORT`].
    Serial,
    /// A vsock listener at [`VSOCK_PORT`].
    Vsock,
    /// A Unix socket, for tests without a guest.
    Socket(PathBuf),
}

impl Way {
    /// What the kernel's command line says, or else the machine has.
    pub(crate) fn of_kernel(command_line: &str, has_console: bool) -> Self {
        match command_line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(PARAMETER)).next_back() {
            Some("vsock") => Self::Vsock,
            Some("serial") => Self::Serial,
            _ if has_console => Self::Serial,
            _ => Self::Vsock,
        }
    }
}

/// Serves sessions, one after the other.
///
/// # Errors
/// The way is not there, or fails.
pub(crate) async fn serve(way: &Way, guest: &Arc<Guest>) -> io::Result<()> {
    match way {
        Way::Serial => {
            let (mut reader, mut writer) = port::open(&serial().await?)?;
            loop {
                // A node that hangs up ends its session; the port stays for the next.
                if let SessionError::Wire(error) =
                    serve_sessions(&mut reader, &mut writer, |io| session(io, guest)).await
                {
                    return Err(error);
                }
            }
        }
        Way::Vsock => vsock(guest).await,
        Way::Socket(path) => {
            let listener = UnixListener::bind(path)?;
            loop {
                let (stream, _) = listener.accept().await?;
                let (reader, writer) = stream.into_split();
                serve_sessions(reader, writer, |io| session(io, guest)).await;
            }
        }
    }
}

/// The device node of the port with our name. The driver learns of its ports from the machine, a moment after it is loaded.
async fn serial() -> io::Result<PathBuf> {
    let end = Instant::now() + APPEARS;
    loop {
        for port in fs::read_dir(PORTS).into_iter().flatten().flatten() {
            let device = Path::new("/dev").join(port.file_name());
            if fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == SERIAL_PORT)
                && device.exists()
            {
                return Ok(device);
            }
        }
        if Instant::now() > end {
            let missing = format!("no virtio-serial port is named {SERIAL_PORT}");
            return Err(io::Error::new(io::ErrorKind::NotFound, missing));
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Only the host may connect. A newer connection ends the older: the node has one.
async fn vsock(guest: &Arc<Guest>) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    socket::bind(listener.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT))?;
    socket::listen(&listener, Backlog::new(8)?)?;
    let listener = polled(listener, Interest::READABLE)?;
    let mut current: Option<tokio::task::AbortHandle> = None;
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(accepted) = ready.try_io(|listener| Ok(rustix::net::accept_with(&listener.get_ref().0, flags)?)) else {
            continue;
        };
        let stream = accepted?;
        if !socket::getpeername::<VsockAddr>(stream.as_raw_fd()).is_ok_and(|peer| peer.cid() == VMADDR_CID_HOST) {
            continue;
        }
        if let Some(older) = current.take() {
            older.abort();
        }
        let guest = Arc::clone(guest);
        let task = tokio::task::spawn(async move {
            // tokio takes any stream socket for a Unix one.
            let Ok(stream) = tokio::net::UnixStream::from_std(stream.into()) else { return };
            let (reader, writer) = stream.into_split();
            serve_sessions(reader, writer, |io| session(io, &guest)).await;
        });
        current = Some(task.abort_handle());
    }
}

/// HTTP/2 on one session's stream. What the session began ends with it.
fn session(io: DuplexStream, guest: &Arc<Guest>) -> impl Future<Output = ()> + use<> {
    let service = Service::new(Arc::clone(guest));
    async move {
        let server = AgentServer::new(service).max_decoding_message_size(MAX_MESSAGE + (64 << 10));
        // How it ended is the node's to know.
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .max_concurrent_streams(MAX_STREAMS)
            // Calls that the node gave up before the guest got to them: it has no other client to be protected from.
            .max_pending_accept_reset_streams(MAX_STREAMS as usize)
            .serve_connection(TokioIo::new(io), TowerToHyperService::new(server))
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_the_command_line_counts_before_what_the_machine_has() {
        assert_eq!(Way::of_kernel("quiet panic=-1", true), Way::Serial);
        assert_eq!(Way::of_kernel("quiet panic=-1", false), Way::Vsock);
        assert_eq!(Way::of_kernel("lambdalet.agent=serial quiet lambdalet.agent=vsock", true), Way::Vsock);
    }
}
