//! One running QEMU.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::Mutex;

use super::command::{AGENT_SOCKET, blank_file};
use super::qmp::Qmp;
use super::{MIGRATION_PATIENCE, slots};
use crate::runtime::microvm::machine::cgroup::VmCgroup;
use crate::runtime::microvm::machine::process::{END_PATIENCE, Process};
use crate::runtime::microvm::machine::template::TemplateKind;
use crate::runtime::microvm::machine::{Asset, Machine, MachineError, MachineSpec, Result, Template, VmDir, VmExit};
use crate::runtime::session::Duplex;

/// A QEMU of ours.
#[derive(Debug)]
pub(super) struct QemuMachine {
    dir: VmDir,
    pub(super) process: Process,
    pub(super) cgroup: VmCgroup,
    image_slots: u8,
    template: Option<(Template, TemplateKind)>,
    /// QEMU serves one connection at a time.
    asking: Mutex<()>,
}

impl QemuMachine {
    pub(super) fn new(dir: VmDir, process: Process, cgroup: VmCgroup, image_slots: u8) -> Self {
        Self { dir, process, cgroup, image_slots, template: None, asking: Mutex::new(()) }
    }

    pub(super) fn for_template(self, template: Template, kind: TemplateKind) -> Self {
        Self { template: Some((template, kind)), ..self }
    }

    fn check_slot(&self, slot: u8) -> Result<()> {
        if slot < self.image_slots {
            return Ok(());
        }
        Err(MachineError::NoSlot { id: self.dir.id().to_string(), slot, slots: self.image_slots })
    }

    /// Writes the state of a stopped guest; its memory is in the template's file already.
    async fn write_state(&self, template: &Template) -> Result<()> {
        let path = template.state();
        let mut options = fs::OpenOptions::new();
        let state = options.write(true).create_new(true).mode(0o600).open(&path);
        let state = state.map_err(MachineError::file("make", &path))?;
        let mut qmp = Qmp::connect(&self.dir).await?;
        qmp.stop().await?;
        qmp.migrate_without_shared_memory().await?;
        qmp.get_fd("state", &state).await?;
        qmp.execute("migrate", json!({"uri": "fd:state"})).await?;
        qmp.migrated(MIGRATION_PATIENCE).await?;
        state.sync_all().map_err(MachineError::file("write", &path))
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn pid(&self) -> i32 {
        self.process.pid()
    }

    fn dir(&self) -> &VmDir {
        &self.dir
    }

    async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>> {
        let inside = self.dir.inside();
        let stream = self.dir.connect(&inside, AGENT_SOCKET).await;
        let socket = inside.join(AGENT_SOCKET);
        Ok(Box::pin(stream.map_err(|source| MachineError::Socket { action: "connect to", socket, source })?))
    }

    async fn put_image(&self, slot: u8, image: &Path) -> Result<()> {
        self.check_slot(slot)?;
        let image = Asset::open(image)?;
        let size = image.file().metadata().map_err(MachineError::file("look at", image.path()))?.len();
        let _asking = self.asking.lock().await;
        // QEMU itself may not make a file that large.
        self.dir.resize_inside(&blank_file(slot), size)?;
        slots::put(&mut Qmp::connect(&self.dir).await?, slot, image.file(), size).await
    }

    async fn take_image(&self, slot: u8) -> Result<()> {
        self.check_slot(slot)?;
        let _asking = self.asking.lock().await;
        slots::take(&mut Qmp::connect(&self.dir).await?, slot).await
    }

    async fn pause(&self) -> Result<()> {
        let _asking = self.asking.lock().await;
        Qmp::connect(&self.dir).await?.stop().await
    }

    async fn resume(&self) -> Result<()> {
        let _asking = self.asking.lock().await;
        let mut qmp = Qmp::connect(&self.dir).await?;
        if qmp.status().await?.running { Ok(()) } else { qmp.cont().await }
    }

    async fn save(&self) -> Result<Template> {
        let Some((template, kind)) = self.template.clone() else {
            let what = "make a template of a machine that was not booted for that".to_owned();
            return Err(MachineError::Unsupported { vmm: "QEMU", what });
        };
        let _asking = self.asking.lock().await;
        let written = self.write_state(&template).await;
        let killed = self.kill().await;
        written?;
        killed?;
        let memory = template.memory();
        seal(&memory).map_err(MachineError::file("seal", &memory))?;
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

/// Makes a template's memory root's. QEMU before 8.2 opens even what it only reads for writing, so its group may do that:
/// but who is not the owner cannot hide that he has written (see `Template::check`).
fn seal(memory: &Path) -> io::Result<()> {
    let file = File::open(memory)?;
    std::os::unix::fs::fchown(&file, Some(0), None)?;
    file.set_permissions(fs::Permissions::from_mode(0o660))?;
    file.sync_all()
}
