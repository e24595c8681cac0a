//! What environments have written that are gone: files below their Pod's directory, for `kubectl logs`.
//!
//! `<root>/pods/<uid>/logs/<container>/<replica>.<ordinal>`, in the CRI's log format (`TIME STREAM TAG TEXT`, where tag
//! `F` ends a line and `P` does not). Written when an environment is removed, removed with the Pod, or when what was
//! kept later needs the room.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;

use super::base;
use crate::pod::Shared;
use crate::runtime::types::{ContainerId, ContainerState, LogChunk, LogOptions, LogSource};
use crate::runtime::{Result, SandboxRuntime};
use crate::telemetry::chain;

/// Most bytes kept for one Pod.
const MOST_BYTES: u64 = 1 << 20;
/// Most lines kept of one environment, so that a long log is not read from its beginning.
const MOST_LINES: u64 = 16 << 10;
/// Most files of one Pod.
const MOST_FILES: usize = 256;
/// How long reading the log of an environment may take; it is removed all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a Pod's are.
pub(in crate::pod) fn place(shared: &Shared, uid: &str) -> PathBuf {
    shared.pod_dir(uid).join("logs")
}

/// Keeps what the containers of an environment have written that is about to be removed. What cannot be kept is said in
/// this node's log: for want of a log nothing stays on the host.
pub(in crate::pod) async fn keep(shared: &Shared, key: &str) {
    let uid = base(key);
    let Some(environment) = key.strip_prefix(uid).and_then(|rest| rest.strip_prefix('.')) else { return };
    let place = place(shared, uid);
    match tokio::time::timeout(PATIENCE, read_all(&*shared.runtime, key)).await {
        Ok(Ok(logs)) => {
            let environment = environment.to_owned();
            let written = tokio::task::spawn_blocking(move || write_all(&place, &environment, &logs)).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(key, error = chain(&error), "failed to keep the log of an environment");
            }
        }
        Ok(Err(error)) => tracing::warn!(key, error = chain(&error), "failed to read the log of an environment"),
        Err(_) => tracing::warn!(key, "reading the log of an environment took too long"),
    }
}

async fn read_all(runtime: &dyn crate::runtime::Runtime, key: &str) -> Result<BTreeMap<String, Bytes>> {
    let mut logs = BTreeMap::new();
    for container in runtime.list_containers(Some(key)).await? {
        if container.state != ContainerState::Created {
            let log = read(runtime, &container.id).await?;
            if !log.is_empty() {
                logs.insert(container.name, log);
            }
        }
    }
    Ok(logs)
}

/// The end of a container's log, as it is written down.
async fn read(runtime: &(impl SandboxRuntime + ?Sized), id: &ContainerId) -> Result<Bytes> {
    let options = LogOptions { tail: Some(MOST_LINES), ..LogOptions::default() };
    let mut chunks = runtime.logs(id, &options).await?;
    let (mut lines, mut size) = (VecDeque::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let line = written(&chunk?);
        size += line.len();
        lines.push_back(line);
        while size as u64 > MOST_BYTES {
            size -= lines.pop_front().map_or(size, |line: Bytes| line.len());
        }
    }
    let mut log = BytesMut::with_capacity(size);
    lines.iter().for_each(|line| log.extend_from_slice(line));
    Ok(log.freeze())
}

fn written(chunk: &LogChunk) -> Bytes {
    let source = match chunk.source {
        LogSource::Stdout => "stdout",
        LogSource::Stderr => "stderr",
    };
    let (tag, text) = match chunk.bytes.strip_suffix(b"\n") {
        Some(text) => ('F', text),
        None => ('P', &*chunk.bytes),
    };
    let mut line = BytesMut::from(format!("{:.9} {source} {tag} ", chunk.time).as_bytes());
    line.extend_from_slice(text);
    line.extend_from_slice(b"\n");
    line.freeze()
}

fn write_all(place: &Path, environment: &str, logs: &BTreeMap<String, Bytes>) -> io::Result<()> {
    for (container, log) in logs {
        let folder = place.join(container);
        fs::create_dir_all(&folder)?;
        // Readers see all of it or nothing.
        let draft = folder.join(".draft").with_extension(environment);
        fs::write(&draft, log)?;
        fs::rename(&draft, folder.join(environment))?;
    }
    make_room(place)
}

/// Removes the oldest files until the rest is within the bounds.
fn make_room(place: &Path) -> io::Result<()> {
    let mut files = files(place)?;
    files.sort();
    let mut bytes: u64 = files.iter().map(|file| file.size).sum();
    let mut left = files.len();
    for file in files {
        if bytes <= MOST_BYTES && left <= MOST_FILES {
            break;
        }
        fs::remove_file(&file.path)?;
        bytes -= file.size;
        left -= 1;
    }
    Ok(())
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kept {
    written: SystemTime,
    path: PathBuf,
    size: u64,
}

fn files(place: &Path) -> io::Result<Vec<Kept>> {
    let mut files = Vec::new();
    for folder in entries(place)? {
        for path in entries(&folder)? {
            let about = fs::metadata(&path)?;
            files.push(Kept { written: about.modified()?, path, size: about.len() });
        }
    }
    Ok(files)
}

/// What is in a directory, if there is one; drafts are not.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let paths: Vec<PathBuf> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    Ok(paths.into_iter().filter(|path| !name_of(path).starts_with('.')).collect())
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// What is kept of one container's log: the environment (`<replica>.<ordinal>`), and what it wrote.
pub(super) fn kept(place: &Path, container: &str) -> io::Result<Vec<(String, Vec<LogChunk>)>> {
    let mut logs = Vec::new();
    for path in entries(&place.join(container))? {
        match fs::read(&path) {
            Ok(text) => logs.push((name_of(&path).to_owned(), parse(&Bytes::from(text)))),
            // It had to make room meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(logs)
}

/// Reads what [`written`] wrote; what is none of it is passed over.
fn parse(text: &Bytes) -> Vec<LogChunk> {
    let mut begins = [true; 2];
    let mut chunks = Vec::new();
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let mut words = line.splitn(4, |byte| *byte == b' ');
        let (Some(time), Some(source), Some(tag), Some(rest)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let Some(time) = std::str::from_utf8(time).ok().and_then(|time| time.parse().ok()) else { continue };
        let (source, index) = match source {
            b"stderr" => (LogSource::Stderr, 1),
            _ => (LogSource::Stdout, 0),
        };
        let whole = tag == b"F";
        let bytes = text.slice_ref(if whole { rest } else { rest.strip_suffix(b"\n").unwrap_or(rest) });
        chunks.push(LogChunk { source, time, line_start: begins[index], bytes });
        begins[index] = whole;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(source: LogSource, second: i64, line_start: bool, text: &'static str) -> LogChunk {
        let time = jiff::Timestamp::new(second, 7).unwrap();
        LogChunk { source, time, line_start, bytes: Bytes::from_static(text.as_bytes()) }
    }

    fn log(chunks: &[LogChunk]) -> Bytes {
        chunks.iter().flat_map(|chunk| written(chunk).to_vec()).collect::<Vec<u8>>().into()
    }

    #[test]
    fn what_is_kept_is_what_was_written() {
        let chunks = vec![
            chunk(LogSource::Stdout, 1, true, "a line with  blanks \n"),
            chunk(LogSource::Stdout, 2, true, "a long "),
            chunk(LogSource::Stderr, 2, true, "\n"),
            chunk(LogSource::Stdout, 3, false, "line\n"),
            chunk(LogSource::Stderr, 4, true, "no end"),
        ];
        assert_eq!(parse(&log(&chunks)), chunks);
        assert_eq!(parse(&Bytes::from_static(b"\nnonsense\n")), []);
    }

    #[test]
    fn the_oldest_make_room_and_containers_are_told_apart() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        let big = Bytes::from(vec![b'x'; (MOST_BYTES / 2 + 1) as usize]);
        let line = log(&[chunk(LogSource::Stdout, 1, true, "hello\n")]);
        write_all(place, "0.0", &BTreeMap::from([("main".to_owned(), big.clone())])).unwrap();
        write_all(place, "1.0", &BTreeMap::from([("main".to_owned(), line), ("side".to_owned(), big)])).unwrap();
        let names = |container| kept(place, container).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names("main"), ["1.0"], "the first made room");
        assert_eq!(names("side"), ["1.0"]);
        assert_eq!(names("other"), Vec::<String>::new());
        for number in 0..MOST_FILES + 3 {
            write_all(place, &format!("{number}.1"), &BTreeMap::from([("many".to_owned(), Bytes::from_static(b"x"))]))
                .unwrap();
        }
        assert_eq!(names("many").len(), MOST_FILES);
    }
}
