//! Connections to ports inside a sandbox, for the drivers whose sandboxes are network namespaces of this host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::session::Duplex;
use super::types::SandboxId;
use super::{Kind, Result, RuntimeError};
use crate::network::NetworkError;
use crate::network::inside::Sockets;

/// A loopback connection is there at once, unless the listener's queue is full.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
/// In the order in which a kubelet tries them.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// What is tried, in a kubelet's words.
pub(super) fn tried(id: &SandboxId, port: u16) -> String {
    format!("failed to connect to localhost:{port} inside namespace {:?}", id.as_str())
}

/// Connects to a port of the network namespace of the process `holder`. `tried` begins the message of a failure.
pub(super) async fn connect(sockets: &Sockets, holder: i32, port: u16, tried: &str) -> Result<Pin<Box<dyn Duplex>>> {
    let mut refused = Vec::new();
    for address in LOOPBACK {
        match connect_as(sockets, holder, SocketAddr::new(address, port)).await {
            Ok(stream) => return Ok(Box::pin(stream)),
            Err(Failure::Inside(error)) => refused.push(format!("{address}: {}", plainly(&error))),
            Err(Failure::Outside(error)) => return Err(RuntimeError::new(Kind::Internal, tried).with_source(error)),
        }
    }
    Err(RuntimeError::new(Kind::Invalid, format!("{tried}: {}", refused.join(", "))))
}

async fn connect_as(sockets: &Sockets, holder: i32, address: SocketAddr) -> Result<TcpStream, Failure> {
    let socket = sockets.inside(holder, address.ip()).await.map_err(Failure::Outside)?;
    let connected = timeout(CONNECT_PATIENCE, socket.connect(address)).await;
    let stream = connected.map_err(io::Error::from).and_then(|connected| connected).map_err(Failure::Inside)?;
    // Whoever speaks through it has gathered its bytes already.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

enum Failure {
    /// The sandbox answered so.
    Inside(io::Error),
    Outside(NetworkError),
}

fn plainly(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::TimedOut => "connection timed out".to_owned(),
        _ => error.to_string(),
    }
}
