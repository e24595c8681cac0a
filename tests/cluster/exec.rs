//! `kubectl exec`, `attach`, `cp` and `port-forward`, over WebSocket and over SPDY, through a real API server.

use std::io::Write as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::harness::node::Options;
use crate::harness::pods::{STAY, busybox, busybox_with, sleeper, with};
use crate::harness::wait::{SOON, poll};
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

fn kubectl(t: &Case, websockets: &str, args: &[&str]) -> std::process::Command {
    let mut command = t.cluster.kubectl(&[&["-n", &t.namespace], args].concat());
    command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets).env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
    command
}

/// Runs kubectl to its end with this input.
pub(crate) fn run(t: &Case, websockets: &str, args: &[&str], input: &[u8]) -> Output {
    run_command(kubectl(t, websockets, args), input)
}

fn run_command(mut command: std::process::Command, input: &[u8]) -> Output {
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
async fn background(mut command: std::process::Command) -> (Child, BufReader<ChildStdout>, String) {
    command.stdout(Stdio::piped());
    let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    tokio::time::timeout(SOON, lines.read_line(&mut first)).await.unwrap().unwrap();
    (child, lines, first)
}

/// Forwards to a port of a Pod; kubectl, and the local port.
async fn forward(t: &Case, websockets: &str, pod: &str, port: u16) -> (Child, BufReader<ChildStdout>, u16) {
    let (child, lines, first) =
        background(kubectl(t, websockets, &["port-forward", pod, &format!(":{port}"), "--address=127.0.0.1"])).await;
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
        let sent: Vec<u8> = (0..24_u32 << 20).map(|n| u8::try_from((n * 31 + n / 1021) % 256).unwrap()).collect();
        for (protocol, websockets) in PROTOCOLS {
            let ended = run(t, websockets, &["exec", "-i", "p", "--", "cat"], &sent);
            assert!(ended.status.success(), "{protocol}: {}", text(&ended.stderr));
            assert!(ended.stdout == sent, "{protocol}: {} of {} bytes came back", ended.stdout.len(), sent.len());
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
fn a_terminal_is_a_terminal_of_the_clients_size() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            let command = kubectl(t, websockets, &["exec", "-it", "p", "--", "sh", "-c", "sleep 1; tty; stty size"]);
            let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
            let line = words.iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
            // util-linux' script gives kubectl a terminal.
            let mut script = std::process::Command::new("script");
            script.args(["-qec", &format!("stty rows 33 cols 99; {line}"), "/dev/null"]).stdin(Stdio::null());
            for (name, value) in command.get_envs() {
                script.env(name, value.unwrap_or_default());
            }
            let out = text(&script.output().unwrap().stdout);
            assert!(out.contains("/dev/pts/") && out.contains("33 99"), "{protocol}: {out}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_client_that_is_killed_takes_its_command_along() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            let script = "echo $$; exec tail -f /dev/null";
            let (mut child, _lines, pid) =
                background(kubectl(t, websockets, &["exec", "p", "--", "sh", "-c", script])).await;
            let is_there = || t.kubectl(&["exec", "p", "--", "test", "-d", &format!("/proc/{}", pid.trim())]).is_ok();
            assert!(is_there(), "{protocol}");
            child.kill().await.unwrap();
            poll("free of the command", Duration::from_secs(5), async || {
                if is_there() { Err(format!("{protocol}: {pid} still runs")) } else { Ok(()) }
            })
            .await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn attach_joins_the_containers_own_process() {
    on_shared_node(async |t| {
        for (protocol, websockets) in PROTOCOLS {
            let name = protocol.to_lowercase();
            let echo = busybox_with("echo up; cat; echo done", json!({"stdin": true, "stdinOnce": true}));
            t.pod(&name, json!({"restartPolicy": "Never", "containers": [echo]})).await;
            t.log_with(&name, "main", "up").await;
            let attached = run(t, websockets, &["attach", "-i", &name], b"hello\n");
            assert!(attached.status.success(), "{protocol}: {}", text(&attached.stderr));
            assert!(text(&attached.stdout).contains("hello\n"), "{protocol}: {}", text(&attached.stdout));
            let ended = t.until(&name, "at its end", crate::harness::pods::has_ended).await;
            assert_eq!(crate::harness::pods::phase(&ended), "Succeeded", "{protocol}");
            assert!(t.log(&name, "main").await.contains("hello\ndone"), "{protocol}");
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
                    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let sent = format!("connection {number} ").repeat(500);
                    stream.write_all(sent.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                    let mut came = String::new();
                    tokio::time::timeout(Duration::from_secs(60), stream.read_to_string(&mut came))
                        .await
                        .unwrap()
                        .unwrap();
                    assert!(came == sent, "connection {number}: {} of {} bytes", came.len(), sent.len());
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
            let port: u16 = first.split("127.0.0.1:").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
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
fn older_websocket_clients_are_passed_through() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let proxy = t.cluster.kubectl(&["proxy", "--port=0", "--reject-paths=^$", "--reject-methods=^$"]);
        let (_child, _lines, first) = background(proxy).await;
        let address = first.trim().rsplit(' ').next().unwrap().to_owned();
        for protocol in ["", "channel.k8s.io", "v4.channel.k8s.io"] {
            let query = "stdin=1&stdout=1&stderr=1&command=sh&command=-c&command=cat%3B+echo+end";
            let url = format!("ws://{address}/api/v1/namespaces/{}/pods/p/exec?{query}", t.namespace);
            let mut request = url.into_client_request().unwrap();
            if !protocol.is_empty() {
                request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
            }
            let stream = TcpStream::connect(&address).await.unwrap();
            let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
            socket.send(Message::binary(b"\0hello".to_vec())).await.unwrap();
            let mut came = Vec::new();
            while !came.ends_with(b"hello") {
                match socket.next().await.unwrap().unwrap() {
                    Message::Binary(bytes) if bytes.first() == Some(&1) => came.extend_from_slice(&bytes[1..]),
                    Message::Binary(_) | Message::Ping(_) | Message::Pong(_) => {}
                    other => panic!("{protocol:?}: {other:?}"),
                }
            }
            socket.close(None).await.unwrap();
        }
    });
}

/// Whether a process with these words, one after the other, runs anywhere on this host.
fn runs_on_host(words: [&str; 2]) -> bool {
    let wanted: Vec<u8> = words.iter().flat_map(|word| word.bytes().chain([0])).collect();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path().join("cmdline")));
    processes.filter_map(|path| std::fs::read(path).ok()).any(|line| line == wanted)
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn no_command_outlives_the_node_that_ran_it() {
    on_own_node("execs", Options::default(), async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        // The second one is deaf to a hang-up.
        for (number, deaf) in [("192837465", ""), ("192837466", "trap '' HUP; ")] {
            let script = format!("{deaf}echo up; exec sleep {number}");
            let start = || background(kubectl(t, "true", &["exec", "-i", "p", "--", "sh", "-c", &script]));
            let (_child, _lines, _up) = start().await;
            assert!(runs_on_host(["sleep", number]));
            t.node.stop(Duration::from_secs(15)).await;
            assert!(!runs_on_host(["sleep", number]), "a node that was told to end ends what clients had started");
            t.node.spawn(&[]);
            t.node.adopted(&t.client).await;
            t.log_with("p", "main", "up").await;

            let (_child, _lines, _up) = start().await;
            t.node.kill9();
            assert!(runs_on_host(["sleep", number]), "nobody was there to end it");
            t.node.spawn(&[]);
            t.node.adopted(&t.client).await;
            poll("free of the command", Duration::from_secs(5), async || {
                if runs_on_host(["sleep", number]) { Err(format!("sleep {number} still runs")) } else { Ok(()) }
            })
            .await;
            t.log_with("p", "main", "up").await;
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
    std::env::var("LAMBDALET_TEST_EXEC_BYTES").ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(256 << 20)
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn very_much_goes_through_an_exec_both_ways_intact() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let pattern: Vec<u8> = (0..251 * 4096_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let size = many_bytes();
        let mut command = kubectl(t, "true", &["exec", "-i", "p", "--", "cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let began = std::time::Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut left = size;
                while left > 0 {
                    let piece = left.min(pattern.len());
                    stdin.write_all(&pattern[..piece]).unwrap();
                    left -= piece;
                }
                drop(stdin);
            });
            let (mut seen, mut buffer) = (0, vec![0; 128 << 10]);
            loop {
                let read = std::io::Read::read(&mut stdout, &mut buffer).unwrap();
                if read == 0 {
                    break;
                }
                let start = seen % 251;
                assert!(buffer[..read] == pattern[start..start + read], "differs after {seen} bytes");
                seen += read;
            }
            assert_eq!(seen, size);
        });
        assert!(child.wait().unwrap().success());
        let megabytes = size as f64 / 1e6 / began.elapsed().as_secs_f64();
        println!("{size} bytes in and out in {:?}: {megabytes:.0} MB/s each way", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_kubectl_of_1_32_is_served_too() {
    let Some(program) = std::env::var_os("LAMBDALET_TEST_KUBECTL_1_32") else {
        println!(
            "skipped: LAMBDALET_TEST_KUBECTL_1_32 is not set to a kubectl of 1.32 (hack/build-tools kubectl-1.32)"
        );
        return;
    };
    on_shared_node(async |t| {
        t.pod("p", json!({"containers": [{"name": "main", "image": DEBIAN, "command": ["perl", "-e", ECHO]}]})).await;
        t.log_with("p", "main", "up").await;
        for (protocol, websockets) in PROTOCOLS {
            let old = |args: &[&str]| of_program(&program, kubectl(t, websockets, args));
            let version = text(&old(&["version", "--client"]).output().unwrap().stdout);
            assert!(version.contains("v1.32."), "{version}");
            let script = "cat; echo to err >&2; exit 7";
            let ended = run_command(old(&["exec", "-i", "p", "--", "sh", "-c", script]), b"hello\n");
            assert_eq!((text(&ended.stdout), ended.status.code()), ("hello\n".to_owned(), Some(7)), "{protocol}");
            assert!(text(&ended.stderr).starts_with("to err\n"), "{protocol}: {}", text(&ended.stderr));
            assert_eq!(text(&old(&["logs", "p"]).output().unwrap().stdout), "up\n", "{protocol}");

            let folder = tempfile::tempdir().unwrap();
            let local = |name: &str| folder.path().join(name).display().to_string();
            let sent: Vec<u8> = (0..5_000_003_u32).map(|n| u8::try_from(n % 253).unwrap()).collect();
            std::fs::write(local("sent"), &sent).unwrap();
            for (from, to) in [(local("sent"), "p:/tmp/file".to_owned()), ("p:/tmp/file".to_owned(), local("came"))] {
                let copied = old(&["cp", &from, &to]).output().unwrap();
                assert!(copied.status.success(), "{protocol}: {}", text(&copied.stderr));
            }
            assert!(std::fs::read(local("came")).unwrap() == sent, "{protocol}");

            let forwarding = old(&["port-forward", "p", ":8080", "--address=127.0.0.1"]);
            let (_child, _lines, first) = background(forwarding).await;
            let mut stream = TcpStream::connect(("127.0.0.1", local_port(&first))).await.unwrap();
            stream.write_all(&sent[..100_000]).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut came = Vec::new();
            tokio::time::timeout(SOON, stream.read_to_end(&mut came)).await.unwrap().unwrap();
            assert!(came == sent[..100_000], "{protocol}: {} bytes", came.len());
        }
    });
}

/// The same command line and environment for another kubectl.
fn of_program(program: &std::ffi::OsStr, command: std::process::Command) -> std::process::Command {
    let mut other = std::process::Command::new(program);
    other.args(command.get_args());
    for (name, value) in command.get_envs() {
        other.env(name, value.unwrap_or_default());
    }
    other
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
