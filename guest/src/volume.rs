//! Volumes: directories that containers mount.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use lambdalet_proto::MAX_PUSHED;
use lambdalet_proto::agent::v1::Volume;
use lambdalet_proto::agent::v1::volume::Kind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::container::check_name;
use crate::error::{Error, Result, Tried};
use crate::guest::Guest;
use crate::tree;

/// What a pushed volume may hold: the old files and the new while they are exchanged, and their directories.
const PUSHED: usize = 2 * MAX_PUSHED + (1 << 20);

/// A volume that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) path: PathBuf,
    mounted: bool,
    pub(crate) pushed: bool,
}

/// Volumes by name.
pub(crate) type Volumes = BTreeMap<String, Made>;

impl Guest {
    /// Makes a volume. One of the same name is left as it is.
    ///
    /// # Errors
    /// A bad name or kind, or what the kernel refused.
    pub(crate) fn make_volume(&self, volume: &Volume) -> Result<()> {
        let name = &volume.name;
        check_name("volume", name)?;
        let mut volumes = self.volumes();
        if volumes.contains_key(name) {
            return Ok(());
        }
        let kind = volume.kind.as_ref().ok_or_else(|| Error::invalid(format!("volume {name} has no kind")))?;
        let made = match kind {
            Kind::Scratch(_) => Made { path: self.paths.scratch_volume(name), mounted: false, pushed: false },
            Kind::Memory(_) => Made { path: self.paths.memory_volume(name), mounted: true, pushed: false },
            Kind::Pushed(_) => Made { path: self.paths.memory_volume(name), mounted: true, pushed: true },
        };
        let size = match kind {
            Kind::Memory(0) | Kind::Scratch(_) => None,
            Kind::Memory(bytes) => Some(format!("size={bytes}")),
            Kind::Pushed(_) => Some(format!("size={PUSHED}")),
        };
        make(&made, size.as_deref(), volume).tried(|| format!("failed to make volume {name}"))?;
        volumes.insert(name.clone(), made);
        Ok(())
    }

    /// Removes a volume. One that is not there is fine.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn remove_volume(&self, name: &str) -> Result<()> {
        let mut volumes = self.volumes();
        let Some(made) = volumes.get(name) else { return Ok(()) };
        unmake(made).tried(|| format!("failed to remove volume {name}"))?;
        volumes.remove(name);
        Ok(())
    }

    /// Where a volume is.
    ///
    /// # Errors
    /// There is none of that name.
    pub(crate) fn volume(&self, name: &str) -> Result<PathBuf> {
        let found = self.volumes().get(name).map(|made| made.path.clone());
        found.ok_or_else(|| Error::not_found(format!("there is no volume {name:?}")))
    }

    /// Name and place of each volume on the scratch disk.
    pub(crate) fn scratch_volumes(&self) -> Vec<(String, PathBuf)> {
        let volumes = self.volumes();
        let on_disk = volumes.iter().filter(|(_, made)| !made.mounted);
        on_disk.map(|(name, made)| (name.clone(), made.path.clone())).collect()
    }
}

fn make(made: &Made, size: Option<&str>, volume: &Volume) -> io::Result<()> {
    fs::create_dir_all(&made.path)?;
    if made.mounted {
        mount(Some("tmpfs"), &made.path, Some("tmpfs"), MsFlags::MS_NODEV, size)?;
    }
    chown(&made.path, Some(0), Some(volume.gid))?;
    let mode = if volume.mode == 0 { 0o777 } else { volume.mode };
    fs::set_permissions(&made.path, fs::Permissions::from_mode(mode))
}

fn unmake(made: &Made) -> io::Result<()> {
    if made.mounted {
        // Containers that still have it keep it until they end.
        umount2(&made.path, MntFlags::MNT_DETACH)?;
        fs::remove_dir(&made.path)
    } else {
        tree::remove(&made.path)
    }
}
