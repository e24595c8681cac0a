//! A client of a node's API: TLS with a client certificate, WebSocket and plain requests over it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

#[path = "../../src/pod/probes/anybody.rs"]
mod anybody;

use anybody::Anybody;

/// Bytes of one message and of one write.
pub(crate) const PIECE: usize = 64 << 10;
/// Channels of exec.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const ERROR: u8 = 3;

/// A connection.
pub(crate) type Tls = TlsStream<BufReader<TcpStream>>;

/// Somebody to connect to. TLS sessions are resumed from one connection to the next.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    connector: TlsConnector,
}

impl Client {
    /// `identity` is a PEM certificate and its key; whoever answers at `address` is believed.
    pub(crate) fn new(address: SocketAddr, identity: Option<(&Path, &Path)>) -> anyhow::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)));
        let config = match identity {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Self { address, connector: TlsConnector::from(Arc::new(config)) })
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> anyhow::Result<Tls> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::IpAddress(self.address.ip().into());
        // As the server has it: rustls takes 4 KiB at a time from its socket.
        let tcp = BufReader::with_capacity(16 << 10, tcp);
        Ok(self.connector.connect(name, tcp).await?)
    }

    /// A new connection for plain requests, one after the other.
    pub(crate) async fn plain(&self) -> anyhow::Result<Kept> {
        let (sender, connection) = handshake(TokioIo::new(self.connect().await?)).await?;
        tokio::spawn(connection);
        Ok(Kept(sender))
    }

    /// A new connection that becomes a WebSocket.
    pub(crate) async fn websocket(&self, path: &str, protocol: &'static str) -> anyhow::Result<Socket> {
        let mut request = format!("ws://{}{path}", self.address).into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse()?);
        let connected = tokio_tungstenite::client_async(request, self.connect().await?).await;
        let (socket, _) = connected.with_context(|| format!("{path} was refused"))?;
        let (sink, stream) = socket.split();
        Ok(Socket { sink, stream })
    }
}

/// A connection that is kept.
pub(crate) struct Kept(SendRequest<Empty<Bytes>>);

impl Kept {
    /// Sends a request; the answer, of which at least the head is there.
    pub(crate) async fn send(&mut self, method: &str, path: &str) -> anyhow::Result<Incoming> {
        let request = Request::builder().method(method).uri(path).header("host", "node").body(Empty::new())?;
        self.0.ready().await?;
        let response = self.0.send_request(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        bail!(
            "{method} {path}: {status}: {}",
            String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes())
        )
    }
}

/// A WebSocket with channels.
pub(crate) struct Socket {
    pub(crate) sink: SplitSink<WebSocketStream<Tls>, Message>,
    pub(crate) stream: SplitStream<WebSocketStream<Tls>>,
}

/// Sends so many zeros on a channel.
pub(crate) async fn send_zeros(
    sink: &mut SplitSink<WebSocketStream<Tls>, Message>,
    channel: u8,
    bytes: u64,
) -> anyhow::Result<()> {
    let mut piece = BytesMut::zeroed(1 + PIECE);
    piece[0] = channel;
    let (piece, mut left) = (piece.freeze(), bytes);
    while left > 0 {
        let length = left.min(PIECE as u64);
        sink.feed(Message::Binary(piece.slice(..1 + length as usize))).await?;
        left -= length;
    }
    Ok(sink.flush().await?)
}

impl Socket {
    /// Writes so many zeros to a command (v5), ends its input, and reads to its end; how many bytes it wrote.
    pub(crate) async fn exchange(self, input: Option<u64>) -> anyhow::Result<u64> {
        let Self { mut sink, mut stream } = self;
        let sending = async {
            if let Some(bytes) = input {
                send_zeros(&mut sink, STDIN, bytes).await?;
                sink.send(Message::binary(vec![255, STDIN])).await?;
            }
            Ok(())
        };
        let receiving = async {
            let mut seen = 0;
            while let Some(message) = stream.next().await {
                let Message::Binary(message) = message? else { continue };
                match message.first() {
                    Some(&STDOUT) => seen += message.len() as u64 - 1,
                    Some(&ERROR) => {
                        let text = String::from_utf8_lossy(&message[1..]);
                        ensure!(text.contains("\"Success\""), "the command failed: {text}");
                        return Ok(seen);
                    }
                    _ => {}
                }
            }
            bail!("the connection ended before the command")
        };
        Ok(tokio::try_join!(sending, receiving)?.1)
    }

    /// The next piece of a channel; what comes on others is passed over.
    pub(crate) async fn next_of(&mut self, channel: u8) -> anyhow::Result<Bytes> {
        loop {
            match self.stream.next().await.context("the connection ended")?? {
                Message::Binary(bytes) if bytes.first() == Some(&channel) => return Ok(bytes.slice(1..)),
                _ => {}
            }
        }
    }

    pub(crate) async fn send(&mut self, channel: u8, bytes: &[u8]) -> anyhow::Result<()> {
        let mut message = BytesMut::with_capacity(1 + bytes.len());
        message.put_u8(channel);
        message.put_slice(bytes);
        Ok(self.sink.send(Message::Binary(message.freeze())).await?)
    }
}

/// `text` as one value in a query.
pub(crate) fn query_value(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
