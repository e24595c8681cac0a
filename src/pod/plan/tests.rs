//! What is to be done next, by example and by property.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::EphemeralContainer;
use proptest::prelude::*;

use super::*;
use crate::pod::probes::machine::Results;
use crate::runtime::types::{ContainerStatus, PodRef, SandboxState, SandboxStatus};

const MAX_STEPS: usize = 200;

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn pod_ref() -> PodRef {
    PodRef { uid: "u".into(), namespace: "ns".into(), name: "p".into() }
}

fn spec(policy: &str, init: &[&str], main: &[&str]) -> PodSpec {
    let container = |name: &&str| Container { name: (*name).to_owned(), ..Container::default() };
    PodSpec {
        restart_policy: Some(policy.into()),
        init_containers: Some(init.iter().map(container).collect()),
        containers: main.iter().map(container).collect(),
        ..PodSpec::default()
    }
}

fn sandbox(attempt: u32, state: SandboxState) -> SandboxStatus {
    SandboxStatus {
        id: format!("sandbox-{attempt}").into(),
        pod: pod_ref(),
        attempt,
        state,
        created_at: now(),
        address: Some(IpAddr::from([10, 0, 0, 2])),
        pid: Some(1),
    }
}

fn container(name: &str, attempt: u32, sandbox: u32, state: ContainerState, exit_code: i32) -> ContainerStatus {
    ContainerStatus {
        id: format!("{name}-{attempt}").into(),
        sandbox: format!("sandbox-{sandbox}").into(),
        pod: pod_ref(),
        name: name.into(),
        attempt,
        state,
        created_at: now(),
        started_at: None,
        finished_at: None,
        frozen: false,
        exit_code,
        oom_killed: false,
        message: String::new(),
        image: "sha256:0".into(),
        image_ref: "busybox".into(),
        pid: None,
        resources: None,
        annotations: BTreeMap::new(),
    }
}

/// A runtime in a few lines: applies steps, and lets the test end containers with a code.
struct World {
    spec: PodSpec,
    observed: Observed,
    volumes: bool,
    released: bool,
    goal: Goal,
    health: Health,
    clock: Timestamp,
    /// Exit code of what is killed for its health.
    killed_with: i32,
}

impl World {
    fn new(spec: PodSpec) -> Self {
        let (observed, health) = (Observed::default(), Health::default());
        let (volumes, released, goal) = (false, false, Goal::Run);
        Self { spec, observed, volumes, released, goal, health, clock: now(), killed_with: 137 }
    }

    /// Makes the init container of that name a sidecar.
    fn with_sidecar(mut self, name: &str) -> Self {
        let mut init = self.spec.init_containers.iter_mut().flatten();
        let found = init.find(|c| c.name == name).expect("there is such an init container");
        found.restart_policy = Some("Always".into());
        self
    }

    /// What probes say of the newest attempt.
    fn probed(&mut self, name: &str, started: bool, failed: Option<Kind>) {
        let id = self.observed.latest(name).expect("it was started").id.clone();
        self.health.put(id, Results { started, ready: started, failed });
    }

    fn next(&self) -> Step {
        plan(&View {
            spec: &self.spec,
            goal: self.goal,
            observed: &self.observed,
            volumes_ready: self.volumes,
            released: self.released,
            floors: &BTreeMap::new(),
            container_holds: &BTreeMap::new(),
            pod_hold: None,
            function: None,
            held: false,
            health: &self.health,
            ending: &BTreeSet::new(),
            now: now(),
        })
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Wait(_) => {}
            Step::SetUpVolumes => self.volumes = true,
            Step::StopSandbox(id) => {
                let hit: Vec<_> = self.observed.running().filter(|c| &c.sandbox == id).cloned().collect();
                hit.into_iter().for_each(|c| self.end(&c.name, 137));
            }
            Step::RunSandbox { attempt } => self.observed.put_sandbox(sandbox(*attempt, SandboxState::Ready)),
            Step::Start { name, attempt } => {
                let in_sandbox = self.observed.ready_sandbox().expect("a start needs a ready sandbox").attempt;
                assert!(self.observed.running().all(|c| &c.name != name), "{name} started while it runs");
                let made = container(name, *attempt, in_sandbox, ContainerState::Running, 0);
                self.observed.put_container(ContainerStatus { created_at: self.clock, ..made });
            }
            Step::Stop { containers, .. } => {
                let hit: Vec<_> = self.observed.running().filter(|c| containers.contains(&c.id)).cloned().collect();
                hit.into_iter().for_each(|c| self.end(&c.name, 143));
            }
            Step::Kill { container, .. } => {
                let name = self.observed.running().find(|c| c.id == *container).expect("it runs").name.clone();
                self.health.kill(container.clone());
                self.end(&name, self.killed_with);
            }
            Step::Reset(ids) => {
                let hit: Vec<_> = self.observed.running().filter(|c| ids.contains(&c.id)).cloned().collect();
                hit.into_iter().for_each(|c| self.end(&c.name, 137));
            }
            Step::Prune(id) => self.observed.drop_container(id),
            Step::RemoveSandbox(id) => self.observed.drop_sandbox(id),
            Step::Release => self.released = true,
            Step::Create { .. } | Step::Serve | Step::Drain(_) | Step::Resize => {
                panic!("{step:?} for a Pod that is no function")
            }
        }
    }

    /// Runs until there is nothing to do.
    fn settle(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        while steps.len() < MAX_STEPS {
            let step = self.next();
            if matches!(step, Step::Wait(_)) {
                return steps;
            }
            self.apply(&step);
            steps.push(step);
        }
        panic!("no end after {MAX_STEPS} steps: {:?}", &steps[MAX_STEPS - 5..]);
    }

    fn end(&mut self, name: &str, code: i32) {
        if let Some(latest) = self.observed.latest(name).filter(|c| c.state == ContainerState::Running).cloned() {
            let finished_at = Some(self.clock);
            let ended = ContainerStatus { state: ContainerState::Exited, exit_code: code, finished_at, ..latest };
            self.observed.put_container(ended);
        }
    }

    fn running(&self) -> Vec<&str> {
        self.observed.running().map(|c| c.name.as_str()).collect()
    }
}

fn names(steps: &[Step]) -> Vec<String> {
    steps.iter().filter_map(|s| if let Step::Start { name, .. } = s { Some(name.clone()) } else { None }).collect()
}

#[test]
fn volumes_come_before_the_sandbox_and_the_sandbox_before_containers() {
    let mut world = World::new(spec("Always", &[], &["a", "b"]));
    let steps = world.settle();
    assert_eq!(steps[0], Step::SetUpVolumes);
    assert_eq!(steps[1], Step::RunSandbox { attempt: 0 });
    assert_eq!(names(&steps), ["a", "b"]);
}

#[test]
fn init_containers_run_one_after_the_other_before_any_main_container() {
    let mut world = World::new(spec("Always", &["i1", "i2"], &["a"]));
    world.settle();
    assert_eq!(world.running(), ["i1"]);
    world.end("i1", 0);
    world.settle();
    assert_eq!(world.running(), ["i2"]);
    world.end("i2", 0);
    world.settle();
    assert_eq!(world.running(), ["a"]);
}

#[test]
fn a_failed_init_container_ends_a_never_pod_and_is_retried_otherwise() {
    let mut never = World::new(spec("Never", &["i"], &["a"]));
    never.settle();
    never.end("i", 1);
    assert_eq!(never.settle(), [Step::Release]);
    assert_eq!(finished(&never.spec, &never.observed, &never.health), Some(Finish::Failed));

    let mut always = World::new(spec("Always", &["i"], &["a"]));
    always.settle();
    always.end("i", 1);
    assert_eq!(always.settle(), [Step::Start { name: "i".into(), attempt: 1 }]);
}

#[test]
fn the_restart_policy_decides_what_is_started_again() {
    for (policy, code, again) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let mut world = World::new(spec(policy, &[], &["a", "b"]));
        world.settle();
        world.end("a", code);
        let steps = world.settle();
        assert_eq!(!names(&steps).is_empty(), again, "{policy} after exit code {code}");
    }
}

#[test]
fn a_sandbox_that_was_replaced_is_removed_once_no_container_is_left_in_it() {
    let mut world = World::new(spec("Always", &[], &["a"]));
    world.volumes = true;
    world.observed.put_sandbox(sandbox(0, SandboxState::NotReady));
    let steps = world.settle();
    assert_eq!(steps.last(), Some(&Step::RemoveSandbox("sandbox-0".into())), "{steps:?}");
    assert_eq!(world.observed.sandbox_ids().count(), 1);

    world.observed.put_sandbox(sandbox(1, SandboxState::NotReady));
    world.settle();
    assert_eq!(world.observed.sandbox_ids().count(), 2, "the ended container's log is in it");
}

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

#[test]
fn a_dead_sandbox_is_replaced_and_init_containers_run_again_in_the_new_one() {
    let mut world = World::new(spec("Always", &["i"], &["a"]));
    world.settle();
    world.end("i", 0);
    world.settle();
    world.observed.put_sandbox(sandbox(0, SandboxState::NotReady));
    let steps = world.settle();
    assert_eq!(steps[..2], [Step::StopSandbox("sandbox-0".into()), Step::RunSandbox { attempt: 1 }]);
    assert_eq!(world.running(), ["i"]);
    world.end("i", 0);
    assert_eq!(world.settle(), [Step::Start { name: "a".into(), attempt: 1 }]);
}

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

#[test]
fn a_container_removed_behind_our_back_never_reuses_an_attempt_number() {
    let world = World::new(spec("Always", &[], &["a"]));
    let mut observed = Observed::default();
    observed.put_sandbox(sandbox(0, SandboxState::Ready));
    let floors = BTreeMap::from([("a".to_owned(), 4)]);
    let view = View {
        spec: &world.spec,
        goal: Goal::Run,
        observed: &observed,
        volumes_ready: true,
        released: false,
        floors: &floors,
        container_holds: &BTreeMap::new(),
        pod_hold: None,
        function: None,
        held: false,
        health: &Health::default(),
        ending: &BTreeSet::new(),
        now: now(),
    };
    assert_eq!(plan(&view), Step::Start { name: "a".into(), attempt: 4 });
}

#[test]
fn one_dead_attempt_is_kept_and_older_ones_are_removed() {
    let mut world = World::new(spec("Always", &[], &["a"]));
    world.settle();
    for _ in 0..5 {
        world.end("a", 1);
        world.settle();
    }
    assert_eq!(world.observed.attempts("a").len(), 2);
    assert_eq!(world.observed.latest("a").map(|c| c.attempt), Some(5));
}

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

#[test]
fn the_first_rule_that_names_the_code_decides_then_the_containers_policy() {
    for (policy, own, rules, code, again) in [
        ("Never", None, "In 42", 42, true),
        ("Never", None, "In 42", 1, false),
        ("Never", Some("Never"), "NotIn 1 2", 3, true),
        ("Never", Some("Never"), "NotIn 1 2", 2, false),
        ("Never", Some("OnFailure"), "", 1, true),
        ("Never", Some("OnFailure"), "", 0, false),
        ("Always", Some("Never"), "", 1, false),
        ("Always", Some("OnFailure"), "In 0", 0, true),
    ] {
        let mut world = World::new(spec(policy, &[], &["a", "b"]));
        let container = &mut world.spec.containers[0];
        container.restart_policy = own.map(str::to_owned);
        if let Some((operator, values)) = rules.split_once(' ') {
            let values: Vec<i32> = values.split(' ').map(|value| value.parse().unwrap()).collect();
            let rule = serde_json::json!({
                "action": "Restart", "exitCodes": { "operator": operator, "values": values },
            });
            container.restart_policy_rules = Some(vec![serde_json::from_value(rule).unwrap()]);
        }
        world.settle();
        world.end("a", code);
        assert_eq!(!names(&world.settle()).is_empty(), again, "{policy} {own:?} {rules:?} after exit code {code}");
    }
}

#[test]
fn a_rule_may_have_every_container_begin_anew() {
    let mut spec = spec("Never", &["i"], &["a", "b"]);
    let codes = serde_json::json!({ "operator": "In", "values": [88] });
    let rule = serde_json::json!({ "action": "RestartAllContainers", "exitCodes": codes });
    spec.containers[0].restart_policy_rules = Some(vec![serde_json::from_value(rule).unwrap()]);
    let mut world = World::new(spec);
    world.settle();
    world.end("i", 0);
    world.settle();
    world.end("b", 0);
    world.settle();
    world.clock += Duration::from_secs(1);
    world.end("a", 88);
    world.clock += Duration::from_secs(1);
    assert!(finished(&world.spec, &world.observed, &world.health).is_none(), "what has ended begins anew too");
    assert_eq!(names(&world.settle()), ["i"]);
    world.end("i", 0);
    assert_eq!(names(&world.settle()), ["a", "b"]);
    world.clock += Duration::from_secs(1);
    world.end("a", 88);
    world.clock += Duration::from_secs(1);
    let steps = world.settle();
    assert_eq!(steps[0], Step::Reset(vec!["b-1".into()]));
    assert_eq!(names(&steps), ["i"]);
    world.end("i", 0);
    world.settle();
    world.end("a", 0);
    world.end("b", 0);
    assert_eq!(finished(&world.spec, &world.observed, &world.health), Some(Finish::Succeeded));
}

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
