//! Ephemeral containers.

use k8s_openapi::api::core::v1::EphemeralContainer;

use super::*;

#[test]
fn an_ephemeral_container_is_started_once_and_holds_nothing_up() {
    let debugger = |name: &str| EphemeralContainer { name: name.to_owned(), ..EphemeralContainer::default() };
    let mut world = World::new(spec("OnFailure", &["i"], &["a"]));
    world.settle();
    world.spec.ephemeral_containers = Some(vec![debugger("d"), debugger("e")]);
    let starts = ["d", "e"].map(|name| Step::Start { name: name.into(), attempt: 0 });
    assert_eq!(world.settle(), starts, "though an init container still runs");
    world.end("d", 1);
    assert_eq!(world.settle(), [], "it is not restarted, whatever its code");
    world.end("i", 0);
    assert_eq!(world.settle(), [Step::Start { name: "a".into(), attempt: 0 }]);
    world.observed.put_sandbox(sandbox(0, SandboxState::NotReady));
    world.settle();
    assert_eq!(world.running(), ["i"], "nor in a sandbox that replaces a dead one");
    world.end("i", 0);
    world.settle();
    world.end("a", 0);
    assert_eq!(
        finished(&world.spec, &world.observed, &world.health),
        Some(Finish::Succeeded),
        "nor does its end count"
    );
}

#[test]
fn an_ephemeral_container_on_hold_does_not_hold_the_others() {
    let debugger = EphemeralContainer { name: "d".to_owned(), ..EphemeralContainer::default() };
    let spec = PodSpec { ephemeral_containers: Some(vec![debugger]), ..spec("Always", &[], &["a"]) };
    let observed = Observed::new(vec![sandbox(0, SandboxState::Ready)], Vec::new());
    let later = now() + Duration::from_secs(10);
    let view = |holds: &BTreeMap<String, Timestamp>, floors: &BTreeMap<String, u32>, observed: &Observed| {
        plan(&View {
            spec: &spec,
            goal: Goal::Run,
            observed,
            volumes_ready: true,
            released: false,
            floors,
            container_holds: holds,
            pod_hold: None,
            function: None,
            held: false,
            health: &Health::default(),
            ending: &BTreeSet::new(),
            now: now(),
        })
    };
    let (none, holds) = (BTreeMap::new(), BTreeMap::from([("d".to_owned(), later)]));
    assert_eq!(view(&holds, &none, &observed), Step::Start { name: "a".into(), attempt: 0 });
    let mut both = observed.clone();
    both.put_container(container("a", 0, 0, ContainerState::Running, 0));
    assert_eq!(view(&holds, &none, &both), Step::Wait(Some(later)));
    assert_eq!(view(&BTreeMap::new(), &none, &both), Step::Start { name: "d".into(), attempt: 0 });
    let made_before = BTreeMap::from([("d".to_owned(), 1)]);
    assert_eq!(view(&BTreeMap::new(), &made_before, &both), Step::Wait(None), "somebody removed it");
    both.put_container(container("d", 0, 0, ContainerState::Created, 0));
    assert_eq!(view(&BTreeMap::new(), &made_before, &both), Step::Start { name: "d".into(), attempt: 0 });
}
