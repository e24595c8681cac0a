//! Memory of this process that it does not need.
//!
//! What a program runs once, at its start or when many Pods come at once, stays mapped for as long as it lives, and with
//! each page that is run the kernel maps the fifteen around it (`fault_around_bytes`). After an hour nine tenths of the
//! program are resident, of which a node at rest runs a small part. So the mapping is let go of now and then: what is still
//! run is mapped again from the page cache, some hundred faults of a microsecond each.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::mm::{Advice, madvise};

use crate::telemetry::chain;

/// How often code is let go of: seldom enough to cost nothing, often enough to follow a burst of Pods.
const INTERVAL: Duration = Duration::from_secs(30);

/// Lets code go that is not run, every now and then, for ever. Cancel-safe.
pub async fn let_go_of_code() {
    loop {
        tokio::time::sleep(INTERVAL).await;
        if let Err(error) = unmap_code() {
            tracing::debug!(error = chain(&error), "failed to let go of code that is not run");
        }
    }
}

/// Takes the program's code out of this process' memory; what is run next is mapped again. Says how many bytes are mapped
/// as code.
///
/// # Errors
/// `/proc/self/maps` cannot be read, or the kernel refuses.
pub fn unmap_code() -> io::Result<usize> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut all = 0;
    for (start, end) in maps.lines().filter_map(|line| code(line, &program.to_string_lossy())) {
        let at = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the range is a private mapping of this program's file that may be read and run and never was written: its
        // pages are the file's, and the file of a running program cannot be written to. Whoever comes to a page that was
        // let go of finds the same bytes.
        #[allow(unsafe_code)]
        unsafe { madvise(at, end - start, Advice::LinuxDontNeed) }?;
        all += end - start;
    }
    Ok(all)
}

/// The range of a line of `/proc/self/maps` (proc(5)), if it is code of that program. What is only read is left alone: the
/// loader has written to some of it before, and that would be lost.
fn code(line: &str, program: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    if !rest.starts_with("r-xp ") || !rest.ends_with(program) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let read = |text| usize::from_str_radix(text, 16).ok();
    Some((read(start)?, read(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_the_program_is_let_go_of() {
        let code = |line: &str| code(line, "/usr/bin/lambdalet");
        let line = "55d0c0a00000-55d0c1e00000 r-xp 00990000 fe:00 1234                       /usr/bin/lambdalet";
        assert_eq!(code(line), Some((0x55d0_c0a0_0000, 0x55d0_c1e0_0000)));
        for other in [line.replace("r-xp", "r--p"), line.replace("r-xp", "rwxp"), line.replace("lambdalet", "other")] {
            assert_eq!(code(&other), None, "{other}");
        }
        assert_eq!(code("nonsense"), None);
    }
}
