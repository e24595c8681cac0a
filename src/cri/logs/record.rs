//! Pure: the lines of a CRI log file, and how far one was written.
//!
//! ```text
//! 2026-11-21T07:15:43.359877326Z stdout F a whole line, or the end of one
//! 2026-11-21T07:15:43.359877326Z stderr P the beginning of a long line, or a last one without a newline
//! ```

use std::io::{self, Write as _};

use jiff::Timestamp;

use crate::runtime::types::{LogChunk, LogSource};

/// How far a log was written: the time of the last piece, and how many of exactly that time were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    time: Option<Timestamp>,
    count: u32,
}

impl Position {
    /// Where reading goes on; `None` from the beginning.
    pub(super) fn since(&self) -> Option<Timestamp> {
        self.time
    }

    fn wrote(&mut self, time: Timestamp) {
        match self.time {
            Some(last) if last == time => self.count += 1,
            _ => *self = Self { time: Some(time), count: 1 },
        }
    }

    /// The position at the end of a file; `None` if there is no whole line in it. `end` is the end of the file, from a
    /// line's beginning or not.
    pub(super) fn at_end_of(end: &[u8]) -> Option<Self> {
        let whole = end.iter().rposition(|byte| *byte == b'\n')?;
        let mut position: Option<Self> = None;
        for line in end[..whole].rsplit(|byte| *byte == b'\n') {
            let word = line.split(|byte| *byte == b' ').next().unwrap_or_default();
            let time: Option<Timestamp> = std::str::from_utf8(word).ok().and_then(|text| text.parse().ok());
            match (&mut position, time) {
                (None, Some(time)) => position = Some(Self { time: Some(time), count: 1 }),
                (Some(position), Some(time)) if position.time == Some(time) => position.count += 1,
                _ => break,
            }
        }
        position
    }

    /// As one line, and back.
    pub(super) fn write(&self) -> String {
        self.time.map_or_else(String::new, |time| format!("{time:.9} {}\n", self.count))
    }

    pub(super) fn read(text: &str) -> Option<Self> {
        let (time, count) = text.trim().split_once(' ')?;
        Some(Self { time: Some(time.parse().ok()?), count: count.parse().ok()? })
    }
}

/// Leaves out what was written before.
#[derive(Debug)]
pub(super) struct Skip {
    from: Position,
    seen: u32,
}

impl Skip {
    pub(super) fn to(from: Position) -> Self {
        Self { from, seen: 0 }
    }

    /// Whether this piece is new.
    pub(super) fn is_new(&mut self, chunk: &LogChunk) -> bool {
        match self.from.time {
            Some(last) if chunk.time < last => false,
            Some(last) if chunk.time == last => {
                self.seen += 1;
                self.seen > self.from.count
            }
            _ => true,
        }
    }
}

/// Turns pieces of a log into lines of the file.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// A piece without a newline, per stream: only what comes next tells whether its line goes on.
    waiting: [Option<LogChunk>; 2],
    /// Where the file ends once all lines are in it.
    pub(super) position: Position,
}

impl Lines {
    pub(super) fn from(position: Position) -> Self {
        Self { waiting: [None, None], position }
    }

    /// The lines that follow from the next piece.
    pub(super) fn push(&mut self, chunk: LogChunk, out: &mut Vec<u8>) -> io::Result<()> {
        let slot = index(chunk.source);
        if let Some(before) = self.waiting[slot].take() {
            // A line that was cut off ends where the next begins.
            self.line(&before, chunk.line_start, out)?;
        }
        if chunk.bytes.ends_with(b"\n") {
            self.line(&chunk, true, out)?;
        } else {
            self.waiting[slot] = Some(chunk);
        }
        Ok(())
    }

    /// The lines that nothing follows: they have no end, or who reads the log would add a newline that was never written.
    pub(super) fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        for slot in 0..self.waiting.len() {
            if let Some(last) = self.waiting[slot].take() {
                self.line(&last, false, out)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, chunk: &LogChunk, whole: bool, out: &mut Vec<u8>) -> io::Result<()> {
        let stream = match chunk.source {
            LogSource::Stdout => "stdout",
            LogSource::Stderr => "stderr",
        };
        write!(out, "{:.9} {stream} {} ", chunk.time, if whole { 'F' } else { 'P' })?;
        out.extend_from_slice(chunk.bytes.strip_suffix(b"\n").unwrap_or(&chunk.bytes));
        out.push(b'\n');
        self.position.wrote(chunk.time);
        Ok(())
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
    use proptest::prelude::*;

    use super::*;

    fn chunk(source: LogSource, nanos: i128, line_start: bool, text: &str) -> LogChunk {
        let time = Timestamp::from_nanosecond(nanos).unwrap();
        LogChunk { source, time, line_start, bytes: text.to_owned().into() }
    }

    fn written(chunks: &[LogChunk]) -> (String, Position) {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.push(chunk.clone(), &mut out).unwrap();
        }
        lines.end(&mut out).unwrap();
        (String::from_utf8(out).unwrap(), lines.position)
    }

    #[test]
    fn whole_lines_and_parts_of_lines_are_told_apart() {
        use LogSource::{Stderr, Stdout};
        let (text, _) = written(&[
            chunk(Stdout, 1, true, "whole\n"),
            chunk(Stdout, 2, true, "begin "),
            chunk(Stderr, 3, true, "\n"),
            chunk(Stdout, 4, false, "end\n"),
            chunk(Stdout, 5, true, "cut off"),
            chunk(Stdout, 6, true, "last"),
        ]);
        let wanted = "1970-01-01T00:00:00.000000001Z stdout F whole\n\
                      1970-01-01T00:00:00.000000003Z stderr F \n\
                      1970-01-01T00:00:00.000000002Z stdout P begin \n\
                      1970-01-01T00:00:00.000000004Z stdout F end\n\
                      1970-01-01T00:00:00.000000005Z stdout F cut off\n\
                      1970-01-01T00:00:00.000000006Z stdout P last\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn a_position_is_read_from_the_end_of_a_file_or_from_its_own_line() {
        assert_eq!(Position::at_end_of(b""), None);
        assert_eq!(Position::at_end_of(b"torn"), None);
        assert_eq!(Position::at_end_of(b"no time\n"), None);
        let text = b"half of a line\n1970-01-01T00:00:01Z stdout F a\n1970-01-01T00:00:01Z stdout F b\n1970-01-01T00:00:02Z st";
        let position = Position::at_end_of(text).unwrap();
        assert_eq!((position.time, position.count), (Some("1970-01-01T00:00:01Z".parse().unwrap()), 2));
        assert_eq!(Position::read(&position.write()), Some(position));
        assert_eq!(Position::read(&Position::default().write()), None);
    }

    proptest! {
        /// Wherever writing was interrupted after whole lines, reading again from the position there adds what is missing and
        /// nothing twice.
        #[test]
        fn nothing_is_lost_or_written_twice_over_an_interruption(steps in prop::collection::vec(0_i128..3, 1..40), cut in 0_usize..40) {
            let mut now = 1_000_000_000;
            let all: Vec<_> = steps.iter().enumerate().map(|(at, step)| {
                now += step;
                chunk(LogSource::Stdout, now, true, &format!("{at}\n"))
            }).collect();
            let cut = cut.min(all.len());
            let (first, position) = written(&all[..cut]);
            let found = Position::at_end_of(first.as_bytes());
            prop_assert_eq!(found.unwrap_or_default(), position);
            let mut skip = Skip::to(position);
            let rest: Vec<_> = all.iter().filter(|chunk| skip.is_new(chunk)).cloned().collect();
            let (second, _) = written(&rest);
            prop_assert_eq!(first + &second, written(&all).0);
        }
    }
}
