//! A hijacked connection: the streams of one process.
//!
//! Without a terminal what comes is cut into frames (stream number, three zeros, length, payload), with one it is the
//! bytes as they are. Reading is what moves it: nothing is fetched ahead of the reader but what lies in the socket,
//! except once the process has ended (see [`Wire::read_ahead`]).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use rustix::net::{Shutdown, shutdown, sockopt};
use tokio::io::AsyncWrite;
use tokio::net::UnixStream;

use super::http::Hijacked;
use super::records::Malformed;
use crate::runtime::session::Output;
use crate::runtime::types::LogSource;
use crate::runtime::{Kind, Result, RuntimeError};

/// Bytes asked for in one read: two of the daemon's frames.
const CHUNK: usize = 64 << 10;
/// Bytes fetched ahead of a slow reader once the process has ended. They are what may lie between the process and the
/// daemon then: two pipes of 64 KiB and two copy buffers of 32 KiB.
const AHEAD: usize = 256 << 10;
/// Bytes of input that the kernel takes before the daemon has read them: the fewer, the more often each wakes up the other.
const INPUT_WAITING: usize = 512 << 10;
const FRAME_HEADER: usize = 8;
/// Most of a message from the daemon itself that is waited for.
const LONGEST_ERROR: usize = 4 << 10;
/// What a terminal takes for the end of its input (Control-D).
const END_OF_TRANSMISSION: u8 = 4;

/// Both directions of the connection. It is closed when the last holder is gone.
#[derive(Debug)]
pub(super) struct Wire {
    socket: UnixStream,
    inbound: Mutex<Inbound>,
    /// The daemon ends the connection when the process has ended, unless no output was asked for: then it ends its
    /// side at once, and goes on reading.
    end_means_end: bool,
}

#[derive(Debug)]
struct Inbound {
    decoder: Decoder,
    ended: bool,
}

impl Wire {
    /// `framed` is whether there is no terminal; `output` is whether any output was asked for.
    pub(super) fn new(hijacked: Hijacked, framed: bool, output: bool) -> Arc<Self> {
        let mut decoder = Decoder::new(framed);
        decoder.buffer.extend_from_slice(&hijacked.ahead);
        // A smaller one does as well, only slower.
        let _ = sockopt::set_socket_send_buffer_size_force(&hijacked.socket, INPUT_WAITING);
        let inbound = Mutex::new(Inbound { decoder, ended: false });
        Arc::new(Self { socket: hijacked.socket, inbound, end_means_end: output })
    }

    fn inbound(&self) -> MutexGuard<'_, Inbound> {
        // Whoever panicked while reading has lost the session, and only that.
        self.inbound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads once, without waiting.
    fn receive(&self, inbound: &mut Inbound) -> io::Result<()> {
        let buffer = &mut inbound.decoder.buffer;
        if buffer.capacity() - buffer.len() < CHUNK / 4 {
            buffer.reserve(CHUNK);
        }
        if self.socket.try_read_buf(buffer)? == 0 {
            inbound.ended = true;
            if self.end_means_end {
                // A writer that waits for a process that is gone must not wait for ever. It may be gone already too.
                let _ = shutdown(&self.socket, Shutdown::Both);
            }
        }
        Ok(())
    }

    /// The next piece of output; `None` at its end. Cancel safe: what was read stays in the buffer.
    pub(super) async fn next(&self) -> io::Result<Option<Output>> {
        loop {
            {
                let mut inbound = self.inbound();
                if let Some(output) = inbound.decoder.next().map_err(io::Error::other)? {
                    return Ok(Some(output));
                }
                if inbound.ended {
                    return inbound.decoder.finish().map(|()| None);
                }
                match self.receive(&mut inbound) {
                    Ok(()) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            self.socket.readable().await?;
        }
    }

    /// Fetches what a process that has ended left behind, as far as it is bounded. The daemon takes its streams away
    /// two seconds after the end, and loses what lies in its pipes if the reader was slower than that.
    pub(super) async fn read_ahead(&self) {
        loop {
            {
                let mut inbound = self.inbound();
                if inbound.ended || inbound.decoder.buffer.len() >= AHEAD {
                    return;
                }
                match self.receive(&mut inbound) {
                    Ok(()) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // The reader will meet it too.
                    Err(_) => return,
                }
            }
            if self.socket.readable().await.is_err() {
                return;
            }
        }
    }
}

/// Output as a stream. When it is dropped the daemon is told that nobody reads any more.
pub(super) fn output(wire: Arc<Wire>, tried: String) -> BoxStream<'static, Result<Output>> {
    struct Reader(Arc<Wire>);
    impl Drop for Reader {
        fn drop(&mut self) {
            let _ = shutdown(&self.0.socket, Shutdown::Read);
        }
    }
    let failed = move |error| RuntimeError::new(Kind::Unavailable, tried.clone()).with_source(error);
    stream::try_unfold((Reader(wire), failed), |(reader, failed)| async move {
        let next = reader.0.next().await.map_err(&failed)?;
        Ok(next.map(|output| (output, (reader, failed))))
    })
    .boxed()
}

/// What the end of standard input is, to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndOfInput {
    /// The daemon closes the process' standard input when its client has closed that direction.
    HalfClose,
    /// With a terminal the daemon would let go of the output too. So the process is told as by a person at a terminal.
    Typed,
    /// Nothing: the container keeps its standard input for who attaches next.
    Nothing,
}

/// The process' standard input.
#[derive(Debug)]
pub(super) struct Stdin {
    wire: Arc<Wire>,
    end: EndOfInput,
    closed: bool,
    /// The end of file, as far as it is still to be typed.
    to_type: usize,
    mid_line: bool,
}

impl Stdin {
    pub(super) fn new(wire: Arc<Wire>, end: EndOfInput) -> Self {
        Self { wire, end, closed: false, to_type: 0, mid_line: false }
    }

    /// Notes the end; what has to be typed then is typed by [`Stdin::type_end`].
    fn close(&mut self) {
        if self.closed {
            return;
        }
        self.closed = true;
        match self.end {
            EndOfInput::HalfClose => {
                // A process that is gone needs no end of file.
                let _ = shutdown(&self.wire.socket, Shutdown::Write);
            }
            // In the middle of a line the first only hands over what was typed.
            EndOfInput::Typed => self.to_type = if self.mid_line { 2 } else { 1 },
            EndOfInput::Nothing => {}
        }
    }

    fn type_end(&mut self) -> io::Result<()> {
        while self.to_type > 0 {
            self.to_type -= self.wire.socket.try_write(&[END_OF_TRANSMISSION; 2][..self.to_type])?;
        }
        Ok(())
    }
}

fn byte_at(pieces: &[IoSlice<'_>], mut at: usize) -> Option<u8> {
    for piece in pieces {
        if let Some(byte) = piece.get(at) {
            return Some(*byte);
        }
        at -= piece.len();
    }
    None
}

impl AsyncWrite for Stdin {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        loop {
            ready!(self.wire.socket.poll_write_ready(cx))?;
            match self.wire.socket.try_write_vectored(pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(written) => {
                    if let Some(last) = written.checked_sub(1).and_then(|last| byte_at(pieces, last)) {
                        self.mid_line = !matches!(last, b'\n' | b'\r');
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        loop {
            match self.type_end() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.wire.socket.poll_write_ready(cx))?;
                }
                // As with the other kind of end: a process that is gone needs none.
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        self.close();
        // What does not fit now has nobody to wait for it.
        let _ = self.type_end();
    }
}

/// Takes the inbound bytes apart without copying them. The pieces of a long frame are delivered as they come.
#[derive(Debug)]
struct Decoder {
    buffer: BytesMut,
    framed: bool,
    /// The stream of the frame that has begun.
    source: LogSource,
    /// Bytes of it that are still to come.
    left: usize,
}

impl Decoder {
    fn new(framed: bool) -> Self {
        Self { buffer: BytesMut::new(), framed, source: LogSource::Stdout, left: 0 }
    }

    fn next(&mut self) -> Result<Option<Output>, Malformed> {
        if self.framed && self.left == 0 && !self.next_header()? {
            return Ok(None);
        }
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let length = if self.framed { self.left.min(self.buffer.len()) } else { self.buffer.len() };
        self.left = self.left.saturating_sub(length);
        Ok(Some(Output { source: self.source, bytes: self.buffer.split_to(length).freeze() }))
    }

    /// Begins the next frame that is not empty; false if its header is not there yet.
    fn next_header(&mut self) -> Result<bool, Malformed> {
        while self.left == 0 {
            let Some(header) = self.buffer.first_chunk::<FRAME_HEADER>() else { return Ok(false) };
            let [stream, _, _, _, length @ ..] = *header;
            let length = u32::from_be_bytes(length) as usize;
            self.source = match stream {
                0 | 1 => LogSource::Stdout,
                2 => LogSource::Stderr,
                3 if self.buffer.len() < FRAME_HEADER + length.min(LONGEST_ERROR) => return Ok(false),
                3 => {
                    let words = &self.buffer[FRAME_HEADER..FRAME_HEADER + length.min(LONGEST_ERROR)];
                    return Err(Malformed::Daemon(String::from_utf8_lossy(words).trim().to_owned()));
                }
                other => return Err(Malformed::Stream(other)),
            };
            self.left = length;
            let _header = self.buffer.split_to(FRAME_HEADER);
        }
        Ok(true)
    }

    /// At the connection's end: whether it ended where a frame does.
    fn finish(&self) -> io::Result<()> {
        if self.left == 0 && self.buffer.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// Everything that comes, up to `most` bytes; for the daemon's words about a process that could not be started.
pub(super) async fn text(wire: &Wire, most: usize) -> String {
    let mut all = Vec::new();
    while let Ok(Some(output)) = wire.next().await {
        all.extend_from_slice(&output.bytes);
        if all.len() >= most {
            break;
        }
    }
    String::from_utf8_lossy(&all[..all.len().min(most)]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(stream: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![stream, 0, 0, 0];
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    proptest! {
        #[test]
        fn frames_read_back_however_they_are_cut(
            frames in prop::collection::vec((1_u8..=2, prop::collection::vec(any::<u8>(), 0..40)), 0..12),
            cuts in prop::collection::vec(1_usize..30, 1..40),
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(stream, payload)| frame(*stream, payload)).collect();
            let mut decoder = Decoder::new(true);
            let mut seen: Vec<(LogSource, u8)> = Vec::new();
            let (mut rest, mut cuts) = (bytes.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                decoder.buffer.extend_from_slice(piece);
                rest = later;
                while let Some(output) = decoder.next().unwrap() {
                    prop_assert!(!output.bytes.is_empty());
                    seen.extend(output.bytes.iter().map(|byte| (output.source, *byte)));
                }
            }
            let source = |stream: u8| if stream == 2 { LogSource::Stderr } else { LogSource::Stdout };
            let wanted: Vec<_> = frames
                .iter()
                .flat_map(|(stream, payload)| payload.iter().map(|byte| (source(*stream), *byte)))
                .collect();
            prop_assert_eq!(seen, wanted);
            prop_assert!(decoder.finish().is_ok());
        }
    }

    #[test]
    fn a_terminals_bytes_are_no_frames() {
        let mut decoder = Decoder::new(false);
        decoder.buffer.extend_from_slice(b"\x01hello world");
        assert_eq!(decoder.next().unwrap().unwrap().bytes, "\x01hello world");
        assert_eq!(decoder.next().unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut decoder = Decoder::new(true);
        decoder.buffer.extend_from_slice(&frame(9, b"x"));
        assert_eq!(decoder.next(), Err(Malformed::Stream(9)));
        let mut decoder = Decoder::new(true);
        decoder.buffer.extend_from_slice(&frame(3, b"broken\n"));
        assert_eq!(decoder.next(), Err(Malformed::Daemon("broken".into())));
        let mut decoder = Decoder::new(true);
        decoder.buffer.extend_from_slice(&frame(1, b"cut off")[..12]);
        assert_eq!(decoder.next().unwrap().unwrap().bytes, "cut ");
        assert!(decoder.finish().is_err());
    }

    fn wire(framed: bool) -> (Arc<Wire>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Wire::new(Hijacked { socket: ours, ahead: bytes::Bytes::new() }, framed, true), theirs)
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_writer_up() {
        let (wire, mut daemon) = wire(false);
        let mut output = output(Arc::clone(&wire), String::new());
        let mut sent = 0;
        while let Ok(length) = daemon.try_write(&[7; CHUNK]) {
            sent += length;
        }
        assert_eq!(output.next().await.unwrap().unwrap().bytes.len(), CHUNK);
        assert_eq!(wire.inbound().decoder.buffer.len(), 0, "read ahead");
        daemon.shutdown().await.unwrap();
        let mut seen = CHUNK;
        while let Some(output) = output.next().await {
            seen += output.unwrap().bytes.len();
        }
        assert_eq!(seen, sent);
    }

    #[tokio::test]
    async fn what_an_ended_process_left_is_fetched_within_bounds() {
        let (wire, mut daemon) = wire(false);
        let writer = async move {
            let _ = daemon.write_all(&vec![7; 4 * AHEAD]).await;
            daemon
        };
        let mut writer = std::pin::pin!(writer);
        tokio::select! {
            // Both are dropped with the test.
            () = wire.read_ahead() => {}
            _ = &mut writer => panic!("all was taken"),
        }
        let held = wire.inbound().decoder.buffer.len();
        assert!((AHEAD..AHEAD + 2 * CHUNK).contains(&held), "{held}");
        let reading = async {
            let mut seen = 0;
            while seen < 4 * AHEAD {
                seen += wire.next().await.unwrap().unwrap().bytes.len();
            }
            seen
        };
        let (seen, _daemon) = tokio::join!(reading, &mut writer);
        assert_eq!(seen, 4 * AHEAD, "and comes first");
    }

    #[tokio::test]
    async fn a_writer_is_told_that_the_process_is_gone() {
        let (wire, daemon) = wire(false);
        let mut stdin = Stdin::new(Arc::clone(&wire), EndOfInput::HalfClose);
        let fill = async { while stdin.write_all(&[0; CHUNK]).await.is_ok() {} };
        let end = async {
            shutdown(&daemon, Shutdown::Write).unwrap();
            assert_eq!(wire.next().await.unwrap(), None);
        };
        tokio::join!(fill, end);
    }

    #[tokio::test]
    async fn the_end_of_input_is_said_as_the_daemon_needs_it() {
        for (end, typed, wanted) in [
            (EndOfInput::HalfClose, "ab", "ab"),
            (EndOfInput::Typed, "ab\r", "ab\r\x04"),
            (EndOfInput::Typed, "ab", "ab\x04\x04"),
        ] {
            let (wire, mut daemon) = wire(false);
            let mut stdin = Stdin::new(wire, end);
            stdin.write_all(typed.as_bytes()).await.unwrap();
            stdin.shutdown().await.unwrap();
            assert_eq!(stdin.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
            let mut seen = vec![0; wanted.len()];
            daemon.read_exact(&mut seen).await.unwrap();
            assert_eq!(seen, wanted.as_bytes());
            let more = daemon.read(&mut [0]).now_or_never();
            assert_eq!(more.is_some(), end == EndOfInput::HalfClose, "whether the connection was closed");
        }
    }
}
