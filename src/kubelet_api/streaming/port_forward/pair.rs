//! One connection to a port: a stream for its bytes, one for what went wrong.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::timeout;
use tracing::debug;

use super::Forward;
use crate::kubelet_api::streaming::pipe::{Inbox, Next, Outbox};
use crate::runtime::session::Duplex;
use crate::telemetry::chain;

/// Room for one read from a port: little while little comes, since there may be thousands of connections, more for one
/// that fills it.
const LEAST_READ: usize = 8 << 10;
const MOST_READ: usize = 64 << 10;

/// Whether a client can say that it is done sending, and yet wants the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HalfClose {
    /// It says so, and the port is told. What comes from the port after this long is cut off.
    Kept(Duration),
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
        let ended = tokio::select! {
            // Not cancel-safe, and must not be: the connection to the port goes with the client's stream.
            ended = self.carry(forward, half_close) => ended,
            // Cancel-safe: a token stays cancelled.
            () = reset.cancelled() => Ok(()),
        };
        // The stream for errors ends in order, so that no client loses the text to a reset.
        match ended {
            Ok(()) => {
                self.data.end().await;
                self.errors.end().await;
            }
            Err(Broken::Connecting(why)) => {
                let text = format!("error forwarding port {} to pod {}: {why}", self.port, forward.pod);
                let _ = self.errors.send(Bytes::from(text)).await;
                self.errors.end().await;
                self.data.fail().await;
            }
            // No text: kubectl gives up all its connections at the first, and this is the affair of one.
            Err(Broken::Reading(why)) => {
                debug!(port = self.port, error = chain(&why), "a forwarded connection broke");
                self.errors.end().await;
                self.data.fail().await;
            }
        }
    }

    async fn carry(&mut self, forward: &Forward, half_close: HalfClose) -> Result<(), Broken> {
        let target: Pin<Box<dyn Duplex>> =
            (forward.dial)(self.port).await.map_err(|error| Broken::Connecting(chain(&error)))?;
        let (reader, writer) = split(target);
        let (data, inbox) = (&self.data, &mut self.inbox);
        let down = async {
            down(reader, data).await?;
            data.end().await;
            Ok(())
        };
        let up = async {
            up(inbox, writer).await;
            match half_close {
                HalfClose::Kept(linger) => linger,
                // Where the client cannot say that it is done, the port does.
                HalfClose::Unknown => std::future::pending().await,
            }
        };
        tokio::pin!(down, up);
        tokio::select! {
            // Not cancel-safe: a port that broke, or is done where that is all, ends the pair.
            ended = &mut down => {
                if ended.is_ok() && half_close != HalfClose::Unknown {
                    up.await;
                }
                ended
            }
            // Cancel-safe: what comes down is waited for below.
            linger = &mut up => match timeout(linger, down).await {
                Ok(ended) => ended,
                Err(late) => Err(Broken::Reading(late.into())),
            },
        }
    }
}

/// How a connection to a port failed.
#[derive(Debug)]
enum Broken {
    /// There is none.
    Connecting(String),
    /// It broke off.
    Reading(io::Error),
}

/// From the port to the client.
async fn down(mut reader: impl AsyncRead + Unpin, data: &Outbox) -> Result<(), Broken> {
    let (mut buffer, mut room) = (BytesMut::new(), LEAST_READ);
    loop {
        buffer.reserve(room);
        let read = reader.read_buf(&mut buffer).await.map_err(Broken::Reading)?;
        if read == 0 || data.send(buffer.split().freeze()).await.is_err() {
            return Ok(());
        }
        room = if read >= room { room * 2 } else { room / 2 }.clamp(LEAST_READ, MOST_READ);
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures::FutureExt;
    use tokio::io::{DuplexStream, duplex};
    use tokio::sync::mpsc;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::kubelet_api::streaming::pipe::{Budget, Feed, WRITES_WAITING, Write, stream};

    const LONG: Duration = Duration::from_secs(60);
    const DATA: u32 = 1;

    /// A pair whose client is done sending, and what keeps it; what the client is sent; the port's side.
    fn half_closed() -> (Pair, Feed, mpsc::Receiver<Write>, Forward, DuplexStream) {
        let (writes, queue) = mpsc::channel(WRITES_WAITING);
        let budget = Budget::default();
        let (feed, inbox, data) = stream(DATA, &budget, &writes);
        let (_, _, errors) = stream(DATA + 2, &budget, &writes);
        feed.end().now_or_never().unwrap();
        let (near, far) = duplex(1024);
        let near = Mutex::new(Some(near));
        let dial = move |_: u16| {
            let near: Pin<Box<dyn Duplex>> = Box::pin(near.lock().unwrap().take().unwrap());
            async { Ok(near) }.boxed()
        };
        let forward = Forward { pod: "p".to_owned(), dial: Arc::new(dial), idle: LONG };
        (Pair { port: 80, inbox, data, errors }, feed, queue, forward, far)
    }

    /// Bytes of the stream for data, and whether it ended in order, once the pair is gone.
    async fn came(mut queue: mpsc::Receiver<Write>) -> (usize, bool) {
        let (mut bytes, mut ended) = (0, false);
        while let Some(write) = queue.recv().await {
            match write {
                Write::Data(DATA, piece) => bytes += piece.len(),
                Write::End(DATA) => ended = true,
                _ => {}
            }
        }
        (bytes, ended)
    }

    #[tokio::test]
    async fn a_download_whose_client_left_is_cut_off() {
        let linger = Duration::from_millis(200);
        let (pair, _feed, queue, forward, mut port) = half_closed();
        let began = Instant::now();
        let endless = async { while port.write_all(&[7; 512]).await.is_ok() {} };
        let all = async { tokio::join!(pair.run(&forward, HalfClose::Kept(linger)), endless, came(queue)).2 };
        let (bytes, ended) = timeout(LONG / 2, all).await.unwrap();
        assert!(bytes > 0 && !ended, "what was cut short is no whole answer");
        assert!(began.elapsed() >= linger, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn an_answer_that_takes_a_while_still_comes() {
        let (pair, _feed, queue, forward, mut port) = half_closed();
        let answer = async {
            let mut request = Vec::new();
            port.read_to_end(&mut request).await.unwrap();
            sleep(Duration::from_millis(200)).await;
            port.write_all(b"answer").await.unwrap();
            drop(port);
        };
        let run = pair.run(&forward, HalfClose::Kept(LONG));
        let (came, ..) = timeout(LONG / 2, async { tokio::join!(came(queue), run, answer) }).await.unwrap();
        assert_eq!(came, (6, true));
    }
}
