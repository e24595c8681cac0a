//! Environments that crash, do not start, or do not listen.

use super::*;
use crate::harness::on_shared_node;
use crate::harness::pods::{busybox, is_ready, phase, restarts, waiting, waits_for};

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crash_in_a_call_is_told_to_its_caller_alone_and_made_up_for() {
    on_shared_node(async |t| {
        let keys = json!({"com.openfaas.scale.max": "1", "execenvironment.count": "2"});
        let function = Function::server(t, "f", keys).await;
        let other = function.hold("other");
        function.begun(&["other"]).await;
        let crashed = answered(function.get("/cgi-bin/exit").await);
        assert_eq!(crashed.status, StatusCode::BAD_GATEWAY, "{}", crashed.text());
        assert_eq!(crashed.text(), "the function ended without an answer: Error, exit code 3\n");
        told(function.get("/id").await);
        function.open();
        told(other.await);
        let pod = t.until("f", "restarted once", |p| restarts(p, "main") == 1).await;
        assert!(is_ready(&pod));
        assert_eq!(function.environments().len(), 2);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_lambda_that_exits_is_told_in_lambdas_words_and_the_next_call_is_served() {
    on_shared_node(async |t| {
        let keys = json!({"com.openfaas.scale.max": "1", "execenvironment.count": "1"});
        let function = Function::lambda(t, "f", keys).await;
        let crashed = answered(function.invoke(&json!({"exit": 3})).await);
        assert!(crashed.text().contains("Runtime.ExitError"), "{} {}", crashed.status, crashed.text());
        assert!(crashed.text().contains("exit status 3"), "{}", crashed.text());
        returned(function.invoke(&json!({})).await);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_call_that_takes_too_much_memory_is_told_so() {
    on_shared_node(async |t| {
        let server = "
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hog = [bytes(1 << 20) * 2 for _ in range(1000)] if self.path == '/fill' else []
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'%d' % len(hog))
http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever()";
        let container = json!({
            "name": "main", "image": LAMBDA, "command": ["python3", "-c", server],
            "resources": {"limits": {"memory": "64Mi", "cpu": "300m"}},
        });
        let keys = json!({"com.openfaas.scale.max": "1"});
        let function = Function::make(t, "f", keys, container).await.ready().await;
        assert_eq!(told(function.get("/").await), "0");
        let killed = answered(function.get("/fill").await);
        assert_eq!(killed.status, StatusCode::BAD_GATEWAY, "{}", killed.text());
        assert!(killed.text().contains("OOMKilled, exit code 137"), "{}", killed.text());
        assert_eq!(told(function.get("/").await), "0");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_whose_image_is_missing_says_so_and_serves_once_it_is_there() {
    on_shared_node(async |t| {
        let image = image_name();
        let mut container = busybox(SERVER);
        container["image"] = json!(image);
        let keys = json!({"com.openfaas.scale.min": "0"});
        let function = Function::make(t, "late", keys.clone(), container.clone()).await;
        Function::make(t, "never", keys, container).await;
        for name in ["late", "never"] {
            let missing = |p: &Pod| matches!(waits_for(p, "main"), Some("ErrImagePull" | "ImagePullBackOff"));
            let pod = t.until(name, "without its image", missing).await;
            assert_eq!((phase(&pod), is_ready(&pod)), ("Pending", false));
            assert!(waiting(&pod, "main").unwrap().message.as_ref().unwrap().contains(&image));
        }
        t.delete("never", None).await;
        t.gone("never", SOON).await;
        output("docker", &["tag", BUSYBOX, &image]);
        let function = function.ready().await;
        let id = function.get("/id").await;
        output("docker", &["rmi", &image]);
        told(id);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_that_never_listens_says_so_and_its_callers_are_not_kept_waiting() {
    on_shared_node(async |t| {
        let keys = json!({
            "com.openfaas.scale.max": "1", "lambdalet.dev/listen-timeout": "200ms", "lambdalet.dev/queue-timeout": "9s",
        });
        let container = busybox("trap 'exit 0' TERM; while true; do sleep 1; done");
        let function = Function::make(t, "mute", keys, container).await.ready().await;
        let refused = answered(function.get("/").await);
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.text());
        let why = "its environments crash: NotListening: nothing listens on port 8080 after 200ms";
        assert!(refused.text().contains(why), "{}", refused.text());
        let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        // The back-off of ten seconds; or, where two starts took the call's nine, to be tried again soon.
        assert!((1..=10).contains(&seconds), "{seconds}");
        let pod = t.until("mute", "in CrashLoopBackOff", |p| waits_for(p, "main") == Some("CrashLoopBackOff")).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.contains("NotListening"), "{message}");
        assert!(!is_ready(&pod) && phase(&pod) == "Running", "{}", phase(&pod));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_restart_policy_other_than_always_is_named_and_treated_as_always() {
    on_shared_node(async |t| {
        let spec =
            json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 2, "containers": [busybox(SERVER)]});
        let keys = json!({"com.openfaas.scale.max": "1"});
        let function = Function::of_spec(t, "f", keys, spec).await.ready().await;
        let warning = t.event("f", "UnsupportedPodFeature").await;
        assert!(warning.contains("restartPolicy Never is treated as Always"), "{warning}");
        assert_eq!(answered(function.get("/cgi-bin/exit").await).status, StatusCode::BAD_GATEWAY);
        function.id().await;
        let pod = t.until("f", "restarted once", |p| restarts(p, "main") == 1).await;
        assert!(is_ready(&pod));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_on_the_hosts_network_is_refused() {
    on_shared_node(async |t| {
        let spec = json!({"hostNetwork": true, "containers": [busybox(SERVER)]});
        t.labelled_pod("f", metadata(json!({"com.openfaas.scale.max": "1"})), spec).await;
        let pod = t.until("f", "refused", |p| phase(p) == "Failed").await;
        let message = crate::harness::pods::pod_message(&pod);
        assert!(message.contains("hostNetwork: true is not supported"), "{message}");
    });
}
