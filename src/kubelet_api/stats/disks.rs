//! What cgroups read from disks and wrote to them, from the kernel's files: `io.stat` of cgroup v2 (`cgroup-v2.rst`), the
//! throttle policy's counters of v1 (`cgroup-v1/blkio-controller.rst`). Nobody but `/metrics/cadvisor` tells of it, so the
//! files are read only for that.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the host's cgroup file systems are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Where the kernel has a directory for each block device, called by its numbers.
const DEVICES: &str = "/sys/dev/block";

/// Counters of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Bytes read.
    pub(super) bytes_read: u64,
    /// Bytes written.
    pub(super) bytes_written: u64,
    /// Read operations.
    pub(super) reads: u64,
    /// Write operations.
    pub(super) writes: u64,
}

/// By device: `/dev/NAME`, or `MAJOR:MINOR` of one that has no name any more.
pub(super) type ByDevice = BTreeMap<String, Traffic>;

/// Where the files are.
#[derive(Clone, Debug)]
pub(super) struct Disks {
    cgroups: PathBuf,
    devices: PathBuf,
}

impl Disks {
    /// The host's own.
    pub(super) fn of_host() -> Self {
        Self { cgroups: CGROUPS.into(), devices: DEVICES.into() }
    }

    /// What each of these cgroups did, `/` being the whole host. What the kernel does not tell is left out. Blocks.
    pub(super) fn read(&self, cgroups: impl IntoIterator<Item = String>) -> HashMap<String, ByDevice> {
        let unified = self.cgroups.join("cgroup.controllers").exists();
        let mut names = HashMap::new();
        let mut read = HashMap::new();
        for cgroup in cgroups {
            let path = Path::new(cgroup.trim_start_matches('/'));
            let of_numbers = match unified {
                true => version_2(&fs::read_to_string(self.cgroups.join(path).join("io.stat")).unwrap_or_default()),
                false => self.version_1(&self.cgroups.join("blkio").join(path)),
            };
            let mut of_names = ByDevice::new();
            for (numbers, traffic) in of_numbers {
                let name = names.entry(numbers.clone()).or_insert_with(|| self.name(&numbers));
                of_names.insert(name.clone(), traffic);
            }
            read.insert(cgroup, of_names);
        }
        read
    }

    fn name(&self, numbers: &str) -> String {
        let event = fs::read_to_string(self.devices.join(numbers).join("uevent")).unwrap_or_default();
        let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        name.map_or_else(|| numbers.to_owned(), |name| format!("/dev/{name}"))
    }

    /// What lies below is counted only in the files that say so, which old kernels do not have.
    fn version_1(&self, directory: &Path) -> ByDevice {
        let text = |what: &str| {
            let of = |end: &str| fs::read_to_string(directory.join(format!("blkio.throttle.{what}{end}")));
            of("_recursive").or_else(|_| of("")).unwrap_or_default()
        };
        let mut devices = ByDevice::new();
        for (numbers, read, written) in operations(&text("io_service_bytes")) {
            let traffic = devices.entry(numbers.to_owned()).or_default();
            (traffic.bytes_read, traffic.bytes_written) = (traffic.bytes_read + read, traffic.bytes_written + written);
        }
        for (numbers, read, written) in operations(&text("io_serviced")) {
            let traffic = devices.entry(numbers.to_owned()).or_default();
            (traffic.reads, traffic.writes) = (traffic.reads + read, traffic.writes + written);
        }
        devices
    }
}

/// Lines of `MAJOR:MINOR Read COUNT`, `… Write COUNT` and others, as what each adds to the reads and to the writes.
fn operations(text: &str) -> impl Iterator<Item = (&str, u64, u64)> {
    text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (numbers, operation, count) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
        match operation {
            "Read" => Some((numbers, count, 0)),
            "Write" => Some((numbers, 0, count)),
            _ => None,
        }
    })
}

/// Lines of `MAJOR:MINOR rbytes=1 wbytes=2 rios=3 wios=4 …`. The kernel begins a line for each device, and does not end it
/// if there is nothing to tell: so what counts is the device that was named last.
fn version_2(text: &str) -> ByDevice {
    let mut devices = ByDevice::new();
    let mut numbers = "";
    for word in text.split_ascii_whitespace() {
        let Some((name, count)) = word.split_once('=') else {
            numbers = word;
            continue;
        };
        let Ok(count) = count.parse() else { continue };
        let traffic = devices.entry(numbers.to_owned()).or_default();
        match name {
            "rbytes" => traffic.bytes_read = count,
            "wbytes" => traffic.bytes_written = count,
            "rios" => traffic.reads = count,
            "wios" => traffic.writes = count,
            _ => {}
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host whose disk is called `vda`.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Disks) {
        let root = tempfile::tempdir().unwrap();
        let event = ("block/254:0/uevent", "MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\n");
        for (path, content) in files.iter().chain([&event]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let disks = Disks { cgroups: root.path().join("cgroup"), devices: root.path().join("block") };
        (root, disks)
    }

    fn traffic([bytes_read, bytes_written, reads, writes]: [u64; 4]) -> Traffic {
        Traffic { bytes_read, bytes_written, reads, writes }
    }

    #[test]
    fn version_1_is_read_with_what_lies_below_where_the_kernel_tells_that() {
        let (_root, disks) = host(&[
            ("cgroup/blkio/l/pod1/blkio.throttle.io_service_bytes", "254:0 Read 1\n254:0 Write 1\nTotal 2\n"),
            (
                "cgroup/blkio/l/pod1/blkio.throttle.io_service_bytes_recursive",
                "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 4096\n254:0 Async 8192\n254:0 Discard 0\n\
                 254:0 Total 12288\n7:9 Read 512\n7:9 Write 0\nTotal 12800\n",
            ),
            ("cgroup/blkio/l/pod1/blkio.throttle.io_serviced", "254:0 Read 3\n254:0 Write 5\n254:0 Total 8\n"),
            ("cgroup/blkio/blkio.throttle.io_serviced", "254:0 Read 30\n254:0 Write 50\n254:0 Total 80\n"),
        ]);
        let read = disks.read(["/", "/l/pod1", "/l/gone"].map(str::to_owned));
        let vda = "/dev/vda".to_owned();
        assert_eq!(read["/l/pod1"][&vda], traffic([4096, 8192, 3, 5]));
        assert_eq!(read["/l/pod1"]["7:9"], traffic([512, 0, 0, 0]), "a device without a name");
        assert_eq!(read["/"], [(vda, traffic([0, 0, 30, 50]))].into());
        assert!(read["/l/gone"].is_empty());
    }

    #[test]
    fn version_2_is_read_from_one_file() {
        let (_root, disks) = host(&[
            ("cgroup/cgroup.controllers", "cpu io memory\n"),
            (
                "cgroup/l/pod1/io.stat",
                "7:1 7:0 254:0 rbytes=4096 wbytes=8192 rios=3 wios=5 dbytes=9 dios=1\n\
                 7:9 rbytes=512 wbytes=0 rios=1 wios=0 dbytes=0 dios=0 cost.usage=max\n",
            ),
        ]);
        let read = disks.read(["/", "/l/pod1"].map(str::to_owned));
        let wanted =
            [("/dev/vda".to_owned(), traffic([4096, 8192, 3, 5])), ("7:9".to_owned(), traffic([512, 0, 1, 0]))];
        assert_eq!(read["/l/pod1"], wanted.into());
        assert!(read["/"].is_empty());
    }
}
