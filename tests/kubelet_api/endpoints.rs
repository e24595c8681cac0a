//! The routes besides logs, and the protocol below them.

use std::net::IpAddr;
use std::time::Duration;

use http::Method;
use lambdalet::kubelet_api::{SelfSigned, Serving, TlsParams};
use lambdalet::node::NodeFacts;
use serde_json::Value;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::support::{Authority, Client, NODE, Node, Setup, request};

#[tokio::test]
async fn healthz_tells_what_is_stuck() {
    let node = Node::start(Setup::default()).await;
    assert_eq!(node.get("/healthz").await, (200, "ok".to_owned()));
    *node.world.stuck.lock().unwrap() = Some("Pod loop stuck for 3m".to_owned());
    assert_eq!(node.get("/healthz").await, (500, "Pod loop stuck for 3m\n".to_owned()));
}

#[tokio::test]
async fn pods_is_a_pod_list() {
    let node = Node::start(Setup::default()).await;
    let (status, body) = node.get("/pods").await;
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &list["kind"], &list["apiVersion"]), (200, &"PodList".into(), &"v1".into()));
    assert_eq!(list["items"][0]["metadata"]["name"], "p");
    assert_eq!(list["items"][0]["status"]["phase"], "Running");
}

#[tokio::test]
async fn metrics_are_open_metrics_with_our_names() {
    let node = Node::start(Setup::default()).await;
    node.get("/no/such").await;
    let mut client = node.api_server().await;
    let response = client.open("/metrics", None).await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let (_, text) = node.get("/metrics").await;
    for wanted in [
        "lambdalet_build_info{",
        "lambdalet_process_resident_memory_bytes ",
        "lambdalet_api_requests_total{route=\"other\",method=\"GET\",code=\"404\"} 1\n",
        "lambdalet_api_request_seconds_count ",
        "lambdalet_api_reviews_total{review=\"Access\",verdict=\"Allowed\"} 2\n",
        "lambdalet_api_connections ",
    ] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
    assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("lambdalet_")));
}

#[tokio::test]
async fn what_is_not_served_says_so() {
    let node = Node::start(Setup::default()).await;
    node.cluster.granted.lock().unwrap().extend(["stats", "log", "checkpoint", "configz", "statusz"]);
    let mut client = node.api_server().await;
    for (method, path, status, named) in [
        (Method::GET, "/debug/pprof/profile?seconds=5", 501, "perf record -F 99 -g -p "),
        (Method::POST, "/debug/pprof/heap", 501, "not a Go program"),
        (Method::PUT, "/debug/flags/v", 501, "/debug"),
        (Method::GET, "/stats/container", 501, "/stats"),
        (Method::GET, "/no/such", 404, "/no/such"),
        (Method::GET, "/", 404, "/"),
        (Method::GET, "/containerLogs/ns/p", 404, "/containerLogs"),
        (Method::POST, "/pods", 405, "/pods"),
        (Method::DELETE, "/containerLogs/ns/p/c", 405, "/containerLogs"),
        (Method::OPTIONS, "/pods", 405, "method not allowed"),
    ] {
        let response = client.send(request(method.clone(), path, None)).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains(named), "{method} {path}: {body}");
    }
}

#[tokio::test]
async fn only_http_1_over_tls_1_2_or_1_3_is_spoken() {
    let node = Node::start(Setup::default()).await;
    let identity = || Some(node.authority.api_server());
    for versions in [&[&rustls::version::TLS13], &[&rustls::version::TLS12]] {
        let mut client = Client::connect(node.address, identity(), versions, &["h2", "http/1.1"]).await.unwrap();
        assert_eq!(client.protocol.as_deref(), Some(&b"http/1.1"[..]));
        assert_eq!(client.status("/healthz", None).await, 200);
    }
    assert!(Client::connect(node.address, identity(), rustls::ALL_VERSIONS, &["h2"]).await.is_err());
    let mut none = Client::connect(node.address, identity(), rustls::ALL_VERSIONS, &[]).await.unwrap();
    assert_eq!(none.status("/healthz", None).await, 200);
}

#[tokio::test]
async fn without_files_it_serves_with_a_certificate_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let (capacity, allocatable) = Default::default();
    let addresses = vec![IpAddr::from([127, 0, 0, 1])];
    let (_facts, facts) = watch::channel(NodeFacts { name: NODE.to_owned(), addresses, capacity, allocatable });
    let own = SelfSigned { directory: directory.path().join("pki"), node: facts };
    let tls = TlsParams::new(Serving::SelfSigned(own));
    let node = Node::start_with(Setup::default(), tls, directory, Authority::new("none")).await;
    let mut client = node.connect(None).await.unwrap();
    let (_, certificate) = X509Certificate::from_der(&client.served).unwrap();
    let names = format!("{:?}", certificate.subject_alternative_name().unwrap().unwrap().value.general_names);
    assert!(names.contains(NODE) && names.contains("[127, 0, 0, 1]"), "{names}");
    assert_eq!(client.status("/healthz", Some("good")).await, 200);
    // No client authority: a certificate is not asked for and proves nothing.
    let mut client = node.connect(Some(node.authority.api_server())).await.unwrap();
    assert_eq!(client.status("/healthz", None).await, 401);
}

#[tokio::test]
async fn shutdown_ends_idle_connections_and_the_server() {
    let mut node = Node::start(Setup::default()).await;
    let mut client = node.api_server().await;
    assert_eq!(client.status("/healthz", None).await, 200);
    node.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), node.tasks.join_next()).await;
    assert!(ended.unwrap().unwrap().is_ok());
    assert!(client.get("/healthz", None).await.is_err());
}
