//! Keeps one certificate fresh: asks for the next one in time, and for another when the node's addresses change.
//!
//! A client certificate that has expired all the same, since the API server was away or nobody approved for too long, can
//! ask for nothing any more: then the bootstrap kubeconfig does, or the process ends for want of one, as a kubelet's does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::store::Store;
use super::{IdentityError, Kind, request, user};
use crate::apiserver::{ApiServer, Trouble};
use crate::certificate::{Certificate, Names, PairError};
use crate::node::NodeFacts;
use crate::retry::Retry;
use crate::telemetry::chain;

/// How often the file and the clock are looked at; a host that slept is noticed, and so is a file somebody replaced.
const LOOK: Duration = Duration::from_secs(5);

/// After a refusal; a person has to change their mind first, and each try is a new request for them to see.
const REFUSED_PAUSE: Duration = Duration::from_secs(10 * 60);

/// The owner of one certificate's file.
pub struct Keeper {
    api: Arc<ApiServer>,
    store: Store,
    facts: watch::Receiver<NodeFacts>,
    bootstrap: Option<PathBuf>,
    look: Duration,
}

impl Keeper {
    /// A keeper of the certificate in `store`, asking `api` with the node's own identity.
    pub fn new(api: Arc<ApiServer>, store: Store, facts: watch::Receiver<NodeFacts>) -> Self {
        Self { api, store, facts, bootstrap: None, look: LOOK }
    }

    /// With a kubeconfig to ask by once a client certificate is over (`--bootstrap-kubeconfig`).
    #[must_use]
    pub fn with_bootstrap(self, bootstrap: Option<PathBuf>) -> Self {
        Self { bootstrap, ..self }
    }

    /// Runs until `closing`.
    ///
    /// # Errors
    /// [`IdentityError::Over`], if the API server answers that it does not take an expired client certificate, and there is
    /// nothing else to ask by.
    pub async fn run(mut self, closing: CancellationToken) -> Result<(), IdentityError> {
        let kind = self.store.kind();
        let mut retry = Retry::new(match kind {
            Kind::Client => "renew the client certificate",
            Kind::Serving => "get a serving certificate",
        });
        let mut by_bootstrap = false;
        loop {
            let (node, names) = {
                let facts = self.facts.borrow_and_update();
                (facts.name.clone(), kind.names(&facts))
            };
            let mut wait = self.look;
            let (current, now) = (self.store.current(), Timestamp::now());
            if let Some(reason) = due(&current, &node, &names, now) {
                info!(reason, "a new {} is needed", kind.what());
                let end = current.map_or(now, |certificate| certificate.not_after);
                let over = kind == Kind::Client && end <= now;
                let bootstrap = self.bootstrap.as_deref().filter(|_| over);
                if !std::mem::replace(&mut by_bootstrap, bootstrap.is_some()) && by_bootstrap {
                    // What it asked for as itself may wait for an approval that never comes, and has the same name.
                    self.store.forget_pending();
                }
                let outcome = tokio::select! {
                    // Cancel-safe: the request is found again by the next start.
                    () = closing.cancelled() => return Ok(()),
                    // Cancel-safe: the request for the old addresses is left to the API server's own clearing-up.
                    () = changed(&mut self.facts) => continue,
                    // Cancel-safe: the request is found again, by whoever asks for it then.
                    () = stale(kind, (!over).then_some(end), self.look) => continue,
                    // Cancel-safe, see there.
                    outcome = obtain(&self.api, bootstrap, &self.store, (&node, &names)) => outcome,
                };
                match outcome {
                    Ok(()) => retry.succeeded(),
                    Err(error @ (IdentityError::Refused { .. } | IdentityError::Foreign { .. })) => {
                        warn!(error = chain(&error), "no new {}; asking again in {REFUSED_PAUSE:?}", kind.what());
                        wait = REFUSED_PAUSE;
                    }
                    Err(IdentityError::Create { source, .. })
                        if over && bootstrap.is_none() && source.trouble == Trouble::Unauthorized =>
                    {
                        return Err(IdentityError::Over { path: self.store.path(), source });
                    }
                    Err(error) => wait = retry.failed(chain(&error)),
                }
            }
            tokio::select! {
                // Cancel-safe, all three: a token stays cancelled, a channel keeps its state, a sleep is begun anew.
                () = closing.cancelled() => return Ok(()),
                () = changed(&mut self.facts) => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

/// Asks by the bootstrap kubeconfig if it is to be used, else as the node itself. Dropping the future loses nothing.
async fn obtain(
    api: &ApiServer,
    bootstrap: Option<&Path>,
    store: &Store,
    (node, names): (&str, &Names),
) -> Result<(), IdentityError> {
    let Some(from) = bootstrap else { return request::obtain(api, store, node, names).await };
    // Read each time: its token may have been replaced.
    info!(from = %from.display(), "asking with the bootstrap kubeconfig");
    let api = ApiServer::from_kubeconfig(from).await.map_err(IdentityError::Bootstrap)?;
    request::obtain(&api, store, node, names).await
}

/// When what is asked with may be good for nothing any more, so that waiting on would be in vain: at the end of the client
/// certificate, or after a while where that is over and the bootstrap token may be next. The serving certificate is asked
/// for with a client that follows its files.
async fn stale(kind: Kind, end: Option<Timestamp>, look: Duration) {
    match (kind, end) {
        (Kind::Serving, _) => std::future::pending().await,
        (Kind::Client, None) => tokio::time::sleep(REFUSED_PAUSE).await,
        // By the clock, since a host may sleep.
        (Kind::Client, Some(end)) => {
            while Timestamp::now() < end {
                tokio::time::sleep(look).await;
            }
        }
    }
}

/// The next change of the node's facts; never, once nobody can change them any more.
async fn changed(facts: &mut watch::Receiver<NodeFacts>) {
    if facts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Why another certificate is needed, if one is.
fn due(current: &Result<Certificate, PairError>, node: &str, names: &Names, now: Timestamp) -> Option<&'static str> {
    let certificate = match current {
        Ok(certificate) => certificate,
        Err(PairError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Some("there is none");
        }
        Err(_) => return Some("the one there is not usable"),
    };
    if certificate.common_name != user(node) {
        return Some("the one there is another node's");
    }
    // One that is good for more than the node's addresses would let it speak for somebody else's.
    if names.matter() && certificate.names != *names {
        return Some("the node's names or addresses changed");
    }
    (now >= certificate.renewal()).then_some("the one there is near its end")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::IpAddr;
    use std::sync::Mutex;

    use axum::extract::State;
    use axum::http::{HeaderMap, Method, Request, StatusCode, Uri};
    use axum::response::{IntoResponse, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use rcgen::{CertificateParams, DnType, KeyPair};
    use serde_json::{Value, json};

    use super::*;

    /// How long anything may take.
    const SOON: Duration = Duration::from_secs(20);

    fn facts(address: &str) -> NodeFacts {
        let (capacity, allocatable) = Default::default();
        let addresses = vec![address.parse::<IpAddr>().unwrap()];
        NodeFacts { name: "a".to_owned(), addresses, capacity, allocatable }
    }

    /// The client certificate of node `a`, good for so many seconds from now.
    fn pair(key: &KeyPair, seconds: i64) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        let end = u64::try_from(Timestamp::now().as_second() + seconds).unwrap();
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(end);
        format!("{}{}", params.self_signed(key).unwrap().pem(), key.serialize_pem()).into_bytes()
    }

    fn expired(directory: &Path, seconds: i64) -> Store {
        let store = Store::new(directory, Kind::Client);
        super::super::store::write(&store.path(), &pair(&KeyPair::generate().unwrap(), seconds)).unwrap();
        store
    }

    /// An API server in this process.
    fn server<F>(answer: impl Fn(Method, Uri, Value) -> F + Clone + Send + 'static) -> Arc<ApiServer>
    where
        F: Future<Output = (StatusCode, Value)> + Send + 'static,
    {
        let service = tower::service_fn(move |request: Request<Body>| {
            let answer = answer.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap_or(Value::Null);
                let (status, answer) = answer(head.method, head.uri, body).await;
                let answer = Body::from(answer.to_string().into_bytes());
                Ok::<_, Infallible>(http::Response::builder().status(status).body(answer).unwrap())
            }
        });
        let client = kube::Client::new(service, "default");
        Arc::new(ApiServer { client, url: "https://api.test/".to_owned(), kubeconfig: PathBuf::new() })
    }

    fn failure(code: StatusCode) -> (StatusCode, Value) {
        let reason = code.canonical_reason();
        (
            code,
            json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(), "reason": reason }),
        )
    }

    fn request(status: Value) -> Value {
        let spec = json!({ "request": "", "signerName": "s" });
        json!({ "metadata": { "name": "r", "uid": "u", "resourceVersion": "1" }, "spec": spec, "status": status })
    }

    fn list(requests: Value) -> Value {
        json!({
            "kind": "CertificateSigningRequestList", "apiVersion": "certificates.k8s.io/v1",
            "metadata": { "resourceVersion": "1" }, "items": requests,
        })
    }

    #[tokio::test]
    async fn the_serving_certificate_is_asked_for_again_when_the_address_changes() {
        let directory = tempfile::tempdir().unwrap();
        let (sent, mut asked) = tokio::sync::mpsc::channel(16);
        let api = server(move |_, _, body: Value| {
            let sent = sent.clone();
            async move {
                sent.send(body["metadata"]["name"].clone()).await.unwrap();
                failure(StatusCode::SERVICE_UNAVAILABLE)
            }
        });
        let (sender, receiver) = watch::channel(facts("10.0.0.1"));
        let store = Store::new(directory.path(), Kind::Serving);
        let keeper = Keeper::new(api, store, receiver).run(CancellationToken::new());
        let test = async {
            let first = asked.recv().await.unwrap();
            sender.send_replace(facts("10.0.0.2"));
            // The same request again would have the same name.
            while asked.recv().await.unwrap() == first {}
        };
        tokio::select! {
            ended = keeper => panic!("{ended:?}"),
            done = tokio::time::timeout(SOON, test) => done.unwrap(),
        }
    }

    #[tokio::test]
    async fn a_client_certificate_that_is_over_ends_the_process_once_the_api_server_refuses_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = expired(directory.path(), -10);
        let answers = Arc::new(Mutex::new(vec![StatusCode::UNAUTHORIZED, StatusCode::SERVICE_UNAVAILABLE]));
        let left = Arc::clone(&answers);
        let api = server(move |_, _, _| std::future::ready(failure(left.lock().unwrap().pop().unwrap())));
        let (_sender, receiver) = watch::channel(facts("10.0.0.1"));
        let ended = Keeper::new(api, store, receiver).run(CancellationToken::new());
        let error = tokio::time::timeout(SOON, ended).await.unwrap().unwrap_err();
        assert!(answers.lock().unwrap().is_empty(), "one that is away may come back: {}", chain(&error));
        assert!(error.to_string().contains("--bootstrap-kubeconfig"), "{error}");
    }

    /// An API server that signs for whoever has the bootstrap token.
    async fn sign(State(directory): State<PathBuf>, method: Method, headers: HeaderMap, body: String) -> Response {
        if headers.get("authorization").is_none_or(|token| token != "Bearer bootstrap") {
            return StatusCode::FORBIDDEN.into_response();
        }
        if method == Method::POST {
            return (StatusCode::CREATED, body).into_response();
        }
        let key = std::fs::read_to_string(Store::new(&directory, Kind::Client).pending()).unwrap();
        let certificate = pair(&KeyPair::from_pem(&key).unwrap(), 3600);
        let status = json!({ "certificate": k8s_openapi::ByteString(certificate) });
        list(json!([request(status)])).to_string().into_response()
    }

    #[tokio::test]
    async fn a_client_certificate_that_is_over_is_replaced_by_way_of_the_bootstrap_kubeconfig() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let bootstrap = directory.path().join("bootstrap.kubeconfig");
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", listener.local_addr().unwrap()) } }],
            "users": [{ "name": "u", "user": { "token": "bootstrap" } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        std::fs::write(&bootstrap, kubeconfig.to_string()).unwrap();
        let router = axum::Router::new().fallback(sign).with_state(directory.path().to_owned());
        let test = async {
            // Over already; and over while what the node asked for as itself waits for approval.
            for seconds in [-10, 1] {
                let store = expired(directory.path(), seconds);
                let api = server(move |method, uri, body| async move {
                    match (method, uri.query()) {
                        (Method::POST, _) => (StatusCode::CREATED, body),
                        (_, Some(query)) if query.contains("watch=true") => std::future::pending().await,
                        _ => (StatusCode::OK, list(json!([request(Value::Null)]))),
                    }
                });
                let (_sender, receiver) = watch::channel(facts("10.0.0.1"));
                let keeper = Keeper::new(api, store.clone(), receiver).with_bootstrap(Some(bootstrap.clone()));
                let keeper = Keeper { look: Duration::from_millis(20), ..keeper }.run(CancellationToken::new());
                let renewed = async {
                    let later = Timestamp::now() + Duration::from_secs(60);
                    while store.current().is_ok_and(|current| current.not_after < later) {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                };
                tokio::select! {
                    ended = keeper => panic!("{ended:?}"),
                    done = tokio::time::timeout(SOON, renewed) => done.unwrap(),
                }
            }
        };
        tokio::select! {
            () = test => {}
            ended = axum::serve(listener, router) => panic!("{ended:?}"),
        }
    }

    fn certificate(names: &[&str]) -> Certificate {
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 11);
        Certificate::first(params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem().as_bytes()).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_certificate_is_kept_until_its_time_and_while_it_is_the_nodes() {
        let names = Names { dns: ["a".to_owned()].into(), ip: ["10.0.0.1".parse().unwrap()].into() };
        let current = Ok(certificate(&["a", "10.0.0.1"]));
        let (early, late) = (at("2026-01-07T12:00:00Z"), at("2026-01-10T12:00:00Z"));
        assert_eq!(due(&current, "a", &names, early), None);
        assert_eq!(due(&current, "a", &names, late), Some("the one there is near its end"));
        assert_eq!(due(&current, "b", &names, early), Some("the one there is another node's"));
        let mut moved = names.clone();
        moved.ip.insert("10.0.0.2".parse().unwrap());
        assert_eq!(due(&current, "a", &moved, early), Some("the node's names or addresses changed"));
        let wider = Ok(certificate(&["a", "10.0.0.1", "10.0.0.2"]));
        assert_eq!(due(&wider, "a", &names, early), Some("the node's names or addresses changed"));
        let none = Certificate::of_pair(std::path::Path::new("/nowhere/current.pem"));
        assert_eq!(due(&none, "a", &names, early), Some("there is none"));
    }
}
