//! WebSocket as Kubernetes' clients speak it: a byte before each message says which stream it belongs to.

pub mod channels;
pub(super) mod socket;
pub(super) mod tunnel;

use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

/// Longest message that a client may send. client-go sends 32 KiB, other clients may send a file in one.
const LONGEST_MESSAGE: usize = 16 << 20;
/// Bytes that are gathered for one write.
const BATCH: usize = 64 << 10;

/// The bounds of a connection.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(32 << 10)
        .write_buffer_size(BATCH)
        .max_write_buffer_size(4 * BATCH)
        .max_message_size(Some(LONGEST_MESSAGE))
        .max_frame_size(Some(LONGEST_MESSAGE))
}
