//! The paths: who is meant, what is wanted, and how it is answered before the connection is taken over.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::{StatusCode, header};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::port_forward::{self, Forward};
use super::remote_command::options::{self, Options, OptionsError};
use super::remote_command::relay::gather;
use super::remote_command::{self, Command};
use super::upgrade::{Hold, Upgrade, UpgradeError};
use super::websocket::channels::Protocol;
use crate::kubelet_api::meters::StreamKind;
use crate::kubelet_api::targets::{Entrance, TargetError};
use crate::kubelet_api::{App, runtime_status};
use crate::runtime::session::{AttachRequest, ExecRequest};
use crate::runtime::types::{ContainerId, SandboxId};
use crate::runtime::{RuntimeError, SandboxRuntime};
use crate::telemetry::chain;

/// The WebSocket subprotocols of exec and attach; "" is a client that names none.
const CHANNELS: &[&str] = &[
    "",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "v5.channel.k8s.io",
];
/// The WebSocket subprotocols of port-forward.
const PORT_CHANNELS: &[&str] = &[port_forward::TUNNEL, "", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// Room for connections that carry streams, so that they leave some for everything else.
#[derive(Clone, Debug)]
pub(in crate::kubelet_api) struct Room {
    places: Arc<Semaphore>,
    limit: usize,
    /// When a connection ends for want of traffic.
    idle: Duration,
}

impl Room {
    pub(in crate::kubelet_api) fn new(limit: usize, idle: Duration) -> Self {
        Self { places: Arc::new(Semaphore::new(limit)), limit, idle }
    }

    pub(super) fn enter(&self) -> Result<OwnedSemaphorePermit, StreamError> {
        self.places.clone().try_acquire_owned().map_err(|_| StreamError::Full(self.limit))
    }

    /// A command to run in a container.
    pub(super) fn exec(&self, runtime: Arc<dyn SandboxRuntime>, id: ContainerId, exec: ExecRequest) -> Command {
        let ExecRequest { tty, stdin, stdout, stderr, .. } = exec;
        let options = Options { stdin, stdout, stderr, tty };
        let session = async move { runtime.exec(&id, &exec).await }.boxed();
        Command { options, session, doing: "error executing command in container", own: true, idle: self.idle }
    }

    /// The process of a container, joined.
    pub(super) fn attach(&self, runtime: Arc<dyn SandboxRuntime>, id: ContainerId, options: Options) -> Command {
        let Options { stdin, stdout, stderr, .. } = options;
        let attach = AttachRequest { stdin, stdout, stderr };
        let session = async move { runtime.attach(&id, &attach).await }.boxed();
        Command { options, session, doing: "error attaching to container", own: false, idle: self.idle }
    }

    /// The ports of a sandbox; `pod` is its name for texts.
    pub(super) fn forward(&self, runtime: Arc<dyn SandboxRuntime>, sandbox: SandboxId, pod: String) -> Forward {
        let dial = Arc::new(move |port| {
            let (runtime, sandbox) = (runtime.clone(), sandbox.clone());
            async move { runtime.port_forward(&sandbox, port).await }.boxed()
        });
        Forward { pod, dial, idle: self.idle }
    }
}

/// Why nothing is streamed. `Display` is the body of the answer, which kubectl prints.
#[derive(Debug, thiserror::Error)]
pub(in crate::kubelet_api) enum StreamError {
    #[error("{0}")]
    Options(OptionsError),
    #[error("{0}")]
    Ports(String),
    #[error("{0}")]
    Target(TargetError),
    #[error("{0}")]
    Upgrade(UpgradeError),
    #[error("too many open streams: all {0} are in use")]
    Full(usize),
    #[error("error executing command in container: {}", chain(.0))]
    Run(RuntimeError),
    #[error("command terminated with exit code {0}: {1}")]
    ExitCode(i32, String),
}

impl IntoResponse for StreamError {
    fn into_response(self) -> Response {
        let text = format!("{self}\n");
        match self {
            Self::Options(_) | Self::Ports(_) => (StatusCode::BAD_REQUEST, text).into_response(),
            Self::Target(error) => (error.status(), text).into_response(),
            Self::Upgrade(error) => error.into_response(),
            Self::Full(_) => (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], text).into_response(),
            Self::Run(error) => (runtime_status(error.kind()), text).into_response(),
            Self::ExitCode(..) => (StatusCode::INTERNAL_SERVER_ERROR, text).into_response(),
        }
    }
}

/// `/exec`, `/attach` and `/run`, with or without the Pod's UID.
#[derive(Deserialize)]
pub(in crate::kubelet_api) struct ContainerPath {
    namespace: String,
    pod: String,
    uid: Option<String>,
    container: String,
}

/// `/portForward`, with or without the Pod's UID.
#[derive(Deserialize)]
pub(in crate::kubelet_api) struct PodPath {
    namespace: String,
    pod: String,
    uid: Option<String>,
}

/// GET or POST `/exec/{namespace}/{pod}[/{uid}]/{container}?command=…&input=1&output=1&error=1&tty=1`.
pub(in crate::kubelet_api) async fn exec(
    State(app): State<App>,
    Path(path): Path<ContainerPath>,
    request: Request,
) -> Result<Response, StreamError> {
    let pairs = query(&request);
    let wanted = Options::parse(&pairs).map_err(StreamError::Options)?;
    let command = options::command(&pairs).map_err(StreamError::Options)?;
    let Options { stdin, stdout, stderr, tty } = wanted;
    let Entrance { container: id, stay } = container(&app, &path).await?;
    let exec = ExecRequest { command, tty, stdin, stdout, stderr };
    let command = app.room.exec(app.runtime.clone(), id, exec);
    serve(&app, request, command, (StreamKind::Exec, stay))
}

/// GET or POST `/attach/{namespace}/{pod}[/{uid}]/{container}?input=1&output=1&error=1&tty=1`.
pub(in crate::kubelet_api) async fn attach(
    State(app): State<App>,
    Path(path): Path<ContainerPath>,
    request: Request,
) -> Result<Response, StreamError> {
    let wanted = Options::parse(&query(&request)).map_err(StreamError::Options)?;
    let Entrance { container: id, stay } = container(&app, &path).await?;
    let command = app.room.attach(app.runtime.clone(), id, wanted);
    serve(&app, request, command, (StreamKind::Attach, stay))
}

/// What a session is counted as, and what keeps its container there.
type Visit = (StreamKind, Option<Box<dyn Send + Sync>>);

fn serve(app: &App, request: Request, command: Command, visit: Visit) -> Result<Response, StreamError> {
    let (kind, stay) = visit;
    hand_over_command(request, command, || Ok((app.room.enter()?, app.meters.open(kind), stay)))
}

/// Answers 101 and leaves the command for the connection's task. What `enter` gives is dropped when that has ended.
pub(super) fn hand_over_command<H: Send + 'static>(
    mut request: Request,
    command: Command,
    enter: impl FnOnce() -> Result<H, StreamError>,
) -> Result<Response, StreamError> {
    let upgrade = Upgrade::negotiate(&request, &remote_command::SPDY_PROTOCOLS, CHANNELS);
    let upgrade = upgrade.map_err(StreamError::Upgrade)?;
    let held = enter()?;
    let hold = Hold::of(&mut request).ok_or(StreamError::Upgrade(UpgradeError::Required))?;
    Ok(upgrade.hand_over(hold, move |upgrade, socket| async move {
        let _held = held;
        match upgrade {
            Upgrade::Spdy(protocol) => remote_command::over_spdy(command, socket, protocol).await,
            Upgrade::WebSocket(protocol, _) => {
                if let Some(protocol) = Protocol::named(protocol) {
                    remote_command::over_websocket(command, socket, protocol).await;
                }
            }
        }
    }))
}

/// GET or POST `/portForward/{namespace}/{pod}[/{uid}]`, with `?port=…` for WebSocket clients of v4.
pub(in crate::kubelet_api) async fn port_forward(
    State(app): State<App>,
    Path(path): Path<PodPath>,
    request: Request,
) -> Result<Response, StreamError> {
    let target = app.targets.port_target(&path.namespace, &path.pod, path.uid.as_deref()).await;
    let sandbox = target.map_err(StreamError::Target)?;
    let forward = app.room.forward(app.runtime.clone(), sandbox, path.pod);
    let enter = || Ok((app.room.enter()?, app.meters.open(StreamKind::PortForward)));
    hand_over_ports(request, forward, port_forward::ports, enter)
}

/// Answers 101 and leaves the ports for the connection's task, as [`hand_over_command`]. Which ports there are is asked
/// only for a client that must name them beforehand.
pub(super) fn hand_over_ports<H: Send + 'static>(
    mut request: Request,
    forward: Forward,
    ports: impl FnOnce(&[(String, String)]) -> Result<Vec<u16>, String>,
    enter: impl FnOnce() -> Result<H, StreamError>,
) -> Result<Response, StreamError> {
    let upgrade = Upgrade::negotiate(&request, &port_forward::SPDY_PROTOCOLS, PORT_CHANNELS);
    let upgrade = upgrade.map_err(StreamError::Upgrade)?;
    let ports = match upgrade {
        Upgrade::WebSocket(protocol, _) if protocol != port_forward::TUNNEL => {
            ports(&query(&request)).map_err(StreamError::Ports)?
        }
        _ => Vec::new(),
    };
    let held = enter()?;
    let hold = Hold::of(&mut request).ok_or(StreamError::Upgrade(UpgradeError::Required))?;
    Ok(upgrade.hand_over(hold, move |upgrade, socket| async move {
        let _held = held;
        match upgrade {
            Upgrade::Spdy(_) => port_forward::over_spdy(forward, socket).await,
            Upgrade::WebSocket(port_forward::TUNNEL, _) => port_forward::over_tunnel(forward, socket).await,
            Upgrade::WebSocket(protocol, _) => {
                // A client that names no protocol means the channels, which have no version of their own here.
                if let Some(protocol) = Protocol::named(protocol) {
                    port_forward::over_websocket(forward, socket, protocol, ports).await;
                }
            }
        }
    }))
}

/// POST `/run/{namespace}/{pod}[/{uid}]/{container}?cmd=…`: what a command writes, both streams in one.
pub(in crate::kubelet_api) async fn run(
    State(app): State<App>,
    Path(path): Path<ContainerPath>,
    request: Request,
) -> Result<Response, StreamError> {
    let command = options::run_command(&query(&request)).map_err(StreamError::Options)?;
    let Entrance { container: id, stay: _stay } = container(&app, &path).await?;
    let _held = (app.room.enter()?, app.meters.open(StreamKind::Run));
    let exec = ExecRequest { command, tty: false, stdin: false, stdout: true, stderr: true };
    let session = app.runtime.exec(&id, &exec).await.map_err(StreamError::Run)?;
    let (output, code) = gather(session).await.map_err(StreamError::Run)?;
    if code != 0 {
        return Err(StreamError::ExitCode(code, String::from_utf8_lossy(&output).into_owned()));
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], output).into_response())
}

async fn container(app: &App, path: &ContainerPath) -> Result<Entrance, StreamError> {
    let ContainerPath { namespace, pod, uid, container } = path;
    let target = app.targets.exec_target(namespace, pod, uid.as_deref(), container).await;
    target.map_err(StreamError::Target)
}

/// The pairs of a query. What cannot be decoded is not there.
fn query(request: &Request) -> Vec<(String, String)> {
    let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(request.uri());
    pairs.map(|pairs| pairs.0).unwrap_or_default()
}
