//! An API server in memory that knows one Node and one Lease, with fault knobs.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::client::Body;
use lambdalet::apiserver::ApiServer;
use serde_json::{Value, json};
use tokio::sync::broadcast;

/// The node's name in every test.
pub(crate) const NODE: &str = "n1";

/// In place of an event, ends the watches that listen.
const CUT: &str = "cut";

type Answer = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) node: Option<Value>,
    pub(crate) lease: Option<Value>,
    /// Method and path of every request so far.
    pub(crate) log: Vec<String>,
    /// Who the caller is.
    pub(crate) identity: String,
    /// Answer everything with 503.
    pub(crate) down: bool,
    /// Answer the creation of Nodes with 403.
    pub(crate) forbid_create: bool,
    /// `spec.podCIDR` given to new Nodes.
    pub(crate) pod_cidr: Option<&'static str>,
    /// Reasons of the events that were written.
    pub(crate) told: Vec<String>,
    version: u64,
    /// Events up to here are forgotten: a watch from before has to list again.
    compacted: u64,
}

#[derive(Clone)]
pub(crate) struct Api {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<String>,
}

impl Api {
    pub(crate) fn new() -> Self {
        let state = State { identity: format!("system:node:{NODE}"), ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), events: broadcast::channel(64).0 }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A client of it.
    pub(crate) fn server(&self) -> Arc<ApiServer> {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        let client = kube::Client::new(service, "default");
        let (url, kubeconfig) = ("https://api.test".to_owned(), PathBuf::from("node.kubeconfig"));
        Arc::new(ApiServer { client, url, kubeconfig })
    }

    /// Changes the Node as somebody else would, and tells watchers.
    pub(crate) fn edit_node(&self, edit: impl FnOnce(&mut Value)) {
        let mut state = self.state();
        let version = state.next_version();
        let node = state.node.as_mut().expect("there is a Node");
        edit(node);
        node["metadata"]["resourceVersion"] = json!(version);
        let node = node.clone();
        drop(state);
        self.tell("MODIFIED", &node);
    }

    pub(crate) fn delete_node(&self) {
        let node = self.state().node.take().expect("there is a Node");
        self.tell("DELETED", &node);
    }

    /// From now on nothing is answered, and watches are over.
    pub(crate) fn go_down(&self) {
        {
            let mut state = self.state();
            state.down = true;
            state.version += 1;
            state.compacted = state.version;
        }
        let _ = self.events.send(CUT.to_owned());
    }

    /// How many requests of this method and path there were.
    pub(crate) fn count(&self, request: &str) -> usize {
        self.state().log.iter().filter(|line| *line == request).count()
    }

    fn tell(&self, kind: &str, object: &Value) {
        // Without a watcher there is nobody to tell.
        let _ = self.events.send(format!("{}\n", json!({ "type": kind, "object": object })));
    }

    async fn answer(&self, request: Request<Body>) -> Response<Answer> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
        if query.contains("watch=true") && !self.state().down {
            return self.watch(&query);
        }
        self.state().log.push(format!("{} {path}", parts.method));
        if self.state().down {
            return failure(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", "starting");
        }
        match path.trim_start_matches("/api/v1/").trim_start_matches("/apis/") {
            "nodes" | "nodes/n1" | "nodes/n1/status" => self.nodes(&parts.method, &path, body),
            "authentication.k8s.io/v1/selfsubjectreviews" => {
                let user = json!({ "userInfo": { "username": self.state().identity } });
                success(&json!({ "kind": "SelfSubjectReview", "metadata": {}, "status": user }))
            }
            path if path.starts_with("coordination.k8s.io/v1/namespaces/kube-node-lease/leases") => {
                self.leases(&parts.method, body)
            }
            "namespaces/default/events" => {
                self.state().told.push(body["reason"].as_str().unwrap_or_default().to_owned());
                success(&body)
            }
            path if path.starts_with("namespaces/default/events/") => success(&body),
            _ => failure(StatusCode::NOT_FOUND, "NotFound", &path),
        }
    }

    fn watch(&self, query: &str) -> Response<Answer> {
        let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse::<u64>().ok());
        if from.is_some_and(|version| version < self.state().compacted) {
            // A stream that holds the error, as the API server's watch cache has it.
            let status = json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": "too old" });
            let line = format!("{}\n", json!({ "type": "ERROR", "object": status }));
            return Response::new(Full::from(line).boxed_unsync());
        }
        let lines = futures::stream::unfold(self.events.subscribe(), |mut events| async {
            let line: String = events.recv().await.ok().filter(|line| line != CUT)?;
            Some((Ok(hyper::body::Frame::data(Bytes::from(line))), events))
        });
        Response::new(StreamBody::new(lines).boxed_unsync())
    }

    fn nodes(&self, method: &Method, path: &str, body: Value) -> Response<Answer> {
        let mut state = self.state();
        let version = state.next_version();
        let (kind, node) = match (method, state.node.clone()) {
            (&Method::GET, node) if path.ends_with("/nodes") => {
                let items: Vec<Value> = node.into_iter().collect();
                let metadata = json!({ "resourceVersion": version });
                return success(&json!({ "kind": "NodeList", "metadata": metadata, "items": items }));
            }
            (&Method::GET, Some(node)) => return success(&node),
            (&Method::POST, Some(_)) => return failure(StatusCode::CONFLICT, "AlreadyExists", "it exists"),
            (&Method::POST, None) if state.forbid_create => {
                return failure(StatusCode::FORBIDDEN, "Forbidden", "nodes is forbidden");
            }
            (&Method::POST, None) => {
                let mut node = body;
                node["metadata"]["uid"] = json!(format!("uid-{version}"));
                if let Some(range) = state.pod_cidr {
                    node["spec"]["podCIDRs"] = json!([range]);
                }
                ("ADDED", node)
            }
            (&Method::PATCH, Some(mut node)) => {
                merge(&mut node, body);
                ("MODIFIED", node)
            }
            _ => return failure(StatusCode::NOT_FOUND, "NotFound", "nodes \"n1\" not found"),
        };
        let mut node = node;
        node["metadata"]["resourceVersion"] = json!(version);
        state.node = Some(node.clone());
        drop(state);
        self.tell(kind, &node);
        success(&node)
    }

    fn leases(&self, method: &Method, mut lease: Value) -> Response<Answer> {
        let mut state = self.state();
        let version = state.next_version();
        match (method, &state.lease) {
            (&Method::GET, Some(found)) => return success(found),
            (&Method::POST, None) => {}
            (&Method::POST, Some(_)) => return failure(StatusCode::CONFLICT, "AlreadyExists", "it exists"),
            (&Method::PUT, Some(found)) => {
                if found["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"] {
                    return failure(StatusCode::CONFLICT, "Conflict", "the object has been modified");
                }
            }
            _ => return failure(StatusCode::NOT_FOUND, "NotFound", "leases \"n1\" not found"),
        }
        lease["metadata"]["resourceVersion"] = json!(version);
        state.lease = Some(lease.clone());
        success(&lease)
    }
}

impl State {
    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    /// Status and reason of a condition of the Node.
    pub(crate) fn condition(&self, type_: &str) -> (String, String) {
        let conditions = self.node.as_ref().and_then(|node| node["status"]["conditions"].as_array().cloned());
        let found = conditions.unwrap_or_default().into_iter().find(|condition| condition["type"] == type_);
        let found = found.unwrap_or_default();
        let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
        (text("status"), text("message"))
    }
}

/// A JSON merge patch, with the one directive of strategic merge patches that is used.
fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (name, value) in patch {
                merge(target.entry(name).or_insert(Value::Null), value);
            }
        }
        (target, Value::Array(mut items)) => {
            items.retain(|item| item.get("$patch").is_none());
            *target = Value::Array(items);
        }
        (target, value) => *target = value,
    }
}

fn success(object: &Value) -> Response<Answer> {
    Response::new(Full::from(object.to_string()).boxed_unsync())
}

fn failure(code: StatusCode, reason: &str, message: &str) -> Response<Answer> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(), "reason": reason,
        "message": message,
    });
    Response::builder().status(code).body(Full::from(status.to_string()).boxed_unsync()).unwrap()
}
