//! exec, attach, run and port-forward: connections that stop being HTTP and carry the streams of a process or a port.
//!
//! ```text
//! endpoints -> upgrade (negotiates, answers 101) -> the connection's task -> remote_command | port_forward
//!                                                                                 |
//!                     spdy | websocket <--- pipe (Inbox, Outbox: bounded) --------'---> runtime::session
//! ```
//!
//! [`plain`] does the same without TLS for those who were given a ticket, as the CRI has it.
//!
//! The protocols are those of KK staging/src/k8s.io/cri-streaming/pkg/streaming; what a kubelet's clients send of SPDY
//! and WebSocket is in [`crate::spdy`] and [`websocket`].

pub(super) mod endpoints;
mod idle;
mod pipe;
pub mod plain;
mod port_forward;
mod remote_command;
mod session;
pub(super) mod upgrade;
pub mod websocket;

use std::time::Duration;

/// For a client to open the streams that it asked for (a kubelet's `DefaultStreamCreationTimeout`).
const STREAM_CREATION: Duration = Duration::from_secs(30);
