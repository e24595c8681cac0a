//! What waits: containers that are held back, or not started yet.

use super::*;

#[test]
fn a_hold_keeps_a_container_back_but_not_its_neighbour() {
    let world = World::new(spec("Always", &[], &["a", "b"]));
    let mut observed = Observed::default();
    observed.put_sandbox(sandbox(0, SandboxState::Ready));
    let later = now() + Duration::from_secs(10);
    let holds = BTreeMap::from([("a".to_owned(), later)]);
    let mut view = View {
        spec: &world.spec,
        goal: Goal::Run,
        observed: &observed,
        volumes_ready: true,
        released: false,
        floors: &BTreeMap::new(),
        container_holds: &holds,
        pod_hold: None,
        function: None,
        held: false,
        health: &Health::default(),
        ending: &BTreeSet::new(),
        now: now(),
    };
    assert_eq!(plan(&view), Step::Start { name: "b".into(), attempt: 0 });
    let mut both = observed.clone();
    both.put_container(container("b", 0, 0, ContainerState::Running, 0));
    view.observed = &both;
    assert_eq!(plan(&view), Step::Wait(Some(later)));
}

#[test]
fn what_is_held_is_made_and_not_started_until_it_is_let_go() {
    let world = World::new(spec("Never", &[], &["a", "b"]));
    let mut observed = Observed::default();
    observed.put_sandbox(sandbox(0, SandboxState::Ready));
    let step = |observed: &Observed, held| {
        plan(&View {
            spec: &world.spec,
            goal: Goal::Run,
            observed,
            volumes_ready: true,
            released: false,
            floors: &BTreeMap::new(),
            container_holds: &BTreeMap::new(),
            pod_hold: None,
            function: None,
            held,
            health: &Health::default(),
            ending: &BTreeSet::new(),
            now: now(),
        })
    };
    for name in ["a", "b"] {
        assert_eq!(step(&observed, true), Step::Create { name: name.into(), attempt: 0 });
        observed.put_container(container(name, 0, 0, ContainerState::Created, 0));
    }
    assert_eq!(step(&observed, true), Step::Wait(None));
    assert_eq!(step(&observed, false), Step::Start { name: "a".into(), attempt: 0 });
    // Its sandbox may die meanwhile: then everything is made anew.
    observed.put_sandbox(sandbox(0, SandboxState::NotReady));
    assert_eq!(step(&observed, true), Step::RunSandbox { attempt: 1 });
    observed.put_sandbox(sandbox(1, SandboxState::Ready));
    assert_eq!(step(&observed, true), Step::Create { name: "a".into(), attempt: 1 });
}

#[test]
fn an_init_container_that_is_held_is_made_and_nothing_after_it() {
    let mut observed = Observed::default();
    observed.put_sandbox(sandbox(0, SandboxState::Ready));
    observed.put_container(container("i", 0, 0, ContainerState::Created, 0));
    let world = World::new(spec("Never", &["i"], &["a"]));
    let mut view = View {
        spec: &world.spec,
        goal: Goal::Run,
        observed: &observed,
        volumes_ready: true,
        released: false,
        floors: &BTreeMap::new(),
        container_holds: &BTreeMap::new(),
        pod_hold: None,
        function: None,
        held: true,
        health: &Health::default(),
        ending: &BTreeSet::new(),
        now: now(),
    };
    assert_eq!(plan(&view), Step::Wait(None));
    view.held = false;
    assert_eq!(plan(&view), Step::Start { name: "i".into(), attempt: 0 });
}
