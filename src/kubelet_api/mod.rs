//! The node's own HTTPS API, as the API server and scrapers know it from a kubelet.
//!
//! ```text
//! connection -> slots -> TLS (client certificate) -> auth::gate -> the table in `routes` -> PodTargets, SandboxRuntime
//! ```
//!
//! Who may call is decided before a path is looked at: an unknown path answers 401 to a stranger like any other.

mod attributes;
mod auth;
mod body;
mod cache;
mod health;
mod identity;
mod log_files;
mod log_query;
mod log_span;
mod logs;
mod meters;
mod pages;
mod peer;
mod profile;
mod seldom;
mod self_signed;
mod server;
mod slots;
mod stats;
pub mod streaming;
pub mod targets;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::{StatusCode, Uri, header};
use k8s_openapi::api::core::v1::Pod;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use auth::{Access, Authorization, REVIEWS_AT_ONCE};
use health::Health;
use meters::Meters;
pub use pages::{About, flags_of};
pub use self_signed::SelfSigned;
pub use server::Limits;
use server::Server;
use stats::Collector;
use streaming::endpoints::{self, Room};
use targets::PodTargets;
use tls::Tls;
pub use tls::{Serving, TlsError, TlsParams};

use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::runtime::{ImageStore, Kind, SandboxRuntime};
use crate::telemetry::chain;

/// Everything the API is made from.
pub struct Params {
    /// Where to listen (`--address` and `--port`); port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The node's name: rights are asked for on this Node.
    pub node_name: String,
    /// Certificates.
    pub tls: TlsParams,
    /// Who is let in.
    pub access: Access,
    /// For TokenReview and SubjectAccessReview; the node's identity needs `create` on both (the ClusterRole
    /// `system:auth-delegator`, or any `system:node` identity). Best one of its own with room for [`REVIEWS_AT_ONCE`]
    /// requests: strangers can keep it busy.
    pub client: kube::Client,
    /// Finds Pods.
    pub targets: Arc<dyn PodTargets>,
    /// Runs them.
    pub runtime: Arc<dyn SandboxRuntime>,
    /// Knows where images are.
    pub images: Arc<dyn ImageStore>,
    /// What `/metrics` shows; the API's own metrics are added.
    pub metrics: Metrics,
    /// Bounds.
    pub limits: Limits,
    /// What the node tells of itself.
    pub about: About,
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// A certificate, key or authority is not usable.
    #[error("failed to set up TLS for the node's API")]
    Tls(#[source] TlsError),
    /// The address is taken or not this host's.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The API, listening.
pub struct KubeletApi {
    listener: TcpListener,
    address: SocketAddr,
    server: Arc<Server>,
}

impl KubeletApi {
    /// Loads or makes the certificates and takes the port. Clients may connect from now on; they are answered once
    /// [`Self::serve`] runs.
    ///
    /// # Errors
    /// What cannot be read, parsed, written or listened on.
    pub async fn bind(params: Params) -> Result<Self, ApiError> {
        let tls = Arc::new(Tls::load(params.tls).map_err(ApiError::Tls)?);
        let failed = |source| ApiError::Listen { address: params.listen, source };
        let listener = TcpListener::bind(params.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let meters = Meters::new(&params.metrics);
        let gate = auth::Gate::new(params.node_name.clone(), params.access, params.client, tls.clone(), meters.clone());
        let app = App {
            stats: Arc::new(Collector::new(
                params.runtime.clone(),
                params.images,
                params.targets.clone(),
                params.about.root_dir.clone(),
            )),
            targets: params.targets,
            runtime: params.runtime,
            metrics: params.metrics,
            meters: meters.clone(),
            health: Health::default(),
            node_name: params.node_name.into(),
            about: Arc::new(params.about),
            room: Room::new(params.limits.streams, params.limits.stream_idle),
        };
        let router = routes()
            .layer(from_fn(body::read_and_forget))
            .layer(from_fn_with_state(Arc::new(gate), auth::gate))
            .layer(from_fn_with_state(app.clone(), observe))
            .with_state(app);
        let server = Arc::new(Server::new(tls, router, params.limits, meters));
        Ok(Self { listener, address, server })
    }

    /// Where it listens, the chosen port filled in.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` is cancelled; then what is being answered has two seconds to end. Followed logs and
    /// open streams are cut off: their clients see a broken connection, as with a restarted kubelet.
    pub async fn serve(self, shutdown: CancellationToken) {
        info!(address = %self.address, "serving the node's API");
        server::run(self.server, self.listener, shutdown).await;
    }
}

/// What handlers share.
#[derive(Clone)]
struct App {
    targets: Arc<dyn PodTargets>,
    runtime: Arc<dyn SandboxRuntime>,
    metrics: Metrics,
    meters: Meters,
    room: Room,
    stats: Arc<Collector>,
    health: Health,
    node_name: Arc<str>,
    about: Arc<About>,
}

/// The whole table.
fn routes() -> Router<App> {
    let mut router = Router::new()
        .route("/metrics", get(metrics))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs::container_logs))
        .route("/exec/{namespace}/{pod}/{container}", get(endpoints::exec).post(endpoints::exec))
        .route("/exec/{namespace}/{pod}/{uid}/{container}", get(endpoints::exec).post(endpoints::exec))
        .route("/attach/{namespace}/{pod}/{container}", get(endpoints::attach).post(endpoints::attach))
        .route("/attach/{namespace}/{pod}/{uid}/{container}", get(endpoints::attach).post(endpoints::attach))
        .route("/portForward/{namespace}/{pod}", get(endpoints::port_forward).post(endpoints::port_forward))
        .route("/portForward/{namespace}/{pod}/{uid}", get(endpoints::port_forward).post(endpoints::port_forward))
        .route("/run/{namespace}/{pod}/{container}", post(endpoints::run))
        .route("/run/{namespace}/{pod}/{uid}/{container}", post(endpoints::run))
        .merge(pages::routes());
    for path in NOT_SERVED {
        router = router.route(path, any(not_served));
    }
    router.fallback(unknown).method_not_allowed_fallback(wrong_method)
}

/// What a kubelet answers and this node does not yet.
const NOT_SERVED: &[&str] = &["/debug/flags/v", "/stats", "/stats/", "/stats/{*rest}"];

/// GET `/metrics`: this process's own metrics.
async fn metrics(State(app): State<App>) -> Response {
    match app.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(cause) => internal("failed to write the metrics", &cause),
    }
}

/// A `v1` `PodList` of borrowed Pods.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodList<'a> {
    kind: &'static str,
    api_version: &'static str,
    metadata: ListMeta,
    items: Vec<&'a Pod>,
}

/// The empty one: this list has no version and no pages.
#[derive(Serialize)]
struct ListMeta {}

/// GET `/pods`: the Pods of this node with the status last computed here.
async fn pods(State(app): State<App>) -> Response {
    let pods = app.targets.pods();
    let items = pods.iter().map(Arc::as_ref).collect();
    let list = PodList { kind: "PodList", api_version: "v1", metadata: ListMeta {}, items };
    match serde_json::to_vec(&list) {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(cause) => internal("failed to write the list of Pods", &cause),
    }
}

fn internal(what: &str, cause: &(dyn std::error::Error + 'static)) -> Response {
    let cause = chain(cause);
    warn!(error = cause, "{what}");
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: {cause}\n")).into_response()
}

async fn not_served(uri: Uri) -> Response {
    let text = format!("lambdalet does not serve {} yet\n", route(uri.path()));
    (StatusCode::NOT_IMPLEMENTED, text).into_response()
}

async fn unknown(uri: Uri) -> Response {
    (StatusCode::NOT_FOUND, format!("no such endpoint: {}\n", uri.path())).into_response()
}

async fn wrong_method(request: Request) -> Response {
    let text = format!("method {} not allowed for {}\n", request.method(), request.uri().path());
    (StatusCode::METHOD_NOT_ALLOWED, text).into_response()
}

/// The status a failed runtime verb is answered with.
fn runtime_status(kind: Kind) -> StatusCode {
    match kind {
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::AlreadyExists => StatusCode::CONFLICT,
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Unauthorized | Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Counts every answer, refusals included.
async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let (began, method) = (Instant::now(), request.method().clone());
    let route = route(request.uri().path());
    let response = next.run(request).await;
    app.meters.request(route, &method, response.status(), began.elapsed());
    response
}

/// The endpoint a path belongs to, out of a closed set, for labels and texts.
fn route(path: &str) -> &'static str {
    const EXACT: [&str; 9] = [
        "/metrics/cadvisor",
        "/metrics/probes",
        "/metrics/resource",
        "/metrics/slis",
        "/stats/summary",
        "/debug/pprof",
        "/healthz/log",
        "/healthz/ping",
        "/healthz/syncloop",
    ];
    const FIRST: [&str; 17] = [
        "/attach",
        "/checkpoint",
        "/configz",
        "/containerLogs",
        "/debug",
        "/exec",
        "/flagz",
        "/healthz",
        "/logs",
        "/metrics",
        "/pods",
        "/portForward",
        "/run",
        "/runningpods",
        "/stats",
        "/statusz",
        "/",
    ];
    let below = |known: &&&str| path.strip_prefix(**known).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    EXACT.iter().find(below).or_else(|| FIRST.iter().find(below)).unwrap_or(&"other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_not_served_is_named() {
        for path in NOT_SERVED {
            let named = route(&path.replace("{*rest}", "a/b"));
            assert!(path.starts_with(named) && named.len() > 1, "{path} is {named}");
        }
        assert_eq!(route("/containerLogs/a/b/c"), "/containerLogs");
        assert_eq!(route("/podsx"), "other");
        assert_eq!(route("/"), "/");
        assert_eq!(route("//pods"), "/");
        assert_eq!(route(""), "other");
    }

    #[test]
    fn the_table_has_no_conflict() {
        let _: Router<App> = routes();
    }
}
