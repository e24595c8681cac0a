//! SPDY/3.1 as Kubernetes' clients speak it: many streams over one upgraded connection.
//!
//! ```text
//! bytes -> frame::Decoder -> connection::Connection -> kubelet_api::streaming, which serves kubectl and API servers
//! bytes <- frame::Encoder <--------------------------- the same
//! bytes <> frame::Decoder, frame::Encoder <----------> runtime::cri, a client of what a CRI runtime serves
//! ```
//!
//! This room is pure, and names no other: `fuzz/` builds it alone.
//!
//! The document is "SPDY Protocol - Draft 3.1" (chromium.org). Its flow control is left out, as the one other side there is
//! (moby/spdystream, in kubectl, client-go and the API server) leaves it out: it sends no WINDOW_UPDATE, minds none,
//! and would hang after 64 KiB if this side kept windows. What holds a fast sender up is the connection: this side
//! reads no further while a stream's queue is full.

pub mod connection;
pub mod frame;
pub mod headers;

use std::io;

/// Why a SPDY connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    /// Reading or writing failed.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// A control frame of another version.
    #[error("a control frame is not of SPDY/3")]
    Version,
    /// A control frame too short for its type.
    #[error("a control frame is too short for its type")]
    Malformed,
    /// A control frame beyond [`frame::MAX_CONTROL`].
    #[error("a control frame of {0} bytes is too long")]
    TooLong(usize),
    /// A frame for stream 0.
    #[error("a frame names stream 0")]
    StreamZero,
    /// A header block that does not inflate or parse.
    #[error("a header block cannot be read")]
    HeaderBlock,
    /// A header block beyond [`headers::MAX_INFLATED`] or [`headers::MAX_HEADERS`].
    #[error("a header block is too large")]
    HeadersTooLarge,
    /// It does not read what it is sent, yet goes on asking for answers.
    #[error("the client asks for more answers than it reads")]
    Flood,
    /// It is gone, seen while it was being waited for.
    #[error("the client hung up")]
    HungUp,
    /// Nothing came or went for too long.
    #[error("the connection was idle for too long")]
    Idle,
}
