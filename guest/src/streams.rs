//! What joins a stream of the node to something in the guest: a container's own streams, its log, a port.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use lambdalet_proto::agent::v1::port_data::Message as Data;
use lambdalet_proto::agent::v1::process_output::Message as Outcome;
use lambdalet_proto::agent::v1::{AttachStart, Empty, LogBatch, PortData, ProcessInput, ProcessOutput};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::error::{Error, Result, Tried};
use crate::exec::{Output, feed};
use crate::guest::Guest;
use crate::log::Log;

/// Bytes of one piece of a stream.
pub(crate) const PIECE: usize = lambdalet_proto::MAX_PIECE;
/// Pieces that wait for the node.
pub(crate) const QUEUE: usize = 4;

impl Guest {
    /// Joins the streams of a container's own process: what it writes is read from its log, from now on.
    ///
    /// # Errors
    /// A container that does not run.
    pub(crate) async fn attach(
        self: Arc<Self>,
        start: AttachStart,
        input: Streaming<ProcessInput>,
        output: Output,
    ) -> Result<()> {
        let container = self.container(&start.container)?;
        if !container.runs() {
            return Err(Error::state(format!("container {} does not run", start.container)));
        }
        let offset = container.log.progress().borrow().end;
        // The first message, which finds its place in the queue.
        let _ = output.send(Ok(ProcessOutput { message: Some(Outcome::Started(Empty {})) })).await;
        let stdin = container.stdin.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stdin = stdin.filter(|_| start.stdin);
        let terminal = container.terminal.get().cloned();
        let (batches, mut log) = mpsc::channel(1);
        tokio::task::spawn(follow(Arc::clone(&container.log), offset, true, batches));
        tokio::task::spawn(async move {
            let closes = container.spec.stdin_once && stdin.is_some();
            // A container that takes input once sees its end with the first who gave it.
            let close = || {
                if closes {
                    *container.stdin.lock().unwrap_or_else(PoisonError::into_inner) = None;
                }
                closes
            };
            let told = async {
                while let Some(batch) = log.recv().await {
                    let Ok(batch) = batch else { return };
                    if !tell(batch, &start, &output).await {
                        return;
                    }
                }
                // One that has closed its outputs may still read. If it was removed, it does not.
                let _ = container.exited().await;
            };
            let fed = async {
                feed(input, stdin, terminal, close).await;
                close();
                std::future::pending::<()>().await;
            };
            // Nothing is polled again after the first that is ready.
            tokio::select! {
                () = told => {}
                () = fed => {}
                () = output.closed() => {}
            }
            close();
        });
        Ok(())
    }

    /// Connects to a port on the loopback address of either family, and carries both directions.
    ///
    /// # Errors
    /// Nobody listens.
    pub(crate) async fn port_forward(
        port: u32,
        input: Streaming<PortData>,
        output: mpsc::Sender<Result<PortData, Status>>,
    ) -> Result<()> {
        let port = u16::try_from(port).map_err(|_| Error::invalid(format!("{port} is no port")))?;
        let refused = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::ConnectionRefused => Error::state("connection refused"),
            _ => Error::state(format!("failed to connect to port {port}: {error}")),
        };
        let addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))];
        let stream = match TcpStream::connect(addresses[0]).await {
            Ok(stream) => stream,
            // Some programs listen on the other address only. Where neither answers, the first says why.
            Err(error) => TcpStream::connect(addresses[1]).await.map_err(|_| refused(error))?,
        };
        // Small answers are not held back.
        stream.set_nodelay(true).tried(|| "failed to prepare a connection".to_owned())?;
        let _ = output.send(Ok(PortData { message: Some(Data::Connected(Empty {})) })).await;
        tokio::task::spawn(async move {
            // Nothing is polled again after the first that is ready; the connection ends with it.
            tokio::select! {
                () = carry(stream, input, &output) => {}
                () = output.closed() => {}
            }
        });
        Ok(())
    }
}

/// Sends what is wanted of a batch; says whether somebody still listens.
async fn tell(batch: LogBatch, start: &AttachStart, output: &Output) -> bool {
    for record in batch.records {
        let wanted = if record.stderr { start.stderr } else { start.stdout };
        let message = if record.stderr { Outcome::Stderr(record.data) } else { Outcome::Stdout(record.data) };
        if wanted && output.send(Ok(ProcessOutput { message: Some(message) })).await.is_err() {
            return false;
        }
    }
    true
}

async fn carry(mut stream: TcpStream, mut input: Streaming<PortData>, output: &mpsc::Sender<Result<PortData, Status>>) {
    let (mut reader, mut writer) = stream.split();
    let towards = async {
        while let Ok(Some(PortData { message })) = input.message().await {
            match message {
                Some(Data::Data(bytes)) if writer.write_all(&bytes).await.is_ok() => {}
                _ => break,
            }
        }
        // A connection that is gone needs no end.
        let _ = writer.shutdown().await;
    };
    let back = async {
        let mut piece = vec![0; PIECE];
        while let Ok(read @ 1..) = reader.read(&mut piece).await {
            let data = Data::Data(Bytes::copy_from_slice(&piece[..read]));
            if output.send(Ok(PortData { message: Some(data) })).await.is_err() {
                return;
            }
        }
        let _ = output.send(Ok(PortData { message: Some(Data::End(Empty {})) })).await;
    };
    tokio::join!(towards, back);
}

/// Reads a log from an offset on; with `stay` until it is closed and all is delivered.
pub(crate) async fn follow(
    log: Arc<Log>,
    mut offset: u64,
    stay: bool,
    batches: mpsc::Sender<Result<LogBatch, Status>>,
) {
    let mut progress = log.progress();
    loop {
        let seen = *progress.borrow_and_update();
        let (reading, from) = (Arc::clone(&log), offset);
        // Files may have left the cache.
        let read = tokio::task::spawn_blocking(move || reading.read(from)).await;
        let batch = match read {
            Ok(Ok(batch)) => batch,
            Ok(Err(error)) => return drop(batches.send(Err(error.into())).await),
            Err(_) => return,
        };
        let empty = batch.records.is_empty();
        offset = batch.next;
        if (!empty || batch.lost > 0) && batches.send(Ok(batch)).await.is_err() {
            return;
        }
        if !empty || offset < seen.end {
            continue;
        }
        if !stay || seen.closed {
            return;
        }
        // Both are cancel-safe: they only look.
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return },
            () = batches.closed() => return,
        }
    }
}
