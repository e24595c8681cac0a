//! Images: read-only file systems on block devices that the node puts behind fixed slots.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use lambdalet_proto::agent::v1::ContainerSpec;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::container::check_name;
use crate::error::{Error, Result, Tried};
use crate::guest::Guest;

/// How long a slot may take to show its new content after the node has said that it is there.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);
const NONE: Option<&str> = None;

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    slot: String,
    path: PathBuf,
}

/// Images by the node's name for them.
pub(crate) type Images = BTreeMap<String, Image>;

impl Guest {
    /// Mounts the image in a slot. The same again is fine.
    ///
    /// # Errors
    /// A slot that is not there or holds another image, or no such file system.
    pub(crate) fn mount_image(&self, slot: &str, image: &str, filesystem: &str) -> Result<()> {
        check_name("image", image)?;
        if !matches!(filesystem, "erofs" | "ext4") {
            return Err(Error::invalid(format!("images are erofs or ext4, not {filesystem:?}")));
        }
        let mut images = self.images();
        if let Some(known) = images.get(image) {
            let same = known.slot == slot;
            return if same { Ok(()) } else { Err(Error::in_use(format!("image {image} is in slot {}", known.slot))) };
        }
        if let Some((other, _)) = images.iter().find(|(_, known)| known.slot == slot) {
            return Err(Error::in_use(format!("slot {slot} holds image {other}")));
        }
        let tried = || format!("failed to mount image {image} from slot {slot}");
        let path = self.paths.image(image);
        fs::create_dir_all(&path).tried(tried)?;
        if self.stand_in {
            // Without block devices a slot is a directory.
            mount(Some(slot), &path, NONE, MsFlags::MS_BIND, NONE).tried(tried)?;
        } else {
            let device =
                device(slot).tried(tried)?.ok_or_else(|| Error::not_found(format!("there is no slot {slot}")))?;
            mount_device(&device, &path, filesystem).tried(tried)?;
        }
        images.insert(image.to_owned(), Image { slot: slot.to_owned(), path });
        Ok(())
    }

    /// Lets go of an image, and of whatever lies in a slot. What is not mounted is fine.
    ///
    /// # Errors
    /// A container uses it.
    pub(crate) fn unmount_image(&self, image: &str, slot: &str) -> Result<()> {
        let held = self.images().iter().find(|(_, known)| known.slot == slot).map(|(held, _)| held.clone());
        [image].into_iter().chain(held.as_deref()).try_for_each(|image| self.unmount(image))
    }

    fn unmount(&self, image: &str) -> Result<()> {
        let uses = |spec: &ContainerSpec| spec.image == image || spec.mounts.iter().any(|mount| mount.image == image);
        if self.containers().values().any(|container| uses(&container.spec)) {
            return Err(Error::in_use(format!("image {image} is in use")));
        }
        let mut images = self.images();
        let Some(known) = images.get(image) else { return Ok(()) };
        let tried = || format!("failed to unmount image {image}");
        umount2(&known.path, MntFlags::empty()).tried(tried)?;
        fs::remove_dir(&known.path).tried(tried)?;
        images.remove(image);
        Ok(())
    }

    /// Where an image is mounted.
    ///
    /// # Errors
    /// It is not.
    pub(crate) fn image(&self, image: &str) -> Result<PathBuf> {
        let found = self.images().get(image).map(|known| known.path.clone());
        found.ok_or_else(|| Error::not_found(format!("image {image:?} is not mounted")))
    }
}

/// The device node of a virtio-blk device with this serial.
pub(crate) fn device(serial: &str) -> io::Result<Option<PathBuf>> {
    for block in fs::read_dir("/sys/block")?.flatten() {
        if fs::read_to_string(block.path().join("serial")).is_ok_and(|said| said.trim() == serial) {
            return Ok(Some(Path::new("/dev").join(block.file_name())));
        }
    }
    Ok(None)
}

fn mount_device(device: &Path, path: &Path, filesystem: &str) -> io::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    let end = Instant::now() + PATIENCE;
    loop {
        match mount(Some(device), path, Some(filesystem), flags, NONE) {
            // The device's new size is told by an interrupt, which may come after the node's word.
            Err(Errno::EINVAL | Errno::EIO | Errno::ENXIO | Errno::ENODEV) if Instant::now() < end => {
                thread::sleep(PAUSE)
            }
            mounted => return mounted.map_err(io::Error::from),
        }
    }
}
