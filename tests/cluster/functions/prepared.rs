//! Environments that are ready before they are asked for.

use super::*;
use crate::harness::leaks::Leaks;
use crate::harness::node::Options;
use crate::harness::{on_own_node, on_shared_node};

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_is_prepared_is_what_a_call_gets_and_nothing_is_left_of_it() {
    on_own_node("prepares", Options::default(), async |t| {
        let before = Leaks::of(&t.node);
        let function = Function::server(t, "f", json!({"com.openfaas.scale.max": "2"})).await;
        let ready = function.prepared(1).await;
        let id = function.id().await;
        assert_eq!(function.environments(), ready, "the container that was there was started");
        let metrics = t.kubectl_text(&["get", "--raw", &format!("/api/v1/nodes/{}/proxy/metrics", t.node.name)]);
        let line = |name: &str| metrics.lines().find(|line| line.starts_with(name)).unwrap_or("").to_owned();
        assert!(line("lambdalet_function_prepared_starts_total{").ends_with("} 1"), "{metrics}");
        let next = function.prepared(1).await;

        // A crash keeps what runs, and has what was prepared made anew.
        t.node.kill9();
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        function.listens().await;
        assert_eq!(function.id().await, id);
        let anew = function.prepared(1).await;
        assert!(anew.is_disjoint(&next), "{anew:?}");
        let held = function.hold("held");
        function.begun(&["held"]).await;
        function.id().await;
        assert!(function.environments().is_superset(&anew), "{anew:?}");
        function.open();
        told(held.await);

        t.delete("f", None).await;
        t.gone("f", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn labels_that_change_renew_what_is_prepared_and_a_reserve_of_zero_removes_it() {
    on_shared_node(async |t| {
        let keys = json!({"com.openfaas.scale.max": "5", "lambdalet.dev/reserve": "2"});
        let function = Function::server(t, "f", keys).await;
        let two = function.prepared(2).await;
        function.set("label", "app=other");
        poll("others", SOON, async || {
            let now = function.containers(&["--all", "--filter", "status=created"]);
            if now.len() == 2 && now.is_disjoint(&two) { Ok(()) } else { Err(format!("{now:?}, and it was {two:?}")) }
        })
        .await;
        function.set("annotate", "lambdalet.dev/reserve=0");
        function.prepared(0).await;
        function.id().await;
    });
}
