//! The process of an exec, found by its being new: CRI tells neither when a command runs nor which process it is.
//!
//! An OCI runtime starts it in a session of its own, in the container's cgroup, and as a child of something outside. So it
//! is the leader of a session that was not there before, whose parent is neither in the container nor in the Pod (where
//! the containers of a Pod see each other's processes, its sandbox inherits daemons); and it runs once it is not the OCI
//! runtime's own program any more. Execs of one container are started one after the other, so that each finds its own.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use crate::runtime::cgroup::Cgroups;

/// What an OCI runtime calls itself until it has become the command.
const STARTING: [&str; 3] = ["runc", "crun", "youki"];

/// A process as `/proc/PID/stat` has it.
#[derive(Debug, PartialEq, Eq)]
struct Stat<'a> {
    name: &'a str,
    parent: i32,
    session: i32,
}

/// The leaders among the processes of a cgroup, those that are still being started left out.
pub(super) fn leaders(cgroups: &Cgroups, cgroup: &Path) -> HashSet<i32> {
    let processes = cgroups.processes(cgroup);
    let members: HashSet<i32> = processes.iter().copied().collect();
    let host = namespace("self");
    let leads = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let stat = parse(&stat)?;
        let starting = STARTING.iter().any(|name| stat.name == *name || stat.name.starts_with(&format!("{name}:")));
        if stat.session != *pid || members.contains(&stat.parent) || starting {
            return None;
        }
        let own = namespace(pid);
        Some(own == host || own != namespace(stat.parent))
    };
    processes.into_iter().filter(|pid| leads(pid).unwrap_or(false)).collect()
}

/// The process namespace of a process, by a name that no other has; `None` if it has ended.
fn namespace(pid: impl Display) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// `None` for what has ended (a zombie) and for what is no such line.
fn parse(stat: &str) -> Option<Stat<'_>> {
    let (_, rest) = stat.split_once('(')?;
    // The name may hold anything, brackets too.
    let (name, fields) = rest.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Stat { name, parent, session })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whatever_the_name_is() {
        assert_eq!(parse("7 (a) b) S 1 2 7 4 5"), Some(Stat { name: "a) b", parent: 1, session: 7 }));
        assert_eq!(parse("7 (sh) Z 1 2 7 4 5"), None);
        assert_eq!(parse("7 (sh"), None);
    }
}
