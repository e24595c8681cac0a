//! Whether the node takes a Pod that was bound to it: the checks a kubelet makes, since the scheduler's view may be old
//! and a Pod may name its node itself.

mod claims;
mod ports;
pub mod preempt;
mod pressure;
mod room;
mod sysctls;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec};
use tokio::sync::{Notify, watch};

use self::claims::Arrivals;
pub use self::claims::Claim;
pub use self::sysctls::dotted;
use super::eviction::is_critical;
use super::qos::{ResourceList, pod_requests};
use super::status::Trouble;
use crate::config::sysctls::SysctlPattern;
use crate::network::ports::HostPort;
use crate::node::object::Pressure;
use crate::quantity::Quantity;

/// What of the node admission looks at.
#[derive(Clone, Debug, Default)]
pub struct NodeView {
    /// The Node object's labels.
    pub labels: BTreeMap<String, String>,
    /// The node's name, for `matchFields`.
    pub name: String,
    /// What Pods may use in sum.
    pub allocatable: ResourceList,
}

/// What the Pods that were let in have asked for.
#[derive(Debug, Default)]
pub struct Admission {
    taken: Mutex<BTreeMap<String, ResourceList>>,
    left: Notify,
    /// The ports of the host that they have. Locked after `taken`.
    ports: Mutex<BTreeMap<String, Vec<HostPort>>>,
    /// What Pods that are in ask for beyond that. Locked after `taken`.
    claims: Mutex<BTreeMap<String, Claim>>,
    /// Who was here before this process, as far as that is known.
    arrivals: Mutex<Arrivals>,
    /// What the node is short of.
    pressure: Mutex<Pressure>,
    /// Counts the times there was more room.
    freed: watch::Sender<u64>,
    /// Kernel parameters that may be set although they are not safe.
    unsafe_sysctls: Vec<SysctlPattern>,
    /// The node goes down: nobody is let in.
    shutting_down: AtomicBool,
}

impl Admission {
    /// One that lets these kernel parameters be set too.
    pub fn allowing(unsafe_sysctls: Vec<SysctlPattern>) -> Self {
        Self { unsafe_sysctls, ..Self::default() }
    }

    /// From now on nobody is let in, since the node goes down; or it does not after all.
    pub fn set_shutting_down(&self, shutting_down: bool) {
        self.shutting_down.store(shutting_down, Ordering::SeqCst);
    }

    /// Lets the Pod in and counts it, or says why not. Asking again for a Pod that is in is Ok.
    ///
    /// # Errors
    /// Reason and message of the Failed status, as a kubelet gives them.
    pub fn admit(&self, pod: &Pod, node: &NodeView) -> Result<(), Trouble> {
        let (Some(uid), Some(spec)) = (&pod.metadata.uid, &pod.spec) else { return Ok(()) };
        if self.taken.lock().unwrap_or_else(PoisonError::into_inner).contains_key(uid) {
            return Ok(());
        }
        if self.shutting_down.load(Ordering::SeqCst) {
            return Err(Trouble::new("NodeShutdown", "Pod was rejected as the node is shutting down."));
        }
        self.check_pressure(pod, spec)?;
        sysctls::check(spec, &self.unsafe_sysctls)?;
        check_os(spec)?;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = requests(spec);
        let room = room::check(&requests, &taken, &node.allocatable);
        let fits = check_selectors(spec, node).and_then(|()| self.check_ports(spec));
        // For a critical Pod room can be made, so of two reasons the other one is told.
        if is_critical(pod) { fits.and(room) } else { room.and(fits) }?;
        taken.insert(uid.clone(), requests);
        self.take_ports(uid, spec);
        Ok(())
    }

    /// Counts a Pod that runs already (after a restart of the node agent), room or not.
    pub fn adopt(&self, uid: &str, spec: &PodSpec) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), requests(spec));
        self.take_ports(uid, spec);
    }

    /// Returns once nobody is in.
    pub async fn emptied(&self) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if self.taken.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                return;
            }
            left.await;
        }
    }

    /// The Pod object is gone: the scheduler counts its share as free already, so it is free for the next Pod. The
    /// Pod stays in until its processes have ended too.
    pub fn vacate(&self, uid: &str) {
        if let Some(requests) = self.taken.lock().unwrap_or_else(PoisonError::into_inner).get_mut(uid) {
            requests.clear();
        }
        self.free_ports(uid);
        self.withdraw(uid);
        self.tell_freed();
    }

    /// The Pod has ended: its share is free.
    pub fn leave(&self, uid: &str) {
        if self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(uid).is_some() {
            self.left.notify_waiters();
            self.free_ports(uid);
            self.withdraw(uid);
            self.tell_freed();
        }
    }
}

fn requests(spec: &PodSpec) -> ResourceList {
    let mut requests = pod_requests(spec);
    requests.insert("pods".to_owned(), Quantity::from_units(1));
    requests
}

fn check_os(spec: &PodSpec) -> Result<(), Trouble> {
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS";
        return Err(Trouble::new("PodOSNotSupported", message));
    }
    let selector = spec.node_selector.as_ref().and_then(|s| s.get("kubernetes.io/os"));
    if selector.is_some_and(|os| os != "linux") {
        let message = "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Err(Trouble::new("PodOSSelectorNodeLabelDoesNotMatch", message));
    }
    Ok(())
}

fn check_selectors(spec: &PodSpec, node: &NodeView) -> Result<(), Trouble> {
    let by_label = spec.node_selector.iter().flatten().all(|(key, value)| node.labels.get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    let by_affinity = required.is_none_or(|r| r.node_selector_terms.iter().any(|term| matches_term(term, node)));
    if by_label && by_affinity {
        return Ok(());
    }
    Err(predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"))
}

/// A refusal by a rule that the scheduler has too.
fn predicate(name: &str, why: &str) -> Trouble {
    Trouble::new(name, format!("Predicate {name} failed: {why}"))
}

/// An empty term matches nothing (Kubernetes API, NodeSelectorTerm).
fn matches_term(term: &NodeSelectorTerm, node: &NodeView) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|r| matches(r, node.labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| matches(r, Some(node.name.as_str()).filter(|_| r.key == "metadata.name")))
}

fn matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|v| values.iter().any(|w| w == v));
    let numbers = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(have, want)| have > want),
        "Lt" => numbers().is_some_and(|(have, want)| have < want),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Container, ResourceRequirements};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

    use super::*;

    fn pod(uid: &str, cpu: &str) -> Pod {
        let requests = BTreeMap::from([("cpu".to_owned(), ApiQuantity(cpu.to_owned()))]);
        let resources = ResourceRequirements { requests: Some(requests), ..ResourceRequirements::default() };
        let container = Container { name: "c".into(), resources: Some(resources), ..Container::default() };
        let mut pod =
            Pod { spec: Some(PodSpec { containers: vec![container], ..PodSpec::default() }), ..Pod::default() };
        pod.metadata.uid = Some(uid.to_owned());
        pod
    }

    fn node() -> NodeView {
        NodeView {
            labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned()), ("cores".to_owned(), "8".to_owned())]),
            name: "n".into(),
            allocatable: BTreeMap::from([
                ("cpu".to_owned(), Quantity::from_units(2)),
                ("pods".to_owned(), Quantity::from_units(3)),
            ]),
        }
    }

    #[test]
    fn a_pod_that_does_not_fit_is_refused_until_another_leaves() {
        let admission = Admission::default();
        admission.admit(&pod("a", "1500m"), &node()).unwrap();
        let refused = admission.admit(&pod("b", "1"), &node()).unwrap_err();
        assert_eq!(refused.reason, "OutOfcpu");
        assert!(refused.message.ends_with("cpu, requested: 1000, used: 1500, capacity: 2000"), "{}", refused.message);
        admission.leave("a");
        admission.admit(&pod("b", "1"), &node()).unwrap();
    }

    #[tokio::test]
    async fn a_pod_that_was_deleted_by_force_makes_room_at_once_and_stays_in() {
        let admission = Admission::default();
        admission.admit(&pod("a", "1500m"), &node()).unwrap();
        admission.vacate("a");
        admission.admit(&pod("b", "2"), &node()).unwrap();
        admission.leave("b");
        let soon = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, admission.emptied()).await.is_err(), "its processes still run");
        admission.leave("a");
        admission.emptied().await;
    }

    #[test]
    fn a_node_that_goes_down_lets_nobody_in_until_it_does_not() {
        let admission = Admission::default();
        admission.admit(&pod("a", "0"), &node()).unwrap();
        admission.set_shutting_down(true);
        let refused = admission.admit(&pod("b", "0"), &node()).unwrap_err();
        let text = "Pod was rejected as the node is shutting down.";
        assert_eq!((refused.reason.as_str(), refused.message.as_str()), ("NodeShutdown", text));
        admission.admit(&pod("a", "0"), &node()).expect("a Pod that is in stays in");
        admission.set_shutting_down(false);
        admission.admit(&pod("b", "0"), &node()).unwrap();
    }

    #[test]
    fn of_two_reasons_a_critical_pod_is_told_the_one_that_stays() {
        let admission = Admission::default();
        let mut both = pod("a", "3");
        both.spec.as_mut().unwrap().node_selector = Some(BTreeMap::from([("disk".to_owned(), "hdd".to_owned())]));
        assert_eq!(admission.admit(&both, &node()).unwrap_err().reason, "OutOfcpu");
        both.spec.as_mut().unwrap().priority = Some(2_000_000_000);
        assert_eq!(admission.admit(&both, &node()).unwrap_err().reason, "NodeAffinity");
    }

    #[test]
    fn the_number_of_pods_is_bounded() {
        let admission = Admission::default();
        for uid in ["a", "b", "c"] {
            admission.admit(&pod(uid, "0"), &node()).unwrap();
        }
        assert_eq!(admission.admit(&pod("d", "0"), &node()).unwrap_err().reason, "OutOfpods");
        admission.admit(&pod("a", "0"), &node()).expect("a Pod that is in stays in");
    }

    #[test]
    fn selector_and_affinity_are_checked_against_the_nodes_labels() {
        let requirement = |key: &str, operator: &str, values: &[&str]| NodeSelectorRequirement {
            key: key.into(),
            operator: operator.into(),
            values: Some(values.iter().map(|v| (*v).to_owned()).collect()),
        };
        let term = |r| NodeSelectorTerm { match_expressions: Some(vec![r]), ..NodeSelectorTerm::default() };
        for (r, expected) in [
            (requirement("disk", "In", &["ssd", "nvme"]), true),
            (requirement("disk", "NotIn", &["ssd"]), false),
            (requirement("tape", "NotIn", &["x"]), true),
            (requirement("tape", "Exists", &[]), false),
            (requirement("tape", "DoesNotExist", &[]), true),
            (requirement("cores", "Gt", &["4"]), true),
            (requirement("cores", "Lt", &["4"]), false),
            (requirement("disk", "Gt", &["4"]), false),
        ] {
            let text = format!("{r:?}");
            assert_eq!(matches_term(&term(r), &node()), expected, "{text}");
        }
        assert!(!matches_term(&NodeSelectorTerm::default(), &node()), "an empty term matches nothing");
        let mut wrong = pod("a", "0");
        wrong.spec.as_mut().unwrap().node_selector = Some(BTreeMap::from([("disk".to_owned(), "hdd".to_owned())]));
        assert_eq!(Admission::default().admit(&wrong, &node()).unwrap_err().reason, "NodeAffinity");
    }
}
