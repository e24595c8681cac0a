//! Restart rules of single containers.

use super::*;

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
