//! What is promised of commands and streams.

use std::time::{Duration, Instant};

use lambdalet_proto::cri::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::support::{PATIENCE, World, refused};

pub(crate) async fn exec_sync(
    world: &mut World,
    id: &str,
    text: &str,
    timeout: i64,
) -> Result<v1::ExecSyncResponse, tonic::Status> {
    let request = v1::ExecSyncRequest { container_id: id.into(), cmd: world.command(text), timeout };
    world.runtime.exec_sync(request).await.map(tonic::Response::into_inner)
}

pub(crate) async fn exec_url(world: &mut World, id: &str, text: &str) -> String {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: world.command(text),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    };
    world.runtime.exec(request).await.unwrap().into_inner().url
}

/// Address and path of a URL.
pub(crate) fn parts(url: &str) -> (String, String) {
    let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    (address.to_owned(), format!("/{path}"))
}

/// What is answered to a request with these headers, until the server closes or the text contains `wanted`.
pub(crate) async fn ask(url: &str, headers: &str, wanted: &str) -> Vec<u8> {
    let (address, path) = parts(url);
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let read = async {
        let mut piece = [0; 4096];
        loop {
            let length = socket.read(&mut piece).await.unwrap();
            all.extend_from_slice(&piece[..length]);
            let found = all.windows(wanted.len().max(1)).any(|part| part == wanted.as_bytes());
            if length == 0 || found {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("an answer comes");
    all
}

const WEBSOCKET: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n";

#[tokio::test]
async fn a_commands_output_and_exit_code_are_told() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let done = exec_sync(&mut world, &id, "print out warn err exit 4", 10).await.unwrap();
    assert_eq!((&done.stdout[..], &done.stderr[..], done.exit_code), (&b"out\n"[..], &b"err\n"[..], 4));
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_ended() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let began = Instant::now();
    assert_eq!(refused(exec_sync(&mut world, &id, "sleep 60000", 1).await), Code::DeadlineExceeded);
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_command_without_a_limit_ends_when_it_ends() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let done = exec_sync(&mut world, &id, "sleep 100 print late exit 0", 0).await.unwrap();
    assert_eq!((&done.stdout[..], done.exit_code), (&b"late\n"[..], 0));
}

#[tokio::test]
async fn a_command_that_writes_too_much_ends_all_the_same_and_the_rest_is_dropped() {
    const MUCH: usize = 20 << 20;
    let mut world = World::new().await;
    let folder = tempfile::tempdir().unwrap();
    let sandbox = world.sandbox("a").await;
    let mut config = world.container("main", "sleep 60000");
    let mut cmd = vec!["sh".to_owned(), "-c".to_owned(), format!("head -c {MUCH} /dev/zero")];
    if world.is_in_memory() {
        let host_path = folder.path().join("much").display().to_string();
        std::fs::write(&host_path, vec![0; MUCH]).unwrap();
        config.mounts = vec![v1::Mount { container_path: "/much".into(), host_path, ..Default::default() }];
        cmd = ["cat", "/much", "exit", "0"].map(str::to_owned).to_vec();
    }
    let container_id = world.create_from(&sandbox, config).await.unwrap();
    world.start(&container_id).await.unwrap();
    let request = v1::ExecSyncRequest { container_id, cmd, timeout: 60 };
    let done = world.runtime.exec_sync(request).await.unwrap().into_inner();
    assert!((15 << 20..=16 << 20).contains(&done.stdout.len()) && done.exit_code == 0, "{}", done.stdout.len());
}

#[tokio::test]
async fn a_command_that_is_not_there_says_so() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let done = exec_sync(&mut world, &id, "missing", 10).await;
    assert!(done.is_err() || done.as_ref().is_ok_and(|done| done.exit_code != 0), "{done:?}");
}

#[tokio::test]
async fn a_command_for_a_container_that_does_not_run_is_refused() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "exit 0").await.unwrap();
    refused(exec_sync(&mut world, &id, "exit 0", 10).await);
    world.start(&id).await.unwrap();
    world.ended(&id).await;
    refused(exec_sync(&mut world, &id, "exit 0", 10).await);
}

#[tokio::test]
async fn a_command_for_what_is_not_there_is_not_found() {
    let mut world = World::new().await;
    assert_eq!(refused(exec_sync(&mut world, "never-was", "exit 0", 10).await), Code::NotFound);
}

#[tokio::test]
async fn a_command_of_no_words_is_refused() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    refused(exec_sync(&mut world, &id, "", 10).await);
}

#[tokio::test]
async fn a_url_leads_to_the_streams_of_a_command() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "print hello exit 0").await;
    let answer = ask(&url, WEBSOCKET, "\"Success\"").await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 101") && text.contains("hello\n"), "{text}");
}

#[tokio::test]
async fn a_url_is_good_once() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "exit 0").await;
    ask(&url, WEBSOCKET, "\"Success\"").await;
    let again = ask(&url, WEBSOCKET, "404").await;
    assert!(again.starts_with(b"HTTP/1.1 404"), "{}", String::from_utf8_lossy(&again));
}

#[tokio::test]
async fn a_url_that_was_guessed_leads_nowhere() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "exit 0").await;
    let (address, _) = parts(&url);
    let guessed = format!("http://{address}/exec/{}", "0".repeat(32));
    assert!(ask(&guessed, WEBSOCKET, "404").await.starts_with(b"HTTP/1.1 404"));
}

#[tokio::test]
async fn a_command_that_fails_tells_its_code_on_the_stream() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "exit 4").await;
    let answer = ask(&url, WEBSOCKET, "\"Failure\"").await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("NonZeroExitCode") && text.contains("\"4\""), "{text}");
}

#[tokio::test]
async fn a_process_can_be_joined() {
    let mut world = World::new().await;
    let words = "sleep 500 print joined ".repeat(40);
    let id = world.started("a", &words).await;
    let request = v1::AttachRequest { container_id: id, stdout: true, stderr: true, ..Default::default() };
    let url = world.runtime.attach(request).await.unwrap().into_inner().url;
    assert!(String::from_utf8_lossy(&ask(&url, WEBSOCKET, "joined").await).contains("joined"));
}

#[tokio::test]
async fn ports_are_forwarded() {
    let mut world = World::new().await;
    world.started("a", "listen 80 sleep 60000").await;
    let pod_sandbox_id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let request = v1::PortForwardRequest { pod_sandbox_id, port: vec![80] };
    let url = world.runtime.port_forward(request).await.unwrap().into_inner().url;
    // The channel of the port's errors begins with its number: a message of three bytes.
    let answer = ask(&url, WEBSOCKET, "\u{3}\u{1}P\0").await;
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn ports_of_what_is_not_there_are_not_found() {
    let mut world = World::new().await;
    let unknown = v1::PortForwardRequest { pod_sandbox_id: "never-was".into(), port: vec![80] };
    assert_eq!(refused(world.runtime.port_forward(unknown).await), Code::NotFound);
}

#[tokio::test]
async fn streams_that_make_no_sense_are_refused() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let cmd = world.command("exit 0");
    let request = v1::ExecRequest { container_id: id, cmd, ..Default::default() };
    assert_eq!(refused(world.runtime.exec(request.clone()).await), Code::InvalidArgument, "no stream at all");
    let both = v1::ExecRequest { tty: true, stdout: true, stderr: true, ..request };
    assert_eq!(refused(world.runtime.exec(both).await), Code::InvalidArgument, "a terminal with two outputs");
}
