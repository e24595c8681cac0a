//! One running Firecracker.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use async_trait::async_trait;
use tokio::task::JoinSet;

use super::api::{Api, DriveUpdate, InstanceState, SnapshotCreate, SnapshotType, VmState};
use super::{AGENT_VSOCK_PORT, MEMORY, SNAPSHOT, VSOCK_SOCKET, blank, jailer, vsock};
use crate::runtime::microvm::machine::cgroup::VmCgroup;
use crate::runtime::microvm::machine::process::{END_PATIENCE, Process};
use crate::runtime::microvm::machine::template::TemplateKind;
use crate::runtime::microvm::machine::{
    Asset, Machine, MachineError, MachineSpec, Result, Template, VmDir, VmExit, slot_name,
};
use crate::runtime::session::Duplex;

/// A Firecracker of ours.
#[derive(Debug)]
pub(super) struct FirecrackerMachine {
    pub(super) dir: VmDir,
    /// The jail's root on the host.
    pub(super) root: PathBuf,
    pub(super) process: Process,
    pub(super) cgroup: VmCgroup,
    pub(super) api: Api,
    pub(super) image_slots: u8,
    /// What it is to become, if it was booted for that.
    pub(super) template: Option<(Template, TemplateKind)>,
    /// Who reads what it says.
    pub(super) _listeners: JoinSet<()>,
}

impl FirecrackerMachine {
    /// Puts this file of the jail behind the slot, and removes the images that were there before.
    async fn swap(&self, slot: u8, file: String) -> Result<()> {
        if slot >= self.image_slots {
            return Err(MachineError::NoSlot { id: self.dir.id().to_string(), slot, slots: self.image_slots });
        }
        let update = DriveUpdate { drive_id: slot_name(slot), path_on_host: file.clone() };
        let swapped = self.api.update_drive(&update).await;
        let keep = if swapped.is_ok() { Some(file) } else { None };
        // After a failure the slot has what it had before: that file is open and needs no name.
        self.remove_images(slot, keep.as_deref())?;
        swapped
    }

    fn remove_images(&self, slot: u8, keep: Option<&str>) -> Result<()> {
        let begin = format!("{}-", slot_name(slot));
        let entries = fs::read_dir(&self.root).map_err(MachineError::file("list", &self.root))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let old = name.to_str().is_some_and(|name| name.starts_with(&begin) && Some(name) != keep);
            if old {
                fs::remove_file(entry.path()).map_err(MachineError::file("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    async fn write_snapshot(&self, template: &Template) -> Result<()> {
        self.pause().await?;
        let snapshot = SnapshotCreate {
            snapshot_type: SnapshotType::Full,
            snapshot_path: SNAPSHOT.to_owned(),
            mem_file_path: MEMORY.to_owned(),
        };
        self.api.create_snapshot(&snapshot).await?;
        for (name, place) in [(SNAPSHOT, template.state()), (MEMORY, template.memory())] {
            // What the VMM has made there may be a link: only its own file is taken, and it is root's from now on.
            let file = Asset::open_beneath(&self.root, name)?;
            seal(file.file()).map_err(MachineError::file("seal", &place))?;
            jailer::show(&file, &template.path, name)?;
        }
        Ok(())
    }
}

/// Makes a file of a template root's; Firecracker only reads it.
fn seal(file: &File) -> io::Result<()> {
    std::os::unix::fs::fchown(file, Some(0), None)?;
    file.set_permissions(fs::Permissions::from_mode(0o440))?;
    file.sync_all()
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn pid(&self) -> i32 {
        self.process.pid()
    }

    fn dir(&self) -> &VmDir {
        &self.dir
    }

    async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>> {
        let stream = vsock::connect(&self.dir, &self.root, VSOCK_SOCKET, AGENT_VSOCK_PORT).await;
        let socket = self.root.join(VSOCK_SOCKET);
        Ok(Box::pin(stream.map_err(|source| MachineError::Socket { action: "connect to", socket, source })?))
    }

    async fn put_image(&self, slot: u8, image: &Path) -> Result<()> {
        let file = format!("{}-{:08x}", slot_name(slot), rand::random::<u32>());
        jailer::show(&Asset::open(image)?, &self.root, &file)?;
        self.swap(slot, file).await
    }

    async fn take_image(&self, slot: u8) -> Result<()> {
        self.swap(slot, blank(slot)).await
    }

    async fn pause(&self) -> Result<()> {
        match self.api.instance().await?.state {
            InstanceState::Paused => Ok(()),
            _ => self.api.vm_state(VmState::Paused).await,
        }
    }

    async fn resume(&self) -> Result<()> {
        match self.api.instance().await?.state {
            InstanceState::Running => Ok(()),
            _ => self.api.vm_state(VmState::Resumed).await,
        }
    }

    async fn save(&self) -> Result<Template> {
        let Some((template, kind)) = self.template.clone() else {
            let what = "make a template of a machine that was not booted for that".to_owned();
            return Err(MachineError::Unsupported { vmm: "Firecracker", what });
        };
        let written = self.write_snapshot(&template).await;
        let killed = self.kill().await;
        written?;
        killed?;
        template.describe(kind)?;
        Ok(template)
    }

    fn weigh(&self, shares: u64) -> Result<()> {
        self.cgroup.weigh(shares).map_err(MachineError::start("weigh the CPU time", self.dir.id()))
    }

    async fn move_to(&mut self, spec: &MachineSpec) -> Result<()> {
        self.cgroup = self.process.move_to(&self.cgroup, spec).await?;
        Ok(())
    }

    fn kill_unwaited(&self) {
        self.process.kill();
    }

    async fn kill(&self) -> Result<()> {
        self.process.end(&self.cgroup, self.dir.id(), END_PATIENCE).await
    }

    async fn exited(&self) -> VmExit {
        self.process.ended().await
    }
}
