//! What the host is and how it fares, read from `/proc`, `/sys` and the file system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Why the host could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file of `/proc` or `/sys` cannot be read.
    #[error("failed to read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not hold what the kernel documents.
    #[error("there is no {what} in {path}", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The field.
        what: &'static str,
    },
    /// A file system does not answer.
    #[error("failed to measure the file system of {path}", path = path.display())]
    FileSystem {
        /// A path on it.
        path: PathBuf,
        /// Why.
        #[source]
        source: nix::Error,
    },
}

/// What does not change while the host runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Processors online.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of the file system that holds the root directory.
    pub storage: u64,
    /// Inodes of it; 0 where it has none to count.
    pub inodes: u64,
    /// Bytes of preallocated huge pages by resource name (`hugepages-2Mi`).
    pub hugepages: BTreeMap<String, u64>,
    /// `/etc/machine-id`, empty if there is none.
    pub machine_id: String,
    /// The firmware's UUID, or the machine id where there is none (or only root may read it).
    pub system_uuid: String,
    /// The kernel's id of this boot.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// PRETTY_NAME of os-release.
    pub os_image: String,
}

/// How the host fares now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes that can be had without swapping.
    pub memory_available: u64,
    /// Bytes free on the root directory's file system.
    pub storage_available: u64,
    /// Inodes free on it.
    pub inodes_free: u64,
    /// Most processes and threads the kernel allows.
    pub pids: u64,
    /// How many more there can be.
    pub pids_available: u64,
}

/// The architecture as Go and Kubernetes call it (`amd64`, `arm64`).
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        other => other,
    }
}

impl Machine {
    /// Measures this host; `root_dir` (or the nearest parent that exists) names the file system for ephemeral storage.
    ///
    /// # Errors
    /// If the kernel does not tell what every node needs: memory, storage, boot id.
    pub fn measure(root_dir: &Path) -> Result<Self, MachineError> {
        let storage = Extent::measure(root_dir)?;
        let machine_id = optional("/etc/machine-id");
        let system_uuid = Some(optional("/sys/class/dmi/id/product_uuid")).filter(|uuid| !uuid.is_empty());
        let online = optional("/sys/devices/system/cpu/online");
        let cpus = count_cpus(&online)
            .or_else(|| std::thread::available_parallelism().ok().and_then(|count| u32::try_from(count.get()).ok()));
        Ok(Self {
            cpus: cpus.unwrap_or(1),
            memory: meminfo("MemTotal")?,
            storage: storage.bytes,
            inodes: storage.inodes,
            hugepages: hugepages(Path::new("/sys/kernel/mm/hugepages")),
            system_uuid: system_uuid.unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: required("/proc/sys/kernel/random/boot_id")?,
            kernel: required("/proc/sys/kernel/osrelease")?,
            os_image: os_image(&optional("/etc/os-release")).unwrap_or_else(|| "Linux".to_owned()),
        })
    }
}

impl Load {
    /// Measures this host now.
    ///
    /// # Errors
    /// As [`Machine::measure`].
    pub fn measure(root_dir: &Path) -> Result<Self, MachineError> {
        let storage = Extent::measure(root_dir)?;
        let number = |path: &'static str| -> Result<u64, MachineError> {
            required(path)?.parse().map_err(|_| MachineError::Missing { path: path.into(), what: "number" })
        };
        let pids = number("/proc/sys/kernel/pid_max")?.min(number("/proc/sys/kernel/threads-max")?);
        let tasks = tasks_of(&required("/proc/loadavg")?)
            .ok_or_else(|| MachineError::Missing { path: "/proc/loadavg".into(), what: "count of tasks" })?;
        Ok(Self {
            memory_available: meminfo("MemAvailable")?,
            storage_available: storage.bytes_free,
            inodes_free: storage.inodes_free,
            pids,
            pids_available: pids.saturating_sub(tasks),
        })
    }
}

/// A file system's size, and what is free for unprivileged users.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of all of it.
    pub bytes: u64,
    /// Its inodes; 0 where it has none to count.
    pub inodes: u64,
    /// Bytes free.
    pub bytes_free: u64,
    /// Inodes free.
    pub inodes_free: u64,
}

impl Extent {
    /// Of the file system that holds `path`, or the nearest parent that exists.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn measure(path: &Path) -> Result<Self, MachineError> {
        let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let stat = nix::sys::statvfs::statvfs(existing)
            .map_err(|source| MachineError::FileSystem { path: existing.to_owned(), source })?;
        let block = stat.fragment_size();
        Ok(Self {
            bytes: stat.blocks() * block,
            inodes: stat.files(),
            bytes_free: stat.blocks_available() * block,
            inodes_free: stat.files_available(),
        })
    }
}

fn required(path: &'static str) -> Result<String, MachineError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(MachineError::Read { path: path.into(), source }),
    }
}

fn optional(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// A field of `/proc/meminfo` in bytes.
fn meminfo(field: &'static str) -> Result<u64, MachineError> {
    let path = "/proc/meminfo";
    let text = required(path)?;
    meminfo_field(&text, field).ok_or_else(|| MachineError::Missing { path: path.into(), what: field })
}

fn meminfo_field(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// The number of processors in a kernel CPU list (`0-3,6`).
fn count_cpus(list: &str) -> Option<u32> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

/// Existing tasks, the second number of `running/existing` in `/proc/loadavg`.
fn tasks_of(loadavg: &str) -> Option<u64> {
    loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}

fn os_image(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// Preallocated huge pages by page size (`hugepages-2048kB/nr_hugepages`).
fn hugepages(directory: &Path) -> BTreeMap<String, u64> {
    let Ok(entries) = std::fs::read_dir(directory) else { return BTreeMap::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name();
            let kibibytes: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let pages: u64 = std::fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
            let size = match kibibytes {
                gigabytes if gigabytes % (1 << 20) == 0 => format!("{}Gi", gigabytes >> 20),
                megabytes if megabytes % (1 << 10) == 0 => format!("{}Mi", megabytes >> 10),
                other => format!("{other}Ki"),
            };
            Some((format!("hugepages-{size}"), pages * (kibibytes << 10)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_be_measured() {
        let root = Path::new("/var/lib/does-not-exist-yet");
        let (machine, load) = (Machine::measure(root).unwrap(), Load::measure(root).unwrap());
        assert!(machine.cpus > 0 && machine.memory > 0 && machine.storage > 0, "{machine:?}");
        assert!(!machine.boot_id.is_empty() && !machine.kernel.is_empty(), "{machine:?}");
        assert!(load.memory_available <= machine.memory && load.pids_available < load.pids, "{load:?}");
    }

    #[test]
    fn kernel_texts_are_read_as_documented() {
        assert_eq!(count_cpus("0-3,6"), Some(5));
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus("x"), None);
        assert_eq!(tasks_of("0.10 0.20 0.30 2/345 6789"), Some(345));
        assert_eq!(meminfo_field("MemTotal:   16 kB\nMemFree: 1 kB\n", "MemTotal"), Some(16 << 10));
        assert_eq!(os_image("ID=debian\nPRETTY_NAME=\"Debian 12\"\n").as_deref(), Some("Debian 12"));
    }

    #[test]
    fn huge_pages_are_named_by_their_size() {
        let directory = tempfile::tempdir().unwrap();
        for (size, count) in [("hugepages-2048kB", "3"), ("hugepages-1048576kB", "1")] {
            std::fs::create_dir(directory.path().join(size)).unwrap();
            std::fs::write(directory.path().join(size).join("nr_hugepages"), count).unwrap();
        }
        let pages = hugepages(directory.path());
        assert_eq!(pages["hugepages-2Mi"], 6 << 20);
        assert_eq!(pages["hugepages-1Gi"], 1 << 30);
    }
}
