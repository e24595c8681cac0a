//! Live streams into a sandbox: a command run beside a container's own process, that process's own streams, a port.
//!
//! A session is what `exec` and `attach` return. Nothing is fetched ahead of its reader but what lies in the socket, so
//! a slow client holds the process up and not this node's memory.

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Result;
use super::types::LogSource;

/// A command to run in a running container, with the container's environment, user and working directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments; no shell is added.
    pub command: Vec<String>,
    /// Allocate a terminal; standard error is then part of standard output.
    pub tty: bool,
    /// Give the process a standard input; else it reads end of file at once.
    pub stdin: bool,
    /// Deliver its standard output; else it is discarded.
    pub stdout: bool,
    /// Deliver its standard error; else it is discarded. Nothing comes with a terminal.
    pub stderr: bool,
}

/// Which streams of a container's own process are wanted. Whether there is a terminal, and whether standard input is
/// open, was decided when the container was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachRequest {
    /// Write to its standard input.
    pub stdin: bool,
    /// Deliver its standard output from now on.
    pub stdout: bool,
    /// Deliver its standard error from now on. Nothing comes with a terminal.
    pub stderr: bool,
}

/// Size of a terminal in characters; 0 in either direction is not a size and is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Bytes that a process wrote, in the order in which they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The stream; always [`LogSource::Stdout`] with a terminal.
    pub source: LogSource,
    /// The bytes, never empty.
    pub bytes: Bytes,
}

/// The terminal of a session.
#[async_trait]
pub trait Terminal: Send + Sync {
    /// Gives it another size. Without a terminal, or once the process has ended, this is Ok and changes nothing.
    ///
    /// # Errors
    /// [`Kind::Unavailable`](super::Kind::Unavailable) if the engine does not answer.
    async fn resize(&self, size: TerminalSize) -> Result<()>;
}

/// Streams of one process. Dropping a session of `exec` before its `exit` was ready ends the process: a client that
/// goes away leaves nothing running, within a second (taken apart, it is the `exit` whose drop does so). What left the
/// process' session on purpose (`setsid`) is spared, as by a terminal that goes away. Dropping a session of `attach`
/// leaves the process as it is.
pub struct Session {
    /// Its standard input where that was asked for; shutting it down is end of file (Control-D at a terminal), except to
    /// a container that keeps its input for the next client. An error means that the process no longer reads.
    pub stdin: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    /// What it writes; ends when the process has closed its streams, and soon after the process has ended even if
    /// something it left in the background still holds them.
    pub output: BoxStream<'static, Result<Output>>,
    /// Its terminal.
    pub terminal: Box<dyn Terminal>,
    /// The exit code (128 + signal for a killed process) once it has ended. Output may still be waiting to be read.
    pub exit: BoxFuture<'static, Result<i32>>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("stdin", &self.stdin.is_some()).finish_non_exhaustive()
    }
}

/// A connection to a port inside a sandbox. Each direction is closed by itself.
pub trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}
