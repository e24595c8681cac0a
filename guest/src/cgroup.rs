//! cgroups of the guest (v2): one for the agent, one for the Pod, below it one per container.
//!
//! The format of each file is in the kernel's `Documentation/admin-guide/cgroup-v2.rst`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use lambdalet_proto::agent::v1::{Resources, Usage};

use crate::tree;

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own.
const AGENT: &str = "agent";
/// All containers.
const POD: &str = "pod";
/// The kernel's default weight; the most is 10000.
const AGENT_WEIGHT: &str = "10000";
/// How long a cgroup may take to freeze, or to be empty once it was killed.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

/// The hierarchy.
#[derive(Debug)]
pub(crate) struct Cgroups {
    root: PathBuf,
    /// On a host whose controllers are elsewhere (tests), limits are left out.
    lenient: bool,
}

impl Cgroups {
    /// The guest's own; `lenient` in tests on a host.
    pub(crate) fn new(root: Option<PathBuf>, lenient: bool) -> Self {
        Self { root: root.unwrap_or_else(|| ROOT.into()), lenient }
    }

    /// Where all of them are.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Takes all of them away again, from a host.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn forget(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(POD))?.flatten().filter(|entry| entry.path().is_dir()) {
            self.remove(&entry.file_name().to_string_lossy())?;
        }
        if let Some(above) = self.root.parent() {
            fs::write(above.join("cgroup.procs"), std::process::id().to_string())?;
        }
        tree::remove_cgroups(&self.root)
    }

    /// Makes the agent's and the Pod's.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        self.delegate(&self.root)?;
        let (agent, pod) = (self.root.join(AGENT), self.root.join(POD));
        make(&agent)?;
        make(&pod)?;
        fs::write(agent.join("cgroup.procs"), std::process::id().to_string())?;
        self.set(&agent, "cpu.weight", AGENT_WEIGHT)?;
        self.delegate(&pod)
    }

    fn delegate(&self, parent: &Path) -> io::Result<()> {
        for controller in ["cpu", "memory", "pids"] {
            match fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")) {
                Err(error) if !self.lenient => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The limits of all containers together.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn limit_pod(&self, resources: &Resources) -> io::Result<()> {
        self.limit(&self.root.join(POD), resources)
    }

    /// Makes a container's.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn create(&self, id: &str, resources: &Resources) -> io::Result<()> {
        let path = self.path(id);
        make(&path)?;
        // One process that is killed for want of memory takes its container along, as elsewhere in Kubernetes.
        self.set(&path, "memory.oom.group", "1")?;
        self.limit(&path, resources)
    }

    /// Gives a container other limits.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn update(&self, id: &str, resources: &Resources) -> io::Result<()> {
        self.limit(&self.path(id), resources)
    }

    fn limit(&self, path: &Path, resources: &Resources) -> io::Result<()> {
        let or_max = |value: u64| if value == 0 { "max".to_owned() } else { value.to_string() };
        let period = if resources.cpu_period_us == 0 { 100_000 } else { resources.cpu_period_us };
        if resources.cpu_weight > 0 {
            self.set(path, "cpu.weight", &resources.cpu_weight.to_string())?;
        }
        self.set(path, "cpu.max", &format!("{} {period}", or_max(resources.cpu_quota_us)))?;
        self.set(path, "memory.max", &or_max(resources.memory_bytes))?;
        self.set(path, "pids.max", &or_max(resources.pids))
    }

    fn set(&self, path: &Path, file: &str, value: &str) -> io::Result<()> {
        let path = path.join(file);
        if self.lenient && !path.exists() {
            return Ok(());
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{} = {value}: {error}", path.display()));
        fs::write(&path, value).map_err(named)
    }

    /// Where a container's is.
    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.root.join(POD).join(id)
    }

    /// Kills every process of a container, also a frozen one.
    pub(crate) fn kill(&self, id: &str) {
        // One that is gone has none.
        let _ = fs::write(self.path(id).join("cgroup.kill"), "1");
    }

    /// Freezes or thaws a container, and waits until that is so.
    ///
    /// # Errors
    /// It takes too long.
    pub(crate) fn freeze(&self, id: &str, frozen: bool) -> io::Result<()> {
        let path = self.path(id);
        fs::write(path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        let done = || field(&path, "cgroup.events", "frozen").is_none_or(|now| (now == 1) == frozen);
        wait(done)
    }

    /// Removes a container's once its processes are gone.
    ///
    /// # Errors
    /// They do not go.
    pub(crate) fn remove(&self, id: &str) -> io::Result<()> {
        let path = self.path(id);
        if !path.exists() {
            return Ok(());
        }
        self.kill(id);
        wait(|| field(&path, "cgroup.events", "populated") != Some(1))?;
        // A privileged container may have made some of its own below.
        tree::remove_cgroups(&path)
    }

    /// How often the kernel killed in a container for want of memory.
    pub(crate) fn oom_kills(&self, id: &str) -> u64 {
        field(&self.path(id), "memory.events", "oom_kill").unwrap_or(0)
    }

    /// What a container uses; all of them together for `None`.
    pub(crate) fn usage(&self, id: Option<&str>) -> Usage {
        let path = id.map_or_else(|| self.root.join(POD), |id| self.path(id));
        let cpu = |name| field(&path, "cpu.stat", name).unwrap_or(0);
        let memory = |name| field(&path, "memory.stat", name).unwrap_or(0);
        Usage {
            cpu_ns: cpu("usage_usec") * 1000,
            cpu_user_ns: cpu("user_usec") * 1000,
            cpu_system_ns: cpu("system_usec") * 1000,
            cpu_periods: cpu("nr_periods"),
            cpu_throttled_periods: cpu("nr_throttled"),
            cpu_throttled_ns: cpu("throttled_usec") * 1000,
            memory: number(&path, "memory.current"),
            memory_inactive_file: memory("inactive_file"),
            memory_anon: memory("anon"),
            memory_file: memory("file"),
            memory_mapped: memory("file_mapped"),
            memory_peak: number(&path, "memory.peak"),
            memory_failures: field(&path, "memory.events", "max").unwrap_or(0),
            page_faults: memory("pgfault"),
            major_page_faults: memory("pgmajfault"),
            tasks: number(&path, "pids.current"),
        }
    }
}

/// Makes a directory that may be there.
fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn wait(done: impl Fn() -> bool) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done() {
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn number(path: &Path, file: &str) -> u64 {
    fs::read_to_string(path.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// The value in a line `name value`.
fn field(path: &Path, file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path.join(file)).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}
