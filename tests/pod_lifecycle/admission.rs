//! Pods that the node refuses: said with the kubelet's reasons, and nothing is made for them.

use lambdalet::runtime::verb::Verb;
use serde_json::json;

use super::pods::{PodBuilder, pod};
use super::world::{Setup, World, until};

/// The node refuses `pod`, which is called "refused", for this reason, and it stays refused.
pub(crate) async fn is_refused(world: &mut World, pod: PodBuilder, reason: &str) {
    let made =
        |world: &World| [Verb::RunPodSandbox, Verb::CreateContainer, Verb::PullImage].map(|v| world.runtime.calls(v));
    let before = made(world);
    let uid = world.create(pod);
    world.until_phase("refused", "Failed").await;
    let status = world.api.pod("refused").unwrap()["status"].clone();
    assert_eq!(status["reason"], reason, "{status:#}");
    assert!(status["message"].as_str().is_some_and(|text| text.starts_with("Pod was rejected: ")), "{status:#}");
    until("it was told", || world.api.state().reasons("refused").contains(&reason.to_owned())).await;
    // A restart does not think better of it.
    world.crash();
    world.start();
    world.api.delete("refused", 1);
    until("it is gone", || world.api.pod("refused").is_none()).await;
    until("nothing is left", || !world.root.path().join("pods").join(&uid).exists()).await;
    assert_eq!(made(world), before, "nothing was made for it");
}

#[tokio::test]
async fn a_pod_that_does_not_fit_is_refused_until_there_is_room() {
    let mut world = World::with(Setup { room: (2, 110), ..Setup::default() });
    world.running(pod("big").requests("1500m")).await;
    is_refused(&mut world, pod("refused").requests("1"), "OutOfcpu").await;
    world.api.delete("big", 1);
    world.until_gone("big").await;
    world.running(pod("next").requests("2")).await;
}

#[tokio::test]
async fn a_pod_that_has_ended_makes_room_while_its_object_stays() {
    let world = World::with(Setup { room: (2, 110), ..Setup::default() });
    world.create(pod("done").policy("Never").requests("2").runs("exit 0"));
    world.until_phase("done", "Succeeded").await;
    until("its volumes are gone", || std::fs::read_dir(world.root.path().join("pods")).unwrap().count() == 0).await;
    world.running(pod("next").requests("2")).await;
}

#[tokio::test]
async fn one_pod_too_many_is_refused() {
    let mut world = World::with(Setup { room: (8, 1), ..Setup::default() });
    world.running(pod("one")).await;
    is_refused(&mut world, pod("refused"), "OutOfpods").await;
}

#[tokio::test]
async fn a_pod_that_selects_other_nodes_is_refused() {
    let mut world = World::new();
    world.running(pod("fits").with("/spec/nodeSelector", json!({ "disk": "ssd" }))).await;
    is_refused(&mut world, pod("refused").with("/spec/nodeSelector", json!({ "disk": "tape" })), "NodeAffinity").await;
}

#[tokio::test]
async fn a_port_of_the_host_is_had_by_one_pod() {
    let mut world = World::new();
    let asking =
        |name: &str| pod(name).with("/spec/containers/0/ports", json!([{ "containerPort": 80, "hostPort": 8080 }]));
    world.running(asking("first")).await;
    is_refused(&mut world, asking("refused"), "NodePorts").await;
    world.api.delete("first", 1);
    world.until_gone("first").await;
    world.running(asking("next")).await;
}

#[tokio::test]
async fn a_critical_pod_has_the_place_of_one_that_matters_less() {
    let world = World::with(Setup { room: (2, 110), ..Setup::default() });
    let small = world.running(pod("small").requests("500m")).await;
    world.running(pod("large").requests("1500m").with("/spec/terminationGracePeriodSeconds", json!(1))).await;
    let critical = pod("critical").requests("1").with("/spec/priority", json!(2_000_000_000));
    world.running(critical).await;
    let status = world.api.pod("large").unwrap()["status"].clone();
    let text = "Preempted in order to admit critical pod";
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("Preempting")), "{status:#}");
    assert_eq!(status["message"], text);
    assert_eq!(world.api.condition("large", "DisruptionTarget"), "True");
    until("it was told", || world.api.state().reasons("large").contains(&"Preempting".to_owned())).await;
    world.attempt(&small, "main", 0).await;
    assert_eq!(world.api.phase("small"), "Running");
}

#[tokio::test]
async fn a_critical_pod_for_which_nobody_can_go_is_refused() {
    let mut world = World::with(Setup { room: (2, 110), ..Setup::default() });
    let critical = |name: &str| pod(name).requests("1500m").with("/spec/priority", json!(2_000_000_000));
    world.running(critical("first")).await;
    is_refused(&mut world, critical("refused"), "UnexpectedAdmissionError").await;
    assert_eq!(world.api.phase("first"), "Running");
}

#[tokio::test]
async fn a_user_namespace_of_its_own_is_refused() {
    let mut world = World::new();
    is_refused(&mut world, pod("refused").with("/spec/hostUsers", json!(false)), "UnsupportedPodFeature").await;
}
