//! exec, attach and port-forward over WebSocket, in every subprotocol.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::Method;
use lambdalet::kubelet_api::Limits;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::port_forward::{echo, start};
use crate::spdy::{ClientFrames, ServerFrame, ServerFrames, ask};
use crate::support::{Node, Setup, eventually, tls};

const V1: &str = "channel.k8s.io";
const V1_BASE64: &str = "base64.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
const V4_BASE64: &str = "v4.base64.channel.k8s.io";
const V5: &str = "v5.channel.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const ALL: &str = "input=1&output=1&error=1";

struct Socket {
    inner: WebSocketStream<TlsStream<TcpStream>>,
    base64: bool,
}

async fn tls_of(node: &Node) -> TlsStream<TcpStream> {
    tls(node.address, Some(node.authority.api_server()), rustls::ALL_VERSIONS, &["http/1.1"]).await.unwrap()
}

/// Connects with this subprotocol, or none, and checks that it was taken.
async fn connect(node: &Node, path: &str, protocol: Option<&'static str>) -> Result<Socket, Error> {
    let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
    if let Some(protocol) = protocol {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    let (inner, response) = client_async(request, tls_of(node).await).await?;
    assert_eq!(response.headers().get("sec-websocket-protocol").map(|name| name.to_str().unwrap()), protocol);
    Ok(Socket { inner, base64: protocol.is_some_and(|name| name.contains("base64")) })
}

async fn exec(node: &Node, streams: &str, command: &str, protocol: &'static str) -> Socket {
    let protocol = (!protocol.is_empty()).then_some(protocol);
    connect(node, &format!("/exec/ns/p/c?{streams}&command={command}"), protocol).await.unwrap()
}

fn close(code: CloseCode) -> CloseFrame {
    CloseFrame { code, reason: "".into() }
}

/// What came on each channel, and how the connection was closed.
#[derive(Debug, Default)]
struct Came {
    channels: BTreeMap<u8, Vec<u8>>,
    messages: usize,
    first: Option<(u8, usize)>,
    close: Option<CloseCode>,
}

impl Came {
    fn on(&self, channel: u8) -> &[u8] {
        self.channels.get(&channel).map_or(&[], Vec::as_slice)
    }

    fn status(&self) -> Value {
        serde_json::from_slice(self.on(3)).unwrap()
    }
}

impl Socket {
    async fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = if self.base64 {
            Message::text(format!("{channel}{}", STANDARD.encode(bytes)))
        } else {
            Message::binary([&[channel], bytes].concat())
        };
        self.inner.send(message).await.unwrap();
    }

    fn read(&self, message: Message) -> (u8, Vec<u8>) {
        match (message, self.base64) {
            (Message::Binary(bytes), false) => (bytes[0], bytes[1..].to_vec()),
            (Message::Text(text), true) => (text.as_bytes()[0] - b'0', STANDARD.decode(&text.as_bytes()[1..]).unwrap()),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Reads to the end of the connection.
    async fn rest(&mut self) -> Came {
        let mut came = Came::default();
        while let Some(Ok(message)) = self.inner.next().await {
            match message {
                Message::Close(frame) => came.close = frame.map(|frame| frame.code),
                Message::Ping(_) | Message::Pong(_) => {}
                message => {
                    let (channel, bytes) = self.read(message);
                    came.first.get_or_insert((channel, bytes.len()));
                    came.messages += 1;
                    came.channels.entry(channel).or_default().extend(bytes);
                }
            }
        }
        came
    }
}

#[tokio::test]
async fn every_protocol_carries_a_command() {
    let node = start().await;
    for protocol in ["", V1, V1_BASE64, V4, V4_BASE64, V5] {
        let came =
            exec(&node, "output=1&error=1", "both&command=to%20out&command=to%20err", protocol).await.rest().await;
        assert_eq!((came.on(1), came.on(2)), (&b"to out"[..], &b"to err"[..]), "{protocol:?}");
        assert_eq!((came.first, came.close), (Some((1, 0)), Some(CloseCode::Normal)), "{protocol:?}");
        if protocol.starts_with('v') {
            assert_eq!(came.status()["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
        } else {
            assert_eq!(came.on(3), b"command terminated with non-zero exit code: 3");
        }
    }
}

#[tokio::test]
async fn the_first_message_is_empty_and_on_the_lowest_channel_that_is_written() {
    let node = start().await;
    for (streams, channel) in [("output=1", 1), ("error=1", 2), ("input=1", 3)] {
        let came = exec(&node, streams, "true", V4).await.rest().await;
        assert_eq!(came.first, Some((channel, 0)), "{streams}");
        assert_eq!(came.status()["status"], "Success");
    }
}

#[tokio::test]
async fn v5_closes_the_input_and_gets_the_rest() {
    let node = start().await;
    let mut socket = exec(&node, ALL, "cat", V5).await;
    socket.send(0, b"hello").await;
    socket.inner.send(Message::binary([255, 0].to_vec())).await.unwrap();
    let came = socket.rest().await;
    assert_eq!((came.on(1), came.close), (&b"hello"[..], Some(CloseCode::Normal)));
    assert_eq!(came.status()["status"], "Success");
}

#[tokio::test]
async fn sixteen_mebibytes_go_there_and_back() {
    let node = start().await;
    for protocol in [V5, V4_BASE64] {
        let socket = exec(&node, ALL, "cat", protocol).await;
        let base64 = socket.base64;
        let (mut sink, mut stream) = socket.inner.split();
        let sent: Vec<u8> = (0..16_u32 << 20).map(|n| u8::try_from((n * 13 + n / 509) % 256).unwrap()).collect();
        let send = async {
            for piece in sent.chunks(32 << 10) {
                let message = if base64 {
                    Message::text(format!("0{}", STANDARD.encode(piece)))
                } else {
                    Message::binary([&[0], piece].concat())
                };
                sink.send(message).await.unwrap();
            }
        };
        let read = async {
            let mut all = Vec::new();
            while all.len() < sent.len() {
                match stream.next().await.unwrap().unwrap() {
                    Message::Binary(bytes) if bytes[0] == 1 => all.extend_from_slice(&bytes[1..]),
                    Message::Text(text) if text.starts_with('1') => {
                        all.extend(STANDARD.decode(&text.as_str()[1..]).unwrap())
                    }
                    other => panic!("{other:?}"),
                }
            }
            all
        };
        let (all, ()) = tokio::join!(read, send);
        assert!(all == sent, "{protocol}");
    }
}

#[tokio::test]
async fn before_v5_closing_the_connection_ends_the_input_and_the_process_finishes() {
    let node = start().await;
    for protocol in ["", V1, V1_BASE64, V4, V4_BASE64] {
        let mut socket = exec(&node, "input=1&output=1", "swallow", protocol).await;
        socket.send(0, b"all of ").await;
        socket.send(0, b"it").await;
        socket.inner.close((protocol == V4).then(|| close(CloseCode::Normal))).await.unwrap();
        socket.rest().await;
        let done = || node.world.processes.swallowed.lock().unwrap().pop();
        let mut swallowed = None;
        assert!(
            eventually(5, || {
                swallowed = done();
                swallowed.is_some()
            })
            .await,
            "{protocol:?}"
        );
        assert_eq!(swallowed.unwrap(), b"all of it", "{protocol:?}");
        assert!(eventually(10, || node.world.processes.running() == 0).await);
    }
}

#[tokio::test]
async fn before_v5_closing_the_connection_ends_a_session_that_only_joined_a_process() {
    let node = start().await;
    let gone = || eventually(10, || node.world.stays.load(Ordering::SeqCst) == 0);
    for protocol in ["", V1, V1_BASE64, V4, V4_BASE64] {
        let named = (!protocol.is_empty()).then_some(protocol);
        // It never ends, and neither does it read.
        *node.world.joined.lock().unwrap() = Some("sleep");
        let mut socket = connect(&node, "/attach/ns/p/c?input=1&output=1", named).await.unwrap();
        socket.send(0, b"unread").await;
        socket.inner.close(None).await.unwrap();
        socket.rest().await;
        assert!(gone().await, "{protocol:?}");
        // Its input is handed on.
        *node.world.joined.lock().unwrap() = Some("swallow");
        let mut socket = connect(&node, "/attach/ns/p/c?input=1&output=1", named).await.unwrap();
        socket.send(0, b"all of ").await;
        socket.send(0, b"it").await;
        socket.inner.close(None).await.unwrap();
        socket.rest().await;
        assert!(gone().await, "{protocol:?}");
        let swallowed = || node.world.processes.swallowed.lock().unwrap().clone();
        assert!(eventually(5, || !swallowed().is_empty()).await, "{protocol:?}");
        assert_eq!(swallowed(), [b"all of it"], "{protocol:?}");
        node.world.processes.swallowed.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn a_client_that_leaves_otherwise_ends_the_process_within_a_second() {
    let node = start().await;
    let running = |wanted| {
        let processes = node.world.processes.clone();
        move || processes.running() == wanted
    };
    // In good order: with v5, with a terminal, and without input, that is no end of input.
    for (streams, protocol) in [(ALL, V5), ("input=1&output=1&tty=1", V4), ("output=1", V4)] {
        let mut socket = exec(&node, streams, "sleep", protocol).await;
        assert!(eventually(5, running(1)).await);
        socket.inner.close(None).await.unwrap();
        assert!(eventually(10, running(0)).await, "{streams} {protocol}");
    }
    // With a word that says it did not mean to.
    for code in [CloseCode::Away, CloseCode::Error] {
        let mut socket = exec(&node, ALL, "sleep", V4).await;
        assert!(eventually(5, running(1)).await);
        socket.inner.close(Some(close(code))).await.unwrap();
        assert!(eventually(10, running(0)).await, "{code}");
    }
    // Without a word.
    for protocol in [V1, V4, V5] {
        let socket = exec(&node, ALL, "sleep", protocol).await;
        assert!(eventually(5, running(1)).await);
        drop(socket);
        assert!(eventually(10, running(0)).await, "{protocol}");
    }
    // Without a word, while the process does not read what was sent.
    let mut socket = exec(&node, ALL, "sleep", V4).await;
    let flood = async {
        loop {
            socket.send(0, &[0; 32 << 10]).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(500), flood).await;
    assert!(running(1)());
    drop(socket);
    assert!(eventually(10, running(0)).await);
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let node = start().await;
    let mut socket = exec(&node, "input=1&output=1&tty=1", "size", V4).await;
    socket.send(4, br#"{"Width":132,"Height":50}"#).await;
    assert_eq!(socket.rest().await.on(1), b"132x50");
}

#[tokio::test]
async fn pings_are_answered() {
    let node = start().await;
    let mut socket = exec(&node, "output=1", "sleep", V5).await;
    socket.inner.send(Message::Ping(Bytes::from_static(b"there?"))).await.unwrap();
    loop {
        if let Message::Pong(bytes) = socket.inner.next().await.unwrap().unwrap() {
            assert_eq!(bytes, "there?");
            return;
        }
    }
}

#[tokio::test]
async fn messages_for_no_channel_are_dropped() {
    let node = start().await;
    let mut socket = exec(&node, "input=1&output=1", "cat", V5).await;
    for channel in [1, 2, 3, 5, 77] {
        socket.send(channel, b"nobody").await;
    }
    socket.inner.send(Message::binary(Vec::new())).await.unwrap();
    socket.inner.send(Message::binary([255, 77].to_vec())).await.unwrap();
    socket.send(0, b"somebody").await;
    socket.inner.send(Message::binary([255, 0].to_vec())).await.unwrap();
    assert_eq!(socket.rest().await.on(1), b"somebody");
}

#[tokio::test]
async fn a_client_that_breaks_the_rules_is_told_and_its_process_ends() {
    let node = start().await;
    let wrong = [
        (V4_BASE64, Message::text("0=?"), CloseCode::Invalid),
        (V5, Message::binary([255].to_vec()), CloseCode::Protocol),
        (V4, Message::binary(vec![0; (16 << 20) + 1]), CloseCode::Size),
    ];
    for (protocol, message, code) in wrong {
        let mut socket = exec(&node, ALL, "sleep", protocol).await;
        assert!(eventually(5, || node.world.processes.running() == 1).await);
        // The answer may come before all is sent.
        let _ = socket.inner.send(message).await;
        let came = socket.rest().await;
        assert!(
            came.close == Some(code) || code == CloseCode::Size && came.close.is_none(),
            "{protocol} {:?}",
            came.close
        );
        assert!(eventually(10, || node.world.processes.running() == 0).await, "{protocol}");
    }
}

#[tokio::test]
async fn a_slow_client_holds_up_the_process_and_not_memory() {
    let node = start().await;
    let mut socket = exec(&node, "output=1", "flood", V5).await;
    let written = || node.world.processes.written.load(std::sync::atomic::Ordering::SeqCst);
    let mut before = usize::MAX;
    let stuck = async {
        while before != written() || before == 0 {
            before = written();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stuck).await.unwrap();
    assert!((1..16 << 20).contains(&before), "{before} bytes were taken from the process");
    let mut more = 0;
    while more < 2 * before {
        more += socket.inner.next().await.unwrap().unwrap().len();
    }
    assert!(written() > before);
}

#[tokio::test]
async fn an_idle_connection_ends() {
    let limits = Limits { stream_idle: Duration::from_millis(300), ..Limits::default() };
    let node = Node::start(Setup { limits, ..Setup::default() }).await;
    let came = exec(&node, "output=1", "sleep", V4).await.rest().await;
    assert_eq!(came.close, Some(CloseCode::Away));
    // Pings, as kubectl sends them, are nothing either.
    let mut socket = exec(&node, "output=1", "sleep", V5).await.inner;
    let began = std::time::Instant::now();
    let mut closed = false;
    while !closed {
        let _ = socket.send(Message::Ping(Bytes::new())).await;
        let next = tokio::time::timeout(Duration::from_millis(50), socket.next()).await;
        closed = matches!(next, Ok(None | Some(Err(_) | Ok(Message::Close(_)))));
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    assert!(eventually(10, || node.world.processes.running() == 0).await);
    // Also where the client closed it and the process does not mind.
    let mut socket = exec(&node, ALL, "sleep", V4).await;
    assert!(eventually(5, || node.world.processes.running() == 1).await);
    socket.inner.close(None).await.unwrap();
    assert!(eventually(5, || node.world.processes.running() == 0).await);
}

#[tokio::test]
async fn what_is_wrong_is_said_before_the_handshake() {
    let node = start().await;
    let path = "/exec/ns/p/c?output=1&command=true";
    let refused = |protocol| {
        let connecting = connect(&node, path, Some(protocol));
        async move {
            match connecting.await {
                Err(Error::Http(response)) => response.status().as_u16(),
                other => panic!("{:?}", other.map(|_| ())),
            }
        }
    };
    assert_eq!(refused("mqtt").await, 403);
    assert_eq!(refused(TUNNEL).await, 403);
    let handshake = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")];
    assert_eq!(ask(&mut tls_of(&node).await, &Method::GET, path, &handshake).await.status, 400);
    let mut whole = handshake.to_vec();
    whole.push(("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="));
    assert_eq!(ask(&mut tls_of(&node).await, &Method::POST, path, &whole).await.status, 400);
    whole[2].1 = "8";
    assert_eq!(ask(&mut tls_of(&node).await, &Method::GET, path, &whole).await.status, 400);
}

#[tokio::test]
async fn ports_have_two_channels_each() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    for protocol in [None, Some(V4), Some(V4_BASE64)] {
        let path = format!("/portForward/ns/p?port={port},{closed}");
        let mut socket = connect(&node, &path, protocol).await.unwrap();
        socket.send(0, b"hello").await;
        let mut came: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        let mut text = String::new();
        while came.get(&0).is_none_or(|bytes| bytes.len() < 7) || !text.contains("refused") {
            let message = socket.inner.next().await.unwrap().unwrap();
            let (channel, bytes) = socket.read(message);
            came.entry(channel).or_default().extend(bytes);
            text = came
                .get(&3)
                .map(|bytes| String::from_utf8_lossy(&bytes[2.min(bytes.len())..]).into_owned())
                .unwrap_or_default();
        }
        let begun = |port: u16| port.to_le_bytes().to_vec();
        assert_eq!(came[&0], [begun(port), b"hello".to_vec()].concat());
        assert_eq!((&came[&1], &came[&2], &came[&3][..2]), (&begun(port), &begun(closed), &begun(closed)[..]));
        assert!(text.starts_with(&format!("error forwarding port {closed} to pod p: ")), "{text}");
    }
    for path in ["/portForward/ns/p", "/portForward/ns/p?port=0", "/portForward/ns/p?port=80,x"] {
        let Err(Error::Http(response)) = connect(&node, path, Some(V4)).await else { panic!("{path}") };
        assert_eq!(response.status(), 400);
    }
}

#[tokio::test]
async fn the_connection_is_closed_when_every_port_is() {
    let node = start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let path = format!("/portForward/ns/p?ports={}", listener.local_addr().unwrap().port());
    let mut socket = connect(&node, &path, Some(V4)).await.unwrap();
    drop(listener.accept().await.unwrap());
    assert_eq!(socket.rest().await.close, Some(CloseCode::Normal));
}

#[tokio::test]
async fn spdy_goes_through_a_tunnel_cut_anywhere() {
    let (node, (port, _echo)) = (start().await, echo().await);
    let mut socket = connect(&node, "/portForward/ns/p", Some(TUNNEL)).await.unwrap().inner;
    let (mut frames, mut came) = (ClientFrames::default(), ServerFrames::default());
    let port = port.to_string();
    let sent: Vec<u8> = (0..300_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    frames.syn_stream(1, &[("streamtype", "error"), ("port", &port), ("requestid", "0")], true);
    frames.syn_stream(3, &[("streamtype", "data"), ("port", &port), ("requestid", "0")], false);
    frames.data(3, &sent, true);
    frames.ping(1);
    for piece in frames.out.chunks(7777) {
        socket.send(Message::binary(piece.to_vec())).await.unwrap();
    }
    let (mut data, mut pinged, mut ended) = (Vec::new(), false, 0);
    while ended < 2 || !pinged {
        match came.next() {
            Some(ServerFrame::Data { id, bytes, ended: over }) => {
                ended += usize::from(over);
                if id == 3 {
                    data.extend(bytes);
                }
            }
            Some(ServerFrame::Ping(1)) => pinged = true,
            Some(ServerFrame::Reply(1 | 3)) => {}
            Some(other) => panic!("{other:?}"),
            None => {
                let Message::Binary(bytes) = socket.next().await.unwrap().unwrap() else { panic!("not binary") };
                came.input.extend_from_slice(&bytes);
            }
        }
    }
    assert!(data == [sent, b"|300000".to_vec()].concat());
    socket.close(None).await.unwrap();
    while let Some(Ok(message)) = socket.next().await {
        assert!(message.is_close() || message.is_binary());
    }
}

#[tokio::test]
async fn a_tunnel_that_breaks_closes_its_ports() {
    let node = start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut socket = connect(&node, "/portForward/ns/p", Some(TUNNEL)).await.unwrap().inner;
    let mut frames = ClientFrames::default();
    let port = listener.local_addr().unwrap().port().to_string();
    frames.syn_stream(1, &[("streamtype", "error"), ("port", &port)], false);
    frames.syn_stream(3, &[("streamtype", "data"), ("port", &port)], false);
    socket.send(Message::Binary(frames.out.split().freeze())).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    drop(socket);
    let closed =
        tokio::time::timeout(Duration::from_secs(10), tokio::io::AsyncReadExt::read(&mut server, &mut [0])).await;
    assert!(matches!(closed.unwrap(), Ok(0) | Err(_)));
}
