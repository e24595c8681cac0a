//! `lambdalet cri` as it is started: its socket, its end, and real containers where there is Docker.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lambdalet::network::bridge::Bridge;
use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::image_service_client::ImageServiceClient;
use lambdalet_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::Channel;

use crate::support::{ENDPOINT, ENDPOINT_IMAGE, PATIENCE, connect, map};

/// The process, killed if a test fails.
struct Process {
    child: Child,
    socket: PathBuf,
}

impl Process {
    fn command(root: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
        command.arg("cri").arg("--listen").arg(format!("unix://{}", root.join("cri.sock").display()));
        command.arg("--root-dir").arg(root.join("root")).args(more).stdout(Stdio::null()).env_remove("RUST_LOG");
        command
    }

    async fn start(root: &Path, more: &[&str]) -> (Self, Channel) {
        let (child, socket) = (Self::command(root, more).spawn().unwrap(), root.join("cri.sock"));
        let process = Self { child, socket: socket.clone() };
        let began = Instant::now();
        while UnixStream::connect(&socket).await.is_err() {
            assert!(began.elapsed() < PATIENCE, "it does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (process, connect(socket).await)
    }

    /// Ends it as an operator does.
    fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                break;
            }
            assert!(began.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!self.socket.exists(), "the socket goes with it");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn it_serves_until_a_signal_and_its_socket_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (process, channel) = Process::start(folder.path(), &["--runtime", "fake"]).await;
    let mut client = RuntimeServiceClient::new(channel);
    let version = client.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert!(version.runtime_version.contains("fake"), "{version:?}");
    let second = Process::command(folder.path(), &["--runtime", "fake"]).output().unwrap();
    assert!(!second.status.success() && String::from_utf8_lossy(&second.stderr).contains("is in use"), "{second:?}");
    // A stream that is open does not hold the end up.
    let _events = client.get_container_events(v1::GetEventsRequest {}).await.unwrap();
    process.end();
}

/// Asks every promise of the server on this socket, in a process of its own: what it is asked of is in its environment.
fn ask(socket: &Path) {
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["promises::", "--test-threads=4"]).env(ENDPOINT, socket).env(ENDPOINT_IMAGE, BUSYBOX);
    let asked = tests.output().unwrap();
    let text = String::from_utf8_lossy(&asked.stdout);
    assert!(asked.status.success() && text.contains("test result: ok"), "{text}");
}

#[tokio::test]
async fn every_promise_is_kept_over_docker() {
    if std::env::var_os("LAMBDALET_TEST_DOCKER").is_none_or(|value| value != "1") {
        return println!("skipped: set LAMBDALET_TEST_DOCKER=1 to ask them of real containers");
    }
    let folder = tempfile::tempdir().unwrap();
    let owner = format!("{}promises", std::process::id());
    let flags = ["--runtime", "docker", "--owner", &owner, "--pod-cidr", "10.189.78.0/24"];
    let (process, _channel) = Process::start(folder.path(), &flags).await;
    let socket = process.socket.clone();
    let asked = tokio::task::spawn_blocking(move || ask(&socket)).await;
    process.end();
    remove_bridge("10.189.78.1", "10.189.78.0/24").await;
    asked.unwrap();
}

/// The image that Docker tests run; it is there wherever hack/images was run.
const BUSYBOX: &str = "busybox:1.36";
/// A range of this test's own, and the address that its bridge has.
const RANGE: &str = "10.189.77.0/24";
const GATEWAY: &str = "10.189.77.1";

#[tokio::test]
async fn real_containers_run() {
    if std::env::var_os("LAMBDALET_TEST_DOCKER").is_none_or(|value| value != "1") {
        return println!("skipped: set LAMBDALET_TEST_DOCKER=1 to run real containers");
    }
    let folder = tempfile::tempdir().unwrap();
    let owner = format!("{}critest", std::process::id());
    let flags = ["--runtime", "docker", "--owner", &owner, "--pod-cidr", RANGE];
    let (process, channel) = Process::start(folder.path(), &flags).await;
    let mut client = RuntimeServiceClient::new(channel.clone());
    let image = Some(v1::ImageSpec { image: BUSYBOX.into(), ..Default::default() });
    let present = v1::ImageStatusRequest { image: image.clone(), verbose: false };
    let present = ImageServiceClient::new(channel).image_status(present).await.unwrap().into_inner().image;
    assert!(present.is_some(), "{BUSYBOX} is not in Docker: run hack/images");
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "web".into(),
            uid: format!("uid-{owner}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        log_directory: folder.path().join("logs").display().to_string(),
        dns_config: Some(v1::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() }),
        labels: map(&[("app", "web")]),
        ..Default::default()
    };
    let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
    let sandbox = client.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    let checked = tokio::time::timeout(3 * PATIENCE, check(&mut client, &sandbox, image)).await;
    let gone = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: sandbox }).await.unwrap();
    client.remove_pod_sandbox(gone).await.unwrap();
    checked.expect("it does not take for ever");
    let left = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner();
    assert!(left.containers.is_empty(), "{left:?}");
    process.end();
    remove_bridge(GATEWAY, RANGE).await;
}

/// The network of a CRI server stays after its end, as its sandboxes do; this one's nobody uses any more.
async fn remove_bridge(gateway: &str, range: &str) {
    let listed = Command::new("ip").args(["-o", "addr", "show", "to", gateway]).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let name = text.split_whitespace().nth(1).expect("the bridge has the gateway's address");
    let bridge = Bridge::ensure(name, gateway.parse().unwrap(), range.parse().unwrap()).await.unwrap();
    bridge.remove().await.unwrap();
}

async fn check(client: &mut RuntimeServiceClient<Channel>, sandbox: &str, image: Option<v1::ImageSpec>) {
    let script = "echo out; echo err >&2; cat /etc/resolv.conf; exec sleep 600";
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "main".into(), attempt: 0 }),
        image,
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        log_path: "main/0.log".into(),
        ..Default::default()
    };
    let request =
        v1::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: None };
    let id = client.create_container(request).await.unwrap().into_inner().container_id;
    client.start_container(v1::StartContainerRequest { container_id: id.clone() }).await.unwrap();
    let cmd = ["sh", "-c", "hostname; ip -o -4 addr show eth0; exit 3"].map(str::to_owned).to_vec();
    let exec = v1::ExecSyncRequest { container_id: id.clone(), cmd, timeout: 20 };
    let done = client.exec_sync(exec).await.unwrap().into_inner();
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.exit_code == 3 && text.starts_with("web\n") && text.contains("10.189.77."), "{done:?}");
    let late = v1::ExecSyncRequest { container_id: id.clone(), cmd: vec!["sleep".into(), "600".into()], timeout: 1 };
    assert_eq!(client.exec_sync(late).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    // As much of an id as crictl shows is enough.
    let request = v1::ContainerStatusRequest { container_id: id[..13].to_owned(), verbose: true };
    let log = client.container_status(request.clone()).await.unwrap().into_inner().status.unwrap().log_path;
    loop {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let has = |line: &str| text.lines().any(|found| found.ends_with(line));
        if has("stdout F out") && has("stderr F err") && has("stdout F nameserver 10.96.0.10") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.stop_container(v1::StopContainerRequest { container_id: id.clone(), timeout: 0 }).await.unwrap();
    let status = client.container_status(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 137));
    client.remove_container(v1::RemoveContainerRequest { container_id: id }).await.unwrap();
}
