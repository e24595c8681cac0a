//! One connection to a port: a stream for its bytes, one for what went wrong.

use std::pin::Pin;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

use super::Forward;
use crate::kubelet_api::streaming::pipe::{Inbox, Next, Outbox};
use crate::runtime::session::Duplex;
use crate::telemetry::chain;

/// Bytes that are read from a port at once.
const READ: usize = 16 << 10;

/// Whether a client can say that it is done sending, and yet wants the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HalfClose {
    /// It says so, and the port is told.
    Kept,
    /// It cannot: when the port is done, so is the pair.
    Unknown,
}

/// The streams of one connection.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) port: u16,
    pub(super) inbox: Inbox,
    pub(super) data: Outbox,
    pub(super) errors: Outbox,
}

impl Pair {
    /// Connects and carries bytes until both sides are done, or one of them breaks off.
    pub(super) async fn run(mut self, forward: &Forward, half_close: HalfClose) {
        let reset = self.inbox.reset();
        let failed = tokio::select! {
            // Not cancel-safe, and must not be: the connection to the port goes with the client's stream.
            ended = self.carry(forward, half_close) => ended.err(),
            // Cancel-safe: a token stays cancelled.
            () = reset.cancelled() => None,
        };
        let Some(why) = failed else {
            self.data.end().await;
            return self.errors.end().await;
        };
        let text = format!("error forwarding port {} to pod {}: {why}", self.port, forward.pod);
        // The stream for errors ends in order, so that no client loses the text to a reset.
        let _ = self.errors.send(Bytes::from(text)).await;
        self.errors.end().await;
        self.data.fail().await;
    }

    async fn carry(&mut self, forward: &Forward, half_close: HalfClose) -> Result<(), String> {
        let target: Pin<Box<dyn Duplex>> = (forward.dial)(self.port).await.map_err(|error| chain(&error))?;
        let (reader, writer) = split(target);
        let (data, inbox) = (&self.data, &mut self.inbox);
        let down = async {
            let ended = down(reader, data).await;
            data.end().await;
            ended
        };
        match half_close {
            HalfClose::Kept => tokio::join!(down, up(inbox, writer)).0,
            HalfClose::Unknown => tokio::select! {
                // Not cancel-safe, and need not be: the pair is over.
                ended = down => ended,
                // Not cancel-safe: the other arm ends the pair.
                () = async { up(inbox, writer).await; std::future::pending().await } => Ok(()),
            },
        }
    }
}

/// From the port to the client.
async fn down(mut reader: impl AsyncRead + Unpin, data: &Outbox) -> Result<(), String> {
    let mut buffer = vec![0; READ];
    loop {
        match reader.read(&mut buffer).await {
            Ok(0) => return Ok(()),
            Ok(read) => {
                if data.send(Bytes::copy_from_slice(&buffer[..read])).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// From the client to the port. A port that reads no more is no failure: it may still write.
async fn up(inbox: &mut Inbox, mut writer: impl AsyncWrite + Unpin) {
    while let Next::Data(bytes) = inbox.next().await {
        if writer.write_all(&bytes).await.is_err() || writer.flush().await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}
