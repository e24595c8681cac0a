//! What a container writes, kept in bounded files until the node has fetched it.
//!
//! A log is a sequence of records in two files at most; when the newer is half the limit long, the older goes. An offset
//! counts bytes of records since the container's start, so a node that was away goes on where it was, and is told what it
//! missed. A thread per container reads its pipes: writing to a slow disk holds up the container, not the agent.
//!
//! ```text
//! | time, 8 bytes | length, 4 | flags, 1 | 0, 3 | bytes …        little-endian
//! ```

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bytes::{Buf, Bytes};
use lambdalet_proto::agent::v1::{LogBatch, LogRecord};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::watch;

use crate::clock;
use crate::error::{Error, Result, Tried};

/// Bytes before those of a record.
const HEADER: usize = 16;
/// A longer line is kept in parts; the limit of other runtimes.
const MAX_RECORD: usize = 16 << 10;
/// What is read from a pipe, and from the files for one batch.
const PIECE: usize = 64 << 10;
/// What is kept if the node says nothing.
const LIMIT: u64 = 16 << 20;
const STDERR: u8 = 1;
const LINE_START: u8 = 2;

/// The log of one container.
#[derive(Debug)]
pub(crate) struct Log {
    directory: PathBuf,
    limit: u64,
    files: Mutex<VecDeque<Segment>>,
    progress: watch::Sender<Progress>,
}

/// How far a log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The offset after its last record.
    pub(crate) end: u64,
    /// Nothing will follow.
    pub(crate) closed: bool,
}

#[derive(Clone, Debug)]
struct Segment {
    /// The offset of its first byte.
    base: u64,
    length: u64,
    file: Arc<File>,
}

impl Log {
    /// Makes an empty log in a directory of its own; `limit` 0 is 16 MiB.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub(crate) fn new(directory: PathBuf, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        let limit = if limit == 0 { LIMIT } else { limit };
        let (files, progress) = (Mutex::default(), watch::Sender::default());
        Ok(Self { directory, limit, files, progress })
    }

    /// Follows its progress.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Bytes on disk.
    pub(crate) fn size(&self) -> u64 {
        self.lock().iter().map(|segment| segment.length).sum()
    }

    /// Nothing will follow: the container has ended, or never began.
    pub(crate) fn close(&self) {
        self.progress.send_modify(|progress| progress.closed = true);
    }

    /// Records from an offset on, as many as make a message; none at the end.
    ///
    /// # Errors
    /// An offset at which no record begins.
    pub(crate) fn read(&self, offset: u64) -> Result<LogBatch> {
        let wrong = || Error::invalid(format!("failed to read a log at {offset}: no record begins there"));
        let (segment, lost) = {
            let files = self.lock();
            let end = files.back().map_or(0, |last| last.base + last.length);
            let oldest = files.front().map_or(0, |first| first.base);
            if offset > end {
                return Err(wrong());
            }
            let from = offset.max(oldest);
            let holds = |segment: &&Segment| segment.base <= from && from < segment.base + segment.length;
            let Some(segment) = files.iter().find(holds) else {
                return Ok(LogBatch { records: Vec::new(), next: from, lost: from - offset });
            };
            (segment.clone(), from - offset)
        };
        let start = offset + lost - segment.base;
        let length = usize::try_from(segment.length - start).unwrap_or(usize::MAX).min(PIECE);
        let mut bytes = vec![0; length];
        segment.file.read_exact_at(&mut bytes, start).tried(|| "failed to read a log".to_owned())?;
        let (records, read) = records(bytes.into()).ok_or_else(wrong)?;
        Ok(LogBatch { records, next: offset + lost + read, lost })
    }

    /// Adds what was read from a pipe; says whether the next bytes begin a line.
    fn add(&self, stderr: bool, mut line_start: bool, bytes: &[u8]) -> bool {
        let time = clock::now_ns();
        let mut out = Vec::with_capacity(bytes.len() + HEADER * 8);
        let mut rest = bytes;
        while !rest.is_empty() {
            let line = rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| at + 1);
            let (record, after) = rest.split_at(line.min(MAX_RECORD));
            let flags = (u8::from(stderr) * STDERR) | (u8::from(line_start) * LINE_START);
            out.extend_from_slice(&time.to_le_bytes());
            // It fits: MAX_RECORD is below 2^32.
            out.extend_from_slice(&(record.len() as u32).to_le_bytes());
            out.extend_from_slice(&[flags, 0, 0, 0]);
            out.extend_from_slice(record);
            line_start = record.ends_with(b"\n");
            rest = after;
        }
        // A disk that is full loses log lines; the container goes on.
        let _ = self.write(&out);
        line_start
    }

    fn write(&self, records: &[u8]) -> io::Result<()> {
        let mut files = self.lock();
        let end = files.back().map_or(0, |last| last.base + last.length);
        if files.back().is_none_or(|last| last.length >= self.limit / 2) {
            let path = self.directory.join(format!("{end:020}"));
            let file = Arc::new(File::options().read(true).append(true).create_new(true).open(path)?);
            files.push_back(Segment { base: end, length: 0, file });
        }
        while files.len() > 2 {
            if let Some(oldest) = files.pop_front() {
                fs::remove_file(self.directory.join(format!("{:020}", oldest.base)))?;
            }
        }
        let Some(last) = files.back_mut() else { return Ok(()) };
        if let Err(error) = last.file.as_ref().write_all(records) {
            // No half record stays.
            last.file.set_len(last.length)?;
            return Err(error);
        }
        last.length += records.len() as u64;
        let end = last.base + last.length;
        drop(files);
        self.progress.send_modify(|progress| progress.end = end);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Segment>> {
        // Segments are whole between statements.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whole records at the beginning of bytes, and how many bytes they are. `None` if there is none.
fn records(mut bytes: Bytes) -> Option<(Vec<LogRecord>, u64)> {
    let (mut records, mut read) = (Vec::new(), 0);
    while bytes.len() >= HEADER {
        let mut header = bytes.slice(..HEADER);
        let (time_ns, length, flags) = (header.get_u64_le(), header.get_u32_le() as usize, header.get_u8());
        if length > MAX_RECORD || flags > STDERR | LINE_START || header.iter().any(|byte| *byte != 0) {
            return None;
        }
        if bytes.len() < HEADER + length {
            break;
        }
        bytes.advance(HEADER);
        let (stderr, line_start) = (flags & STDERR != 0, flags & LINE_START != 0);
        records.push(LogRecord { time_ns, stderr, line_start, data: bytes.split_to(length) });
        read += (HEADER + length) as u64;
    }
    (!records.is_empty()).then_some((records, read))
}

/// Keeps what comes out of a container until its pipes (or its terminal) are closed on the other side.
pub(crate) fn pump(log: Arc<Log>, stdout: OwnedFd, stderr: Option<OwnedFd>) -> io::Result<()> {
    let run = move || {
        let mut sources: Vec<_> = [(false, Some(stdout)), (true, stderr)]
            .into_iter()
            .filter_map(|(is_stderr, fd)| fd.map(|fd| (is_stderr, true, fd)))
            .collect();
        let mut piece = vec![0; PIECE];
        while !sources.is_empty() {
            let mut fds: Vec<_> = sources.iter().map(|(_, _, fd)| PollFd::new(fd, PollFlags::IN)).collect();
            // Fails only when it is interrupted.
            let _ = poll(&mut fds, None);
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let mut ready = ready.into_iter();
            sources.retain_mut(|(is_stderr, line_start, fd)| {
                if ready.next() != Some(true) {
                    return true;
                }
                match rustix::io::read(&*fd, &mut piece[..]) {
                    Ok(read @ 1..) => {
                        *line_start = log.add(*is_stderr, *line_start, &piece[..read]);
                        true
                    }
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => true,
                    // A terminal whose other side is closed reads as an error.
                    Ok(_) | Err(_) => false,
                }
            });
        }
        log.close();
    };
    thread::Builder::new().name("log".to_owned()).stack_size(128 << 10).spawn(run).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(limit: u64) -> (tempfile::TempDir, Log) {
        let directory = tempfile::tempdir().unwrap();
        let log = Log::new(directory.path().join("log"), limit).unwrap();
        (directory, log)
    }

    /// All that can be read from an offset on, and what was lost before.
    fn all(log: &Log, mut offset: u64) -> (Vec<LogRecord>, u64, u64) {
        let (mut records, mut lost) = (Vec::new(), 0);
        loop {
            let batch = log.read(offset).unwrap();
            lost += batch.lost;
            assert!(batch.next >= offset);
            offset = batch.next;
            if batch.records.is_empty() {
                return (records, offset, lost);
            }
            records.extend(batch.records);
        }
    }

    #[test]
    fn lines_are_records_and_a_line_in_parts_says_so() {
        let (_directory, log) = log(0);
        assert!(log.add(false, true, b"one\ntwo\n"));
        assert!(!log.add(true, true, b"thr"));
        assert!(log.add(true, false, b"ee\n"));
        let (records, _, lost) = all(&log, 0);
        let seen: Vec<_> = records.iter().map(|r| (&r.data[..], r.stderr, r.line_start)).collect();
        let wanted: [(&[u8], bool, bool); 4] =
            [(b"one\n", false, true), (b"two\n", false, true), (b"thr", true, true), (b"ee\n", true, false)];
        assert_eq!((seen, lost), (wanted.to_vec(), 0));
    }

    #[test]
    fn a_long_line_is_kept_in_parts() {
        let (_directory, log) = log(0);
        log.add(false, true, &[b'x'; MAX_RECORD + 1]);
        let (records, ..) = all(&log, 0);
        assert_eq!(
            records.iter().map(|r| (r.data.len(), r.line_start)).collect::<Vec<_>>(),
            [(MAX_RECORD, true), (1, false)]
        );
    }

    #[test]
    fn a_log_keeps_its_bound_and_says_what_it_lost() {
        let (_directory, log) = log(64 << 10);
        let line = [b"y".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..500 {
            log.add(false, true, &line);
        }
        assert!(log.size() <= (64 << 10) + 2 * 1016, "{} bytes", log.size());
        assert_eq!(fs::read_dir(&log.directory).unwrap().count(), 2);
        let (records, end, lost) = all(&log, 0);
        assert_eq!(end, 500 * 1016);
        assert_eq!(lost + records.len() as u64 * 1016, end);
        // Whoever was away goes on where it was, or at the oldest.
        assert_eq!(log.read(end).unwrap().records, []);
        assert_eq!(log.read(1016).unwrap().lost, lost - 1016);
        assert!(log.read(end + 1).is_err() && log.read(end - 1).is_err());
    }
}
