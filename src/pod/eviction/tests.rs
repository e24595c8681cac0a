//! Who goes, when, and what it is told.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const MI: u64 = 1 << 20;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn units(number: i64) -> Threshold {
    Threshold::Absolute(Quantity::from_units(number))
}

fn limit(signal: Signal, below: i64, grace: u64, reclaim: Option<i64>) -> Limit {
    Limit { signal, threshold: units(below), grace: Duration::from_secs(grace), reclaim: reclaim.map(units) }
}

fn seen(signal: Signal, available: u64) -> BTreeMap<Signal, Observation> {
    BTreeMap::from([(signal, Observation { available, capacity: 1000 })])
}

fn spec(value: Value) -> PodSpec {
    serde_json::from_value(value).unwrap()
}

fn asking(memory: &str, priority: i32) -> PodSpec {
    let resources = json!({ "requests": { "memory": memory } });
    spec(json!({ "priority": priority, "containers": [{ "name": "c", "resources": resources }] }))
}

fn using(memory: u64) -> Use {
    Use { memory: Some(memory * MI), ..Use::default() }
}

#[test]
fn a_hard_limit_acts_at_once_and_until_enough_was_reclaimed() {
    let mut judge = Judge::new(vec![limit(Signal::Memory, 100, 0, Some(50))]);
    assert_eq!(judge.judge(&seen(Signal::Memory, 100), at(0)), None, "not below");
    let short = judge.judge(&seen(Signal::Memory, 99), at(10)).unwrap();
    assert_eq!((short.hard, short.threshold, short.available), (true, 100, 99));
    assert!(judge.judge(&seen(Signal::Memory, 149), at(20)).is_some());
    assert_eq!(judge.judge(&seen(Signal::Memory, 150), at(30)), None);
    assert_eq!(judge.judge(&seen(Signal::Memory, 149), at(40)), None, "it was relieved");
}

#[test]
fn a_soft_limit_has_to_last() {
    let mut judge = Judge::new(vec![limit(Signal::Disk, 100, 60, None)]);
    assert_eq!(judge.judge(&seen(Signal::Disk, 50), at(0)), None);
    assert_eq!(judge.crossed(), [Signal::Disk], "and is told before");
    assert_eq!(judge.judge(&seen(Signal::Disk, 150), at(30)), None);
    assert_eq!(judge.judge(&seen(Signal::Disk, 50), at(60)), None, "it began anew");
    assert!(!judge.judge(&seen(Signal::Disk, 50), at(120)).unwrap().hard);
}

#[test]
fn memory_is_relieved_before_all_and_no_inodes_are_no_shortage() {
    let limits = [Signal::Pids, Signal::Inodes, Signal::Disk, Signal::Memory].map(|signal| limit(signal, 10, 0, None));
    let mut judge = Judge::new(limits.into());
    let mut all = seen(Signal::Disk, 5);
    all.insert(Signal::Inodes, Observation { available: 0, capacity: 0 });
    assert_eq!(judge.judge(&all, at(0)).unwrap().signal, Signal::Disk);
    all.extend(seen(Signal::Memory, 5));
    assert_eq!(judge.judge(&all, at(1)).unwrap().signal, Signal::Memory);
}

#[test]
fn who_exceeds_its_request_goes_before_who_matters_less_and_who_uses_more() {
    let pods = [
        (asking("500Mi", 0), using(400)),
        (asking("10Mi", 10), using(900)),
        (asking("100Mi", 0), using(150)),
        (asking("0", 0), using(60)),
    ];
    assert_eq!(rank(&pods, Signal::Memory), [3, 2, 1, 0]);
    let unknown = [(asking("1", -5), using(1)), (asking("1", 100), Use::default())];
    assert_eq!(rank(&unknown, Signal::Memory), [1, 0], "of which nothing is known");
    let pids = |count| Use { pids: Some(count), ..Use::default() };
    let forks = [(asking("0", 5), pids(1000)), (asking("0", 0), pids(5)), (asking("0", 0), pids(50))];
    assert_eq!(rank(&forks, Signal::Pids), [2, 1, 0]);
}

#[test]
fn the_message_says_what_was_short_and_who_used_too_much() {
    let pod = spec(json!({ "containers": [
        { "name": "greedy", "resources": { "requests": { "memory": "10Mi" } } },
        { "name": "modest", "resources": { "requests": { "memory": "10Mi" } } }] }));
    let used = |name: &str, memory| ContainerUse { name: name.into(), memory: Some(memory), disk: None };
    let short = Shortage { signal: Signal::Memory, hard: true, threshold: 100 * MI, available: 1000 };
    assert_eq!(
        message(&short, &pod, &[used("greedy", 20 * MI), used("modest", 10 * MI)]),
        "The node was low on resource: memory. Threshold quantity: 102400Ki, available: 1000. Container greedy was \
         using 20480Ki, request is 10Mi, has larger consumption of memory. "
    );
}

#[test]
fn a_pod_that_outgrew_its_own_limits_is_told_which() {
    let storage = |limit: &str| json!({ "limits": { "ephemeral-storage": limit } });
    let pod = spec(json!({
        "containers": [{ "name": "a", "resources": storage("10Mi") }, { "name": "b", "resources": storage("30Mi") }],
        "volumes": [{ "name": "v", "emptyDir": { "sizeLimit": "5Mi" } }, { "name": "w", "emptyDir": {} }],
    }));
    let used = |name: &str, disk: u64| ContainerUse { name: name.into(), memory: None, disk: Some(disk * MI) };
    let volume = |name: &str, bytes: u64| BTreeMap::from([(name.to_owned(), bytes)]);
    let told = |all: u64, containers: &[ContainerUse], volumes: &BTreeMap<String, u64>| {
        outgrown(&pod, Some(all * MI), containers, volumes)
    };
    assert_eq!(told(40, &[used("a", 10), used("b", 30)], &volume("v", 5 * MI)), None, "as much as it may");
    let text = told(1, &[], &volume("v", 5 * MI + 1)).unwrap();
    assert_eq!(text, "Usage of EmptyDir volume \"v\" exceeds the limit \"5Mi\". ");
    assert_eq!(told(1, &[], &volume("w", 500 * MI)), None);
    let text = told(41, &[], &BTreeMap::new()).unwrap();
    assert_eq!(text, "Pod ephemeral local storage usage exceeds the total limit of containers 40Mi. ");
    let text = told(11, &[used("a", 11)], &BTreeMap::new()).unwrap();
    assert_eq!(text, "Container a exceeded its local ephemeral storage limit \"10Mi\". ");
    assert!(limits_disk(&pod) && !limits_disk(&asking("1", 0)));
}

#[test]
fn an_order_is_taken_once() {
    let orders = Orders::default();
    let mut given = orders.given();
    let order = Order { trouble: Trouble::new(REASON, "m"), grace: IMMEDIATELY, end: End::ForRoom, disruption: None };
    assert!(!orders.has("u"));
    orders.give("u", order.clone());
    assert!(orders.has("u"));
    assert!(given.has_changed().unwrap());
    given.mark_unchanged();
    assert_eq!((orders.open(), orders.take("u"), orders.take("u")), (vec!["u".to_owned()], Some(order), None));
}

proptest! {
    #[test]
    fn the_order_is_total_and_nobody_within_its_request_goes_before_one_beyond(
        pods in prop::collection::vec((0u64..100, prop::option::of(0u64..200), -3i32..3), 1..12),
    ) {
        let all: Vec<_> = pods
            .iter()
            .map(|(request, used, priority)| (asking(&format!("{request}Mi"), *priority), used.map_or(Use::default(), using)))
            .collect();
        let order = rank(&all, Signal::Memory);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..pods.len()).collect::<Vec<_>>());
        for pair in order.windows(2) {
            let [(request, used, priority), (next_request, next_used, next_priority)] = [pods[pair[0]], pods[pair[1]]];
            let (Some(used), Some(next_used)) = (used, next_used) else {
                prop_assert!(used.is_none() || next_used.is_some(), "the unknown go first");
                continue;
            };
            let (beyond, next_beyond) = (used > request, next_used > next_request);
            prop_assert!(beyond >= next_beyond);
            prop_assert!(beyond != next_beyond || priority <= next_priority);
        }
    }

    #[test]
    fn what_is_plenty_is_never_short(available in 0u64..2000, below in 0i64..1000, reclaim in prop::option::of(0i64..500)) {
        let mut judge = Judge::new(vec![limit(Signal::Memory, below, 0, reclaim)]);
        let short = judge.judge(&seen(Signal::Memory, available), at(0)).is_some();
        prop_assert_eq!(short, available < below as u64);
        let enough = below as u64 + reclaim.unwrap_or(0) as u64;
        prop_assert_eq!(judge.judge(&seen(Signal::Memory, enough), at(1)), None);
    }
}
