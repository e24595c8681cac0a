//! How far a container's oom_score_adj may be lowered on this host.
//!
//! Lowering it takes CAP_SYS_RESOURCE. Where the daemon lacks it (inside some virtual machines and containers) runc
//! fails the whole start over a negative value, so there the wish is cut to what can be had.

use std::fs;

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

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read_as_hexadecimal() {
        let status = "Name:\tx\nCapPrm:\tff\nCapEff:\t000001fffeffffff\n";
        let set = effective_capabilities(status).unwrap();
        assert_eq!(set & (1 << CAP_SYS_RESOURCE), 0);
        assert_ne!(set & 1, 0);
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }
}
