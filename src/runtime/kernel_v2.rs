//! For tests of what is read from and written to cgroups of version 2: the kernel's own, on hosts that have them. Where this
//! host does not, `qemu::tests::in_guest` runs these tests in a guest.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Set where a test must not be skipped.
const NEEDED: &str = "LAMBDALET_TEST_CGROUP_V2";

/// A name for a cgroup right below the root, which hands all that is used here down; `None`, told, if this kernel has none.
pub(crate) fn own_name() -> Option<String> {
    let root = Path::new("/sys/fs/cgroup");
    let told = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let is_there = |wanted: &&str| told.split_whitespace().any(|controller| controller == *wanted);
    let controllers = ["cpu", "cpuset", "memory", "pids"];
    if !controllers.iter().all(is_there) || !nix::unistd::geteuid().is_root() {
        assert!(env::var_os(NEEDED).is_none(), "needs root and cgroup v2, which has {told:?}");
        println!("skipped: needs root and cgroup v2 with its controllers");
        return None;
    }
    for controller in controllers {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    }
    Some(format!("lambdalet-test-{:08x}", rand::random::<u32>()))
}

pub(crate) fn directory(path: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'))
}

pub(crate) fn read(path: &str, file: &str) -> String {
    fs::read_to_string(directory(path).join(file)).unwrap().trim().to_owned()
}

/// A process that runs the script in that cgroup, and ends once it has read one more line, or the end, after it.
pub(crate) fn run_in(path: &str, script: &str) -> Child {
    let text = format!("read go; {script}");
    let mut command = Command::new("sh");
    command.args(["-c", &text]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    fs::write(directory(path).join("cgroup.procs"), child.id().to_string()).unwrap();
    child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    child
}
