//! What runs, as far as statistics need it, and what it uses: for the drivers whose containers are cgroups of this host.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use super::disk::Disk;
use super::labels::Facts;
use super::stats::{ContainerStats, SandboxStats, StatsScope, Usage};
use super::types::{ContainerId, SandboxId};
use super::usage::{Trees, Watched, interfaces};

/// By id.
pub(super) type Members = Arc<HashMap<String, Arc<Member>>>;

/// The cgroup of a Pod at `path`; `None` for one that has none of its own, for it would be the host's.
pub(super) fn pod_cgroup(path: PathBuf) -> Option<Arc<Watched>> {
    (!path.as_os_str().is_empty()).then(|| Arc::new(Watched::at(path)))
}

/// A running sandbox or container.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) facts: Facts,
    pub(super) id: String,
    pub(super) started_at: Option<Timestamp>,
    pub(super) pid: Option<i32>,
    /// Its own: as long as it is there, something runs.
    pub(super) cgroup: Arc<Watched>,
    /// Of the Pod, on a sandbox that has one.
    pub(super) pod_cgroup: Option<Arc<Watched>>,
    pub(super) layer: Option<PathBuf>,
    pub(super) log: PathBuf,
}

impl Member {
    /// The cgroup whose use is the member's, where that is asked for.
    fn used(&self, scope: StatsScope) -> Option<&Watched> {
        match self.facts.sandbox_itself {
            true => self.pod_cgroup.as_deref().filter(|_| scope.includes_pods()),
            false => Some(&*self.cgroup),
        }
    }

    /// The process that sees the sandbox's network; who is on the host's has none of its own.
    fn on_network(&self) -> Option<i32> {
        let own = self.facts.sandbox_itself && (!self.facts.addresses.is_empty() || self.facts.by_plugins);
        self.pid.filter(|_| own)
    }
}

/// The work of measuring what containers hold on disk, where that is asked for and due.
pub(super) fn walk(
    members: &HashMap<String, Arc<Member>>,
    disk: &Arc<Disk>,
    scope: StatsScope,
) -> Option<impl FnOnce() + Send + 'static> {
    if scope <= StatsScope::CpuAndMemory || !disk.is_due() {
        return None;
    }
    let containers = members.values().filter(|member| !member.facts.sandbox_itself);
    Disk::walk(disk, containers.flat_map(|member| member.layer.iter().chain([&member.log]).cloned()).collect())
}

/// What the members use now; those whose cgroup is gone have ended.
pub(super) fn collect(members: &Members, trees: &Trees, disk: &Disk, scope: StatsScope) -> Vec<SandboxStats> {
    let looked_at: Vec<(&Member, &Watched)> =
        members.values().filter_map(|member| Some((&**member, member.used(scope)?))).collect();
    let usages = trees.usages(&looked_at.iter().map(|(_, cgroup)| *cgroup).collect::<Vec<_>>(), scope);
    let everything = scope > StatsScope::CpuAndMemory;
    let mut containers: HashMap<&str, Vec<ContainerStats>> = HashMap::new();
    let mut pods: HashMap<&str, Option<Usage>> = HashMap::new();
    for ((member, cgroup), usage) in looked_at.into_iter().zip(usages) {
        let facts = &member.facts;
        if facts.sandbox_itself {
            pods.insert(&member.id, usage);
            continue;
        }
        let Some(usage) = usage else { continue };
        containers.entry(&facts.sandbox).or_default().push(ContainerStats {
            id: ContainerId::from(member.id.as_str()),
            name: facts.container.clone(),
            attempt: facts.attempt,
            image_ref: facts.image_ref.clone(),
            started_at: member.started_at,
            cgroup: shown(cgroup),
            usage,
            writable_layer: member.layer.as_ref().filter(|_| everything).and_then(|layer| disk.usage(layer)),
            log: everything.then(|| disk.usage(&member.log)).flatten(),
        });
    }
    let sandboxes: Vec<&Member> =
        members.values().filter(|member| member.facts.sandbox_itself).map(|member| &**member).collect();
    let network_of = |member: &&Member| member.on_network().filter(|_| scope >= StatsScope::Usage);
    let networks = interfaces(&sandboxes.iter().map(network_of).collect::<Vec<_>>());
    let of_sandbox = |(member, network): (&Member, Option<_>)| {
        if scope.includes_pods() && !trees.exists(member.cgroup.path()) {
            return None;
        }
        let nothing = || Some(Usage { time: Timestamp::now(), ..Usage::default() });
        Some(SandboxStats {
            id: SandboxId::from(member.id.as_str()),
            pod: member.facts.pod.clone(),
            started_at: member.started_at,
            cgroup: member.pod_cgroup.as_deref().map_or_else(String::new, shown),
            usage: pods.remove(member.id.as_str()).unwrap_or_else(nothing)?,
            network,
            containers: containers.remove(member.id.as_str()).unwrap_or_default(),
            volumes: Vec::new(),
        })
    };
    sandboxes.into_iter().zip(networks).filter_map(of_sandbox).collect()
}

fn shown(cgroup: &Watched) -> String {
    Path::new("/").join(cgroup.path()).to_string_lossy().into_owned()
}
