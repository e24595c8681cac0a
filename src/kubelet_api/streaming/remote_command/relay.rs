//! Between a process and its client, whatever carries the streams.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::iter;
use std::pin::Pin;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;

use super::resize::Sizes;
use crate::kubelet_api::streaming::pipe::{Inbox, Next, Outbox};
use crate::runtime::Result;
use crate::runtime::session::{Output, Session, Terminal};
use crate::runtime::types::LogSource;

/// Most bytes that a run may answer with; what comes after is dropped.
const LONGEST_ANSWER: usize = 10 << 20;

/// A client's ends of the streams; those that it did not ask for are missing.
#[derive(Debug, Default)]
pub(in crate::kubelet_api) struct Ends {
    pub(in crate::kubelet_api) stdin: Option<Inbox>,
    pub(in crate::kubelet_api) stdout: Option<Outbox>,
    pub(in crate::kubelet_api) stderr: Option<Outbox>,
    pub(in crate::kubelet_api) resize: Option<Inbox>,
}

impl Ends {
    /// Tells the client that nothing more will be written.
    pub(in crate::kubelet_api) async fn end(&self) {
        for outbox in [&self.stdout, &self.stderr].into_iter().flatten() {
            outbox.end().await;
        }
    }
}

/// Carries bytes until the process has ended and all that it wrote is handed on; its exit code.
///
/// Dropping this drops the session, which ends a process that it started.
pub(in crate::kubelet_api) async fn relay(session: Session, ends: &mut Ends) -> Result<i32> {
    let Session { stdin, output, terminal, exit } = session;
    let Ends { stdin: input, stdout, stderr, resize } = ends;
    let work = async {
        // The code waits for the output, but not for output that broke off.
        let written = hand_on(output, stdout.as_ref(), stderr.as_ref());
        tokio::try_join!(written, async { Ok(exit.await) })?.1
    };
    let company = async {
        tokio::join!(feed(input.take(), stdin), resizes(resize.as_mut(), terminal.as_ref()));
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        // Not cancel-safe, and need not be: the other arm never ends.
        result = work => result,
        // Not cancel-safe: input that the process did not read before it ended is dropped.
        never = company => match never {},
    }
}

/// All output of a process, both streams in one; and its exit code.
pub(in crate::kubelet_api) async fn gather(session: Session) -> Result<(Bytes, i32)> {
    let Session { mut output, exit, .. } = session;
    let gathered = async {
        let mut all = BytesMut::new();
        while let Some(piece) = output.next().await {
            let piece = piece?.bytes;
            all.extend_from_slice(&piece[..piece.len().min(LONGEST_ANSWER - all.len())]);
        }
        Ok(all.freeze())
    };
    let (all, code) = tokio::try_join!(gathered, async { Ok(exit.await) })?;
    Ok((all, code?))
}

/// A client that gave a stream up does not hold up the process: what comes for it is dropped.
async fn hand_on(
    mut output: BoxStream<'static, Result<Output>>,
    stdout: Option<&Outbox>,
    stderr: Option<&Outbox>,
) -> Result<()> {
    while let Some(piece) = output.next().await {
        let Output { source, bytes } = piece?;
        let outbox = match source {
            LogSource::Stdout => stdout,
            LogSource::Stderr => stderr,
        };
        if let Some(outbox) = outbox {
            let _ = outbox.send(bytes).await;
        }
    }
    Ok(())
}

/// Input until the client ends it or the process stops reading, which is no failure. Whoever sends it sees by the
/// inbox's drop that it is handed on.
async fn feed(input: Option<Inbox>, stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>) {
    let (Some(mut input), Some(mut stdin)) = (input, stdin) else { return };
    while let Next::Data(bytes) = input.next().await {
        // What has come meanwhile goes with it: each write wakes up whoever takes it.
        let more = iter::from_fn(|| input.waiting()).map(|(bytes, room)| (bytes, Some(room)));
        let pieces = iter::once((bytes, None)).chain(more).collect();
        if write_all(&mut stdin, pieces).await.is_err() || stdin.flush().await.is_err() {
            return;
        }
    }
    let _ = stdin.shutdown().await;
}

/// Bytes, and the room that they take until they are written.
type Held = (Bytes, Option<OwnedSemaphorePermit>);

async fn write_all(stdin: &mut (impl AsyncWrite + Unpin), mut pieces: VecDeque<Held>) -> io::Result<()> {
    while let Some((first, _)) = pieces.front() {
        if first.is_empty() {
            pieces.pop_front();
            continue;
        }
        let slices: Vec<_> = pieces.iter().map(|(piece, _)| IoSlice::new(piece)).collect();
        let mut written = stdin.write_vectored(&slices).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        for (piece, _) in &mut pieces {
            let taken = written.min(piece.len());
            piece.advance(taken);
            written -= taken;
        }
    }
    Ok(())
}

async fn resizes(resize: Option<&mut Inbox>, terminal: &dyn Terminal) {
    let Some(resize) = resize else { return };
    let mut sizes = Sizes::default();
    while let Next::Data(bytes) = resize.next().await {
        if let Some(size) = sizes.read(&bytes) {
            // A terminal of the wrong size is no reason to end the session.
            let _ = terminal.resize(size).await;
        }
    }
}
