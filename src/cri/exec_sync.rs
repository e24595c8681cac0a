//! A command whose output is the answer: bounded in time and in size.

use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt;
use lambdalet_proto::cri::v1;
use tokio::time::timeout;
use tonic::{Code, Status};

use super::failure::status;
use super::translate::invalid;
use crate::runtime::session::{ExecRequest, Session};
use crate::runtime::types::{ContainerId, LogSource};
use crate::runtime::{Result, SandboxRuntime};

/// Bytes of both streams together: the answer fits the 16 MiB that a kubelet reads.
const LONGEST_OUTPUT: usize = (16 << 20) - (4 << 10);

/// Runs a command and gathers what it writes. What is too much is dropped, and the command goes on. Dropping this, or
/// the limit of `seconds` (0 is none), ends the command.
///
/// # Errors
/// [`Code::DeadlineExceeded`] after the limit.
pub(super) async fn exec_sync(
    runtime: &dyn SandboxRuntime,
    id: &ContainerId,
    command: Vec<String>,
    seconds: i64,
) -> Result<v1::ExecSyncResponse, Status> {
    if command.is_empty() {
        return Err(invalid("a command has at least one word"));
    }
    let limit = u64::try_from(seconds).map_err(|_| invalid(format!("a timeout of {seconds} seconds")))?;
    let request = ExecRequest { command, tty: false, stdin: false, stdout: true, stderr: true };
    let run = async {
        let session = runtime.exec(id, &request).await?;
        gather(session).await
    };
    if limit == 0 {
        return Ok(run.await?);
    }
    match timeout(Duration::from_secs(limit), run).await {
        Ok(done) => Ok(done?),
        Err(_) => {
            let text = format!("command {:?} timed out after {limit} s", request.command);
            Err(status(Code::DeadlineExceeded, &text))
        }
    }
}

async fn gather(session: Session) -> Result<v1::ExecSyncResponse> {
    let Session { stdin, mut output, terminal, exit } = session;
    drop((stdin, terminal));
    let gathered = async {
        let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
        while let Some(piece) = output.next().await {
            let piece = piece?;
            let room = LONGEST_OUTPUT - stdout.len() - stderr.len();
            let into = match piece.source {
                LogSource::Stdout => &mut stdout,
                LogSource::Stderr => &mut stderr,
            };
            into.extend_from_slice(&piece.bytes[..piece.bytes.len().min(room)]);
        }
        Ok((stdout, stderr))
    };
    let ((stdout, stderr), code) = tokio::try_join!(gathered, async { Ok(exit.await) })?;
    Ok(v1::ExecSyncResponse { stdout: stdout.to_vec(), stderr: stderr.to_vec(), exit_code: code? })
}
