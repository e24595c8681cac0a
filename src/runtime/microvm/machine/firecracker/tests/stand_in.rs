//! A server that refuses what Firecracker's published API refuses: a method or path that does not exist, a field that is
//! missing, unknown or of another type, a request at the wrong time, a file or a network device that is not there, a snapshot
//! that is none, a socket in the place of its own.
//!
//! Facts: `src/firecracker/swagger/firecracker.yaml` and the order that `src/vmm/src/rpc_interface.rs` allows.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nix::sys::stat::Mode;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::guest::{self, Guest};
use super::{VmmUser, jailer};
use crate::network::bridge::tests::taps::open_by_name;

/// What a field may hold.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Flag,
    /// From, to.
    Number(u64, u64),
    OneOf(&'static [&'static str]),
    Object(&'static [Field]),
    List(&'static [Field]),
}

/// Name, whether it has to be there, what it holds.
type Field = (&'static str, bool, Kind);

use Kind::{Flag, List, Number, Object, OneOf, Text};

const BUCKET: Kind = Object(&[
    ("size", true, Number(0, u64::MAX)),
    ("refill_time", true, Number(0, u64::MAX)),
    ("one_time_burst", false, Number(0, u64::MAX)),
]);
const LIMITER: Kind = Object(&[("bandwidth", false, BUCKET), ("ops", false, BUCKET)]);
const LOGGER: &[Field] = &[
    ("log_path", false, Text),
    ("level", false, OneOf(&["Error", "Warning", "Info", "Debug", "Trace", "Off"])),
    ("show_level", false, Flag),
    ("show_log_origin", false, Flag),
    ("module", false, Text),
];
const METRICS: &[Field] = &[("metrics_path", true, Text)];
const BOOT_SOURCE: &[Field] =
    &[("kernel_image_path", true, Text), ("initrd_path", false, Text), ("boot_args", false, Text)];
const MACHINE_CONFIG: &[Field] = &[
    ("vcpu_count", true, Number(1, 32)),
    ("mem_size_mib", true, Number(1, 1 << 30)),
    ("smt", false, Flag),
    ("cpu_template", false, OneOf(&["C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"])),
    ("track_dirty_pages", false, Flag),
    ("huge_pages", false, OneOf(&["None", "Transparent", "2M"])),
];
const DRIVE: &[Field] = &[
    ("drive_id", true, Text),
    ("is_root_device", true, Flag),
    ("partuuid", false, Text),
    ("cache_type", false, OneOf(&["Unsafe", "Writeback"])),
    ("is_read_only", false, Flag),
    ("path_on_host", false, Text),
    ("rate_limiter", false, LIMITER),
    ("io_engine", false, OneOf(&["Sync", "Async"])),
    ("socket", false, Text),
];
const DRIVE_UPDATE: &[Field] =
    &[("drive_id", true, Text), ("path_on_host", false, Text), ("rate_limiter", false, LIMITER)];
const INTERFACE: &[Field] = &[
    ("iface_id", true, Text),
    ("host_dev_name", true, Text),
    ("guest_mac", false, Text),
    ("mtu", false, Number(68, 65535)),
    ("rx_rate_limiter", false, LIMITER),
    ("tx_rate_limiter", false, LIMITER),
];
const VSOCK: &[Field] =
    &[("guest_cid", true, Number(3, u32::MAX as u64)), ("uds_path", true, Text), ("vsock_id", false, Text)];
const ACTION: &[Field] = &[("action_type", true, OneOf(&["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]))];
const VM: &[Field] = &[("state", true, OneOf(&["Paused", "Resumed"]))];
const CREATE: &[Field] =
    &[("mem_file_path", true, Text), ("snapshot_path", true, Text), ("snapshot_type", false, OneOf(&["Full", "Diff"]))];
const LOAD: &[Field] = &[
    ("snapshot_path", true, Text),
    ("mem_file_path", false, Text),
    ("mem_backend", false, Object(&[("backend_type", true, OneOf(&["File", "Uffd"])), ("backend_path", true, Text)])),
    ("enable_diff_snapshots", false, Flag),
    ("track_dirty_pages", false, Flag),
    ("resume_vm", false, Flag),
    ("network_overrides", false, List(&[("iface_id", true, Text), ("host_dev_name", true, Text)])),
    ("vsock_override", false, Object(&[("uds_path", true, Text)])),
    ("clock_realtime", false, Flag),
    ("huge_pages", false, OneOf(&["Snapshot", "None", "Transparent", "2M"])),
];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    NotStarted,
    Running,
    Paused,
}

#[derive(Debug, Default)]
struct Vm {
    phase: Phase,
    /// Anything but the logger and metrics was configured, after which no snapshot can be loaded.
    configured: bool,
    kernel: bool,
    drives: BTreeSet<String>,
    root_drive: bool,
    initrd: bool,
    vsock: Option<String>,
    metrics: bool,
    /// The guest's network card.
    card: Option<OwnedFd>,
    /// Memory that somebody else brings.
    guest: Option<Guest>,
    /// Each request with its answer.
    asked: Vec<String>,
}

/// The stand-in; clones are the same one. It ends with the last of its tasks.
#[derive(Clone)]
pub(super) struct StandIn {
    root: PathBuf,
    vm: Arc<Mutex<Vm>>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

type Refusal = String;

/// What a snapshot says of the machine.
const STATE: &[u8] = b"snapshot_path";

impl StandIn {
    /// Listens in the jail whose root this is.
    pub(super) fn listen(root: PathBuf, socket: &str) -> Self {
        let server = Self { root, vm: Arc::default(), tasks: Arc::default() };
        server.begin(socket);
        server
    }

    /// Does so when the jailer tells by this pipe, which is made, that it has left a process; each time as a new one.
    pub(super) fn behind_jailer(begun: &Path, root: PathBuf, socket: &'static str) -> Self {
        nix::unistd::mkfifo(begun, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let begun = pipe::OpenOptions::new().read_write(true).open_receiver(begun).unwrap();
        let server = Self { root, vm: Arc::default(), tasks: Arc::default() };
        let own = server.clone();
        server.spawn(async move {
            let mut told = BufReader::new(begun).lines();
            while let Ok(Some(_)) = told.next_line().await {
                own.begin(socket);
            }
        });
        server
    }

    fn begin(&self, socket: &str) {
        let listener = bind(&self.root, socket).unwrap();
        *self.vm.lock().unwrap() = Vm::default();
        let own = self.clone();
        self.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let each = own.clone();
                own.spawn(async move {
                    let service = service_fn(|request| each.clone().serve(request));
                    let served =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    let _ = served.await;
                });
            }
        });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().unwrap().spawn(task);
    }

    /// The memory that is brought by somebody else, once a snapshot was loaded so.
    pub(super) fn guest(&self) -> Guest {
        self.vm.lock().unwrap().guest.expect("a snapshot was loaded with Uffd")
    }

    /// The guest's network card, for whoever is the guest. While it is open the VMM's network namespace is there: a VMM that ends
    /// closes it.
    pub(super) fn take_card(&self) -> OwnedFd {
        self.vm.lock().unwrap().card.take().expect("it was given one")
    }

    /// `METHOD path -> status`, in order.
    pub(super) fn asked(&self) -> Vec<String> {
        self.vm.lock().unwrap().asked.clone()
    }

    async fn serve(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let path = head.uri.path().to_owned();
        let answer = self.answer(&head.method, &path, &body);
        let (status, body) = match answer {
            Ok(None) => (StatusCode::NO_CONTENT, Bytes::new()),
            Ok(Some(value)) => (StatusCode::OK, value.to_string().into()),
            Err(fault) => (StatusCode::BAD_REQUEST, json!({"fault_message": fault}).to_string().into()),
        };
        self.vm.lock().unwrap().asked.push(format!("{} {path} -> {}", head.method, status.as_u16()));
        Ok(Response::builder().status(status).body(Full::new(body)).unwrap())
    }

    fn answer(&self, method: &Method, path: &str, body: &[u8]) -> Result<Option<Value>, Refusal> {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let mut vm = self.vm.lock().unwrap();
        if (method, path) == (&Method::GET, "/") {
            let state = match vm.phase {
                Phase::NotStarted => "Not started",
                Phase::Running => "Running",
                Phase::Paused => "Paused",
            };
            return Ok(Some(json!({"app_name": "Firecracker", "id": "x", "state": state, "vmm_version": "1.16.1"})));
        }
        let (fields, id) = match (method.as_str(), &parts[..]) {
            ("PUT", ["logger"]) => (LOGGER, None),
            ("PUT", ["metrics"]) => (METRICS, None),
            ("PUT", ["boot-source"]) => (BOOT_SOURCE, None),
            ("PUT", ["machine-config"]) => (MACHINE_CONFIG, None),
            ("PUT", ["drives", id]) => (DRIVE, Some(("drive_id", *id))),
            ("PATCH", ["drives", id]) => (DRIVE_UPDATE, Some(("drive_id", *id))),
            ("PUT", ["network-interfaces", id]) => (INTERFACE, Some(("iface_id", *id))),
            ("PUT", ["vsock"]) => (VSOCK, None),
            ("PUT", ["actions"]) => (ACTION, None),
            ("PATCH", ["vm"]) => (VM, None),
            ("PUT", ["snapshot", "create"]) => (CREATE, None),
            ("PUT", ["snapshot", "load"]) => (LOAD, None),
            _ => return Err(format!("Invalid request method and/or path: {method} {path}.")),
        };
        let body: Map<String, Value> = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        check(&body, fields)?;
        if let Some((field, id)) = id {
            if id.is_empty() || !id.chars().all(|c| c.is_alphanumeric() || c == '_') {
                return Err("API Resource IDs can only contain alphanumeric characters and underscores.".to_owned());
            }
            if body[field] != id {
                return Err("The id from the path does not match the id from the body!".to_owned());
            }
        }
        self.act(&mut vm, method, &parts, &body).map(|()| None)
    }

    fn act(&self, vm: &mut Vm, method: &Method, parts: &[&str], body: &Map<String, Value>) -> Result<(), Refusal> {
        let started = vm.phase != Phase::NotStarted;
        let text = |field: &str| body.get(field).and_then(Value::as_str).map(str::to_owned);
        let start = parts == ["actions"] && body["action_type"] == "InstanceStart";
        let before = *method == Method::PUT && (start || !matches!(parts, ["actions"] | ["snapshot", "create"]));
        if before && started {
            return Err("The requested operation is not supported after starting the microVM.".to_owned());
        }
        if !before && !started {
            return Err("The requested operation is not supported before starting the microVM.".to_owned());
        }
        match (method.as_str(), parts) {
            ("PUT", ["logger"]) => return text("log_path").map_or(Ok(()), |path| self.write(&path, "logs begin\n")),
            ("PUT", ["metrics"]) => {
                if std::mem::replace(&mut vm.metrics, true) {
                    return Err("Reinitialization of metrics not allowed.".to_owned());
                }
                return self.write(&text("metrics_path").unwrap_or_default(), "{}\n");
            }
            ("PUT", ["boot-source"]) => {
                self.exists(&text("kernel_image_path"))?;
                vm.initrd = body.contains_key("initrd_path");
                self.exists(&text("initrd_path"))?;
                vm.kernel = true;
            }
            ("PUT", ["machine-config"]) => {
                let vcpus = body["vcpu_count"].as_u64().unwrap_or_default();
                if body.get("smt") == Some(&json!(true)) && vcpus != 1 && !vcpus.is_multiple_of(2) {
                    return Err("The vCPU number is invalid!".to_owned());
                }
            }
            ("PUT", ["drives", id]) => {
                self.exists(&text("path_on_host"))?;
                vm.root_drive |= body["is_root_device"] == true;
                vm.drives.insert((*id).to_owned());
            }
            ("PATCH", ["drives", id]) => {
                self.exists(&text("path_on_host"))?;
                if !vm.drives.contains(*id) {
                    return Err(format!("Invalid device ID: {id}"));
                }
            }
            ("PUT", ["network-interfaces", _]) => vm.card = Some(self.open_tap(&text("host_dev_name"))?),
            ("PUT", ["vsock"]) => vm.vsock = text("uds_path"),
            ("PUT", ["actions"]) if start => {
                if !vm.kernel {
                    return Err("Cannot start microvm without kernel configuration.".to_owned());
                }
                if vm.initrd && vm.root_drive {
                    return Err("a root device next to an initrd".to_owned());
                }
                self.run(vm)?;
            }
            ("PATCH", ["vm"]) if body["state"] == "Paused" => vm.phase = Phase::Paused,
            ("PATCH", ["vm"]) => vm.phase = Phase::Running,
            ("PUT", ["snapshot", "create"]) => self.create(vm, body)?,
            ("PUT", ["snapshot", "load"]) => self.load(vm, body)?,
            _ => {}
        }
        vm.configured = true;
        Ok(())
    }

    /// To a file or a pipe that is there, without waiting for a reader.
    fn write(&self, path: &str, text: &str) -> Result<(), Refusal> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
        let file = fs::File::options().read(true).write(true).custom_flags(flags).open(self.root.join(path));
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| error.to_string())
    }

    fn create(&self, vm: &Vm, body: &Map<String, Value>) -> Result<(), Refusal> {
        if vm.phase != Phase::Paused {
            return Err("Cannot save the microVM state: it is not paused".to_owned());
        }
        for (field, content) in [("snapshot_path", STATE.to_vec()), ("mem_file_path", guest::memory())] {
            fs::write(self.root.join(body[field].as_str().unwrap_or_default()), content).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn load(&self, vm: &mut Vm, body: &Map<String, Value>) -> Result<(), Refusal> {
        if vm.configured {
            return Err("Loading a microVM snapshot not allowed after configuring boot-specific resources.".to_owned());
        }
        let backend = match (body.get("mem_backend"), body.get("mem_file_path")) {
            (Some(backend), None) => backend["backend_path"].as_str(),
            (None, Some(path)) => path.as_str(),
            (Some(_), Some(_)) => return Err("too many fields: either `mem_backend` or `mem_file_path`".to_owned()),
            (None, None) => return Err("missing field: either `mem_backend` or `mem_file_path`".to_owned()),
        };
        self.exists(&backend.map(str::to_owned))?;
        if body["mem_backend"]["backend_type"] == "Uffd" {
            let guest =
                Guest::behind(&self.root.join(backend.unwrap_or_default())).map_err(|error| error.to_string())?;
            vm.guest = Some(guest);
        }
        let state = self.root.join(body["snapshot_path"].as_str().unwrap_or_default());
        if fs::read(state).map_err(|error| error.to_string())? != STATE {
            return Err("Load snapshot error: Failed to restore from snapshot".to_owned());
        }
        for card in body.get("network_overrides").and_then(Value::as_array).into_iter().flatten() {
            vm.card = Some(self.open_tap(&card["host_dev_name"].as_str().map(str::to_owned))?);
        }
        vm.drives = (0..8).map(|slot| format!("image{slot}")).chain(["scratch".to_owned()]).collect();
        vm.vsock = Some("vsock.sock".to_owned());
        self.run(vm)?;
        if body.get("resume_vm") != Some(&json!(true)) {
            vm.phase = Phase::Paused;
        }
        Ok(())
    }

    /// From here on somebody listens at port 1024 of the guest, and says back what it is told.
    fn run(&self, vm: &mut Vm) -> Result<(), Refusal> {
        vm.phase = Phase::Running;
        let Some(path) = &vm.vsock else { return Ok(()) };
        let listener = bind(&self.root, path).map_err(|error| format!("Cannot bind the vsock: {error}"))?;
        let own = self.clone();
        self.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                own.spawn(echo(stream));
            }
        });
        Ok(())
    }

    /// A tap, as the jailed process would find it: in the network namespace that this is in.
    fn open_tap(&self, name: &Option<String>) -> Result<OwnedFd, Refusal> {
        let pid = jailer::pid(&self.root, Path::new("firecracker")).ok_or("there is no such process")?;
        let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).map_err(|error| error.to_string())?;
        let opened = open_by_name(namespace, name.as_deref().unwrap_or_default(), VmmUser::default().uid);
        opened.map_err(|error| format!("Open tap device failed: {error}"))
    }

    /// A file, as the jailed process would find it.
    fn exists(&self, path: &Option<String>) -> Result<(), Refusal> {
        match path {
            Some(path) if !self.root.join(path.trim_start_matches('/')).exists() => {
                Err(format!("No such file or directory: {path}"))
            }
            _ => Ok(()),
        }
    }
}

/// By the directory's descriptor: the path of a socket has 107 bytes at the most. In the jail it is short.
fn bind(root: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = fs::File::open(root)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

async fn echo(stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if stream.read_line(&mut line).await.is_err() || line != "CONNECT 1024\n" {
        return;
    }
    let _ = stream.write_all(b"OK 1073741824\n").await;
    line.clear();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let _ = stream.write_all(line.as_bytes()).await;
        line.clear();
    }
}

fn check(body: &Map<String, Value>, fields: &[Field]) -> Result<(), Refusal> {
    if let Some(unknown) = body.keys().find(|key| !fields.iter().any(|(name, ..)| name == key)) {
        return Err(format!("unknown field `{unknown}`"));
    }
    for (name, required, kind) in fields {
        match body.get(*name) {
            None if *required => return Err(format!("missing field `{name}`")),
            None => {}
            Some(value) => fits(name, value, *kind)?,
        }
    }
    Ok(())
}

fn fits(name: &str, value: &Value, kind: Kind) -> Result<(), Refusal> {
    let fits = match kind {
        Text => value.is_string(),
        Flag => value.is_boolean(),
        Number(from, to) => value.as_u64().is_some_and(|number| (from..=to).contains(&number)),
        OneOf(values) => value.as_str().is_some_and(|text| values.contains(&text)),
        Object(fields) => return check(value.as_object().ok_or(format!("invalid type of `{name}`"))?, fields),
        List(fields) => {
            let items = value.as_array().ok_or(format!("invalid type of `{name}`"))?;
            return items.iter().try_for_each(|item| fits(name, item, Object(fields)));
        }
    };
    if fits { Ok(()) } else { Err(format!("invalid type or value of `{name}`: {value}")) }
}
