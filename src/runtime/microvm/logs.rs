//! Logs of containers, on the host: fetched from the guest by offset, kept in bounded files, read as streams.
//!
//! A log is a directory of numbered segments; the oldest goes when there are too many. A segment is a sequence of frames:
//!
//! ```text
//! time (ns, i64) | kind (u8) | length (u32) | bytes          all little-endian
//! ```
//! A *mark* stands at the beginning of a segment and after each batch, and says from which offset of the guest's log the
//! next batch begins. Whatever comes after the last mark was not written whole and is cut off when the log is opened, so
//! that a batch is there once or, until it is fetched again, not at all.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::runtime::types::{LogChunk, LogOptions, LogSource};
use crate::runtime::{Result, RuntimeError, blocking};

/// Bytes of a frame before its content.
const HEAD: usize = 13;
/// Kinds of frames: bits of a piece of log, or a mark.
const STDERR: u8 = 1;
const LINE_START: u8 = 2;
const MARK: u8 = 128;
/// Longest content of a frame: what a guest may send in one message, and far more than it does.
const LONGEST: u32 = 4 << 20;
/// Bytes read ahead of who reads a log.
const AHEAD: usize = 128 << 10;

/// How much is kept of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes at which a segment is closed (10 MiB).
    pub segment: u64,
    /// Segments kept, at least 1 (5).
    pub segments: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { segment: 10 << 20, segments: 5 }
    }
}

/// The log of one container.
#[derive(Debug)]
pub(super) struct LogBook {
    directory: PathBuf,
    limits: LogLimits,
    writer: Mutex<Writer>,
    /// Changes with each batch.
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct Writer {
    segment: u64,
    file: File,
    length: u64,
    /// Offset in the guest's log from which the next batch begins.
    next: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    batches: u64,
    /// Nothing will follow.
    whole: bool,
}

/// A place in a log: a segment and the offset of a frame in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    segment: u64,
    offset: u64,
}

/// A frame as it lies in a segment.
struct Frame {
    at: Place,
    /// Where the next one is.
    end: u64,
    kind: u8,
    time: i64,
    content: Vec<u8>,
}

impl LogBook {
    /// Opens a log, or begins one. Waits for the disk.
    pub(super) fn open(directory: &Path, limits: LogLimits) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut writer = None;
        for segment in segments(directory)?.into_iter().rev() {
            writer = Writer::resume(directory, segment)?;
            if writer.is_some() {
                break;
            }
            fs::remove_file(path(directory, segment))?;
        }
        let writer = match writer {
            Some(writer) => writer,
            None => Writer::begin(directory, 0, 0)?,
        };
        let progress = watch::Sender::new(Progress::default());
        Ok(Self { directory: directory.to_owned(), limits, writer: Mutex::new(writer), progress })
    }

    /// Offset in the guest's log from which to fetch on.
    pub(super) fn next(&self) -> u64 {
        self.writer().next
    }

    /// Adds a batch, after which the guest's log goes on at `next`. Waits for the file system, not for the disk.
    pub(super) fn append(&self, chunks: &[LogChunk], next: u64) -> io::Result<()> {
        let mut writer = self.writer();
        if writer.length >= self.limits.segment {
            *writer = Writer::begin(&self.directory, writer.segment + 1, writer.next)?;
            let oldest = (writer.segment + 1).saturating_sub(self.limits.segments.max(1));
            for segment in segments(&self.directory)?.into_iter().filter(|segment| *segment < oldest) {
                fs::remove_file(path(&self.directory, segment))?;
            }
        }
        writer.append(chunks, next)?;
        drop(writer);
        self.progress.send_modify(|progress| progress.batches += 1);
        Ok(())
    }

    /// Says that nothing will follow: who follows the log is done once all is delivered.
    pub(super) fn close(&self) {
        self.progress.send_modify(|progress| progress.whole = true);
    }

    /// Whether somebody has said so.
    pub(super) fn is_closed(&self) -> bool {
        self.progress.borrow().whole
    }

    /// Bytes of its files.
    pub(super) fn size(&self) -> io::Result<u64> {
        let segments = segments(&self.directory)?;
        Ok(segments
            .into_iter()
            .filter_map(|segment| fs::metadata(path(&self.directory, segment)).ok())
            .map(|m| m.len())
            .sum())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A batch that was not written whole is cut off when the log is opened again.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log as a stream.
    pub(super) async fn read(self: Arc<Self>, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        let tried = format!("failed to read the log {}", self.directory.display());
        // From here on what is added is seen.
        let progress = self.progress.subscribe();
        let (book, wanted) = (Arc::clone(&self), options.clone());
        let at = blocking(tried.clone(), move || book.find(&wanted)).await?;
        let reading = Reading { book: self, progress, at, since: options.since, follow: options.follow, tried };
        Ok(stream::try_unfold(reading, Reading::next)
            .map_ok(|chunks| stream::iter(chunks).map(Ok::<_, RuntimeError>))
            .try_flatten()
            .boxed())
    }

    /// Where reading begins.
    fn find(&self, options: &LogOptions) -> io::Result<Place> {
        let Some(lines) = options.tail else { return Ok(Place::default()) };
        let lines = usize::try_from(lines).unwrap_or(usize::MAX);
        let mut starts = VecDeque::new();
        let mut end = Place::default();
        let mut frames = Frames::new(&self.directory, Place::default());
        while let Some(frame) = frames.next(false)? {
            if frame.kind & (MARK | LINE_START) == LINE_START {
                starts.push_back(frame.at);
                if starts.len() > lines {
                    starts.pop_front();
                }
            }
            end = Place { segment: frame.at.segment, offset: frame.end };
        }
        Ok(starts.front().copied().unwrap_or(end))
    }
}

impl Writer {
    fn begin(directory: &Path, segment: u64, next: u64) -> io::Result<Self> {
        let file = File::options().append(true).create(true).open(path(directory, segment))?;
        file.set_len(0)?;
        let mut writer = Self { segment, file, length: 0, next };
        writer.append(&[], next)?;
        Ok(writer)
    }

    /// Goes on behind the last mark; `None` if there is none.
    fn resume(directory: &Path, segment: u64) -> io::Result<Option<Self>> {
        let mut last = None;
        let mut frames = Frames::new(directory, Place { segment, offset: 0 });
        while let Some(frame) = frames.next(true)? {
            if frame.at.segment != segment {
                break;
            }
            if let (MARK, Ok(next)) = (frame.kind, <[u8; 8]>::try_from(frame.content.as_slice())) {
                last = Some((frame.end, u64::from_le_bytes(next)));
            }
        }
        let Some((length, next)) = last else { return Ok(None) };
        let file = File::options().append(true).open(path(directory, segment))?;
        file.set_len(length)?;
        Ok(Some(Self { segment, file, length, next }))
    }

    fn append(&mut self, chunks: &[LogChunk], next: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        for chunk in chunks {
            let kind = if chunk.source == LogSource::Stderr { STDERR } else { 0 };
            let kind = kind | if chunk.line_start { LINE_START } else { 0 };
            frame(&mut bytes, nanoseconds(chunk.time), kind, &chunk.bytes);
        }
        frame(&mut bytes, 0, MARK, &next.to_le_bytes());
        if let Err(error) = self.file.write_all(&bytes) {
            // A full disk takes half a frame: behind it nobody would find the next one.
            self.file.set_len(self.length)?;
            return Err(error);
        }
        self.length += bytes.len() as u64;
        self.next = next;
        Ok(())
    }
}

/// Someone who reads a log.
struct Reading {
    book: Arc<LogBook>,
    progress: watch::Receiver<Progress>,
    at: Place,
    /// Until the first piece that is new enough was met.
    since: Option<Timestamp>,
    follow: bool,
    tried: String,
}

impl Reading {
    /// Some more pieces; `None` at the end.
    async fn next(mut self) -> Result<Option<(Vec<LogChunk>, Self)>> {
        loop {
            // Before looking: what is added meanwhile is a change then.
            let whole = self.progress.borrow_and_update().whole;
            let (book, at, mut since) = (Arc::clone(&self.book), self.at, self.since);
            let read = blocking(self.tried.clone(), move || {
                let (mut chunks, mut ahead, mut at) = (Vec::new(), 0, at);
                let mut frames = Frames::new(&book.directory, at);
                while ahead < AHEAD
                    && let Some(frame) = frames.next(true)?
                {
                    at = Place { segment: frame.at.segment, offset: frame.end };
                    let Some(chunk) = chunk(frame) else { continue };
                    if since.is_some_and(|since| chunk.time < since) {
                        continue;
                    }
                    since = None;
                    ahead += chunk.bytes.len() + HEAD;
                    chunks.push(chunk);
                }
                Ok((chunks, at, since))
            });
            let (chunks, at, since) = read.await?;
            (self.at, self.since) = (at, since);
            if !chunks.is_empty() {
                return Ok(Some((chunks, self)));
            }
            // Nobody adds to a log that is dropped.
            if !self.follow || whole || self.progress.changed().await.is_err() {
                return Ok(None);
            }
        }
    }
}

/// Frames in order, from a place on, over all segments.
struct Frames<'a> {
    directory: &'a Path,
    at: Place,
    file: Option<BufReader<File>>,
    /// There is a segment after the one that is being read.
    closed: bool,
}

impl<'a> Frames<'a> {
    fn new(directory: &'a Path, at: Place) -> Self {
        Self { directory, at, file: None, closed: false }
    }

    /// The next whole frame, with its content if that is wanted.
    fn next(&mut self, content: bool) -> io::Result<Option<Frame>> {
        loop {
            if self.file.is_none() && !self.open()? {
                return Ok(None);
            }
            let Some(file) = &mut self.file else { return Ok(None) };
            let mut head = [0; HEAD];
            if !read_whole(file, &mut head)? {
                // The end of this one, as far as it is written.
                let Some(next) = segments(self.directory)?.into_iter().find(|segment| *segment > self.at.segment)
                else {
                    return Ok(None);
                };
                if self.closed {
                    (self.at, self.file, self.closed) = (Place { segment: next, offset: 0 }, None, false);
                } else {
                    // Something may have been added before the next one was begun, and nothing will be any more.
                    self.closed = true;
                    file.seek(SeekFrom::Start(self.at.offset))?;
                }
                continue;
            }
            let (time, rest) = head.split_at(8);
            let time = i64::from_le_bytes(time.try_into().unwrap_or_default());
            let length = u32::from_le_bytes(rest[1..].try_into().unwrap_or_default());
            if length > LONGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is longer than any"));
            }
            let mut bytes = Vec::new();
            let whole = if content {
                bytes.resize(length as usize, 0);
                read_whole(file, &mut bytes)?
            } else {
                io::copy(&mut file.take(length.into()), &mut io::sink())? == u64::from(length)
            };
            if !whole {
                return Ok(None);
            }
            let at = self.at;
            self.at.offset += HEAD as u64 + u64::from(length);
            return Ok(Some(Frame { at, end: self.at.offset, kind: rest[0], time, content: bytes }));
        }
    }

    /// Opens the segment that is to be read; the oldest one, if that is gone.
    fn open(&mut self) -> io::Result<bool> {
        let segments = segments(self.directory)?;
        let Some(segment) = segments.into_iter().find(|segment| *segment >= self.at.segment) else { return Ok(false) };
        if segment != self.at.segment {
            self.at = Place { segment, offset: 0 };
        }
        let mut file = File::open(path(self.directory, segment))?;
        file.seek(SeekFrom::Start(self.at.offset))?;
        self.file = Some(BufReader::new(file));
        Ok(true)
    }
}

fn read_whole(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn chunk(frame: Frame) -> Option<LogChunk> {
    if frame.kind & MARK != 0 {
        return None;
    }
    Some(LogChunk {
        source: if frame.kind & STDERR != 0 { LogSource::Stderr } else { LogSource::Stdout },
        time: Timestamp::from_nanosecond(frame.time.into()).unwrap_or_default(),
        line_start: frame.kind & LINE_START != 0,
        bytes: Bytes::from(frame.content),
    })
}

fn frame(bytes: &mut Vec<u8>, time: i64, kind: u8, content: &[u8]) {
    bytes.extend(time.to_le_bytes());
    bytes.push(kind);
    bytes.extend((content.len() as u32).to_le_bytes());
    bytes.extend(content);
}

/// Until the year 2262.
fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

fn path(directory: &Path, segment: u64) -> PathBuf {
    directory.join(format!("{segment}.log"))
}

/// The numbers of a log's segments, the oldest first.
fn segments(directory: &Path) -> io::Result<Vec<u64>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_suffix(".log")).and_then(|number| number.parse::<u64>().ok());
        segments.extend(number);
    }
    segments.sort_unstable();
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn piece(nanosecond: i64, line_start: bool, text: &str) -> LogChunk {
        let time = Timestamp::from_nanosecond(nanosecond.into()).unwrap();
        LogChunk { source: LogSource::Stdout, time, line_start, bytes: Bytes::copy_from_slice(text.as_bytes()) }
    }

    fn line(nanosecond: i64, text: &str) -> LogChunk {
        piece(nanosecond, true, text)
    }

    fn book(folder: &Path) -> Arc<LogBook> {
        Arc::new(LogBook::open(folder, LogLimits { segment: 200, segments: 3 }).unwrap())
    }

    async fn text(book: &Arc<LogBook>, options: LogOptions) -> String {
        let chunks: Vec<LogChunk> = Arc::clone(book).read(&options).await.unwrap().try_collect().await.unwrap();
        chunks.iter().map(|chunk| String::from_utf8_lossy(&chunk.bytes).into_owned()).collect()
    }

    #[tokio::test]
    async fn pieces_come_back_as_they_were_and_a_tail_counts_lines() {
        let folder = tempfile::tempdir().unwrap();
        let book = book(folder.path());
        let error = LogChunk { source: LogSource::Stderr, ..line(7, "err\n") };
        book.append(&[line(5, "one\n"), piece(6, true, "tw"), piece(6, false, "o\n")], 10).unwrap();
        book.append(&[error.clone(), line(9, "three")], 20).unwrap();
        let all: Vec<_> = Arc::clone(&book).read(&LogOptions::default()).await.unwrap().try_collect().await.unwrap();
        assert_eq!((all.len(), &all[3]), (5, &error));
        for (tail, wanted) in [(0, ""), (1, "three"), (3, "two\nerr\nthree"), (9, "one\ntwo\nerr\nthree")] {
            assert_eq!(text(&book, LogOptions { tail: Some(tail), ..LogOptions::default() }).await, wanted);
        }
        let since = Some(Timestamp::from_nanosecond(7).unwrap());
        assert_eq!(text(&book, LogOptions { since, ..LogOptions::default() }).await, "err\nthree");
        assert_eq!(text(&book, LogOptions { since, tail: Some(1), ..LogOptions::default() }).await, "three");
        assert!(book.size().unwrap() > 0);
    }

    #[tokio::test]
    async fn a_log_goes_on_where_it_was_whole() {
        let folder = tempfile::tempdir().unwrap();
        book(folder.path()).append(&[line(5, "one\n")], 10).unwrap();
        // A batch of which only a part was written.
        let mut bytes = fs::read(folder.path().join("0.log")).unwrap();
        let whole = bytes.len();
        frame(&mut bytes, 6, LINE_START, b"half\n");
        frame(&mut bytes, 7, LINE_START, b"cut");
        for length in [bytes.len(), bytes.len() - 1, bytes.len() - 5, whole + 4] {
            fs::write(folder.path().join("0.log"), &bytes[..length]).unwrap();
            let book = book(folder.path());
            assert_eq!(book.next(), 10);
            assert_eq!(text(&book, LogOptions::default()).await, "one\n");
        }
        // A segment that was only begun.
        fs::write(folder.path().join("1.log"), "").unwrap();
        let book = book(folder.path());
        book.append(&[line(8, "two\n")], 20).unwrap();
        assert_eq!((book.next(), text(&book, LogOptions::default()).await), (20, "one\ntwo\n".into()));
    }

    #[tokio::test]
    async fn only_the_last_segments_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let book = book(folder.path());
        for number in 0..40_u64 {
            book.append(&[line(number as i64, &format!("line {number}\n"))], number + 1).unwrap();
        }
        assert!(segments(folder.path()).unwrap().len() <= 3);
        let text = text(&book, LogOptions::default()).await;
        assert!(text.ends_with("line 38\nline 39\n") && !text.contains("line 1\n"), "{text}");
        drop(book);
        assert_eq!(self::book(folder.path()).next(), 40);
    }

    #[tokio::test]
    async fn following_misses_nothing_and_ends_with_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let book = book(folder.path());
        book.append(&[line(1, "old\n"), line(2, "last\n")], 2).unwrap();
        let options = LogOptions { follow: true, tail: Some(1), since: None };
        let mut stream = Arc::clone(&book).read(&options).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap().bytes, "last\n");
        for number in 0..30_i64 {
            book.append(&[line(number, &format!("{number}\n"))], 3).unwrap();
            assert_eq!(stream.next().await.unwrap().unwrap().bytes, format!("{number}\n"));
        }
        assert!(stream.next().now_or_never().is_none());
        book.append(&[line(99, "end\n")], 4).unwrap();
        book.close();
        assert_eq!(stream.next().await.unwrap().unwrap().bytes, "end\n");
        assert!(stream.next().await.is_none());
    }
}
