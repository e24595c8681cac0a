//! One log out of many: containers that come and go are read as one, in the order of time.
//!
//! What is there already is merged by the time of each line. What is followed comes as it is written: each container's
//! log goes on exactly behind its last piece in the merge, so nothing is told twice or lost in between.

use std::sync::Arc;

use futures::stream::{self, BoxStream, SelectAll, Stream, StreamExt};
use jiff::Timestamp;
use tracing::{debug, warn};

use super::targets::LogSpan;
use crate::runtime::types::{ContainerId, LogChunk, LogOptions};
use crate::runtime::{Kind, Result, SandboxRuntime};
use crate::telemetry::chain;

type Chunks = BoxStream<'static, Result<LogChunk>>;

/// Opens all of it as one log.
///
/// # Errors
/// As [`SandboxRuntime::logs`]; a container that is gone meanwhile is none.
pub(super) async fn open(runtime: Arc<dyn SandboxRuntime>, span: LogSpan, options: LogOptions) -> Result<Chunks> {
    let LogSpan { kept, present, later } = span;
    let kept = kept.into_iter().map(|chunks| begun_since(chunks, options.since)).collect();
    let places = present.into_iter().map(|id| (id, Place::default())).collect();
    let mut reader = Reader { runtime, kept, places, options };
    let skip = reader.lines_before_tail().await?;
    let merge = reader.merge().await?;
    let skipping = skip > 0;
    Ok(Span { reader, merge: Some(merge), skip, skipping, live: None, later: Some(later) }.into_stream())
}

/// Whole lines that begin at that moment or after it.
fn begun_since(chunks: Vec<LogChunk>, since: Option<Timestamp>) -> Vec<LogChunk> {
    let Some(since) = since else { return chunks };
    let mut wanted = false;
    let begun = chunks.into_iter().filter(|chunk| {
        if chunk.line_start {
            wanted = chunk.time >= since;
        }
        wanted
    });
    begun.collect()
}

/// How far one container's log has been read: the time of the last piece, and how many pieces carry that time.
#[derive(Clone, Copy, Debug, Default)]
struct Place(Option<(Timestamp, usize)>);

impl Place {
    fn pass(&mut self, time: Timestamp) {
        self.0 = match self.0 {
            Some((last, pieces)) if last == time => Some((last, pieces + 1)),
            _ => Some((time, 1)),
        };
    }
}

/// The logs, to be opened as often as needed.
struct Reader {
    runtime: Arc<dyn SandboxRuntime>,
    kept: Vec<Vec<LogChunk>>,
    places: Vec<(ContainerId, Place)>,
    options: LogOptions,
}

impl Reader {
    /// How many lines come before the last so many that are wanted.
    async fn lines_before_tail(&mut self) -> Result<u64> {
        let Some(tail) = self.options.tail else { return Ok(0) };
        let mut merge = self.merge().await?;
        let mut lines = 0;
        while let Some(chunk) = merge.next(&mut self.places).await? {
            lines += u64::from(chunk.line_start);
        }
        Ok(lines.saturating_sub(tail))
    }

    /// What there is now.
    async fn merge(&self) -> Result<Merge> {
        // One line at least, so that its time is known; it is skipped if none is wanted.
        let tail = self.options.tail.map(|tail| tail.max(1));
        let options = LogOptions { follow: false, tail, since: self.options.since };
        let mut sources = Vec::new();
        for chunks in &self.kept {
            sources.push(Source::of(stream::iter(chunks.clone().into_iter().map(Ok)).boxed(), None).await?);
        }
        for (index, (id, _)) in self.places.iter().enumerate() {
            if let Some(chunks) = there(id, self.runtime.logs(id, &options).await)? {
                sources.push(Source::of(chunks, Some(index)).await?);
            }
        }
        Ok(Merge { sources, current: None })
    }

    /// What a container writes behind its place.
    async fn follow(&self, id: &ContainerId, place: Place) -> Result<Option<Chunks>> {
        let since = place.0.map(|(time, _)| time).or(self.options.since);
        let options = LogOptions { follow: true, tail: None, since };
        let Some(chunks) = there(id, self.runtime.logs(id, &options).await)? else { return Ok(None) };
        let mut known = place.0;
        let fresh = chunks.filter(move |chunk| {
            let old = match (chunk, &mut known) {
                (Ok(chunk), Some((last, _))) if chunk.time < *last => true,
                (Ok(chunk), Some((last, pieces))) if chunk.time == *last && *pieces > 0 => {
                    *pieces -= 1;
                    true
                }
                _ => false,
            };
            std::future::ready(!old)
        });
        let id = id.clone();
        let whole = fresh.filter_map(move |chunk| std::future::ready(there(&id, chunk).transpose()));
        Ok(Some(whole.boxed()))
    }
}

/// A container that is gone has nothing more to say.
fn there<T>(id: &ContainerId, result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == Kind::NotFound => {
            debug!(container = %id, "a container is gone whose log was to be read");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// One log of a merge, with the piece that is its next.
struct Source {
    head: Option<LogChunk>,
    rest: Chunks,
    /// Whose place it moves.
    place: Option<usize>,
}

impl Source {
    async fn of(rest: Chunks, place: Option<usize>) -> Result<Self> {
        let mut source = Self { head: None, rest, place };
        source.pull().await?;
        Ok(source)
    }

    async fn pull(&mut self) -> Result<()> {
        self.head = match self.rest.next().await.transpose() {
            // Removed while it was read.
            Err(error) if error.kind() == Kind::NotFound => None,
            other => other?,
        };
        Ok(())
    }
}

/// Logs, line by line in the order of time.
struct Merge {
    sources: Vec<Source>,
    /// Whose line was begun.
    current: Option<usize>,
}

impl Merge {
    async fn next(&mut self, places: &mut [(ContainerId, Place)]) -> Result<Option<LogChunk>> {
        let goes_on = |index: &usize| {
            let head = self.sources.get(*index).and_then(|source| source.head.as_ref());
            head.is_some_and(|chunk| !chunk.line_start)
        };
        let oldest = || {
            let heads = self.sources.iter().enumerate();
            let heads = heads.filter_map(|(index, source)| Some((source.head.as_ref()?.time, index)));
            heads.min().map(|(_, index)| index)
        };
        let Some(index) = self.current.filter(goes_on).or_else(oldest) else { return Ok(None) };
        let Some(source) = self.sources.get_mut(index) else { return Ok(None) };
        let Some(chunk) = source.head.take() else { return Ok(None) };
        if let Some((_, place)) = source.place.and_then(|place| places.get_mut(place)) {
            place.pass(chunk.time);
        }
        source.pull().await?;
        self.current = Some(index);
        Ok(Some(chunk))
    }
}

/// The whole: what there is, then what comes.
struct Span {
    reader: Reader,
    /// `None` once it is told.
    merge: Option<Merge>,
    /// Lines that are not wanted.
    skip: u64,
    /// Whether the line being read is one of them.
    skipping: bool,
    /// What is followed; `None` before.
    live: Option<SelectAll<Chunks>>,
    /// `None` once it has ended.
    later: Option<BoxStream<'static, ContainerId>>,
}

impl Span {
    fn into_stream(self) -> Chunks {
        let pieces = stream::unfold(Some(self), |span| async move {
            let mut span = span?;
            match span.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(span))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        pieces.boxed()
    }

    async fn next(&mut self) -> Result<Option<LogChunk>> {
        while let Some(merge) = &mut self.merge {
            let Some(chunk) = merge.next(&mut self.reader.places).await? else {
                self.merge = None;
                break;
            };
            if self.is_wanted(&chunk) {
                return Ok(Some(chunk));
            }
        }
        if self.reader.options.follow { self.follow().await } else { Ok(None) }
    }

    /// Whether the piece belongs to one of the last lines that are wanted.
    fn is_wanted(&mut self, chunk: &LogChunk) -> bool {
        if chunk.line_start {
            // With nothing old wanted, the lines that were read for their time are not either.
            self.skipping = self.skip > 0 || self.reader.options.tail == Some(0);
            self.skip = self.skip.saturating_sub(1);
        }
        !self.skipping
    }

    async fn follow(&mut self) -> Result<Option<LogChunk>> {
        if self.live.is_none() {
            let mut live = SelectAll::new();
            for (id, place) in &self.reader.places {
                live.extend(self.reader.follow(id, *place).await?);
            }
            self.live = Some(live);
        }
        let Some(live) = &mut self.live else { return Ok(None) };
        loop {
            if live.is_empty() && self.later.is_none() {
                return Ok(None);
            }
            tokio::select! {
                // Cancel-safe: a piece is taken or left.
                Some(piece) = live.next(), if !live.is_empty() => match piece {
                    Ok(chunk) => return Ok(Some(chunk)),
                    Err(error) if error.kind() == Kind::Unavailable => return Err(error),
                    // What ends a container may cut its log off; those of the others go on.
                    Err(error) => warn!(error = chain(&error), "one of several logs broke off"),
                },
                // Cancel-safe: a container is taken or left.
                next = next(&mut self.later), if self.later.is_some() => match next {
                    Some(id) => live.extend(self.reader.follow(&id, Place::default()).await?),
                    None => self.later = None,
                },
            }
        }
    }
}

async fn next<S: Stream + Unpin>(stream: &mut Option<S>) -> Option<S::Item> {
    stream.as_mut()?.next().await
}
