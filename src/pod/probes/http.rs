//! One HTTP GET the way a kubelet asks: a connection of its own, any certificate, redirects within the same host.

use std::fmt;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, HeaderName, LOCATION, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::crypto::ring;
use rustls::{ClientConfig, InvalidMessage};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::action::Get;
use super::anybody::Anybody;
use crate::telemetry::chain;

/// Most of an answer that is read, in bytes; a kubelet's number.
const LONGEST: usize = 10 << 10;
/// Most answers that say "look there", as Go's client counts.
const MOST_REDIRECTS: usize = 10;

/// What was answered.
#[derive(Debug)]
pub(in crate::pod) struct Answer {
    pub(in crate::pod) status: StatusCode,
    /// At most [`LONGEST`] bytes of it.
    pub(in crate::pod) body: String,
}

/// Why there is no answer, in the words of Go's client, which people search for.
#[derive(Debug, thiserror::Error)]
#[error("Get {url:?}: {what}")]
pub(in crate::pod) struct GetError {
    url: String,
    what: String,
    /// The other side does not speak TLS.
    pub(in crate::pod) not_tls: bool,
}

struct Address<'a>(&'a str, u16);

impl fmt::Display for Address<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(host, port) = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// What went wrong in dialling or asking, in a few words.
struct Failure {
    what: String,
    not_tls: bool,
}

impl Failure {
    fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), not_tls: false }
    }

    fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(chain(error))
    }
}

/// Connects, in Go's words where that fails.
pub(super) async fn dial(host: &str, port: u16) -> Result<TcpStream, String> {
    TcpStream::connect((host, port)).await.map_err(|error| {
        let text = if error.kind() == std::io::ErrorKind::ConnectionRefused {
            "connect: connection refused".to_owned()
        } else {
            chain(&error)
        };
        format!("dial tcp {}: {text}", Address(host, port))
    })
}

/// Asks, and follows redirects to the same host. An answer that says to look elsewhere is returned as it is.
pub(in crate::pod) async fn get(wanted: &Get) -> Result<Answer, GetError> {
    let mut wanted = wanted.clone();
    for _ in 0..=MOST_REDIRECTS {
        let (status, headers, body) = once(&wanted).await.map_err(|failure| failed(&wanted, failure))?;
        match redirected(&wanted, status, &headers) {
            Some(next) => wanted = next,
            None => return Ok(Answer { status, body }),
        }
    }
    Err(failed(&wanted, Failure::new(format!("stopped after {MOST_REDIRECTS} redirects"))))
}

fn failed(wanted: &Get, failure: Failure) -> GetError {
    let scheme = if wanted.https { "https" } else { "http" };
    let url = format!("{scheme}://{}{}", Address(&wanted.host, wanted.port), wanted.path);
    GetError { url, what: failure.what, not_tls: failure.not_tls }
}

/// Where the answer sends the client, if that is the same host.
fn redirected(wanted: &Get, status: StatusCode, headers: &HeaderMap) -> Option<Get> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location: Uri = headers.get(LOCATION)?.to_str().ok()?.parse().ok()?;
    let path = location.path_and_query().map_or("/", |path| path.as_str());
    let Some(host) = location.host() else {
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            let base = wanted.path.split('?').next().unwrap_or_default().rsplit_once('/').map_or("", |(base, _)| base);
            format!("{base}/{path}")
        };
        return Some(Get { path, ..wanted.clone() });
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host != wanted.host {
        return None;
    }
    let https = location.scheme_str() == Some("https");
    let port = location.port_u16().unwrap_or(if https { 443 } else { 80 });
    // The user's Host was for the first server.
    let headers = wanted.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")).cloned().collect();
    Some(Get { https, port, path: path.to_owned(), headers, ..wanted.clone() })
}

async fn once(wanted: &Get) -> Result<(StatusCode, HeaderMap, String), Failure> {
    let stream = dial(&wanted.host, wanted.port).await.map_err(Failure::new)?;
    if !wanted.https {
        return exchange(stream, wanted).await;
    }
    let name = ServerName::try_from(wanted.host.clone()).map_err(|error| Failure::of(&error))?;
    match TlsConnector::from(Arc::clone(&TLS)).connect(name, stream).await {
        Ok(stream) => exchange(stream, wanted).await,
        Err(error) => {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            let not_tls = matches!(inner, Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)));
            let words = "http: server gave HTTP response to HTTPS client".to_owned();
            Err(Failure { what: if not_tls { words } else { chain(&error) }, not_tls })
        }
    }
}

/// One request and its answer; the connection lives no longer than that.
async fn exchange<S>(stream: S, wanted: &Get) -> Result<(StatusCode, HeaderMap, String), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = request(wanted)?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| Failure::of(&error))?;
    let asked = async move {
        let answer = sender.send_request(request).await.map_err(|error| Failure::of(&error))?;
        let (head, body) = answer.into_parts();
        Ok((head.status, head.headers, text(body).await))
    };
    let mut connection = Box::pin(connection);
    let mut asked = std::pin::pin!(asked);
    tokio::select! {
        biased;
        // Both are polled until the answer is there, and dropped together.
        answer = &mut asked => answer,
        // How it ended is what the request says; it is told by the drop.
        _ = &mut connection => {
            drop(connection);
            asked.await
        }
    }
}

fn request(wanted: &Get) -> Result<Request<Empty<Bytes>>, Failure> {
    let mut request = Request::get(wanted.path.as_str()).body(Empty::new()).map_err(|error| Failure::of(&error))?;
    let headers = request.headers_mut();
    let default = if wanted.https { 443 } else { 80 };
    let address = Address(&wanted.host, wanted.port).to_string();
    let host =
        if wanted.port == default { address.trim_end_matches(&format!(":{default}")).to_owned() } else { address };
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| Failure::of(&error));
    headers.insert(HOST, value(&host)?);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(USER_AGENT, HeaderValue::from_static(wanted.agent));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    let mut own: HeaderMap = HeaderMap::new();
    for (name, text) in &wanted.headers {
        own.append(HeaderName::from_bytes(name.as_bytes()).map_err(|error| Failure::of(&error))?, value(text)?);
    }
    for name in own.keys() {
        headers.remove(name);
    }
    for (name, text) in &own {
        // Said to be empty, a header that we would send is left out.
        if !text.is_empty() || (name != USER_AGENT && name != ACCEPT) {
            headers.append(name, text.clone());
        }
    }
    if !headers.contains_key(HOST) {
        headers.insert(HOST, value(&host)?);
    }
    Ok(request)
}

/// What is read of a body before its end, or before an error.
async fn text(mut body: Incoming) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            text.extend_from_slice(&data[..data.len().min(LONGEST - text.len())]);
        }
        if text.len() >= LONGEST {
            break;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

static TLS: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
    let provider = Arc::new(ring::default_provider());
    let versions = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let verifier = Arc::new(Anybody(provider));
    let builder = versions.expect("ring has the default protocol versions").dangerous();
    Arc::new(builder.with_custom_certificate_verifier(verifier).with_no_client_auth())
});

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    use super::*;

    fn wanted(port: u16, path: &str) -> Get {
        Get {
            https: false,
            host: "127.0.0.1".into(),
            port,
            path: path.into(),
            headers: Vec::new(),
            agent: "kube-probe/1",
        }
    }

    /// Gives each connection the next of these answers; the requests.
    async fn server(answers: Vec<String>) -> (u16, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            let mut requests = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                requests.push(String::from_utf8(request).unwrap());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            requests
        });
        (port, task)
    }

    fn answer(status: &str, headers: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn a_request_carries_what_the_user_says_and_no_more_than_a_kubelets() {
        let (port, requests) = server(vec![answer("200 OK", "", "fine")]).await;
        let headers = [("host", "example.org"), ("X-A", "1"), ("x-a", "2"), ("accept", "")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let answer = get(&Get { headers, ..wanted(port, "/a?b=c") }).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "fine"));
        let request = requests.await.unwrap().remove(0).to_lowercase();
        for part in
            ["get /a?b=c http/1.1", "host: example.org", "x-a: 1", "x-a: 2", "kube-probe/1", "connection: close"]
        {
            assert!(request.contains(part), "{part} is missing in {request}");
        }
        assert!(!request.contains("accept") && request.matches("host:").count() == 1, "{request}");
    }

    #[tokio::test]
    async fn redirects_are_followed_on_the_same_host_only() {
        let away = answer("302 Found", "Location: http://example.invalid/\r\n", "there");
        let (port, requests) = server(vec![answer("301 Moved", "Location: /next\r\n", ""), away]).await;
        let answer = get(&wanted(port, "/first")).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (302, "there"));
        assert!(requests.await.unwrap()[1].starts_with("GET /next "));
    }

    #[tokio::test]
    async fn a_circle_of_redirects_ends() {
        let (port, _) = server(vec![answer("302 Found", "Location: /\r\n", ""); 12]).await;
        let error = get(&wanted(port, "/")).await.unwrap_err().to_string();
        assert!(error.contains("stopped after 10 redirects"), "{error}");
    }

    #[tokio::test]
    async fn failures_are_told_in_words_that_can_be_searched_for() {
        let (port, task) = server(Vec::new()).await;
        task.await.unwrap();
        let error = get(&wanted(port, "/x")).await.unwrap_err().to_string();
        let url = format!("http://127.0.0.1:{port}/x");
        assert_eq!(error, format!("Get {url:?}: dial tcp 127.0.0.1:{port}: connect: connection refused"));
    }

    #[tokio::test]
    async fn a_server_that_hangs_up_has_failed() {
        let (port, _) = server(vec![String::new()]).await;
        let error = get(&wanted(port, "/")).await.unwrap_err().to_string();
        assert!(error.starts_with("Get "), "{error}");
    }

    #[tokio::test]
    async fn a_server_without_tls_is_recognised() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let plain = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        };
        let wanted = Get { https: true, ..wanted(port, "/") };
        let (error, ()) = tokio::join!(get(&wanted), plain);
        assert!(error.unwrap_err().not_tls);
    }

    #[tokio::test]
    async fn a_long_answer_is_cut_off() {
        let (port, _) = server(vec![answer("200 OK", "", &"x".repeat(3 * LONGEST))]).await;
        assert_eq!(get(&wanted(port, "/")).await.unwrap().body.len(), LONGEST);
    }
}
