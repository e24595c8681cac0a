//! The log of a fake container: in memory, cut into lines as a real one.

use jiff::Timestamp;

use crate::runtime::types::{LogChunk, LogOptions, LogSource};

/// Longest piece of a line, as Docker's.
const PIECE: usize = 16 << 10;

/// Everything a container wrote.
#[derive(Debug, Default)]
pub(super) struct Log {
    chunks: Vec<LogChunk>,
    /// Whether a line has begun and not ended: on standard output, on standard error.
    open: [bool; 2],
}

impl Log {
    pub(super) fn append(&mut self, source: LogSource, bytes: &[u8]) {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in line.chunks(PIECE) {
                let open = &mut self.open[usize::from(source == LogSource::Stderr)];
                let line_start = !*open;
                *open = !piece.ends_with(b"\n");
                let bytes = bytes::Bytes::copy_from_slice(piece);
                self.chunks.push(LogChunk { source, time: Timestamp::now(), line_start, bytes });
            }
        }
    }

    /// Where reading with these options begins.
    pub(super) fn start(&self, options: &LogOptions) -> usize {
        let from_tail = options.tail.map_or(0, |lines| self.tail(lines));
        let from_since = options
            .since
            .map_or(0, |since| self.chunks.iter().position(|chunk| chunk.time >= since).unwrap_or(self.chunks.len()));
        from_tail.max(from_since)
    }

    fn tail(&self, lines: u64) -> usize {
        let starts: Vec<usize> =
            self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.line_start).map(|(at, _)| at).collect();
        let skipped = starts.len().saturating_sub(usize::try_from(lines).unwrap_or(usize::MAX));
        starts.get(skipped).copied().unwrap_or(self.chunks.len())
    }

    pub(super) fn get(&self, at: usize) -> Option<LogChunk> {
        self.chunks.get(at).cloned()
    }
}
