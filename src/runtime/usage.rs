//! What a cgroup uses, read from the kernel's files: cgroup v1 (a tree per controller) and v2 (one tree).
//!
//! A file that is missing or says something else makes its figure `None`; a cgroup that is gone has none at all. The
//! kernel documents them in `cgroup-v1/memory.rst`, `cgroup-v1/cpuacct.rst` and `cgroup-v2.rst`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use jiff::Timestamp;
use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::stats::{CpuUsage, Interface, Limits, MemoryUsage, StatsScope, Traffic, Usage};

/// Where the host's cgroup file systems are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// v1 writes "no limit" as the largest multiple of the page size; anything this large is none.
const NO_LIMIT: u64 = 1 << 62;
/// Bytes of a cgroup file read at once; `memory.stat`, the longest, has about two thousand.
const LARGEST: usize = 8 << 10;
const NANOSECONDS_PER_MICROSECOND: u64 = 1_000;
/// Threads that read at once, and the cgroups from which on one is worth starting.
const MOST_READERS: usize = 4;
const WORTH_A_THREAD: usize = 32;
/// The files that all but the most curious look read.
const KEPT: [&str; 9] = [
    "cpuacct.usage",
    "memory.usage_in_bytes",
    "memory.limit_in_bytes",
    "memory.stat",
    "memory.current",
    "memory.swap.current",
    "memory.max",
    "cpu.stat",
    "pids.current",
];
/// Of the files this process may have open at once, the part that is spent so.
const PART_KEPT: u64 = 4;

/// The host's cgroup trees.
#[derive(Clone, Debug)]
pub struct Trees {
    root: PathBuf,
    unified: bool,
    /// v1: nanoseconds in a clock tick.
    tick: u64,
    /// One for each cgroup whose files may stay open.
    places: Arc<Semaphore>,
}

/// A cgroup that is looked at again and again. Its files stay open from one look to the next, for to open one takes the kernel
/// five times as long as to read it; they are closed with this.
#[derive(Debug)]
pub struct Watched {
    path: PathBuf,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    files: Opened,
    /// Without one no file stays open.
    place: Option<OwnedSemaphorePermit>,
}

/// Files of one cgroup, by name.
type Opened = Vec<(&'static str, File)>;

impl Watched {
    /// The cgroup at `path`, relative to the trees' roots.
    pub fn at(path: PathBuf) -> Self {
        Self { path, kept: Mutex::default() }
    }

    /// Where it is, relative to the trees' roots.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Trees {
    /// The host's own.
    pub fn of_host() -> Self {
        Self::at(Path::new(ROOT))
    }

    /// Those mounted below `root`.
    pub fn at(root: &Path) -> Self {
        let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        let tick = 1_000_000_000 / u64::try_from(hertz).unwrap_or(100).max(1);
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let places = usize::try_from(files / PART_KEPT).unwrap_or(usize::MAX) / KEPT.len();
        let places = Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS)));
        let unified = root.join("cgroup.controllers").exists();
        Self { root: root.into(), unified, tick, places }
    }

    /// What the cgroup uses, `path` being relative to the trees' roots (empty for the root itself, which stands for the
    /// whole host). `None` if there is no such cgroup.
    pub fn usage(&self, path: &Path, scope: StatsScope) -> Option<Usage> {
        self.reader().usage(path, scope)
    }

    /// What each of these cgroups uses, in their order; `None` for those that are gone.
    pub fn usages(&self, cgroups: &[&Watched], scope: StatsScope) -> Vec<Option<Usage>> {
        in_parts(cgroups, |part| {
            let mut reader = self.reader();
            part.iter().map(|cgroup| reader.watched(cgroup, scope)).collect()
        })
    }

    fn reader(&self) -> Reader<'_> {
        Reader { trees: self, text: vec![0; LARGEST], file: PathBuf::new(), open: Vec::new() }
    }

    /// Whether there is such a cgroup.
    pub fn exists(&self, path: &Path) -> bool {
        self.directory("cpuacct", path).is_dir()
    }

    fn directory(&self, controller: &str, path: &Path) -> PathBuf {
        if self.unified { self.root.join(path) } else { self.root.join(controller).join(path) }
    }
}

/// Reads cgroups' files into one buffer.
#[derive(Debug)]
struct Reader<'t> {
    trees: &'t Trees,
    text: Vec<u8>,
    file: PathBuf,
    /// Files of the cgroup that is being read.
    open: Opened,
}

impl Reader<'_> {
    fn watched(&mut self, cgroup: &Watched, scope: StatsScope) -> Option<Usage> {
        // A reader that panics leaves no more than fewer files.
        let mut kept = cgroup.kept.lock().unwrap_or_else(PoisonError::into_inner);
        self.open = std::mem::take(&mut kept.files);
        let usage = self.usage(&cgroup.path, scope);
        let mut files = std::mem::take(&mut self.open);
        kept.place = kept.place.take().or_else(|| Arc::clone(&self.trees.places).try_acquire_owned().ok());
        kept.place.take_if(|_| usage.is_none());
        if kept.place.is_some() {
            files.retain(|(name, _)| KEPT.contains(name));
            kept.files = files;
        }
        usage
    }

    fn usage(&mut self, path: &Path, scope: StatsScope) -> Option<Usage> {
        let (cpu, memory) = (self.cpu(path, scope), self.memory(path, scope));
        if cpu.is_none() && memory.is_none() {
            return None;
        }
        let tasks = scope >= StatsScope::Usage;
        Some(Usage {
            time: Timestamp::now(),
            cpu,
            memory,
            tasks: tasks.then(|| self.number("pids", path, "pids.current")).flatten(),
            limits: match scope {
                StatsScope::CpuAndMemory => None,
                StatsScope::Containers | StatsScope::Usage => {
                    Some(Limits { memory: self.memory_limit(path), ..Limits::default() })
                }
                StatsScope::All => Some(self.limits(path)),
            },
        })
    }

    fn read(&mut self, controller: &str, path: &Path, name: &'static str) -> Option<&str> {
        let place = self.open.iter().position(|(open, _)| *open == name);
        // One that was kept is of no use if its cgroup was made anew.
        let length = place.and_then(|place| whole(&self.open[place].1, &mut self.text).ok());
        let length = match length {
            Some(length) => length,
            None => {
                self.file.clear();
                self.file.push(&self.trees.root);
                if !self.trees.unified {
                    self.file.push(controller);
                }
                self.file.push(path);
                self.file.push(name);
                let file = File::open(&self.file).ok()?;
                let length = whole(&file, &mut self.text).ok()?;
                self.open.retain(|(open, _)| *open != name);
                self.open.push((name, file));
                length
            }
        };
        std::str::from_utf8(&self.text[..length]).ok()
    }

    fn number(&mut self, controller: &str, path: &Path, file: &'static str) -> Option<u64> {
        self.read(controller, path, file)?.trim().parse().ok()
    }

    fn cpu(&mut self, path: &Path, scope: StatsScope) -> Option<CpuUsage> {
        if self.trees.unified {
            let stat = self.read("", path, "cpu.stat")?;
            let nanoseconds = |name| field(stat, name).map(|micros| micros * NANOSECONDS_PER_MICROSECOND);
            return Some(CpuUsage {
                total: nanoseconds("usage_usec")?,
                user: nanoseconds("user_usec").unwrap_or(0),
                system: nanoseconds("system_usec").unwrap_or(0),
                periods: field(stat, "nr_periods").unwrap_or(0),
                throttled_periods: field(stat, "nr_throttled").unwrap_or(0),
                throttled: nanoseconds("throttled_usec").unwrap_or(0),
            });
        }
        let mut usage = CpuUsage { total: self.number("cpuacct", path, "cpuacct.usage")?, ..CpuUsage::default() };
        if scope == StatsScope::All {
            let tick = self.trees.tick;
            let stat = self.read("cpuacct", path, "cpuacct.stat").unwrap_or_default();
            usage.user = field(stat, "user").unwrap_or(0) * tick;
            usage.system = field(stat, "system").unwrap_or(0) * tick;
            let stat = self.read("cpu", path, "cpu.stat").unwrap_or_default();
            usage.periods = field(stat, "nr_periods").unwrap_or(0);
            usage.throttled_periods = field(stat, "nr_throttled").unwrap_or(0);
            usage.throttled = field(stat, "throttled_time").unwrap_or(0);
        }
        Some(usage)
    }

    fn memory(&mut self, path: &Path, scope: StatsScope) -> Option<MemoryUsage> {
        let unified = self.trees.unified;
        let mut usage = if unified { self.memory_v2(path)? } else { self.memory_v1(path)? };
        if scope == StatsScope::All {
            let most = if unified { "memory.peak" } else { "memory.max_usage_in_bytes" };
            usage.max_usage = self.number("memory", path, most).unwrap_or(0);
            usage.failures = if unified {
                field(self.read("", path, "memory.events").unwrap_or_default(), "max").unwrap_or(0)
            } else {
                self.number("memory", path, "memory.failcnt").unwrap_or(0)
            };
        }
        Some(usage)
    }

    fn memory_v1(&mut self, path: &Path) -> Option<MemoryUsage> {
        let total = self.number("memory", path, "memory.usage_in_bytes")?;
        let mut usage = MemoryUsage { usage: total, working_set: total, ..MemoryUsage::default() };
        // What lies below is included in the figures that begin so, as it is in the usage.
        let stat = fields(self.read("memory", path, "memory.stat")?);
        for (name, value) in stat.filter_map(|(name, value)| Some((name.strip_prefix("total_")?, value))) {
            match name {
                "inactive_file" => usage.working_set = total.saturating_sub(value),
                "rss" => usage.rss = value,
                "cache" => usage.cache = value,
                "mapped_file" => usage.mapped_file = value,
                "swap" => usage.swap = value,
                "pgfault" => usage.page_faults = value,
                "pgmajfault" => usage.major_page_faults = value,
                _ => {}
            }
        }
        Some(usage)
    }

    fn memory_v2(&mut self, path: &Path) -> Option<MemoryUsage> {
        // The root has no such file: there it is what is not free.
        let total = self.number("", path, "memory.current").or_else(|| host_memory(path))?;
        let swap = self.number("", path, "memory.swap.current").unwrap_or(0);
        let mut usage = MemoryUsage { usage: total, working_set: total, swap, ..MemoryUsage::default() };
        for (name, value) in fields(self.read("memory", path, "memory.stat")?) {
            match name {
                "inactive_file" => usage.working_set = total.saturating_sub(value),
                "anon" => usage.rss = value,
                "file" => usage.cache = value,
                "file_mapped" => usage.mapped_file = value,
                "pgfault" => usage.page_faults = value,
                "pgmajfault" => usage.major_page_faults = value,
                _ => {}
            }
        }
        Some(usage)
    }

    fn limits(&mut self, path: &Path) -> Limits {
        if self.trees.unified {
            let bandwidth = self.read("", path, "cpu.max").unwrap_or_default();
            let mut bandwidth = bandwidth.split_ascii_whitespace().map(|word| word.parse().ok());
            let (cpu_quota, cpu_period) = (bandwidth.next().flatten(), bandwidth.next().flatten());
            let weight = self.number("", path, "cpu.weight");
            return Limits {
                // The inverse of how runc turns shares into a weight.
                cpu_shares: weight.map(|weight| 2 + weight.saturating_sub(1) * 262_142 / 9_999),
                cpu_quota,
                cpu_period,
                memory: self.memory_limit(path),
            };
        }
        let quota = self.read("cpu", path, "cpu.cfs_quota_us").and_then(|text| text.trim().parse::<i64>().ok());
        Limits {
            cpu_shares: self.number("cpu", path, "cpu.shares"),
            // -1 is none.
            cpu_quota: quota.and_then(|quota| u64::try_from(quota).ok()),
            cpu_period: self.number("cpu", path, "cpu.cfs_period_us"),
            memory: self.memory_limit(path),
        }
    }

    fn memory_limit(&mut self, path: &Path) -> Option<u64> {
        let name = if self.trees.unified { "memory.max" } else { "memory.limit_in_bytes" };
        self.number("memory", path, name).filter(|limit| *limit < NO_LIMIT)
    }
}

/// What `read` finds of these, in their order. To read takes the kernel longer than anything done here, so cores share the work
/// where there is enough of it.
fn in_parts<T: Sync, R: Send>(all: &[T], read: impl Fn(&[T]) -> Vec<R> + Sync) -> Vec<R> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let readers = cores.min(MOST_READERS).min(all.len() / WORTH_A_THREAD).max(1);
    thread::scope(|scope| {
        let (own, others) = all.split_at(all.len().div_ceil(readers));
        let read = &read;
        let others = others.chunks(own.len().max(1)).map(|part| scope.spawn(move || read(part)));
        let others: Vec<_> = others.collect();
        let mut found = read(own);
        for other in others {
            found.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        found
    })
}

/// Reads all of a file into `text`, which grows if it must. These files tell no size, and the kernel writes one anew for
/// each read: so a single large one.
fn whole(file: &File, text: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        let length = file.read_at(text, 0)?;
        if length < text.len() {
            return Ok(length);
        }
        text.resize(2 * text.len(), 0);
    }
}

/// Lines of `name value`.
fn fields(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.parse().ok()?))
    })
}

fn field(text: &str, name: &str) -> Option<u64> {
    fields(text).find(|(found, _)| *found == name).map(|(_, value)| value)
}

fn host_memory(path: &Path) -> Option<u64> {
    if !path.as_os_str().is_empty() {
        return None;
    }
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let kibibytes = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(kibibytes("MemTotal:")?.saturating_sub(kibibytes("MemFree:")?) << 10)
}

/// The interfaces that each of these processes sees, without loopback and in their order; `None` where there is no process.
pub fn interfaces(pids: &[Option<i32>]) -> Vec<Option<Vec<Interface>>> {
    let of_one = |pid: &Option<i32>| {
        let text = fs::read_to_string(format!("/proc/{}/net/dev", (*pid)?)).ok()?;
        Some(read_interfaces(&text))
    };
    in_parts(pids, |part| part.iter().map(of_one).collect())
}

/// `/proc/net/dev`: per line a name and sixteen counters, those received first.
fn read_interfaces(text: &str) -> Vec<Interface> {
    let read = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
        let traffic = |from: usize| {
            let [bytes, packets, errors, dropped] = *counters.get(from..)?.first_chunk()?;
            Some(Traffic { bytes, packets, errors, dropped })
        };
        Some(Interface { name: name.trim().to_owned(), received: traffic(0)?, sent: traffic(8)? })
    };
    text.lines().filter_map(read).filter(|interface| interface.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;
    use crate::runtime::kernel_v2;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn a_file_that_is_kept_open_tells_what_is_in_it_now_and_one_made_anew_is_opened_anew() {
        let root = tree(&[("cpuacct/a/cpuacct.usage", "5\n"), ("cpuacct/b/cpuacct.usage", "6\n")]);
        let trees = Trees { places: Arc::new(Semaphore::new(1)), ..Trees::at(root.path()) };
        let [a, b] = ["a", "b"].map(|name| Watched::at(name.into()));
        let totals = || {
            let usages = trees.usages(&[&a, &b], StatsScope::CpuAndMemory);
            usages.into_iter().map(|usage| usage.map(|usage| usage.cpu.unwrap().total)).collect::<Vec<_>>()
        };
        let open = |cgroup: &Watched| cgroup.kept.lock().unwrap().files.len();
        assert_eq!(totals(), [Some(5), Some(6)]);
        assert_eq!((open(&a), open(&b)), (1, 0), "no more than may");
        for name in ["a", "b"] {
            fs::write(root.path().join(format!("cpuacct/{name}/cpuacct.usage")), "71\n").unwrap();
        }
        assert_eq!(totals(), [Some(71), Some(71)]);
        fs::remove_dir_all(root.path().join("cpuacct/a")).unwrap();
        // A file of a removed cgroup cannot be read; here that is done by one opened for writing only.
        a.kept.lock().unwrap().files = vec![("cpuacct.usage", File::create(root.path().join("gone")).unwrap())];
        assert_eq!(totals(), [None, Some(71)]);
        assert_eq!((open(&a), open(&b)), (0, 1), "what was kept of one that is gone is another's to keep");
        drop(b);
        assert_eq!(trees.places.available_permits(), 1);
    }

    #[test]
    fn version_1_is_read_from_its_trees() {
        let root = tree(&[
            ("cpuacct/l/pod1/cpuacct.usage", "12345678901\n"),
            ("cpuacct/l/pod1/cpuacct.stat", "user 700\nsystem 530\n"),
            ("cpu/l/pod1/cpu.stat", "nr_periods 10\nnr_throttled 3\nthrottled_time 42\n"),
            ("cpu/l/pod1/cpu.shares", "128\n"),
            ("cpu/l/pod1/cpu.cfs_quota_us", "-1\n"),
            ("cpu/l/pod1/cpu.cfs_period_us", "100000\n"),
            ("memory/l/pod1/memory.usage_in_bytes", "5000\n"),
            ("memory/l/pod1/memory.max_usage_in_bytes", "9000\n"),
            ("memory/l/pod1/memory.failcnt", "2\n"),
            ("memory/l/pod1/memory.limit_in_bytes", "9223372036854771712\n"),
            (
                "memory/l/pod1/memory.stat",
                "cache 1\nrss 1\ninactive_file 1\ntotal_cache 3000\ntotal_rss 1500\ntotal_mapped_file 70\ntotal_swap 0\n\
                 total_pgfault 11\ntotal_pgmajfault 4\ntotal_inactive_file 1200\n",
            ),
            ("pids/l/pod1/pids.current", "7\n"),
        ]);
        let trees = Trees { tick: 10_000_000, ..Trees::at(root.path()) };
        let usage = trees.usage(Path::new("l/pod1"), StatsScope::All).unwrap();
        let cpu = usage.cpu.unwrap();
        assert_eq!((cpu.total, cpu.user, cpu.system), (12_345_678_901, 7_000_000_000, 5_300_000_000));
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled), (10, 3, 42));
        let memory = usage.memory.unwrap();
        assert_eq!((memory.usage, memory.working_set, memory.rss, memory.cache), (5000, 3800, 1500, 3000));
        assert_eq!((memory.max_usage, memory.failures, memory.page_faults, memory.major_page_faults), (9000, 2, 11, 4));
        assert_eq!(usage.tasks, Some(7));
        let limits = Limits { cpu_shares: Some(128), cpu_period: Some(100_000), ..Limits::default() };
        assert_eq!(usage.limits, Some(limits));
        let brief = trees.usage(Path::new("l/pod1"), StatsScope::CpuAndMemory).unwrap();
        assert_eq!((brief.memory.unwrap().working_set, brief.tasks, brief.limits), (3800, None, None));
        let used = trees.usage(Path::new("l/pod1"), StatsScope::Usage).unwrap();
        assert_eq!((used.tasks, used.limits), (Some(7), Some(Limits::default())));
    }

    #[test]
    fn version_2_is_read_from_one_tree() {
        let root = tree(&[
            ("cgroup.controllers", "cpu memory pids\n"),
            (
                "l/pod1/cpu.stat",
                "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 4\nnr_throttled 1\nthrottled_usec 9\n",
            ),
            ("l/pod1/cpu.max", "50000 100000\n"),
            ("l/pod1/cpu.weight", "39\n"),
            ("l/pod1/memory.current", "5000\n"),
            ("l/pod1/memory.max", "max\n"),
            ("l/pod1/memory.peak", "6000\n"),
            ("l/pod1/memory.events", "low 0\nhigh 0\nmax 8\noom 1\n"),
            ("l/pod1/memory.swap.current", "12\n"),
            (
                "l/pod1/memory.stat",
                "anon 1500\nfile 3000\nfile_mapped 70\ninactive_file 6000\npgfault 11\npgmajfault 4\n",
            ),
            ("l/pod1/pids.current", "7\n"),
        ]);
        let usage = Trees::at(root.path()).usage(Path::new("l/pod1"), StatsScope::All).unwrap();
        let cpu = usage.cpu.unwrap();
        assert_eq!((cpu.total, cpu.user, cpu.system, cpu.throttled), (5_000_000, 3_000_000, 2_000_000, 9_000));
        let memory = usage.memory.unwrap();
        // More inactive cache than all that is charged: read at two moments.
        assert_eq!((memory.usage, memory.working_set, memory.rss, memory.swap), (5000, 0, 1500, 12));
        assert_eq!((memory.max_usage, memory.failures), (6000, 8));
        let limits = usage.limits.unwrap();
        assert_eq!((limits.cpu_quota, limits.cpu_period, limits.memory), (Some(50_000), Some(100_000), None));
        assert!((990..=1_030).contains(&limits.cpu_shares.unwrap()), "{limits:?}");
    }

    #[test]
    fn version_2_of_a_kernel_is_read() {
        let Some(name) = kernel_v2::own_name() else { return };
        let directory = kernel_v2::directory(&name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("memory.max"), (100_u64 << 20).to_string()).unwrap();
        fs::write(directory.join("cpu.max"), "50000 100000").unwrap();
        let busy = "x=$(head -c 20000000 /dev/zero | tr '\\0' x); i=0; \
                    while [ $i -lt 30000 ]; do i=$((i + 1)); done; echo done; read end";
        let mut child = kernel_v2::run_in(&name, busy);
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "done\n");
        let trees = Trees::of_host();
        let usage = trees.usage(Path::new(&name), StatsScope::All).unwrap();
        println!("{usage:?}");
        let cpu = usage.cpu.unwrap();
        assert!(cpu.total > 10_000_000 && cpu.user > 0 && cpu.user + cpu.system <= cpu.total + 1_000_000, "{cpu:?}");
        assert!(cpu.periods > 0 && cpu.throttled_periods > 0 && cpu.throttled > 0, "half a core is less than it wants");
        let memory = usage.memory.unwrap();
        assert!(memory.rss >= 20_000_000 && memory.rss <= memory.usage, "{memory:?}");
        assert!(memory.working_set <= memory.usage && memory.page_faults > 1000, "{memory:?}");
        assert!(memory.max_usage >= memory.usage && memory.max_usage <= 100 << 20, "{memory:?}");
        let limits = usage.limits.unwrap();
        assert_eq!(
            (limits.memory, limits.cpu_quota, limits.cpu_period),
            (Some(100 << 20), Some(50_000), Some(100_000))
        );
        assert_eq!(usage.tasks, Some(1));
        // As the next look does, from files that stayed open.
        let watched = Watched::at(name.clone().into());
        let again = || trees.usages(&[&watched], StatsScope::CpuAndMemory)[0];
        for _ in 0..2 {
            assert!(again().unwrap().cpu.unwrap().total >= cpu.total);
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        fs::remove_dir(&directory).unwrap();
        assert!(trees.usage(Path::new(&name), StatsScope::All).is_none());
        assert!(again().is_none());
    }

    #[test]
    fn many_are_read_as_one_is() {
        let files: Vec<_> = (0..301).map(|n| (format!("cpuacct/l/pod{n}/cpuacct.usage"), n.to_string())).collect();
        let files: Vec<_> = files.iter().map(|(path, content)| (path.as_str(), content.as_str())).collect();
        let root = tree(&files);
        let trees = Trees::at(root.path());
        let all: Vec<_> = (0..400).map(|n| Watched::at(format!("l/pod{n}").into())).collect();
        for count in [0, 1, 31, 64, 129, 400] {
            let usages = trees.usages(&all[..count].iter().collect::<Vec<_>>(), StatsScope::CpuAndMemory);
            let totals: Vec<_> = usages.into_iter().map(|usage| usage.map(|usage| usage.cpu.unwrap().total)).collect();
            let expected: Vec<_> = (0..count as u64).map(|n| (n < 301).then_some(n)).collect();
            assert_eq!(totals, expected);
        }
    }

    #[test]
    fn what_is_not_there_is_none() {
        let root = tree(&[("cpuacct/l/pod1/cpuacct.usage", "nonsense\n")]);
        let trees = Trees::at(root.path());
        assert_eq!(trees.usage(Path::new("l/pod1"), StatsScope::All), None);
        assert_eq!(trees.usage(Path::new("l/pod2"), StatsScope::All), None);
    }

    #[test]
    fn this_host_has_a_root_cgroup() {
        let usage = Trees::of_host().usage(Path::new(""), StatsScope::CpuAndMemory).unwrap();
        assert!(usage.cpu.unwrap().total > 0 && usage.memory.unwrap().working_set > 0);
    }

    #[test]
    fn interfaces_are_read_without_loopback() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop\n    lo:  9 1 0 0 0 0 0 0  9 1 0 0 0 0 0 0\n  \
                    eth0: 100 3 1 2 0 0 0 0 200 4 5 6 0 0 0 0\n";
        let read = read_interfaces(text);
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].name, "eth0");
        assert_eq!(read[0].received, Traffic { bytes: 100, packets: 3, errors: 1, dropped: 2 });
        assert_eq!(read[0].sent, Traffic { bytes: 200, packets: 4, errors: 5, dropped: 6 });
    }
}
