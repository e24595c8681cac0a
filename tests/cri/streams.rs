//! What is promised of commands and streams.

use std::time::{Duration, Instant};

use lambdalet_proto::cri::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::support::{PATIENCE, World, refused};

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

async fn exec_sync(
    world: &mut World,
    id: &str,
    text: &str,
    timeout: i64,
) -> Result<v1::ExecSyncResponse, tonic::Status> {
    let request = v1::ExecSyncRequest { container_id: id.into(), cmd: words(text), timeout };
    world.runtime.exec_sync(request).await.map(tonic::Response::into_inner)
}

async fn exec_url(world: &mut World, id: &str, text: &str) -> String {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: words(text),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    };
    world.runtime.exec(request).await.unwrap().into_inner().url
}

/// Address and path of a URL.
fn parts(url: &str) -> (String, String) {
    let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    (address.to_owned(), format!("/{path}"))
}

/// What is answered to a request with these headers, until the server closes or the text contains `wanted`.
async fn ask(url: &str, headers: &str, wanted: &str) -> Vec<u8> {
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
async fn commands_are_for_containers_that_run() {
    let mut world = World::new().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    assert_eq!(refused(exec_sync(&mut world, &id, "exit 0", 1).await), Code::FailedPrecondition);
    assert_eq!(refused(exec_sync(&mut world, "never-was", "exit 0", 1).await), Code::NotFound);
    world.start(&id).await.unwrap();
    assert_eq!(refused(exec_sync(&mut world, &id, "", 1).await), Code::InvalidArgument);
    assert_eq!(refused(exec_sync(&mut world, &id, "exit 0", -1).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_url_leads_to_the_streams_of_a_command_once() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "print hello exit 0").await;
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let answer = ask(&url, WEBSOCKET, "\"Success\"").await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 101") && text.contains("hello\n"), "{text}");
    let again = ask(&url, WEBSOCKET, "minute").await;
    assert!(again.starts_with(b"HTTP/1.1 404"), "a ticket is good once");
}

#[tokio::test]
async fn a_url_is_no_use_to_who_guesses_or_does_not_upgrade() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "exit 0").await;
    let (address, path) = parts(&url);
    let guessed = format!("http://{address}/exec/{}", "0".repeat(32));
    assert!(ask(&guessed, WEBSOCKET, "minute").await.starts_with(b"HTTP/1.1 404"));
    let elsewhere = format!("http://{address}{}", path.replace("/exec/", "/attach/"));
    assert!(ask(&elsewhere, WEBSOCKET, "minute").await.starts_with(b"HTTP/1.1 404"));
    let url = exec_url(&mut world, &id, "exit 0").await;
    assert!(ask(&url, "", "upgrade").await.starts_with(b"HTTP/1.1 400"));
}

#[tokio::test]
async fn a_process_can_be_joined() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::AttachRequest { container_id: id.clone(), stdout: true, ..Default::default() };
    let url = world.runtime.attach(request).await.unwrap().into_inner().url;
    let asked = tokio::spawn(async move { ask(&url, WEBSOCKET, "joined").await });
    let fake = world.fake.clone();
    // What is written before the client is there is not for it.
    while !asked.is_finished() {
        fake.append_log(&id.as_str().into(), lambdalet::runtime::types::LogSource::Stdout, b"joined\n");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(String::from_utf8_lossy(&asked.await.unwrap()).contains("joined"));
}

#[tokio::test]
async fn ports_are_forwarded() {
    let mut world = World::new().await;
    let id = world.started("a", "listen 80 sleep 60000").await;
    let sandboxes = world.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner();
    let sandbox = sandboxes.items[0].id.clone();
    assert!(!id.is_empty());
    let request = v1::PortForwardRequest { pod_sandbox_id: sandbox.clone(), port: vec![80] };
    let url = world.runtime.port_forward(request).await.unwrap().into_inner().url;
    // The channel of the port's errors begins with its number: a message of three bytes.
    let answer = ask(&url, WEBSOCKET, "\u{3}\u{1}P\0").await;
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{answer:?}");
    let wrong = v1::PortForwardRequest { pod_sandbox_id: sandbox, port: vec![70_000] };
    assert_eq!(refused(world.runtime.port_forward(wrong).await), Code::InvalidArgument);
    let unknown = v1::PortForwardRequest { pod_sandbox_id: "never-was".into(), port: vec![80] };
    assert_eq!(refused(world.runtime.port_forward(unknown).await), Code::NotFound);
}

#[tokio::test]
async fn streams_that_make_no_sense_are_refused() {
    let mut world = World::new().await;
    let id = world.started("a", "sleep 60000").await;
    let request = v1::ExecRequest { container_id: id, cmd: words("exit 0"), ..Default::default() };
    assert_eq!(refused(world.runtime.exec(request.clone()).await), Code::InvalidArgument);
    let both = v1::ExecRequest { tty: true, stdout: true, stderr: true, ..request.clone() };
    assert_eq!(refused(world.runtime.exec(both).await), Code::InvalidArgument);
    let nothing = v1::ExecRequest { cmd: Vec::new(), stdout: true, ..request };
    assert_eq!(refused(world.runtime.exec(nothing).await), Code::InvalidArgument);
}
