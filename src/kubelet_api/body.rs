//! What clients send with a request: no endpoint wants it, yet it is read.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt as _;
use http::header;
use tokio::time::timeout;

/// Bytes of a body that are read, as by a server of Go's `net/http`.
const MOST: usize = 256 << 10;
/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads a body to its end and forgets it, within bounds. A client that is still writing when the answer comes and the
/// connection is closed is told of a broken pipe in the place of the answer; so is who asks through an API server.
pub(super) async fn read_and_forget(request: Request, next: Next) -> Response {
    // What follows an upgrade is the new protocol's.
    if request.headers().contains_key(header::UPGRADE) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let mut pieces = body.into_data_stream();
    let read = async {
        let mut room = MOST;
        while let Some(Ok(piece)) = pieces.next().await {
            room = room.saturating_sub(piece.len());
            if room == 0 {
                break;
            }
        }
    };
    // Whether it was all of it: the connection ends after the answer if it was not.
    let _ = timeout(PATIENCE, read).await;
    next.run(Request::from_parts(parts, Body::empty())).await
}
