//! The verbs that answer with a URL: a ticket for the streaming server.

use std::time::Instant;

use lambdalet_proto::cri::v1;
use tonic::{Code, Status};

use super::core::Core;
use super::failure::status;
use super::translate::invalid;
use crate::kubelet_api::streaming::plain::Work;
use crate::runtime::session::{AttachRequest, ExecRequest};
use crate::runtime::types::SandboxState;

/// What every client wants of streams, whatever it does.
fn check(tty: bool, (stdin, stdout, stderr): (bool, bool, bool)) -> Result<(), Status> {
    if tty && stderr {
        return Err(invalid("a terminal has no standard error of its own"));
    }
    if !(stdin || stdout || stderr) {
        return Err(invalid("one of stdin, stdout and stderr must be wanted"));
    }
    Ok(())
}

impl Core {
    /// Where a command can be run.
    pub(super) async fn exec_url(&self, request: v1::ExecRequest) -> Result<String, Status> {
        self.adopted().await?;
        let v1::ExecRequest { container_id, cmd: command, tty, stdin, stdout, stderr } = request;
        check(tty, (stdin, stdout, stderr))?;
        if command.is_empty() {
            return Err(invalid("a command has at least one word"));
        }
        let container = self.running(&container_id).await?;
        self.url(Work::Exec(container.id, ExecRequest { command, tty, stdin, stdout, stderr }))
    }

    /// Where a container's process can be joined.
    pub(super) async fn attach_url(&self, request: v1::AttachRequest) -> Result<String, Status> {
        self.adopted().await?;
        let v1::AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
        check(tty, (stdin, stdout, stderr))?;
        let container = self.running(&container_id).await?;
        self.url(Work::Attach(container.id, AttachRequest { stdin, stdout, stderr }, tty))
    }

    /// Where the ports of a sandbox can be reached.
    pub(super) async fn port_forward_url(&self, request: v1::PortForwardRequest) -> Result<String, Status> {
        self.adopted().await?;
        let sandbox = self.runtime.pod_sandbox_status(&self.sandbox_id(&request.pod_sandbox_id)).await?;
        if sandbox.state != SandboxState::Ready {
            return Err(status(Code::FailedPrecondition, &format!("sandbox {} is not ready", sandbox.id)));
        }
        let port = |port: &i32| u16::try_from(*port).ok().filter(|port| *port > 0);
        let ports =
            request.port.iter().map(|number| port(number).ok_or_else(|| invalid(format!("{number} is no port"))));
        self.url(Work::PortForward(sandbox.id, ports.collect::<Result<_, _>>()?))
    }

    fn url(&self, work: Work) -> Result<String, Status> {
        let path = work.path();
        let ticket = self.desk.give(work, Instant::now());
        let full = || status(Code::ResourceExhausted, "too many streams were asked for and not opened");
        Ok(format!("http://{}/{path}/{}", self.streams, ticket.ok_or_else(full)?))
    }
}
