//! Sidecars, and containers that are killed for their health.

use super::*;

#[test]
fn a_sidecar_lets_the_next_one_begin_once_it_has_started_and_stays() {
    let mut world = World::new(spec("Always", &["s", "i"], &["a"])).with_sidecar("s");
    let start = |name: &str, attempt| Step::Start { name: name.into(), attempt };
    assert_eq!(world.next(), Step::SetUpVolumes);
    while world.running().is_empty() {
        let step = world.next();
        world.apply(&step);
    }
    world.probed("s", false, None);
    assert_eq!(world.settle(), [], "its startup probe has not succeeded");
    assert!(!initialized(&world.spec, &world.observed, &world.health));
    world.probed("s", true, None);
    assert_eq!(world.settle(), [start("i", 0)]);
    world.end("s", 0);
    assert_eq!(world.settle(), [start("s", 1)], "it comes back while the next one runs");
    world.probed("s", false, None);
    world.end("i", 0);
    assert_eq!(world.settle(), [start("a", 0)], "what it has let begin does not wait for it again");
    assert!(initialized(&world.spec, &world.observed, &world.health));
    world.end("s", 1);
    assert_eq!(world.next(), start("s", 2));
}

#[test]
fn a_pod_ends_with_its_main_containers_and_takes_its_sidecars_along_with_grace() {
    let mut world = World::new(spec("Never", &["s"], &["a"])).with_sidecar("s");
    world.spec.termination_grace_period_seconds = Some(7);
    world.settle();
    world.end("s", 1);
    assert_eq!(names(&world.settle()), ["s"], "whatever the Pod's policy");
    world.end("a", 0);
    assert_eq!(finished(&world.spec, &world.observed, &world.health), Some(Finish::Succeeded));
    let stop = Step::Stop { containers: vec!["s-1".into()], grace: Duration::from_secs(7) };
    assert_eq!(world.settle(), [stop, Step::Release]);
}

#[test]
fn a_container_that_failed_its_probe_for_good_is_killed_once() {
    let mut world = World::new(spec("Always", &[], &["a", "b"]));
    world.settle();
    world.probed("a", true, Some(Kind::Liveness));
    let kill = Step::Kill { container: "a-0".into(), probe: Kind::Liveness };
    assert_eq!(world.next(), kill);
    let ending = BTreeSet::from(["a-0".into()]);
    let under_way = plan(&View {
        spec: &world.spec,
        goal: Goal::Run,
        observed: &world.observed,
        volumes_ready: true,
        released: false,
        floors: &BTreeMap::new(),
        container_holds: &BTreeMap::new(),
        pod_hold: None,
        function: None,
        held: false,
        health: &world.health,
        ending: &ending,
        now: now(),
    });
    assert_eq!(under_way, Step::Wait(None));
    assert_eq!(world.settle(), [kill, Step::Start { name: "a".into(), attempt: 1 }]);
}

#[test]
fn what_was_killed_for_its_health_has_failed_whatever_its_exit_code() {
    for (policy, again) in [("OnFailure", true), ("Never", false)] {
        let mut world = World::new(spec(policy, &[], &["a"]));
        world.killed_with = 0;
        world.settle();
        world.probed("a", true, Some(Kind::Liveness));
        let steps = world.settle();
        assert_eq!(names(&steps) == ["a"], again, "{steps:?}");
    }
}
