//! Whatever happens: random Pods and random blows.

use proptest::prelude::*;

use super::*;

/// What may happen to a Pod between two settlements.
#[derive(Clone, Debug)]
enum Blow {
    End(usize, i32),
    Unhealthy(usize),
    SandboxDies,
}

fn blow() -> impl Strategy<Value = Blow> {
    prop_oneof![
        4 => (0usize..4, prop_oneof![Just(0), Just(1), Just(137)]).prop_map(|(i, code)| Blow::End(i, code)),
        1 => Just(Blow::SandboxDies),
        1 => (0usize..4).prop_map(Blow::Unhealthy),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_plan_settles_and_an_end_leaves_nothing_running(
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        inits in 0usize..3,
        mains in 1usize..4,
        sidecars in prop::collection::vec(any::<bool>(), 3),
        blows in prop::collection::vec(blow(), 0..25),
    ) {
        let names: Vec<String> = (0..inits).map(|i| format!("i{i}")).chain((0..mains).map(|i| format!("m{i}"))).collect();
        let refs: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut world = World::new(spec(policy, &refs[..inits], &refs[inits..]));
        let stay: Vec<&str> = (0..inits).filter(|i| sidecars[*i]).map(|i| refs[i]).collect();
        for name in &stay {
            world = world.with_sidecar(name);
        }
        world.settle();
        for blow in blows {
            match blow {
                Blow::End(i, code) => world.end(&names[i % names.len()], code),
                Blow::Unhealthy(i) => {
                    let name = &names[i % names.len()];
                    if world.running().contains(&name.as_str()) {
                        world.probed(name, true, Some(Kind::Liveness));
                    }
                }
                Blow::SandboxDies => {
                    if let Some(last) = world.observed.sandbox().cloned() {
                        world.observed.put_sandbox(SandboxStatus { state: SandboxState::NotReady, ..last });
                    }
                }
            }
            world.settle();
            let main_runs = world.running().iter().any(|n| n.starts_with('m'));
            let init_runs = world.running().iter().any(|n| n.starts_with('i') && !stay.contains(n));
            prop_assert!(!(main_runs && init_runs), "init and main containers ran together");
            let sidecars_run = stay.iter().all(|name| world.running().contains(name));
            prop_assert!(!main_runs || sidecars_run, "a sidecar is missing");
            if finished(&world.spec, &world.observed, &world.health).is_some() {
                prop_assert!(world.running().is_empty() && world.released);
                break;
            }
        }
        world.goal = Goal::End(Duration::from_secs(1));
        world.settle();
        prop_assert!(world.running().is_empty());
        prop_assert!(world.released);
    }
}
