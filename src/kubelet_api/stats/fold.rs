//! Pure: each Pod once.
//!
//! A function Pod is several sandboxes: its own, and one for each environment, whose UID is the Pod's, a dot, and what
//! else names it. Environments of one replica share its cgroup. Scrapers know nothing of that: they want a Pod once,
//! and counters that do not fall when a replica leaves.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::Timestamp;

use crate::runtime::stats::{ContainerStats, CpuUsage, MemoryUsage, SandboxStats, Usage};

/// Remembers what has left, for as long as its Pod is there.
#[derive(Debug, Default)]
pub(super) struct Fold {
    /// By Pod UID.
    known: HashMap<String, Known>,
}

/// Of one Pod of several sandboxes.
#[derive(Debug, Default)]
struct Known {
    pod: Total,
    /// By name.
    containers: HashMap<String, Total>,
}

/// CPU time of cgroups that come and go, in nanoseconds.
#[derive(Debug, Default)]
struct Total {
    left: u64,
    present: HashMap<String, u64>,
}

impl Total {
    /// What all of them have used since the first was seen.
    fn of(&mut self, now: HashMap<String, u64>) -> u64 {
        self.left +=
            self.present.iter().filter(|(cgroup, _)| !now.contains_key(*cgroup)).map(|(_, cpu)| cpu).sum::<u64>();
        self.present = now;
        self.left + self.present.values().sum::<u64>()
    }
}

/// The UID of the Pod that a sandbox serves.
pub(super) fn pod_uid(sandbox: &SandboxStats) -> &str {
    let uid = &sandbox.pod.uid;
    uid.split_once('.').map_or(uid, |(pod, _)| pod)
}

impl Fold {
    /// The Pods by namespace and name. Of two of one name, while the older is being removed, the newer.
    pub(super) fn pods(&mut self, sandboxes: Vec<SandboxStats>) -> Vec<SandboxStats> {
        let mut named: BTreeMap<(String, String), Vec<SandboxStats>> = BTreeMap::new();
        for sandbox in sandboxes {
            named.entry((sandbox.pod.namespace.clone(), sandbox.pod.name.clone())).or_default().push(sandbox);
        }
        let pods: Vec<_> = named.into_values().filter_map(|group| self.pod(group)).collect();
        let there: HashSet<&str> = pods.iter().map(|pod| pod.pod.uid.as_str()).collect();
        self.known.retain(|uid, _| there.contains(uid.as_str()));
        pods
    }

    fn pod(&mut self, mut group: Vec<SandboxStats>) -> Option<SandboxStats> {
        let newest = group.iter().max_by_key(|sandbox| (is_pod(sandbox), sandbox.started_at))?;
        let uid = pod_uid(newest).to_owned();
        if group.len() == 1 && !self.known.contains_key(&uid) && is_pod(newest) {
            return group.pop();
        }
        group.retain(|sandbox| pod_uid(sandbox) == uid);
        group.sort_by_key(|sandbox| (!is_pod(sandbox), sandbox.started_at));
        let known = self.known.entry(uid.clone()).or_default();
        let mut seen = HashSet::new();
        let distinct = group.iter().filter(|sandbox| seen.insert(sandbox.cgroup.as_str()));
        let usage = sum(distinct.map(|sandbox| (sandbox.cgroup.as_str(), &sandbox.usage)), &mut known.pod);
        let mut containers: BTreeMap<String, Vec<ContainerStats>> = BTreeMap::new();
        for container in group.iter_mut().flat_map(|sandbox| std::mem::take(&mut sandbox.containers)) {
            containers.entry(container.name.clone()).or_default().push(container);
        }
        for name in known.containers.keys().filter(|name| !containers.contains_key(*name)).cloned().collect::<Vec<_>>()
        {
            // At zero replicas there is no container to tell of; what the last one used counts again with the next.
            known.containers.entry(name).or_default().of(HashMap::new());
        }
        let mut pod = group.swap_remove(0);
        pod.pod.uid = uid;
        pod.usage = usage;
        let cgroup = &pod.cgroup;
        let merged = containers.into_iter().filter_map(|(name, same)| {
            let total = known.containers.entry(name.clone()).or_default();
            let usage = sum(same.iter().map(|container| (container.cgroup.as_str(), &container.usage)), total);
            let oldest = same.into_iter().min_by_key(|container| container.started_at)?;
            // A name that stays while they come and go: rates are kept by it.
            Some(ContainerStats { usage, cgroup: format!("{cgroup}/{name}"), ..oldest })
        });
        pod.containers = merged.collect();
        Some(pod)
    }
}

fn is_pod(sandbox: &SandboxStats) -> bool {
    !sandbox.pod.uid.contains('.')
}

/// Limits are each one's own, so the sum has none.
fn sum<'a>(usages: impl Iterator<Item = (&'a str, &'a Usage)>, total: &mut Total) -> Usage {
    let mut sum = Usage { time: Timestamp::UNIX_EPOCH, ..Usage::default() };
    let mut now = HashMap::new();
    for (cgroup, usage) in usages {
        sum.time = sum.time.max(usage.time);
        sum.tasks = sum.tasks.into_iter().chain(usage.tasks).reduce(|a, b| a + b);
        sum.memory = sum.memory.into_iter().chain(usage.memory).reduce(with_memory);
        if let Some(cpu) = usage.cpu {
            now.insert(cgroup.to_owned(), cpu.total);
            sum.cpu = sum.cpu.into_iter().chain([cpu]).reduce(with_cpu);
        }
    }
    let total = total.of(now);
    sum.cpu = sum.cpu.map(|cpu| CpuUsage { total, ..cpu });
    sum
}

fn with_cpu(a: CpuUsage, b: CpuUsage) -> CpuUsage {
    CpuUsage {
        total: a.total + b.total,
        user: a.user + b.user,
        system: a.system + b.system,
        periods: a.periods + b.periods,
        throttled_periods: a.throttled_periods + b.throttled_periods,
        throttled: a.throttled + b.throttled,
    }
}

fn with_memory(a: MemoryUsage, b: MemoryUsage) -> MemoryUsage {
    MemoryUsage {
        usage: a.usage + b.usage,
        working_set: a.working_set + b.working_set,
        rss: a.rss + b.rss,
        cache: a.cache + b.cache,
        mapped_file: a.mapped_file + b.mapped_file,
        swap: a.swap + b.swap,
        max_usage: a.max_usage + b.max_usage,
        failures: a.failures + b.failures,
        page_faults: a.page_faults + b.page_faults,
        major_page_faults: a.major_page_faults + b.major_page_faults,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::types::{ContainerId, PodRef, SandboxId};

    fn usage(cpu: u64, working_set: u64) -> Usage {
        Usage {
            time: Timestamp::from_second(100).unwrap(),
            cpu: Some(CpuUsage { total: cpu, ..CpuUsage::default() }),
            memory: Some(MemoryUsage { working_set, ..MemoryUsage::default() }),
            tasks: Some(1),
            limits: None,
        }
    }

    /// `cpu` is the cgroup's, and as much the container's, of which there is none on a Pod's own sandbox.
    fn sandbox(uid: &str, cgroup: &str, cpu: u64, started: i64) -> SandboxStats {
        let container = ContainerStats {
            id: ContainerId::from(uid),
            name: "main".into(),
            attempt: 0,
            image_ref: "i".into(),
            started_at: Timestamp::from_second(started).ok(),
            cgroup: format!("{cgroup}/{uid}"),
            usage: usage(cpu, 10),
            writable_layer: None,
            log: None,
        };
        SandboxStats {
            id: SandboxId::from(uid),
            pod: PodRef { uid: uid.into(), namespace: "ns".into(), name: "f".into() },
            started_at: Timestamp::from_second(started).ok(),
            cgroup: cgroup.into(),
            usage: usage(cpu, 20),
            network: None,
            containers: if uid.contains('.') { vec![container] } else { Vec::new() },
            volumes: Vec::new(),
        }
    }

    fn cpu(usage: &Usage) -> u64 {
        usage.cpu.unwrap().total
    }

    #[test]
    fn environments_are_their_pods_and_a_shared_cgroup_counts_once() {
        let environments = [sandbox("u.1.1", "/podu.1", 50, 3), sandbox("u.1.2", "/podu.1", 50, 2)];
        let all = [sandbox("u", "/podu", 7, 1)].into_iter().chain(environments).collect();
        let pods = Fold::default().pods(all);
        assert_eq!(pods.len(), 1);
        let pod = &pods[0];
        assert_eq!((pod.pod.uid.as_str(), cpu(&pod.usage), pod.usage.tasks), ("u", 57, Some(2)));
        assert_eq!(pod.usage.memory.unwrap().working_set, 40);
        let [main] = &pod.containers[..] else { panic!("{pod:?}") };
        assert_eq!((cpu(&main.usage), main.usage.memory.unwrap().working_set), (100, 20));
        assert_eq!((main.id.as_str(), main.cgroup.as_str()), ("u.1.2", "/podu/main"), "the oldest");
    }

    #[test]
    fn a_counter_does_not_fall_when_a_replica_leaves() {
        let mut fold = Fold::default();
        let own = || sandbox("u", "/podu", 7, 1);
        let mut seen = Vec::new();
        for group in [
            vec![own(), sandbox("u.1.1", "/podu.1", 50, 3), sandbox("u.2.1", "/podu.2", 30, 4)],
            vec![own(), sandbox("u.2.1", "/podu.2", 31, 4)],
            vec![own()],
            vec![own(), sandbox("u.3.1", "/podu.3", 5, 9)],
        ] {
            let pod = fold.pods(group).remove(0);
            seen.push((cpu(&pod.usage), pod.containers.first().map(|container| cpu(&container.usage))));
        }
        assert_eq!(seen, [(87, Some(80)), (88, Some(81)), (88, None), (93, Some(86))]);
        assert!(fold.pods(Vec::new()).is_empty());
        assert!(fold.known.is_empty(), "forgotten with its Pod");
    }

    #[test]
    fn of_two_pods_of_one_name_the_newer_is_told() {
        let pods = Fold::default().pods(vec![sandbox("old", "/podold", 1, 1), sandbox("new", "/podnew", 2, 5)]);
        assert_eq!(pods.iter().map(|pod| pod.pod.uid.as_str()).collect::<Vec<_>>(), ["new"]);
    }
}
