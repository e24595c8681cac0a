//! Requests, limits and what follows from them: QoS class, cgroup numbers, OOM score.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use crate::quantity::Quantity;
use crate::runtime::types::Resources;

/// Resource name to amount.
pub type ResourceList = BTreeMap<String, Quantity>;

/// A process of a Guaranteed Pod is killed after everything else (the kubelet's value).
const GUARANTEED_OOM_SCORE: i64 = -997;
/// One of a BestEffort Pod goes first.
const BEST_EFFORT_OOM_SCORE: i64 = 1000;
/// cgroup v1 weight of the smallest request; the kernel refuses less.
const MIN_SHARES: i64 = 2;
/// Largest weight the kernel takes.
const MAX_SHARES: i64 = 262_144;
/// Quota period in microseconds.
const PERIOD: i64 = 100_000;
/// Smallest quota the kernel takes, in microseconds.
const MIN_QUOTA: i64 = 1_000;

/// A list of the API as numbers. An amount that does not parse is left out: the API server admits none.
pub fn list(api: Option<&BTreeMap<String, ApiQuantity>>) -> ResourceList {
    let parsed = |(name, amount): (&String, &ApiQuantity)| Some((name.clone(), amount.0.parse().ok()?));
    api.into_iter().flatten().filter_map(parsed).collect()
}

fn requests(resources: Option<&ResourceRequirements>) -> ResourceList {
    list(resources.and_then(|r| r.requests.as_ref()))
}

fn limits(resources: Option<&ResourceRequirements>) -> ResourceList {
    list(resources.and_then(|r| r.limits.as_ref()))
}

/// What the scheduler counts for a Pod: the larger of the sum over its containers and any one init container, plus
/// overhead. Sidecars (init containers with restartPolicy Always) count with the containers, and with each init
/// container after them. `spec.resources` overrides the sum where it names a resource.
pub fn pod_requests(spec: &PodSpec) -> ResourceList {
    let mut sum = aggregate(spec, requests);
    sum.extend(requests(spec.resources.as_ref()));
    add(&mut sum, &list(spec.overhead.as_ref()));
    sum
}

/// The same for limits, overhead added to those there are. A resource that one container has without limit counts with
/// the limits of the others: see [`pod_resources`].
pub fn pod_limits(spec: &PodSpec) -> ResourceList {
    let mut sum = aggregate(spec, limits);
    sum.extend(limits(spec.resources.as_ref()));
    let mut overhead = list(spec.overhead.as_ref());
    overhead.retain(|name, _| sum.get(name).is_some_and(|limit| !limit.is_zero()));
    add(&mut sum, &overhead);
    sum
}

/// The most that containers use at once, by one of the two lists of each.
fn aggregate(spec: &PodSpec, of: fn(Option<&ResourceRequirements>) -> ResourceList) -> ResourceList {
    let mut sum = ResourceList::new();
    spec.containers.iter().for_each(|c| add(&mut sum, &of(c.resources.as_ref())));
    let mut sidecars = ResourceList::new();
    let mut peak = ResourceList::new();
    for init in spec.init_containers.iter().flatten() {
        let mut needs = of(init.resources.as_ref());
        if is_sidecar(init) {
            add(&mut sidecars, &needs);
            add(&mut sum, &needs);
            needs = sidecars.clone();
        } else {
            add(&mut needs, &sidecars);
        }
        raise(&mut peak, &needs);
    }
    raise(&mut sum, &peak);
    sum
}

/// Whether an init container is a native sidecar.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn add(sum: &mut ResourceList, more: &ResourceList) {
    for (name, amount) in more {
        let entry = sum.entry(name.clone()).or_default();
        *entry = *entry + *amount;
    }
}

fn raise(peak: &mut ResourceList, other: &ResourceList) {
    for (name, amount) in other {
        let entry = peak.entry(name.clone()).or_default();
        *entry = (*entry).max(*amount);
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`, from cpu and memory of every container (or of the Pod as a whole).
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.resources.as_ref());
    let parts: Vec<_> = match &spec.resources {
        Some(whole) => vec![Some(whole)],
        None => containers.collect(),
    };
    let zero = Quantity::default();
    let compute = |list: ResourceList| -> ResourceList {
        list.into_iter().filter(|(name, amount)| (name == "cpu" || name == "memory") && *amount > zero).collect()
    };
    let pairs: Vec<_> = parts.iter().map(|r| (requests(*r), compute(limits(*r)))).collect();
    if pairs.iter().all(|(requests, limits)| compute(requests.clone()).is_empty() && limits.is_empty()) {
        return "BestEffort";
    }
    let guaranteed = pairs.iter().all(|(requests, limits)| {
        // A request that is not there is the limit; one of zero is a request of nothing.
        let same = |(name, amount): (&String, &Quantity)| requests.get(name).is_none_or(|request| request == amount);
        limits.len() == 2 && limits.iter().all(same)
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}

/// cgroup numbers of one container.
pub fn container_resources(spec: &PodSpec, container: &Container, node_memory: i64, quota: bool) -> Resources {
    let mut resources = numbers(&requests(container.resources.as_ref()), &container_limits(spec, container), quota);
    resources.oom_score_adj = Some(oom_score(spec, container, node_memory));
    resources
}

/// The limits of one container: its own, and the Pod's where it has none.
pub fn container_limits(spec: &PodSpec, container: &Container) -> ResourceList {
    let mut own = limits(container.resources.as_ref());
    own.retain(|_, limit| !limit.is_zero());
    let whole = limits(spec.resources.as_ref());
    for (name, limit) in whole.into_iter().filter(|(name, _)| name == "cpu" || name == "memory") {
        own.entry(name).or_insert(limit);
    }
    own
}

/// cgroup numbers of the Pod as a whole: weight by its requests, limits only where every container has one or
/// `spec.resources` does.
pub fn pod_resources(spec: &PodSpec, quota: bool) -> Resources {
    let whole = limits(spec.resources.as_ref());
    let parts = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut sum = pod_limits(spec);
    sum.retain(|name, _| {
        whole.contains_key(name)
            || parts().all(|c| limits(c.resources.as_ref()).get(name).is_some_and(|l| !l.is_zero()))
    });
    numbers(&pod_requests(spec), &sum, quota)
}

fn numbers(requests: &ResourceList, limits: &ResourceList, quota: bool) -> Resources {
    let cpu_request = requests.get("cpu").or_else(|| limits.get("cpu"));
    let shares = cpu_request.map_or(MIN_SHARES, |cpu| (cpu.milli_value() * 1024 / 1000).clamp(MIN_SHARES, MAX_SHARES));
    let cpu_limit = limits.get("cpu").filter(|_| quota).map(|cpu| cpu.milli_value()).filter(|milli| *milli > 0);
    Resources {
        cpu_shares: Some(shares),
        cpu_quota: cpu_limit.map(|milli| (milli * PERIOD / 1000).max(MIN_QUOTA)),
        cpu_period: cpu_limit.map(|_| PERIOD),
        memory_limit: limits.get("memory").map(|m| m.value()).filter(|bytes| *bytes > 0),
        ..Resources::default()
    }
}

/// Priority from which on a Pod is critical: that of the class `system-cluster-critical`.
pub const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// How early the kernel kills a container's processes for want of memory: less the more of the node it asked for.
fn oom_score(spec: &PodSpec, container: &Container, node_memory: i64) -> i64 {
    let node_critical = spec.priority_class_name.as_deref() == Some("system-node-critical");
    if node_critical && spec.priority.is_some_and(|priority| priority >= CRITICAL_PRIORITY) {
        return GUARANTEED_OOM_SCORE;
    }
    match qos_class(spec) {
        "Guaranteed" => return GUARANTEED_OOM_SCORE,
        "BestEffort" => return BEST_EFFORT_OOM_SCORE,
        _ => {}
    }
    let memory = |c: &Container| requests(c.resources.as_ref()).get("memory").map_or(0, |memory| memory.value());
    let mut asked = memory(container);
    if is_sidecar(container) {
        // A sidecar outlives what it serves.
        asked = asked.max(spec.containers.iter().map(memory).min().unwrap_or(0));
    }
    let asked = i128::from(asked) + i128::from(unassigned(spec));
    let score = 1000 - 1000 * asked / i128::from(node_memory.max(1));
    // Stays above every Guaranteed Pod and below every BestEffort one.
    i64::try_from(score).unwrap_or(0).clamp(1000 + GUARANTEED_OOM_SCORE, BEST_EFFORT_OOM_SCORE - 1)
}

/// Each container's part of the memory that `spec.resources` requests beyond what the containers do (KEP-2837), in bytes.
fn unassigned(spec: &PodSpec) -> i64 {
    let Some(whole) = requests(spec.resources.as_ref()).get("memory").filter(|memory| !memory.is_zero()).copied()
    else {
        return 0;
    };
    let assigned = aggregate(spec, requests).get("memory").copied().unwrap_or_default();
    let count = spec.containers.len() + spec.init_containers.as_ref().map_or(0, Vec::len);
    (whole - assigned).value().max(0) / i64::try_from(count.max(1)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn class(resources: &[Value]) -> &'static str {
        let containers: Vec<_> = resources.iter().map(|r| json!({ "name": "c", "resources": r })).collect();
        qos_class(&serde_json::from_value(json!({ "containers": containers })).unwrap())
    }

    #[test]
    fn sidecars_count_with_the_containers_and_with_the_init_containers_after_them() {
        let with = |name: &str, cpu: u8, policy: Value| {
            let cpu = json!({ "cpu": cpu.to_string() });
            json!({ "name": name, "restartPolicy": policy, "resources": { "requests": cpu, "limits": cpu } })
        };
        let spec = json!({
            "initContainers": [
                with("before", 4, Value::Null), with("sidecar", 2, json!("Always")), with("after", 3, Value::Null),
            ],
            "containers": [with("main", 1, Value::Null)],
        });
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        assert_eq!(pod_requests(&spec)["cpu"].milli_value(), 5000, "the sidecar and the init container after it");
        assert_eq!(pod_resources(&spec, true).cpu_quota, Some(5 * PERIOD));
    }

    #[test]
    fn the_class_is_the_api_servers() {
        let limits = json!({ "cpu": "1", "memory": "1Gi" });
        let same = json!({ "limits": limits, "requests": limits });
        assert_eq!(class(&[json!({})]), "BestEffort");
        assert_eq!(class(&[json!({ "requests": { "cpu": "0" } })]), "BestEffort");
        assert_eq!(class(std::slice::from_ref(&same)), "Guaranteed");
        assert_eq!(class(&[json!({ "limits": limits })]), "Guaranteed");
        assert_eq!(class(&[same, json!({})]), "Burstable");
        let none = json!({ "limits": limits, "requests": { "cpu": "0", "memory": "0" } });
        assert_eq!(class(&[none]), "Burstable", "a request of nothing is not the limit");
    }

    const MI: i64 = 1 << 20;

    fn spec(spec: Value) -> PodSpec {
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_pods_own_resources_decide_its_class_and_stand_for_limits_that_are_missing() {
        let whole =
            json!({ "requests": { "cpu": "1", "memory": "100Mi" }, "limits": { "cpu": "2", "memory": "100Mi" } });
        let own = json!({ "limits": { "memory": "40Mi" }, "requests": { "memory": "30Mi", "cpu": "250m" } });
        let pod =
            spec(json!({ "resources": whole, "containers": [{ "name": "a", "resources": own }, { "name": "b" }] }));
        assert_eq!(qos_class(&pod), "Burstable");
        let of = |index: usize| container_resources(&pod, &pod.containers[index], 1000 * MI, true);
        assert_eq!((of(0).cpu_shares, of(0).cpu_quota, of(0).memory_limit), (Some(256), Some(200_000), Some(40 * MI)));
        assert_eq!(
            (of(1).cpu_shares, of(1).cpu_quota, of(1).memory_limit),
            (Some(2048), Some(200_000), Some(100 * MI))
        );
        // 70 of the 100 MiB are nobody's, so each has half of them: 65 and 35 of 1000.
        assert_eq!((of(0).oom_score_adj, of(1).oom_score_adj), (Some(935), Some(965)));
        let sum = pod_resources(&pod, true);
        assert_eq!((sum.cpu_shares, sum.cpu_quota, sum.memory_limit), (Some(1024), Some(200_000), Some(100 * MI)));
        let same = json!({ "limits": { "cpu": "1", "memory": "1Gi" } });
        assert_eq!(qos_class(&spec(json!({ "resources": same, "containers": [{ "name": "c" }] }))), "Guaranteed");
        assert_eq!(
            qos_class(&spec(json!({ "resources": {}, "containers": [{ "name": "c", "resources": own }] }))),
            "BestEffort"
        );
    }

    #[test]
    fn a_pod_is_limited_where_all_of_it_is() {
        let part = |limits: Value| json!({ "name": "c", "resources": { "limits": limits } });
        let both = json!({ "cpu": "1", "memory": "10Mi" });
        let pod = spec(json!({ "containers": [part(both.clone()), part(json!({ "memory": "5Mi" }))],
            "initContainers": [{ "name": "s", "restartPolicy": "Always", "resources": { "limits": both } }],
            "overhead": { "memory": "1Mi" } }));
        let sum = pod_resources(&pod, true);
        assert_eq!((sum.cpu_quota, sum.memory_limit), (None, Some(26 * MI)));
    }

    #[test]
    fn a_sidecar_is_not_killed_before_what_it_serves_and_a_node_critical_pod_last() {
        let asks = |memory: &str| json!({ "requests": { "memory": memory } });
        let mut pod = spec(json!({ "containers": [{ "name": "c", "resources": asks("100Mi") }],
            "initContainers": [{ "name": "s", "restartPolicy": "Always", "resources": asks("10Mi") }] }));
        let score =
            |pod: &PodSpec, container: &Container| container_resources(pod, container, 1000 * MI, true).oom_score_adj;
        let sidecar = pod.init_containers.as_ref().unwrap()[0].clone();
        assert_eq!((score(&pod, &pod.containers[0]), score(&pod, &sidecar)), (Some(900), Some(900)));
        pod.priority_class_name = Some("system-node-critical".into());
        pod.priority = Some(CRITICAL_PRIORITY + 1000);
        assert_eq!(score(&pod, &sidecar), Some(-997));
    }
}
