//! port-forward over SPDY: many pairs, half-closed connections, ports that refuse.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::spdy::{ServerFrame, Spdy};
use crate::support::{Node, Setup};

const PROTOCOLS: &[&str] = &["portforward.k8s.io"];

pub(crate) async fn start() -> Node {
    Node::start(Setup::default()).await
}

/// A port that echoes until the end of what it is sent, then says how much it was.
pub(crate) async fn echo() -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut reader, mut writer) = stream.into_split();
                let count = tokio::io::copy(&mut reader, &mut writer).await.unwrap_or_default();
                let _ = writer.write_all(format!("|{count}").as_bytes()).await;
            });
        }
    });
    (port, tasks)
}

fn open(spdy: &mut Spdy, port: u16, request: &str) -> (u32, u32) {
    let port = port.to_string();
    let errors = spdy.writer.open(&[("streamtype", "error"), ("port", &port), ("requestid", request)]);
    let data = spdy.writer.open(&[("streamtype", "data"), ("port", &port), ("requestid", request)]);
    spdy.writer.frames.data(errors, &[], true);
    (errors, data)
}

#[tokio::test]
async fn a_half_closed_connection_gets_the_rest() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    let (errors, data) = open(&mut spdy, port, "0");
    spdy.writer.data(data, b"hello", true).await;
    let came = spdy.reader.until_ended(&[errors, data]).await;
    assert_eq!((&came[&data][..], &came[&errors][..]), (&b"hello|5"[..], &b""[..]));
}

#[tokio::test]
async fn hundreds_of_pairs_share_a_connection() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p/u", PROTOCOLS).await.ok().unwrap();
    for round in 0..5 {
        let mut pairs = Vec::new();
        for number in 0..200 {
            let (errors, data) = open(&mut spdy, port, &format!("{round}-{number}"));
            spdy.writer.frames.data(data, format!("pair {number}").as_bytes(), true);
            pairs.push((errors, data));
        }
        spdy.writer.send().await;
        let all: Vec<_> = pairs.iter().flat_map(|(errors, data)| [*errors, *data]).collect();
        let came = spdy.reader.until_ended(&all).await;
        for (number, (_, data)) in pairs.iter().enumerate() {
            let sent = format!("pair {number}");
            assert_eq!(String::from_utf8_lossy(&came[data]), format!("{sent}|{}", sent.len()));
        }
    }
}

#[tokio::test]
async fn streams_that_were_served_make_room_for_others() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    // More than a connection may have at once; the client never says that it is done with the error streams. With
    // three in one write the table is full in the middle of one.
    let port = port.to_string();
    for number in 0..3000 {
        let request = number.to_string();
        let stray = spdy.writer.open(&[("streamtype", "stray")]);
        let errors = spdy.writer.open(&[("streamtype", "error"), ("port", &port), ("requestid", &request)]);
        let data = spdy.writer.open(&[("streamtype", "data"), ("port", &port), ("requestid", &request)]);
        spdy.writer.data(data, b"x", true).await;
        let came = spdy.reader.until_ended(&[stray, errors, data]).await;
        assert_eq!(came[&data], b"x|1", "connection {number}");
    }
}

#[tokio::test]
async fn a_port_that_refuses_is_told_on_the_error_stream() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let (errors, data) = open(&mut spdy, closed, "0");
    spdy.writer.send().await;
    let came = spdy.reader.until_ended(&[errors, data]).await;
    let text = String::from_utf8_lossy(&came[&errors]).into_owned();
    assert!(text.starts_with(&format!("error forwarding port {closed} to pod p: failed to connect")), "{text}");
    // The connection goes on.
    let (port, _echo) = echo().await;
    let (errors, data) = open(&mut spdy, port, "1");
    spdy.writer.data(data, b"x", true).await;
    assert_eq!(spdy.reader.until_ended(&[errors, data]).await[&data], b"x|1");
}

#[tokio::test]
async fn a_port_that_breaks_off_resets_its_stream_and_no_other() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    let (errors, data) = open(&mut spdy, listener.local_addr().unwrap().port(), "0");
    spdy.writer.data(data, b"unread", false).await;
    let (mut server, _) = listener.accept().await.unwrap();
    server.read_exact(&mut [0]).await.unwrap();
    // Closing with something unread is a reset.
    drop(server);
    let (mut reset, mut ended) = (false, false);
    while !reset || !ended {
        match spdy.reader.next().await.unwrap() {
            ServerFrame::Reset { id, .. } if id == data => reset = true,
            ServerFrame::Data { id, bytes, ended: true } if id == errors && bytes.is_empty() => ended = true,
            ServerFrame::Reply(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let (errors, data) = open(&mut spdy, port, "1");
    spdy.writer.data(data, b"x", true).await;
    assert_eq!(spdy.reader.until_ended(&[errors, data]).await[&data], b"x|1");
}

#[tokio::test]
async fn a_stream_that_the_client_gives_up_closes_the_port() {
    let node = start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    let (errors, data) = open(&mut spdy, listener.local_addr().unwrap().port(), "0");
    spdy.writer.data(data, b"x", false).await;
    let (mut server, _) = listener.accept().await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    spdy.writer.frames.reset(data);
    spdy.writer.send().await;
    let closed = tokio::time::timeout(Duration::from_secs(10), server.read(&mut byte)).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)));
    spdy.reader.until_ended(&[errors]).await;
}

#[tokio::test]
async fn a_client_that_vanishes_closes_every_port() {
    let node = start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    for request in ["0", "1"] {
        open(&mut spdy, port, request);
    }
    spdy.writer.send().await;
    let mut servers = [listener.accept().await.unwrap().0, listener.accept().await.unwrap().0];
    drop(spdy);
    for server in &mut servers {
        let closed = tokio::time::timeout(Duration::from_secs(10), server.read(&mut [0])).await.unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)));
    }
}

#[tokio::test]
async fn streams_that_are_no_port_forward_are_reset() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, "/portForward/ns/p", PROTOCOLS).await.ok().unwrap();
    let wrong = [
        spdy.writer.open(&[("streamtype", "data")]),
        spdy.writer.open(&[("streamtype", "data"), ("port", "0")]),
        spdy.writer.open(&[("streamtype", "data"), ("port", "65536")]),
        spdy.writer.open(&[("streamtype", "stdin"), ("port", "80")]),
        spdy.writer.open(&[("streamtype", "data"), ("port", "80"), ("requestid", &"7".repeat(65))]),
    ];
    spdy.writer.send().await;
    for id in wrong {
        let frame = spdy.reader.next().await.unwrap();
        assert!(matches!(frame, ServerFrame::Reset { id: reset, .. } if reset == id), "{frame:?}");
    }
}

#[tokio::test]
async fn a_pod_without_a_sandbox_has_no_ports() {
    let node = start().await;
    for (path, status) in [("/portForward/ns/new", 500), ("/portForward/ns/q", 404), ("/portForward/ns/p/other", 404)] {
        let Err(answer) = Spdy::connect(&node, path, PROTOCOLS).await else { panic!("upgraded") };
        assert_eq!(answer.status, status, "{path}");
    }
}
