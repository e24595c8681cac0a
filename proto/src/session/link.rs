//! Both ends of a session: what is between the wire's frames and an ordinary byte stream for HTTP/2.
//!
//! Each end is a future that its owner runs; the stream it feeds ends with it. The two directions never wait for each
//! other, so a full pipe in one does not stop the other.

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::frame::{Decoder, Frame, Kind, MAX_FRAME, MAX_PAYLOAD, SessionId, encode, pad};

/// Bytes that may wait in the node between the wire and HTTP/2, in each direction; the wire waits then.
const NODE_BUFFER: usize = 64 << 10;
/// The same in the guest. It is more than HTTP/2 lets a node send ahead ([`CONNECTION_WINDOW`]), so that the guest always
/// gets to see the next OPEN.
const GUEST_BUFFER: usize = 2 << 20;
/// What HTTP/2 in the guest must give its peer at most, for all streams together.
pub const CONNECTION_WINDOW: u32 = 1 << 20;
/// A session whose bytes nobody takes for so long is given up.
const STUCK: Duration = Duration::from_secs(30);
/// How long a node waits for an answer before it opens its session once more, the first time; it waits twice as long each
/// time after.
const ANSWER: Duration = Duration::from_secs(1);
/// What a node reads at most before the guest has accepted: stale bytes lie in buffers of some hundred KiB.
const MAX_STALE: u64 = 4 << 20;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The wire failed.
    #[error("failed to read or write the agent's wire")]
    Wire(#[source] io::Error),
    /// The wire ended.
    #[error("the agent's wire has ended")]
    Ended,
    /// The other side closed the session.
    #[error("the session was closed by the other side")]
    Closed,
    /// Frames are missing.
    #[error("frame {got} came where {expected} was due")]
    Lost {
        /// The next in line.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// Bytes that are no frame, in a session that stands.
    #[error("{0} bytes of the guest are no frame")]
    Garbage(u64),
    /// This side's own user has gone away.
    #[error("the session's user has gone")]
    Left,
}

/// A wire and what was read from it but not looked at.
struct Wire<R> {
    reader: R,
    input: BytesMut,
    decoder: Decoder,
}

impl<R: AsyncRead + Unpin> Wire<R> {
    fn new(reader: R) -> Self {
        Self { reader, input: BytesMut::new(), decoder: Decoder::default() }
    }

    /// The next frame, with at most so many bytes before it and all those before that were part of none: somebody may send
    /// such bytes without an end. Cancel-safe: what was read stays in the input.
    async fn next(&mut self, most: u64) -> Result<Frame, SessionError> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.input) {
                return Ok(frame);
            }
            if self.decoder.skipped() > most {
                return Err(SessionError::Garbage(self.decoder.skipped()));
            }
            self.input.reserve(MAX_FRAME);
            if self.reader.read_buf(&mut self.input).await.map_err(SessionError::Wire)? == 0 {
                return Err(SessionError::Ended);
            }
        }
    }
}

/// A session of a node, accepted by the guest; [`run`](Self::run) carries its bytes.
pub struct NodeSession<S> {
    id: SessionId,
    wire: Wire<ReadHalf<S>>,
    writer: WriteHalf<S>,
    user: DuplexStream,
}

impl<S: AsyncRead + AsyncWrite> NodeSession<S> {
    /// Opens a session with a fresh random id, and returns the stream for HTTP/2 beside it. There is no deadline: a guest
    /// that still boots answers when it has booted. A guest that takes the node for gone while the two find each other
    /// drops what it was told, so it is told again until it answers.
    ///
    /// # Errors
    /// What the wire failed with, or too many bytes of no session.
    pub async fn open(stream: S, id: SessionId) -> Result<(DuplexStream, Self), SessionError> {
        let (reader, mut writer) = split(stream);
        let mut wire = Wire::new(reader);
        let mut opening = BytesMut::new();
        pad(&mut opening);
        encode(&Frame::control(Kind::Open, id), &mut opening);
        let heard = Notify::new();
        let told = async {
            let mut patience = ANSWER;
            loop {
                writer.write_all(&opening).await?;
                writer.flush().await?;
                // Asked between two writes only: half an OPEN would spoil the first frame after it.
                if timeout(patience, heard.notified()).await.is_ok() {
                    return Ok(());
                }
                patience *= 2;
            }
        };
        let accepted = async {
            let mut stale = 0;
            loop {
                let frame = wire.next(MAX_STALE).await?;
                if frame.session == id && frame.kind == Kind::Accept {
                    heard.notify_one();
                    return Ok(());
                }
                stale += frame.payload.len() as u64;
                if stale + wire.decoder.skipped() > MAX_STALE {
                    return Err(SessionError::Garbage(stale + wire.decoder.skipped()));
                }
            }
        };
        // Both at once: a guest with much stale to say may take nothing before that is read.
        tokio::try_join!(async { told.await.map_err(SessionError::Wire) }, accepted)?;
        let (theirs, user) = duplex(NODE_BUFFER);
        Ok((theirs, Self { id, wire, writer, user }))
    }

    /// Carries bytes until the session ends, and says why it did.
    pub async fn run(mut self) -> SessionError {
        let (reader, mut writer) = split(self.user);
        let skipped = self.wire.decoder.skipped();
        let (id, wire) = (self.id, &mut self.wire);
        let incoming = async {
            let mut due = 0_u32;
            loop {
                let frame = match wire.next(skipped).await {
                    Ok(frame) => frame,
                    Err(SessionError::Garbage(all)) => return SessionError::Garbage(all - skipped),
                    Err(error) => return error,
                };
                // The guest's frames follow each other without a gap.
                if wire.decoder.skipped() != skipped {
                    return SessionError::Garbage(wire.decoder.skipped() - skipped);
                }
                match accept(&frame, id, &mut due) {
                    Ok(None) => {}
                    Ok(Some(bytes)) if writer.write_all(&bytes).await.is_err() => return SessionError::Left,
                    Ok(Some(_)) => {}
                    Err(error) => return error,
                }
            }
        };
        // Neither is polled again once the other has ended.
        tokio::select! {
            ended = incoming => ended,
            ended = outgoing(id, reader, &mut self.writer) => ended,
        }
    }
}

/// The bytes that a frame adds to a session's stream; `None` if it is of another session.
fn accept(frame: &Frame, id: SessionId, due: &mut u32) -> Result<Option<Bytes>, SessionError> {
    if frame.session != id {
        return Ok(None);
    }
    match frame.kind {
        Kind::Data if frame.number == *due => {
            *due = due.wrapping_add(1);
            Ok(Some(frame.payload.clone()))
        }
        Kind::Data => Err(SessionError::Lost { expected: *due, got: frame.number }),
        Kind::Close => Err(SessionError::Closed),
        Kind::Open | Kind::Accept => Ok(None),
    }
}

/// Sends what the user writes; CLOSE at its end.
async fn outgoing<W: AsyncWrite + Unpin>(
    id: SessionId,
    mut user: ReadHalf<DuplexStream>,
    wire: &mut W,
) -> SessionError {
    let (mut number, mut payload, mut out) = (0_u32, BytesMut::new(), BytesMut::new());
    loop {
        payload.reserve(MAX_PAYLOAD);
        // `take` bounds the payload, however much capacity there is.
        let read = (&mut user).take(MAX_PAYLOAD as u64).read_buf(&mut payload).await.unwrap_or(0);
        let frame = match read {
            0 => Frame::control(Kind::Close, id),
            _ => Frame { session: id, number, kind: Kind::Data, payload: payload.split().freeze() },
        };
        number = number.wrapping_add(1);
        out.clear();
        encode(&frame, &mut out);
        let written = async {
            wire.write_all(&out).await?;
            wire.flush().await
        };
        if let Err(error) = written.await {
            return SessionError::Wire(error);
        }
        if read == 0 {
            return SessionError::Left;
        }
    }
}

/// The guest's end of a wire: gives every session that a node opens to `serve`, one at a time, and drops what `serve` does
/// when the session ends. Returns when the wire itself ends or fails; a port that can be read again is given in again.
pub async fn serve_sessions<R, W, F>(reader: R, mut writer: W, mut serve: impl FnMut(DuplexStream) -> F) -> SessionError
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
    F: Future<Output = ()>,
{
    let mut wire = Wire::new(reader);
    let mut opened = None;
    loop {
        let id = match opened.take() {
            Some(id) => id,
            None => match next_open(&mut wire).await {
                Ok(id) => id,
                Err(error) => return error,
            },
        };
        let (theirs, user) = duplex(GUEST_BUFFER);
        let (reader, to_user) = split(user);
        // Neither is polled again once another has ended; the wire's input outlives them.
        let ended = tokio::select! {
            ended = guest_incoming(id, &mut wire, to_user) => ended,
            ended = guest_outgoing(id, reader, &mut writer) => Err(ended),
            // Its stream ends with it, which the two above notice and tell the node.
            () = async { serve(theirs).await; std::future::pending().await } => Err(SessionError::Left),
        };
        match ended {
            Ok(next) => opened = Some(next),
            Err(error @ (SessionError::Wire(_) | SessionError::Ended)) => return error,
            // The node sees that its HTTP/2 no longer answers and opens another.
            Err(_) => {}
        }
    }
}

async fn next_open<R: AsyncRead + Unpin>(wire: &mut Wire<R>) -> Result<SessionId, SessionError> {
    loop {
        // It reads on: the node is not to be kept out by what others left in the wire.
        let frame = wire.next(u64::MAX).await?;
        if frame.kind == Kind::Open {
            return Ok(frame.session);
        }
    }
}

/// Delivers what comes until the node opens another session (that is `Ok`) or this one ends.
async fn guest_incoming<R: AsyncRead + Unpin>(
    id: SessionId,
    wire: &mut Wire<R>,
    mut user: WriteHalf<DuplexStream>,
) -> Result<SessionId, SessionError> {
    let mut due = 0;
    loop {
        let frame = wire.next(u64::MAX).await?;
        if frame.kind == Kind::Open && frame.session != id {
            return Ok(frame.session);
        }
        if let Some(bytes) = accept(&frame, id, &mut due)?
            && !matches!(timeout(STUCK, user.write_all(&bytes)).await, Ok(Ok(())))
        {
            return Err(SessionError::Left);
        }
    }
}

/// Accepts, then sends what the user writes.
async fn guest_outgoing<W: AsyncWrite + Unpin>(
    id: SessionId,
    user: ReadHalf<DuplexStream>,
    wire: &mut W,
) -> SessionError {
    let mut accepting = BytesMut::new();
    pad(&mut accepting);
    encode(&Frame::control(Kind::Accept, id), &mut accepting);
    let written = async {
        wire.write_all(&accepting).await?;
        wire.flush().await
    };
    match written.await {
        Ok(()) => outgoing(id, user, wire).await,
        Err(error) => SessionError::Wire(error),
    }
}

#[cfg(test)]
mod tests;
