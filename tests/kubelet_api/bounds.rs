//! One client cannot starve the others.

use std::time::{Duration, Instant};

use futures::StreamExt;
use http::Method;
use lambdalet::kubelet_api::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::spdy::Spdy;
use crate::support::{Node, Setup, eventually, request, tls};

fn limited(limits: Limits) -> Setup {
    Setup { limits, ..Setup::default() }
}

#[tokio::test]
async fn stalled_strangers_give_way() {
    let node = Node::start(limited(Limits { connections: 4, ..Limits::default() })).await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        stalled.push(TcpStream::connect(node.address).await.unwrap());
    }
    // Strangers past the handshake give way as well.
    for _ in 0..4 {
        let mut stranger = node.connect(None).await.unwrap();
        assert_eq!(stranger.status("/pods", None).await, 401);
        std::mem::forget(stranger);
    }
    assert_eq!(node.get("/healthz").await.0, 200);
    let mut byte = [0];
    let closed = tokio::time::timeout(Duration::from_secs(2), stalled[0].read(&mut byte)).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)));
}

#[tokio::test]
async fn when_every_place_is_in_use_a_newcomer_is_told() {
    let node = Node::start(limited(Limits { connections: 1, ..Limits::default() })).await;
    node.world.set_log(|| Ok(futures::stream::pending().boxed()));
    let mut following = node.api_server().await;
    let log = following.open("/containerLogs/ns/p/c?follow=true", None).await.unwrap();
    assert_eq!(log.status(), 200);
    let (status, body) = node.get("/healthz").await;
    assert_eq!((status, body.as_str()), (503, "too many connections: all 1 are in use\n"));
    drop((log, following));
    let mut served = false;
    for _ in 0..100 {
        served = node.get("/healthz").await.0 == 200;
        if served {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(served);
}

#[tokio::test]
async fn who_idles_gives_way_and_who_is_served_does_not() {
    let node = Node::start(limited(Limits { connections: 3, ..Limits::default() })).await;
    node.world.set_log(|| Ok(futures::stream::pending().boxed()));
    let mut following = node.api_server().await;
    let mut log = following.open("/containerLogs/ns/p/c?follow=true", None).await.unwrap().into_body();
    let mut spdy =
        Spdy::connect(&node, "/exec/ns/p/c?output=1&command=sleep", &["v4.channel.k8s.io"]).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    assert!(eventually(5, || node.world.processes.running() == 1).await);
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut client = node.api_server().await;
        assert_eq!(client.status("/healthz", None).await, 200);
        idle.push(client);
    }
    assert!(idle[0].get("/healthz", None).await.is_err());
    assert_eq!(idle[2].status("/healthz", None).await, 200);
    assert_eq!(node.world.processes.running(), 1);
    let quiet = tokio::time::timeout(Duration::from_millis(100), http_body_util::BodyExt::frame(&mut log)).await;
    assert!(quiet.is_err());
}

#[tokio::test]
async fn a_handshake_that_stalls_is_closed() {
    let node = Node::start(limited(Limits { handshake: Duration::from_millis(200), ..Limits::default() })).await;
    let mut stalled = TcpStream::connect(node.address).await.unwrap();
    stalled.write_all(&[0x16, 3, 1]).await.unwrap();
    let began = Instant::now();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(5), stalled.read_to_end(&mut rest)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_connection_that_sends_no_request_is_closed() {
    let node = Node::start(limited(Limits { request_head: Duration::from_millis(600), ..Limits::default() })).await;
    let mut idle = node.api_server().await;
    assert_eq!(idle.status("/healthz", None).await, 200);
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert!(idle.get("/healthz", None).await.is_err());
    // An answer that takes longer than that is not cut short.
    node.world.set_log(|| Ok(futures::stream::pending().boxed()));
    let mut following = node.api_server().await;
    let mut log = following.open("/containerLogs/ns/p/c?follow=true", None).await.unwrap().into_body();
    let quiet = tokio::time::timeout(Duration::from_millis(1000), http_body_util::BodyExt::frame(&mut log)).await;
    assert!(quiet.is_err());
}

#[tokio::test]
async fn a_request_head_too_large_is_431() {
    let node = Node::start(Setup::default()).await;
    let mut client = node.api_server().await;
    let mut bomb = request(Method::GET, "/healthz", None);
    bomb.headers_mut().insert("x-bomb", "b".repeat(1 << 20).parse().unwrap());
    // The answer may come before all is sent, and the connection is closed then.
    if let Ok(response) = client.send(bomb).await {
        assert_eq!(response.status(), 431);
    }
    let mut client = node.api_server().await;
    let mut many = request(Method::GET, "/healthz", None);
    for number in 0..500 {
        let name: http::HeaderName = format!("x-{number}").parse().unwrap();
        many.headers_mut().insert(name, "1".parse().unwrap());
    }
    assert_eq!(client.send(many).await.unwrap().status(), 431);
    // A long token is no bomb.
    let mut client = node.connect(None).await.unwrap();
    assert_eq!(client.status("/healthz", Some(&"t".repeat(30_000))).await, 401);
    assert_eq!(node.get("/healthz").await.0, 200);
}

/// Sends a request with a body by hand, and another on the same connection; the answers' codes, as far as they come.
async fn with_body(node: &Node, length: usize, sent: usize) -> Vec<String> {
    let identity = Some(node.authority.api_server());
    let mut io = tls(node.address, identity, rustls::ALL_VERSIONS, &["http/1.1"]).await.unwrap();
    let head = format!("POST /checkpoint/ns/none/c HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    // Whoever does not want all of it may close the connection meanwhile.
    let _ = io.write_all(&vec![b'x'; sent]).await;
    let _ = io.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    let mut answers = Vec::new();
    let _ = io.read_to_end(&mut answers).await;
    let answers = String::from_utf8_lossy(&answers).into_owned();
    answers.lines().filter_map(|line| line.strip_prefix("HTTP/1.1 ")).map(|line| line[..3].to_owned()).collect()
}

#[tokio::test]
async fn a_body_that_nobody_wants_is_read_before_the_answer() {
    let node = Node::start(Setup::default()).await;
    node.cluster.granted.lock().unwrap().push("checkpoint");
    assert_eq!(with_body(&node, 200_000, 200_000).await, ["404", "200"]);
    // Not without end.
    assert_eq!(with_body(&node, 1 << 30, 300_000).await, ["404"]);
    assert_eq!(node.get("/healthz").await.0, 200);
}

#[tokio::test]
async fn noise_instead_of_tls_harms_nobody() {
    let node = Node::start(Setup::default()).await;
    for noise in [&b"GET /healthz HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0x16, 3, 1, 0xff, 0xff, 1]] {
        let mut client = TcpStream::connect(node.address).await.unwrap();
        client.write_all(noise).await.unwrap();
    }
    assert_eq!(node.get("/healthz").await.0, 200);
}
