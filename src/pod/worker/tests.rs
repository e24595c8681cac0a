//! Single turns of a worker, over the runtime in memory.

use futures::FutureExt as _;
use serde_json::json;

use super::*;
use crate::pod::eviction::{End, Order};
use crate::pod::probes::machine::Kind;
use crate::pod::testing::{Node, UID, container_status, pod};
use crate::runtime::types::ContainerState;
use crate::runtime::verb::Verb;

/// How long anything may take that should happen at once.
const SOON: Duration = Duration::from_secs(10);

fn order(reason: &str, grace: u64) -> Order {
    let (trouble, grace) = (Trouble::new(reason, ""), Duration::from_secs(grace));
    Order { trouble, grace, end: End::WithNode, disruption: None }
}

fn patient_pod() -> Pod {
    pod(json!({
        "hostNetwork": true,
        "terminationGracePeriodSeconds": 3600,
        "containers": [{ "name": "c", "image": "busybox" }],
    }))
}

#[tokio::test]
async fn an_order_interrupts_a_pod_that_runs_and_one_that_ends_slowly() {
    let node = Node::new();
    let mut worker = node.worker(patient_pod());
    for (goal, reason, grace, left) in [
        (Goal::Run, "First", 600, 600),
        (Goal::End(Duration::from_secs(600)), "Second", 10, 10),
        (Goal::End(Duration::from_secs(10)), "Third", 100, 10),
    ] {
        let mut sooner = Box::pin(worker.sooner(goal));
        assert!((&mut sooner).now_or_never().is_none(), "nothing was ordered before {reason}");
        node.shared.evictions.give(UID, order(reason, grace));
        assert!((&mut sooner).now_or_never().is_some(), "{reason}");
        worker.digest().await;
        assert_eq!(worker.goal(), Goal::End(Duration::from_secs(left)), "{reason}");
        assert_eq!(worker.memory.ended.as_ref().map(|trouble| trouble.reason.as_str()), Some("First"));
        assert!(worker.sooner(worker.goal()).now_or_never().is_none(), "{reason} was taken");
    }
}

#[tokio::test]
async fn a_step_under_way_is_dropped_for_an_order() {
    let node = Node::new();
    let mut worker = node.worker(patient_pod());
    let _never = node.runtime.hang_next(Verb::RunPodSandbox);
    let step = worker.perform(Step::RunSandbox { attempt: 0 }, Goal::Run, None);
    let ordered = async {
        while node.runtime.calls(Verb::RunPodSandbox) == 0 {
            tokio::task::yield_now().await;
        }
        node.shared.evictions.give(UID, order("Evicted", 1));
    };
    let both = async { tokio::join!(step, ordered) };
    tokio::time::timeout(SOON, both).await.expect("the step is dropped");
    assert!(node.shared.evictions.has(UID), "it is the next turn that takes the order");
}

#[tokio::test]
async fn a_pod_that_ends_is_not_woken_for_a_resize() {
    let node = Node::new();
    let mut worker = node.worker(patient_pod());
    worker.memory.resize.retry_at = Some(Timestamp::UNIX_EPOCH);
    assert_eq!(worker.resize_step(Goal::End(Duration::ZERO)), None);
    assert_eq!(worker.memory.resize.retry_at, None);
}

#[tokio::test]
async fn a_probe_may_give_any_grace_period() {
    let node = Node::new();
    let probe = json!({ "tcpSocket": { "port": 1 }, "terminationGracePeriodSeconds": i64::MAX });
    let container = json!({ "name": "c", "image": "busybox", "livenessProbe": probe });
    let mut worker = node.worker(pod(json!({ "containers": [container] })));
    let status = container_status(&worker.reference, "c-0", "c", ContainerState::Running);
    let id = status.id.clone();
    worker.observed.put_container(status);
    worker.kill(&id, Kind::Liveness);
    assert!(worker.endings.ids().contains(&id));
}
