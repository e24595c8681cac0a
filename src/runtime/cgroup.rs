//! The cgroup of a Pod: made before its sandbox starts, removed with it.
//!
//! Engines make and remove the cgroups of containers; the one above them, which holds the Pod to its sum, is ours.
//! Both cgroup versions are served: v1 as one tree per controller below `/sys/fs/cgroup`, v2 as a single tree.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::runtime::types::{CgroupDriver, Resources};

/// Where the host's cgroup file systems are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// A Pod's cgroup lies at most so far below the node's: in that of its class.
const POD_LEVEL: u32 = 2;
/// A process just killed keeps its cgroup busy for a moment: how often and how long to wait for it.
const RMDIR_TRIES: u32 = 20;
const RMDIR_PAUSE: Duration = Duration::from_millis(10);
/// A process that is in the kernel is frozen when it leaves it: how often and how long to wait for that.
const FREEZE_TRIES: u32 = 500;
const FREEZE_PAUSE: Duration = Duration::from_millis(10);

/// Removes the cgroup above those of every Pod, for a node that leaves this host with every Pod ended.
///
/// # Errors
/// A process still runs in it.
pub fn remove_cgroup_root(name: &str) -> io::Result<()> {
    // Whichever way an engine names them: the other one finds nothing.
    [false, true].into_iter().try_for_each(|systemd| Cgroups::of_host(systemd).remove(name))
}

/// The same for a node that leaves its Pods running: only if there is none.
///
/// # Errors
/// The kernel's refusal, for another reason than that Pods are there.
pub fn remove_empty_cgroup_root(name: &str) -> io::Result<()> {
    [false, true].into_iter().try_for_each(|systemd| Cgroups::of_host(systemd).remove_if_empty(name))
}

/// The host's cgroups, as an engine uses them.
#[derive(Clone, Debug)]
pub(super) struct Cgroups {
    root: PathBuf,
    unified: bool,
    systemd: bool,
}

impl Cgroups {
    /// The host's own. `systemd` is whether the engine asks systemd for cgroups (its "cgroup driver").
    pub(super) fn of_host(systemd: bool) -> Self {
        Self::at(Path::new(ROOT), systemd)
    }

    fn at(root: &Path, systemd: bool) -> Self {
        Self { root: root.into(), unified: root.join("cgroup.controllers").exists(), systemd }
    }

    /// How the engine names them.
    pub(super) fn driver(&self) -> CgroupDriver {
        if self.systemd { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs }
    }

    /// What the engine wants as the parent of a container's cgroup.
    pub(super) fn engine_parent(&self, path: &str) -> String {
        if self.systemd { slices(path).pop().unwrap_or_default() } else { path.to_owned() }
    }

    /// Where Docker puts a container, below each tree's root.
    pub(super) fn container(&self, parent: &str, id: &str) -> PathBuf {
        self.relative(parent).join(if self.systemd { format!("docker-{id}.scope") } else { id.to_owned() })
    }

    /// Where the cgroup is that an OCI spec names (`linux.cgroupsPath`), below each tree's root: a path, or
    /// `slice:prefix:name` for systemd.
    pub(super) fn of_spec(&self, path: &str) -> PathBuf {
        let mut words = path.split(':');
        let (Some(slice), Some(prefix), Some(name), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return parts(path).collect();
        };
        let mut relative = PathBuf::new();
        // A slice lies in those that its name begins with.
        let ends = slice.match_indices('-').map(|(at, _)| at).chain([slice.len().saturating_sub(".slice".len())]);
        relative.extend(ends.filter_map(|end| Some(format!("{}.slice", slice.get(..end)?))));
        relative.join(format!("{prefix}-{name}.scope"))
    }

    /// The processes in it, itself and not those below; none if there is no such cgroup.
    pub(super) fn processes(&self, relative: &Path) -> Vec<i32> {
        let tree = if self.unified { self.root.clone() } else { self.root.join("memory") };
        let listed = fs::read_to_string(tree.join(relative).join("cgroup.procs")).unwrap_or_default();
        listed.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills what runs in it and below it. The root of the tree is no cgroup of anybody's, so nothing is killed there.
    pub(super) fn kill(&self, relative: &Path) {
        if relative.as_os_str().is_empty() {
            return;
        }
        let tree = if self.unified { self.root.clone() } else { self.root.join("memory") };
        for entry in fs::read_dir(tree.join(relative)).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|found| found.is_dir()) {
                self.kill(&relative.join(entry.file_name()));
            }
        }
        for pid in self.processes(relative) {
            // It may have ended since.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Whether its processes are frozen.
    pub(super) fn is_frozen(&self, relative: &Path) -> bool {
        let (file, frozen, _) = self.freezer(relative);
        fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line == frozen))
    }

    /// Freezes its processes, or thaws them, and waits until they are.
    pub(super) fn set_frozen(&self, relative: &Path, frozen: bool) -> io::Result<()> {
        let (_, _, file) = self.freezer(relative);
        let words = if self.unified { ["0", "1"] } else { ["THAWED", "FROZEN"] };
        fs::write(file, words[usize::from(frozen)])?;
        for _ in 0..FREEZE_TRIES {
            if self.is_frozen(relative) == frozen {
                return Ok(());
            }
            std::thread::sleep(FREEZE_PAUSE);
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// The file that tells its state, the line there that says "frozen", and the file that changes it.
    fn freezer(&self, relative: &Path) -> (PathBuf, &'static str, PathBuf) {
        if self.unified {
            let directory = self.root.join(relative);
            return (directory.join("cgroup.events"), "frozen 1", directory.join("cgroup.freeze"));
        }
        let file = self.root.join("freezer").join(relative).join("freezer.state");
        (file.clone(), "FROZEN", file)
    }

    /// The directory below each tree's root.
    pub(super) fn relative(&self, path: &str) -> PathBuf {
        if self.systemd { slices(path).into_iter().collect() } else { parts(path).collect() }
    }

    /// Makes the cgroup and sets its limits. Doing it again is harmless.
    pub(super) fn ensure(&self, path: &str, limits: &Resources) -> io::Result<()> {
        let relative = self.relative(path);
        if relative.as_os_str().is_empty() {
            return Ok(());
        }
        if self.unified { self.ensure_v2(&relative, limits) } else { self.ensure_v1(&relative, limits) }
    }

    fn ensure_v1(&self, relative: &Path, limits: &Resources) -> io::Result<()> {
        let files = [
            ("cpu", "cpu.shares", limits.cpu_shares),
            // The period first: a quota is checked against it.
            ("cpu", "cpu.cfs_period_us", limits.cpu_quota.and(limits.cpu_period)),
            ("cpu", "cpu.cfs_quota_us", limits.cpu_quota),
            ("memory", "memory.limit_in_bytes", limits.memory_limit),
            ("pids", "pids.max", limits.pids_limit),
        ];
        for (controller, file, value) in files {
            let tree = self.root.join(controller);
            if !tree.is_dir() {
                continue;
            }
            let directory = tree.join(relative);
            fs::create_dir_all(&directory)?;
            if let Some(value) = value {
                fs::write(directory.join(file), value.to_string())?;
            }
        }
        // What is made below takes this over.
        without_swap(&self.root.join("memory").join(relative).join("memory.swappiness"))
    }

    fn ensure_v2(&self, relative: &Path, limits: &Resources) -> io::Result<()> {
        let mut directory = self.root.clone();
        for part in relative {
            for controller in ["+cpu", "+memory", "+pids"] {
                // One that this host does not delegate is refused; its limit then fails below, with the file's name.
                let _ = fs::write(directory.join("cgroup.subtree_control"), controller);
            }
            directory.push(part);
            fs::create_dir_all(&directory)?;
        }
        let period = limits.cpu_period.unwrap_or(100_000);
        let files = [
            ("cpu.weight", limits.cpu_shares.map(|shares| weight(shares).to_string())),
            ("cpu.max", limits.cpu_quota.map(|quota| format!("{quota} {period}"))),
            ("memory.max", limits.memory_limit.map(|bytes| bytes.to_string())),
            ("pids.max", limits.pids_limit.map(|most| most.to_string())),
        ];
        for (file, value) in files {
            if let Some(value) = value {
                fs::write(directory.join(file), value)?;
            }
        }
        without_swap(&directory.join("memory.swap.max"))
    }

    /// Removes the cgroup and those below it, in every tree. What is gone already is fine.
    pub(super) fn remove(&self, path: &str) -> io::Result<()> {
        self.directories(path)?.iter().try_for_each(|directory| remove_tree(directory))
    }

    /// Removes the cgroups of Pods and of classes of Pods below the cgroup that nothing is in, and then the cgroup itself
    /// if nothing is left in it: neither a process nor another cgroup.
    pub(super) fn remove_if_empty(&self, path: &str) -> io::Result<()> {
        self.directories(path)?.iter().try_for_each(|directory| remove_unused(directory, POD_LEVEL))
    }

    /// Where the cgroup is, or would be.
    fn directories(&self, path: &str) -> io::Result<Vec<PathBuf>> {
        let relative = self.relative(path);
        if relative.as_os_str().is_empty() {
            return Ok(Vec::new());
        }
        if self.unified {
            return Ok(vec![self.root.join(relative)]);
        }
        fs::read_dir(&self.root)?.map(|tree| Ok(tree?.path().join(&relative))).collect()
    }
}

/// A Pod gets none of the host's swap (`NoSwap`). A kernel that does not count swap has no such file.
fn without_swap(file: &Path) -> io::Result<()> {
    if file.exists() { fs::write(file, "0") } else { Ok(()) }
}

/// The components of a cgroup path; nothing in it may lead out of the tree.
fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != "." && *part != "..")
}

/// systemd's names for each level of a path: a slice carries the names of those it is in, joined by dashes, so a dash
/// inside a name has to go (kubelet writes `_` too).
fn slices(path: &str) -> Vec<String> {
    let mut name = String::new();
    parts(path)
        .map(|part| {
            if !name.is_empty() {
                name.push('-');
            }
            name.push_str(&part.replace('-', "_"));
            format!("{name}.slice")
        })
        .collect()
}

/// cpu.weight (1 to 10000) for v1 shares (2 to 262144), as runc converts them.
fn weight(shares: i64) -> i64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// Removes what nothing is in, the lowest of so many levels first.
fn remove_unused(directory: &Path, levels: u32) -> io::Result<()> {
    if let Some(levels) = levels.checked_sub(1) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_unused(&entry.path(), levels)?;
            }
        }
    }
    remove_unless_used(directory)
}

fn remove_unless_used(directory: &Path) -> io::Result<()> {
    use io::ErrorKind::{DirectoryNotEmpty, NotADirectory, NotFound, ResourceBusy};
    match fs::remove_dir(directory) {
        Err(error) if matches!(error.kind(), DirectoryNotEmpty | NotADirectory | NotFound | ResourceBusy) => Ok(()),
        done => done,
    }
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    let mut tries = 0;
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < RMDIR_TRIES => tries += 1,
            Err(error) => return Err(error),
        }
        std::thread::sleep(RMDIR_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::kernel_v2;

    #[test]
    fn a_path_becomes_nested_slices() {
        assert_eq!(
            slices("/lambdalet-1a/burstable/pod12-34"),
            ["lambdalet_1a.slice", "lambdalet_1a-burstable.slice", "lambdalet_1a-burstable-pod12_34.slice"]
        );
    }

    #[test]
    fn a_cgroup_is_found_by_what_its_spec_says() {
        let cgroups = Cgroups::at(Path::new("/none"), false);
        assert_eq!(cgroups.of_spec("/l/pod1/c1"), Path::new("l/pod1/c1"));
        let scope = cgroups.of_spec("l_1-burstable-podx.slice:cri-containerd:c1");
        let wanted = "l_1.slice/l_1-burstable.slice/l_1-burstable-podx.slice/cri-containerd-c1.scope";
        assert_eq!(scope, Path::new(wanted));
    }

    #[test]
    fn a_path_cannot_climb_out_of_the_tree() {
        assert_eq!(parts("/../a/./b").collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn shares_map_onto_the_whole_range_of_weights() {
        assert_eq!((weight(2), weight(1024), weight(262_144), weight(0)), (1, 39, 10_000, 1));
    }

    #[test]
    fn version_2_of_a_kernel_holds_a_pod_to_its_limits() {
        let Some(name) = kernel_v2::own_name() else { return };
        let cgroups = Cgroups::of_host(false);
        let path = format!("/{name}/pod");
        let limits = Resources {
            cpu_shares: Some(512),
            cpu_quota: Some(50_000),
            cpu_period: Some(100_000),
            memory_limit: Some(32 << 20),
            pids_limit: Some(8),
            ..Resources::default()
        };
        cgroups.ensure(&path, &limits).unwrap();
        cgroups.ensure(&path, &limits).unwrap();
        let read = |file: &str| kernel_v2::read(&path, file);
        assert_eq!((read("cpu.weight"), read("cpu.max")), (weight(512).to_string(), "50000 100000".to_owned()));
        assert_eq!((read("memory.max"), read("pids.max")), ((32 << 20).to_string(), "8".to_owned()));
        let child = kernel_v2::run_in(&path, "x=$(head -c 60000000 /dev/zero | tr '\\0' x)");
        child.wait_with_output().unwrap();
        let killed = |line: &str| line.strip_prefix("oom_kill ").is_some_and(|count| count != "0");
        assert!(read("memory.events").lines().any(killed), "{}", read("memory.events"));
        let forks = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 60 & done; read end";
        let child = kernel_v2::run_in(&path, forks);
        let begun = std::time::Instant::now();
        while read("pids.events") == "max 0" {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", read("pids.current"));
            std::thread::sleep(RMDIR_PAUSE);
        }
        fs::write(kernel_v2::directory(&path).join("cgroup.kill"), "1").unwrap();
        child.wait_with_output().unwrap();
        cgroups.remove(&name).unwrap();
        assert!(!kernel_v2::directory(&name).exists());
    }

    #[test]
    fn what_is_left_in_a_cgroup_is_killed_and_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let mut children = ["memory/l/pod1/c1", "memory/l/pod2", "memory"].map(|place| {
            let child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let directory = root.path().join(place);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
            child
        });
        let cgroups = Cgroups::at(root.path(), false);
        cgroups.kill(&cgroups.relative("/"));
        cgroups.kill(&cgroups.relative("/l/pod1"));
        assert!(!children[0].wait().unwrap().success());
        for child in &mut children[1..] {
            assert_eq!(child.try_wait().unwrap(), None, "it is another's");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn what_holds_no_pod_goes_and_what_holds_one_stays() {
        let root = tempfile::tempdir().unwrap();
        for path in ["cpu/l/besteffort/pod2", "cpu/l/burstable", "cpu/l/pod3", "memory/l/burstable/pod1/container"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let cgroups = Cgroups::at(root.path(), false);
        cgroups.remove_if_empty("l").unwrap();
        cgroups.remove_if_empty("l").unwrap();
        assert!(!root.path().join("cpu/l").exists());
        assert!(root.path().join("memory/l/burstable/pod1/container").exists());
    }

    #[test]
    fn v1_limits_are_written_in_their_trees_and_removed_from_all() {
        let root = tempfile::tempdir().unwrap();
        for tree in ["cpu", "memory", "pids", "freezer"] {
            fs::create_dir(root.path().join(tree)).unwrap();
        }
        let cgroups = Cgroups::at(root.path(), false);
        let limits = Resources { cpu_shares: Some(512), memory_limit: Some(1 << 20), ..Resources::default() };
        fs::create_dir_all(root.path().join("memory/l/pod1")).unwrap();
        fs::write(root.path().join("memory/l/pod1/memory.swappiness"), "60").unwrap();
        cgroups.ensure("/l/pod1", &limits).unwrap();
        let swappiness = root.path().join("memory/l/pod1/memory.swappiness");
        assert_eq!(fs::read_to_string(&swappiness).unwrap(), "0", "no swap for Pods");
        fs::remove_file(swappiness).unwrap();
        cgroups.ensure("/l/pod1", &limits).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!(read("cpu/l/pod1/cpu.shares"), "512");
        assert_eq!(read("memory/l/pod1/memory.limit_in_bytes"), "1048576");
        // An ordinary file system keeps the files that a cgroup would take with it.
        fs::remove_file(root.path().join("cpu/l/pod1/cpu.shares")).unwrap();
        fs::remove_file(root.path().join("memory/l/pod1/memory.limit_in_bytes")).unwrap();
        fs::create_dir_all(root.path().join("freezer/l/pod1/child")).unwrap();
        cgroups.remove("/l/pod1").unwrap();
        cgroups.remove("/l/pod1").unwrap();
        for tree in ["cpu", "memory", "pids", "freezer"] {
            assert!(!root.path().join(tree).join("l/pod1").exists(), "{tree}");
        }
    }
}
