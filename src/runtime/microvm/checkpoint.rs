//! What the driver remembers of a sandbox: one file each, written aside, then renamed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::slots::Slots;
use super::vm::GuestState;
use super::volumes::Volume;
use crate::file::{self, Synced};
use crate::runtime::types::{
    ContainerConfig, ContainerState, ContainerStatus, ImageId, PodRef, Resources, SandboxConfig,
};

/// Of this file; another is not understood.
const FORMAT: u32 = 1;
const FILE: &str = "sandbox.json";
/// 128 + SIGKILL.
pub(super) const KILLED: i32 = 137;

/// Where in its life a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// Perhaps half there.
    Making,
    Running,
    /// Its VM has ended.
    Ended,
}

/// A sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    format: u32,
    pub(super) id: String,
    owner: String,
    uid: String,
    namespace: String,
    name: String,
    pub(super) attempt: u32,
    pub(super) address: Option<IpAddr>,
    pub(super) cgroup: String,
    created: i64,
    pub(super) phase: Phase,
    pub(super) slots: Slots,
    pub(super) volumes: BTreeMap<String, Volume>,
    pub(super) containers: BTreeMap<String, ContainerRecord>,
    #[serde(default)]
    pub(super) resources: Resources,
}

/// A container of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ContainerRecord {
    pub(super) name: String,
    pub(super) attempt: u32,
    pub(super) image: String,
    /// Images that are shown to it.
    #[serde(default)]
    shown: Vec<String>,
    image_ref: String,
    annotations: BTreeMap<String, String>,
    pub(super) stop_signal: String,
    created: i64,
    /// The last that was heard of it, while the guest can be asked.
    pub(super) started: Option<i64>,
    /// How it ended.
    pub(super) ended: Option<Ended>,
    /// Files to be copied back: volume, host path.
    pub(super) returned: Vec<(String, PathBuf)>,
    #[serde(default)]
    pub(super) resources: Resources,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ended {
    finished: i64,
    pub(super) exit_code: i32,
    pub(super) oom_killed: bool,
    message: String,
}

impl Ended {
    /// As the guest tells it.
    pub(super) fn of(state: &GuestState) -> Self {
        Self {
            finished: nanoseconds(state.finished_at.unwrap_or_else(Timestamp::now)),
            exit_code: state.exit_code,
            oom_killed: state.oom_killed,
            message: state.message.clone(),
        }
    }

    /// With its VM.
    pub(super) fn with_vm() -> Self {
        let message = "its microVM has ended".to_owned();
        Self { finished: nanoseconds(Timestamp::now()), exit_code: KILLED, oom_killed: false, message }
    }
}

impl ContainerRecord {
    pub(super) fn new(config: &ContainerConfig, stop_signal: String, returned: Vec<(String, PathBuf)>) -> Self {
        Self {
            name: config.name.clone(),
            attempt: config.attempt,
            image: config.image.to_string(),
            shown: config.mounts.iter().filter_map(|mount| Some(mount.image.as_ref()?.to_string())).collect(),
            image_ref: config.image_ref.clone(),
            annotations: config.annotations.clone(),
            stop_signal,
            created: nanoseconds(Timestamp::now()),
            started: None,
            ended: None,
            returned,
            resources: config.resources.clone(),
        }
    }

    /// Whether the image is its own, or is shown to it.
    pub(super) fn uses(&self, image: &ImageId) -> bool {
        self.image == image.as_str() || self.shown.iter().any(|shown| shown == image.as_str())
    }
}

impl SandboxRecord {
    pub(super) fn new(id: String, owner: &str, config: &SandboxConfig, slots: u8) -> Self {
        Self {
            format: FORMAT,
            id,
            owner: owner.to_owned(),
            uid: config.pod.uid.clone(),
            namespace: config.pod.namespace.clone(),
            name: config.pod.name.clone(),
            attempt: config.attempt,
            // A guest has one, of the node's first family.
            address: config.network.addresses().first().copied(),
            cgroup: config.cgroup_parent.clone(),
            created: nanoseconds(Timestamp::now()),
            phase: Phase::Making,
            slots: Slots::new(slots),
            volumes: BTreeMap::new(),
            containers: BTreeMap::new(),
            resources: config.resources.clone(),
        }
    }

    pub(super) fn pod(&self) -> PodRef {
        PodRef { uid: self.uid.clone(), namespace: self.namespace.clone(), name: self.name.clone() }
    }

    pub(super) fn uid(&self) -> &str {
        &self.uid
    }

    pub(super) fn created_at(&self) -> Timestamp {
        time(self.created)
    }

    /// A container's status, from what the guest says of it and what is remembered. On the host it is the VMM that runs.
    pub(super) fn status(&self, id: &str, guest: Option<&GuestState>, vmm: Option<i32>) -> Option<ContainerStatus> {
        let container = self.containers.get(id)?;
        let state = match (&container.ended, guest) {
            (Some(_), _) => ContainerState::Exited,
            // It has exited once its log is here and its end is written down.
            (None, Some(guest)) if guest.state == ContainerState::Exited => ContainerState::Running,
            (None, Some(guest)) => guest.state,
            (None, None) if container.started.is_some() => ContainerState::Running,
            (None, None) => ContainerState::Created,
        };
        let ended = container.ended.clone();
        // The guest's clock may be a moment behind the host's: nothing begins before it was made, or ends before it began.
        let started = container.started.map(|started| started.max(container.created));
        Some(ContainerStatus {
            id: id.into(),
            sandbox: self.id.as_str().into(),
            pod: self.pod(),
            name: container.name.clone(),
            attempt: container.attempt,
            state,
            frozen: ended.is_none() && guest.is_some_and(|guest| guest.frozen),
            created_at: time(container.created),
            started_at: started.map(time),
            finished_at: ended.as_ref().map(|ended| time(ended.finished.max(started.unwrap_or(container.created)))),
            exit_code: ended.as_ref().map_or(0, |ended| ended.exit_code),
            oom_killed: ended.as_ref().is_some_and(|ended| ended.oom_killed),
            message: ended.map(|ended| ended.message).unwrap_or_default(),
            image: ImageId::from(container.image.as_str()),
            image_ref: container.image_ref.clone(),
            pid: vmm.filter(|_| state == ContainerState::Running),
            annotations: container.annotations.clone(),
            resources: Some(container.resources.clone()),
        })
    }

    /// Writes it to its directory, which exists. Waits for the disk.
    pub(super) fn save(&self, directory: &Path) -> io::Result<()> {
        let aside = directory.join(format!("{FILE}.new"));
        file::replace(&directory.join(FILE), &aside, &serde_json::to_vec(self)?, Synced::Name)
    }

    /// Reads that of a directory; `None` if there is none, or it is another owner's.
    pub(super) fn load(directory: &Path, owner: &str) -> io::Result<Option<Self>> {
        let bytes = match fs::read(directory.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let record: Self = serde_json::from_slice(&bytes)?;
        let named = directory.file_name().is_some_and(|name| *name == *record.id);
        if record.format != FORMAT || !named {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not of this version, or of another sandbox"));
        }
        Ok((record.owner == owner).then_some(record))
    }
}

/// Until the year 2262.
pub(super) fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

fn time(nanoseconds: i64) -> Timestamp {
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::types::{MachineFiles, NamespaceMode, SandboxNetwork};

    fn config() -> SandboxConfig {
        SandboxConfig {
            pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() },
            handler: None,
            attempt: 2,
            hostname: "h".into(),
            network: SandboxNetwork::Pod { address: [10, 0, 0, 1].into() },
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: "/c".into(),
            resources: Resources::default(),
            machine: MachineFiles::default(),
        }
    }

    #[test]
    fn a_record_reads_back_for_its_owner_only() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("s1");
        fs::create_dir(&directory).unwrap();
        assert!(SandboxRecord::load(&directory, "me").unwrap().is_none());
        let mut record = SandboxRecord::new("s1".into(), "me", &config(), 8);
        record.volumes.insert("v".into(), Volume::Empty("/e".into()));
        record.save(&directory).unwrap();
        record.phase = Phase::Running;
        record.save(&directory).unwrap();
        let read = SandboxRecord::load(&directory, "me").unwrap().unwrap();
        assert_eq!((read.phase, read.pod(), read.address), (Phase::Running, config().pod, record.address));
        assert!(SandboxRecord::load(&directory, "another").unwrap().is_none());
        let moved = root.path().join("s2");
        fs::rename(&directory, &moved).unwrap();
        assert!(SandboxRecord::load(&moved, "me").is_err());
        fs::write(moved.join(FILE), "{").unwrap();
        assert!(SandboxRecord::load(&moved, "me").is_err());
    }
}
