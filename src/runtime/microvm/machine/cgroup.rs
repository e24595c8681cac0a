//! The cgroup of one VMM, in that of its Pod: so the Pod's limits hold for the whole machine, and a VMM that runs wild
//! has bounds of its own.
//!
//! Both versions are served: v1 as one tree per controller below `/sys/fs/cgroup`, v2 as a single tree.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::process::END_PATIENCE;
use super::{MachineSpec, VmId};

const ROOT: &str = "/sys/fs/cgroup";
/// The v1 trees that a VMM has its place in.
const TREES: [&str; 6] = ["cpu", "cpuacct", "memory", "pids", "blkio", "freezer"];
/// Threads and processes of one VMM: far above what QEMU needs for vCPUs and disks, far below what hurts a host.
const MOST_TASKS: u64 = 256;
/// What a VMM may take besides the guest's memory: its own, page tables, and the translated code of TCG.
const OVERHEAD: u64 = 256 << 20;
/// CPUs that a VMM may keep busy besides those of its guest: with the work of its devices, which is one thread's in QEMU and
/// in Firecracker. What is less would slow a start down, of which nobody is to blame in the guest.
const OVERHEAD_CPUS: u64 = 1;
/// What a share of CPU time is counted in, in microseconds: the kernel's own default.
const CPU_PERIOD: u64 = 100_000;
/// What a shell whose standard output is a list of a cgroup's processes does first, to go on there with its errors as its
/// output. Before Linux 5.16 the kernel asks who writes and not who has opened the list, so this may fail: whoever has
/// started the shell moves it then.
const JOIN: &str = "{ echo 0 || :; } 2>/dev/null; exec >&2;";
/// A process just killed keeps its cgroup busy for a moment, on a busy host for longer: how long to wait for all of its
/// trees, and between two looks.
const RMDIR_PATIENCE: Duration = Duration::from_secs(1);
const RMDIR_PAUSE: Duration = Duration::from_millis(4);

/// How a shell begins, and what its output is, that is started by a thread which has [entered](VmCgroup::enter) its cgroup: with
/// the list, if there is one, it joins by itself and goes on with its errors as its output.
pub(super) fn joining(list: Option<File>, output: Stdio) -> (&'static str, Stdio) {
    list.map_or(("", output), |list| (JOIN, Stdio::from(list)))
}

/// The cgroup of one VMM.
#[derive(Clone, Debug)]
pub(super) struct VmCgroup {
    root: PathBuf,
    unified: bool,
    relative: PathBuf,
}

/// What a VMM is held to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Of the guest, in bytes; the VMM's own memory is added.
    pub(super) guest_memory: u64,
    /// Of the guest; those of the VMM itself are added.
    pub(super) vcpus: u32,
    /// The host's CPUs it may run on; `None`: all.
    pub(super) cpus: Option<Vec<u32>>,
    /// The NUMA node its memory comes from; `None`: any.
    pub(super) numa_node: Option<u32>,
}

impl Limits {
    /// Those of a machine.
    pub(super) fn of(spec: &MachineSpec) -> Self {
        let MachineSpec { memory, vcpus, numa_node, .. } = *spec;
        Self { guest_memory: memory, vcpus, cpus: spec.cpus.clone(), numa_node }
    }

    fn memory(&self) -> u64 {
        self.guest_memory + OVERHEAD
    }

    /// Microseconds of CPU time in each [`CPU_PERIOD`].
    fn cpu_time(&self) -> u64 {
        (u64::from(self.vcpus) + OVERHEAD_CPUS) * CPU_PERIOD
    }

    fn is_pinned(&self) -> bool {
        self.cpus.is_some() || self.numa_node.is_some()
    }
}

// === impl VmCgroup ===

impl VmCgroup {
    /// That of the machine, below `parent`.
    pub(super) fn of_host(parent: &str, id: &VmId) -> Self {
        Self::at(Path::new(ROOT), parent, id)
    }

    pub(super) fn at(root: &Path, parent: &str, id: &VmId) -> Self {
        // Nothing in it may lead out of the tree.
        let parts = parent.split('/').filter(|part| !matches!(*part, "" | "." | ".."));
        let mut relative: PathBuf = parts.collect();
        relative.push(format!("vmm-{id}"));
        Self { root: root.to_owned(), unified: root.join("cgroup.controllers").exists(), relative }
    }

    /// Makes it, with its limits. Doing it again is harmless.
    pub(super) fn make(&self, limits: &Limits) -> io::Result<()> {
        if self.unified { self.make_v2(limits) } else { self.make_v1(limits) }
    }

    fn make_v1(&self, limits: &Limits) -> io::Result<()> {
        for tree in TREES.into_iter().filter(|tree| self.root.join(tree).is_dir()) {
            fs::create_dir_all(self.root.join(tree).join(&self.relative))?;
        }
        let files = [("memory", "memory.limit_in_bytes", limits.memory()), ("pids", "pids.max", MOST_TASKS)];
        for (tree, file, value) in files {
            let directory = self.root.join(tree).join(&self.relative);
            if directory.is_dir() {
                fs::write(directory.join(file), value.to_string())?;
            }
        }
        self.make_v1_quota(limits)?;
        if limits.is_pinned() { self.make_v1_cpuset(limits) } else { Ok(()) }
    }

    fn make_v1_quota(&self, limits: &Limits) -> io::Result<()> {
        let directory = self.root.join("cpu").join(&self.relative);
        // A kernel without CFS bandwidth control has no such file. It can hold nobody to a share of time; that is no reason not
        // to run.
        if !directory.join("cpu.cfs_quota_us").exists() {
            return Ok(());
        }
        fs::write(directory.join("cpu.cfs_period_us"), CPU_PERIOD.to_string())?;
        match fs::write(directory.join("cpu.cfs_quota_us"), limits.cpu_time().to_string()) {
            // One above has less, and that holds for this one too.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    /// In v1 a set of CPUs is empty until it is written, that of each directory on the way too.
    fn make_v1_cpuset(&self, limits: &Limits) -> io::Result<()> {
        let mut directory = self.root.join("cpuset");
        for part in &self.relative {
            let above = directory.clone();
            directory.push(part);
            fs::create_dir_all(&directory)?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if fs::read_to_string(directory.join(file)).unwrap_or_default().trim().is_empty() {
                    fs::write(directory.join(file), fs::read_to_string(above.join(file))?.trim())?;
                }
            }
        }
        self.pin(&directory, limits)
    }

    fn make_v2(&self, limits: &Limits) -> io::Result<()> {
        let mut directory = self.root.clone();
        for part in &self.relative {
            for controller in ["+cpu", "+memory", "+pids", "+io", "+cpuset"] {
                // One that this host does not delegate is refused; a limit of it then fails below, with the file's name, but for
                // that of CPU time.
                let _ = fs::write(directory.join("cgroup.subtree_control"), controller);
            }
            directory.push(part);
            fs::create_dir_all(&directory)?;
        }
        fs::write(directory.join("memory.max"), limits.memory().to_string())?;
        fs::write(directory.join("pids.max"), MOST_TASKS.to_string())?;
        // Where the controller is not delegated, or the kernel is without CFS bandwidth control, there is no such file: nobody
        // is held to a share of time then, and that is no reason not to run.
        let quota = directory.join("cpu.max");
        if quota.exists() {
            fs::write(quota, format!("{} {CPU_PERIOD}", limits.cpu_time()))?;
        }
        self.pin(&directory, limits)
    }

    fn pin(&self, directory: &Path, limits: &Limits) -> io::Result<()> {
        if let Some(cpus) = &limits.cpus {
            let list: Vec<String> = cpus.iter().map(u32::to_string).collect();
            fs::write(directory.join("cpuset.cpus"), list.join(","))?;
        }
        if let Some(node) = limits.numa_node {
            fs::write(directory.join("cpuset.mems"), node.to_string())?;
        }
        Ok(())
    }

    /// Weighs the CPU time of its Pod, on the scale of v1; one right below the root is no Pod's, and has no weight.
    pub(super) fn weigh(&self, shares: u64) -> io::Result<()> {
        let Some(pod) = self.pod() else { return Ok(()) };
        let shares = shares.clamp(2, 262_144);
        if self.unified {
            // A straight line, as every runtime has it.
            let weight = 1 + (shares - 2) * 9_999 / 262_142;
            return fs::write(self.root.join(pod).join("cpu.weight"), weight.to_string());
        }
        let directory = self.root.join("cpu").join(pod);
        if directory.is_dir() { fs::write(directory.join("cpu.shares"), shares.to_string()) } else { Ok(()) }
    }

    /// That of its Pod, from the root. One right below the root is not a Pod's but the node's, in which others are made at
    /// any time.
    fn pod(&self) -> Option<&Path> {
        self.relative.parent().filter(|pod| pod.components().count() > 1)
    }

    /// Lets what this thread starts from now on begin in it, so that nobody's end leaves that elsewhere. In v1 this moves the
    /// thread. v2 keeps the threads of a process together: there this is the list of its processes, which a shell that is
    /// started with it [joins](joining) by itself.
    ///
    /// To move a whole process, as [`join`](Self::join) does, v1 waits for every processor to have passed a quiet state: some
    /// ten milliseconds.
    pub(super) fn enter(&self) -> io::Result<Option<File>> {
        if self.unified {
            return File::options().write(true).open(self.root.join(&self.relative).join("cgroup.procs")).map(Some);
        }
        self.write_each("tasks", "0").map(|()| None)
    }

    /// Moves a process into it.
    pub(super) fn join(&self, pid: i32) -> io::Result<()> {
        self.write_each("cgroup.procs", &pid.to_string())
    }

    /// The processes in it.
    pub(super) fn members(&self) -> Vec<i32> {
        let lists = self.directories().into_iter().map(|directory| directory.join("cgroup.procs"));
        let list = lists.filter_map(|list| fs::read_to_string(list).ok()).next().unwrap_or_default();
        list.lines().filter_map(|pid| pid.parse().ok()).filter(|pid| is_anothers(*pid)).collect()
    }

    /// Moves a process into it that was started by a thread which had [entered](Self::enter) it; it may be there already.
    pub(super) fn join_entered(&self, pid: i32) -> io::Result<()> {
        if self.unified { self.join(pid) } else { Ok(()) }
    }

    fn write_each(&self, file: &str, value: &str) -> io::Result<()> {
        for directory in self.directories() {
            if directory.is_dir() {
                fs::write(directory.join(file), value)?;
            }
        }
        Ok(())
    }

    /// Removes it, and its Pod's if that is empty then; waits for a process that has only just ended, for a second at the
    /// most. Removing what is not there is Ok.
    pub(super) async fn remove(&self) -> io::Result<()> {
        let cgroup = self.clone();
        tokio::task::spawn_blocking(move || cgroup.remove_here(Left::Spared)).await.map_err(io::Error::other)?
    }

    /// The same, and kills what runs in it: a VMM that nobody took over, and nobody will.
    pub(super) async fn end(&self) -> io::Result<()> {
        let cgroup = self.clone();
        tokio::task::spawn_blocking(move || cgroup.remove_here(Left::Killed)).await.map_err(io::Error::other)?
    }

    fn remove_here(&self, left: Left) -> io::Result<()> {
        let patience = if left == Left::Killed { END_PATIENCE } else { RMDIR_PATIENCE };
        let (directories, until) = (self.directories(), Instant::now() + patience);
        // All of them, whatever becomes of one: who comes back for the rest may not know of it.
        let removed: Vec<_> = directories.iter().map(|directory| remove(directory, left, until)).collect();
        removed.into_iter().collect::<io::Result<()>>()?;
        if self.pod().is_some() {
            for pod in directories.iter().filter_map(|directory| directory.parent()) {
                // It may hold another machine, or be gone.
                let _ = fs::remove_dir(pod);
            }
        }
        Ok(())
    }

    fn directories(&self) -> Vec<PathBuf> {
        if self.unified {
            return vec![self.root.join(&self.relative)];
        }
        TREES.iter().chain(&["cpuset"]).map(|tree| self.root.join(tree).join(&self.relative)).collect()
    }
}

/// What becomes of those in a cgroup that is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Spared,
    Killed,
}

fn remove(directory: &Path, left: Left, until: Instant) -> io::Result<()> {
    loop {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                if left == Left::Killed {
                    kill_all(directory);
                }
                thread::sleep(RMDIR_PAUSE);
            }
            done => return done,
        }
    }
}

/// One that could be meant: not of a process namespace that is not to be seen from here, which is listed as 0, nor this process,
/// a thread of which may be [in it](VmCgroup::enter) just now.
fn is_anothers(pid: i32) -> bool {
    pid > 0 && u32::try_from(pid) != Ok(std::process::id())
}

/// Whom no signal reaches keeps the cgroup busy, and that is told.
fn kill_all(directory: &Path) {
    let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let others = listed.lines().filter_map(|line| line.parse().ok()).filter(|pid| is_anothers(*pid));
    for pid in others.filter_map(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::runtime::kernel_v2;

    fn id() -> VmId {
        VmId::new("one").unwrap()
    }

    fn read(path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn v1_limits_stand_in_each_tree_and_a_set_of_cpus_is_handed_down() {
        let root = tempfile::tempdir().unwrap();
        for tree in ["cpu", "memory", "pids", "cpuset"] {
            fs::create_dir(root.path().join(tree)).unwrap();
        }
        fs::write(root.path().join("cpuset/cpuset.cpus"), "0-3\n").unwrap();
        fs::write(root.path().join("cpuset/cpuset.mems"), "0-1\n").unwrap();
        let cgroup = VmCgroup::at(root.path(), "/l/../pod1", &id());
        let limits = Limits { guest_memory: 1 << 20, vcpus: 2, cpus: Some(vec![1, 3]), numa_node: None };
        cgroup.make(&limits).unwrap();
        let quota = root.path().join("cpu/l/pod1/vmm-one/cpu.cfs_quota_us");
        assert!(!quota.exists(), "a kernel that has none refuses it");
        fs::write(&quota, "-1").unwrap();
        cgroup.make(&limits).unwrap();
        cgroup.join(42).unwrap();
        cgroup.weigh(512).unwrap();
        assert_eq!(read(root.path().join("cpu/l/pod1/cpu.shares")), "512");
        VmCgroup::at(root.path(), "l", &id()).weigh(512).unwrap();
        assert!(!root.path().join("cpu/l/cpu.shares").exists(), "that is the node's");
        let own = |tree: &str| root.path().join(tree).join("l/pod1/vmm-one");
        assert_eq!(read(own("memory").join("memory.limit_in_bytes")), (257 << 20).to_string());
        assert_eq!(read(own("pids").join("pids.max")), "256");
        assert_eq!(read(own("cpu").join("cpu.cfs_period_us")), "100000");
        assert_eq!(read(own("cpu").join("cpu.cfs_quota_us")), "300000", "two vCPUs and its own work");
        assert_eq!(read(own("cpuset").join("cpuset.cpus")), "1,3");
        assert_eq!(read(own("cpuset").join("cpuset.mems")), "0-1");
        assert_eq!(read(root.path().join("cpuset/l/cpuset.cpus")), "0-3");
        cgroup.enter().unwrap();
        cgroup.join_entered(43).unwrap();
        for tree in ["cpu", "memory", "pids", "cpuset"] {
            assert_eq!(read(own(tree).join("cgroup.procs")), "42", "{tree}");
            assert_eq!(read(own(tree).join("tasks")), "0", "{tree}");
        }
    }

    #[test]
    fn v2_limits_stand_in_one_directory() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        let cgroup = VmCgroup::at(root.path(), "l/pod1", &id());
        let limits = Limits { guest_memory: 0, vcpus: 1, cpus: None, numa_node: Some(1) };
        cgroup.make(&limits).unwrap();
        let quota = root.path().join("l/pod1/vmm-one/cpu.max");
        assert!(!quota.exists(), "a kernel that has none refuses it");
        fs::write(&quota, "max 100000").unwrap();
        cgroup.make(&limits).unwrap();
        cgroup.join(42).unwrap();
        cgroup.weigh(1024).unwrap();
        assert_eq!(read(root.path().join("l/pod1/cpu.weight")), "39");
        let own = root.path().join("l/pod1/vmm-one");
        assert_eq!(read(own.join("memory.max")), OVERHEAD.to_string());
        assert_eq!(read(own.join("pids.max")), "256");
        assert_eq!(read(own.join("cpu.max")), "200000 100000");
        assert_eq!(read(own.join("cpuset.mems")), "1");
        assert_eq!(read(own.join("cgroup.procs")), "42");
        cgroup.enter().unwrap();
        cgroup.join_entered(43).unwrap();
        assert_eq!(read(own.join("cgroup.procs")), "43");
        assert!(!own.join("tasks").exists() && !own.join("cpuset.cpus").exists());
    }

    #[test]
    fn version_2_of_a_kernel_holds_a_vmm_to_its_limits() {
        let Some(name) = kernel_v2::own_name() else { return };
        let cgroup = VmCgroup::of_host(&format!("{name}/pod"), &id());
        cgroup.make(&Limits { guest_memory: 64 << 20, vcpus: 2, cpus: Some(vec![0]), numa_node: None }).unwrap();
        let list = cgroup.enter().unwrap().unwrap();
        let pod = format!("{name}/pod");
        let own = format!("{pod}/vmm-one");
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &format!("{JOIN} echo there; exec sleep 1000")]).stdout(list).stderr(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        let mut there = [0; 6];
        child.stderr.as_mut().unwrap().read_exact(&mut there).unwrap();
        assert_eq!(kernel_v2::read(&own, "cgroup.procs"), child.id().to_string());
        cgroup.join_entered(child.id().try_into().unwrap()).unwrap();
        assert_eq!(kernel_v2::read(&own, "cpu.max"), "300000 100000");
        cgroup.weigh(512).unwrap();
        assert_eq!(kernel_v2::read(&pod, "cpu.weight"), "20");
        assert_eq!(kernel_v2::read(&own, "memory.max"), ((64 << 20) + OVERHEAD).to_string());
        assert_eq!(
            (kernel_v2::read(&own, "pids.max"), kernel_v2::read(&own, "cpuset.cpus")),
            ("256".into(), "0".into())
        );
        assert!(cgroup.remove_here(Left::Spared).is_err(), "it is in use");
        let reaper = thread::spawn(move || child.wait().unwrap());
        cgroup.remove_here(Left::Killed).unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(!kernel_v2::directory(&pod).exists());
        fs::remove_dir(kernel_v2::directory(&name)).unwrap();
    }

    #[test]
    fn removing_what_is_not_there_is_fine() {
        let root = tempfile::tempdir().unwrap();
        VmCgroup::at(root.path(), "l", &id()).remove_here(Left::Spared).unwrap();
        VmCgroup::at(root.path(), "l", &id()).remove_here(Left::Killed).unwrap();
    }
}
