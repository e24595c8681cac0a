//! Pods that run and ask for more: who gets what when there is not enough for all.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{Admission, room};
use crate::pod::qos::ResourceList;
use crate::pod::status::Trouble;
use crate::quantity::Quantity;

/// What a Pod that is in asks for.
#[derive(Clone, Debug)]
pub struct Claim {
    /// `cpu`, `memory` and whatever else it requests, in all.
    pub requests: ResourceList,
    /// Its priority; the higher goes first.
    pub priority: i32,
    /// Whether its class is Guaranteed, which goes before Burstable.
    pub guaranteed: bool,
    /// When it first asked; who waits longer goes first.
    pub since: Timestamp,
}

/// The Pods that were here before this process.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Whether it is known which those are.
    listed: bool,
    /// Those that are still to come.
    expected: BTreeSet<String>,
    /// Those that came before it was known.
    settled: BTreeSet<String>,
    /// Who asked too early.
    unheard: BTreeSet<String>,
}

impl Claim {
    fn rank(&self) -> (Reverse<i32>, bool, Timestamp) {
        (Reverse(self.priority), !self.guaranteed, self.since)
    }
}

impl Admission {
    /// Counts the Pod with what it asks for now, or says why not. A claim that has to wait is remembered: when others
    /// leave, the first in rank that fits has it (a kubelet's order: priority, class, time).
    ///
    /// # Errors
    /// Reason `Infeasible` if the whole node is not enough, else `Deferred`.
    pub fn resize(&self, uid: &str, claim: Claim, allocatable: &ResourceList) -> Result<(), Trouble> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let mut requests = claim.requests.clone();
        requests.insert("pods".to_owned(), Quantity::from_units(1));
        if let Some(amount) = taken.get(uid)
            && !grows(amount, &requests)
        {
            claims.remove(uid);
            taken.insert(uid.to_owned(), requests);
            drop((taken, claims));
            self.tell_freed();
            return Ok(());
        }
        if let Some(trouble) = infeasible(&requests, allocatable) {
            claims.remove(uid);
            return Err(trouble);
        }
        let since = claims.get(uid).map_or(claim.since, |earlier| earlier.since);
        claims.insert(uid.to_owned(), Claim { requests: requests.clone(), since, ..claim });
        fits(uid, &claims, &taken, allocatable)?;
        claims.remove(uid);
        taken.insert(uid.to_owned(), requests);
        Ok(())
    }

    /// The Pod asks for nothing any more.
    pub fn withdraw(&self, uid: &str) {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// The Pods that wait for room, or for all others to be counted.
    pub fn waiting(&self) -> Vec<String> {
        let unheard = std::mem::take(&mut self.arrivals().unheard);
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.keys().cloned().chain(unheard).collect()
    }

    /// These Pods were listed when this process began: until each is in, or is not let in, nobody knows what is left.
    pub fn expect(&self, uids: impl Iterator<Item = String>) {
        let mut arrivals = self.arrivals();
        if !arrivals.listed {
            let settled = std::mem::take(&mut arrivals.settled);
            arrivals.expected = uids.filter(|uid| !settled.contains(uid)).collect();
            arrivals.listed = true;
            drop(arrivals);
            self.tell_freed();
        }
    }

    /// The Pod is in, or is not let in.
    pub fn settle(&self, uid: &str) {
        let mut arrivals = self.arrivals();
        if !arrivals.listed {
            arrivals.settled.insert(uid.to_owned());
        } else if arrivals.expected.remove(uid) && arrivals.expected.is_empty() {
            drop(arrivals);
            self.tell_freed();
        }
    }

    /// Whether every Pod from before this process is counted; if not, this one is told once they are.
    pub fn is_settled(&self, uid: &str) -> bool {
        let mut arrivals = self.arrivals();
        let settled = arrivals.listed && arrivals.expected.is_empty();
        if !settled {
            arrivals.unheard.insert(uid.to_owned());
        }
        settled
    }

    fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        // Sets of ids are never half changed.
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever there may be more room than before.
    pub fn freed(&self) -> watch::Receiver<u64> {
        self.freed.subscribe()
    }

    pub(super) fn tell_freed(&self) {
        self.freed.send_modify(|times| *times += 1);
    }
}

/// Whether any cpu or memory is asked for beyond what is had.
fn grows(had: &ResourceList, wanted: &ResourceList) -> bool {
    let amount = |list: &ResourceList, name: &str| list.get(name).copied().unwrap_or_default();
    ["cpu", "memory"].iter().any(|name| amount(wanted, name) > amount(had, name))
}

fn infeasible(wanted: &ResourceList, allocatable: &ResourceList) -> Option<Trouble> {
    let amount = |list: &ResourceList, name: &str| list.get(name).copied().unwrap_or_default();
    let name = ["cpu", "memory"].into_iter().find(|name| amount(wanted, name) > amount(allocatable, name))?;
    let number = |amount: Quantity| if name == "cpu" { amount.milli_value() } else { amount.value() };
    let (requested, capacity) = (number(amount(wanted, name)), number(amount(allocatable, name)));
    let text = format!("Node didn't have enough capacity: {name}, requested: {requested}, capacity: {capacity}");
    Some(Trouble::new("Infeasible", text))
}

/// Whether the claim fits beside what is taken and what claims before it will have.
fn fits(
    uid: &str,
    claims: &BTreeMap<String, Claim>,
    taken: &BTreeMap<String, ResourceList>,
    allocatable: &ResourceList,
) -> Result<(), Trouble> {
    let mut order: Vec<_> = claims.iter().collect();
    order.sort_by_key(|(_, claim)| claim.rank());
    let mut taken = taken.clone();
    for (other, claim) in order {
        let had = taken.remove(other);
        let room = room::check(&claim.requests, &taken, allocatable);
        if other == uid {
            return room.map_err(|trouble| Trouble::new("Deferred", trouble.message));
        }
        let next = if room.is_ok() { Some(claim.requests.clone()) } else { had };
        taken.extend(next.map(|requests| (other.clone(), requests)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(cpu: i64) -> ResourceList {
        ResourceList::from([("cpu".to_owned(), Quantity::from_units(cpu))])
    }

    fn node(cpu: i64) -> ResourceList {
        let mut node = list(cpu);
        node.insert("pods".to_owned(), Quantity::from_units(10));
        node
    }

    fn claim(cpu: i64, priority: i32) -> Claim {
        Claim { requests: list(cpu), priority, guaranteed: false, since: Timestamp::UNIX_EPOCH }
    }

    fn with(pods: &[(&str, i64)]) -> Admission {
        let admission = Admission::default();
        for (uid, cpu) in pods {
            let mut requests = list(*cpu);
            requests.insert("pods".to_owned(), Quantity::from_units(1));
            admission.taken.lock().unwrap().insert((*uid).to_owned(), requests);
        }
        admission
    }

    #[test]
    fn a_pod_grows_into_what_is_free_and_waits_for_what_is_not() {
        let admission = with(&[("a", 1), ("b", 2)]);
        admission.resize("a", claim(2, 0), &node(4)).unwrap();
        let refused = admission.resize("b", claim(3, 0), &node(4)).unwrap_err();
        let text = "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000";
        assert_eq!((refused.reason.as_str(), refused.message.as_str()), ("Deferred", text));
        assert_eq!(admission.waiting(), ["b"]);
        let mut freed = admission.freed();
        admission.resize("a", claim(1, 0), &node(4)).unwrap();
        assert!(freed.has_changed().unwrap(), "others are told");
        freed.mark_unchanged();
        admission.resize("b", claim(3, 0), &node(4)).unwrap();
        assert!(admission.waiting().is_empty());
        let never = admission.resize("b", claim(5, 0), &node(4)).unwrap_err();
        let text = "Node didn't have enough capacity: cpu, requested: 5000, capacity: 4000";
        assert_eq!((never.reason.as_str(), never.message.as_str()), ("Infeasible", text));
        assert!(admission.waiting().is_empty(), "nothing is waited for that never comes");
    }

    #[test]
    fn the_more_important_pod_is_served_first_and_holds_up_nobody_it_does_not_need_to() {
        let admission = with(&[("low", 1), ("high", 1), ("huge", 1), ("gone", 2)]);
        let ask = |uid, cpu, priority| admission.resize(uid, claim(cpu, priority), &node(5));
        assert!(ask("low", 2, 0).is_err());
        assert!(ask("high", 2, 10).is_err());
        assert!(ask("huge", 5, 20).is_err());
        admission.taken.lock().unwrap().get_mut("gone").unwrap().insert("cpu".into(), Quantity::from_units(1));
        assert!(ask("low", 2, 0).is_err(), "there is room for one, and the other goes first");
        ask("high", 2, 10).unwrap();
        admission.leave("gone");
        ask("low", 2, 0).unwrap();
        assert_eq!(admission.waiting(), ["huge"]);
    }

    #[test]
    fn nobody_is_served_before_all_who_were_here_are_counted() {
        let admission = Admission::default();
        assert!(!admission.is_settled("a"), "not listed");
        admission.settle("a");
        admission.expect(["a", "b"].map(str::to_owned).into_iter());
        assert!(!admission.is_settled("a"), "b is still to come");
        let mut freed = admission.freed();
        admission.settle("b");
        assert!(freed.has_changed().unwrap());
        freed.mark_unchanged();
        assert_eq!(admission.waiting(), ["a"]);
        assert!(admission.is_settled("a") && admission.waiting().is_empty());
        admission.expect(["c".to_owned()].into_iter());
        assert!(admission.is_settled("a"), "a later list tells of nobody from before");
    }

    proptest! {
        #[test]
        fn nobody_is_granted_what_is_not_there(
            asks in prop::collection::vec((0usize..4, 1i64..8, 0i32..3), 1..40),
        ) {
            let names = ["a", "b", "c", "d"];
            let admission = with(&names.map(|name| (name, 1)));
            for (who, cpu, priority) in asks {
                let granted = admission.resize(names[who], claim(cpu, priority), &node(6));
                let taken = admission.taken.lock().unwrap().clone();
                let sum: i64 = taken.values().map(|list| list["cpu"].value()).sum();
                prop_assert!(sum <= 6, "{sum}");
                let waits = admission.waiting().contains(&names[who].to_owned());
                let deferred = granted.as_ref().is_err_and(|trouble| trouble.reason == "Deferred");
                prop_assert_eq!(waits, deferred);
                prop_assert!(granted.is_err() || taken[names[who]]["cpu"].value() == cpu);
            }
        }
    }
}
