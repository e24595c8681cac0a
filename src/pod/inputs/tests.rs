//! What containers get from the API, against a small API server in this process.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Mutex;

use bytes::Bytes;
use futures::stream;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::node::NodeFacts;

/// An API server that counts what it is asked, and can refuse the first so many requests for a path.
#[derive(Default)]
struct ApiServer {
    objects: HashMap<&'static str, Value>,
    refusals: Mutex<HashMap<&'static str, u32>>,
    requests: Mutex<BTreeMap<String, u32>>,
    services_hang: bool,
}

impl ApiServer {
    fn answer(&self, request: &Request<Body>) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let path = request.uri().path();
        let watching = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        *self.requests.lock().unwrap().entry(path.to_owned()).or_default() += 1;
        if watching {
            let open = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
            return Response::new(open.boxed_unsync());
        }
        let refuse = self.refusals.lock().unwrap().get_mut(path).is_some_and(|left| {
            *left = left.saturating_sub(1);
            *left > 0
        });
        let (status, body) = match self.objects.get(path) {
            _ if refuse => (StatusCode::FORBIDDEN, failure(403)),
            Some(object) => (StatusCode::OK, object.clone()),
            None => (StatusCode::NOT_FOUND, failure(404)),
        };
        let answer = Response::builder().status(status).header("content-type", "application/json");
        answer.body(Full::new(Bytes::from(body.to_string())).boxed_unsync()).unwrap()
    }

    fn asked(&self, path: &str) -> u32 {
        self.requests.lock().unwrap().get(path).copied().unwrap_or_default()
    }
}

fn failure(code: u16) -> Value {
    let reason = if code == 404 { "NotFound" } else { "Forbidden" };
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": "no", "code": code})
}

fn start(mut api: ApiServer) -> (Arc<ApiServer>, Inputs) {
    api.objects.entry("/api/v1/services").or_insert_with(|| {
        json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": [
            {"metadata": {"namespace": "default", "name": "kubernetes"}, "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 443}]}},
            {"metadata": {"namespace": "shop", "name": "db"}, "spec": {"clusterIP": "10.0.0.2", "ports": [{"port": 5432}]}}]})
    });
    let api = Arc::new(api);
    let server = Arc::clone(&api);
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = Arc::clone(&server);
        async move {
            if server.services_hang && request.uri().path() == "/api/v1/services" {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok::<_, Infallible>(server.answer(&request))
        }
    });
    let client = Client::new(service, "default");
    let objects = Arc::new(Objects::new(client.clone(), TTL));
    (api, Inputs { services_timeout: Duration::from_millis(300), ..Inputs::new(client, objects) })
}

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u"}, "spec": spec})).unwrap()
}

fn node() -> NodeFacts {
    NodeFacts { name: "n1".into(), addresses: vec![], capacity: BTreeMap::new(), allocatable: BTreeMap::new() }
}

const TTL: Duration = Duration::from_millis(300);
const KEYS: &str = "/api/v1/namespaces/shop/secrets/keys";

fn with_keys() -> ApiServer {
    let secret = json!({"metadata": {"name": "keys"}, "data": {"K": "czM="}});
    ApiServer { objects: HashMap::from([(KEYS, secret)]), ..ApiServer::default() }
}

fn key_container() -> Value {
    json!({"name": "main", "env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "K"}}}]})
}

#[tokio::test]
async fn thirty_pods_ask_once_and_again_when_the_answer_is_old() {
    let (api, inputs) = start(with_keys());
    let (pod, node) = (pod(json!({"containers": [key_container()]})), node());
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &[] };
    let all = futures::future::join_all((0..30).map(|_| inputs.env(ctx, container))).await;
    for environment in all {
        let variables = environment.unwrap().variables;
        assert_eq!(variables[0], ("K".to_owned(), "s3".to_owned()));
        let names: Vec<_> = variables.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"DB_SERVICE_HOST") && names.contains(&"KUBERNETES_SERVICE_PORT"), "{names:?}");
    }
    assert_eq!(api.asked(KEYS), 1);
    tokio::time::sleep(TTL).await;
    inputs.env(ctx, container).await.unwrap();
    assert_eq!(api.asked(KEYS), 2);
}

#[tokio::test]
async fn a_refusal_right_after_binding_is_tried_again() {
    let api = with_keys();
    api.refusals.lock().unwrap().insert(KEYS, 4);
    let (api, inputs) = start(api);
    inputs.objects.secret("shop", "keys").await.unwrap().unwrap();
    assert_eq!(api.asked(KEYS), 4);
}

#[tokio::test]
async fn a_lasting_refusal_names_the_object_and_why() {
    let api = with_keys();
    api.refusals.lock().unwrap().insert(KEYS, u32::MAX);
    let (api, inputs) = start(api);
    let (pod, node) = (pod(json!({"containers": [key_container()]})), node());
    let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &[] };
    let error = inputs.env(ctx, &pod.spec.as_ref().unwrap().containers[0]).await.unwrap_err();
    let text = crate::telemetry::chain(&error);
    assert!(
        text.starts_with("failed to prepare the environment of container main: failed to get secret shop/keys: "),
        "{text}"
    );
    assert!(matches!(&error, InputError::Object { source, .. } if source.is_forbidden()));
    assert_eq!(api.asked(KEYS), 6);
}

#[tokio::test]
async fn without_links_services_are_not_watched() {
    let mut api = with_keys();
    let service = json!({"metadata": {"namespace": "default", "name": "kubernetes"}, "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 443}]}});
    api.objects.insert("/api/v1/namespaces/default/services/kubernetes", service);
    let (api, inputs) = start(api);
    let (pod, node) = (pod(json!({"enableServiceLinks": false, "containers": [{"name": "main"}]})), node());
    let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &[] };
    let environment = inputs.env(ctx, &pod.spec.as_ref().unwrap().containers[0]).await.unwrap();
    let words = inputs.expand(&["$(KUBERNETES_SERVICE_HOST):$(NONE)".to_owned()], &environment.variables);
    assert_eq!(words, ["10.0.0.1:$(NONE)"]);
    assert!(!environment.variables.iter().any(|(name, _)| name.starts_with("DB_")));
    assert_eq!(api.asked("/api/v1/services"), 0);
}

#[tokio::test]
async fn services_that_cannot_be_listed_are_waited_for_no_longer_than_the_bound() {
    let (_api, inputs) = start(ApiServer { services_hang: true, ..ApiServer::default() });
    let (pod, node) = (pod(json!({"containers": [{"name": "main"}]})), node());
    let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &[] };
    let error = inputs.env(ctx, &pod.spec.as_ref().unwrap().containers[0]).await.unwrap_err();
    assert!(matches!(error, InputError::ServicesUnknown), "{error}");
}

#[tokio::test]
async fn pull_secrets_that_are_missing_or_broken_are_reported() {
    let mut api = with_keys();
    let config = json!({"auths": {"gcr.io": {"username": "u", "password": "p"}}}).to_string();
    let config = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, config);
    api.objects
        .insert("/api/v1/namespaces/shop/secrets/pull", json!({"metadata": {}, "data": {".dockerconfigjson": config}}));
    let (_api, inputs) = start(api);
    let pod =
        pod(json!({"containers": [], "imagePullSecrets": [{"name": "none"}, {"name": "keys"}, {"name": "pull"}]}));
    let found = inputs.registry_auths(&pod, "gcr.io/p/app:1").await.unwrap();
    assert_eq!(found.auths.len(), 1);
    assert_eq!(found.auths[0].username, "u");
    assert_eq!(found.warnings.len(), 2);
    assert_eq!(found.warnings[0], "image pull secret shop/none not found");
    assert!(inputs.registry_auths(&pod, "quay.io/app").await.unwrap().auths.is_empty());
}
