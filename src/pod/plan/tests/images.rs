//! An image that is changed while the Pod lives, and what was made before it may start.

use super::*;

fn world(policy: &str, init: &[&str], main: &[&str]) -> World {
    let mut world = World::new(spec(policy, init, main));
    init.iter().chain(main).for_each(|name| world.set_image(name, "busybox"));
    world
}

#[test]
fn a_container_of_another_image_is_replaced_once_whatever_the_policy() {
    for (policy, name) in [("Always", "a"), ("OnFailure", "a"), ("Never", "a"), ("Never", "i")] {
        let mut world = world(policy, &["i"], &["a", "b"]).with_sidecar("i");
        world.settle();
        world.set_image(name, "another");
        let steps = world.settle();
        let started = Step::Start { name: name.to_owned(), attempt: 1 };
        assert_eq!(steps, [Step::Replace(format!("{name}-0").into()), started], "{policy}");
        let mut running = world.running();
        running.sort_unstable();
        assert_eq!(running, ["a", "b", "i"], "{policy}");
    }
}

#[test]
fn one_that_has_ended_before_stays_ended() {
    let mut world = world("Never", &[], &["a", "b"]);
    world.settle();
    world.end("a", 0);
    world.set_image("a", "another");
    assert_eq!(world.settle(), []);
}

#[test]
fn an_init_container_that_ends_by_itself_is_left_alone() {
    let mut world = world("Always", &["i"], &["a"]);
    world.settle();
    world.set_image("i", "another");
    assert_eq!(world.settle(), []);
}

#[test]
fn what_was_made_of_the_old_image_is_not_started() {
    let mut world = world("Always", &[], &["a"]);
    world.volumes = true;
    world.observed.put_sandbox(sandbox(0, SandboxState::Ready));
    world.observed.put_container(container("a", 0, 0, ContainerState::Created, 0));
    assert_eq!(world.next(), Step::Start { name: "a".into(), attempt: 0 });
    world.set_image("a", "another");
    assert_eq!(world.next(), Step::Start { name: "a".into(), attempt: 1 });
}

#[test]
fn what_was_made_to_take_anothers_place_waits_for_its_end() {
    for name in ["i", "a"] {
        let mut world = world("Always", &["i"], &["a", "b"]).with_sidecar("i");
        world.settle();
        let before = world.observed.latest(name).unwrap().clone();
        world.observed.put_container(container(name, 1, 0, ContainerState::Created, 0));
        assert_eq!(world.settle(), [], "two attempts of {name} would run at once");
        world.observed.put_container(ContainerStatus { state: ContainerState::Exited, exit_code: 137, ..before });
        assert_eq!(world.settle(), [Step::Start { name: name.to_owned(), attempt: 1 }]);
    }
}
