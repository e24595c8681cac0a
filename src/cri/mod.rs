//! CRI v1 over the runtime seam: the drivers for crictl, for a stock kubelet, and for whatever else speaks it.
//!
//! ```text
//! client --unix socket--> service --> core: sandboxes, containers, images --verb--> SandboxRuntime, ImageStore
//!    |                                  |-- shelf: labels, annotations, log paths (no driver keeps them)
//!    |                                  |-- network: an address for each Pod, the bridge
//!    |                                  |-- view: what lists tell, looked at again where something happened
//!    |                                  |-- logs: what containers write, into the client's files
//!    |                                  '-- events: what happened, by looking
//!    '--URL of a ticket--> kubelet_api::streaming::plain --> the streams of a process or a port
//! ```
//! `filter`, `tell`, `translate` and `stats` are pure. What a client asks for and cannot have is refused by name.

mod containers;
mod core;
mod events;
mod exec_sync;
mod failure;
mod figures;
mod files;
mod filter;
mod images;
mod logs;
mod network;
mod runtime_status;
mod sandboxes;
mod service;
mod shelf;
mod socket;
mod stats;
mod streams;
mod tell;
mod tickets;
mod translate;
mod view;

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lambdalet_proto::cri::v1::image_service_server::ImageServiceServer;
use lambdalet_proto::cri::v1::runtime_service_server::RuntimeServiceServer;
use tokio::net::TcpListener;
use tokio::sync::{OnceCell, mpsc};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tracing::info;

pub use self::core::About;
pub use failure::CriError;
pub use network::Plug;

use self::core::Core;
use crate::kubelet_api::streaming::plain;
use crate::runtime::Runtime;
use crate::shutdown::Tasks;
use crate::turns::Turns;
use events::Events;
use logs::Logs;
use network::Network;
use service::Service;
use shelf::Shelf;
use socket::Socket;
use view::View;

/// Bytes of a request: a kubelet sends and takes as much.
const LONGEST_REQUEST: usize = 16 << 20;
/// How long clients have to leave when the server ends; one that does not listen must not hold it up.
const GRACE: Duration = Duration::from_secs(5);
/// Calls of one client that are worked on at once; more wait.
const CALLS: usize = 1024;
/// Calls of one client that may wait or be worked on at once, streams of events included.
const OPEN_CALLS: u32 = 4096;

/// Everything the server is made from.
pub struct Params {
    /// The socket.
    pub listen: PathBuf,
    /// Where the streaming server listens; port 0 lets the system choose. Loopback: who has a ticket needs no other right.
    pub streams: SocketAddr,
    /// Where is kept what must survive a restart. One process has it.
    pub root: PathBuf,
    /// Runs the sandboxes.
    pub runtime: Arc<dyn Runtime>,
    /// What it is called and given.
    pub about: About,
    /// The range of addresses: the one that was asked for, and the one if none was.
    pub range: (Option<IpNet>, IpNet),
    /// Where sandboxes are plugged in; `None` where the driver has no cable.
    pub plug: Option<Plug>,
}

/// The server, listening.
pub struct Cri {
    socket: Socket,
    streams: TcpListener,
    core: Arc<Core>,
    looks: mpsc::Receiver<String>,
    /// Held as long as this lives.
    _lock: File,
}

impl Cri {
    /// Takes the root directory, the socket and the streaming port, and makes the network be there. What runs already is
    /// found at the first call.
    ///
    /// # Errors
    /// See [`CriError`].
    pub async fn bind(params: Params, tasks: &Tasks) -> Result<Self, CriError> {
        let Params { listen, streams, root, runtime, about, range, plug } = params;
        let lock = socket::lock(&root)?;
        let socket = Socket::bind(&listen).await?;
        let failed = |source| CriError::Listen { address: streams, source };
        let listener = TcpListener::bind(streams).await.map_err(failed)?;
        let (events, looks) = Events::new();
        let core = Core {
            about,
            sandboxes: Shelf::open(sandbox_files(&root))?,
            containers: Shelf::open(root.join("containers"))?,
            network: Network::open(&root, range, plug).await?,
            logs: Logs::new(Arc::clone(&runtime), tasks.clone()),
            desk: Arc::default(),
            streams: listener.local_addr().map_err(failed)?,
            events,
            turns: Turns::default(),
            view: View::default(),
            tasks: tasks.clone(),
            mountpoint: OnceCell::new(),
            adopted: OnceCell::new(),
            runtime,
        };
        info!(socket = %listen.display(), streams = %core.streams, "serving CRI v1");
        Ok(Self { socket, streams: listener, core: Arc::new(core), looks, _lock: lock })
    }

    /// Answers until `draining`; then takes no new calls, ends streams, and waits for calls that are being answered.
    /// Sandboxes stay.
    ///
    /// # Errors
    /// [`CriError::Serve`].
    pub async fn serve(self, draining: CancellationToken) -> Result<(), CriError> {
        let Self { socket, streams, core, looks, _lock } = self;
        let service = Service(Arc::clone(&core));
        let runtime = RuntimeServiceServer::new(service.clone()).max_decoding_message_size(LONGEST_REQUEST);
        let images = ImageServiceServer::new(service).max_decoding_message_size(LONGEST_REQUEST);
        let grpc = Server::builder()
            .concurrency_limit_per_connection(CALLS)
            .max_concurrent_streams(OPEN_CALLS)
            // A client that gives up many calls at once is no attack: it could do worse, and all others share its connection.
            .http2_max_pending_accept_reset_streams(Some(OPEN_CALLS as usize))
            .add_service(runtime)
            .add_service(images)
            .serve_with_incoming_shutdown(socket.incoming(), draining.clone().cancelled_owned());
        let end = draining.child_token();
        let grpc = async {
            let late = async {
                draining.cancelled().await;
                sleep(GRACE).await;
            };
            let served = tokio::select! {
                // Not cancel-safe, and need not be: whoever is still connected then does not listen.
                served = grpc => served,
                // Cancel-safe: it only waits.
                () = late => Ok(()),
            };
            // Without it nobody asks for the others.
            end.cancel();
            served
        };
        let streaming = plain::serve(streams, core.desk.clone(), as_sandboxes(&core.runtime), end.clone());
        let (served, (), ()) = tokio::join!(grpc, streaming, events::run(Arc::clone(&core), looks, end.clone()));
        served.map_err(CriError::Serve)
    }
}

/// Where the files of sandboxes are that their containers see, for a server with this root directory.
pub fn sandbox_files(root: &Path) -> PathBuf {
    root.join("sandboxes")
}

/// The half of a driver that runs sandboxes.
fn as_sandboxes(runtime: &Arc<dyn Runtime>) -> Arc<dyn crate::runtime::SandboxRuntime> {
    let runtime: Arc<dyn Runtime> = Arc::clone(runtime);
    runtime
}
