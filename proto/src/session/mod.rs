//! The session: a clean byte stream made of one that is not.
//!
//! A virtio-serial port is a wire that outlives both its ends. Whoever opens it may find the second half of what a killed
//! node or a template's guest had said, and what he says may arrive in the middle of what was said before. So below HTTP/2
//! lies a session:
//!
//! ```text
//! node                                    guest
//!  |-- padding, OPEN(new random id) ------->|  ends the session it had, its streams with it; not if that has this id
//!  |<------------- padding, ACCEPT(same id) |
//!  |<============ DATA(id, number) ========>|  frames of any other id are dropped
//!  |-- CLOSE(id) -------------------------->|
//! ```
//!
//! Every [`frame`] carries the id of its session and a checksum. What is no frame is skipped until one begins. The padding
//! before the two that open is as long as the longest frame: it ends whatever the other side still waits for, so a frame
//! that was cut off never swallows them. A node says OPEN again until it is answered. Frames are numbered, so bytes that were
//! lost in between end the session instead of shortening its stream.
//!
//! The [`link`] makes an ordinary byte stream of it, for HTTP/2.

pub mod frame;
pub mod link;

/// The port of an agent that listens on vsock.
pub const VSOCK_PORT: u32 = 1024;
/// The name of the virtio-serial port.
pub const SERIAL_PORT: &str = "agent";
