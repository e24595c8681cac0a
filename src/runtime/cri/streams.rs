//! The streams of one process, over a connection to the runtime's streaming server: SPDY/3.1 with the subprotocol
//! `v4.channel.k8s.io` (KK staging/src/k8s.io/cri-streaming).
//!
//! WebSocket would be simpler, but the servers in containerd and CRI-O speak it up to version 4 only, in which a client
//! cannot end standard input without ending the connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::future::join;
use futures::stream::{self, BoxStream};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, Uri, upgrade};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::PollSender;

use crate::runtime::session::{Output, Terminal, TerminalSize};
use crate::runtime::types::LogSource;
use crate::runtime::{Kind, Result, RuntimeError};
use crate::spdy::frame::{Decoder, Encoder, Frame};

/// The server is on this host.
const PATIENCE: Duration = Duration::from_secs(30);
const SUBPROTOCOL: &str = "v4.channel.k8s.io";
/// Most of an error's words that are read.
const LONGEST_WORDS: usize = 64 << 10;
/// Bytes asked for in one read.
const CHUNK: usize = 64 << 10;
/// Most bytes of standard input in one frame.
const PIECE: usize = 32 << 10;
/// Frames that may wait for the socket, and pieces of output for the reader.
const WRITES_WAITING: usize = 8;
const PIECES_WAITING: usize = 8;
/// What a terminal takes for the end of its input (Control-D).
const END_OF_TRANSMISSION: u8 = 4;

/// The ids of a connection's streams. Each is there whether it is used or not, so they are always the same.
mod id {
    pub(super) const ERROR: u32 = 1;
    pub(super) const STDIN: u32 = 3;
    pub(super) const STDOUT: u32 = 5;
    pub(super) const STDERR: u32 = 7;
    pub(super) const RESIZE: u32 = 9;
}

/// Which streams are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

/// How far a process has come, as its connection tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing is known yet.
    Quiet,
    /// It wrote something.
    Wrote,
    /// The server told its end, or why there was none.
    Ended(Ending),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With this exit code.
    Code(i32),
    /// In the server's words.
    Failed(String),
    /// The connection broke off before anything was told.
    Lost,
}

/// A connection that carries the streams of one process.
pub(super) struct Streams {
    /// Frames that wait to be sent. The connection is closed once all of it is dropped.
    pub(super) writes: mpsc::Sender<Bytes>,
    pub(super) output: mpsc::Receiver<Output>,
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) pump: Pump,
}

/// Moves the bytes; to be [run](Self::run) for as long as the session lives.
pub(super) struct Pump {
    reader: OwnedReadHalf,
    ahead: BytesMut,
    output: mpsc::Sender<Output>,
    progress: watch::Sender<Progress>,
    writer: OwnedWriteHalf,
    frames: mpsc::Receiver<Bytes>,
}

/// Connects to the URL that the runtime gave out for these streams.
///
/// # Errors
/// [`Kind::Unsupported`] for a URL that is not plain HTTP, [`Kind::Unavailable`] if the server does not answer as one.
pub(super) async fn connect(url: &str, wanted: Wanted, tried: &str) -> Result<Streams> {
    let (socket, ahead) = match timeout(PATIENCE, upgraded(url, tried)).await {
        Ok(upgraded) => upgraded?,
        Err(late) => return Err(RuntimeError::new(Kind::Unavailable, tried).with_source(late)),
    };
    // Keys are to be echoed at once.
    let _ = socket.set_nodelay(true);
    let (reader, writer) = socket.into_split();
    let (writes, frames) = mpsc::channel(WRITES_WAITING);
    let (output, pieces) = mpsc::channel(PIECES_WAITING);
    let (progress, told) = watch::channel(Progress::Quiet);
    let lost = |error| RuntimeError::new(Kind::Unavailable, "the streams are closed").with_source(error);
    writes.send(opening(wanted)).await.map_err(lost)?;
    let pump = Pump { reader, ahead: BytesMut::from(&ahead[..]), output, progress, writer, frames };
    Ok(Streams { writes, output: pieces, progress: told, pump })
}

/// The frames that open every stream that the server waits for.
fn opening(wanted: Wanted) -> Bytes {
    let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
    let streams = [
        (true, id::ERROR, "error"),
        (wanted.stdin, id::STDIN, "stdin"),
        (wanted.stdout, id::STDOUT, "stdout"),
        (wanted.stderr, id::STDERR, "stderr"),
        (wanted.tty, id::RESIZE, "resize"),
    ];
    for (_, id, name) in streams.into_iter().filter(|(wanted, _, _)| *wanted) {
        encoder.open(&mut out, id, &[("streamtype", name)]);
    }
    out.freeze()
}

async fn upgraded(url: &str, tried: &str) -> Result<(TcpStream, Bytes)> {
    let unavailable = |error: Box<dyn std::error::Error + Send + Sync>| {
        RuntimeError::new(Kind::Unavailable, tried.to_owned()).with_source(error)
    };
    let unsupported = |what: &str| RuntimeError::new(Kind::Unsupported, format!("{tried}: the runtime's URL {what}"));
    let url: Uri = url.parse().map_err(|_| unsupported("cannot be read"))?;
    if url.scheme_str() != Some("http") {
        return Err(unsupported("is not plain HTTP (containerd: leave enable_tls_streaming off, on loopback)"));
    }
    let (Some(host), Some(path)) = (url.host(), url.path_and_query()) else {
        return Err(unsupported("names no host"));
    };
    let host = host.trim_matches(['[', ']']);
    let socket = TcpStream::connect((host, url.port_u16().unwrap_or(80))).await;
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket.map_err(|error| unavailable(error.into()))?))
        .await
        .map_err(|error| unavailable(error.into()))?;
    let request = Request::post(path.as_str())
        .header("host", url.authority().map_or("", |authority| authority.as_str()))
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .header("x-stream-protocol-version", SUBPROTOCOL)
        .body(Empty::<Bytes>::new())
        .map_err(|error| unavailable(error.into()))?;
    // The sender goes with this future, and with the sender the connection ends unless it was upgraded.
    let exchange = async move {
        let mut response = sender.send_request(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return upgrade::on(&mut response).await.map(Ok);
        }
        let (status, body) = (response.status(), Limited::new(response.into_body(), LONGEST_WORDS));
        let words = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Ok(Err(format!("{status} {}", String::from_utf8_lossy(&words).trim())))
    };
    let (_, answer): (_, hyper::Result<_>) = join(connection.with_upgrades(), exchange).await;
    let refused = |words| RuntimeError::new(Kind::Unavailable, format!("{tried}: {words}"));
    let upgraded = answer.map_err(|error| unavailable(error.into()))?.map_err(refused)?;
    let other = |_| RuntimeError::new(Kind::Internal, format!("{tried}: not the connection that was made"));
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().map_err(other)?;
    Ok((parts.io.into_inner(), parts.read_buf))
}

impl Pump {
    /// Until the server has told the end; with `while_wanted`, or nobody holds a stream any more.
    pub(super) async fn run(self, while_wanted: bool) {
        let Self { reader, ahead, output, progress, mut writer, mut frames } = self;
        let write = async {
            while let Some(frame) = frames.recv().await {
                if writer.write_all(&frame).await.is_err() {
                    break;
                }
            }
            // A server that is gone reads nothing, and what is queued for it is dropped with the queue.
            frames.close();
            while frames.recv().await.is_some() {}
            if while_wanted {
                output.closed().await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        let read = read(reader, ahead, &output, &progress);
        tokio::select! {
            // Either is done for good when it is ready, and the other has no use then: without the server nothing is
            // written, and what nobody wants is not read.
            () = read => {}
            () = write => {}
        }
    }
}

/// Takes the server's frames until it has told how the process ended.
async fn read(
    mut reader: OwnedReadHalf,
    mut buffer: BytesMut,
    output: &mpsc::Sender<Output>,
    progress: &watch::Sender<Progress>,
) {
    let (mut decoder, mut status) = (Decoder::default(), Vec::new());
    let ending = loop {
        match decoder.next(&mut buffer) {
            Ok(Some(Frame::Data { id: id::ERROR, bytes, ended })) => {
                let room = LONGEST_WORDS.saturating_sub(status.len());
                status.extend_from_slice(&bytes[..bytes.len().min(room)]);
                if let Some(ending) = ending(&status, ended) {
                    break ending;
                }
            }
            Ok(Some(Frame::Data { id, bytes, .. })) if !bytes.is_empty() => {
                progress.send_if_modified(|progress| {
                    let first = *progress == Progress::Quiet;
                    if first {
                        *progress = Progress::Wrote;
                    }
                    first
                });
                let source = if id == id::STDERR { LogSource::Stderr } else { LogSource::Stdout };
                // Nobody reads any more: the process may write all the same.
                let _ = output.send(Output { source, bytes }).await;
            }
            Ok(Some(Frame::Reset { id: id::ERROR } | Frame::GoAway)) | Err(_) => break Ending::Lost,
            Ok(Some(_)) => {}
            Ok(None) => {
                buffer.reserve(CHUNK);
                match reader.read_buf(&mut buffer).await {
                    Ok(0) | Err(_) => break ending(&status, true).unwrap_or(Ending::Lost),
                    Ok(_) => {}
                }
            }
        }
    };
    progress.send_replace(Progress::Ended(ending));
}

/// A `metav1.Status`, as far as it says how a process ended.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    status: String,
    message: String,
    reason: String,
    details: Option<Details>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
    message: String,
}

/// What the error stream says; `None` while it is not whole.
fn ending(text: &[u8], whole: bool) -> Option<Ending> {
    let status: Status = match serde_json::from_slice(text) {
        Ok(status) => status,
        Err(_) if whole => return Some(Ending::Lost).filter(|_| !text.is_empty()),
        Err(_) => return None,
    };
    if status.status == "Success" {
        return Some(Ending::Code(0));
    }
    let causes = status.details.unwrap_or_default().causes;
    let code = causes.iter().find(|cause| cause.reason == "ExitCode").and_then(|cause| cause.message.parse().ok());
    Some(match code.filter(|_| status.reason == "NonZeroExitCode") {
        Some(code) => Ending::Code(code),
        None => Ending::Failed(status.message),
    })
}

/// The output of those sources that are asked for, as a stream.
pub(super) fn output(
    pieces: mpsc::Receiver<Output>,
    asked: impl Fn(LogSource) -> bool + Send + 'static,
) -> BoxStream<'static, Result<Output>> {
    let pieces = stream::unfold(pieces, |mut pieces| async move { Some((pieces.recv().await?, pieces)) });
    pieces.filter(move |piece| std::future::ready(asked(piece.source))).map(Ok).boxed()
}

/// What the end of standard input is, to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndOfInput {
    /// The server closes the process' standard input.
    Closed,
    /// With a terminal nothing is closed. So the process is told as by a person at a terminal.
    Typed,
    /// Nothing: the container keeps its standard input for who attaches next.
    Nothing,
}

/// The process' standard input.
#[derive(Debug)]
pub(super) struct Stdin {
    writes: PollSender<Bytes>,
    end: EndOfInput,
    closed: bool,
    mid_line: bool,
}

impl Stdin {
    pub(super) fn new(writes: mpsc::Sender<Bytes>, end: EndOfInput) -> Self {
        Self { writes: PollSender::new(writes), end, closed: false, mid_line: false }
    }

    /// The frame that tells the end, if one does.
    fn last(&self) -> Option<Bytes> {
        match self.end {
            EndOfInput::Closed => Some(frame(id::STDIN, &[], true)),
            // In the middle of a line the first only hands over what was typed.
            EndOfInput::Typed => {
                Some(frame(id::STDIN, &[END_OF_TRANSMISSION; 2][..1 + usize::from(self.mid_line)], false))
            }
            EndOfInput::Nothing => None,
        }
    }
}

impl AsyncWrite for Stdin {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        if self.closed {
            return Poll::Ready(Err(gone()));
        }
        if std::task::ready!(self.writes.poll_reserve(cx)).is_err() {
            return Poll::Ready(Err(gone()));
        }
        let piece = &bytes[..bytes.len().min(PIECE)];
        if let Some(last) = piece.last() {
            self.mid_line = !matches!(last, b'\n' | b'\r');
        }
        let sent = self.writes.send_item(frame(id::STDIN, piece, false));
        Poll::Ready(sent.map(|()| piece.len()).map_err(|_| gone()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(last) = self.last().filter(|_| !self.closed) else {
            self.closed = true;
            return Poll::Ready(Ok(()));
        };
        // A process that is gone needs no end of file.
        if std::task::ready!(self.writes.poll_reserve(cx)).is_ok() {
            let _ = self.writes.send_item(last);
        }
        self.closed = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if let Some(last) = self.last().filter(|_| !self.closed) {
            // What does not fit now has nobody to wait for it.
            if let Some(writes) = self.writes.get_ref() {
                let _ = writes.try_send(last);
            }
        }
    }
}

fn frame(id: u32, bytes: &[u8], ended: bool) -> Bytes {
    let mut out = BytesMut::new();
    Encoder::default().data(&mut out, id, bytes, ended);
    out.freeze()
}

/// The terminal of the process, if it has one.
pub(super) struct SpdyTerminal {
    pub(super) writes: mpsc::Sender<Bytes>,
    pub(super) present: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

#[async_trait]
impl Terminal for SpdyTerminal {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        if !self.present || size.width == 0 || size.height == 0 {
            return Ok(());
        }
        let size = Size { width: size.width, height: size.height };
        let text = serde_json::to_vec(&size)
            .map_err(|error| RuntimeError::new(Kind::Internal, "failed to write a size").with_source(error))?;
        // A terminal that is gone needs no size.
        let _ = self.writes.send(frame(id::RESIZE, &text, false)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spdy::connection::{Connection, Event};

    #[test]
    fn a_server_sees_the_streams_that_were_asked_for() {
        let wanted = Wanted { stdin: true, stdout: true, stderr: false, tty: true };
        let mut bytes = BytesMut::from(&opening(wanted)[..]);
        let mut server = Connection::new(8);
        let opened = std::iter::from_fn(|| server.next(&mut bytes).unwrap()).map(|event| match event {
            Event::Opened { id, headers, ended: false } => (id, headers.get("streamtype").unwrap().to_owned()),
            other => panic!("{other:?}"),
        });
        let wanted = [(1, "error"), (3, "stdin"), (5, "stdout"), (9, "resize")];
        assert_eq!(opened.collect::<Vec<_>>(), wanted.map(|(id, name)| (id, name.to_owned())));
    }

    #[test]
    fn the_error_stream_tells_how_it_ended() {
        let failed = r#"{"metadata":{},"status":"Failure","message":"m","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(ending(failed.as_bytes(), false), Some(Ending::Code(3)));
        assert_eq!(ending(&failed.as_bytes()[..40], false), None);
        assert_eq!(ending(br#"{"metadata":{},"status":"Success"}"#, false), Some(Ending::Code(0)));
        let broken = br#"{"status":"Failure","message":"no such file","reason":"InternalError","code":500}"#;
        assert_eq!(ending(broken, false), Some(Ending::Failed("no such file".to_owned())));
        assert_eq!(ending(b"", true), None);
        assert_eq!(ending(b"torn", true), Some(Ending::Lost));
    }

    #[tokio::test]
    async fn the_end_of_input_is_told_once_and_as_the_process_needs_it() {
        for (end, typed, wanted) in [
            (EndOfInput::Closed, "x", vec![frame(id::STDIN, b"x", false), frame(id::STDIN, b"", true)]),
            (EndOfInput::Typed, "x\n", vec![frame(id::STDIN, b"x\n", false), frame(id::STDIN, &[4], false)]),
            (EndOfInput::Typed, "x", vec![frame(id::STDIN, b"x", false), frame(id::STDIN, &[4, 4], false)]),
            (EndOfInput::Nothing, "x", vec![frame(id::STDIN, b"x", false)]),
        ] {
            let (writes, mut frames) = mpsc::channel(8);
            let mut stdin = Stdin::new(writes, end);
            stdin.write_all(typed.as_bytes()).await.unwrap();
            stdin.shutdown().await.unwrap();
            drop(stdin);
            let mut sent = Vec::new();
            while let Some(frame) = frames.recv().await {
                sent.push(frame);
            }
            assert_eq!(sent, wanted, "{end:?} after {typed:?}");
        }
    }

    #[tokio::test]
    async fn only_plain_http_is_spoken() {
        for url in ["https://127.0.0.1:1/exec/x", "not a url", "/exec/x"] {
            let error = connect(url, Wanted::default(), "failed").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unsupported, "{url}: {error}");
        }
    }
}
