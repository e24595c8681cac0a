//! Pure: the bytes of Docker's logs endpoint as records, and records as whole lines.
//!
//! Docker keeps a log as records of at most 16 KiB; with `timestamps=1` each begins with its time and a space. Without
//! a terminal each record is a frame (stream number, three zeros, length, payload); with one there are no frames.
//! Daemons before API 1.42 do not end the last record of a line of several records with its newline:
//!
//! ```text
//! 40000 bytes + newline  ->  [16384] [16384] [7232]   and the newline is to be put back after the third
//! ```
//! So there a last line that is longer than a record and has no newline looks just like one that has, and gets one.

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

use crate::runtime::types::{LogChunk, LogSource};

/// Bytes of a record that is not the last of its line.
const FULL_RECORD: usize = 16 << 10;
const FRAME_HEADER: usize = 8;
/// No daemon sends a record near this long; more is not a log.
const LONGEST_FRAME: usize = 4 << 20;
/// "2026-11-21T07:15:43.359877326Z" and the longest with a zone ("+02:00").
const TIME_LENGTHS: [usize; 2] = [30, 35];

/// One record, its time taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) source: LogSource,
    pub(super) time: Timestamp,
    pub(super) bytes: Bytes,
}

impl Record {
    fn ends_line(&self) -> bool {
        self.bytes.ends_with(b"\n")
    }
}

/// Why a log cannot be read on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a frame of {0} bytes")]
    FrameLength(usize),
    #[error("stream number {0}")]
    Stream(u8),
    #[error("no time at the start of a record")]
    Time,
    #[error("Docker could not read it: {0}")]
    Daemon(String),
}

/// Takes the endpoint's bytes apart.
#[derive(Debug)]
pub(super) struct Decoder {
    buffer: BytesMut,
    framed: bool,
    /// Without frames: the record before did not end its line, or (at the beginning) may not have.
    continued: bool,
}

impl Decoder {
    pub(super) fn new(framed: bool) -> Self {
        Self { buffer: BytesMut::new(), framed, continued: true }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next record that is there whole. `ended` is whether nothing more will be pushed.
    pub(super) fn next(&mut self, ended: bool) -> Result<Option<Record>, Malformed> {
        if self.framed { self.next_frame() } else { self.next_raw(ended) }
    }

    fn next_frame(&mut self) -> Result<Option<Record>, Malformed> {
        let Some(header) = self.buffer.first_chunk::<FRAME_HEADER>() else { return Ok(None) };
        let [stream, _, _, _, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if length > LONGEST_FRAME {
            return Err(Malformed::FrameLength(length));
        }
        if self.buffer.len() < FRAME_HEADER + length {
            return Ok(None);
        }
        let frame = self.buffer.split_to(FRAME_HEADER + length).freeze().slice(FRAME_HEADER..);
        let source = match stream {
            0 | 1 => LogSource::Stdout,
            2 => LogSource::Stderr,
            3 => return Err(Malformed::Daemon(String::from_utf8_lossy(&frame).trim().to_owned())),
            other => return Err(Malformed::Stream(other)),
        };
        let (time, taken) = leading_time(&frame).ok_or(Malformed::Time)?;
        Ok(Some(Record { source, time, bytes: frame.slice(taken..) }))
    }

    fn next_raw(&mut self, ended: bool) -> Result<Option<Record>, Malformed> {
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let Some((time, taken)) = leading_time(&self.buffer) else {
            let could_be_short = self.buffer.len() <= TIME_LENGTHS[1] && !ended;
            return if could_be_short { Ok(None) } else { Err(Malformed::Time) };
        };
        let content = &self.buffer[taken..];
        let content = &content[..content.len().min(FULL_RECORD)];
        let line_end = content.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        // The last record of a long line may lack its newline; then the next record's time follows in the middle.
        let cut = if self.continued { embedded_time(&content[..line_end.unwrap_or(content.len())]) } else { None };
        let length = match (cut, line_end) {
            (Some(at), _) => at,
            (None, Some(end)) => end,
            (None, None) if ended || content.len() == FULL_RECORD => content.len(),
            (None, None) => return Ok(None),
        };
        let mut record = self.buffer.split_to(taken + length).freeze();
        let bytes = record.split_off(taken);
        let record = Record { source: LogSource::Stdout, time, bytes };
        self.continued = record.bytes.len() == FULL_RECORD && !record.ends_line();
        Ok(Some(record))
    }
}

/// The time a record begins with, and how many bytes it and its space take.
fn leading_time(bytes: &[u8]) -> Option<(Timestamp, usize)> {
    let space = bytes.iter().take(TIME_LENGTHS[1] + 1).position(|byte| *byte == b' ')?;
    let time = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    Some((time, space + 1))
}

/// Where in `content` something begins that reads as a record's time.
fn embedded_time(content: &[u8]) -> Option<usize> {
    let looks_so = |at: usize| {
        TIME_LENGTHS.iter().any(|length| content.get(at + length) == Some(&b' '))
            && content.get(at + 4) == Some(&b'-')
            && content.get(at + 10) == Some(&b'T')
            && content.get(at + 19) == Some(&b'.')
    };
    (0..content.len()).find(|at| looks_so(*at) && leading_time(&content[*at..]).is_some())
}

/// Follows where lines begin and end, per stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lines {
    /// Whether a line has begun and not ended: on standard output, on standard error.
    open: [bool; 2],
    /// Whether to leave out what is left of the open line.
    dropping: [bool; 2],
    restores_newlines: bool,
}

impl Lines {
    pub(super) fn new(restores_newlines: bool) -> Self {
        Self { restores_newlines, ..Self::default() }
    }

    /// Whether the next record of this stream begins a line.
    pub(super) fn at_start(&self, source: LogSource) -> bool {
        !self.open[index(source)]
    }

    /// The same position, but what is left of lines begun before it is not wanted.
    pub(super) fn without_begun(mut self) -> Self {
        self.dropping = self.open;
        self
    }

    /// Moves over a record: where its line stands and whether its newline has to be put back.
    pub(super) fn advance(&mut self, record: &Record) -> bool {
        let open = &mut self.open[index(record.source)];
        let restore = self.restores_newlines && *open && !record.ends_line() && record.bytes.len() < FULL_RECORD;
        *open = !record.ends_line() && !restore;
        restore
    }

    /// The record as a piece of the log, if it is wanted.
    pub(super) fn chunk(&mut self, record: Record) -> Option<LogChunk> {
        let line_start = self.at_start(record.source);
        let restore = self.advance(&record);
        let dropping = &mut self.dropping[index(record.source)];
        if *dropping {
            *dropping = self.open[index(record.source)];
            return None;
        }
        let bytes = if restore { [&record.bytes[..], b"\n"].concat().into() } else { record.bytes };
        Some(LogChunk { source: record.source, time: record.time, line_start, bytes })
    }
}

fn index(source: LogSource) -> usize {
    match source {
        LogSource::Stdout => 0,
        LogSource::Stderr => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2026-11-21T07:15:43.359877326Z ";
    const LATER: &str = "2026-11-21T09:15:44.000000001+02:00 ";

    fn frame(stream: u8, time: &str, bytes: &[u8]) -> Vec<u8> {
        let length = (time.len() + bytes.len()) as u32;
        [&[stream, 0, 0, 0][..], &length.to_be_bytes(), time.as_bytes(), bytes].concat()
    }

    /// Everything in `input`, fed in pieces of `step` bytes.
    fn decode(framed: bool, input: &[u8], step: usize) -> Vec<Record> {
        let mut decoder = Decoder::new(framed);
        let mut records = Vec::new();
        for piece in input.chunks(step) {
            decoder.push(piece);
            while let Some(record) = decoder.next(false).unwrap() {
                records.push(record);
            }
        }
        while let Some(record) = decoder.next(true).unwrap() {
            records.push(record);
        }
        records
    }

    fn text(records: &[Record], restores: bool) -> Vec<u8> {
        let mut lines = Lines::new(restores);
        records.iter().filter_map(|record| lines.chunk(record.clone())).flat_map(|chunk| chunk.bytes).collect()
    }

    #[test]
    fn frames_cut_anywhere_are_put_together() {
        let input = [frame(1, TIME, b"one\n"), frame(2, LATER, b"\xff\x00two"), frame(1, TIME, b"")].concat();
        for step in [1, 7, 1000] {
            let records = decode(true, &input, step);
            let seen: Vec<_> = records.iter().map(|r| (r.source, r.bytes.as_ref())).collect();
            assert_eq!(
                seen,
                [(LogSource::Stdout, b"one\n".as_ref()), (LogSource::Stderr, b"\xff\x00two"), (LogSource::Stdout, b"")]
            );
        }
    }

    #[test]
    fn the_newline_of_a_long_line_is_put_back() {
        let long = vec![b'x'; FULL_RECORD];
        let input = [frame(1, TIME, &long), frame(1, TIME, b"end"), frame(1, LATER, b"next\n")].concat();
        let records = decode(true, &input, 4096);
        assert_eq!(text(&records, true), [&long[..], b"end\nnext\n"].concat());
        assert_eq!(text(&records, false), [&long[..], b"endnext\n"].concat());
    }

    #[test]
    fn a_line_of_exactly_one_record_ends_too() {
        let long = vec![b'x'; FULL_RECORD];
        let input = [frame(1, TIME, &long), frame(1, TIME, b""), frame(1, LATER, b"next\n")].concat();
        assert_eq!(text(&decode(true, &input, 4096), true), [&long[..], b"\nnext\n"].concat());
    }

    #[test]
    fn a_last_line_without_newline_stays_without() {
        let records = decode(true, &frame(1, TIME, b"prompt> "), 100);
        assert_eq!(text(&records, true), b"prompt> ");
    }

    #[test]
    fn a_terminals_log_is_split_by_line_and_by_record() {
        let long = vec![b'x'; FULL_RECORD];
        let input =
            [TIME.as_bytes(), b"a\r\n", LATER.as_bytes(), &long, LATER.as_bytes(), b"end\r", TIME.as_bytes(), b"b\r\n"]
                .concat();
        for step in [1, 1000, 100_000] {
            assert_eq!(text(&decode(false, &input, step), true), [b"a\r\n", &long[..], b"end\r\nb\r\n"].concat());
        }
    }

    #[test]
    fn what_is_no_log_is_an_error_and_no_panic() {
        let next = |framed, bytes: &[u8]| {
            let mut decoder = Decoder::new(framed);
            decoder.push(bytes);
            decoder.next(true)
        };
        assert_eq!(next(true, &frame(1, "", b"no time at all")), Err(Malformed::Time));
        assert_eq!(next(true, &[1, 0, 0, 0, 255, 255, 255, 255]), Err(Malformed::FrameLength(u32::MAX as usize)));
        assert_eq!(next(true, &frame(9, TIME, b"x")), Err(Malformed::Stream(9)));
        assert_eq!(next(true, &frame(3, "", b"broken\n")), Err(Malformed::Daemon("broken".into())));
        assert_eq!(next(false, b"nonsense nonsense nonsense nonsense nonsense"), Err(Malformed::Time));
    }

    #[test]
    fn the_rest_of_a_begun_line_can_be_left_out() {
        let full = Record { source: LogSource::Stdout, time: Timestamp::now(), bytes: vec![b'x'; FULL_RECORD].into() };
        let mut lines = Lines::new(true);
        lines.advance(&full);
        let mut lines = lines.without_begun();
        assert_eq!(lines.chunk(Record { bytes: "tail".into(), ..full.clone() }), None);
        assert!(lines.chunk(Record { bytes: "new\n".into(), ..full }).is_some_and(|chunk| chunk.line_start));
    }
}
