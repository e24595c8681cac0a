//! WebSockets of clients other than kubectl, in each subprotocol before v5.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{ECHO, background};
use crate::harness::pods::sleeper;
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, DEBIAN, on_shared_node};

/// The subprotocols of exec before v5; "" is a client that names none.
const OLDER: [&str; 5] =
    ["", "channel.k8s.io", "base64.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// A way to the API server that needs no credentials.
struct Proxy {
    address: String,
    _kubectl: (Child, BufReader<ChildStdout>),
}

impl Proxy {
    async fn start(t: &Case) -> Self {
        let command = t.cluster.kubectl(&["proxy", "--port=0", "--reject-paths=^$", "--reject-methods=^$"]);
        let (child, lines, first) = background(command).await;
        Self { address: first.trim().rsplit(' ').next().unwrap().to_owned(), _kubectl: (child, lines) }
    }

    /// Connects to something of the Pod `p`.
    async fn connect(&self, t: &Case, what: &str, protocol: &'static str) -> Socket {
        let url = format!("ws://{}/api/v1/namespaces/{}/pods/p/{what}", self.address, t.namespace);
        let mut request = url.into_client_request().unwrap();
        if !protocol.is_empty() {
            request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        }
        let stream = TcpStream::connect(&self.address).await.unwrap();
        let (inner, response) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        let chosen = response.headers().get("sec-websocket-protocol").map_or("", |name| name.to_str().unwrap());
        assert_eq!(chosen, protocol);
        Socket { inner, protocol, came: BTreeMap::new() }
    }

    async fn exec(&self, t: &Case, streams: &str, script: &str, protocol: &'static str) -> Socket {
        let encoded = script.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
        self.connect(t, &format!("exec?{streams}&command=sh&command=-c&command={encoded}"), protocol).await
    }
}

/// One connection, and what came on each of its channels.
struct Socket {
    inner: WebSocketStream<TcpStream>,
    protocol: &'static str,
    came: BTreeMap<u8, Vec<u8>>,
}

impl Socket {
    async fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = if self.protocol.contains("base64") {
            Message::text(format!("{channel}{}", STANDARD.encode(bytes)))
        } else {
            Message::binary([&[channel], bytes].concat())
        };
        self.inner.send(message).await.unwrap();
    }

    fn on(&self, channel: u8) -> &[u8] {
        self.came.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// Reads until enough has come; how the connection was closed if it was before.
    async fn until(&mut self, enough: impl Fn(&Self) -> bool) -> Option<CloseCode> {
        let base64 = self.protocol.contains("base64");
        let reading = async {
            while !enough(self) {
                let (channel, bytes) = match self.inner.next().await.expect("it is closed in good order").unwrap() {
                    Message::Binary(bytes) if !base64 => (bytes[0], bytes[1..].to_vec()),
                    Message::Text(text) if base64 => {
                        (text.as_bytes()[0] - b'0', STANDARD.decode(&text.as_bytes()[1..]).unwrap())
                    }
                    Message::Close(frame) => return frame.map(|frame| frame.code),
                    Message::Ping(_) | Message::Pong(_) => continue,
                    other => panic!("{:?}: {other:?}", self.protocol),
                };
                self.came.entry(channel).or_default().extend(bytes);
            }
            None
        };
        tokio::time::timeout(SOON, reading).await.unwrap_or_else(|_| panic!("{:?}: {:?}", self.protocol, self.came))
    }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn older_websocket_clients_have_a_commands_streams_and_exit_code() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let proxy = Proxy::start(t).await;
        for protocol in OLDER {
            let script = "printf 'to out'; printf 'to err' >&2; exit 3";
            let mut socket = proxy.exec(t, "stdout=1&stderr=1", script, protocol).await;
            assert_eq!(socket.until(|_| false).await, Some(CloseCode::Normal), "{protocol:?}");
            assert_eq!((socket.on(1), socket.on(2)), (&b"to out"[..], &b"to err"[..]), "{protocol:?}");
            if protocol.starts_with("v4") {
                let status: serde_json::Value = serde_json::from_slice(socket.on(3)).unwrap();
                assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}), "{protocol}");
            } else {
                assert_eq!(socket.on(3), b"command terminated with non-zero exit code: 3", "{protocol:?}");
            }
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn older_websocket_clients_end_the_input_by_closing_and_the_command_finishes() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        let proxy = Proxy::start(t).await;
        for (number, protocol) in OLDER.into_iter().enumerate() {
            // A command that is ended with its client's connection would not come to its last words.
            let script = format!("tee /tmp/{number}; sleep 1; echo ' to its end' >>/tmp/{number}");
            let mut socket = proxy.exec(t, "stdin=1&stdout=1&stderr=1", &script, protocol).await;
            socket.send(0, b"hello").await;
            socket.until(|socket| socket.on(1) == b"hello").await;
            socket.inner.close(None).await.unwrap();
            // To the other side's word that it is closed.
            socket.until(|_| false).await;
        }
        for (number, protocol) in OLDER.into_iter().enumerate() {
            poll("finished", SOON, async || {
                let written = t.kubectl_text(&["exec", "p", "--", "cat", &format!("/tmp/{number}")]);
                if written == "hello to its end\n" { Ok(()) } else { Err(format!("{protocol:?}: {written:?}")) }
            })
            .await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn older_websocket_clients_name_their_ports_and_have_two_channels_for_each() {
    on_shared_node(async |t| {
        let main = json!({"name": "main", "image": DEBIAN, "command": ["perl", "-e", ECHO]});
        t.pod("p", json!({"containers": [main]})).await;
        t.log_with("p", "main", "up").await;
        let proxy = Proxy::start(t).await;
        for protocol in ["v4.channel.k8s.io", "v4.base64.channel.k8s.io"] {
            // Nobody listens on the second.
            for ports in ["ports=8080&ports=9", "ports=8080,9"] {
                let mut socket = proxy.connect(t, &format!("portforward?{ports}"), protocol).await;
                let (echoed, refused) = (8080_u16.to_le_bytes(), 9_u16.to_le_bytes());
                socket.send(0, b"hello").await;
                let ended = socket
                    .until(|socket| {
                        let [echo, errors] = [socket.on(0), socket.on(3)];
                        echo == [&echoed[..], b"hello"].concat() && errors.len() > refused.len()
                    })
                    .await;
                assert_eq!(ended, None, "{protocol} {ports}: {:?}", socket.came);
                assert_eq!((socket.on(1), socket.on(2)), (&echoed[..], &refused[..]), "{protocol} {ports}");
                let (port, text) = socket.on(3).split_at(refused.len());
                let text = String::from_utf8_lossy(text);
                assert_eq!(port, refused, "{protocol} {ports}");
                assert!(text.starts_with("error forwarding port 9 to pod p"), "{protocol} {ports}: {text}");
                socket.inner.close(None).await.unwrap();
            }
        }
    });
}
