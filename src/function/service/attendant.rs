//! One task for each replica and each environment: does what the pool decided for it, in that order.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Adopted, NotStarted, Replicas, Service, Started};
use crate::function::front::{Environment, LAMBDA_PATH};
use crate::function::pool_state::{EnvironmentId, Event, Exit, Found, ReplicaId};
use crate::function::protocol::Protocol;

/// How long a no-op may take that warms an environment; its failure is no reason not to use it.
const WARM_UP_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks whether an environment listens: at first, and at most.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(25);
/// How long it may take to hear of the end of an environment that broke off a call, before it is stopped.
const END_PATIENCE: Duration = Duration::from_millis(250);
/// How long an adopted environment may take to become known to be idle; then it is replaced.
const IDLE_PATIENCE: Duration = Duration::from_secs(900);

/// What an environment's attendant is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Start it; a stop interrupts this.
    Start {
        /// Send a no-op before it counts as ready.
        warm_up: bool,
        /// How long it may take to listen once its processes run.
        patience: Duration,
    },
    Freeze,
    Thaw,
    Stop {
        /// It broke off a call: should it have ended by itself, the pool wants to know how.
        broke: bool,
    },
}

/// What a replica's attendant is to do.
pub(super) enum ReplicaOrder {
    Start,
    /// Remove it once each of these, its environments' attendants, is done.
    Stop(Vec<CancellationToken>),
}

/// What every attendant has.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) service: Weak<Service>,
    pub(super) replicas: Arc<dyn Replicas>,
}

impl Desk {
    fn feed(&self, event: Event) {
        if let Some(service) = self.service.upgrade() {
            service.feed(event);
        }
    }

    /// Attends a replica until it is stopped, or the service is gone.
    pub(super) async fn replica(self, id: ReplicaId, mut orders: mpsc::Receiver<ReplicaOrder>) {
        let mut order = orders.recv().await;
        if matches!(order, Some(ReplicaOrder::Start)) {
            order = tokio::select! {
                biased;
                // Cancel-safe: an order not taken stays.
                next = orders.recv() => next,
                // Dropped half-way, the stop that came removes what it made.
                started = self.replicas.start_replica(id) => {
                    match started {
                        Ok(()) => self.feed(Event::ReplicaStarted { replica: id }),
                        Err(NotStarted::Failed(exit)) => self.feed(Event::ReplicaFailed { replica: id, exit }),
                        Err(NotStarted::Denied) => return self.denied(id),
                    }
                    orders.recv().await
                }
            };
        }
        if let Some(ReplicaOrder::Stop(environments)) = order {
            for ended in environments {
                ended.cancelled().await;
            }
            self.replicas.stop_replica(id).await;
            if let Some(service) = self.service.upgrade() {
                service.forget_replica(id);
            }
        }
    }

    /// There is nothing to stop.
    fn denied(&self, replica: ReplicaId) {
        if let Some(service) = self.service.upgrade() {
            service.inner().replicas.remove(&replica);
            service.feed(Event::ReplicaDenied { replica });
        }
    }

    /// Attends an environment from its start until it is stopped, or the service is gone.
    pub(super) async fn environment(self, id: EnvironmentId, mut orders: mpsc::Receiver<Order>) {
        let mut life = Life::unborn();
        let mut next = orders.recv().await;
        let begun = Instant::now();
        if let Some(Order::Start { warm_up, patience }) = next {
            next = tokio::select! {
                biased;
                // Cancel-safe: an order not taken stays. None but a stop comes before it is ready.
                order = orders.recv() => order,
                // Dropped half-way, the stop that came removes what it made.
                started = self.start(id, warm_up, patience) => {
                    match started {
                        Ok((started, ran)) => {
                            self.count_start(begun, ran, started.prepared);
                            self.ready(id, started.address);
                            life = self.life(id, started.ended);
                        }
                        Err(exit) => self.lost(id, exit),
                    }
                    self.next_order(id, &mut life, &mut orders).await
                }
            };
        }
        self.attend(id, next, life, orders).await;
    }

    /// Attends an environment of an earlier process: it takes calls once it is known to be idle.
    pub(super) async fn adopted(self, found: Adopted, mut orders: mpsc::Receiver<Order>) {
        let Adopted { environment: id, address, ended, found, idle } = found;
        let mut life = self.life(id, ended);
        if found == Found::Frozen {
            let next = self.next_order(id, &mut life, &mut orders).await;
            return self.attend(id, next, life, orders).await;
        }
        let next = tokio::select! {
            biased;
            // Cancel-safe: an order not taken stays.
            order = orders.recv() => order,
            exit = life.end() => {
                self.lost(id, exit);
                orders.recv().await
            }
            // Cancel-safe: it only looks.
            known = tokio::time::timeout(IDLE_PATIENCE, idle) => {
                match known {
                    Ok(()) => self.ready(id, address),
                    Err(_) => self.lost(id, Exit {
                        code: None,
                        reason: "Unknown".to_owned(),
                        message: "it could not be known to be idle after a restart of the node agent".to_owned(),
                    }),
                }
                self.next_order(id, &mut life, &mut orders).await
            }
        };
        self.attend(id, next, life, orders).await;
    }

    async fn attend(
        &self,
        id: EnvironmentId,
        mut next: Option<Order>,
        mut life: Life,
        mut orders: mpsc::Receiver<Order>,
    ) {
        while let Some(order) = next {
            match order {
                Order::Start { .. } => {}
                Order::Freeze => self.replicas.freeze(id).await,
                Order::Thaw => match self.replicas.thaw(id).await {
                    Ok(()) => self.feed(Event::EnvironmentReady { environment: id }),
                    Err(exit) => self.lost(id, exit),
                },
                Order::Stop { broke } => {
                    if broke {
                        self.hear_end(id, &mut life, &mut orders).await;
                    }
                    // From here on its end is what was asked for, so nobody is told of it.
                    drop(life);
                    self.replicas.stop_environment(id).await;
                    if let Some(service) = self.service.upgrade() {
                        service.forget_environment(id);
                    }
                    return;
                }
            }
            next = self.next_order(id, &mut life, &mut orders).await;
        }
    }

    /// The next order. Should the environment end before, the pool is told.
    async fn next_order(
        &self,
        id: EnvironmentId,
        life: &mut Life,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Option<Order> {
        loop {
            tokio::select! {
                // Cancel-safe: an order not taken stays.
                order = orders.recv() => return order,
                // Cancel-safe: news that is not taken stays.
                news = life.news() => match news {
                    News::Ended(exit) => self.lost(id, exit),
                    News::Ready(ready) => self.feed(Event::EnvironmentProbed { environment: id, ready }),
                },
            }
        }
    }

    /// Tells the pool how an environment ended that may have. That its connections broke is known before.
    async fn hear_end(&self, id: EnvironmentId, life: &mut Life, orders: &mut mpsc::Receiver<Order>) {
        if life.ended.is_none() {
            return;
        }
        tokio::select! {
            biased;
            exit = life.end() => self.lost(id, exit),
            // Its replica is to go, or the service has: there is nobody to wait for. An order that is lost is to stop.
            _ = orders.recv() => {}
            () = sleep(END_PATIENCE) => {}
        }
    }

    fn life(&self, id: EnvironmentId, ended: BoxFuture<'static, Exit>) -> Life {
        Life { ended: Some(ended), readiness: self.replicas.readiness(id).fuse().boxed() }
    }

    fn lost(&self, id: EnvironmentId, exit: Exit) {
        if let Some(service) = self.service.upgrade() {
            service.lost(id, exit);
        }
    }

    /// `ran`: since when its processes run.
    fn count_start(&self, begun: Instant, ran: Instant, prepared: bool) {
        if let Some(service) = self.service.upgrade() {
            service.counts.started(begun.elapsed(), ran - begun, prepared);
        }
    }

    fn ready(&self, id: EnvironmentId, address: SocketAddr) {
        if let Some(service) = self.service.upgrade() {
            service.ready(id, Environment::new(address));
        }
    }

    async fn start(&self, id: EnvironmentId, warm_up: bool, patience: Duration) -> Result<(Started, Instant), Exit> {
        let Started { address, mut ended, prepared } = self.replicas.start_environment(id).await?;
        let ran = Instant::now();
        tokio::select! {
            // Cancel-safe: it only looks.
            listens = listening(address, patience) => listens?,
            exit = &mut ended => return Err(exit),
        }
        let takes_no_op = || self.service.upgrade().is_some_and(|service| service.protocol() == Protocol::Rie);
        if warm_up && takes_no_op() {
            tokio::select! {
                // Dropped, it closes its connection to an environment that is gone.
                () = warm(address) => {}
                exit = &mut ended => return Err(exit),
            }
        }
        Ok((Started { address, ended, prepared }, ran))
    }
}

/// What is heard of an environment.
struct Life {
    /// How it ends; `None` once that is known.
    ended: Option<BoxFuture<'static, Exit>>,
    /// Whether it may have calls.
    readiness: BoxStream<'static, bool>,
}

enum News {
    Ended(Exit),
    Ready(bool),
}

impl Life {
    /// Of which nothing will be heard.
    fn unborn() -> Self {
        Self { ended: None, readiness: stream::pending().boxed() }
    }

    /// How it ended; never, if that is known already.
    async fn end(&mut self) -> Exit {
        match &mut self.ended {
            Some(ended) => {
                let exit = ended.await;
                self.ended = None;
                exit
            }
            None => std::future::pending().await,
        }
    }

    /// What happens next; never anything, once it has ended and that is known.
    async fn news(&mut self) -> News {
        let Some(ended) = &mut self.ended else { return std::future::pending().await };
        tokio::select! {
            biased;
            // Cancel-safe: it is asked again.
            exit = ended => {
                self.ended = None;
                News::Ended(exit)
            }
            // Cancel-safe: a stream keeps what was not taken.
            Some(ready) = self.readiness.next() => News::Ready(ready),
        }
    }
}

/// Returns once connections are accepted there.
async fn listening(address: SocketAddr, patience: Duration) -> Result<(), Exit> {
    let deadline = Instant::now() + patience;
    let mute = |why: &str| {
        let message = format!("nothing listens on port {} after {patience:?}: {why}", address.port());
        Exit { code: None, reason: "NotListening".to_owned(), message }
    };
    let mut pause = FIRST_LOOK;
    loop {
        match timeout_at(deadline, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) if Instant::now() >= deadline => return Err(mute(&error.to_string())),
            Ok(Err(_)) => sleep(pause).await,
            Err(_) => return Err(mute("it does not answer")),
        }
        pause = (pause * 2).min(LAST_LOOK);
    }
}

/// One call without content, so that the user's code is loaded. What it answers does not matter.
async fn warm(address: SocketAddr) {
    let call = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = http::Request::post(LAMBDA_PATH)
            .header(http::header::HOST, address.to_string())
            .body(Full::new(Bytes::from_static(b"{}")))?;
        let answer = async {
            let answer = sender.send_request(request).await?;
            answer.into_body().collect().await
        };
        tokio::select! {
            // Cancel-safe: whichever ends first ends the call.
            answer = answer => answer.map(drop)?,
            ended = connection => ended?,
        }
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    };
    match tokio::time::timeout(WARM_UP_PATIENCE, call).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%address, %error, "a warming call failed"),
        Err(_) => tracing::debug!(%address, "a warming call took too long"),
    }
}
