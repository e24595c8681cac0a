//! A function Pod: its sandbox, its front, and the images that its environments are made of.

use super::*;

/// What a function with one ready sandbox does next.
fn next(phase: FunctionPhase<'_>, holds: &BTreeMap<String, Timestamp>) -> Step {
    let spec = spec("Always", &[], &["a"]);
    let mut observed = Observed::default();
    observed.put_sandbox(sandbox(1, SandboxState::Ready));
    plan(&View {
        spec: &spec,
        goal: Goal::Run,
        observed: &observed,
        volumes_ready: true,
        released: false,
        floors: &BTreeMap::new(),
        container_holds: holds,
        pod_hold: None,
        function: Some(phase),
        held: false,
        health: &Health::default(),
        ending: &BTreeSet::new(),
        now: now(),
    })
}

#[test]
fn the_front_listens_in_the_present_sandbox_and_environments_are_of_the_present_images() {
    let (present, before) = (sandbox(1, SandboxState::Ready).id, sandbox(0, SandboxState::Ready).id);
    let cases = [
        (FunctionPhase::Idle, Step::Serve),
        (FunctionPhase::Serving(&before), Step::Serve),
        (FunctionPhase::Outdated(&before), Step::Serve),
        (FunctionPhase::Serving(&present), Step::Wait(None)),
        (FunctionPhase::Outdated(&present), Step::Renew),
        (FunctionPhase::Drained, Step::Wait(None)),
    ];
    for (phase, step) in cases {
        assert_eq!(next(phase, &BTreeMap::new()), step, "{phase:?}");
    }
}

#[test]
fn an_image_that_cannot_be_had_is_waited_for_and_what_serves_serves() {
    let present = sandbox(1, SandboxState::Ready).id;
    let later = now() + Duration::from_secs(10);
    let holds = BTreeMap::from([("a".to_owned(), later)]);
    assert_eq!(next(FunctionPhase::Outdated(&present), &holds), Step::Wait(Some(later)));
    assert_eq!(next(FunctionPhase::Idle, &holds), Step::Wait(Some(later)));
    assert_eq!(next(FunctionPhase::Serving(&present), &holds), Step::Wait(None));
}
