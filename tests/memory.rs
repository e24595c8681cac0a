//! What the process lets go of. A test of its own program: what others run beside it would count as well.

#![allow(clippy::unwrap_used)]

use lambdalet::memory::unmap_code;

/// KiB of resident memory that is of files (proc(5), `/proc/pid/status`).
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn code_that_is_let_go_of_is_not_resident_and_still_runs() {
    let before = resident();
    assert!(unmap_code().unwrap() > 0);
    let after = resident();
    assert!(after < before, "{before} KiB before, {after} KiB after");
}
