//! Memory of this process that it does not need.
//!
//! What a program runs once, at its start or when many Pods come at once, stays mapped for as long as it lives, and with
//! each page that is run the kernel maps the fifteen around it (`fault_around_bytes`). After an hour nine tenths of the
//! program are resident, of which a node at rest runs a small part. So the mapping is let go of now and then, with that of
//! the tables and constants before it and of the libraries: what is still used is mapped again from the page cache, some
//! hundred faults of a microsecond each.

use std::collections::HashSet;
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

/// Takes the code of the program and its libraries out of this process' memory, with the constants that lie before it;
/// what is used next is mapped again. Says how many bytes that are.
///
/// # Errors
/// `/proc/self/maps` cannot be read, or the kernel refuses.
pub fn unmap_code() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut all = 0;
    for (start, end) in unwritten(&maps) {
        let at = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the range is a private mapping of a file that may be read and perhaps run, and never was written: its
        // pages are the file's, and the file of a running program cannot be written to. Whoever comes to a page that was
        // let go of finds the same bytes.
        #[allow(unsafe_code)]
        unsafe { madvise(at, end - start, Advice::LinuxDontNeed) }?;
        all += end - start;
    }
    Ok(all)
}

/// One line of `/proc/self/maps` (proc(5)).
struct Mapping<'a> {
    range: (usize, usize),
    access: &'a str,
    offset: usize,
    file: &'a str,
}

/// The ranges of programs and libraries that nobody has written to: their code, and what lies before it. What comes after
/// is left alone, also where it can only be read: the loader has written to some of it before, and that would be lost.
fn unwritten(maps: &str) -> Vec<(usize, usize)> {
    let mappings: Vec<_> = maps.lines().filter_map(mapping).collect();
    let programs: HashSet<&str> = mappings.iter().filter(|m| m.access == "r-xp").map(|m| m.file).collect();
    let is_unwritten = |m: &&Mapping<'_>| match m.access {
        "r-xp" => true,
        "r--p" => m.offset == 0 && programs.contains(m.file),
        _ => false,
    };
    mappings.iter().filter(is_unwritten).map(|m| m.range).collect()
}

/// A mapping of a file.
fn mapping(line: &str) -> Option<Mapping<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let range = (number(start)?, number(end)?);
    let (access, offset) = (words.next()?, number(words.next()?)?);
    let file = words.nth(2).filter(|name| name.starts_with('/'))?;
    Some(Mapping { range, access, offset, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_written_is_let_go_of() {
        let maps = "\
            10000-20000 r--p 00000000 fe:00 1234                       /usr/bin/lambdalet\n\
            20000-30000 r-xp 00010000 fe:00 1234                       /usr/bin/lambdalet\n\
            30000-40000 r--p 00020000 fe:00 1234                       /usr/bin/lambdalet\n\
            40000-50000 rw-p 00030000 fe:00 1234                       /usr/bin/lambdalet\n\
            50000-60000 rw-p 00000000 00:00 0                          [heap]\n\
            60000-70000 r-xp 00000000 00:00 0\n\
            70000-80000 r--p 00000000 fe:00 1235                       /usr/share/data\n\
            80000-90000 rwxp 00000000 fe:00 1236                       /usr/lib/odd.so\n\
            90000-a0000 r-xp 00000000 00:00 0                          [vdso]\n\
            nonsense\n";
        assert_eq!(unwritten(maps), [(0x10000, 0x20000), (0x20000, 0x30000)]);
    }
}
