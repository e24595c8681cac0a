//! Which CPU, and whose memory, a machine is held to: the n-th machine of a function gets the n-th CPU, and the memory
//! of the NUMA node that CPU belongs to.

use std::fs;
use std::io;
use std::path::Path;

const NODES: &str = "/sys/devices/system/node";

/// A CPU of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its number.
    pub id: u32,
    /// The NUMA node it belongs to.
    pub node: u32,
}

/// The CPUs of this host, by number.
///
/// # Errors
/// The kernel does not tell them.
pub fn host_cpus() -> io::Result<Vec<Cpu>> {
    cpus_in(Path::new(NODES))
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

/// The CPU of the `count`-th machine of a function, counted from 1; `None` without CPUs.
pub fn cpu_of(count: u32, cpus: &[Cpu]) -> Option<Cpu> {
    let position = usize::try_from(count.saturating_sub(1)).ok()?.checked_rem(cpus.len())?;
    cpus.get(position).copied()
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
        let chosen: Vec<(u32, u32)> =
            (1..=7).filter_map(|count| cpu_of(count, &cpus)).map(|cpu| (cpu.id, cpu.node)).collect();
        assert_eq!(chosen, [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (0, 0), (1, 0)]);
        assert_eq!(cpu_of(0, &cpus), cpu_of(1, &cpus));
        assert_eq!(cpu_of(1, &[]), None);
        assert!(parse("\n").is_empty());
    }
}
