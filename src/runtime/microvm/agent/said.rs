//! What a guest says, checked: nothing of it is kept before it went through here.
//!
//! The workload of a guest may have taken the agent over, so each answer may be anything that is a message at all. How
//! much repeats in it was counted before it was decoded (`lambdalet_proto::bounded`). Counts and lengths have bounds, ids and names the letters they may have, text for people no control characters. What does not
//! fit in is an error of the whole answer, but for text, which is cut.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
pub use lambdalet_proto::MAX_CONTAINERS;
use lambdalet_proto::agent::v1;
use lambdalet_proto::{MAX_INTERFACES, MAX_MESSAGE, MAX_RECORDS, MAX_VOLUMES};

/// Bytes of an id or name.
pub const MAX_NAME: usize = 128;
/// Bytes of text for people.
pub const MAX_TEXT: usize = 1024;
/// Annotations of a container, and bytes of each value.
const MAX_ANNOTATIONS: usize = 64;
const MAX_ANNOTATION: usize = 4096;
/// A clock beyond this (the year 2200) is no clock.
const LAST_TIME: u64 = 7_258_118_400_000_000_000;

/// An answer that no agent gives.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's {0} is out of bounds")]
pub struct OutOfBounds(pub &'static str);

type Checked<T> = Result<T, OutOfBounds>;

/// Who is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the agent, for people.
    pub agent_version: String,
    /// The kernel, for people.
    pub kernel_release: String,
    /// From the kernel's start to the agent's readiness.
    pub ready_after: std::time::Duration,
    /// Whether it has an identity.
    pub configured: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// CPUs.
    pub cpus: u32,
    /// The id by which it knows itself, for people; empty before it has an identity.
    pub machine_id: String,
}

/// Where in its life a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended, or could not be started.
    Exited,
}

/// A container of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// What the node called it.
    pub id: String,
    /// Where in its life it is.
    pub phase: Phase,
    /// Its first process, inside the guest.
    pub pid: Option<i32>,
    /// When it was made, by the guest's clock as all times here.
    pub created_at: Timestamp,
    /// When its process started.
    pub started_at: Option<Timestamp>,
    /// When its process ended.
    pub finished_at: Option<Timestamp>,
    /// 0 to 255; 128 + signal for a killed process.
    pub exit_code: i32,
    /// Whether the guest's kernel killed it for want of memory.
    pub oom_killed: bool,
    /// Whether it is frozen.
    pub frozen: bool,
    /// Why it could not be started, for people.
    pub message: String,
    /// What the node wrote on it.
    pub annotations: BTreeMap<String, String>,
}

/// Something that happened in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Events are told from here on.
    Subscribed,
    /// The container's process started.
    Started(String),
    /// It ended, with this code.
    Exited(String, i32),
    /// The kernel killed a process of it for want of memory.
    OutOfMemory(String),
    /// It was removed.
    Removed(String),
    /// So many events are missing: list to know.
    Lost(u64),
}

/// A piece of log and where the next begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// When it was written.
    pub time: Timestamp,
    /// Standard error; else standard output.
    pub stderr: bool,
    /// Whether it begins a line.
    pub line_start: bool,
    /// The bytes, the newline included where the line ends.
    pub bytes: Bytes,
}

/// Pieces of log that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogBatch {
    /// In the order in which they were written.
    pub records: Vec<LogRecord>,
    /// The offset to go on from.
    pub next: u64,
    /// Bytes before these records that were dropped, for the log is bounded.
    pub lost: u64,
}

/// What a guest uses.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// When it was read.
    pub time: Timestamp,
    /// All containers together.
    pub pod: v1::Usage,
    /// Each running container.
    pub containers: Vec<v1::ContainerUsage>,
    /// Interfaces without loopback.
    pub interfaces: Vec<v1::InterfaceUsage>,
    /// Volumes on the scratch disk, if they were measured.
    pub volumes: Vec<v1::VolumeUsage>,
    /// The scratch disk.
    pub scratch: Option<v1::FsUsage>,
    /// Bytes of memory the guest has.
    pub memory_total: u64,
    /// Bytes that could be had.
    pub memory_available: u64,
}

/// Checks the answer to Hello.
///
/// # Errors
/// A protocol that this node does not speak.
pub fn hello(reply: v1::HelloReply) -> Checked<Hello> {
    if reply.protocol != v1::PROTOCOL {
        return Err(OutOfBounds("protocol version"));
    }
    Ok(Hello {
        agent_version: text(&reply.agent_version),
        kernel_release: text(&reply.kernel_release),
        ready_after: std::time::Duration::from_nanos(reply.ready_after_ns),
        configured: reply.configured,
        memory: reply.memory_bytes,
        cpus: reply.cpus,
        machine_id: text(&reply.machine_id),
    })
}

/// Checks a container.
///
/// # Errors
/// What is out of bounds.
pub fn container(state: v1::ContainerState) -> Checked<Container> {
    let phase = match v1::Phase::try_from(state.phase) {
        Ok(v1::Phase::Created) => Phase::Created,
        Ok(v1::Phase::Running) => Phase::Running,
        Ok(v1::Phase::Exited) => Phase::Exited,
        Err(_) => return Err(OutOfBounds("container phase")),
    };
    Ok(Container {
        id: id(state.id)?,
        phase,
        pid: (state.pid != 0).then(|| i32::try_from(state.pid).map_err(|_| OutOfBounds("process id"))).transpose()?,
        created_at: time(state.created_ns)?,
        started_at: some_time(state.started_ns)?,
        finished_at: some_time(state.finished_ns)?,
        exit_code: code(state.exit_code)?,
        oom_killed: state.oom_killed,
        frozen: state.frozen,
        message: text(&state.message),
        annotations: annotations(state.annotations)?,
    })
}

/// Checks a list of containers.
///
/// # Errors
/// What is out of bounds; an id that comes twice.
pub fn containers(reply: v1::ListContainersReply) -> Checked<Vec<Container>> {
    if reply.containers.len() > MAX_CONTAINERS {
        return Err(OutOfBounds("number of containers"));
    }
    let list = reply.containers.into_iter().map(container).collect::<Checked<Vec<_>>>()?;
    let ids: std::collections::BTreeSet<_> = list.iter().map(|container| &container.id).collect();
    if ids.len() < list.len() {
        return Err(OutOfBounds("list of containers"));
    }
    Ok(list)
}

/// Checks an event.
///
/// # Errors
/// What is out of bounds.
pub fn event(event: v1::Event) -> Checked<Event> {
    let container = event.container;
    match v1::EventKind::try_from(event.kind) {
        Ok(v1::EventKind::Subscribed) => Ok(Event::Subscribed),
        Ok(v1::EventKind::Started) => Ok(Event::Started(id(container)?)),
        Ok(v1::EventKind::Exited) => Ok(Event::Exited(id(container)?, code(event.exit_code)?)),
        Ok(v1::EventKind::OutOfMemory) => Ok(Event::OutOfMemory(id(container)?)),
        Ok(v1::EventKind::Removed) => Ok(Event::Removed(id(container)?)),
        Ok(v1::EventKind::Lost) => Ok(Event::Lost(event.lost)),
        Err(_) => Err(OutOfBounds("event")),
    }
}

/// Checks a batch of log that was asked for from `from`.
///
/// # Errors
/// What is out of bounds; an offset that goes back.
pub fn log_batch(batch: v1::LogBatch, from: u64) -> Checked<LogBatch> {
    let bytes: usize = batch.records.iter().map(|record| record.data.len()).sum();
    if batch.records.len() > MAX_RECORDS || bytes > MAX_MESSAGE {
        return Err(OutOfBounds("batch of log"));
    }
    // Offsets count what the guest keeps, which is more than what it sends.
    let least = from.checked_add(batch.lost).and_then(|from| from.checked_add(bytes as u64));
    if least.is_none_or(|least| batch.next < least) {
        return Err(OutOfBounds("log offset"));
    }
    let record = |record: v1::LogRecord| {
        let time = time(record.time_ns)?;
        Ok(LogRecord { time, stderr: record.stderr, line_start: record.line_start, bytes: record.data })
    };
    let records = batch.records.into_iter().map(record).collect::<Checked<_>>()?;
    Ok(LogBatch { records, next: batch.next, lost: batch.lost })
}

/// Checks statistics.
///
/// # Errors
/// What is out of bounds.
pub fn stats(reply: v1::StatsReply) -> Checked<Stats> {
    let most = [
        (reply.containers.len(), MAX_CONTAINERS),
        (reply.interfaces.len(), MAX_INTERFACES),
        (reply.volumes.len(), MAX_VOLUMES),
    ];
    if most.iter().any(|(count, most)| count > most) {
        return Err(OutOfBounds("number of statistics"));
    }
    reply.containers.iter().try_for_each(|container| check_id(&container.id))?;
    reply.volumes.iter().try_for_each(|volume| check_id(&volume.name))?;
    for interface in &reply.interfaces {
        let named = !interface.name.is_empty() && interface.name.len() < 16;
        let letters = interface.name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if !named || !letters || interface.received.len() > 4 || interface.sent.len() > 4 {
            return Err(OutOfBounds("interface"));
        }
    }
    Ok(Stats {
        time: time(reply.time_ns)?,
        pod: reply.pod.unwrap_or_default(),
        containers: reply.containers,
        interfaces: reply.interfaces,
        volumes: reply.volumes,
        scratch: reply.scratch,
        memory_total: reply.memory_total,
        memory_available: reply.memory_available,
    })
}

/// Checks a piece of a stream: what a process wrote, or a port sent.
///
/// # Errors
/// A piece longer than a message.
pub fn piece(bytes: Bytes) -> Checked<Bytes> {
    if bytes.len() > MAX_MESSAGE { Err(OutOfBounds("piece of a stream")) } else { Ok(bytes) }
}

/// Checks an exit code.
///
/// # Errors
/// One that no process has.
pub fn code(code: i32) -> Checked<i32> {
    if (0..=255).contains(&code) { Ok(code) } else { Err(OutOfBounds("exit code")) }
}

/// Text for people: cut to [`MAX_TEXT`] bytes, control characters replaced.
pub fn text(said: &str) -> String {
    let mut kept = String::new();
    for letter in said.chars() {
        if kept.len() + letter.len_utf8() > MAX_TEXT {
            break;
        }
        kept.push(if letter.is_control() { ' ' } else { letter });
    }
    kept
}

fn check_id(id: &str) -> Checked<()> {
    let letters = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if id.is_empty() || id.len() > MAX_NAME || !letters { Err(OutOfBounds("container id")) } else { Ok(()) }
}

fn id(id: String) -> Checked<String> {
    check_id(&id).map(|()| id)
}

fn time(nanoseconds: u64) -> Checked<Timestamp> {
    if nanoseconds > LAST_TIME {
        return Err(OutOfBounds("clock"));
    }
    Timestamp::from_nanosecond(i128::from(nanoseconds)).map_err(|_| OutOfBounds("clock"))
}

fn some_time(nanoseconds: u64) -> Checked<Option<Timestamp>> {
    if nanoseconds == 0 { Ok(None) } else { time(nanoseconds).map(Some) }
}

fn annotations(said: std::collections::HashMap<String, String>) -> Checked<BTreeMap<String, String>> {
    let long = |(name, value): (&String, &String)| name.len() > 2 * MAX_NAME || value.len() > MAX_ANNOTATION;
    if said.len() > MAX_ANNOTATIONS || said.iter().any(long) {
        return Err(OutOfBounds("annotations"));
    }
    Ok(said.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(id: &str) -> v1::ContainerState {
        v1::ContainerState { id: id.into(), ..Default::default() }
    }

    #[test]
    fn a_container_is_taken_as_it_is() {
        let said = v1::ContainerState {
            phase: v1::Phase::Exited.into(),
            pid: 7,
            created_ns: 1,
            started_ns: 2,
            exit_code: 137,
            oom_killed: true,
            ..state("web-1")
        };
        let taken = container(said).unwrap();
        assert_eq!((taken.id.as_str(), taken.phase, taken.pid), ("web-1", Phase::Exited, Some(7)));
        assert_eq!((taken.exit_code, taken.oom_killed, taken.finished_at), (137, true, None));
        assert_eq!(taken.started_at, Some(Timestamp::from_nanosecond(2).unwrap()));
    }

    #[test]
    fn what_no_agent_says_is_refused() {
        let long = "x".repeat(MAX_NAME + 1);
        for id in ["", "../up", "a b", "ü", &long] {
            assert_eq!(container(state(id)), Err(OutOfBounds("container id")), "{id}");
        }
        let mut bad = [state("a"), state("a"), state("a"), state("a")];
        (bad[0].phase, bad[1].exit_code, bad[2].created_ns, bad[3].pid) = (9, 256, u64::MAX, u32::MAX);
        assert!(bad.into_iter().all(|state| container(state).is_err()));
        let many = vec![state("a"); MAX_CONTAINERS + 1];
        assert!(containers(v1::ListContainersReply { containers: many }).is_err());
        assert!(containers(v1::ListContainersReply { containers: vec![state("a"), state("a")] }).is_err());
        assert!(hello(v1::HelloReply { protocol: 2, ..Default::default() }).is_err());
    }

    #[test]
    fn a_log_never_goes_back() {
        let batch = |next, lost| v1::LogBatch { next, lost, records: vec![] };
        assert!(log_batch(batch(10, 0), 10).is_ok());
        assert!(log_batch(batch(9, 0), 10).is_err());
        assert!(log_batch(batch(u64::MAX, u64::MAX), 10).is_err());
    }

    #[test]
    fn text_is_cut_between_letters_and_holds_no_control_characters() {
        assert_eq!(text("a\u{1b}[31mb\n"), "a [31mb ");
        let cut = text(&"ü".repeat(MAX_TEXT));
        assert_eq!(cut.len(), MAX_TEXT);
    }
}
