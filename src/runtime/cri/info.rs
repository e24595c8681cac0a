//! What CRI's messages do not say and runtimes tell all the same: the process of a sandbox or container and its cgroup.
//!
//! Both are in the JSON of the verbose statuses, which CRI leaves to the runtime; containerd and CRI-O agree on these names.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use serde::Deserialize;

use super::sandbox::moment;
use crate::runtime::cgroup::Cgroups;
use crate::runtime::usage::Watched;

/// The part that is read.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Info {
    pid: i32,
    runtime_spec: Option<Spec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    linux: Linux,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    cgroups_path: String,
}

/// What never changes of a sandbox or container that runs.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Its first process on the host.
    pub(super) pid: i32,
    pub(super) cgroup: Arc<Watched>,
    /// The Pod's, of a sandbox that has one.
    pub(super) pod_cgroup: Option<Arc<Watched>>,
    /// When it started.
    pub(super) started_at: Option<Timestamp>,
    /// The address that the runtime says a sandbox has.
    pub(super) address: Option<IpAddr>,
    /// What it was told to be, if it is a sandbox.
    pub(super) sandbox: Option<v1::PodSandboxStatus>,
}

/// Reads the map of a verbose status of what started then (nanoseconds since 1970); `None` if nothing runs, or the runtime
/// does not tell.
pub(super) fn place(info: &HashMap<String, String>, started_at: i64, cgroups: &Cgroups) -> Option<Place> {
    let info: Info = serde_json::from_str(info.get("info")?).ok()?;
    let spec = info.runtime_spec.unwrap_or_default();
    let cgroup = Arc::new(Watched::at(cgroups.of_spec(&spec.linux.cgroups_path)));
    let started_at = moment(started_at);
    (info.pid > 0).then_some(Place {
        pid: info.pid,
        cgroup,
        pod_cgroup: None,
        started_at,
        address: None,
        sandbox: None,
    })
}

/// The places of what runs, by id: asked for once in the life of each.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<String, Arc<Place>>>);

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Place>>> {
        // Entries are inserted and removed whole, so a panic elsewhere does not spoil them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: &str) -> Option<Arc<Place>> {
        self.all().get(id).cloned()
    }

    pub(super) fn insert(&self, id: &str, place: Place) {
        self.all().insert(id.to_owned(), Arc::new(place));
    }

    /// It does not run any more.
    pub(super) fn forget(&self, id: &str) {
        self.all().remove(id);
    }

    /// Forgets all that are not among these.
    pub(super) fn keep(&self, ids: &HashSet<&str>) {
        self.all().retain(|id, _| ids.contains(id.as_str()));
    }
}

/// The directory that keeps what a container wrote outside its volumes, where its root is an overlay: `None` with other
/// snapshotters, or if the process is gone.
pub(super) fn writable_layer(pid: i32) -> Option<PathBuf> {
    upper(&fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?)
}

/// From `mountinfo` (proc(5)): mount point, then after a lone dash type, source and options of the file system.
fn upper(mounts: &str) -> Option<PathBuf> {
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/"))?;
    let (_, system) = root.split_once(" - ")?;
    let mut words = system.split(' ');
    let (kind, options) = (words.next()?, words.nth(1)?);
    let upper = options.split(',').find_map(|option| option.strip_prefix("upperdir="));
    upper.filter(|_| kind == "overlay").map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_and_cgroup_are_read_from_what_both_runtimes_write() {
        let cgroups = Cgroups::of_host(false);
        let told = |json: &str| {
            let place = place(&HashMap::from([("info".to_owned(), json.to_owned())]), 0, &cgroups)?;
            Some((place.pid, place.cgroup.path().to_owned()))
        };
        let containerd = r#"{"sandboxID":"s","pid":42,"removing":false,"config":{"labels":{}},
            "runtimeSpec":{"ociVersion":"1.2.0","linux":{"cgroupsPath":"/l/pod1/c1","namespaces":[]}}}"#;
        assert_eq!(told(containerd), Some((42, "l/pod1/c1".into())));
        let crio = r#"{"pid":7,"runtimeSpec":{"linux":{"cgroupsPath":"pod1.slice:crio:c1"}}}"#;
        assert_eq!(told(crio), Some((7, "pod1.slice/crio-c1.scope".into())));
        assert_eq!(told(r#"{"pid":0}"#), None);
        assert_eq!(told("nonsense"), None);
        assert!(place(&HashMap::new(), 0, &cgroups).is_none());
    }

    #[test]
    fn the_writable_layer_is_the_upper_directory_of_the_root() {
        let mounts = "21 20 0:19 /a /proc rw - proc proc rw,upperdir=/no\n\
                      20 1 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u/fs,workdir=/w\n";
        assert_eq!(upper(mounts), Some("/u/fs".into()));
        assert_eq!(upper("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"), None);
    }
}
