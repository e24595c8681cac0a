//! A container's log as a stream.
//!
//! Reading is what moves it: nothing is fetched ahead of the reader but what lies in the socket, so a slow reader holds
//! the daemon up and not this process's memory. The last N lines are found by a first pass that keeps positions only,
//! since Docker counts records and a line may have many.

use std::collections::VecDeque;

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use hyper::Method;
use jiff::Timestamp;

use super::records::{Decoder, Lines, Malformed, Record};
use super::{DockerRuntime, http};
use crate::runtime::types::{ContainerId, LogChunk, LogOptions, LogSource};
use crate::runtime::{Kind, Result, RuntimeError};

/// How many records back a record of a later time is looked for: the two streams of a container are written side by
/// side, so their times may be out of order by a few.
const NEIGHBOURS: usize = 64;

/// Reads one answer of the logs endpoint, record by record.
struct Reader {
    body: http::Body,
    decoder: Decoder,
    ended: bool,
    tried: String,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Record>> {
        loop {
            let record = self
                .decoder
                .next(self.ended)
                .map_err(|error: Malformed| RuntimeError::new(Kind::Internal, self.tried.clone()).with_source(error))?;
            if record.is_some() || self.ended {
                return Ok(record);
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.decoder.push(&bytes),
                Some(Err(error)) => {
                    return Err(RuntimeError::new(Kind::Unavailable, self.tried.clone()).with_source(error));
                }
                None => self.ended = true,
            }
        }
    }
}

/// From where a log is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    /// Time of the first record wanted; `None` is the log's beginning.
    time: Option<Timestamp>,
    /// Records of that time or a later one that lie before it.
    skip: usize,
    /// Where lines stand there.
    lines: Lines,
}

/// Which log, and how it is asked for.
struct Log<'a> {
    runtime: &'a DockerRuntime,
    id: &'a ContainerId,
    terminal: bool,
}

impl Log<'_> {
    async fn open(&self, more: &str) -> Result<Reader> {
        let tried = format!("failed to read the log of container {}", self.id);
        let target = format!("/containers/{}/logs?stdout=1&stderr=1&timestamps=1{more}", self.id);
        let body = http::request(&self.runtime.options.socket, &tried, Method::GET, &target, None).await?;
        Ok(Reader { body, decoder: Decoder::new(!self.terminal), ended: false, tried })
    }

    fn lines(&self) -> Lines {
        Lines::new(self.runtime.restores_newlines)
    }

    /// Where the last `wanted` lines begin.
    async fn find_tail(&self, wanted: u64) -> Result<Start> {
        let mut records = wanted.saturating_add(1);
        loop {
            let mut reader = self.open(&format!("&tail={records}")).await?;
            let mut search = TailSearch::new(wanted, self.lines());
            while let Some(record) = reader.next().await? {
                search.pass(&record);
            }
            let whole_log = search.passed < records;
            if let Some(start) = search.found(whole_log) {
                return Ok(start);
            }
            records = records.saturating_mul(2);
        }
    }
}

/// Passes over the end of a log and remembers where its last lines begin.
struct TailSearch {
    wanted: u64,
    lines: Lines,
    passed: u64,
    /// The first record of each stream may continue a line from before: where the last such record is.
    unsure: [Option<u64>; 2],
    starts: VecDeque<(u64, Start)>,
    recent: VecDeque<Timestamp>,
}

impl TailSearch {
    fn new(wanted: u64, lines: Lines) -> Self {
        Self { wanted, lines, passed: 0, unsure: [None; 2], starts: VecDeque::new(), recent: VecDeque::new() }
    }

    fn pass(&mut self, record: &Record) {
        let first = &mut self.unsure[usize::from(record.source == LogSource::Stderr)];
        first.get_or_insert(self.passed);
        if self.lines.at_start(record.source) {
            let skip = self.recent.iter().filter(|time| **time >= record.time).count();
            let start = Start { time: Some(record.time), skip, lines: self.lines.without_begun() };
            self.starts.push_back((self.passed, start));
            if self.starts.len() as u64 > self.wanted {
                self.starts.pop_front();
            }
        }
        self.lines.advance(record);
        self.recent.push_back(record.time);
        if self.recent.len() > NEIGHBOURS {
            self.recent.pop_front();
        }
        self.passed += 1;
    }

    /// The start of the wanted lines, or `None` if more of the log has to be seen to tell.
    fn found(self, whole_log: bool) -> Option<Start> {
        let enough = self.starts.len() as u64 >= self.wanted;
        let beginning = Start { time: None, skip: 0, lines: Lines::default() };
        match self.starts.front() {
            Some((at, start)) if enough => {
                let sure = self.unsure.iter().flatten().all(|unsure| unsure < at);
                (whole_log || sure).then_some(*start)
            }
            _ if whole_log => Some(beginning),
            _ => None,
        }
    }
}

impl DockerRuntime {
    pub(super) async fn read_logs(
        &self,
        id: &ContainerId,
        options: &LogOptions,
    ) -> Result<BoxStream<'static, Result<LogChunk>>> {
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no container {id}"));
        let seen = self.see(id.as_str()).await?.filter(|seen| !seen.facts.sandbox_itself).ok_or_else(absent)?;
        let terminal = seen.inspect.config.and_then(|config| config.tty).unwrap_or(false);
        let log = Log { runtime: self, id, terminal };
        let follow = if options.follow { "&follow=1" } else { "" };
        let (query, start) = match options.tail {
            Some(0) if !options.follow => return Ok(stream::empty().boxed()),
            Some(0) => ("&tail=0".to_owned(), None),
            Some(wanted) => {
                let start = log.find_tail(wanted).await?;
                (since(start.time.max(options.since)), Some(start))
            }
            None => (since(options.since), None),
        };
        let reader = log.open(&format!("{follow}{query}")).await?;
        // Asked for from a later moment than the tail's, the records to skip are not among those that come.
        let tail_first = start.filter(|start| start.time >= options.since);
        let skip = tail_first.map_or(0, |start| start.skip);
        let begun = tail_first.filter(|start| start.time.is_some()).map(|start| start.lines);
        Ok(chunks(reader, begun.unwrap_or_else(|| log.lines()), skip).boxed())
    }
}

fn chunks(reader: Reader, lines: Lines, skip: usize) -> impl futures::Stream<Item = Result<LogChunk>> {
    stream::try_unfold((reader, lines, skip), |(mut reader, mut lines, mut skip)| async move {
        while let Some(record) = reader.next().await? {
            if skip > 0 {
                skip -= 1;
            } else if let Some(chunk) = lines.chunk(record) {
                return Ok(Some((chunk, (reader, lines, skip))));
            }
        }
        Ok(None)
    })
}

fn since(time: Option<Timestamp>) -> String {
    time.map(|time| format!("&since={}", unix_time(time))).unwrap_or_default()
}

/// Seconds and nanoseconds since 1970, as Docker reads them; what is before counts as the beginning.
pub(super) fn unix_time(time: Timestamp) -> String {
    let time = time.max(Timestamp::UNIX_EPOCH);
    format!("{}.{:09}", time.as_second(), time.subsec_nanosecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(source: LogSource, second: i64, text: &str) -> Record {
        Record { source, time: Timestamp::from_second(second).unwrap(), bytes: text.to_owned().into() }
    }

    fn search(wanted: u64, records: &[Record], whole_log: bool) -> Option<Start> {
        let mut search = TailSearch::new(wanted, Lines::new(true));
        records.iter().for_each(|record| search.pass(record));
        search.found(whole_log)
    }

    #[test]
    fn the_last_lines_are_found_once_a_record_before_them_is_seen() {
        use LogSource::Stdout;
        let records = [record(Stdout, 1, "a\n"), record(Stdout, 2, "b\n")];
        assert_eq!(search(1, &records, false).and_then(|start| start.time), Some(records[1].time));
        assert_eq!(search(2, &records, false), None);
        assert_eq!(search(2, &records, true).and_then(|start| start.time), Some(records[0].time));
        assert_eq!(search(3, &records, true).map(|start| start.time), Some(None));
    }

    #[test]
    fn a_stream_first_seen_among_the_last_lines_may_continue_one() {
        use LogSource::{Stderr, Stdout};
        let records = [record(Stdout, 1, "a\n"), record(Stdout, 2, "b\n"), record(Stderr, 3, "e\n")];
        assert_eq!(search(1, &records, false), None);
        assert!(search(1, &records, true).is_some());
    }

    #[test]
    fn earlier_records_of_the_same_moment_are_skipped() {
        use LogSource::Stdout;
        let records = [record(Stdout, 1, "a\n"), record(Stdout, 5, "b\n"), record(Stdout, 5, "c\n")];
        assert_eq!(search(1, &records, false).map(|start| start.skip), Some(1));
    }

    #[test]
    fn a_time_is_written_to_the_nanosecond() {
        assert_eq!(unix_time("2026-11-21T07:15:43.000000026Z".parse().unwrap()), "1795245343.000000026");
        assert_eq!(unix_time("1969-01-01T00:00:00Z".parse().unwrap()), "0.000000000");
    }
}
