//! A critical Pod is let in although there is no room: Pods that matter less have to go.
//!
//! Who goes is decided as by a kubelet: no Guaranteed Pod if Burstable ones are enough, and no Burstable one if
//! BestEffort ones are; among those of a class the one that leaves least of the need unmet, and of two such the one that
//! requests less, first of memory, then of cpu.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::room::{self, number};
use super::{Admission, NodeView, requests};
use crate::pod::eviction::is_critical;
use crate::pod::qos::{ResourceList, qos_class};
use crate::pod::status::Trouble;

/// Reason of the event and of the status of a Pod that had to go.
pub const REASON: &str = "Preempting";
/// The message beside it.
pub const MESSAGE: &str = "Preempted in order to admit critical pod";
/// What its condition says.
pub const DISRUPTED: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";

/// Reason of a refusal where nobody can be made to go.
const IN_VAIN: &str = "UnexpectedAdmissionError";

/// What is still missing, by resource; see [`number`].
type Need = Vec<(String, i64)>;

/// A Pod that may have to go.
struct Candidate<'a> {
    pod: &'a Arc<Pod>,
    requests: &'a ResourceList,
}

impl Admission {
    /// Lets a critical Pod in that there was no room for, and says which of `others` have to go for it. What they had
    /// asked for counts as free from now on; until they have ended nothing is to be begun.
    ///
    /// # Errors
    /// Nobody's going would make enough room; nothing has changed then.
    pub fn preempt(&self, pod: &Pod, node: &NodeView, others: &[Arc<Pod>]) -> Result<Vec<Arc<Pod>>, Trouble> {
        let (Some(uid), Some(spec)) = (&pod.metadata.uid, &pod.spec) else { return Ok(Vec::new()) };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = requests(spec);
        let lacks = room::lacks(&wanted, &taken, &node.allocatable);
        let need = lacks.iter().map(|lack| (lack.resource.clone(), lack.amount())).collect();
        let chosen = victims(pod, &candidates(others, &taken), need).map_err(|left| {
            let message = format!(
                "Unexpected error while attempting to recover from admission failure: preemption: error finding a set \
                 of pods to preempt: no set of running pods found to reclaim resources: {}",
                told(&left)
            );
            Trouble::new(IN_VAIN, message)
        })?;
        for victim in &chosen {
            let uid = victim.metadata.uid.as_deref().unwrap_or_default();
            if let Some(requests) = taken.get_mut(uid) {
                requests.clear();
            }
            self.withdraw(uid);
            self.free_ports(uid);
        }
        taken.insert(uid.clone(), wanted);
        self.take_ports(uid, spec);
        Ok(chosen)
    }

    /// Returns once none of these is in.
    pub async fn left(&self, uids: &[String]) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            let is_in = |uid| self.taken.lock().unwrap_or_else(PoisonError::into_inner).contains_key(uid);
            if !uids.iter().any(is_in) {
                return;
            }
            left.await;
        }
    }
}

/// Those whose going would free something.
fn candidates<'a>(others: &'a [Arc<Pod>], taken: &'a BTreeMap<String, ResourceList>) -> Vec<Candidate<'a>> {
    let counted = |pod: &'a Arc<Pod>| {
        let requests = taken.get(pod.metadata.uid.as_deref()?)?;
        (!requests.is_empty()).then_some(Candidate { pod, requests })
    };
    others.iter().filter_map(counted).collect()
}

/// Whether the one may make the other go.
fn outranks(preemptor: &Pod, other: &Pod) -> bool {
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.priority);
    let higher = matches!((priority(preemptor), priority(other)), (Some(one), Some(two)) if one > two);
    is_critical(preemptor) && !is_critical(other) || higher
}

/// Those who have to go.
///
/// # Errors
/// What would be missing if all went that may be made to.
fn victims(preemptor: &Pod, others: &[Candidate<'_>], need: Need) -> Result<Vec<Arc<Pod>>, Need> {
    let empty = PodSpec::default();
    let of_class = |class: &str| -> Vec<&Candidate<'_>> {
        let of = |c: &&Candidate<'_>| qos_class(c.pod.spec.as_ref().unwrap_or(&empty)) == class;
        others.iter().filter(|c| outranks(preemptor, c.pod)).filter(of).collect()
    };
    let (best_effort, burstable, guaranteed) = (of_class("BestEffort"), of_class("Burstable"), of_class("Guaranteed"));
    let all = best_effort.iter().chain(&burstable).chain(&guaranteed);
    let unmet = without(&need, all.copied());
    if !unmet.is_empty() {
        return Err(unmet);
    }
    let third = nearest(&guaranteed, without(&need, best_effort.iter().chain(&burstable).copied()))?;
    let second = nearest(&burstable, without(&need, best_effort.iter().chain(&third).copied()))?;
    let first = nearest(&best_effort, without(&need, second.iter().chain(&third).copied()))?;
    Ok(first.into_iter().chain(second).chain(third).map(|candidate| Arc::clone(candidate.pod)).collect())
}

/// As few of these as meet the need.
fn nearest<'a>(of: &[&'a Candidate<'a>], mut need: Need) -> Result<Vec<&'a Candidate<'a>>, Need> {
    let mut rest = of.to_vec();
    let mut chosen = Vec::new();
    while !need.is_empty() {
        let better = |one: &&Candidate<'_>, other: &&Candidate<'_>| {
            let distances = distance(&need, one).total_cmp(&distance(&need, other));
            distances.then_with(|| size(one.requests).cmp(&size(other.requests)))
        };
        let next = (0..rest.len()).min_by(|one, other| better(&rest[*one], &rest[*other]));
        let Some(next) = next else { return Err(need) };
        let candidate = rest.swap_remove(next);
        need = without(&need, std::iter::once(candidate));
        chosen.push(candidate);
    }
    Ok(chosen)
}

/// What is missing once these have gone.
fn without<'a>(need: &Need, gone: impl Iterator<Item = &'a Candidate<'a>>) -> Need {
    let gone: Vec<_> = gone.collect();
    let left = need.iter().map(|(name, amount)| {
        let freed: i64 = gone.iter().map(|candidate| request(candidate, name)).sum();
        (name.clone(), amount.saturating_sub(freed))
    });
    left.filter(|(_, amount)| *amount > 0).collect()
}

/// How much of the need would stay unmet: the sum of the squares of each resource's share.
#[allow(clippy::cast_precision_loss)]
fn distance(need: &Need, candidate: &Candidate<'_>) -> f64 {
    let unmet = need.iter().map(|(name, amount)| {
        let left = amount.saturating_sub(request(candidate, name)).max(0);
        (left as f64 / *amount as f64).powi(2)
    });
    unmet.sum()
}

fn request(candidate: &Candidate<'_>, name: &str) -> i64 {
    candidate.requests.get(name).map_or(0, |amount| number(name, *amount))
}

fn size(requests: &ResourceList) -> impl Ord + use<> {
    let of = |name: &str| requests.get(name).copied().unwrap_or_default();
    (of("memory"), of("cpu"))
}

fn told(need: &Need) -> String {
    let parts: String = need.iter().map(|(name, amount)| format!("(res: {name}, q: {amount}), ")).collect();
    format!("[{parts}]")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::quantity::Quantity;

    const CRITICAL: i32 = 2_000_000_000;

    /// A Pod with requests of cpu (in thousandths) and memory, `guaranteed` with the same limits.
    fn pod(uid: &str, priority: i32, cpu: u32, memory: u32, guaranteed: bool) -> Arc<Pod> {
        let amounts = match (cpu, memory) {
            (0, 0) => json!({}),
            _ => json!({ "cpu": format!("{cpu}m"), "memory": memory.to_string() }),
        };
        let limits = if guaranteed { amounts.clone() } else { json!({}) };
        let container = json!({ "name": "c", "resources": { "requests": amounts, "limits": limits } });
        let pod = json!({ "metadata": { "uid": uid }, "spec": { "priority": priority, "containers": [container] } });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn node(cpu: i64, memory: i64, pods: i64) -> NodeView {
        let list = [
            ("cpu", Quantity::from_millis(cpu)),
            ("memory", Quantity::from_units(memory)),
            ("pods", Quantity::from_units(pods)),
        ];
        let allocatable = list.into_iter().map(|(name, amount)| (name.to_owned(), amount)).collect();
        NodeView { allocatable, ..NodeView::default() }
    }

    fn with(pods: &[Arc<Pod>]) -> Admission {
        let admission = Admission::default();
        for pod in pods {
            admission.adopt(pod.metadata.uid.as_deref().unwrap(), pod.spec.as_ref().unwrap());
        }
        admission
    }

    fn uids(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect()
    }

    #[test]
    fn the_class_that_matters_least_goes_first_and_no_more_than_needed() {
        let pods = [
            pod("effort", 0, 0, 0, false),
            pod("small", 0, 200, 10, false),
            pod("large", 0, 900, 10, false),
            pod("sure", 0, 900, 10, true),
        ];
        let chosen = |cpu, places| {
            let admission = with(&pods);
            let critical = pod("critical", CRITICAL, cpu, 1, false);
            let chosen = admission.preempt(&critical, &node(2000, 1000, places), &pods).unwrap();
            uids(&chosen).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(chosen(100, 10), ["small"], "either would do, and it asks for less");
        assert_eq!(chosen(500, 10), ["large"], "one instead of two");
        assert_eq!(chosen(1100, 10), ["large", "small"]);
        let mut all = chosen(1900, 10);
        all.sort();
        assert_eq!(all, ["large", "small", "sure"]);
        assert_eq!(chosen(0, 4), ["effort"], "a place is all that is missing");
    }

    #[test]
    fn what_they_had_is_the_critical_pods_at_once_and_nobody_elses() {
        let pods = [pod("a", 0, 1500, 10, false)];
        let admission = with(&pods);
        let critical = pod("critical", CRITICAL, 1800, 10, false);
        assert_eq!(admission.admit(&critical, &node(2000, 1000, 10)).unwrap_err().reason, "OutOfcpu");
        let gone = admission.preempt(&critical, &node(2000, 1000, 10), &pods).unwrap();
        assert_eq!(uids(&gone), ["a"]);
        let late = admission.admit(&pod("late", 0, 300, 10, false), &node(2000, 1000, 10)).unwrap_err();
        assert_eq!(late.message, "Node didn't have enough resource: cpu, requested: 300, used: 1800, capacity: 2000");
    }

    #[test]
    fn who_matters_as_much_stays_and_the_text_says_what_is_missing() {
        let pods = [pod("a", CRITICAL, 1500, 10, false), pod("b", 0, 100, 10, false)];
        let admission = with(&pods);
        let critical = pod("critical", CRITICAL, 1800, 10, false);
        let refused = admission.preempt(&critical, &node(2000, 1000, 10), &pods).unwrap_err();
        assert_eq!(refused.reason, "UnexpectedAdmissionError");
        assert!(refused.message.ends_with("to reclaim resources: [(res: cpu, q: 1300), ]"), "{}", refused.message);
        assert!(admission.taken.lock().unwrap()["b"].contains_key("cpu"), "nobody goes in vain");
    }

    #[tokio::test]
    async fn it_is_known_when_they_have_left() {
        let pods = [pod("a", 0, 1, 1, false), pod("b", 0, 1, 1, false)];
        let admission = with(&pods);
        let gone = ["a".to_owned()];
        let soon = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, admission.left(&gone)).await.is_err());
        admission.leave("a");
        admission.left(&gone).await;
    }

    proptest! {
        #[test]
        fn enough_is_freed_by_those_who_may_be_made_to_go_and_none_of_them_in_vain(
            others in prop::collection::vec((0u32..500, 0u32..500, any::<bool>(), any::<bool>()), 0..8),
            (cpu, memory) in (1u32..1500, 1u32..1500),
        ) {
            let pods: Vec<_> = others.iter().enumerate().map(|(at, (cpu, memory, guaranteed, critical))| {
                pod(&format!("p{at}"), if *critical { CRITICAL } else { 0 }, *cpu, *memory, *guaranteed)
            }).collect();
            let admission = with(&pods);
            let (critical, node) = (pod("critical", CRITICAL, cpu, memory, false), node(1500, 1500, 20));
            if admission.admit(&critical, &node).is_err() {
                let before = admission.taken.lock().unwrap().clone();
                match admission.preempt(&critical, &node, &pods) {
                    Ok(gone) => {
                        prop_assert!(!gone.is_empty() && gone.iter().all(|pod| !is_critical(pod)));
                        let taken = admission.taken.lock().unwrap().clone();
                        let rest = taken.iter().filter(|(uid, _)| *uid != "critical");
                        let rest: BTreeMap<_, _> = rest.map(|(uid, list)| (uid.clone(), list.clone())).collect();
                        let wanted = requests(critical.spec.as_ref().unwrap());
                        prop_assert!(room::lacks(&wanted, &rest, &node.allocatable).is_empty());
                    }
                    Err(_) => prop_assert_eq!(before, admission.taken.lock().unwrap().clone()),
                }
            }
        }
    }
}
