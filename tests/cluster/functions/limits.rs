//! Payloads, grace periods, and the node's capacity.

use super::*;
use crate::harness::node::Options;
use crate::harness::pods::{busybox_with, is_ready, sleeper};
use crate::harness::{on_own_node, on_shared_node};

/// The largest payload of a Lambda.
const PAYLOAD: usize = 6 * 1024 * 1024 + 100;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_payload_may_be_six_mebibytes_and_a_little_and_no_more() {
    on_shared_node(async |t| {
        let function = Function::lambda(t, "f", json!({"com.openfaas.scale.max": "1"})).await;
        let filler = "x".repeat(PAYLOAD - json!({"filler": ""}).to_string().len());
        let large = json!({"filler": filler + "x"});
        let refused = answered(function.invoke(&large).await);
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(refused.text().contains("RequestEntityTooLarge"), "{}", refused.text());
        assert!(function.environments().is_empty(), "it woke nothing");
        let filler = "x".repeat(PAYLOAD - json!({"filler": ""}).to_string().len());
        let answer = returned(function.invoke(&json!({"filler": filler})).await);
        assert_eq!(answer["size"], json!(filler.len()));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deletion_lets_calls_end_and_takes_no_new_ones() {
    on_shared_node(async |t| {
        let mut spec = json!({"containers": [busybox_with(SERVER, json!({}))]});
        spec["terminationGracePeriodSeconds"] = json!(25);
        let function = Function::of_spec(t, "f", json!({"com.openfaas.scale.max": "2"}), spec).await.ready().await;
        let call = function.hold("call");
        function.begun(&["call"]).await;
        t.delete("f", None).await;
        poll("a call that is turned away", SOON, async || match function.get("/id").await.unwrap() {
            Ok(answer) if answer.status == StatusCode::SERVICE_UNAVAILABLE => Ok(()),
            Err(error) if error.contains("refused") => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        assert!(!call.is_finished());
        function.open();
        told(call.await);
        t.gone("f", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_call_beyond_the_grace_period_is_cut_off_and_so_is_what_does_not_end() {
    on_shared_node(async |t| {
        // It neither answers nor ends when it is told to.
        let deaf = SERVER.replace("exit 0", ":").replace("\nwait\n", "\nwhile true; do wait; done\n");
        let container = busybox_with(&deaf, json!({}));
        let spec = json!({"terminationGracePeriodSeconds": 3600, "containers": [container]});
        let function = Function::of_spec(t, "f", json!({"com.openfaas.scale.max": "1"}), spec).await.ready().await;
        let call = function.hold("call");
        function.begun(&["call"]).await;
        let began = std::time::Instant::now();
        t.delete("f", Some(2)).await;
        let cut = call.await.unwrap();
        assert!(cut.as_ref().map_or(true, |answer| answer.status != StatusCode::OK), "{cut:?}");
        t.gone("f", SOON).await;
        assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn what_a_function_borrows_it_gives_back_to_a_pod_that_the_scheduler_binds() {
    let processors = std::thread::available_parallelism().unwrap().get();
    if processors < 2 {
        eprintln!("skipped: this machine has one processor");
        return;
    }
    let reserved = format!("--kube-reserved=cpu={}m", processors * 1000 - 1000);
    on_own_node("lends", Options::flags(&[&reserved]), async |t| {
        let resources =
            json!({"requests": {"cpu": "100m", "memory": "16Mi"}, "limits": {"cpu": "300m", "memory": "64Mi"}});
        let container = busybox_with(SERVER, json!({"resources": resources}));
        let keys = json!({"com.openfaas.scale.max": "5", "lambdalet.dev/idle-timeout": "1h"});
        let function = Function::make(t, "f", keys, container).await.ready().await;
        let names = ["a", "b", "c", "d"];
        let calls: Vec<_> = names.iter().map(|name| function.hold(name)).collect();
        let limited = t.event("f", "ScaleLimited").await;
        assert!(limited.starts_with("The node has no capacity for another replica: 3/5 replicas"), "{limited}");
        // Three times 300m of a processor are lent out of 1000m; the scheduler sees 100m of them.
        let mut guest = sleeper();
        guest["containers"][0]["resources"] = json!({"requests": {"cpu": "600m"}});
        guest["terminationGracePeriodSeconds"] = json!(1);
        t.pod("guest", guest).await;
        t.until("guest", "bound", |p| p.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())).await;
        assert!(!is_ready(&t.api::<Pod>().get("guest").await.unwrap()), "there is no room yet");
        function.open();
        for call in calls {
            told(call.await);
        }
        t.running("guest").await;
        assert_eq!(function.environments().len(), 1, "600m of a guest leave room for one");
        t.delete("guest", None).await;
        t.gone("guest", SOON).await;
        std::fs::remove_file(function.gate.path().join("open")).unwrap();
        let again = ["e", "f", "g"];
        let calls: Vec<_> = again.iter().map(|name| function.hold(name)).collect();
        function.begun(&again).await;
        function.open();
        for call in calls {
            told(call.await);
        }
        assert_eq!(function.environments().len(), 3);
    });
}
