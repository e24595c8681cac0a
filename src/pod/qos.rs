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
    let mut sum = together(spec, requests);
    sum.extend(requests(spec.resources.as_ref()));
    add(&mut sum, &list(spec.overhead.as_ref()));
    sum
}

/// What the containers of a Pod have at most at once.
fn together(spec: &PodSpec, of: impl Fn(Option<&ResourceRequirements>) -> ResourceList) -> ResourceList {
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
        Some(whole) if whole.requests.is_some() || whole.limits.is_some() => vec![Some(whole)],
        _ => containers.collect(),
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
    let requests = requests(container.resources.as_ref());
    let limits = limits(container.resources.as_ref());
    let mut resources = numbers(&requests, &limits, quota);
    resources.oom_score_adj = Some(oom_score(qos_class(spec), requests.get("memory"), node_memory));
    resources
}

/// cgroup numbers of the Pod as a whole: weight by its requests, limits only where every container has one.
pub fn pod_resources(spec: &PodSpec, quota: bool) -> Resources {
    let mut sum = together(spec, limits);
    let parts = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    sum.retain(|name, _| parts().all(|c| limits(c.resources.as_ref()).contains_key(name)));
    sum.extend(limits(spec.resources.as_ref()));
    if sum.contains_key("memory") || sum.contains_key("cpu") {
        let overhead = list(spec.overhead.as_ref());
        let known: ResourceList = overhead.into_iter().filter(|(name, _)| sum.contains_key(name)).collect();
        add(&mut sum, &known);
    }
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

/// How early the kernel kills a container's processes for want of memory: less the more of the node it asked for.
fn oom_score(class: &str, request: Option<&Quantity>, node_memory: i64) -> i64 {
    match class {
        "Guaranteed" => GUARANTEED_OOM_SCORE,
        "BestEffort" => BEST_EFFORT_OOM_SCORE,
        _ => {
            let asked = i128::from(request.map_or(0, |q| q.value()));
            let share = 1000 * asked / i128::from(node_memory.max(1));
            // Stays above every Guaranteed Pod and below every BestEffort one.
            i64::try_from(1000 - share).unwrap_or(0).clamp(1000 + GUARANTEED_OOM_SCORE, BEST_EFFORT_OOM_SCORE - 1)
        }
    }
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
}
