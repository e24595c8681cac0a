//! What is to be done next, by example and by property.

mod chance;
mod ephemeral;
mod function;
mod holds;
mod images;
mod rules;
mod sidecars;

use std::net::IpAddr;

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
        addresses: vec![IpAddr::from([10, 0, 0, 2])],
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

    /// What the spec names.
    fn image(&self, name: &str) -> Option<String> {
        let mut all = self.spec.init_containers.iter().flatten().chain(&self.spec.containers);
        all.find(|container| container.name == name).and_then(|container| container.image.clone())
    }

    /// The spec names another.
    fn set_image(&mut self, name: &str, image: &str) {
        let mut all = self.spec.init_containers.iter_mut().flatten().chain(&mut self.spec.containers);
        all.find(|container| container.name == name).expect("there is such a container").image = Some(image.into());
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
                let image_ref = self.image(name).unwrap_or(made.image_ref);
                self.observed.put_container(ContainerStatus { created_at: self.clock, image_ref, ..made });
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
            Step::Replace(id) => {
                let name = self.observed.running().find(|c| c.id == *id).expect("it runs").name.clone();
                self.health.replace(id.clone());
                self.end(&name, 143);
            }
            Step::Reset(ids) => {
                let hit: Vec<_> = self.observed.running().filter(|c| ids.contains(&c.id)).cloned().collect();
                hit.into_iter().for_each(|c| self.end(&c.name, 137));
            }
            Step::Prune(id) => self.observed.drop_container(id),
            Step::RemoveSandbox(id) => self.observed.drop_sandbox(id),
            Step::Release => self.released = true,
            Step::Create { .. } | Step::Serve | Step::Renew | Step::Drain(_) | Step::Resize => {
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
