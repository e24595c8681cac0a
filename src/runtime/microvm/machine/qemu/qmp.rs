//! A client for the QEMU Machine Protocol (docs/interop/qmp-spec.txt of QEMU), for the few commands that are used here.
//!
//! A connection is made for a few commands and closed again: QEMU serves one at a time, and a client that does not read
//! would have it keep events for ever. What comes is bounded, since behind the socket may be a VMM that a guest has taken.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::START_PATIENCE;
use super::command::QMP_SOCKET;
use crate::runtime::microvm::machine::VmDir;
use crate::runtime::microvm::machine::error::{MachineError, Result};

/// The longest line that is taken from QEMU, in bytes; an answer of ours has some ten thousand.
const LONGEST_LINE: usize = 1 << 20;
/// Lines that may come before the answer to a command: events.
const MOST_EVENTS: usize = 1000;
/// How long one command may take. Writing a template's state is waited for as an event of its own.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Status {
    pub(super) running: bool,
    /// QEMU's RunState, such as `running`, `paused`, `inmigrate`, `postmigrate`.
    pub(super) status: String,
}

/// A connection past its greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    dir: VmDir,
    stream: UnixStream,
    received: BytesMut,
}

/// One line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    #[serde(rename = "QMP")]
    Greeting {},
    Return(Value),
    Error(Refusal),
    #[serde(untagged)]
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(rename = "desc")]
    description: String,
}

// === impl Qmp ===

impl Qmp {
    /// Connects to the QEMU of that machine.
    pub(super) async fn connect(dir: &VmDir) -> Result<Self> {
        let stream = dir.connect(&dir.inside(), QMP_SOCKET).await;
        let stream = stream.map_err(|source| broken(dir, "connect to", source))?;
        Self::over(dir, stream).await
    }

    async fn over(dir: &VmDir, stream: UnixStream) -> Result<Self> {
        let mut qmp = Self { dir: dir.clone(), stream, received: BytesMut::new() };
        let greeted = timeout(PATIENCE, qmp.line()).await.map_err(|_| qmp.late("the greeting of QMP"))??;
        if !matches!(greeted, Line::Greeting {}) {
            return Err(broken(dir, "be greeted by", invalid("it began with something else")));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returned.
    pub(super) async fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value> {
        self.execute_with(command, arguments, None).await
    }

    async fn execute_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Value> {
        let answer = timeout(PATIENCE, self.exchange(command, arguments, file)).await;
        answer.map_err(|_| self.late(command))?
    }

    async fn exchange(&mut self, command: &str, arguments: Value, file: Option<BorrowedFd<'_>>) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.send(request.as_bytes(), file).await.map_err(|source| broken(&self.dir, "write to", source))?;
        for _ in 0..MOST_EVENTS {
            match self.line().await? {
                Line::Return(value) => return Ok(value),
                Line::Error(refusal) => {
                    let request = command.to_owned();
                    return Err(MachineError::Api { vmm: "QEMU", request, message: refusal.description });
                }
                Line::Greeting {} | Line::Event { .. } => {}
            }
        }
        Err(broken(&self.dir, "be answered by", invalid("there are more events than ever happen")))
    }

    /// Waits for an event of that name that `wanted` finds something in.
    pub(super) async fn event<T>(
        &mut self,
        name: &str,
        patience: Duration,
        wanted: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let wait = async {
            loop {
                if let Line::Event { event, data } = self.line().await?
                    && event == name
                    && let Some(found) = wanted(&data)
                {
                    return Ok(found);
                }
            }
        };
        match timeout(patience, wait).await {
            Ok(found) => found,
            Err(_) => Err(self.late(name)),
        }
    }

    pub(super) async fn status(&mut self) -> Result<Status> {
        let value = self.execute("query-status", json!({})).await?;
        serde_json::from_value(value).map_err(|error| broken(&self.dir, "understand", invalid(error)))
    }

    /// Tells a QEMU that waits for it the kernel's command line, and to go on: it answers when it has read the kernel.
    pub(super) async fn configure(&mut self, kernel_line: &str) -> Result<()> {
        let append = json!({"path": "/machine", "property": "append", "value": kernel_line});
        self.execute("qom-set", append).await?;
        // It takes as long as a start does.
        let begun = timeout(START_PATIENCE, self.exchange("x-exit-preconfig", json!({}), None)).await;
        begun.map_err(|_| self.late("x-exit-preconfig"))?.map(drop)
    }

    pub(super) async fn cont(&mut self) -> Result<()> {
        self.execute("cont", json!({})).await.map(drop)
    }

    pub(super) async fn stop(&mut self) -> Result<()> {
        self.execute("stop", json!({})).await.map(drop)
    }

    /// Names of all block nodes.
    pub(super) async fn block_nodes(&mut self) -> Result<Vec<String>> {
        let nodes = self.execute("query-named-block-nodes", json!({"flat": true})).await?;
        let name = |node: &Value| Some(node.get("node-name")?.as_str()?.to_owned());
        Ok(nodes.as_array().into_iter().flatten().filter_map(name).collect())
    }

    /// Hands QEMU an open file, to be opened by it as the path that is returned, until [`Self::remove_fd`] of the number.
    pub(super) async fn add_fd(&mut self, file: impl AsFd) -> Result<(String, i64)> {
        let value = self.execute_with("add-fd", json!({}), Some(file.as_fd())).await?;
        let id = value.get("fdset-id").and_then(Value::as_i64);
        let id = id.ok_or_else(|| broken(&self.dir, "understand", invalid("add-fd without a number")))?;
        Ok((format!("/dev/fdset/{id}"), id))
    }

    pub(super) async fn remove_fd(&mut self, id: i64) -> Result<()> {
        self.execute("remove-fd", json!({"fdset-id": id})).await.map(drop)
    }

    /// Hands QEMU an open file under a name of its own, for `migrate`.
    pub(super) async fn get_fd(&mut self, name: &str, file: impl AsFd) -> Result<()> {
        self.execute_with("getfd", json!({"fdname": name}), Some(file.as_fd())).await.map(drop)
    }

    /// Switches on events of migration, and that memory which others share is not copied.
    pub(super) async fn migrate_without_shared_memory(&mut self) -> Result<()> {
        let on = |capability: &str| json!({"capability": capability, "state": true});
        let capabilities = json!({"capabilities": [on("events"), on("x-ignore-shared")]});
        self.execute("migrate-set-capabilities", capabilities).await.map(drop)
    }

    /// Waits for the end of a migration in either direction.
    pub(super) async fn migrated(&mut self, patience: Duration) -> Result<()> {
        let ended = |data: &Value| match data.get("status")?.as_str()? {
            end @ ("completed" | "failed" | "cancelled") => Some(end.to_owned()),
            _ => None,
        };
        match self.event("MIGRATION", patience, ended).await?.as_str() {
            "completed" => Ok(()),
            end => Err(MachineError::Api { vmm: "QEMU", request: "migration".to_owned(), message: end.to_owned() }),
        }
    }

    async fn line(&mut self) -> Result<Line> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line = serde_json::from_slice(&self.received[..end]);
                self.received.advance(end + 1);
                return line.map_err(|error| broken(&self.dir, "understand", invalid(error)));
            }
            if self.received.len() > LONGEST_LINE {
                return Err(broken(&self.dir, "understand", invalid("a line without an end")));
            }
            let read = self.stream.read_buf(&mut self.received).await;
            match read.map_err(|source| broken(&self.dir, "read from", source))? {
                0 => return Err(broken(&self.dir, "read from", io::ErrorKind::UnexpectedEof.into())),
                _ => continue,
            }
        }
    }

    /// Writes all of it; the file goes with the first byte.
    async fn send(&self, mut bytes: &[u8], mut file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = || {
                let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !files.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&files));
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags)?)
            };
            let written = self.stream.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
            file = None;
        }
        Ok(())
    }

    fn late(&self, what: &str) -> MachineError {
        MachineError::Late { what: what.to_owned(), id: self.dir.id().to_string(), seconds: PATIENCE.as_secs() }
    }
}

fn broken(dir: &VmDir, action: &'static str, source: io::Error) -> MachineError {
    MachineError::Socket { action, socket: dir.inside().join(QMP_SOCKET), source }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::runtime::microvm::machine::{VmDirs, VmId};

    fn dir() -> VmDir {
        VmDirs::new(std::path::Path::new("/run/vms"), "default").unwrap().of(&VmId::new("one").unwrap())
    }

    /// A QEMU that says these lines, whatever it is asked; what it was asked.
    async fn said(lines: &[&str]) -> (Result<Qmp>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for line in lines {
            theirs.write_all(line.as_bytes()).await.unwrap();
            theirs.write_all(b"\r\n").await.unwrap();
        }
        (Qmp::over(&dir(), ours).await, theirs)
    }

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
    const EVENT: &str = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}"#;
    const DONE: &str = r#"{"return": {}}"#;

    #[tokio::test]
    async fn answers_are_told_from_events_and_errors_carry_qemus_words() {
        let status = r#"{"return": {"status": "paused", "singlestep": false, "running": false}}"#;
        let error = r#"{"error": {"class": "GenericError", "desc": "Device 'x' not found"}}"#;
        let migration = r#"{"event": "MIGRATION", "data": {"status": "active"}, "timestamp": {}}"#;
        let end = r#"{"event": "MIGRATION", "data": {"status": "completed"}, "timestamp": {}}"#;
        let (qmp, _theirs) = said(&[GREETING, DONE, EVENT, status, error, migration, EVENT, end]).await;
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.status().await.unwrap(), Status { running: false, status: "paused".to_owned() });
        let refused = qmp.cont().await.unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refused cont: Device 'x' not found");
        qmp.migrated(PATIENCE).await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_speaks_something_else_is_refused() {
        for lines in [&["SSH-2.0"][..], &[DONE], &[GREETING, "{}"], &[GREETING, "[1]"]] {
            let (qmp, theirs) = said(lines).await;
            drop(theirs);
            assert!(matches!(qmp, Err(MachineError::Socket { .. })), "{lines:?}");
        }
        let endless = "x".repeat(LONGEST_LINE + 2);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writing = async {
            let _ = theirs.write_all(endless.as_bytes()).await;
        };
        let dir = dir();
        let (_, qmp) = tokio::join!(writing, Qmp::over(&dir, ours));
        assert!(qmp.is_err());
    }

    #[tokio::test]
    async fn a_file_goes_with_its_command() {
        let number = r#"{"return": {"fdset-id": 3, "fd": 17}}"#;
        let (qmp, theirs) = said(&[GREETING, DONE, number]).await;
        let mut qmp = qmp.unwrap();
        let file = File::open("/proc/version").unwrap();
        assert_eq!(qmp.add_fd(&file).await.unwrap(), ("/dev/fdset/3".to_owned(), 3));
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut received: Vec<OwnedFd> = Vec::new();
        // The first read ends where the file came, so two are needed.
        for _ in 0..2 {
            let iov = &mut [io::IoSliceMut::new(&mut bytes)];
            let Ok(_) = recvmsg(&theirs, iov, &mut control, RecvFlags::DONTWAIT) else { break };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    received.extend(files);
                }
            }
        }
        assert_eq!(received.len(), 1);
        let text = io::read_to_string(File::from(received.remove(0))).unwrap();
        assert!(text.starts_with("Linux"), "{text}");
    }
}
