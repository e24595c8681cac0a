//! Processes for exec and attach: a few commands, and how many of them run.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use lambdalet::runtime::session::{ExecRequest, Output, Session, Terminal, TerminalSize};
use lambdalet::runtime::types::LogSource;
use lambdalet::runtime::{Kind, Result, RuntimeError};
use tokio::io::{AsyncReadExt, AsyncWrite, DuplexStream, duplex};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// Bytes in a pipe.
const PIPE: usize = 64 << 10;

/// All of a node's.
#[derive(Clone, Default)]
pub(crate) struct Processes {
    running: Arc<AtomicUsize>,
    /// Bytes that `flood` wrote.
    pub(crate) written: Arc<AtomicUsize>,
    /// All that `swallow` read, in the order in which they ended.
    pub(crate) swallowed: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Those that their sessions only joined.
    joined: Arc<Mutex<JoinSet<()>>>,
}

/// One of a number, until it is dropped.
pub(crate) struct Running(Arc<AtomicUsize>);

impl Running {
    pub(crate) fn among(number: &Arc<AtomicUsize>) -> Self {
        number.fetch_add(1, Ordering::SeqCst);
        Self(number.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Screen(watch::Sender<Option<TerminalSize>>);

#[async_trait]
impl Terminal for Screen {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        self.0.send_replace(Some(size));
        Ok(())
    }
}

/// A process's side of its streams.
struct Inside {
    stdin: Option<DuplexStream>,
    output: mpsc::Sender<Result<Output>>,
    sizes: watch::Receiver<Option<TerminalSize>>,
    all: Processes,
}

impl Inside {
    async fn write(&self, source: LogSource, bytes: &[u8]) -> bool {
        self.output.send(Ok(Output { source, bytes: Bytes::copy_from_slice(bytes) })).await.is_ok()
    }

    async fn run(mut self, command: Vec<String>) -> i32 {
        let words: Vec<_> = command.iter().map(String::as_str).collect();
        match words[..] {
            ["true"] => 0,
            ["exit", code] => code.parse().unwrap(),
            ["echo", text] => {
                self.write(LogSource::Stdout, text.as_bytes()).await;
                0
            }
            ["both", out, err] => {
                self.write(LogSource::Stdout, out.as_bytes()).await;
                self.write(LogSource::Stderr, err.as_bytes()).await;
                3
            }
            ["cat"] => {
                let mut buffer = vec![0; PIPE];
                while let Some(stdin) = &mut self.stdin
                    && let Ok(read @ 1..) = stdin.read(&mut buffer).await
                {
                    self.write(LogSource::Stdout, &buffer[..read]).await;
                }
                0
            }
            ["swallow"] => {
                let mut all = Vec::new();
                if let Some(stdin) = &mut self.stdin {
                    let _ = stdin.read_to_end(&mut all).await;
                }
                self.all.swallowed.lock().unwrap_or_else(PoisonError::into_inner).push(all);
                0
            }
            ["size"] => {
                let size = *self.sizes.wait_for(Option::is_some).await.unwrap();
                let TerminalSize { width, height } = size.unwrap();
                self.write(LogSource::Stdout, format!("{width}x{height}").as_bytes()).await;
                0
            }
            ["flood"] => {
                let piece = [b'x'; 16 << 10];
                while self.write(LogSource::Stdout, &piece).await {
                    self.all.written.fetch_add(piece.len(), Ordering::SeqCst);
                }
                0
            }
            ["sleep"] => std::future::pending().await,
            _ => 127,
        }
    }
}

impl Processes {
    /// How many run now.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn start(&self, request: &ExecRequest) -> Result<Session> {
        if request.command[0] == "missing" {
            return Err(RuntimeError::new(Kind::Invalid, "no such file \"missing\""));
        }
        let (outside, stdin) = duplex(PIPE);
        let (output, outputs) = mpsc::channel(2);
        let (screen, sizes) = watch::channel(None);
        let inside = Inside { stdin: request.stdin.then_some(stdin), output, sizes, all: self.clone() };
        let running = Running::among(&self.running);
        let mut task = JoinSet::new();
        let command = request.command.clone();
        task.spawn(async move {
            let _running = running;
            inside.run(command).await
        });
        // Dropping the future before it is ready drops the set, which ends the process.
        let exit = async move { Ok(task.join_next().await.unwrap().unwrap()) }.boxed();
        let stdin = request.stdin.then(|| Box::pin(outside) as std::pin::Pin<Box<dyn AsyncWrite + Send>>);
        Ok(Session { stdin, output: ReceiverStream::new(outputs).boxed(), terminal: Box::new(Screen(screen)), exit })
    }

    /// As [`start`](Self::start), but the process goes on without the session.
    pub(crate) fn join(&self, request: &ExecRequest) -> Result<Session> {
        let mut session = self.start(request)?;
        let (tell, told) = oneshot::channel();
        let exit = std::mem::replace(&mut session.exit, async { told.await.unwrap() }.boxed());
        self.joined.lock().unwrap_or_else(PoisonError::into_inner).spawn(async {
            let _ = tell.send(exit.await);
        });
        Ok(session)
    }
}
