//! `lambdalet cri` as it is started, and a node that serves CRI too: the socket, the end, and real containers where there
//! is Docker.

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
    /// `lambdalet cri` with these flags besides.
    fn server(root: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
        command.arg("cri").arg("--listen").arg(format!("unix://{}", root.join("cri.sock").display())).args(more);
        if !more.contains(&"--root-dir") {
            command.arg("--root-dir").arg(root.join("root"));
        }
        command.stdout(Stdio::null()).env_remove("RUST_LOG");
        command
    }

    /// A node without a cluster that serves CRI too, its API at this port.
    fn node(root: &Path, port: u16, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
        command.args(["run", "--node-name", "alone", "--node-ip", "192.0.2.1", "--address", "127.0.0.1"]);
        command.arg("--cri-listen").arg(format!("unix://{}", root.join("cri.sock").display()));
        command.arg("--root-dir").arg(root.join("root")).arg("--pod-manifest-path").arg(root.join("pods"));
        command.arg("--port").arg(port.to_string()).args(more).stdout(Stdio::null());
        command.env_remove("RUST_LOG").env_remove("KUBECONFIG");
        command
    }

    async fn start(mut command: Command, root: &Path) -> (Self, Channel) {
        let (child, socket) = (command.spawn().unwrap(), root.join("cri.sock"));
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
    let (process, channel) =
        Process::start(Process::server(folder.path(), &["--runtime", "fake"]), folder.path()).await;
    let mut client = RuntimeServiceClient::new(channel);
    let version = client.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert!(version.runtime_version.contains("fake"), "{version:?}");
    let second = Process::server(folder.path(), &["--runtime", "fake"]).output().unwrap();
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
    if !has_docker("to ask them of real containers") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let owner = format!("{}promises", std::process::id());
    let flags = ["--runtime", "docker", "--owner", &owner, "--pod-cidr", "10.189.78.0/24"];
    let (process, _channel) = Process::start(Process::server(folder.path(), &flags), folder.path()).await;
    let socket = process.socket.clone();
    let asked = tokio::task::spawn_blocking(move || ask(&socket)).await;
    process.end();
    remove_bridge("10.189.78.1", "10.189.78.0/24").await;
    asked.unwrap();
}

/// Whether there is Docker to test with; if not, says what for.
fn has_docker(what: &str) -> bool {
    let told = std::env::var_os("LAMBDALET_TEST_DOCKER").is_some_and(|value| value == "1");
    if !told {
        println!("skipped: set LAMBDALET_TEST_DOCKER=1 {what}");
    }
    told
}

/// The image that Docker tests run; it is there wherever hack/images was run.
const BUSYBOX: &str = "busybox:1.36";
/// A range of this test's own, and the address that its bridge has.
const RANGE: &str = "10.189.77.0/24";
const GATEWAY: &str = "10.189.77.1";

#[tokio::test]
async fn real_containers_run() {
    if !has_docker("to run real containers") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let owner = format!("{}critest", std::process::id());
    let flags = ["--runtime", "docker", "--owner", &owner, "--pod-cidr", RANGE];
    let (process, channel) = Process::start(Process::server(folder.path(), &flags), folder.path()).await;
    let mut client = RuntimeServiceClient::new(channel.clone());
    let image = Some(v1::ImageSpec { image: BUSYBOX.into(), ..Default::default() });
    let present = v1::ImageStatusRequest { image: image.clone(), verbose: false };
    let present = ImageServiceClient::new(channel).image_status(present).await.unwrap().into_inner().image;
    assert!(present.is_some(), "{BUSYBOX} is not in Docker: run hack/images");
    let request = sandbox(&format!("uid-{owner}"), folder.path());
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

/// A request for a sandbox of this UID.
fn sandbox(uid: &str, folder: &Path) -> v1::RunPodSandboxRequest {
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "web".into(),
            uid: uid.to_owned(),
            namespace: "default".into(),
            attempt: 0,
        }),
        log_directory: folder.join("logs").display().to_string(),
        dns_config: Some(v1::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() }),
        labels: map(&[("app", "web")]),
        ..Default::default()
    };
    v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() }
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

/// A port that nobody has now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A static Pod for a node of [`Process::node`].
fn put_pod(folder: &Path, command: &str) {
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
         containers: [{{name: main, image: '{BUSYBOX}', command: {command}}}]\n"
    );
    std::fs::create_dir_all(folder.join("pods")).unwrap();
    std::fs::write(folder.join("pods/web.yaml"), pod).unwrap();
}

/// The names of the Pods that the node tells of, once all of them run.
async fn pods(folder: &Path, port: u16) -> Vec<String> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let token = std::fs::read_to_string(folder.join("root/api-token")).unwrap();
    let mut config = kube::Config::new(format!("https://127.0.0.1:{port}").parse().unwrap());
    config.accept_invalid_certs = true;
    config.auth_info.token = Some(token.into());
    let client = kube::Client::try_from(config).unwrap();
    let asked = async {
        loop {
            let request = http::Request::get("/pods").body(Vec::new()).unwrap();
            let list: serde_json::Value = client.request(request).await.unwrap_or_default();
            let pods = list["items"].as_array().cloned().unwrap_or_default();
            if !pods.is_empty() && pods.iter().all(|pod| pod["status"]["phase"] == "Running") {
                let name = |pod: &serde_json::Value| pod["metadata"]["name"].as_str().map(str::to_owned);
                return pods.iter().filter_map(name).collect();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.expect("its Pods run")
}

/// Ids of all sandboxes that a client sees, and of all containers.
async fn seen(client: &mut RuntimeServiceClient<Channel>) -> (Vec<String>, Vec<String>) {
    let sandboxes = client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner();
    let containers = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner();
    (
        sandboxes.items.into_iter().map(|sandbox| sandbox.id).collect(),
        containers.containers.into_iter().map(|container| container.id).collect(),
    )
}

#[tokio::test]
async fn a_node_serves_cri_too_and_neither_sees_what_the_other_runs() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: a node mounts a directory for secrets, which takes root");
    }
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    put_pod(folder.path(), "[sleep, '600000']");
    let flags = ["--runtime", "fake", "--drain-on-exit"];
    let (process, channel) = Process::start(Process::node(folder.path(), port, &flags), folder.path()).await;
    let mut client = RuntimeServiceClient::new(channel);
    let version = client.version(v1::VersionRequest::default()).await.unwrap().into_inner();
    assert!(version.runtime_version.contains("fake"), "{version:?}");
    let id = client.run_pod_sandbox(sandbox("theirs", folder.path())).await.unwrap().into_inner().pod_sandbox_id;
    assert_eq!(pods(folder.path(), port).await, ["web-alone"]);
    assert_eq!(seen(&mut client).await, (vec![id], Vec::new()));
    assert!(folder.path().join("root/cri/sandboxes").exists(), "its directory is below the node's");
    process.end();
}

#[tokio::test]
async fn a_node_does_not_start_where_another_answers_on_its_cri_socket() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own").display().to_string();
    let server = Process::server(folder.path(), &["--runtime", "fake", "--root-dir", &own]);
    let (process, _channel) = Process::start(server, folder.path()).await;
    std::fs::create_dir(folder.path().join("pods")).unwrap();
    let node = Process::node(folder.path(), free_port(), &["--runtime", "fake"]);
    let ended = assert_cmd::Command::from_std(node).timeout(PATIENCE).output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code().is_some_and(|code| code != 0), "it ends by itself: {text}");
    let said = ["--cri-listen", "is in use", "pass another socket"];
    assert!(said.iter().all(|words| text.contains(words)), "{text}");
    process.end();
}

/// Ranges of the next test's own: of the node's Pods, and of the client's sandboxes.
const NODE_RANGE: &str = "10.189.74.0/24";
const BESIDE_RANGE: &str = "10.189.75.0/24";

#[tokio::test]
async fn sandboxes_beside_the_pods_of_a_node_outlive_it() {
    if !has_docker("to run real sandboxes") {
        return;
    }
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    let root = folder.path();
    put_pod(root, "[sleep, '600']");
    let flags = ["--runtime", "docker", "--pod-cidr", NODE_RANGE];
    let (process, channel) = Process::start(Process::node(root, port, &flags), root).await;
    let mut client = RuntimeServiceClient::new(channel);
    let network_config = Some(v1::NetworkConfig { pod_cidr: BESIDE_RANGE.into() });
    let range = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
    client.update_runtime_config(range).await.unwrap();
    let id = client.run_pod_sandbox(sandbox("theirs", root)).await.unwrap().into_inner().pod_sandbox_id;
    let theirs = (vec![id.clone()], Vec::new());
    assert_eq!(pods(root, port).await, ["web-alone"]);
    assert_eq!(seen(&mut client).await, theirs);
    process.end();
    // The next process finds what is its own, and ends its Pods only.
    let draining = [&flags[..], &["--drain-on-exit"]].concat();
    let (process, channel) = Process::start(Process::node(root, port, &draining), root).await;
    assert_eq!(pods(root, port).await, ["web-alone"]);
    assert_eq!(seen(&mut RuntimeServiceClient::new(channel)).await, theirs);
    process.end();
    // A server without a node may go on with them.
    let own = root.join("root/cri").display().to_string();
    let server = Process::server(root, &["--runtime", "docker", "--root-dir", &own]);
    let (process, channel) = Process::start(server, root).await;
    let mut client = RuntimeServiceClient::new(channel);
    let left = seen(&mut client).await;
    client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id }).await.unwrap();
    process.end();
    remove_bridge("10.189.75.1", BESIDE_RANGE).await;
    assert_eq!(left, theirs);
}
