//! The logs of containers: files in CRI's format that the runtime writes, read as a stream.
//!
//! ```text
//! ROOT/POD-UID/CONTAINER/ATTEMPT.log      the one being written; .1, .2, … are those before it (see `rotate`)
//! 2026-11-21T07:15:43.359877326Z stdout F a whole line, or the end of one
//! 2026-11-21T07:15:43.359877326Z stderr P the beginning of a long line
//! ```

use std::collections::{HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::CriRuntime;
use super::client::CriClient;
use crate::file;
use crate::runtime::process::Process;
use crate::runtime::types::{ContainerId, LogChunk, LogOptions, LogSource};
use crate::runtime::{Kind, Result, RuntimeError, blocking};

/// Bytes read ahead of who reads a log.
const AHEAD: usize = 128 << 10;
/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Looks at a log after its container's end (see `Ended`).
const LAST_LOOKS: u32 = 3;
/// How often its container is asked about, where its process does not tell.
const ASK: Duration = Duration::from_millis(500);

/// Where logs are kept.
#[derive(Clone, Debug)]
pub(super) struct LogFiles {
    root: PathBuf,
}

impl LogFiles {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory of a Pod's logs.
    pub(super) fn of_pod(&self, uid: &str) -> PathBuf {
        self.root.join(plain(uid))
    }

    /// The file of one attempt of a container.
    pub(super) fn of_container(&self, uid: &str, name: &str, attempt: u32) -> PathBuf {
        self.of_pod(uid).join(plain(name)).join(format!("{attempt}.log"))
    }

    /// Removes the log of one attempt. Its directory stays: the next attempt may be about to start in it.
    pub(super) fn remove(&self, uid: &str, name: &str, attempt: u32) -> io::Result<()> {
        // Another call may be removing it too.
        segments(&self.of_container(uid, name, attempt))?.iter().try_for_each(|segment| file::remove(segment))
    }

    /// Removes the directory of a Pod's logs with what is still in it: that of a container which somebody else removed,
    /// or a file that was renamed while another was removed.
    pub(super) fn leave(&self, uid: &str) -> io::Result<()> {
        file::remove_tree(&self.of_pod(uid))
    }

    /// Removes the directories of all Pods but these.
    pub(super) fn leave_all_but(&self, uids: &HashSet<String>) -> io::Result<()> {
        let kept: HashSet<OsString> = uids.iter().map(|uid| plain(uid).into()).collect();
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if !kept.contains(&entry.file_name()) {
                file::remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// A UID or name of the API server has no other characters; nothing leads out of the directory.
fn plain(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    text.chars().map(plain).collect()
}

/// The files of a log, the oldest first.
pub(super) fn segments(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for entry in entries {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|file| match file.strip_prefix(name)? {
            "" => Some(0),
            rest => rest.strip_prefix('.')?.parse().ok(),
        });
        found.extend(number.map(|number| (number, entry.path())));
    }
    found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// One line of a file as a piece of log, and whether its line of the log ends with it; `None` if it is none.
fn record(line: &[u8]) -> Option<(LogChunk, bool)> {
    let mut words = line.splitn(4, |byte| *byte == b' ');
    let time: Timestamp = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let source = match words.next()? {
        b"stdout" => LogSource::Stdout,
        b"stderr" => LogSource::Stderr,
        _ => return None,
    };
    // Tags may follow, behind colons.
    let whole = match words.next()?.split(|byte| *byte == b':').next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    let content = words.next().unwrap_or_default();
    let mut bytes = Vec::with_capacity(content.len() + usize::from(whole));
    bytes.extend_from_slice(content);
    if whole {
        bytes.push(b'\n');
    }
    Some((LogChunk { source, time, line_start: true, bytes: bytes.into() }, whole))
}

/// A reader of one log, from file to file. It waits for nothing.
#[derive(Debug)]
struct Reader {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// The file that is read: its inode, and how far it was.
    inode: u64,
    offset: u64,
    /// Whether a line is under way, per stream.
    mid_line: [bool; 2],
}

impl Reader {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, inode: 0, offset: 0, mid_line: [false; 2] }
    }

    /// Goes to the beginning of a file.
    fn open(&mut self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        self.inode = file.metadata()?.ino();
        (self.file, self.offset) = (Some(BufReader::new(file)), 0);
        Ok(())
    }

    /// The file after the one that is read; false if there is none yet.
    fn advance(&mut self) -> io::Result<bool> {
        let mut next = None;
        for path in segments(&self.path)?.into_iter().rev() {
            let inode = match fs::metadata(&path) {
                Ok(found) => found.ino(),
                // It was rotated away just now: the next look finds it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            };
            if self.file.is_some() && inode == self.inode {
                break;
            }
            next = Some(path);
        }
        match next {
            Some(path) => match self.open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                opened => opened.map(|()| true),
            },
            None => Ok(false),
        }
    }

    /// The next piece, with where it lies: inode and offset.
    fn next(&mut self) -> io::Result<Option<(LogChunk, (u64, u64))>> {
        let mut line = Vec::new();
        loop {
            let Some(file) = &mut self.file else {
                if !self.advance()? {
                    return Ok(None);
                }
                continue;
            };
            line.clear();
            let read = file.read_until(b'\n', &mut line)? as u64;
            if line.last() != Some(&b'\n') {
                // The rest of a line is not written yet, or never will be.
                file.seek(SeekFrom::Start(self.offset))?;
                // Whatever was added before the next file was begun is read first; half a record is not, whose rest went
                // where there was no room for it.
                if self.is_over(read)? && self.advance()? {
                    continue;
                }
                return Ok(None);
            }
            let at = (self.inode, self.offset);
            self.offset += read;
            line.pop();
            let Some((mut chunk, whole)) = record(&line) else { continue };
            let mid_line = &mut self.mid_line[usize::from(chunk.source == LogSource::Stderr)];
            chunk.line_start = !*mid_line;
            *mid_line = !whole;
            // A line may end with a piece of no bytes; alone it says nothing.
            if !chunk.bytes.is_empty() {
                return Ok(Some((chunk, at)));
            }
        }
    }

    /// Whether nothing will be added to the file that is read, because the runtime has another, and nothing was but the
    /// `torn` bytes at its end.
    fn is_over(&mut self, torn: u64) -> io::Result<bool> {
        let current = match fs::metadata(&self.path) {
            Ok(current) => current.ino(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(file) = &mut self.file else { return Ok(true) };
        Ok(current != self.inode && file.get_ref().metadata()?.len() <= self.offset + torn)
    }

    /// Goes to where the last `lines` lines begin.
    fn tail(&mut self, lines: u64) -> io::Result<()> {
        let most = usize::try_from(lines).unwrap_or(usize::MAX);
        let mut starts = VecDeque::new();
        let mut before = self.mid_line;
        while let Some((chunk, at)) = self.next()? {
            if chunk.line_start {
                starts.push_back((at, before));
                if starts.len() > most {
                    starts.pop_front();
                }
            }
            before = self.mid_line;
        }
        let Some(((inode, offset), mid_line)) = starts.front().copied() else { return Ok(()) };
        for path in segments(&self.path)? {
            if fs::metadata(&path).is_ok_and(|found| found.ino() == inode) {
                self.open(&path)?;
                self.offset = offset;
                self.mid_line = mid_line;
                if let Some(file) = &mut self.file {
                    file.seek(SeekFrom::Start(offset))?;
                }
            }
        }
        Ok(())
    }
}

/// Someone who reads a log.
struct Reading {
    reader: Reader,
    since: Option<Timestamp>,
    follow: bool,
    ended: Ended,
    /// How often the log is looked at after the end, with nothing new.
    last_looks: u32,
    tried: String,
}

/// How the end of a container is seen. The runtime may write the last of what it said a moment after it calls it exited.
struct Ended {
    client: CriClient,
    id: ContainerId,
    /// Its process, if it runs and can be seen from here.
    process: Option<Process>,
    asked: Option<Instant>,
}

impl Ended {
    async fn now(&mut self) -> bool {
        let waits = match &self.process {
            Some(process) => process.ended().now_or_never().is_none(),
            None => self.asked.is_some_and(|asked| asked.elapsed() < ASK),
        };
        if waits {
            return false;
        }
        self.asked = Some(Instant::now());
        let request =
            lambdalet_proto::cri::v1::ContainerStatusRequest { container_id: self.id.to_string(), verbose: false };
        let tried = || format!("failed to ask for the status of container {}", self.id);
        match super::client::ask!(self.client.runtime, container_status(request), tried).await {
            Ok(answer) => {
                use lambdalet_proto::cri::v1::ContainerState::{ContainerExited, ContainerUnknown};
                matches!(answer.status.unwrap_or_default().state(), ContainerExited | ContainerUnknown)
            }
            Err(error) => error.is_not_found(),
        }
    }
}

impl Reading {
    /// Some more pieces; `None` at the end.
    async fn next(mut self) -> Result<Option<(Vec<LogChunk>, Self)>> {
        loop {
            // Before looking: what is written until then is read.
            let ended = !self.follow || self.last_looks < LAST_LOOKS || self.ended.now().await;
            let (mut reader, since) = (self.reader, self.since);
            let read = blocking(self.tried.clone(), move || {
                let (mut chunks, mut ahead) = (Vec::new(), 0);
                while ahead < AHEAD
                    && let Some((chunk, _)) = reader.next()?
                {
                    if since.is_none_or(|since| chunk.time >= since) {
                        ahead += chunk.bytes.len() + 1;
                        chunks.push(chunk);
                    }
                }
                Ok((chunks, reader))
            });
            let (chunks, reader) = read.await?;
            self.reader = reader;
            if !chunks.is_empty() {
                return Ok(Some((chunks, self)));
            }
            if ended {
                if !self.follow || self.last_looks == 0 {
                    return Ok(None);
                }
                self.last_looks -= 1;
            }
            sleep(LOOK).await;
        }
    }
}

impl CriRuntime {
    pub(super) async fn read_logs(
        &self,
        id: &ContainerId,
        options: &LogOptions,
    ) -> Result<BoxStream<'static, Result<LogChunk>>> {
        let looked = self.look_closely(id).await?;
        let Some(looked) = looked else {
            return Err(RuntimeError::new(Kind::NotFound, format!("there is no container {id} to have a log")));
        };
        let place = if looked.running() { self.place(id.as_str()).await? } else { None };
        let process = place.and_then(|place| Process::open(place.pid, id.as_str()));
        let facts = &looked.facts;
        let path = self.logs.of_container(&facts.pod.uid, &facts.container, facts.attempt);
        let tried = format!("failed to read the log {}", path.display());
        let (lines, mut reader) = (options.tail, Reader::new(path));
        let at = blocking(tried.clone(), move || {
            if let Some(lines) = lines {
                reader.tail(lines)?;
            }
            Ok(reader)
        });
        let ended = Ended { client: self.client.clone(), id: id.clone(), process, asked: None };
        let (reader, since, follow) = (at.await?, options.since, options.follow);
        let reading = Reading { reader, since, follow, ended, last_looks: LAST_LOOKS, tried };
        Ok(stream::try_unfold(reading, Reading::next)
            .map_ok(|chunks| stream::iter(chunks).map(Ok::<_, RuntimeError>))
            .try_flatten()
            .boxed())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(nanos: i128, stream: &str, tag: &str, text: &str) -> String {
        format!("{:.9} {stream} {tag} {text}\n", Timestamp::from_nanosecond(nanos).unwrap())
    }

    fn all(reader: &mut Reader) -> Vec<(LogSource, bool, String)> {
        let read = std::iter::from_fn(|| reader.next().unwrap());
        read.map(|(chunk, _)| (chunk.source, chunk.line_start, String::from_utf8_lossy(&chunk.bytes).into_owned()))
            .collect()
    }

    fn text(reader: &mut Reader) -> String {
        all(reader).into_iter().map(|(_, _, text)| text).collect()
    }

    #[test]
    fn a_log_that_two_remove_at_once_is_gone_for_both() {
        let folder = tempfile::tempdir().unwrap();
        let files = LogFiles::new(folder.path().to_owned());
        let path = files.of_container("u", "c", 0);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for _ in 0..200 {
            for name in ["0.log", "0.log.1", "0.log.2"] {
                fs::write(path.with_file_name(name), "").unwrap();
            }
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                let removal = || {
                    start.wait();
                    files.remove("u", "c", 0)
                };
                let (one, other) = (scope.spawn(removal), scope.spawn(removal));
                one.join().unwrap().unwrap();
                other.join().unwrap().unwrap();
            });
            assert_eq!(segments(&path).unwrap(), Vec::<PathBuf>::new());
        }
    }

    #[test]
    fn lines_are_joined_per_stream_and_what_is_no_record_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let content = [
            line(1, "stdout", "P", "long "),
            line(2, "stderr", "F", ""),
            "nonsense\n".to_owned(),
            line(3, "stdout", "F:tag", "line"),
            line(4, "stdout", "P", "prompt> "),
            "1970-01-01T00:00:00.000000005Z stdout F torn".to_owned(),
        ];
        fs::write(&path, content.concat()).unwrap();
        use LogSource::{Stderr, Stdout};
        let wanted =
            [(Stdout, true, "long "), (Stderr, true, "\n"), (Stdout, false, "line\n"), (Stdout, true, "prompt> ")];
        let wanted = wanted.map(|(source, start, text)| (source, start, text.to_owned()));
        assert_eq!(all(&mut Reader::new(path)), wanted);
    }

    #[test]
    fn a_rotated_log_is_read_from_file_to_file_and_misses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (path, before) = (folder.path().join("0.log"), folder.path().join("0.log.1"));
        let mut reader = Reader::new(path.clone());
        assert_eq!(text(&mut reader), "", "nothing is there yet");
        let add = |path: &Path, text: &str| {
            use std::io::Write as _;
            let mut file = File::options().append(true).create(true).open(path).unwrap();
            file.write_all(line(1, "stdout", "F", text).as_bytes()).unwrap();
        };
        add(&path, "a");
        assert_eq!(text(&mut reader), "a\n");
        fs::rename(&path, &before).unwrap();
        add(&before, "b");
        assert_eq!(text(&mut reader), "b\n", "the runtime has not opened the new file yet");
        add(&path, "c");
        add(&path, "d");
        assert_eq!(text(&mut reader), "c\nd\n");
        assert_eq!(text(&mut Reader::new(path.clone())), "a\nb\nc\nd\n");
        let mut last = Reader::new(path.clone());
        last.tail(3).unwrap();
        assert_eq!(text(&mut last), "b\nc\nd\n");
    }

    #[test]
    fn what_is_left_of_a_pods_logs_is_nothing() {
        let root = tempfile::tempdir().unwrap();
        let files = LogFiles::new(root.path().to_owned());
        let path = files.of_container("../u", "c", 1);
        assert!(path.starts_with(root.path().join("___u")), "{}", path.display());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for name in ["1.log", "1.log.1", "1.log.2"] {
            fs::write(path.with_file_name(name), "").unwrap();
        }
        fs::write(path.with_file_name("11.log"), "").unwrap();
        files.remove("../u", "c", 1).unwrap();
        assert!(path.with_file_name("11.log").exists(), "another attempt's");
        fs::create_dir(files.of_pod("../u").join("never-made")).unwrap();
        files.leave_all_but(&HashSet::from(["../u".to_owned()])).unwrap();
        assert!(path.with_file_name("11.log").exists(), "its Pod is there");
        for _ in 0..2 {
            files.leave("../u").unwrap();
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        fs::create_dir_all(files.of_pod("gone").join("c")).unwrap();
        files.leave_all_but(&HashSet::new()).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    proptest! {
        /// A tail is the end of the whole, and has as many lines as were asked for.
        #[test]
        fn a_tail_is_so_many_lines(pieces in prop::collection::vec((any::<bool>(), any::<bool>(), "[a-z]{1,3}"), 0..30), lines in 0_u64..8) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("0.log");
            let content: String = pieces.iter().enumerate().map(|(at, (error, whole, text))| {
                line(at as i128, if *error { "stderr" } else { "stdout" }, if *whole { "F" } else { "P" }, text)
            }).collect();
            fs::write(&path, content).unwrap();
            let whole = all(&mut Reader::new(path.clone()));
            let mut reader = Reader::new(path);
            reader.tail(lines).unwrap();
            let tail = all(&mut reader);
            let starts = whole.iter().filter(|(_, start, _)| *start).count();
            let texts = |all: &[(LogSource, bool, String)]| all.iter().map(|(_, _, text)| text.clone()).collect::<Vec<_>>();
            prop_assert!(texts(&whole).ends_with(&texts(&tail)));
            let wanted = starts.min(usize::try_from(lines).unwrap());
            prop_assert_eq!(tail.iter().filter(|(_, start, _)| *start).count(), wanted);
        }
    }
}
