//! The node as the client of a resource manager: one that is there, one that is away, comes back, or talks rubbish.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use lambdalet::function_server::{ManagerParams, TlsFiles};
use lambdalet_proto::resmngr::res_mngr_service_server::{ResMngrService, ResMngrServiceServer};
use lambdalet_proto::resmngr::status_update_reply::Action;
use lambdalet_proto::resmngr::{RegisterFunctionNodeRequest, StatusUpdateReply, StatusUpdateRequest};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Response, Status};

use crate::support::{Node, PATIENCE, Remembered, files};
use crate::tls::Authority;

/// What a manager was told, in order, and what it will answer to news.
#[derive(Clone, Default)]
struct Book {
    told: watch::Sender<Vec<String>>,
    answers: Arc<Mutex<VecDeque<Result<i32, Code>>>>,
}

impl Book {
    fn note(&self, line: String) {
        self.told.send_modify(|told| told.push(line));
    }

    fn answer(&self, answer: Result<i32, Code>) {
        self.answers.lock().unwrap().push_back(answer);
    }

    fn told(&self) -> Vec<String> {
        self.told.borrow().clone()
    }

    /// Waits until it was told so many things.
    async fn lines(&self, count: usize) -> Vec<String> {
        let mut told = self.told.subscribe();
        let seen = timeout(PATIENCE, told.wait_for(|told| told.len() >= count)).await.map(|seen| seen.unwrap().clone());
        seen.unwrap_or_else(|_| panic!("only {:?}", self.told()))
    }
}

#[async_trait]
impl ResMngrService for Book {
    async fn update_status(
        &self,
        request: Request<StatusUpdateRequest>,
    ) -> Result<Response<StatusUpdateReply>, Status> {
        let StatusUpdateRequest { vmid, status } = request.into_inner();
        self.note(format!("{vmid} {status}"));
        let answer = self.answers.lock().unwrap().pop_front().unwrap_or(Ok(Action::KeepAlive.into()));
        answer.map(|action| Response::new(StatusUpdateReply { action })).map_err(|code| Status::new(code, "no"))
    }

    async fn register_function_node(
        &self,
        request: Request<RegisterFunctionNodeRequest>,
    ) -> Result<Response<()>, Status> {
        let RegisterFunctionNodeRequest { ip, port, node_id } = request.into_inner();
        assert_ne!(port, 0);
        self.note(format!("{node_id} at {ip}"));
        Ok(Response::new(()))
    }
}

/// A manager that serves; dropping it cuts every connection and closes the port.
struct Manager {
    port: u16,
    book: Book,
    _serving: AbortOnDropHandle<()>,
}

impl Manager {
    async fn at(port: u16) -> Self {
        Self::with(port, None).await
    }

    async fn with(port: u16, tls: Option<ServerConfig>) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let book = Book::default();
        let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        let serving = tokio::spawn(serve(listener, book.clone(), tls));
        Self { port, book, _serving: AbortOnDropHandle::new(serving) }
    }
}

async fn serve(listener: TcpListener, book: Book, tls: Option<TlsAcceptor>) {
    let mut connections = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let (book, tls) = (book.clone(), tls.clone());
        connections.spawn(async move {
            match tls {
                None => http(tcp, book).await,
                Some(tls) => {
                    // Who is not let in hangs up.
                    if let Ok(io) = tls.accept(tcp).await {
                        http(io, book).await;
                    }
                }
            }
        });
    }
}

async fn http(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, book: Book) {
    let service = TowerToHyperService::new(ResMngrServiceServer::new(book));
    // It ends as its client wants.
    let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(io), service).await;
}

/// A port that nobody listens on.
async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_node_registers_and_tells_of_its_replicas() {
    let (manager, replicas) = (Manager::at(0).await, Remembered::new(8));
    let node = Node::managed(&replicas, manager.port).await;
    assert_eq!(manager.book.lines(1).await, ["node-1 at 127.0.0.1"]);
    let mut client = node.client().await;
    client.create().await.unwrap();
    client.create().await.unwrap();
    assert_eq!(manager.book.lines(3).await[1..], ["vm0 0", "vm1 0"]);
    // Released by the manager's own call: it knows.
    client.release("vm0").await.unwrap();
    replicas.end("vm1");
    assert_eq!(manager.book.lines(4).await[3], "vm1 1");
    replicas.happened("release vm1").await;
    node.end().await;
    assert_eq!(manager.book.told().len(), 4);
}

#[tokio::test]
async fn a_replica_that_the_manager_gives_up_is_released() {
    let (manager, replicas) = (Manager::at(0).await, Remembered::new(8));
    let node = Node::managed(&replicas, manager.port).await;
    for action in [Action::Destroy, Action::Ok, Action::KeepAlive] {
        manager.book.answer(Ok(action.into()));
    }
    // What this node does not know does nothing.
    manager.book.answer(Ok(99));
    let mut client = node.client().await;
    for _ in 0..4 {
        client.create().await.unwrap();
    }
    manager.book.lines(5).await;
    replicas.happened("release vm0").await;
    assert_eq!(replicas.count(), 3);
    node.end().await;
    assert_eq!(replicas.count(), 3);
}

#[tokio::test]
async fn a_replica_is_finished_once_its_setup_is_back_however_long_that_takes() {
    let (manager, replicas) = (Manager::at(0).await, Remembered::new(2));
    let node = Node::managed(&replicas, manager.port).await;
    replicas.stick(2);
    let mut client = node.client().await;
    client.create().await.unwrap();
    replicas.end("vm0");
    replicas.happened("release vm0").await;
    let told = manager.book.lines(3).await;
    assert_eq!(told[1..], ["vm0 0", "vm0 1"], "nothing was told of the failures");
    replicas.stick(1);
    manager.book.answer(Ok(Action::Destroy.into()));
    client.create().await.unwrap();
    replicas.happened("release vm1").await;
    assert_eq!(
        replicas.events()[2..],
        ["stuck vm0", "stuck vm0", "release vm0", "create vm1 128 MiB", "made vm1", "stuck vm1", "release vm1"]
    );
    node.end().await;
    assert_eq!((replicas.count(), manager.book.told().len()), (0, 4));
}

#[tokio::test]
async fn a_client_that_vanished_is_no_news() {
    let (manager, replicas) = (Manager::at(0).await, Remembered::new(8));
    let node = Node::managed(&replicas, manager.port).await;
    manager.book.lines(1).await;
    let mut client = node.abandoned(&replicas).await;
    replicas.happened("release vm0").await;
    client.create().await.unwrap();
    assert_eq!(manager.book.lines(2).await[1], "vm1 0", "vm0 is nothing the manager ever heard of");
}

#[tokio::test]
async fn a_manager_that_is_away_is_waited_for_and_one_that_comes_back_is_told_again() {
    let (port, replicas) = (free_port().await, Remembered::new(8));
    let node = Node::managed(&replicas, port).await;
    let mut client = node.client().await;
    client.create().await.expect("the node works without its manager");
    let manager = Manager::at(port).await;
    assert_eq!(manager.book.lines(2).await, ["node-1 at 127.0.0.1", "vm0 0"]);
    drop(manager);
    client.create().await.unwrap();
    replicas.end("vm1");
    replicas.happened("release vm1").await;
    let manager = Manager::at(port).await;
    let told = manager.book.lines(2).await;
    assert_eq!(told[0], "node-1 at 127.0.0.1", "one that was away knows of no node");
    assert_eq!(manager.book.lines(3).await[1..], ["vm1 0", "vm1 1"]);
    node.end().await;
}

#[tokio::test]
async fn a_manager_that_talks_rubbish_is_tried_again_and_harms_nobody() {
    let replicas = Remembered::new(8);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let node = Node::managed(&replicas, port).await;
    let rubbish = [&b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"[..], &[0xff; 4096], &[0; 9], b""];
    for bytes in rubbish {
        let (mut tcp, _) = timeout(PATIENCE, listener.accept()).await.expect("it tries again").unwrap();
        let _ = tcp.write_all(bytes).await;
        let _ = tcp.shutdown().await;
        // Until it has hung up too.
        let _ = timeout(PATIENCE, tcp.read_to_end(&mut Vec::new())).await.expect("it hangs up");
    }
    node.client().await.create().await.expect("and works meanwhile");
    drop(listener);
    let manager = Manager::at(port).await;
    assert_eq!(manager.book.lines(2).await, ["node-1 at 127.0.0.1", "vm0 0"]);
}

#[tokio::test]
async fn news_that_are_refused_hold_up_no_others() {
    let (manager, replicas) = (Manager::at(0).await, Remembered::new(8));
    let node = Node::managed(&replicas, manager.port).await;
    manager.book.answer(Err(Code::NotFound));
    // This one may fare better.
    manager.book.answer(Err(Code::Unavailable));
    let mut client = node.client().await;
    client.create().await.unwrap();
    client.create().await.unwrap();
    let told = manager.book.lines(4).await;
    assert_eq!(told, ["node-1 at 127.0.0.1", "vm0 0", "vm1 0", "vm1 0"], "and the node was not registered twice");
}

#[tokio::test]
async fn over_tls_both_sides_prove_who_they_are() {
    let (ours, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Authority::new("ours").install(ours.path());
    Authority::new("others").install(others.path());
    let of = |directory: &tempfile::TempDir| files(directory.path());
    let node = async |port, tls: TlsFiles| {
        let manager = ManagerParams {
            host: "127.0.0.1".to_owned(),
            port,
            advertised: "127.0.0.1".to_owned(),
            node: "node-1".to_owned(),
            tls: Some(tls),
        };
        Node::with(Some(&Remembered::new(1)), |params| params.manager = Some(manager)).await
    };
    let manager = Manager::with(0, Some(of(&ours).server().unwrap())).await;
    let stranger = node(manager.port, of(&others)).await;
    let known = node(manager.port, of(&ours)).await;
    assert_eq!(manager.book.lines(1).await.len(), 1);
    stranger.end().await;
    known.end().await;
    assert_eq!(manager.book.told().len(), 1, "only who is known was listened to");
}
