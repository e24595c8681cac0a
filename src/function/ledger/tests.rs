//! The ledger in the situations of the design, and its rules on random sequences.

use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const NOTHING: Size = Size { cpu_millis: 0, memory_bytes: 0 };

fn size(cpu_millis: u64, memory_bytes: u64) -> Size {
    Size { cpu_millis, memory_bytes }
}

fn recall(pool: &str, replica: u64) -> Recall {
    Recall { pool: pool.to_owned(), replica: ReplicaId(replica) }
}

#[test]
fn a_request_pays_for_the_first_replicas_and_the_rest_is_borrowed() {
    let mut ledger = Ledger::new(size(4000, 400));
    assert_eq!(ledger.bind("f", size(1000, 100)), []);
    ledger.lend("f", ReplicaId(0), size(1000, 100)).unwrap();
    assert_eq!((ledger.borrowed("f"), ledger.used()), (NOTHING, size(1000, 100)));
    assert!(!ledger.lends(), "what was requested is not borrowed");
    for id in 1..4 {
        ledger.lend("f", ReplicaId(id), size(1000, 100)).unwrap();
    }
    assert!(ledger.lends());
    assert_eq!((ledger.borrowed("f"), ledger.free()), (size(3000, 300), NOTHING));
    let denied = ledger.lend("f", ReplicaId(4), size(1000, 100)).unwrap_err();
    assert_eq!(denied, Denied { wanted: size(1000, 100), missing: size(1000, 100) });
    let text = "the node cannot lend 1000m CPU and 100 bytes of memory, it lacks 1000m and 100 bytes";
    assert_eq!(denied.to_string(), text);
    assert!(ledger.give_back("f", ReplicaId(2)));
    ledger.lend("f", ReplicaId(4), size(1000, 100)).unwrap();
}

#[test]
fn a_pod_that_is_bound_gets_idle_replicas_back_first_the_longest_idle_before_all() {
    let start = Instant::now();
    let mut ledger = Ledger::new(size(4000, 4000));
    for (pool, id, idle) in [("f", 0, None), ("f", 1, Some(20)), ("g", 0, Some(10)), ("g", 1, None)] {
        ledger.lend(pool, ReplicaId(id), size(1000, 10)).unwrap();
        ledger.set_idle(pool, ReplicaId(id), idle.map(|seconds| start + Duration::from_secs(seconds)));
    }
    assert_eq!(ledger.bind("p", size(1000, 10)), [recall("g", 0)]);
    assert_eq!(ledger.bind("q", size(2000, 10)), [recall("f", 1), recall("g", 1)], "g/0 is on its way");
    assert_eq!(ledger.shortage(), size(3000, 0));
    assert!(ledger.lend("f", ReplicaId(9), size(1, 1)).is_err(), "nothing is lent that a Pod waits for");
    assert!(!ledger.give_back("g", ReplicaId(0)));
    assert!(!ledger.give_back("f", ReplicaId(1)));
    assert!(ledger.give_back("g", ReplicaId(1)));
    assert_eq!(ledger.shortage(), NOTHING);
}

#[test]
fn what_its_own_pod_requested_is_a_pools_right_even_when_the_node_is_short() {
    let mut ledger = Ledger::new(size(2000, 100));
    ledger.bind("f", size(1000, 10));
    ledger.lend("g", ReplicaId(0), size(1000, 10)).unwrap();
    assert_eq!(ledger.bind("p", size(500, 10)), [recall("g", 0)]);
    ledger.lend("f", ReplicaId(0), size(1000, 10)).unwrap();
    assert!(ledger.lend("f", ReplicaId(1), size(1000, 10)).is_err());
}

#[test]
fn a_replica_that_would_not_help_is_not_recalled() {
    let mut ledger = Ledger::new(size(1000, 1000));
    ledger.bind("f", size(500, 500));
    ledger.lend("f", ReplicaId(0), size(500, 500)).unwrap();
    ledger.lend("g", ReplicaId(0), size(0, 500)).unwrap();
    assert_eq!(ledger.bind("p", size(600, 0)), [], "f borrows nothing, and g no CPU");
    assert_eq!(ledger.bind("p", size(500, 500)), [recall("g", 0)]);
}

#[test]
fn a_pool_that_leaves_takes_its_loans_with_it() {
    let mut ledger = Ledger::new(size(1000, 1000));
    ledger.bind("f", size(100, 100));
    ledger.lend("f", ReplicaId(0), size(900, 900)).unwrap();
    ledger.leave("f");
    assert_eq!(ledger.used(), NOTHING);
    assert!(!ledger.give_back("f", ReplicaId(0)));
}

/// What happens to a ledger.
#[derive(Clone, Debug)]
enum Move {
    Bind(u8, Size),
    Leave(u8),
    Lend(u8, Size),
    Adopt(u8, Size),
    GiveBack(Index),
    Idle(Index, Option<u64>),
    Allocatable(Size),
}

fn some_size(most: u64) -> impl Strategy<Value = Size> {
    (0..most, 0..most).prop_map(|(cpu, memory)| size(cpu, memory))
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        3 => (0_u8..4, some_size(300)).prop_map(|(pod, size)| Move::Bind(pod, size)),
        1 => (0_u8..4).prop_map(Move::Leave),
        8 => (0_u8..3, some_size(200)).prop_map(|(pool, size)| Move::Lend(pool, size)),
        1 => (0_u8..3, some_size(200)).prop_map(|(pool, size)| Move::Adopt(pool, size)),
        4 => any::<Index>().prop_map(Move::GiveBack),
        4 => (any::<Index>(), prop::option::of(0_u64..100)).prop_map(|(at, idle)| Move::Idle(at, idle)),
        1 => some_size(1500).prop_map(Move::Allocatable),
    ];
    prop::collection::vec(one, 0..80)
}

/// Accounts kept the plain way.
struct Model {
    start: Instant,
    ledger: Ledger,
    allocatable: Size,
    pods: BTreeMap<String, Size>,
    loans: BTreeMap<(String, ReplicaId), (Size, Option<Instant>)>,
    recalled: Vec<(String, ReplicaId)>,
    next: u64,
}

impl Model {
    fn used(&self, without: &[(String, ReplicaId)]) -> Size {
        let mut used = self.pods.values().copied().fold(NOTHING, sum);
        for pool in ["0", "1", "2"] {
            let loans = self.loans.iter().filter(|(key, _)| key.0 == pool && !without.contains(key));
            let uses = loans.map(|(_, (size, _))| *size).fold(NOTHING, sum);
            used = sum(used, excess(uses, self.pods.get(pool).copied().unwrap_or_default()));
        }
        used
    }

    fn check_recalls(&mut self, recalls: Vec<Recall>) {
        for Recall { pool, replica } in recalls {
            let key = (pool, replica);
            assert!(self.loans.contains_key(&key) && !self.recalled.contains(&key), "only what is lent, once");
            let before = excess(self.used(&self.recalled), self.allocatable);
            assert_ne!(before, NOTHING, "no more than is lacking");
            let mut with = self.recalled.clone();
            with.push(key.clone());
            let helps = |with: &[(String, ReplicaId)]| {
                let after = self.used(with);
                let now = self.used(&self.recalled);
                (before.cpu_millis > 0 && after.cpu_millis < now.cpu_millis)
                    || (before.memory_bytes > 0 && after.memory_bytes < now.memory_bytes)
            };
            assert!(helps(&with), "{key:?} does not help");
            let idle = self.loans[&key].1;
            for (other, (_, since)) in self.loans.iter().filter(|(other, _)| !with.contains(other)) {
                let mut instead = self.recalled.clone();
                instead.push(other.clone());
                let longer = since.is_some() && (idle.is_none() || *since < idle);
                assert!(!(longer && helps(&instead)), "{other:?} was idle longer");
            }
            self.recalled = with;
        }
        let left = excess(self.used(&self.recalled), self.allocatable);
        let all: Vec<_> = self.loans.keys().cloned().collect();
        let least = excess(self.used(&all), self.allocatable);
        assert_eq!(left, if left == NOTHING { left } else { least }, "as much as is lacking, or all there is");
    }

    fn play(&mut self, next: Move) {
        let keys: Vec<_> = self.loans.keys().cloned().collect();
        let some = |at: Index| (!keys.is_empty()).then(|| at.get(&keys).clone());
        match next {
            Move::Bind(pod, requests) => {
                self.pods.insert(pod.to_string(), requests);
                let recalls = self.ledger.bind(&pod.to_string(), requests);
                self.check_recalls(recalls);
            }
            Move::Leave(pod) => {
                let pod = pod.to_string();
                self.ledger.leave(&pod);
                self.pods.remove(&pod);
                self.loans.retain(|key, _| key.0 != pod);
                self.recalled.retain(|key| key.0 != pod);
            }
            Move::Lend(pool, size) => {
                self.next += 1;
                let key = (pool.to_string(), ReplicaId(self.next));
                let before = self.used(&[]);
                let lent = self.ledger.lend(&key.0, key.1, size);
                self.loans.insert(key.clone(), (size, None));
                let after = self.used(&[]);
                let fits = excess(after, self.allocatable) == NOTHING || after == before;
                assert_eq!(lent.is_ok(), fits, "lent what is free, and never more than is allocatable");
                if !fits {
                    self.loans.remove(&key);
                }
            }
            Move::Adopt(pool, size) => {
                self.next += 1;
                let key = (pool.to_string(), ReplicaId(self.next));
                self.loans.insert(key.clone(), (size, None));
                let recalls = self.ledger.adopt(&key.0, key.1, size);
                self.check_recalls(recalls);
            }
            Move::GiveBack(at) => {
                let Some(key) = some(at) else { return };
                self.loans.remove(&key);
                self.recalled.retain(|other| *other != key);
                let room = self.ledger.give_back(&key.0, key.1);
                assert_eq!(room, excess(self.used(&[]), self.allocatable) == NOTHING);
            }
            Move::Idle(at, idle) => {
                let Some(key) = some(at) else { return };
                let since = idle.map(|seconds| self.start + Duration::from_secs(seconds));
                self.ledger.set_idle(&key.0, key.1, since);
                self.loans.get_mut(&key).unwrap().1 = since;
            }
            Move::Allocatable(size) => {
                self.allocatable = size;
                let recalls = self.ledger.set_allocatable(size);
                self.check_recalls(recalls);
            }
        }
        assert_eq!(self.ledger.used(), self.used(&[]));
        assert_eq!(self.ledger.shortage(), excess(self.used(&[]), self.allocatable));
        assert_eq!(self.ledger.free(), excess(self.allocatable, self.used(&[])));
        let requested = self.pods.values().copied().fold(NOTHING, sum);
        assert_eq!(self.ledger.lends(), self.used(&[]) != requested, "what is used and not requested is borrowed");
    }
}

proptest! {
    #[test]
    fn the_node_is_never_lent_beyond_its_allocatable(allocatable in some_size(1500), moves in moves()) {
        let mut model = Model {
            start: Instant::now(),
            ledger: Ledger::new(allocatable),
            allocatable,
            pods: BTreeMap::new(),
            loans: BTreeMap::new(),
            recalled: Vec::new(),
            next: 0,
        };
        moves.into_iter().for_each(|next| model.play(next));
    }
}

#[test]
fn what_was_recalled_is_known_until_it_is_gone() {
    let mut ledger = Ledger::new(size(1000, 100));
    assert_eq!(ledger.bind("p", size(600, 0)), []);
    // As after a restart: the replicas use what they use.
    assert_eq!(ledger.adopt("f", ReplicaId(3), size(400, 0)), []);
    assert_eq!(ledger.adopt("f", ReplicaId(4), size(400, 0)), [recall("f", 4)]);
    assert_eq!((ledger.recalled("f"), ledger.recalled("p")), (vec![ReplicaId(4)], vec![]));
    ledger.give_back("f", ReplicaId(4));
    assert_eq!(ledger.recalled("f"), []);
}
