//! One container's log on its way into a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Target;
use super::record::{Position, Skip};
use crate::cri::failure::CriError;
use crate::cri::shelf;
use crate::runtime::types::{ContainerId, ContainerState, LogChunk, LogOptions};
use crate::runtime::{Result, Runtime, RuntimeError};
use crate::telemetry::chain;

/// Pieces that are written at once.
const BATCH: usize = 64;
/// Bytes at the end of a file in which its last lines are looked for: more than two of the longest.
const TAIL: u64 = 64 << 10;
/// Until a log is read again, or a file written again, after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How often the log of an ended container is read again after it broke off.
const TRIES: u32 = 5;
/// How often a failure that goes on is told.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// The file that remembers how far the file before was written.
const POSITION: &str = "log-position";

/// A request to reopen, and where its answer goes.
pub(super) type Reopen = oneshot::Sender<std::result::Result<(), CriError>>;

/// See the module.
pub(in crate::cri) struct Pump {
    runtime: Arc<dyn Runtime>,
    id: ContainerId,
    target: Target,
    file: Arc<File>,
    /// Where the file ends once all lines are in it.
    position: Position,
    /// Whether the log broke off when it was last read.
    broken: bool,
    told: Option<Instant>,
}

/// Why a pump stopped reading.
enum End {
    /// There is no more, or not now.
    Log,
    /// It was told to.
    Stopped,
}

impl Pump {
    /// Whose log it is.
    pub(super) fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Opens the file, at its end.
    pub(super) async fn open(
        runtime: Arc<dyn Runtime>,
        id: ContainerId,
        target: Target,
    ) -> std::result::Result<Self, CriError> {
        let wanted = target.clone();
        let opened = spawn_blocking(move || at_end(&wanted)).await;
        let (file, position) = opened.map_err(io::Error::other).map_err(CriError::file("open", &target.path))??;
        Ok(Self { runtime, id, target, file: Arc::new(file), position, broken: false, told: None })
    }

    /// Writes until the container has ended and all of it is written, or it is told to stop.
    pub(super) async fn run(mut self, mut reopens: mpsc::Receiver<Reopen>, stop: CancellationToken) {
        let (mut tries, mut over) = (0, false);
        loop {
            self.broken = false;
            let was_over = over;
            let options = LogOptions { follow: true, tail: None, since: self.position.since() };
            match self.runtime.logs(&self.id, &options).await {
                Ok(log) => {
                    if let End::Stopped = self.carry(log, &mut reopens, &stop).await {
                        return;
                    }
                }
                Err(error) if error.is_not_found() => return,
                Err(error) => self.broke_off(&error),
            }
            // An engine that restarts ends every log.
            let status = self.runtime.container_status(&self.id).await;
            over = match status {
                Ok(status) => status.state == ContainerState::Exited,
                Err(error) => error.is_not_found(),
            };
            if over && !was_over && !self.broken {
                // A log that was followed may have ended before its last lines were in it.
                continue;
            }
            tries = if over { tries + 1 } else { 0 };
            if over && (!self.broken || tries > TRIES) {
                return;
            }
            tokio::select! {
                // Cancel-safe: it only waits.
                () = sleep(PAUSE) => {}
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return,
            }
        }
    }

    async fn carry(
        &mut self,
        log: BoxStream<'static, Result<LogChunk>>,
        reopens: &mut mpsc::Receiver<Reopen>,
        stop: &CancellationToken,
    ) -> End {
        let mut skip = Skip::to(self.position);
        let mut log = log.ready_chunks(BATCH);
        loop {
            let batch = tokio::select! {
                // Cancel-safe: a batch is taken or left.
                batch = log.next() => batch,
                // Cancel-safe: a request is taken or left.
                Some(answer) = reopens.recv() => {
                    // Who asked may have left.
                    let _ = answer.send(self.reopen().await);
                    continue;
                }
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return End::Stopped,
            };
            let Some(batch) = batch else { return End::Log };
            let mut out = Vec::new();
            for piece in batch {
                match piece {
                    Ok(chunk) if skip.is_new(&chunk) => {
                        if let Err(error) = self.position.push(&chunk, &mut out) {
                            self.tell("failed to write a line of a log", &error);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => self.broke_off(&error),
                }
            }
            if let End::Stopped = self.put(out, stop).await {
                return End::Stopped;
            }
        }
    }

    /// Writes until it is written: a full disk holds the log up, and the engine keeps it.
    async fn put(&mut self, bytes: Vec<u8>, stop: &CancellationToken) -> End {
        let mut rest = Bytes::from(bytes);
        while !rest.is_empty() {
            let (file, piece) = (Arc::clone(&self.file), rest.clone());
            let written = spawn_blocking(move || (&*file).write(&piece)).await;
            match written.map_err(io::Error::other).and_then(|written| written) {
                Ok(written) => rest.advance(written),
                Err(error) => {
                    self.tell("failed to write a container's log", &error);
                    tokio::select! {
                        // Cancel-safe: it only waits.
                        () = sleep(PAUSE) => {}
                        // Cancel-safe: a token stays cancelled.
                        () = stop.cancelled() => return End::Stopped,
                    }
                }
            }
        }
        End::Log
    }

    async fn reopen(&mut self) -> std::result::Result<(), CriError> {
        // The new file is empty, and does not say how far the one before goes.
        let position = self.position.write();
        shelf::write(&self.target.place, "log-position.new", POSITION, position.as_bytes())?;
        let path = self.target.path.clone();
        let opened = spawn_blocking(move || append(&path)).await;
        let opened = opened.map_err(io::Error::other).map_err(CriError::file("open", &self.target.path))??;
        self.file = Arc::new(opened);
        Ok(())
    }

    fn broke_off(&mut self, error: &RuntimeError) {
        self.broken = true;
        self.tell("failed to read a container's log", error);
    }

    fn tell(&mut self, what: &str, error: &(dyn std::error::Error + 'static)) {
        if self.told.is_none_or(|told| told.elapsed() > TOLD_EVERY) {
            self.told = Some(Instant::now());
            warn!(container = %self.id, path = %self.target.path.display(), error = chain(error), "{what}");
        }
    }
}

fn append(path: &Path) -> std::result::Result<File, CriError> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).read(true).mode(0o640);
    options.open(path).map_err(CriError::file("open", path))
}

/// The file, and how far the log is written.
fn at_end(target: &Target) -> std::result::Result<(File, Position), CriError> {
    if let Some(folder) = target.path.parent() {
        fs::create_dir_all(folder).map_err(CriError::file("make", folder))?;
    }
    let mut file = append(&target.path)?;
    let found = resume(&mut file).map_err(CriError::file("read", &target.path))?;
    // Of a stream that has written nothing since the file was opened anew.
    let remembered = fs::read_to_string(target.place.join(POSITION)).unwrap_or_default();
    Ok((file, found.or(Position::read(&remembered))))
}

/// The position at the end of a file. A line that was torn there goes: it is written again.
fn resume(file: &mut File) -> io::Result<Position> {
    let start = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    Read::by_ref(file).take(TAIL).read_to_end(&mut tail)?;
    let end_of_line = |byte: &u8| *byte == b'\n';
    if !tail.is_empty() && !tail.ends_with(b"\n") {
        let whole = tail.iter().rposition(end_of_line).map_or(0, |at| at + 1);
        file.set_len(start + whole as u64)?;
    }
    if start == 0 {
        return Ok(Position::at_end_of(&tail));
    }
    // It begins within a line.
    let first = tail.iter().position(end_of_line).map_or(tail.len(), |at| at + 1);
    Ok(Position::at_end_of(&tail[first..]).of_the_end_only())
}
