//! From zero to many and back; queues; labels that change.

use std::time::Instant;

use super::*;
use crate::harness::on_shared_node;
use crate::harness::pods::restarts;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn calls_at_once_get_an_environment_each_from_zero_and_back_to_zero() {
    on_shared_node(async |t| {
        let keys = json!({
            "com.openfaas.scale.max": "3", "execenvironment.count": "2", "lambdalet.dev/idle-timeout": "1s",
        });
        let function = Function::lambda(t, "f", keys).await;
        assert!(function.environments().is_empty(), "ready with nothing running");
        let pod = t.until("f", "counting its replicas", |p| !replicas(p).is_empty()).await;
        assert_eq!(replicas(&pod), "0/3 replicas, 0 environments, 0 busy, 0 queued");

        let names: Vec<_> = (0..6).map(|n| n.to_string()).collect();
        let calls: Vec<_> = names.iter().map(|name| function.invoke(&json!({"hold": name}))).collect();
        function.begun(&names).await;
        let six = function.environments();
        let replicas_of = |all: &BTreeSet<(String, String)>| {
            all.iter().map(|(key, _)| key.split('.').next().unwrap().to_owned()).collect::<BTreeSet<_>>()
        };
        assert_eq!((six.len(), replicas_of(&six).len()), (6, 3), "{six:?}");
        // More than there are environments: they wait for one.
        let more: Vec<_> = (0..6).map(|_| function.invoke(&json!({}))).collect();
        function.open();
        let mut ids = BTreeSet::new();
        for call in calls {
            let answer = returned(call.await);
            assert_eq!(answer["alone"], json!(true));
            ids.insert(answer["id"].to_string());
        }
        assert_eq!(ids.len(), 6, "each call in an environment of its own");
        for call in more {
            let answer = returned(call.await);
            assert!(answer["alone"] == json!(true) && ids.contains(&answer["id"].to_string()), "{answer}");
        }
        function.has(0).await;
        t.event("f", "ScaledUp").await;
        let down = t.event("f", "ScaledDown").await;
        assert!(down.starts_with("Stopped a replica (idle)"), "{down}");
        let pod = t.until("f", "at zero again", |p| replicas(p).starts_with("0/3 replicas, 0 env")).await;
        assert_eq!(restarts(&pod, "main"), 0);
        assert!(crate::harness::pods::is_ready(&pod));
        returned(function.invoke(&json!({})).await);
    });
}

/// What is refused is refused within this.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Two calls of which the queue takes one; returns that one. Until the labels are taken both are refused.
async fn one_that_waits(function: &Function<'_>, round: &str) -> (String, Call) {
    let deadline = Instant::now() + SOON;
    for attempt in 0.. {
        assert!(Instant::now() < deadline, "no call was queued within {SOON:?}");
        let names = ["x", "y"].map(|end| format!("{round}{attempt}{end}"));
        let [mut x, mut y] = [function.hold(&names[0]), function.hold(&names[1])];
        let (refused, name, mut other) = tokio::select! {
            refused = &mut x => (refused, &names[1], y),
            refused = &mut y => (refused, &names[0], x),
            () = tokio::time::sleep(AT_ONCE) => {
                // Both were queued just before the labels were taken.
                [x, y].iter().for_each(JoinHandle::abort);
                continue;
            }
        };
        let refused = answered(refused);
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("1"));
        let Ok(both) = tokio::time::timeout(AT_ONCE, &mut other).await else {
            assert!(refused.text().contains("too many calls are waiting"), "{}", refused.text());
            return (name.clone(), other);
        };
        assert_eq!(answered(both).status, StatusCode::TOO_MANY_REQUESTS);
    }
    unreachable!()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn at_the_maximum_calls_wait_in_order_and_are_told_when_to_come_again() {
    on_shared_node(async |t| {
        let keys = json!({
            "com.openfaas.scale.max": "1", "execenvironment.count": "1", "lambdalet.dev/queue-timeout": "10s",
        });
        let function = Function::server(t, "f", keys).await;
        let first = function.hold("first");
        function.begun(&["first"]).await;
        function.set("annotate", "lambdalet.dev/queue-timeout=200ms");
        let late = poll("a call that waited too long", SOON, async || {
            let began = Instant::now();
            let answer = answered(function.get("/id").await);
            let waited = began.elapsed();
            if waited < Duration::from_secs(2) { Ok(answer) } else { Err(format!("{waited:?}")) }
        })
        .await;
        assert_eq!((late.status, late.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, Some("1")));
        assert!(late.text().contains("none became free in time"), "{}", late.text());

        t.kubectl_text(&[
            "annotate",
            "pod",
            "f",
            "--overwrite",
            "lambdalet.dev/queue-timeout=30s",
            "lambdalet.dev/queue-length=1",
        ]);
        let (second_name, second) = one_that_waits(&function, "second").await;
        function.set("annotate", "lambdalet.dev/queue-length=2");
        let (third_name, third) = one_that_waits(&function, "third").await;
        // Each is held in turn: were the third the first to go, the second would never begin.
        function.let_go("first");
        function.begun(&[&second_name]).await;
        assert!(!function.gate.path().join(format!("begun.{third_name}")).exists(), "first come, first served");
        function.open();
        for call in [first, second, third] {
            told(call.await);
        }
        assert_eq!(function.environments().len(), 1);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_minimum_stays_and_a_live_change_of_labels_restarts_nothing() {
    on_shared_node(async |t| {
        let keys = json!({
            "com.openfaas.scale.min": "2", "com.openfaas.scale.max": "3", "lambdalet.dev/idle-timeout": "1s",
        });
        let function = Function::server(t, "f", keys).await;
        let first = function.environments();
        assert_eq!(first.len(), 2, "ready means that the minimum is there: {first:?}");
        let calls: Vec<_> = ["a", "b", "c"].iter().map(|name| function.hold(name)).collect();
        function.begun(&["a", "b", "c"]).await;
        assert_eq!(function.environments().len(), 3);
        function.open();
        for call in calls {
            told(call.await);
        }
        function.has(2).await;
        // The idle timeout of those two has passed, too, once this one's has: it was made when they were idle.
        function.set("label", "com.openfaas.scale.min=3");
        let three = function.has(3).await;
        function.set("label", "com.openfaas.scale.max=1");
        let pod = t.until("f", "at the raised maximum", |p| replicas(p).starts_with("3/3 replicas")).await;
        assert!(t.event("f", "InvalidFunctionLabel").await.contains("com.openfaas.scale.max is \"1\""));
        assert_eq!(restarts(&pod, "main"), 0);
        t.kubectl_text(&["label", "pod", "f", "--overwrite", "com.openfaas.scale.min=1", "com.openfaas.scale.max=2"]);
        let one = function.has(1).await;
        assert!(one.is_subset(&three), "{one:?} {three:?}");
        function.set("label", "com.openfaas.scale.min=0");
        function.has(0).await;
        function.id().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn labels_that_make_no_sense_are_named_and_their_defaults_used() {
    on_shared_node(async |t| {
        let keys = json!({"com.openfaas.scale.min": "few", "execenvironment.count": "0"});
        let function = Function::server(t, "f", keys).await;
        poll("both complaints", SOON, async || {
            let list = t.kubectl_text(&[
                "get",
                "events",
                "-o=jsonpath={range .items[*]}{.type} {.reason} {.message}{\"\\n\"}{end}",
            ]);
            let said = |text: &str| list.contains(&format!("Warning InvalidFunctionLabel {text}"));
            let both = said("com.openfaas.scale.min is \"few\", not a whole number >= 0; using 0")
                && said("execenvironment.count is \"0\", not a whole number >= 1; using 1");
            if both { Ok(()) } else { Err(list) }
        })
        .await;
        assert!(function.environments().is_empty());
        function.id().await;
        assert_eq!(function.environments().len(), 1);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_look_at_the_port_wakes_nothing() {
    on_shared_node(async |t| {
        let function = Function::server(t, "f", json!({"com.openfaas.scale.min": "0"})).await;
        for _ in 0..20 {
            drop(tokio::net::TcpStream::connect(&function.address).await.unwrap());
        }
        function.id().await;
        // Numbers are given once: whatever was ever started counts.
        let keys: Vec<_> = function.environments().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["0.0"]);
    });
}
