//! A function server on a free port of this host, with replicas that are only remembered.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use lambdalet::function_server::{
    FunctionServer, Limits, ManagerParams, Params, Reason, Refusal, Replica, ReplicaWish, Replicas, Supply, TlsFiles,
    TryAgain,
};
use lambdalet_proto::functionserver::function_client::FunctionClient;
use lambdalet_proto::functionserver::{CreateRequest, ReleaseRequest};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const ADDRESS: &str = "10.187.0.7";

/// Replicas `vm0`, `vm1` and so on.
pub(crate) struct Remembered {
    most: usize,
    state: Mutex<State>,
    /// What was asked for, in order.
    events: watch::Sender<Vec<String>>,
    /// Whether one that is being started goes on.
    open: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    made: usize,
    wishes: Vec<ReplicaWish>,
    running: HashMap<String, CancellationToken>,
    /// So many of the next releases fail.
    stuck: usize,
}

impl Remembered {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        let (state, events, open) = (Mutex::default(), watch::Sender::default(), watch::Sender::new(true));
        Arc::new(Self { most, state, events, open })
    }

    /// From now on what is started waits.
    pub(crate) fn hold(&self) {
        self.open.send_replace(false);
    }

    pub(crate) fn go_on(&self) {
        self.open.send_replace(true);
    }

    /// Ends a replica as if by itself.
    pub(crate) fn end(&self, id: &str) {
        self.state.lock().unwrap().running[id].cancel();
    }

    /// So many of the next releases fail, and the replica stays.
    pub(crate) fn stick(&self, times: usize) {
        self.state.lock().unwrap().stuck = times;
    }

    pub(crate) fn count(&self) -> usize {
        self.state.lock().unwrap().running.len()
    }

    /// What each replica was to be, in order.
    pub(crate) fn wishes(&self) -> Vec<ReplicaWish> {
        self.state.lock().unwrap().wishes.clone()
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.borrow().clone()
    }

    /// Waits until that has happened.
    pub(crate) async fn happened(&self, event: &str) {
        let mut events = self.events.subscribe();
        let seen = timeout(PATIENCE, events.wait_for(|events| events.iter().any(|one| one == event))).await;
        assert!(seen.is_ok(), "{event} did not happen: {:?}", self.events());
    }

    fn note(&self, event: String) {
        self.events.send_modify(|events| events.push(event));
    }
}

#[async_trait]
impl Replicas for Remembered {
    async fn create(&self, wish: &ReplicaWish) -> Result<Replica, Refusal> {
        let id = {
            let mut state = self.state.lock().unwrap();
            if state.running.len() >= self.most {
                let retry_after = Duration::from_millis(1500);
                return Err(TryAgain { reason: Reason::Replicas, retry_after }.into());
            }
            let id = format!("vm{}", state.made);
            state.made += 1;
            state.wishes.push(wish.clone());
            state.running.insert(id.clone(), CancellationToken::new());
            id
        };
        self.note(format!("create {id} {} MiB", wish.memory >> 20));
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        self.note(format!("made {id}"));
        let ended = self.state.lock().unwrap().running[&id].clone();
        let ended = async move { ended.cancelled().await }.boxed();
        Ok(Replica { id, address: ADDRESS.parse::<IpAddr>().unwrap(), ended })
    }

    async fn release(&self, id: &str) -> Result<(), Refusal> {
        let known = {
            let mut state = self.state.lock().unwrap();
            if state.stuck > 0 && state.running.contains_key(id) {
                state.stuck -= 1;
                self.note(format!("stuck {id}"));
                return Err(Refusal::Failed { tried: format!("end replica {id}"), source: "it is busy".into() });
            }
            state.running.remove(id)
        };
        known.ok_or(Refusal::NotAssigned)?.cancel();
        self.note(format!("release {id}"));
        Ok(())
    }
}

/// A function server that serves.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) supply: watch::Sender<Supply>,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

impl Node {
    pub(crate) async fn new(replicas: &Arc<Remembered>) -> Self {
        Self::with(Some(replicas), |_| {}).await
    }

    pub(crate) async fn with(replicas: Option<&Arc<Remembered>>, adjust: impl FnOnce(&mut Params)) -> Self {
        let supply = match replicas {
            Some(replicas) => Supply::Ready(Arc::clone(replicas) as Arc<dyn Replicas>),
            None => Supply::Missing("there is no driver here".to_owned()),
        };
        let (supply, supplied) = watch::channel(supply);
        let mut params = Params {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: None,
            manager: None,
            supply: supplied,
            limits: Limits::default(),
        };
        adjust(&mut params);
        let server = FunctionServer::bind(params).await.unwrap();
        let (address, shutdown) = (server.address(), CancellationToken::new());
        let serving = tokio::spawn(server.serve(shutdown.clone()));
        Self { address, supply, shutdown, serving }
    }

    /// One that registers with a manager at that port, and has room for one connection.
    pub(crate) async fn managed(replicas: &Arc<Remembered>, port: u16) -> Self {
        let manager = ManagerParams {
            host: "127.0.0.1".to_owned(),
            port,
            advertised: "127.0.0.1".to_owned(),
            node: "node-1".to_owned(),
            tls: None,
        };
        let adjust = |params: &mut Params| {
            params.manager = Some(manager);
            params.limits.connections = 1;
        };
        Self::with(Some(replicas), adjust).await
    }

    pub(crate) async fn client(&self) -> Client {
        self.try_client().await.unwrap()
    }

    async fn try_client(&self) -> Result<Client, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        Ok(Client(FunctionClient::new(endpoint.connect().await?)))
    }

    /// A client that asks for a replica and is gone before there is one. The server has noticed when this returns another
    /// client: the node has room for one connection.
    pub(crate) async fn abandoned(&self, replicas: &Remembered) -> Client {
        replicas.hold();
        let mut client = self.client().await;
        let call = tokio::spawn(async move { client.create().await });
        replicas.happened("create vm0 128 MiB").await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        let next = timeout(PATIENCE, async {
            loop {
                if let Ok(mut client) = self.try_client().await
                    && let Err(status) = client.release("none").await
                    && status.code() == Code::NotFound
                {
                    return client;
                }
                // Closed, for there was no room yet; nobody tells when there is.
                sleep(Duration::from_millis(5)).await;
            }
        });
        let client = next.await.expect("a place becomes free");
        replicas.go_on();
        client
    }

    pub(crate) async fn end(self) {
        self.shutdown.cancel();
        timeout(PATIENCE, self.serving).await.unwrap().unwrap();
    }
}

/// A client in Rust.
#[derive(Clone)]
pub(crate) struct Client(pub(crate) FunctionClient<Channel>);

impl Client {
    /// The id of a fresh replica.
    pub(crate) async fn create(&mut self) -> Result<String, Status> {
        let reply = self.0.create_replica(request()).await.map(Response::into_inner)?;
        assert_eq!(reply.ip, ADDRESS);
        Ok(reply.vmid)
    }

    pub(crate) async fn release(&mut self, id: &str) -> Result<(), Status> {
        self.0.release_vm_setup(ReleaseRequest { vmid: id.to_owned() }).await.map(Response::into_inner)
    }
}

/// A request that is fine.
pub(crate) fn request() -> CreateRequest {
    CreateRequest {
        kernel_image_path: "/assets/vmlinux".to_owned(),
        initrd_path: "/assets/initrd".to_owned(),
        mem: 128,
        ..CreateRequest::default()
    }
}

pub(crate) fn files(directory: &std::path::Path) -> TlsFiles {
    let path = |name: &str| directory.join(name);
    TlsFiles { certificate: path("server.crt"), key: path("server.key"), client_ca: path("ca.crt") }
}
