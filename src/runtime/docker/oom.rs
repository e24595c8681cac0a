//! Memory that ran out: how far a container's oom_score_adj may be lowered on this host, and whom the kernel killed.
//!
//! Lowering it takes CAP_SYS_RESOURCE. Where the daemon lacks it (inside some virtual machines and containers) runc
//! fails the whole start over a negative value, so there the wish is cut to what can be had.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;

/// The kernel's log; every read returns one record.
const KERNEL_LOG: &str = "/dev/kmsg";
/// Longest record the kernel writes.
const LONGEST_RECORD: usize = 8192;
/// CAP_SYS_RESOURCE in the capability sets of `/proc/<pid>/status`.
const CAP_SYS_RESOURCE: u32 = 24;

/// The lowest score a child of the process `pid` can be given; `None` if there is no floor. What cannot be read counts
/// as unrestricted, since that is the rule.
pub(super) fn floor(pid: i32) -> Option<i64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    if effective_capabilities(&status)? & (1 << CAP_SYS_RESOURCE) != 0 {
        return None;
    }
    let own = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
    Some(own.trim().parse::<i64>().ok()?.max(0))
}

/// Whether the kernel's log says that it killed a process of this container for memory. A log that may not be read
/// says nothing.
///
/// Docker reports most of them too. It misses one whose notification comes after the end of the process (with cgroup
/// v1 both are under way at once) and knows nothing of what was killed before the daemon's own start.
pub(super) fn killed_by_kernel(container: &str) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(KERNEL_LOG);
    let Ok(mut log) = opened else { return false };
    let mut record = [0; LONGEST_RECORD];
    loop {
        match log.read(&mut record) {
            Ok(0) => return false,
            Ok(length) if is_kill_in(&String::from_utf8_lossy(&record[..length]), container) => return true,
            Ok(_) => {}
            // The record was overwritten before it was read; the next read goes on behind it.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(_) => return false,
        }
    }
}

/// Whether a record tells of a kill in the cgroup of this container.
fn is_kill_in(record: &str, container: &str) -> bool {
    let Some((_, killed)) = record.split_once("oom-kill:") else { return false };
    let cgroup = killed.split(',').find_map(|field| field.strip_prefix("task_memcg="));
    cgroup.is_some_and(|cgroup| cgroup.contains(container))
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_known_by_the_cgroup_of_its_task() {
        let record = "6,812,5142957385,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=c1,mems_allowed=0,\
                      oom_memcg=/l/pod7,task_memcg=/l/pod7/c1,task=tail,pid=6372,uid=0\n";
        assert!(is_kill_in(record, "c1"));
        assert!(!is_kill_in(record, "c2"));
        assert!(!is_kill_in("6,813,5142957400,-;Memory cgroup out of memory: Killed process 6372 (c1)\n", "c1"));
    }

    #[test]
    fn the_effective_set_is_read_as_hexadecimal() {
        let status = "Name:\tx\nCapPrm:\tff\nCapEff:\t000001fffeffffff\n";
        let set = effective_capabilities(status).unwrap();
        assert_eq!(set & (1 << CAP_SYS_RESOURCE), 0);
        assert_ne!(set & 1, 0);
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }
}
