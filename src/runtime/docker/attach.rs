//! The streams of a container's own process.

use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::query_parameters::ResizeContainerTTYOptionsBuilder;
use futures::{FutureExt, StreamExt};
use hyper::Method;
use serde::Deserialize;
use tokio::io::{AsyncWrite, sink};

use super::exec::{DETACH_KEYS, only_unavailable};
use super::wire::{self, EndOfInput, Stdin, Wire};
use super::{DockerRuntime, http};
use crate::runtime::session::{AttachRequest, Session, Terminal, TerminalSize};
use crate::runtime::types::ContainerId;
use crate::runtime::{Kind, Result, RuntimeError};

const WAITING: &str = "failed to wait for a container that is attached to";

/// Docker's answer to a wait.
#[derive(Debug, Deserialize)]
struct Waited {
    #[serde(rename = "StatusCode")]
    code: i32,
}

impl DockerRuntime {
    pub(super) async fn join_streams(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        let tried = format!("failed to attach to container {id}");
        let seen = self.see(id.as_str()).await?.filter(|seen| !seen.facts.sandbox_itself);
        let seen =
            seen.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("{tried}: there is no such container")))?;
        if !seen.running() {
            return Err(RuntimeError::new(Kind::Invalid, format!("{tried}: the container does not run")));
        }
        let config = seen.inspect.config.unwrap_or_default();
        let (tty, open) = (config.tty.unwrap_or(false), config.open_stdin.unwrap_or(false));
        // Asked before: the end cannot be missed, whatever is removed later.
        let target = format!("/containers/{id}/wait?condition=not-running");
        let wait = http::request(&self.options.socket, WAITING, Method::POST, &target, None).await?;
        let stdin = request.stdin && open;
        let target = format!(
            "/containers/{id}/attach?stream=1&stdin={}&stdout={}&stderr={}&detachKeys={}",
            u8::from(stdin),
            u8::from(request.stdout),
            u8::from(request.stderr && !tty),
            http::query_value(DETACH_KEYS),
        );
        let hijacked = http::hijack(&self.options.socket, &tried, &target, "").await.map_err(|error| {
            // It is paused.
            let conflict = error.kind() == Kind::AlreadyExists;
            if conflict { RuntimeError::new(Kind::Invalid, error.to_string()) } else { error }
        })?;
        let wire = Wire::new(hijacked, !tty, request.stdout || request.stderr);
        let end = match (config.stdin_once.unwrap_or(false), tty) {
            (false, _) => EndOfInput::Nothing,
            (true, false) => EndOfInput::HalfClose,
            (true, true) => EndOfInput::Typed,
        };
        let stdin = match (request.stdin, stdin) {
            (true, true) => Some(Box::pin(Stdin::new(Arc::clone(&wire), end)) as _),
            // A process without standard input reads nothing, and nobody should wait for it.
            (true, false) => Some(Box::pin(sink()) as std::pin::Pin<Box<dyn AsyncWrite + Send>>),
            (false, _) => None,
        };
        Ok(Session {
            stdin,
            output: wire::output(wire, format!("failed to read from container {id}")),
            terminal: Box::new(OwnTerminal { docker: self.docker.clone(), container: id.clone(), present: tty }),
            exit: exit_code(wait).boxed(),
        })
    }
}

async fn exit_code(wait: http::Body) -> Result<i32> {
    let mut lines = http::json_lines::<Waited>(wait, WAITING);
    match lines.next().await {
        Some(waited) => Ok(waited?.code),
        None => Err(RuntimeError::new(Kind::Unavailable, format!("{WAITING}: the daemon went away"))),
    }
}

struct OwnTerminal {
    docker: Docker,
    container: ContainerId,
    present: bool,
}

#[async_trait]
impl Terminal for OwnTerminal {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        if !self.present || size.width == 0 || size.height == 0 {
            return Ok(());
        }
        let options = ResizeContainerTTYOptionsBuilder::new().h(size.height.into()).w(size.width.into()).build();
        let resized = self.docker.resize_container_tty(self.container.as_str(), options).await;
        only_unavailable(resized, "failed to resize the terminal of a container")
    }
}
