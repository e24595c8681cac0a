//! The function server: a resource manager asks this node for single replicas of functions, by gRPC and past Kubernetes.
//!
//! ```text
//! resource manager --CreateReplica, ReleaseVMSetup--> server --> service --Replicas--> pooled --> setup pool, machines
//!        ^                                                          |
//!        '------RegisterFunctionNode, UpdateStatus------ manager <--' news of replicas
//! ```
//! The protocol is that of `proto/functionserver` and `proto/resmngr`; docs/function-server.md says for people what each
//! field means. It listens on loopback, or asks everybody who connects for a certificate. What is asked for is checked by
//! `request`, made by [`Replicas`], and what is refused becomes a `status` that says why.

mod dial;
mod manager;
pub mod pooled;
mod replicas;
mod request;
mod server;
mod service;
mod status;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use manager::ManagerParams;
pub use replicas::{Reason, Refusal, Replica, ReplicaWish, Replicas, Supply, TryAgain};
pub use server::Limits;
pub use tls::{TlsError, TlsFiles};

use manager::{Manager, Reports};
use server::Server;
use service::Service;

/// How long replicas that are being started or released may take when the server ends.
const ENDING: Duration = Duration::from_secs(5);

/// What a function server is made from.
pub struct Params {
    /// Where it listens.
    pub listen: SocketAddr,
    /// What it shows and believes; may be `None` on loopback only.
    pub tls: Option<TlsFiles>,
    /// The resource manager this node registers with, if there is one.
    pub manager: Option<ManagerParams>,
    /// Where replicas come from, now and later.
    pub supply: watch::Receiver<Supply>,
    /// Bounds.
    pub limits: Limits,
}

/// Why there is no function server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Anybody could call it.
    #[error(
        "the function server would listen on {0} for anybody: it needs a certificate, its key and a CA for clients there"
    )]
    Open(SocketAddr),
    /// Its certificates are of no use.
    #[error("failed to set up TLS for the function server")]
    Tls(#[from] TlsError),
    /// The address cannot be listened on.
    #[error("failed to listen on {address} for the function server")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A function server that listens.
pub struct FunctionServer {
    listener: TcpListener,
    address: SocketAddr,
    server: Server,
    manager: Option<Manager>,
}

impl FunctionServer {
    /// Listens; nobody is answered before [`serve`](Self::serve).
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn bind(params: Params) -> Result<Self, ServerError> {
        let Params { listen, tls, manager, supply, limits } = params;
        match &tls {
            None if !listen.ip().is_loopback() => return Err(ServerError::Open(listen)),
            None => {}
            // So that what is wrong with the files is told at the start.
            Some(files) => {
                files.server()?;
                files.client()?;
            }
        }
        let failed = |source| ServerError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (reports, inbox) = Reports::queue();
        let service = Service::new(supply, limits.clone(), manager.is_some().then_some(reports));
        let manager = manager.map(|params| Manager::new(params, address.port(), service.clone(), inbox));
        Ok(Self { listener, address, server: Server { service, tls, limits }, manager })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`. Replicas go on after it.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self { listener, address, server, manager } = self;
        info!(%address, tls = server.tls.is_some(), "the function server listens");
        let service = server.service.clone();
        let telling = async {
            if let Some(manager) = manager {
                manager.run(shutdown.clone()).await;
            }
        };
        let serving = async {
            tokio::select! {
                // Cancel-safe: it ends with `shutdown` alone.
                () = Arc::new(server).run(listener, shutdown.clone()) => {}
                // Cancel-safe: replicas are watched by tasks of their own.
                () = service.adopt() => {}
            }
        };
        tokio::join!(serving, telling);
        service.end(ENDING).await;
    }
}
