//! A pool that is a list, servers for it, and a client that sees every byte.

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::super::*;
use crate::metrics::Metrics;

/// Longer than anything here takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what must come.
pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it comes")
}

/// Environments in a list; the one used last is taken first.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<Vec<Arc<Environment>>>,
    free: Notify,
    outcomes: Mutex<VecDeque<Outcome>>,
    ended: Notify,
    pub(super) refusal: Mutex<Option<TryAgain>>,
    pub(super) leased: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    pub(super) waits: Notify,
    /// Runs before each lease, on the front's own thread.
    pub(super) before: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

/// The handle by which a front leases.
pub(super) struct Handle(pub(super) Arc<Pool>);

impl Pool {
    pub(super) fn add(&self, environment: &Arc<Environment>) {
        self.idle.lock().unwrap().push(environment.clone());
        self.free.notify_one();
    }

    /// The next outcome, in the order in which leases ended.
    pub(super) async fn outcome(&self) -> Outcome {
        within(async {
            loop {
                if let Some(outcome) = self.outcomes.lock().unwrap().pop_front() {
                    return outcome;
                }
                self.ended.notified().await;
            }
        })
        .await
    }

    pub(super) fn is_idle(&self) -> bool {
        self.outcomes.lock().unwrap().is_empty()
    }

    fn end(&self, environment: &Arc<Environment>, outcome: Outcome) {
        let again = outcome.leaves() == Leaves::Idle;
        self.outcomes.lock().unwrap().push_back(outcome);
        self.ended.notify_one();
        if again {
            self.add(environment);
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Leases for Handle {
    async fn lease(&self) -> Result<Lease, TryAgain> {
        let pool = self.0.clone();
        pool.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&pool.waiting);
        pool.waits.notify_one();
        if let Some(before) = &mut *pool.before.lock().unwrap() {
            before();
        }
        loop {
            if let Some(refusal) = pool.refusal.lock().unwrap().clone() {
                return Err(refusal);
            }
            let environment = pool.idle.lock().unwrap().pop();
            if let Some(environment) = environment {
                pool.leased.fetch_add(1, Ordering::SeqCst);
                let (back, to) = (pool.clone(), environment.clone());
                return Ok(Lease::new(environment, move |outcome| back.end(&to, outcome)));
            }
            pool.free.notified().await;
        }
    }
}

/// A front that runs.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) pool: Arc<Pool>,
    pub(super) metrics: Metrics,
    pub(super) node: NodeConnections,
    pub(super) drain: watch::Sender<Option<Instant>>,
    pub(super) task: JoinHandle<std::io::Result<Drained>>,
}

pub(super) fn labels() -> FunctionLabels {
    FunctionLabels { namespace: "default".into(), pod: "f".into(), uid: "1".into() }
}

pub(super) async fn start(limits: Limits) -> Running {
    let listeners = listen_in(None, vec![([127, 0, 0, 1], 0).into()]).await.unwrap();
    serve_on(listeners, limits)
}

pub(super) fn serve_on(listeners: Vec<std::net::TcpListener>, limits: Limits) -> Running {
    let address = listeners[0].local_addr().unwrap();
    let (pool, metrics, node) = (Arc::new(Pool::default()), Metrics::new(), NodeConnections::new(4096));
    let meters = Meters::new(&metrics);
    let front = Front::new(Arc::new(Handle(pool.clone())), limits, node.clone(), &meters, labels());
    let (drain, drained) = watch::channel(None);
    let task = tokio::spawn(front.run(listeners, drained));
    Running { address, pool, metrics, node, drain, task }
}

impl Running {
    pub(super) async fn connect(&self) -> Client {
        Client::connect(self.address).await
    }

    /// An environment of its own.
    pub(super) fn environment(&self, address: SocketAddr) -> Arc<Environment> {
        let environment = Environment::new(address);
        self.pool.add(&environment);
        environment
    }

    pub(super) fn counted(&self, line: &str) -> bool {
        self.metrics.encode().unwrap().lines().any(|found| found == line)
    }

    /// Counted calls of that outcome.
    pub(super) fn calls(&self, outcome: &str) -> u64 {
        let text = self.metrics.encode().unwrap();
        let start = format!(
            "lambdalet_function_calls_total{{namespace=\"default\",pod=\"f\",uid=\"1\",outcome=\"{outcome}\"}} "
        );
        text.lines().find_map(|line| line.strip_prefix(&start)).unwrap().parse().unwrap()
    }
}

/// A client on a bare socket.
pub(super) struct Client {
    pub(super) stream: TcpStream,
    read: Vec<u8>,
}

/// What it received.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: Vec<u8>,
}

impl Received {
    pub(super) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), read: Vec::new() }
    }

    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        within(self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    pub(super) async fn call(&mut self, bytes: impl AsRef<[u8]>) -> Received {
        self.send(bytes).await;
        self.receive().await
    }

    /// A call of a Lambda with that payload.
    /// Sends an invocation whose answer comes later.
    pub(super) async fn begin(&mut self, payload: &str) {
        let length = payload.len();
        self.send(format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: {length}\r\n\r\n{payload}")).await;
    }

    pub(super) async fn invoke(&mut self, payload: &str) -> Received {
        self.begin(payload).await;
        self.receive().await
    }

    pub(super) async fn more(&mut self) -> usize {
        within(self.stream.read_buf(&mut self.read)).await.unwrap_or(0)
    }

    /// Up to and with the empty line.
    pub(super) async fn head(&mut self) -> String {
        loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                return String::from_utf8(self.read.drain(..end + 4).collect()).unwrap();
            }
            assert_ne!(self.more().await, 0, "the connection ended: {:?}", String::from_utf8_lossy(&self.read));
        }
    }

    pub(super) async fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.read.len() < length {
            assert_ne!(self.more().await, 0, "the connection ended: {:?}", String::from_utf8_lossy(&self.read));
        }
        self.read.drain(..length).collect()
    }

    pub(super) async fn receive(&mut self) -> Received {
        let head = self.head().await;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut received = Received { status, head, body: Vec::new() };
        if let Some(length) = received.field("content-length") {
            received.body = self.exactly(length.parse().unwrap()).await;
        } else if received.field("transfer-encoding") == Some("chunked") {
            received.body = self.chunks().await;
        } else if status >= 200 {
            received.body = self.rest().await;
        }
        received
    }

    /// All chunks, and what follows them up to the empty line.
    async fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = self.line().await;
            let length = usize::from_str_radix(line.trim(), 16).unwrap();
            if length == 0 {
                while self.line().await != "\r\n" {}
                return body;
            }
            body.extend(self.exactly(length).await);
            assert_eq!(self.exactly(2).await, b"\r\n");
        }
    }

    /// Whether the other side closed it with nothing left to read.
    pub(super) async fn ended(&mut self) -> bool {
        self.read.is_empty() && self.stream.read_buf(&mut self.read).await.unwrap_or(0) == 0
    }

    pub(super) async fn line(&mut self) -> String {
        loop {
            if let Some(end) = find(&self.read, b"\r\n") {
                return String::from_utf8(self.read.drain(..end + 2).collect()).unwrap();
            }
            assert_ne!(self.more().await, 0, "the connection ended");
        }
    }

    pub(super) async fn rest(&mut self) -> Vec<u8> {
        while self.more().await > 0 {}
        std::mem::take(&mut self.read)
    }
}

impl Client {
    /// What comes first, or nothing if the connection ends before.
    pub(super) async fn some(&mut self) -> Vec<u8> {
        self.more().await;
        std::mem::take(&mut self.read)
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A stand-in for the Lambda RIE: reads the whole request, then answers `"echo: " + payload` when it is let. A second call
/// while one is being made kills it.
pub(super) struct Rie {
    pub(super) address: SocketAddr,
    pub(super) crashed: Arc<AtomicBool>,
    pub(super) invoked: Arc<AtomicUsize>,
    pub(super) connections: Arc<AtomicUsize>,
    /// Calls that may end; each takes one.
    pub(super) gate: Arc<Semaphore>,
    pub(super) begun: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Rie {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rie {
    /// One that lets every call end.
    pub(super) async fn open() -> Self {
        let rie = Self::shut().await;
        rie.gate.add_permits(1 << 20);
        rie
    }

    pub(super) async fn shut() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (crashed, invoked, connections) = <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (gate, begun, busy) =
            (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let state = (crashed.clone(), invoked.clone(), gate.clone(), begun.clone(), busy);
        let accepted = connections.clone();
        let task = tokio::spawn(async move {
            let mut tasks = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                accepted.fetch_add(1, Ordering::SeqCst);
                let state = state.clone();
                let service = service_fn(move |request| invoke(state.clone(), request));
                tasks.spawn(async move {
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, crashed, invoked, connections, gate, begun, task }
    }

    /// Its process ends: every connection breaks and none can be made.
    pub(super) async fn kill(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

type RieState = (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<Semaphore>, Arc<Notify>, Arc<AtomicBool>);

async fn invoke(
    (crashed, invoked, gate, begun, busy): RieState,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let Ok(payload) = request.into_body().collect().await else {
        return Err(std::io::Error::other("the payload was cut off"));
    };
    if crashed.load(Ordering::SeqCst) || busy.swap(true, Ordering::SeqCst) {
        crashed.store(true, Ordering::SeqCst);
        return Err(std::io::Error::other("a second call"));
    }
    invoked.fetch_add(1, Ordering::SeqCst);
    begun.notify_one();
    // Like the real one it goes on if its caller leaves.
    let work = tokio::spawn(async move {
        gate.acquire().await.unwrap().forget();
        busy.store(false, Ordering::SeqCst);
    });
    work.await.unwrap();
    let mut answer = b"echo: ".to_vec();
    answer.extend_from_slice(&payload.to_bytes());
    Ok(Response::new(Full::new(Bytes::from(answer))))
}

/// A server whose every connection is handled by `serve`.
pub(super) async fn server<F, R>(serve: F) -> SocketAddr
where
    F: Fn(Client) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(Client { stream, read: Vec::new() }));
        }
    });
    address
}

/// A server that answers each request without a body with its head.
pub(super) async fn mirror() -> SocketAddr {
    server(|mut client| async move {
        loop {
            let head = client.head().await;
            client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len())).await;
        }
    })
    .await
}
