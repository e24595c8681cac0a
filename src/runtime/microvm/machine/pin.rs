//! Which CPUs, and whose memory, a machine is held to: the next ones in turn, and the memory of the NUMA node they belong to.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const NODES: &str = "/sys/devices/system/node";

/// A CPU of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cpu {
    id: u32,
    /// The NUMA node it belongs to.
    node: u32,
}

/// What a machine is held to; by default nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// See [`MachineSpec::cpus`](super::MachineSpec::cpus).
    pub cpus: Option<Vec<u32>>,
    /// See [`MachineSpec::numa_node`](super::MachineSpec::numa_node).
    pub numa_node: Option<u32>,
}

/// Hands out CPUs; clones share the turn. By default machines are held to nothing.
#[derive(Clone, Debug, Default)]
pub struct Pins(Option<Arc<AtomicU32>>);

impl Pins {
    /// Those of this host, from the first on.
    pub fn of_host() -> Self {
        Self(Some(Arc::default()))
    }

    /// What the next machine is held to.
    ///
    /// # Errors
    /// The kernel does not tell its CPUs.
    pub fn next(&self, vcpus: u32) -> io::Result<Hold> {
        let Some(given) = &self.0 else { return Ok(Hold::default()) };
        // Read each time: CPUs come and go.
        let cpus = cpus_in(Path::new(NODES))?;
        Ok(hold(given.fetch_add(vcpus, Ordering::Relaxed), vcpus, &cpus))
    }
}

fn cpus_in(nodes: &Path) -> io::Result<Vec<Cpu>> {
    let mut cpus = Vec::new();
    for entry in fs::read_dir(nodes)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")?.parse().ok());
        let Some(node) = number else { continue };
        let list = fs::read_to_string(entry.path().join("cpulist"))?;
        cpus.extend(parse(&list).into_iter().map(|id| Cpu { id, node }));
    }
    cpus.sort_by_key(|cpu| cpu.id);
    Ok(cpus)
}

/// The kernel's form of a list: `0-3,8`.
fn parse(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<u32>().ok()?..=to.parse::<u32>().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// As many CPUs as there are vCPUs, from this position on, all of one node: fewer if it has no more. Nothing without CPUs.
fn hold(position: u32, vcpus: u32, cpus: &[Cpu]) -> Hold {
    let at = usize::try_from(position).ok().and_then(|position| position.checked_rem(cpus.len())).unwrap_or(0);
    let Some(first) = cpus.get(at) else { return Hold::default() };
    let (before, after) = cpus.split_at(at);
    let near = after.iter().chain(before).filter(|cpu| cpu.node == first.node);
    let chosen = near.map(|cpu| cpu.id).take(usize::try_from(vcpus).unwrap_or(usize::MAX).max(1));
    Hold { cpus: Some(chosen.collect()), numa_node: Some(first.node) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_go_round_the_cpus_and_take_their_nodes() {
        let nodes = tempfile::tempdir().unwrap();
        for (node, list) in [("node0", "0-1,4\n"), ("node1", "2-3\n")] {
            fs::create_dir(nodes.path().join(node)).unwrap();
            fs::write(nodes.path().join(node).join("cpulist"), list).unwrap();
        }
        fs::write(nodes.path().join("online"), "0-1\n").unwrap();
        let cpus = cpus_in(nodes.path()).unwrap();
        let held = |cpus: &[u32], node| Hold { cpus: Some(cpus.to_vec()), numa_node: Some(node) };
        let alone: Vec<Hold> = (0..7).map(|position| hold(position, 1, &cpus)).collect();
        let wanted = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (0, 0), (1, 0)].map(|(cpu, node)| held(&[cpu], node));
        assert_eq!(alone, wanted);
        // No machine spans two nodes, and none gets a CPU twice.
        assert_eq!(hold(1, 2, &cpus), held(&[1, 4], 0));
        assert_eq!(hold(3, 9, &cpus), held(&[3, 2], 1));
        assert_eq!(hold(0, 0, &cpus), held(&[0], 0));
        assert_eq!(hold(1, 1, &[]), Hold::default());
        assert!(parse("\n").is_empty());
    }

    #[test]
    fn nothing_is_held_unless_it_is_asked_for_and_clones_share_the_turn() {
        assert_eq!(Pins::default().next(4).unwrap(), Hold::default());
        let cpus = cpus_in(Path::new(NODES)).unwrap();
        let pins = Pins::of_host();
        let other = pins.clone();
        let given: Vec<Hold> = [&pins, &other, &pins].map(|pins| pins.next(1).unwrap()).into();
        assert_eq!(given, [0, 1, 2].map(|position| hold(position, 1, &cpus)));
        assert!(given[0].cpus.is_some());
    }
}
