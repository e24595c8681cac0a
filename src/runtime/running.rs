//! What runs, as far as statistics need it, and what it uses: for the drivers whose containers are cgroups of this host.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use super::disk::Disk;
use super::labels::Facts;
use super::stats::{ContainerStats, SandboxStats, StatsScope, Usage};
use super::types::{ContainerId, SandboxId};
use super::usage::{Trees, interfaces};

/// By id.
pub(super) type Members = Arc<HashMap<String, Arc<Member>>>;

/// A running sandbox or container.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) facts: Facts,
    pub(super) id: String,
    pub(super) started_at: Option<Timestamp>,
    pub(super) pid: Option<i32>,
    /// Its own, from the trees' roots: as long as it is there, something runs.
    pub(super) cgroup: PathBuf,
    /// Of the Pod, on a sandbox that has one.
    pub(super) pod_cgroup: Option<PathBuf>,
    pub(super) layer: Option<PathBuf>,
    pub(super) log: PathBuf,
}

impl Member {
    /// The Pod's cgroup, where that is asked for.
    fn pod_cgroup(&self, scope: StatsScope) -> Option<&Path> {
        self.pod_cgroup.as_deref().filter(|_| scope.includes_pods())
    }
}

/// What the members use now; those whose cgroup is gone have ended.
pub(super) fn collect(members: &Members, trees: &Trees, disk: &Disk, scope: StatsScope) -> Vec<SandboxStats> {
    let mut containers: HashMap<&str, Vec<ContainerStats>> = HashMap::new();
    let own = members.values().filter(|member| !member.facts.sandbox_itself).map(|member| &*member.cgroup);
    // Sandboxes may share one: then it is read once.
    let sandboxes = || members.values().filter(|member| member.facts.sandbox_itself);
    let shared = sandboxes().filter_map(|member| member.pod_cgroup(scope));
    let usages = trees.usages(&own.chain(shared).collect(), scope);
    let everything = scope > StatsScope::CpuAndMemory;
    for member in members.values().filter(|member| !member.facts.sandbox_itself) {
        let Some(usage) = usages.get(member.cgroup.as_path()).copied() else { continue };
        let facts = &member.facts;
        containers.entry(&facts.sandbox).or_default().push(ContainerStats {
            id: ContainerId::from(member.id.as_str()),
            name: facts.container.clone(),
            attempt: facts.attempt,
            image_ref: facts.image_ref.clone(),
            started_at: member.started_at,
            cgroup: shown(&member.cgroup),
            usage,
            writable_layer: member.layer.as_ref().filter(|_| everything).and_then(|layer| disk.usage(layer)),
            log: everything.then(|| disk.usage(&member.log)).flatten(),
        });
    }
    // Who is on the host's network has none of its own.
    let network_of = |member: &Arc<Member>| {
        let own = member.facts.sandbox_itself && (!member.facts.addresses.is_empty() || member.facts.by_plugins);
        member.pid.filter(|_| scope >= StatsScope::Usage && own)
    };
    let networks = interfaces(&members.values().filter_map(network_of).collect::<Vec<_>>());
    let of_sandbox = |member: &Arc<Member>| {
        if scope.includes_pods() && !trees.exists(&member.cgroup) {
            return None;
        }
        let nothing = || Usage { time: Timestamp::now(), ..Usage::default() };
        let usage = member.pod_cgroup(scope).map_or_else(|| Some(nothing()), |path| usages.get(path).copied())?;
        Some(SandboxStats {
            id: SandboxId::from(member.id.as_str()),
            pod: member.facts.pod.clone(),
            started_at: member.started_at,
            cgroup: member.pod_cgroup.as_deref().map_or_else(String::new, shown),
            usage,
            network: network_of(member).and_then(|pid| networks.get(&pid).cloned()),
            containers: containers.remove(member.id.as_str()).unwrap_or_default(),
            volumes: Vec::new(),
        })
    };
    sandboxes().filter_map(of_sandbox).collect()
}

fn shown(cgroup: &Path) -> String {
    Path::new("/").join(cgroup).to_string_lossy().into_owned()
}
