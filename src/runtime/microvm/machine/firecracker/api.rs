//! A client for Firecracker's API (`src/firecracker/swagger/firecracker.yaml` of version 1.16): HTTP over a Unix
//! socket, one request at a time, and only what is used here.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::runtime::microvm::machine::VmDir;
use crate::runtime::microvm::machine::error::{MachineError, Result};

/// Bytes of an answer that are taken; those to our requests have less than a thousand.
const LONGEST_ANSWER: usize = 64 << 10;
/// How long a request may take. Only making and loading a snapshot takes more than a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// `PUT /logger`, before anything else.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Logger {
    pub(super) log_path: String,
    pub(super) level: LogLevel,
    pub(super) show_level: bool,
}

/// From here on it is written down.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) enum LogLevel {
    Info,
}

/// `PUT /boot-source`, before the start.
#[derive(Clone, Debug, Serialize)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: String,
    pub(super) initrd_path: String,
    pub(super) boot_args: String,
}

/// `PUT /machine-config`, before the start.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MachineConfig {
    /// 1 to 32.
    pub(super) vcpu_count: u8,
    pub(super) mem_size_mib: u64,
}

/// `PUT /drives/{drive_id}`, before the start.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Drive {
    pub(super) drive_id: String,
    pub(super) path_on_host: String,
    /// Never, with an initramfs.
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
}

/// `PATCH /drives/{drive_id}`, after the start: another file; the guest is told its size.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DriveUpdate {
    pub(super) drive_id: String,
    pub(super) path_on_host: String,
}

/// `PUT /network-interfaces/{iface_id}`, before the start.
#[derive(Clone, Debug, Serialize)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: String,
    pub(super) host_dev_name: String,
    pub(super) guest_mac: String,
}

/// `PUT /vsock`, before the start.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Vsock {
    /// From 3.
    pub(super) guest_cid: u32,
    pub(super) uds_path: String,
}

/// `PUT /actions`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) enum Action {
    /// Once, after the rest.
    InstanceStart,
}

/// `PATCH /vm`, after the start.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) enum VmState {
    Paused,
    Resumed,
}

/// `PUT /snapshot/create`, while paused.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SnapshotCreate {
    pub(super) snapshot_type: SnapshotType,
    pub(super) snapshot_path: String,
    pub(super) mem_file_path: String,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) enum SnapshotType {
    Full,
}

/// `PUT /snapshot/load`, in a fresh process. A load that fails ends the process.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SnapshotLoad {
    pub(super) snapshot_path: String,
    pub(super) mem_backend: MemoryBackend,
    pub(super) resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) network_overrides: Vec<NetworkOverride>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct MemoryBackend {
    pub(super) backend_type: BackendType,
    pub(super) backend_path: String,
}

/// Where a snapshot's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum BackendType {
    /// A file, mapped copy-on-write.
    File,
    /// A process that listens on a Unix socket in the jail and fills in pages as they are touched.
    Uffd,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct NetworkOverride {
    pub(super) iface_id: String,
    pub(super) host_dev_name: String,
}

/// `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct InstanceInfo {
    pub(super) id: String,
    pub(super) state: InstanceState,
    pub(super) vmm_version: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// The API of one Firecracker.
#[derive(Clone, Debug)]
pub(super) struct Api {
    dir: VmDir,
    /// The directory of its socket, in the machine's.
    place: PathBuf,
    name: &'static str,
}

// === impl Api ===

impl Api {
    pub(super) fn new(dir: VmDir, place: PathBuf, name: &'static str) -> Self {
        Self { dir, place, name }
    }

    pub(super) async fn instance(&self) -> Result<InstanceInfo> {
        let answer = self.ask(Method::GET, "/".to_owned(), Bytes::new()).await?;
        serde_json::from_slice(&answer).map_err(|error| self.broken("understand", io::Error::other(error)))
    }

    pub(super) async fn logger(&self, logger: &Logger) -> Result<()> {
        self.put("/logger", logger).await
    }

    /// Where its metrics go, once a minute; once, before anything else but the logger.
    pub(super) async fn metrics(&self, metrics_path: &str) -> Result<()> {
        #[derive(Serialize)]
        struct Body<'a> {
            metrics_path: &'a str,
        }
        self.put("/metrics", &Body { metrics_path }).await
    }

    pub(super) async fn boot_source(&self, source: &BootSource) -> Result<()> {
        self.put("/boot-source", source).await
    }

    pub(super) async fn machine_config(&self, config: &MachineConfig) -> Result<()> {
        self.put("/machine-config", config).await
    }

    pub(super) async fn drive(&self, drive: &Drive) -> Result<()> {
        self.put(&format!("/drives/{}", drive.drive_id), drive).await
    }

    pub(super) async fn update_drive(&self, update: &DriveUpdate) -> Result<()> {
        self.send(Method::PATCH, &format!("/drives/{}", update.drive_id), update).await
    }

    pub(super) async fn network_interface(&self, interface: &NetworkInterface) -> Result<()> {
        self.put(&format!("/network-interfaces/{}", interface.iface_id), interface).await
    }

    pub(super) async fn vsock(&self, vsock: &Vsock) -> Result<()> {
        self.put("/vsock", vsock).await
    }

    pub(super) async fn action(&self, action: Action) -> Result<()> {
        #[derive(Serialize)]
        struct Body {
            action_type: Action,
        }
        self.put("/actions", &Body { action_type: action }).await
    }

    pub(super) async fn vm_state(&self, state: VmState) -> Result<()> {
        #[derive(Serialize)]
        struct Body {
            state: VmState,
        }
        self.send(Method::PATCH, "/vm", &Body { state }).await
    }

    pub(super) async fn create_snapshot(&self, snapshot: &SnapshotCreate) -> Result<()> {
        self.put("/snapshot/create", snapshot).await
    }

    pub(super) async fn load_snapshot(&self, snapshot: &SnapshotLoad) -> Result<()> {
        self.put("/snapshot/load", snapshot).await
    }

    async fn put(&self, path: &str, body: &impl Serialize) -> Result<()> {
        self.send(Method::PUT, path, body).await
    }

    async fn send(&self, method: Method, path: &str, body: &impl Serialize) -> Result<()> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken("write to", error.into()))?;
        self.ask(method, path.to_owned(), body.into()).await.map(drop)
    }

    async fn ask(&self, method: Method, path: String, body: Bytes) -> Result<Bytes> {
        let request = format!("{method} {path}");
        let late =
            || MachineError::Late { what: request.clone(), id: self.dir.id().to_string(), seconds: PATIENCE.as_secs() };
        timeout(PATIENCE, self.exchange(method, &path, body)).await.map_err(|_| late())?
    }

    /// One request on a connection of its own, which ends with it.
    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let failed = |error: hyper::Error| self.broken("ask", io::Error::other(error));
        let stream = self.dir.connect(&self.place, self.name).await;
        let stream = stream.map_err(|source| self.broken("connect to", source))?;
        let handshake = hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(failed)?;
        let name = format!("{method} {path}");
        let mut request = Request::builder().method(method).uri(path).header("Host", "localhost");
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|error| self.broken("ask", io::Error::other(error)))?;
        let answer = async {
            let answer = sender.send_request(request).await.map_err(failed)?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, LONGEST_ANSWER).collect().await;
            let body = body.map_err(|error| self.broken("read from", io::Error::other(error)))?;
            Ok((head.status, body.to_bytes()))
        };
        // The connection does its work only while it is polled; it never ends before the answer without an error there.
        let driven = async {
            let _ = connection.await;
            std::future::pending::<Infallible>().await
        };
        let (status, body) = tokio::select! {
            // Both are dropped together, so nothing is lost by cancelling either.
            answer = answer => answer?,
            never = driven => match never {},
        };
        if status.is_success() {
            return Ok(body);
        }
        let fault = serde_json::from_slice(&body).map(|fault: Fault| fault.fault_message);
        let message = fault.unwrap_or_else(|_| format!("status {status}"));
        Err(MachineError::Api { vmm: "Firecracker", request: name, message })
    }

    fn broken(&self, action: &'static str, source: io::Error) -> MachineError {
        MachineError::Socket { action, socket: self.place.join(self.name), source }
    }
}
