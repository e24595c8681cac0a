//! `kill -9` of the node agent: what was warm stays warm, and no environment gets a second call.

use super::*;
use crate::harness::leaks::Leaks;
use crate::harness::node::Options;
use crate::harness::on_own_node;
use crate::harness::pods::restarts;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn environments_are_adopted_and_a_busy_one_gets_no_call_before_it_is_idle() {
    on_own_node("adopts-functions", Options::default(), async |t| {
        let before = Leaks::of(&t.node);
        let keys = json!({"com.openfaas.scale.max": "1", "execenvironment.count": "2"});
        let function = Function::lambda(t, "f", keys).await;
        let idle = returned(function.invoke(&json!({})).await)["id"].clone();
        let warm = function.environments();
        t.node.restart(&t.client).await;
        function.listens().await;
        let again = returned(function.invoke(&json!({})).await);
        assert_eq!(again["id"], idle, "it is warm");
        assert_eq!(function.environments(), warm, "the same containers");

        let held = function.invoke(&json!({"hold": "held"}));
        function.begun(&["held"]).await;
        t.node.kill9();
        assert!(held.await.unwrap().is_err(), "nobody is left to answer");
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        function.listens().await;
        let other = returned(function.invoke(&json!({})).await);
        assert_ne!(other["id"], idle, "the busy one gets no call");
        let held = function.invoke(&json!({"hold": "next"}));
        function.begun(&["next"]).await;
        let waits = function.invoke(&json!({}));
        // The call of before the crash ends, and its environment serves again.
        function.let_go("held");
        let after = returned(waits.await);
        assert_eq!((&after["id"], &after["alone"]), (&idle, &json!(true)));
        function.let_go("next");
        assert_eq!(returned(held.await)["id"], other["id"]);
        let pod = t.running("f").await;
        assert_eq!(restarts(&pod, "main"), 0);

        // Killed in the middle of its end, too.
        t.delete("f", None).await;
        t.node.restart(&t.client).await;
        t.gone("f", SOON).await;
        before.again(&t.node).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_died_with_the_node_away_is_removed_and_the_minimum_made_again() {
    on_own_node("functions-away", Options::default(), async |t| {
        let function = Function::server(t, "f", json!({"com.openfaas.scale.min": "2"})).await;
        let two = function.environments();
        t.node.kill9();
        let (dead, id) = two.first().unwrap();
        output("docker", &["kill", id]);
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        let now = function.has(2).await;
        assert_eq!(now.intersection(&two).count(), 1, "{now:?} {two:?}");
        assert!(!now.iter().any(|(key, _)| key == dead), "a number is given once: {now:?}");
        function.listens().await;
        function.id().await;
    });
}
