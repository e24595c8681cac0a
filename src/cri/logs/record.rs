//! Pure: the lines of a CRI log file, and how far one was written.
//!
//! ```text
//! 2026-11-21T07:15:43.359877326Z stdout F a whole line, or the end of one
//! 2026-11-21T07:15:43.359877326Z stderr P a piece of a line: the beginning of a long one, or one without a newline so far
//! 2026-11-21T07:15:43.359877326+00:00 stderr F
//! ```
//! The last ends a line that was cut off before its newline. No piece stands behind it, so it is told from those that
//! have one: its time is written with an offset, which readers take for the same.
//!
//! Each piece is written at once. The file is all that is known of a log after a restart, and what were held back until
//! the next piece of its stream would be behind what the other stream wrote meanwhile.

use std::cmp::Ordering;
use std::io::{self, Write as _};

use jiff::Timestamp;
use jiff::tz::Offset;

use crate::runtime::types::{LogChunk, LogSource};

/// Ends the time of a line that stands for no piece.
const OFFSET: &[u8] = b"+00:00";
const SOURCES: [LogSource; 2] = [LogSource::Stdout, LogSource::Stderr];

/// How far a stream was written: the time of the last piece, how many of exactly that time were, and whether its line
/// goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    time: Timestamp,
    count: u32,
    open: bool,
}

/// How far a log was written, each stream for itself: times grow along a stream, and a piece of a long line can be older
/// than what the other stream wrote before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    streams: [Option<Mark>; 2],
}

// === impl Position ===

impl Position {
    /// Where reading goes on; `None` from the beginning. Not after a piece whose line goes on: who reads from there would
    /// take the next one for the beginning of a line.
    pub(super) fn since(&self) -> Option<Timestamp> {
        let marks = self.streams.iter().flatten();
        let open = marks.clone().filter(|mark| mark.open).map(|mark| mark.time).min();
        open.or(marks.map(|mark| mark.time).max())
    }

    /// Adds the lines of the next piece.
    pub(super) fn push(&mut self, chunk: &LogChunk, out: &mut Vec<u8>) -> io::Result<()> {
        let stream = name(chunk.source);
        let mark = &mut self.streams[index(chunk.source)];
        if let Some(mark) = mark.as_mut().filter(|mark| mark.open && chunk.line_start) {
            // A line that was cut off ends where the next begins.
            writeln!(out, "{:.9} {stream} F ", mark.time.display_with_offset(Offset::UTC))?;
            mark.open = false;
        }
        let text = chunk.bytes.strip_suffix(b"\n");
        // A last line has no end, or who reads the log would add a newline that was never written.
        let open = text.is_none();
        write!(out, "{:.9} {stream} {} ", chunk.time, tag(open))?;
        out.extend_from_slice(text.unwrap_or(&chunk.bytes));
        out.push(b'\n');
        self.passed(chunk.source, chunk.time, open);
        Ok(())
    }

    fn passed(&mut self, source: LogSource, time: Timestamp, open: bool) {
        let mark = &mut self.streams[index(source)];
        let before = mark.filter(|mark| mark.time == time).map_or(0, |mark| mark.count);
        *mark = Some(Mark { time, count: before + 1, open });
    }

    /// The position at the end of a file, of which these are the last lines; what is torn there does not count.
    pub(super) fn at_end_of(lines: &[u8]) -> Self {
        let mut position = Self::default();
        let whole = lines.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
        for Line { time, source, open, is_piece, .. } in whole.filter_map(line) {
            if is_piece {
                position.passed(source, time, open);
            } else if let Some(mark) = &mut position.streams[index(source)] {
                mark.open = false;
            }
        }
        position
    }

    /// The same if there is more of the file, in front: a stream that is not seen was written before the other.
    pub(super) fn of_the_end_only(mut self) -> Self {
        let latest = self.streams.iter().flatten().max_by_key(|mark| mark.time).copied();
        let unseen = latest.map(|mark| Mark { count: 0, open: false, ..mark });
        self.streams.iter_mut().for_each(|mark| *mark = mark.or(unseen));
        self
    }

    /// With what another says of streams that this one does not know.
    pub(super) fn or(self, other: Self) -> Self {
        let [stdout, stderr] = self.streams;
        Self { streams: [stdout.or(other.streams[0]), stderr.or(other.streams[1])] }
    }

    /// As one line for each stream, and back.
    pub(super) fn write(&self) -> String {
        let line = |(source, mark): (LogSource, Option<Mark>)| {
            mark.map(|Mark { time, count, open }| format!("{time:.9} {} {} {count}\n", name(source), tag(open)))
        };
        SOURCES.into_iter().zip(self.streams).filter_map(line).collect()
    }

    pub(super) fn read(text: &str) -> Self {
        let mark = |text: &str| {
            let Line { time, source, open, rest, .. } = line(text.as_bytes())?;
            Some((source, Mark { time, count: std::str::from_utf8(rest).ok()?.parse().ok()?, open }))
        };
        let mut position = Self::default();
        for (source, mark) in text.lines().filter_map(mark) {
            position.streams[index(source)] = Some(mark);
        }
        position
    }
}

/// Leaves out what was written before.
#[derive(Debug)]
pub(super) struct Skip {
    from: Position,
    seen: [u32; 2],
}

impl Skip {
    pub(super) fn to(from: Position) -> Self {
        Self { from, seen: [0; 2] }
    }

    /// Whether this piece is new.
    pub(super) fn is_new(&mut self, chunk: &LogChunk) -> bool {
        let slot = index(chunk.source);
        let Some(mark) = self.from.streams[slot] else { return true };
        match chunk.time.cmp(&mark.time) {
            Ordering::Less => false,
            Ordering::Equal => {
                self.seen[slot] += 1;
                self.seen[slot] > mark.count
            }
            Ordering::Greater => true,
        }
    }
}

// === The words of a line ===

struct Line<'a> {
    time: Timestamp,
    source: LogSource,
    open: bool,
    /// Or else it only ends the one before.
    is_piece: bool,
    rest: &'a [u8],
}

fn line(text: &[u8]) -> Option<Line<'_>> {
    let mut words = text.splitn(4, |byte| *byte == b' ');
    let (time, stream, tag, rest) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let source = SOURCES.into_iter().find(|source| name(*source).as_bytes() == stream)?;
    let is_piece = !time.ends_with(OFFSET);
    let time = std::str::from_utf8(time).ok()?.parse().ok()?;
    Some(Line { time, source, open: tag == b"P", is_piece, rest })
}

fn index(source: LogSource) -> usize {
    match source {
        LogSource::Stdout => 0,
        LogSource::Stderr => 1,
    }
}

fn name(source: LogSource) -> &'static str {
    match source {
        LogSource::Stdout => "stdout",
        LogSource::Stderr => "stderr",
    }
}

fn tag(open: bool) -> char {
    if open { 'P' } else { 'F' }
}

#[cfg(test)]
mod tests {
    use LogSource::{Stderr, Stdout};
    use proptest::prelude::*;

    use super::*;

    fn chunk(source: LogSource, nanos: i128, line_start: bool, text: &str) -> LogChunk {
        let time = Timestamp::from_nanosecond(nanos).unwrap();
        LogChunk { source, time, line_start, bytes: text.to_owned().into() }
    }

    /// What is written on from there, and the position then.
    fn written<'a>(mut position: Position, chunks: impl IntoIterator<Item = &'a LogChunk>) -> (String, Position) {
        let mut out = Vec::new();
        chunks.into_iter().for_each(|chunk| position.push(chunk, &mut out).unwrap());
        (String::from_utf8(out).unwrap(), position)
    }

    /// What a driver gives who reads on from there: it has not seen what comes before.
    fn read_from(position: Position, all: &[LogChunk]) -> Vec<LogChunk> {
        let (mut skip, mut seen) = (Skip::to(position), [false; 2]);
        let wanted = all.iter().filter(|chunk| position.since().is_none_or(|since| chunk.time >= since));
        let given = wanted.map(|chunk| {
            let first = !std::mem::replace(&mut seen[index(chunk.source)], true);
            LogChunk { line_start: chunk.line_start || first, ..chunk.clone() }
        });
        given.filter(|chunk| skip.is_new(chunk)).collect()
    }

    #[test]
    fn whole_lines_and_parts_of_lines_are_told_apart() {
        let (text, _) = written(
            Position::default(),
            &[
                chunk(Stdout, 1, true, "whole\n"),
                chunk(Stdout, 2, true, "begin "),
                chunk(Stderr, 3, true, "\n"),
                chunk(Stdout, 4, false, "end\n"),
                chunk(Stdout, 5, true, "cut off"),
                chunk(Stdout, 6, true, "last"),
            ],
        );
        let wanted = "1970-01-01T00:00:00.000000001Z stdout F whole\n\
                      1970-01-01T00:00:00.000000002Z stdout P begin \n\
                      1970-01-01T00:00:00.000000003Z stderr F \n\
                      1970-01-01T00:00:00.000000004Z stdout F end\n\
                      1970-01-01T00:00:00.000000005Z stdout P cut off\n\
                      1970-01-01T00:00:00.000000005+00:00 stdout F \n\
                      1970-01-01T00:00:00.000000006Z stdout P last\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn what_stands_behind_a_piece_without_a_newline_is_read_on_without_it() {
        let all =
            [chunk(Stdout, 2, true, "prompt> "), chunk(Stderr, 3, true, "error\n"), chunk(Stdout, 4, true, "again\n")];
        for cut in 0..=all.len() {
            let (first, position) = written(Position::default(), &all[..cut]);
            let (second, _) = written(position, &read_from(position, &all));
            assert_eq!(first + &second, written(Position::default(), &all).0, "after {cut}");
        }
    }

    #[test]
    fn a_position_is_read_from_the_end_of_a_file_or_from_its_own_lines() {
        for nothing in [&b""[..], b"torn", b"no time\n", b"1970-01-01T00:00:01Z stdout F torn"] {
            assert_eq!(Position::at_end_of(nothing), Position::default());
        }
        let text = b"half of a line\n1970-01-01T00:00:01Z stdout F a\n1970-01-01T00:00:01Z stdout P b\n1970-01-01T00:00:02Z st";
        let position = Position::at_end_of(text);
        let time = "1970-01-01T00:00:01Z".parse().unwrap();
        assert_eq!(position.streams, [Some(Mark { time, count: 2, open: true }), None]);
        for position in [position, position.of_the_end_only(), Position::default()] {
            assert_eq!(Position::read(&position.write()), position);
        }
    }

    #[test]
    fn a_stream_that_is_not_at_the_end_is_remembered_or_was_written_before_the_other() {
        let old = Position::at_end_of(b"1970-01-01T00:00:01Z stdout P a\n1970-01-01T00:00:02Z stderr F b\n");
        let new = Position::at_end_of(b"1970-01-01T00:00:03Z stderr F c\n");
        assert_eq!(new.or(old).streams, [old.streams[0], new.streams[1]]);
        let mut skip = Skip::to(new.of_the_end_only());
        let news = [2_000_000_000, 3_000_000_000].map(|nanos| skip.is_new(&chunk(Stdout, nanos, true, "a\n")));
        assert_eq!(news, [false, true]);
    }

    /// A step of what containers do: on which stream, how much later, whether a newline ends it, and whether it goes on
    /// where the stream's last piece has none; then perhaps at the time of that piece, as Docker has it.
    type Step = (bool, i128, bool, bool, bool);

    fn chunks(steps: &[Step]) -> Vec<LogChunk> {
        let (mut now, mut before) = (1_000_000_000, [(0, false); 2]);
        let mut all = Vec::new();
        for (at, (error, later, ends, goes_on, as_before)) in steps.iter().copied().enumerate() {
            now += later;
            let (last, open) = &mut before[usize::from(error)];
            let continues = *open && goes_on;
            *last = if continues && as_before { *last } else { now };
            *open = !ends;
            let (source, newline) = (SOURCES[usize::from(error)], if ends { "\n" } else { "" });
            // Some are of nothing but a newline, as lines that end what was cut off.
            let text = if at % 3 == 0 { newline.to_owned() } else { format!("{at}{newline}") };
            all.push(chunk(source, *last, !continues, &text));
        }
        all
    }

    proptest! {
        /// Wherever writing was interrupted after whole lines of the file, reading again from the position there adds what
        /// is missing and nothing twice.
        #[test]
        fn nothing_is_lost_or_written_twice_over_an_interruption(
            steps in prop::collection::vec(any::<(bool, u8, bool, bool, bool)>(), 1..40),
            cut in any::<prop::sample::Index>(),
        ) {
            let steps: Vec<Step> = steps.into_iter().map(|(a, later, b, c, d)| (a, i128::from(later % 3), b, c, d)).collect();
            let all = chunks(&steps);
            let (whole, position) = written(Position::default(), &all);
            prop_assert_eq!(Position::at_end_of(whole.as_bytes()), position);
            let lines: Vec<&str> = whole.split_inclusive('\n').collect();
            let first = lines[..cut.index(lines.len() + 1)].concat();
            let position = Position::at_end_of(first.as_bytes());
            prop_assert_eq!(Position::read(&position.write()), position);
            let (second, _) = written(position, &read_from(position, &all));
            prop_assert_eq!(first + &second, whole);
        }
    }
}
