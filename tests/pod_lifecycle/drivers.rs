//! Who runs a Pod: its RuntimeClass, its annotation, the node.

use lambdalet::pod::drivers::{Drivers, MICROVM};
use lambdalet::pod::guest::Bounds;
use lambdalet::runtime::SandboxRuntime as _;
use lambdalet::runtime::types::ContainerState;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::admission::is_refused;
use super::pods::{PodBuilder, pod};
use super::world::{LATER, SOON, Setup, World, until};

/// A node with microVMs, in memory like all of it.
fn setup() -> Setup {
    let drivers = Drivers {
        own: "fake".into(),
        offered: vec!["fake".into(), MICROVM.into()],
        missing: [("microvm-firecracker".to_owned(), "it needs KVM: load kvm_intel".to_owned())].into(),
        vmm: "qemu".into(),
        guests: Bounds { images: 8, ..Bounds::default() },
    };
    Setup { drivers, ..Setup::default() }
}

fn world() -> World {
    let world = World::with(setup());
    world.guests.add_image("busybox:1");
    world
}

fn of_class(name: &str, class: &str) -> PodBuilder {
    pod(name).with("/spec/runtimeClassName", json!(class))
}

fn class(world: &World, name: &str, handler: &str) {
    let class = json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": { "name": name }, "handler": handler,
    });
    world.api.create("runtimeclasses", class);
}

/// The notes of the events of this reason on a Pod.
fn notes(world: &World, name: &str, reason: &str) -> Vec<String> {
    let state = world.api.state();
    let of_pod = |event: &&Value| event["involvedObject"]["name"] == name && event["reason"] == reason;
    state.events.iter().filter(of_pod).filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
}

#[tokio::test]
async fn the_class_of_a_pod_says_who_runs_it_and_its_status_says_so() {
    let world = world();
    class(&world, "isolated", MICROVM);
    class(&world, "plain", "fake");
    let uid = world.running(of_class("vm", "isolated")).await;
    assert_eq!(world.guests.list_pod_sandboxes(Some(&uid)).await.unwrap().len(), 1);
    assert!(world.sandboxes(&uid).await.is_empty(), "the node's own driver has nothing of it");
    let id = world.api.pod("vm").unwrap()["status"]["containerStatuses"][0]["containerID"].clone();
    assert!(id.as_str().is_some_and(|id| id.starts_with("microvm://")), "{id}");
    let uid = world.running(of_class("container", "plain")).await;
    assert_eq!(world.sandboxes(&uid).await.len(), 1);
    world.running(pod("noted").with("/metadata/annotations", json!({ "lambdalet.dev/runtime": "microvm" }))).await;
    assert_eq!(world.guests.list_pod_sandboxes(None).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_class_that_is_not_there_is_told_and_waited_for() {
    let world = world();
    let uid = world.create(of_class("early", "isolated"));
    let told = || notes(&world, "early", "FailedCreatePodSandBox").pop();
    until("it was told", || told().is_some()).await;
    let expected = "Failed to create pod sandbox: runtimeclass.node.k8s.io \"isolated\" not found";
    assert_eq!(told().as_deref(), Some(expected));
    assert_eq!(world.api.phase("early"), "Pending");
    class(&world, "isolated", MICROVM);
    let began = std::time::Instant::now();
    while world.api.phase("early") != "Running" {
        assert!(began.elapsed() < LATER, "it does not run although its class is there now");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(world.guests.list_pod_sandboxes(Some(&uid)).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_handler_nobody_knows_is_told_in_the_kubelets_words() {
    let world = world();
    class(&world, "kata", "kata");
    world.create(of_class("other", "kata"));
    let told = || notes(&world, "other", "FailedCreatePodSandBox").pop();
    until("it was told", || told().is_some()).await;
    let expected = "Failed to create pod sandbox: failed to get sandbox runtime: no runtime for \"kata\" is configured (this \
                    node has fake, microvm)";
    assert_eq!(told().as_deref(), Some(expected));
    assert_eq!(world.api.phase("other"), "Pending");
}

#[tokio::test]
async fn what_this_node_could_have_and_has_not_is_refused_with_what_to_do() {
    let mut world = world();
    let note = |value: &str| json!({ "lambdalet.dev/runtime": "microvm", "lambdalet.dev/vmm": value });
    let firecracker = pod("refused").with("/metadata/annotations", note("firecracker"));
    is_refused(&mut world, firecracker, "UnsupportedPodFeature").await;
    let told = notes(&world, "refused", "UnsupportedPodFeature").pop().unwrap();
    assert!(told.ends_with("which this node does not have: it needs KVM: load kvm_intel"), "{told}");
    let unknown = pod("refused").with("/metadata/annotations", json!({ "lambdalet.dev/runtime": "kata" }));
    is_refused(&mut world, unknown, "UnsupportedPodFeature").await;
}

#[tokio::test]
async fn what_a_guest_cannot_have_is_refused_before_anything_is_made() {
    let mut world = world();
    class(&world, "isolated", MICROVM);
    let on_host = of_class("refused", "isolated").with("/spec/hostPID", json!(true));
    is_refused(&mut world, on_host, "UnsupportedPodFeature").await;
    let told = notes(&world, "refused", "UnsupportedPodFeature").pop().unwrap();
    assert!(told.contains("runtimeClassName isolated") && told.contains("hostPID: true"), "{told}");
}

#[tokio::test]
async fn the_environments_of_a_function_are_guests_and_its_front_is_not() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let world = World::with(Setup { range: "127.78.0.0/24", ..setup() });
    world.guests.add_image("busybox:1");
    class(&world, "isolated", MICROVM);
    let port = listener.local_addr().unwrap().port().to_string();
    let function = of_class("f", "isolated")
        .with("/metadata/labels", json!({ "com.openfaas.scale.min": "1" }))
        .with("/metadata/annotations", json!({ "lambdalet.dev/invocation-port": port, "lambdalet.dev/reserve": "0" }));
    let uid = world.create(function);
    let key = format!("{uid}.0.0");
    let began = std::time::Instant::now();
    loop {
        let containers = world.guests.list_containers(Some(&key)).await.unwrap();
        if containers.iter().any(|container| container.state == ContainerState::Running) {
            break;
        }
        assert!(began.elapsed() < SOON, "waited in vain for {key}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(world.sandboxes(&uid).await.len(), 1, "the front's");
    assert!(world.guests.list_pod_sandboxes(Some(&uid)).await.unwrap().is_empty());
    world.api.delete("f", 1);
    world.until_gone("f").await;
    assert!(world.guests.list_pod_sandboxes(None).await.unwrap().is_empty());
}
