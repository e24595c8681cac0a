//! `kubectl exec`, `attach`, `cp` and `port-forward`, over WebSocket and over SPDY, through a real API server.

mod ages;
mod sockets;
mod terminal;
mod vanished;

use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinSet;

use crate::harness::node::Options;
use crate::harness::pods::{STAY, busybox, busybox_with, has_ended, phase, sleeper, with};
use crate::harness::wait::SOON;
use crate::harness::{Case, DEBIAN, on_own_node, on_shared_node};

/// How kubectl is told which protocol to speak to the API server.
pub(crate) const PROTOCOLS: [(&str, &str); 2] = [("WebSocket", "true"), ("SPDY", "false")];

/// Echoes on port 8080, many connections at once, each until the end of what comes.
const ECHO: &str = r#"use IO::Socket::INET; $SIG{CHLD} = "IGNORE"; $| = 1;
my $listener = IO::Socket::INET->new(Listen => 1024, LocalPort => 8080, ReuseAddr => 1) or die $!;
print "up\n";
while (my $client = $listener->accept) {
  if (fork) { close $client; next }
  while (sysread $client, my $bytes, 65536) { print $client $bytes; $client->flush }
  exit;
}"#;

/// Makes a kubectl command of these arguments: of some release, over some protocol, through some API server.
type Kubectl<'a> = &'a dyn Fn(&[&str]) -> Command;

fn kubectl(t: &Case, websockets: &str, args: &[&str]) -> Command {
    let mut command = t.cluster.kubectl(&[&["-n", &t.namespace], args].concat());
    command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets).env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
    command
}

/// Runs kubectl to its end with this input.
pub(crate) fn run(t: &Case, websockets: &str, args: &[&str], input: &[u8]) -> Output {
    run_command(kubectl(t, websockets, args), input)
}

fn run_command(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A command may end without reading all.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    })
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A long-running kubectl, and its first line.
async fn background(mut command: Command) -> (Child, BufReader<ChildStdout>, String) {
    command.stdout(Stdio::piped());
    let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    tokio::time::timeout(SOON, lines.read_line(&mut first)).await.unwrap().unwrap();
    (child, lines, first)
}

/// Forwards to a port of a Pod; kubectl, and the local port.
async fn forward(t: &Case, websockets: &str, pod: &str, port: u16) -> (Child, BufReader<ChildStdout>, u16) {
    forward_by(&|args| kubectl(t, websockets, args), pod, port).await
}

/// The same by any kubectl.
async fn forward_by(kubectl: Kubectl<'_>, pod: &str, port: u16) -> (Child, BufReader<ChildStdout>, u16) {
    let command = kubectl(&["port-forward", pod, &format!(":{port}"), "--address=127.0.0.1"]);
    let (child, lines, first) = background(command).await;
    (child, lines, local_port(&first))
}

/// The local port in the first line of `kubectl port-forward`.
fn local_port(first: &str) -> u16 {
    let local = first.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    local.unwrap_or_else(|| panic!("{first}"))
}

/// What an HTTP server in a Pod answers to whoever comes through `kubectl port-forward`.
pub(crate) async fn fetched(t: &Case, pod: &str, port: u16) -> String {
    let (_child, _lines, local) = forward(t, "true", pod, port).await;
    crate::harness::http::get(&format!("127.0.0.1:{local}"), "/").await.unwrap().text()
}

/// Bytes in which a piece that is lost, doubled or moved shows.
fn bytes(length: u32) -> Vec<u8> {
    (0..length).map(|n| u8::try_from((n * 31 + n / 1021) % 256).unwrap()).collect()
}

/// What is sent to a command comes back as it was, once the command was told the end.
fn comes_back(kubectl: Kubectl<'_>, pod: &str, sent: &[u8], how: &str) {
    let ended = run_command(kubectl(&["exec", "-i", pod, "--", "cat"]), sent);
    assert!(ended.status.success(), "{how}: {}", text(&ended.stderr));
    assert!(ended.stdout == sent, "{how}: {} of {} bytes came back", ended.stdout.len(), sent.len());
}

/// A container that waits for input is joined, and ends with its input.
async fn joins(t: &Case, kubectl: Kubectl<'_>, name: &str, how: &str) {
    let echo = busybox_with("echo up; cat; echo done", json!({"stdin": true, "stdinOnce": true}));
    t.pod(name, json!({"restartPolicy": "Never", "containers": [echo]})).await;
    t.log_with(name, "main", "up").await;
    let attached = run_command(kubectl(&["attach", "-i", name]), b"hello\n");
    assert!(attached.status.success(), "{how}: {}", text(&attached.stderr));
    assert!(text(&attached.stdout).contains("hello\n"), "{how}: {}", text(&attached.stdout));
    let ended = t.until(name, "at its end", has_ended).await;
    assert_eq!(phase(&ended), "Succeeded", "{how}");
    assert!(t.log(name, "main").await.contains("hello\ndone"), "{how}");
}

/// A connection to a Pod that [echoes](ECHO): all that was sent comes back once the sender was done sending.
async fn is_echoed(port: u16, sent: &[u8], what: &str) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut came = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut came)).await.unwrap().unwrap();
    assert!(came == sent, "{what}: {} of {} bytes", came.len(), sent.len());
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_command_has_its_streams_and_its_exit_code() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            let script = "echo to out; echo to err >&2; exit 7";
            let ended = run(t, websockets, &["exec", "p", "--", "sh", "-c", script], b"");
            assert_eq!((text(&ended.stdout), ended.status.code()), ("to out\n".to_owned(), Some(7)), "{protocol}");
            let err = text(&ended.stderr);
            assert_eq!(err, "to err\ncommand terminated with exit code 7\n", "{protocol}");
            assert!(run(t, websockets, &["exec", "p", "--", "true"], b"").status.success(), "{protocol}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn input_goes_in_to_its_end_and_comes_back_as_it_was() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let sent = bytes(24 << 20);
        for (protocol, websockets) in PROTOCOLS {
            comes_back(&|args| kubectl(t, websockets, args), "p", &sent, protocol);
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_cannot_be_run_says_why() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        t.run_pod("ended", json!({"containers": [busybox("true")]})).await;
        for (protocol, websockets) in PROTOCOLS {
            let missing = run(t, websockets, &["exec", "p", "--", "no-such-program"], b"");
            assert!(!missing.status.success(), "{protocol}");
            assert!(text(&missing.stderr).contains("no-such-program"), "{protocol}: {}", text(&missing.stderr));
            let ended = run(t, websockets, &["exec", "ended", "--", "true"], b"");
            assert_eq!(ended.status.code(), Some(1), "{protocol}");
            assert!(text(&ended.stderr).contains("completed pod"), "{protocol}: {}", text(&ended.stderr));
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_does_not_run_is_not_found() {
    on_shared_node(async |t| {
        let one = with(busybox("exit 1"), json!({"name": "failing"}));
        t.pod("p", json!({"restartPolicy": "Never", "containers": [busybox(STAY), one]})).await;
        let ended = |pod: &Pod| crate::harness::pods::exit_code(pod, "failing").is_some();
        t.until("p", "one container ended", ended).await;
        for (protocol, websockets) in PROTOCOLS {
            let refused = text(&run(t, websockets, &["exec", "p", "-c", "failing", "--", "true"], b"").stderr);
            assert!(refused.contains(r#"container not found ("failing")"#), "{protocol}: {refused}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn attach_joins_the_containers_own_process() {
    on_shared_node(async |t| {
        for (protocol, websockets) in PROTOCOLS {
            joins(t, &|args| kubectl(t, websockets, args), &protocol.to_lowercase(), protocol).await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn files_are_copied_both_ways() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let folder = tempfile::tempdir().unwrap();
        let local = |name: &str| folder.path().join(name).display().to_string();
        let sent: Vec<u8> = (0..5_000_003_u32).map(|n| u8::try_from(n % 253).unwrap()).collect();
        std::fs::write(local("sent"), &sent).unwrap();
        t.kubectl_text(&["cp", &local("sent"), "p:/tmp/file"]);
        t.kubectl_text(&["cp", "p:/tmp/file", &local("came")]);
        assert!(std::fs::read(local("came")).unwrap() == sent);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn hundreds_of_connections_are_forwarded_and_half_closed() {
    on_shared_node(async |t| {
        t.pod("p", json!({"containers": [{"name": "main", "image": DEBIAN, "command": ["perl", "-e", ECHO]}]})).await;
        t.log_with("p", "main", "up").await;
        for (protocol, websockets) in PROTOCOLS {
            let (_child, _lines, port) = forward(t, websockets, "p", 8080).await;
            let mut connections = JoinSet::new();
            for number in 0..200 {
                connections.spawn(async move {
                    let sent = format!("connection {number} ").repeat(500);
                    is_echoed(port, sent.as_bytes(), &format!("connection {number}")).await;
                });
            }
            while let Some(ended) = connections.join_next().await {
                ended.unwrap_or_else(|error| panic!("{protocol}: {error}"));
            }
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_port_on_which_nobody_listens_is_told() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            let mut command = kubectl(t, websockets, &["port-forward", "p", ":9", "--address=127.0.0.1"]);
            command.stderr(Stdio::piped());
            let (mut child, _lines, first) = background(command).await;
            let mut stream = TcpStream::connect(("127.0.0.1", local_port(&first))).await.unwrap();
            // kubectl closes it; how is its own affair.
            let _ = tokio::time::timeout(SOON, stream.read(&mut [0])).await.unwrap();
            let mut errors = BufReader::new(child.stderr.take().unwrap()).lines();
            let said = tokio::time::timeout(SOON, async {
                while let Ok(Some(line)) = errors.next_line().await {
                    if line.contains("error forwarding port 9 to pod p") {
                        return line;
                    }
                }
                String::new()
            });
            assert!(said.await.unwrap().contains("refused"), "{protocol}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_stream_on_which_nothing_happens_ends_in_its_time() {
    on_own_node("idles", Options::config("streamingConnectionIdleTimeout: 2s\n"), async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            let began = std::time::Instant::now();
            // What says something now and then is not idle.
            let ended =
                run(t, websockets, &["exec", "p", "--", "sh", "-c", "for i in 1 2 3; do sleep 1; echo $i; done"], b"");
            assert!(ended.status.success(), "{protocol}: {}", String::from_utf8_lossy(&ended.stderr));
            let ended = run(t, websockets, &["exec", "p", "--", "sleep", "120"], b"");
            // Over SPDY kubectl takes the end of a connection for the end of the command.
            assert!(!ended.status.success() || protocol == "SPDY", "{protocol}");
            assert!(began.elapsed() < Duration::from_secs(60), "{protocol}: {:?}", began.elapsed());
            let (mut child, _lines, port) = forward(t, websockets, "p", 8080).await;
            let _ = TcpStream::connect(("127.0.0.1", port)).await;
            tokio::time::timeout(Duration::from_secs(60), child.wait()).await.expect("kubectl ends").unwrap();
        }
    });
}

/// Bytes that go both ways at once through one exec; 1 GiB with `LAMBDALET_TEST_EXEC_BYTES=1073741824`.
fn many_bytes() -> usize {
    std::env::var("LAMBDALET_TEST_EXEC_BYTES").ok().map_or(256 << 20, |bytes| bytes.parse().unwrap())
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn very_much_goes_through_an_exec_both_ways_intact() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let size = many_bytes();
        for (protocol, websockets) in PROTOCOLS {
            let began = std::time::Instant::now();
            goes_both_ways(kubectl(t, websockets, &["exec", "-i", "p", "--", "cat"]), size, protocol);
            let megabytes = size as f64 / 1e6 / began.elapsed().as_secs_f64();
            println!("{protocol}: {size} bytes in and out in {:?}: {megabytes:.0} MB/s each way", began.elapsed());
        }
    });
}

/// The same as [`comes_back`] without all of it in memory.
fn goes_both_ways(mut command: Command, size: usize, how: &str) {
    const PERIOD: usize = 251;
    let pattern: Vec<u8> = (0..PERIOD * 4096).map(|n| u8::try_from(n % PERIOD).unwrap()).collect();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (seen, intact) = std::thread::scope(|scope| {
        let pattern = &pattern;
        scope.spawn(move || {
            let mut left = size;
            // It fails once nobody reads any more, which is told below.
            while left > 0 && stdin.write_all(&pattern[..left.min(pattern.len())]).is_ok() {
                left -= left.min(pattern.len());
            }
        });
        let (mut seen, mut buffer) = (0, vec![0; 128 << 10]);
        loop {
            let read = stdout.read(&mut buffer).unwrap();
            let start = seen % PERIOD;
            let intact = buffer[..read] == pattern[start..start + read];
            if read == 0 || !intact {
                // Or kubectl would wait for a reader, and the thread above for kubectl.
                drop(stdout);
                return (seen, intact);
            }
            seen += read;
        }
    });
    assert!(intact, "{how}: differs after {seen} bytes");
    assert_eq!(seen, size, "{how}");
    assert!(child.wait().unwrap().success(), "{how}");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_node_declares_what_it_serves() {
    on_shared_node(async |t| {
        let node: Node = Api::all(t.client.clone()).get(&t.node.name).await.unwrap();
        let declared = node.status.unwrap().declared_features.unwrap_or_default();
        assert!(declared.contains(&"ExtendWebSocketsToKubelet".to_owned()), "{declared:?}");
    });
}
