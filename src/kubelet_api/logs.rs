//! `/containerLogs`: finds the container, then hands its log through line by line, holding no more than a batch of it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, Stream, StreamExt};
use http::{StatusCode, header};
use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use tokio::time::{Sleep, sleep};
use tracing::warn;

use super::log_query::{LogFormat, LogQuery, QueryError};
use super::targets::{LogTarget, TargetError};
use super::{App, log_span, runtime_status};
use crate::runtime::types::{LogChunk, LogSource};
use crate::runtime::{Result as RuntimeResult, RuntimeError};
use crate::telemetry::chain;

/// Small pieces that are ready at once travel together up to about this many bytes (one TLS record); larger pieces are
/// handed on in slices of this size without a copy.
const BATCH: usize = 16 << 10;
/// Chunks looked at before others get their turn, where a filter lets none through.
const TURN: usize = 256;

/// Between the last bytes and a broken connection. hyper throws away what it has not written yet when a body fails, so
/// without a pause the client would lose lines, or even the answer's head.
const BREAK_PAUSE: Duration = Duration::from_millis(200);

/// Why there is no log. `Display` is the body of the answer, so it says what kubectl should print.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogError {
    #[error("unable to decode query: it is not form-encoded")]
    Encoding,
    #[error("{0}")]
    Query(QueryError),
    #[error("{0}")]
    Target(TargetError),
    #[error("failed to read the log of container {container:?} in pod {pod:?}: {}", chain(cause))]
    Runtime { pod: String, container: String, cause: RuntimeError },
}

impl IntoResponse for LogError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Encoding => StatusCode::BAD_REQUEST,
            Self::Query(error) => error.status(),
            Self::Target(error) => error.status(),
            Self::Runtime { cause, .. } => runtime_status(cause.kind()),
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// GET `/containerLogs/{namespace}/{pod}/{container}`.
pub(super) async fn container_logs(
    State(app): State<App>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    pairs: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Response, LogError> {
    let Query(pairs) = pairs.map_err(|_| LogError::Encoding)?;
    let query = LogQuery::parse(&pairs, Timestamp::now()).map_err(LogError::Query)?;
    let target = app.targets.log_target(&namespace, &pod, &container, query.previous).await;
    let opened = match target.map_err(LogError::Target)? {
        LogTarget::One(id) => app.runtime.logs(&id, &query.options).await,
        LogTarget::Many(span) => log_span::open(app.runtime, span, query.options).await,
    };
    let chunks = match opened {
        Ok(chunks) => chunks,
        Err(cause) => return Err(LogError::Runtime { pod, container, cause }),
    };
    let lines = LogStream::new(chunks, query.format, app.meters.log_bytes.clone());
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(lines)).into_response())
}

/// Pure: which bytes of the chunks a client gets.
#[derive(Debug)]
struct LineWriter {
    timestamps: bool,
    since: Option<Timestamp>,
    only: Option<LogSource>,
    /// Bytes that may still be written; `None` is no bound.
    left: Option<u64>,
    /// Whether the line now being read is wanted, for stdout and stderr: parts of their lines come interleaved.
    wanted: [bool; 2],
}

impl LineWriter {
    fn new(format: LogFormat) -> Self {
        let LogFormat { timestamps, since, limit, only } = format;
        // A log that opens in the middle of a line opens with a line older than `since`.
        Self { timestamps, since, only, left: limit, wanted: [since.is_none(); 2] }
    }

    /// The time that goes before the chunk's bytes, and the bytes, both cut at the limit.
    fn write(&mut self, chunk: LogChunk) -> (String, Bytes) {
        let index = match chunk.source {
            LogSource::Stdout => 0,
            LogSource::Stderr => 1,
        };
        if chunk.line_start {
            let early = self.since.is_some_and(|since| chunk.time < since);
            let other = self.only.is_some_and(|only| only != chunk.source);
            self.wanted[index] = !early && !other;
        } else if self.only.is_some_and(|only| only != chunk.source) {
            self.wanted[index] = false;
        }
        if !self.wanted[index] {
            return (String::new(), Bytes::new());
        }
        let mut time = String::new();
        if self.timestamps && chunk.line_start {
            // RFC 3339 with all nine digits, in UTC, as the CRI log format has it.
            time = format!("{:.9} ", chunk.time);
            time.truncate(self.take(time.len()));
        }
        let mut bytes = chunk.bytes;
        bytes.truncate(self.take(bytes.len()));
        (time, bytes)
    }

    /// How many of `wanted` bytes may be written; they are counted as written.
    fn take(&mut self, wanted: usize) -> usize {
        let Some(left) = &mut self.left else { return wanted };
        let granted = usize::try_from(*left).unwrap_or(usize::MAX).min(wanted);
        *left -= granted as u64;
        granted
    }

    fn is_full(&self) -> bool {
        self.left == Some(0)
    }
}

/// The body of the answer. It asks the runtime for more only when the client took what it has; dropping it (the client
/// is gone, or the limit is reached) drops the runtime's stream at once.
struct LogStream {
    /// `None` once it has ended.
    chunks: Option<BoxStream<'static, RuntimeResult<LogChunk>>>,
    writer: LineWriter,
    /// Small pieces, waiting to travel together.
    batch: BytesMut,
    /// A large piece that follows the batch.
    large: Bytes,
    /// An error that follows both, after a pause.
    failed: Option<(RuntimeError, Pin<Box<Sleep>>)>,
    /// Whether everything before the end has been handed over for sending.
    parted: bool,
    sent: Counter,
}

impl LogStream {
    fn new(chunks: BoxStream<'static, RuntimeResult<LogChunk>>, format: LogFormat, sent: Counter) -> Self {
        let writer = LineWriter::new(format);
        Self {
            chunks: Some(chunks),
            writer,
            batch: BytesMut::new(),
            large: Bytes::new(),
            failed: None,
            parted: false,
            sent,
        }
    }

    /// What is to be sent before more is read.
    fn pending(&mut self) -> Option<Bytes> {
        let full = self.batch.len() >= BATCH || !self.large.is_empty() || self.chunks.is_none();
        let next = if full && !self.batch.is_empty() {
            self.batch.split().freeze()
        } else {
            self.large.split_to(self.large.len().min(BATCH))
        };
        if next.is_empty() {
            return None;
        }
        self.sent.inc_by(next.len() as u64);
        Some(next)
    }

    fn take_in(&mut self, chunk: LogChunk) {
        let (time, bytes) = self.writer.write(chunk);
        self.batch.extend_from_slice(time.as_bytes());
        if bytes.len() < BATCH {
            self.batch.extend_from_slice(&bytes);
        } else {
            self.large = bytes;
        }
        if self.writer.is_full() {
            self.chunks = None;
        }
    }

    /// The end of the body, or the error it breaks off with. The end is sent by itself: an API server that hands a log on
    /// through a WebSocket drops the bytes that arrive together with it.
    fn end(&mut self, cx: &mut Context<'_>) -> Poll<Option<RuntimeResult<Bytes>>> {
        if !std::mem::replace(&mut self.parted, true) {
            // What waits is sent when there is nothing to add.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some((_, pause)) = &mut self.failed {
            ready!(pause.as_mut().poll(cx));
        }
        Poll::Ready(self.failed.take().map(|(error, _)| Err(error)))
    }

    fn flush(&mut self) -> Poll<Option<RuntimeResult<Bytes>>> {
        if self.batch.is_empty() {
            return Poll::Pending;
        }
        self.sent.inc_by(self.batch.len() as u64);
        Poll::Ready(Some(Ok(self.batch.split().freeze())))
    }
}

impl Stream for LogStream {
    type Item = RuntimeResult<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        for _ in 0..TURN {
            if let Some(bytes) = self.pending() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            let Some(chunks) = &mut self.chunks else {
                return self.end(cx);
            };
            match chunks.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(chunk))) => self.take_in(chunk),
                Poll::Ready(Some(Err(error))) => {
                    // The connection is broken off, so that the client does not take this for the log's end.
                    warn!(error = chain(&error), "a container log broke off");
                    self.failed = Some((error, Box::pin(sleep(BREAK_PAUSE))));
                    self.chunks = None;
                }
                Poll::Ready(None) => self.chunks = None,
                Poll::Pending => return self.flush(),
            }
        }
        cx.waker().wake_by_ref();
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::Kind;

    fn chunk(source: LogSource, nanos: i128, line_start: bool, bytes: &[u8]) -> LogChunk {
        let time = Timestamp::from_nanosecond(nanos).unwrap();
        LogChunk { source, time, line_start, bytes: Bytes::copy_from_slice(bytes) }
    }

    fn out(nanos: i128, text: &str) -> LogChunk {
        chunk(LogSource::Stdout, nanos, true, text.as_bytes())
    }

    fn run(chunks: Vec<LogChunk>, format: LogFormat) -> Vec<u8> {
        let chunks = stream::iter(chunks.into_iter().map(Ok)).boxed();
        let pieces = LogStream::new(chunks, format, Counter::default());
        futures::executor::block_on(pieces.map(|piece| piece.unwrap().to_vec()).concat())
    }

    #[test]
    fn the_last_bytes_are_sent_before_the_end_is_told() {
        let chunks = stream::iter([Ok(out(1, "last words\n"))]).boxed();
        let mut body = LogStream::new(chunks, LogFormat::default(), Counter::default());
        let mut context = Context::from_waker(std::task::Waker::noop());
        let mut next = || body.poll_next_unpin(&mut context).map(|piece| piece.map(Result::unwrap));
        assert_eq!(next(), Poll::Ready(Some(Bytes::from("last words\n"))));
        assert_eq!(next(), Poll::Pending, "a server sends what it has now");
        assert_eq!(next(), Poll::Ready(None));
    }

    fn text(chunks: Vec<LogChunk>, format: LogFormat) -> String {
        String::from_utf8(run(chunks, format)).unwrap()
    }

    fn stamped() -> LogFormat {
        LogFormat { timestamps: true, ..LogFormat::default() }
    }

    #[test]
    fn times_have_nine_digits_and_come_once_per_line() {
        let lines = vec![
            out(1_000_000_000, "whole\n"),
            out(1_500_000_000, "be"),
            chunk(LogSource::Stdout, 1_600_000_000, false, b"gun\n"),
            out(1_767_323_045_000_000_001, "last"),
        ];
        let wanted = "1970-01-01T00:00:01.000000000Z whole\n1970-01-01T00:00:01.500000000Z begun\n\
                      2026-01-02T03:04:05.000000001Z last";
        assert_eq!(text(lines, stamped()), wanted);
    }

    #[test]
    fn since_cuts_to_the_nanosecond_and_whole_lines() {
        let since = Some(Timestamp::from_nanosecond(10).unwrap());
        let lines = vec![
            chunk(LogSource::Stdout, 30, false, b"end of an older line\n"),
            out(9, "early, "),
            chunk(LogSource::Stderr, 10, true, b"error "),
            chunk(LogSource::Stdout, 11, false, b"though it ends late\n"),
            chunk(LogSource::Stderr, 12, false, b"whole\n"),
            out(10, "just in time\n"),
        ];
        let format = LogFormat { since, ..LogFormat::default() };
        assert_eq!(text(lines, format), "error whole\njust in time\n");
    }

    #[test]
    fn one_stream_alone_is_delivered() {
        let lines = || {
            vec![
                chunk(LogSource::Stderr, 1, false, b"tail\n"),
                out(1, "o1 "),
                chunk(LogSource::Stderr, 2, true, b"e1\n"),
                chunk(LogSource::Stdout, 3, false, b"o1\n"),
            ]
        };
        let only = |source| LogFormat { only: Some(source), ..LogFormat::default() };
        assert_eq!(text(lines(), only(LogSource::Stdout)), "o1 o1\n");
        assert_eq!(text(lines(), only(LogSource::Stderr)), "tail\ne1\n");
    }

    #[test]
    fn a_limit_counts_times_too_and_drops_the_source() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                DROPPED.with(|dropped| dropped.set(true));
            }
        }
        thread_local!(static DROPPED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
        let bomb = Bomb;
        let endless = stream::repeat_with(move || {
            let _ = &bomb;
            Ok(out(0, "line\n"))
        });
        let format = LogFormat { limit: Some(50), ..stamped() };
        let mut pieces = LogStream::new(endless.boxed(), format, Counter::default());
        let first = futures::executor::block_on(pieces.next()).unwrap().unwrap();
        assert_eq!(&first[..], &b"1970-01-01T00:00:00.000000000Z line\n1970-01-01T00:00:00.000000000Z "[..50]);
        assert!(DROPPED.with(std::cell::Cell::get));
        assert!(futures::executor::block_on(pieces.next()).is_none());
    }

    #[tokio::test]
    async fn an_error_comes_after_everything_before_it() {
        let broken = RuntimeError::new(Kind::Unavailable, "gone");
        let chunks = stream::iter(vec![Ok(out(1, "a\n")), Ok(out(2, &"b".repeat(BATCH))), Err(broken)]);
        let pieces = LogStream::new(chunks.boxed(), LogFormat::default(), Counter::default());
        let all = pieces.collect::<Vec<_>>().await;
        let (last, good) = all.split_last().unwrap();
        assert!(last.is_err());
        let delivered: usize = good.iter().map(|piece| piece.as_ref().unwrap().len()).sum();
        assert_eq!(delivered, 2 + BATCH);
    }

    #[test]
    fn what_is_there_goes_out_while_the_source_is_silent() {
        let chunks = stream::iter(vec![Ok(out(1, "a\n")), Ok(out(2, "b\n"))]).chain(stream::pending());
        let mut pieces = LogStream::new(chunks.boxed(), LogFormat::default(), Counter::default());
        assert_eq!(futures::executor::block_on(pieces.next()).unwrap().unwrap(), "a\nb\n");
    }

    #[test]
    fn every_target_error_has_a_status() {
        let (pod, container) = (|| "p".to_owned(), || "c".to_owned());
        for (error, wanted) in [
            (TargetError::NoPod(pod()), 404),
            (TargetError::NoContainer { pod: pod(), container: container() }, 404),
            (TargetError::Waiting { pod: pod(), container: container(), reason: pod() }, 400),
            (TargetError::NoPrevious { pod: pod(), container: container() }, 400),
        ] {
            assert_eq!(error.status().as_u16(), wanted);
        }
    }

    /// Chunks as a runtime makes them: any bytes, either stream, lines in parts, sizes around the batch size.
    fn chunks() -> impl Strategy<Value = Vec<LogChunk>> {
        let size = prop_oneof![8 => 0usize..40, 1 => (BATCH - 2)..(BATCH + 2), 1 => Just(3 * BATCH + 1)];
        let one =
            (any::<bool>(), 0i64..20, any::<bool>(), size, any::<u8>()).prop_map(|(err, nanos, start, size, byte)| {
                let source = if err { LogSource::Stderr } else { LogSource::Stdout };
                chunk(source, i128::from(nanos), start, &vec![byte; size])
            });
        prop::collection::vec(one, 0..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_limited_log_is_a_prefix_of_the_whole(chunks in chunks(), stamped in any::<bool>(), limit in 1u64..60_000) {
            let whole = run(chunks.clone(), LogFormat { timestamps: stamped, ..LogFormat::default() });
            let cut = run(chunks, LogFormat { timestamps: stamped, limit: Some(limit), ..LogFormat::default() });
            let length = whole.len().min(usize::try_from(limit).unwrap());
            prop_assert!(cut == whole[..length]);
        }

        #[test]
        fn without_options_every_byte_arrives_in_order(chunks in chunks()) {
            let wanted: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.to_vec()).collect();
            prop_assert!(run(chunks, LogFormat::default()) == wanted);
        }

        #[test]
        fn times_add_31_bytes_for_each_line_start(chunks in chunks()) {
            let starts = chunks.iter().filter(|chunk| chunk.line_start).count();
            let plain = run(chunks.clone(), LogFormat::default()).len();
            prop_assert_eq!(run(chunks, stamped()).len(), plain + starts * 31);
        }
    }
}
