//! An API server in memory that knows Pods, ConfigMaps, Secrets, Services, events and tokens, with fault knobs.
//!
//! What it does to a Pod follows the real one where the Pod loop depends on it: a status write with another UID is a
//! conflict, a write that changes nothing makes no event, a graceful deletion only marks the Pod, and a watch from a
//! version that is forgotten ends in 410.

mod answers;
mod faults;
mod store;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

use answers::{Answer, failure, success, token};
pub(crate) use faults::Fault;
use store::{Happened, State, not_found};

/// The node's name in every test.
pub(crate) const NODE: &str = "n1";

/// The API server. Clones share everything.
#[derive(Clone)]
pub(crate) struct Api {
    state: Arc<Mutex<State>>,
    /// Changes with every object.
    changed: watch::Sender<u64>,
}

/// A request, taken apart.
struct Asked {
    verb: &'static str,
    path: String,
    query: String,
    body: Value,
}

impl Asked {
    async fn read(request: Request<Body>) -> Self {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let path =
            parts.uri.path().trim_start_matches("/api/v1/").trim_start_matches("/apis/node.k8s.io/v1/").to_owned();
        let collection = path.split('/').count() % 2 == 1;
        let verb = match parts.method {
            Method::GET if query.contains("watch=true") => "WATCH",
            Method::GET if collection => "LIST",
            Method::GET => "GET",
            Method::POST => "POST",
            Method::PATCH => "PATCH",
            Method::DELETE => "DELETE",
            other => panic!("nobody should send {other}"),
        };
        Self { verb, path, query, body: serde_json::from_slice(&body).unwrap_or(Value::Null) }
    }

    /// Namespace, kind, name and subresource.
    fn parts(&self) -> (&str, &str, &str, &str) {
        let mut words = self.path.split('/');
        let first = words.next().unwrap_or_default();
        let (namespace, kind) = match first {
            "namespaces" => (words.next().unwrap_or_default(), words.next().unwrap_or_default()),
            kind => ("", kind),
        };
        (namespace, kind, words.next().unwrap_or_default(), words.next().unwrap_or_default())
    }

    fn version(&self) -> Option<u64> {
        self.query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok())
    }

    fn is_for_this_node(&self) -> bool {
        self.query.contains(&format!("spec.nodeName%3D{NODE}"))
    }
}

impl Api {
    pub(crate) fn new() -> Self {
        Self { state: Arc::default(), changed: watch::Sender::new(0) }
    }

    /// What it holds and was asked.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A client of it.
    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(Asked::read(request).await).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Changes what it holds, then wakes the watches.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let answer = change(&mut self.state());
        self.changed.send_modify(|changes| *changes += 1);
        answer
    }

    async fn answer(&self, asked: Asked) -> Answer {
        let fault = {
            let mut state = self.state();
            state.log.push(format!("{} {}", asked.verb, asked.path));
            if state.down {
                return failure(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "starting");
            }
            state.take_fault(asked.verb, &asked.path)
        };
        match fault {
            Some(Fault::Fail(code)) => {
                let code = StatusCode::from_u16(code).unwrap();
                return failure(code, code.canonical_reason().unwrap_or_default(), "as the test wants");
            }
            Some(Fault::Hang(released)) => drop(released.await),
            Some(Fault::FirstPage) => return self.first_page(&asked),
            None => {}
        }
        let (namespace, kind, name, below) = asked.parts();
        match (asked.verb, kind, below) {
            ("LIST", _, _) => self.list(&asked, kind),
            ("WATCH", _, _) => self.watch(&asked, kind),
            ("GET", _, _) => {
                answers::result(self.state().get(kind, namespace, name).ok_or_else(|| not_found(kind, name)))
            }
            ("POST", "serviceaccounts", "token") => token(),
            ("POST", "events", _) => {
                self.state().events.push(asked.body.clone());
                success(&asked.body)
            }
            ("POST", "pods", "") => answers::result(self.change(|state| state.accept(asked.body.clone()))),
            ("PATCH", "events", _) => success(&json!({ "metadata": { "name": name } })),
            ("PATCH", "pods", "status") => {
                answers::result(self.change(|state| state.patch_status(namespace, name, &asked.body)))
            }
            ("DELETE", "pods", _) => answers::result(self.change(|state| state.delete(namespace, name, &asked.body))),
            (verb, ..) => panic!("nobody should {verb} {}", asked.path),
        }
    }

    fn list(&self, asked: &Asked, kind: &str) -> Answer {
        let state = self.state();
        let items = state.all(kind, asked.is_for_this_node());
        let metadata = json!({ "resourceVersion": state.version().to_string() });
        success(&json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
    }

    /// One object, and the promise of more.
    fn first_page(&self, asked: &Asked) -> Answer {
        let (_, kind, ..) = asked.parts();
        let items: Vec<_> = self.state().all(kind, asked.is_for_this_node()).into_iter().take(1).collect();
        let metadata = json!({ "resourceVersion": "1", "continue": "page-2" });
        success(&json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
    }

    fn watch(&self, asked: &Asked, kind: &str) -> Answer {
        let state = self.state();
        let from = asked.version().unwrap_or(state.version());
        if from < state.forgotten {
            let status = json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": "too old" });
            return answers::line(&json!({ "type": "ERROR", "object": status }));
        }
        let (cut, kind, filtered) = (state.cut, kind.to_owned(), asked.is_for_this_node());
        drop(state);
        let (api, changed) = (self.clone(), self.changed.subscribe());
        answers::lines(futures::stream::unfold((from, changed), move |(from, mut changed)| {
            let (api, kind) = (api.clone(), kind.clone());
            async move {
                loop {
                    match api.state().after(from, &kind, filtered, cut) {
                        Happened::Event(version, event) => return Some((event, (version, changed))),
                        Happened::Cut => return None,
                        Happened::Nothing => {}
                    }
                    changed.changed().await.ok()?;
                }
            }
        }))
    }
}
