//! Who is let in.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use lambdalet::kubelet_api::{Access, Authorization, Limits, REVIEWS_AT_ONCE};
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{Authority, Client, Mood, NODE, Node, Setup, eventually};

fn with(access: Access) -> Setup {
    Setup { access, ..Setup::default() }
}

#[tokio::test]
async fn without_credentials_every_path_is_401() {
    let node = Node::start(Setup::default()).await;
    let mut client = node.connect(None).await.unwrap();
    for path in ["/pods", "/metrics", "/healthz", "/containerLogs/ns/p/c", "/exec/ns/p/c", "/no/such", "/"] {
        let (status, body) = client.get(path, None).await.unwrap();
        assert_eq!((status, &body[..]), (401, &b"Unauthorized\n"[..]), "{path}");
    }
    assert_eq!(node.cluster.calls(), (0, 0));
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let node = Node::start(Setup::default()).await;
    let stranger = Authority::new("cluster").api_server();
    // With TLS 1.3 the client learns of it with its first read.
    let refused = match node.connect(Some(stranger)).await {
        Ok(mut client) => client.get("/pods", None).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
    assert_eq!(node.get("/healthz").await.0, 200);
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let node = Node::start(Setup::default()).await;
    for versions in [&[&rustls::version::TLS13], &[&rustls::version::TLS12]] {
        let expired = node.authority.client("old", "g", 2020);
        let refused = match Client::connect(node.address, Some(expired), versions, &["http/1.1"]).await {
            Ok(mut client) => client.get("/pods", None).await.is_err(),
            Err(_) => true,
        };
        assert!(refused);
    }
}

/// Collects log lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_refused_certificate_leaves_one_line_that_says_why() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    // Holds for this thread, which runs the whole test.
    let _guard = tracing::subscriber::set_default(subscriber);
    let node = Node::start(Setup::default()).await;
    for (identity, reason) in [
        (Authority::new("another").api_server(), "UnknownIssuer"),
        (node.authority.client("old", "g", 2020), "certificate expired"),
    ] {
        lines.0.lock().unwrap().clear();
        if let Ok(mut client) = node.connect(Some(identity)).await {
            assert!(client.get("/pods", None).await.is_err());
        }
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let warnings: Vec<_> = text.lines().filter(|line| line.contains("WARN")).collect();
        assert_eq!(warnings.len(), 1, "{text}");
        assert!(warnings[0].contains("refused a client certificate") && warnings[0].contains(reason), "{text}");
    }
}

#[tokio::test]
async fn a_certificate_with_the_right_is_let_in_and_asked_about_once() {
    let node = Node::start(Setup::default()).await;
    let mut client = node.api_server().await;
    assert_eq!(client.status("/containerLogs/ns/none/c", None).await, 404);
    let wanted = json!({
        "user": "kube-apiserver-kubelet-client",
        "groups": ["kubeadm:cluster-admins", "system:authenticated"],
        "resourceAttributes":
            {"verb": "get", "version": "v1", "resource": "nodes", "name": NODE, "subresource": "proxy"},
    });
    assert_eq!(*node.cluster.last.lock().unwrap(), wanted);
    for _ in 0..5 {
        assert_eq!(node.get("/containerLogs/ns/none/c").await.0, 404);
    }
    assert_eq!(node.cluster.calls(), (0, 1));
}

#[tokio::test]
async fn without_the_right_it_is_403_and_says_which() {
    let node = Node::start(Setup::default()).await;
    node.cluster.granted.lock().unwrap().clear();
    let (status, body) = node.get("/pods").await;
    let wanted =
        "Forbidden (user=kube-apiserver-kubelet-client, verb=get, resource=nodes, subresource(s)=[pods proxy])\n";
    assert_eq!((status, body.as_str()), (403, wanted));
    assert_eq!(node.get("/pods").await.0, 403);
    assert_eq!(node.cluster.calls(), (0, 2));
}

#[tokio::test]
async fn proxy_is_enough_where_the_finer_right_is_missing() {
    let node = Node::start(Setup::default()).await;
    *node.cluster.granted.lock().unwrap() = vec!["proxy"];
    assert_eq!(node.get("/pods").await.0, 200);
    assert_eq!(node.get("/healthz").await.0, 200);
    assert_eq!(node.get("/metrics").await.0, 403);
}

#[tokio::test]
async fn each_path_opens_with_its_own_rights_and_with_no_other() {
    const RIGHTS: [&str; 9] =
        ["proxy", "stats", "metrics", "log", "checkpoint", "pods", "healthz", "configz", "statusz"];
    let with_rights = async |path: &str, rights: Vec<&'static str>| {
        let node = Node::start(Setup::default()).await;
        *node.cluster.granted.lock().unwrap() = rights;
        node.get(path).await
    };
    for (path, enough) in [
        ("/stats/summary", &["stats"][..]),
        ("/metrics", &["metrics"]),
        ("/metrics/resource", &["metrics"]),
        ("/metrics/slis", &["metrics"]),
        ("/logs/", &["log"]),
        ("/checkpoint/ns/p/c", &["checkpoint"]),
        ("/pods", &["pods", "proxy"]),
        ("/runningpods/", &["pods", "proxy"]),
        ("/healthz/syncloop", &["healthz", "proxy"]),
        ("/configz", &["configz", "proxy"]),
        ("/statusz", &["statusz"]),
        ("/flagz", &["configz"]),
        ("/containerLogs/ns/none/c", &["proxy"]),
        ("/debug/pprof/profile", &["proxy"]),
    ] {
        for right in enough {
            let (status, body) = with_rights(path, vec![right]).await;
            assert!(status != 403 && status != 401, "{path} with {right}: {status} {body}");
        }
        let others = RIGHTS.into_iter().filter(|right| !enough.contains(right)).collect();
        let (status, body) = with_rights(path, others).await;
        assert_eq!(status, 403, "{path}");
        assert!(body.contains(&format!("subresource(s)=[{}]", enough.join(" "))), "{path}: {body}");
    }
}

#[tokio::test]
async fn a_refusal_is_forgotten_before_a_grant() {
    let access = Access { unauthorized_ttl: Duration::from_millis(50), ..Access::default() };
    let node = Node::start(with(access)).await;
    node.cluster.granted.lock().unwrap().clear();
    assert_eq!(node.get("/metrics").await.0, 403);
    *node.cluster.granted.lock().unwrap() = vec!["metrics"];
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(node.get("/metrics").await.0, 200);
    node.cluster.granted.lock().unwrap().clear();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(node.get("/metrics").await.0, 200);
}

#[tokio::test]
async fn a_good_token_is_let_in_and_a_bad_one_is_not() {
    let access = Access { token_ttl: Duration::from_secs(3), ..Access::default() };
    let node = Node::start(with(access)).await;
    let mut client = node.connect(None).await.unwrap();
    assert_eq!(client.status("/metrics", Some("good")).await, 200);
    let last = node.cluster.last.lock().unwrap().clone();
    assert_eq!((&last["user"], &last["uid"]), (&json!("system:serviceaccount:ns:sa"), &json!("7")));
    assert_eq!(last["extra"], json!({"k": ["v"]}));
    for _ in 0..3 {
        assert_eq!(client.status("/metrics", Some("bad")).await, 401);
    }
    assert_eq!(client.status("/metrics", Some("good")).await, 200);
    assert_eq!(node.cluster.calls(), (2, 1));
    tokio::time::sleep(Duration::from_millis(3050)).await;
    assert_eq!(client.status("/metrics", Some("good")).await, 200);
    assert_eq!(node.cluster.calls(), (3, 1));
}

#[tokio::test]
async fn many_at_once_ask_once() {
    let node = Node::start(Setup::default()).await;
    let all = join_all((0..20).map(|_| async {
        let mut client = node.connect(None).await.unwrap();
        client.status("/metrics", Some("good")).await
    }));
    assert!(all.await.iter().all(|status| *status == 200));
    assert_eq!(node.cluster.calls(), (1, 1));
}

#[tokio::test]
async fn an_api_server_that_is_away_is_503_and_not_remembered() {
    let node = Node::start(Setup::default()).await;
    let mut client = node.connect(None).await.unwrap();
    for (mood, status) in [(Mood::Down, 503), (Mood::Forbidding, 500)] {
        *node.cluster.mood.lock().unwrap() = mood;
        let (answered, body) = client.get("/metrics", Some("good")).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert_eq!(answered, status);
        assert_eq!(body, "cannot tell who is asking: failed to create a TokenReview\n");
        let (answered, body) = node.get("/metrics").await;
        assert_eq!(answered, status);
        assert!(body.starts_with("Authorization error (user=kube-apiserver-kubelet-client, verb=get"), "{body}");
    }
    *node.cluster.mood.lock().unwrap() = Mood::Well;
    assert_eq!(client.status("/metrics", Some("good")).await, 200);
    assert_eq!(node.get("/metrics").await.0, 200);
}

#[tokio::test]
async fn strangers_whose_tokens_take_long_keep_nobody_waiting_who_has_a_certificate() {
    let node = Node::start(Setup::default()).await;
    *node.cluster.mood.lock().unwrap() = Mood::SlowForTokens;
    let mut strangers = JoinSet::new();
    for number in 0..64 {
        let mut client = node.connect(None).await.unwrap();
        strangers.spawn(async move { client.get("/metrics", Some(&format!("token-{number}"))).await });
    }
    // From here on each turn of a TokenReview is taken, and the others wait for one.
    assert!(eventually(10, || node.cluster.token_reviews.load(Ordering::SeqCst) >= REVIEWS_AT_ONCE / 2).await);
    let answered = tokio::time::timeout(Duration::from_secs(5), node.get("/metrics")).await;
    assert_eq!(answered.expect("an answer before the strangers' reviews are given up").0, 200);
    assert_eq!(node.cluster.calls(), (REVIEWS_AT_ONCE / 2, 1), "a flood of tokens is none on the API server");
}

#[tokio::test]
async fn settings_open_and_close_ways_in() {
    let open = Access { anonymous: true, ..Access::default() };
    let node = Node::start(with(open)).await;
    let mut client = node.connect(None).await.unwrap();
    assert_eq!(client.status("/metrics", None).await, 200);
    assert_eq!(node.cluster.last.lock().unwrap()["user"], "system:anonymous");
    // A token that is refused does not fall back to anonymous.
    assert_eq!(client.status("/metrics", Some("bad")).await, 401);

    let closed = Access { token_webhook: false, ..Access::default() };
    let node = Node::start(with(closed)).await;
    let mut client = node.connect(None).await.unwrap();
    assert_eq!(client.status("/metrics", Some("good")).await, 401);
    assert_eq!(node.cluster.token_reviews.load(Ordering::SeqCst), 0);

    let trusting = Access { authorization: Authorization::AlwaysAllow, ..Access::default() };
    let node = Node::start(with(trusting)).await;
    node.cluster.granted.lock().unwrap().clear();
    assert_eq!(node.get("/metrics").await.0, 200);
    assert_eq!(node.connect(None).await.unwrap().status("/metrics", None).await, 401);
    assert_eq!(node.cluster.calls(), (0, 0));
}

fn reloading() -> Setup {
    Setup { limits: Limits { reload: Duration::from_millis(50), ..Limits::default() }, ..Setup::default() }
}

#[tokio::test]
async fn a_changed_serving_certificate_is_taken_over_and_a_broken_one_is_not() {
    let node = Node::start(reloading()).await;
    let before = node.api_server().await.served;
    std::fs::write(node.directory.path().join("tls.crt"), "rubbish").unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(node.api_server().await.served, before);

    let (certificate, key) = node.authority.serving();
    std::fs::write(node.directory.path().join("tls.key"), key).unwrap();
    std::fs::write(node.directory.path().join("tls.crt"), certificate).unwrap();
    let mut after = before.clone();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        after = node.api_server().await.served;
        if after != before {
            break;
        }
    }
    assert_ne!(after, before);
    assert_eq!(node.get("/healthz").await.0, 200);
}

#[tokio::test]
async fn a_changed_client_authority_ends_the_old_ones_rights_at_once() {
    let node = Node::start(reloading()).await;
    let mut old = node.api_server().await;
    assert_eq!(old.status("/healthz", None).await, 200);
    let new = Authority::new("next");
    std::fs::write(node.directory.path().join("ca.crt"), new.pem()).unwrap();
    let mut status = 200;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        status = old.status("/healthz", None).await;
        if status != 200 {
            break;
        }
    }
    assert_eq!(status, 401);
    let mut client = node.connect(Some(new.api_server())).await.unwrap();
    assert_eq!(client.status("/healthz", None).await, 200);
}
