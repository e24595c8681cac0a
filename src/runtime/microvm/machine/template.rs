//! Templates: the state of a booted guest, from which others start in a moment.
//!
//! A template is a directory with the guest's memory, the state of its devices and a description of what it was made
//! of, written last: without that it is none. Templates are found by what they are of, so those of an older kernel,
//! guest or VMM are never found again; [`Templates::trim`] removes what was not found for the longest time.
//!
//! Nobody is to write to a template's memory again. Firecracker opens it to read, as does QEMU since 8.2; an older QEMU
//! opens for writing even what it maps privately, so a VMM that its guest has taken over could: that is noticed before
//! the next machine is made of it, not undone in those that run.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::directory::write_json;
use super::error::{MachineError, Result};
use super::{MachineSpec, VmId};
use crate::file::Synced;

const DESCRIPTION: &str = "template.json";
/// What has been half made for so long, nobody is making any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// What a machine may be restored from: the whole state of a guest of one kernel, guest bundle and size. It holds
/// nothing of any Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// The directory that holds it.
    pub path: PathBuf,
}

/// What a template is of. Guests of equal kinds look the same from inside.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateKind {
    /// The manager, its VMM's version and how that runs a guest.
    pub vmm: String,
    /// [`Asset::identity`](super::Asset::identity) of the kernel.
    pub kernel: String,
    /// That of the initramfs.
    pub initramfs: String,
    /// Bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Image slots.
    pub image_slots: u8,
    /// Bytes of the scratch disk.
    pub scratch: u64,
    /// Whether it has a network card.
    pub network: bool,
}

/// The description of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    kind: TemplateKind,
    /// Of the memory's file, which never changes again.
    memory_seal: String,
    /// Of the state's, which neither does.
    state_seal: String,
}

/// The templates of a node.
#[derive(Clone, Debug)]
pub struct Templates {
    path: PathBuf,
}

// === impl TemplateKind ===

impl TemplateKind {
    /// That of a machine, run by this VMM.
    ///
    /// # Errors
    /// [`MachineError::File`] if its kernel, initramfs or scratch disk cannot be looked at.
    pub fn of(vmm: &str, spec: &MachineSpec) -> Result<Self> {
        let identity = |asset: &super::Asset| asset.identity().map_err(MachineError::file("look at", asset.path()));
        let scratch = fs::symlink_metadata(&spec.scratch).map_err(MachineError::file("look at", &spec.scratch))?;
        Ok(Self {
            vmm: vmm.to_owned(),
            kernel: identity(&spec.kernel)?,
            initramfs: identity(&spec.initramfs)?,
            memory: spec.memory,
            vcpus: spec.vcpus,
            image_slots: spec.image_slots,
            scratch: scratch.size(),
            network: spec.tap.is_some(),
        })
    }

    fn directory(&self) -> String {
        let text = format!("{self:?}");
        Sha256::digest(text.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

// === impl Template ===

impl Template {
    /// The guest's memory.
    pub(super) fn memory(&self) -> PathBuf {
        self.path.join("memory")
    }

    /// The state of its processors and devices.
    pub(super) fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    /// Says what is in it, which makes it a template.
    pub(super) fn describe(&self, kind: TemplateKind) -> Result<()> {
        let sealed = |path: &Path| seal(path).map_err(MachineError::file("look at", path));
        let (memory_seal, state_seal) = (sealed(&self.memory())?, sealed(&self.state())?);
        let path = self.path.join(DESCRIPTION);
        let description = Description { kind, memory_seal, state_seal };
        write_json(&path, &description, Synced::Content).map_err(MachineError::file("write", &path))
    }

    /// # Errors
    /// [`MachineError::Mismatch`] if it is of something else, is not whole, or was written to since.
    pub(super) fn check(&self, kind: &TemplateKind) -> Result<()> {
        let mismatch = |what: &str| MachineError::Mismatch { template: self.path.clone(), what: what.to_owned() };
        let text = fs::read(self.path.join(DESCRIPTION)).map_err(|_| mismatch("it has no description"))?;
        let description: Description =
            serde_json::from_slice(&text).map_err(|_| mismatch("its description cannot be read"))?;
        if description.kind != *kind {
            return Err(mismatch(&format!("it is of {:?}, not of {kind:?}", description.kind)));
        }
        let is_as_made = |path: &Path, made: &str| seal(path).is_ok_and(|seal| seal == made);
        if !is_as_made(&self.memory(), &description.memory_seal) {
            return Err(mismatch("its memory was changed after it was made"));
        }
        if !is_as_made(&self.state(), &description.state_seal) {
            return Err(mismatch("its state was changed after it was made"));
        }
        Ok(())
    }

    /// Notes that it is of use.
    fn touch(&self) -> io::Result<()> {
        fs::File::options().write(true).open(self.path.join(DESCRIPTION))?.set_modified(SystemTime::now())
    }
}

/// Changes with every write to the file. Only its owner, root, could set the time of the last write back.
fn seal(path: &Path) -> io::Result<String> {
    let seen = fs::symlink_metadata(path)?;
    Ok(format!("{}:{}:{}:{}.{}", seen.dev(), seen.ino(), seen.size(), seen.mtime(), seen.mtime_nsec()))
}

// === impl Templates ===

impl Templates {
    /// Those in this directory, which is made when the first one is.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The template of that kind, if there is a good one. One that is spoilt is removed.
    pub fn find(&self, kind: &TemplateKind) -> Option<Template> {
        let template = Template { path: self.path.join(kind.directory()) };
        match template.check(kind) {
            Ok(()) => {
                if let Err(error) = template.touch() {
                    tracing::debug!(%error, path = %template.path.display(), "the use of a template is not noted");
                }
                Some(template)
            }
            Err(error) => {
                if template.path.exists() {
                    tracing::warn!(error = crate::telemetry::chain(&error), "removing a template");
                    self.discard(&template);
                }
                None
            }
        }
    }

    /// An empty directory for a template to be made in.
    ///
    /// # Errors
    /// [`MachineError::File`].
    pub fn begin(&self) -> Result<PathBuf> {
        let path = self.path.join(format!("new-{}", VmId::random()));
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&path).map_err(MachineError::file("make", &path))?;
        Ok(path)
    }

    /// Puts one that was made there in its place. If another was faster, that is the template.
    ///
    /// # Errors
    /// [`MachineError::Mismatch`] if it is no template of that kind, [`MachineError::File`].
    pub fn commit(&self, made: Template, kind: &TemplateKind) -> Result<Template> {
        made.check(kind)?;
        let place = self.path.join(kind.directory());
        match fs::rename(&made.path, &place) {
            Err(_) if place.exists() => self.discard(&made),
            result => result.map_err(MachineError::file("rename", &made.path))?,
        }
        let template = Template { path: place };
        template.check(kind)?;
        Ok(template)
    }

    /// Removes those that were not found for the longest time, until there are at most so many; and what somebody has
    /// begun to make who is gone.
    ///
    /// # Errors
    /// [`MachineError::File`] if they cannot be listed.
    pub fn trim(&self, most: usize) -> Result<()> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(MachineError::file("list", &self.path))?,
        };
        let changed = |path: &Path| fs::metadata(path).and_then(|seen| seen.modified());
        let mut used = Vec::new();
        for template in entries.flatten().map(|entry| Template { path: entry.path() }) {
            match changed(&template.path.join(DESCRIPTION)) {
                Ok(at) => used.push((at, template)),
                Err(_) => {
                    let age = changed(&template.path).ok().and_then(|at| at.elapsed().ok());
                    if age.is_some_and(|age| age > ABANDONED) {
                        self.discard(&template);
                    }
                }
            }
        }
        used.sort_by_key(|(at, _)| *at);
        let many = used.len().saturating_sub(most);
        used.iter().take(many).for_each(|(_, template)| self.discard(template));
        Ok(())
    }

    /// Removes a template. Machines that were restored from it keep their memory.
    pub fn discard(&self, template: &Template) {
        match fs::remove_dir_all(&template.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %template.path.display(), "failed to remove a template");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
pub(in crate::runtime::microvm) mod tests {
    use std::io::Write;

    use super::*;

    /// A kind that differs from others by the guest's memory.
    pub(in crate::runtime::microvm) fn kind(memory: u64) -> TemplateKind {
        TemplateKind {
            vmm: "qemu 7.2 tcg".to_owned(),
            kernel: "k".to_owned(),
            initramfs: "i".to_owned(),
            memory,
            vcpus: 1,
            image_slots: 8,
            scratch: 1 << 20,
            network: true,
        }
    }

    fn made(templates: &Templates, kind: &TemplateKind) -> Template {
        written(templates.begin().unwrap(), kind)
    }

    /// A template in that directory, of nothing.
    pub(in crate::runtime::microvm) fn written(path: PathBuf, kind: &TemplateKind) -> Template {
        let template = Template { path };
        fs::write(template.memory(), "memory").unwrap();
        fs::write(template.state(), "state").unwrap();
        template.describe(kind.clone()).unwrap();
        template
    }

    #[test]
    fn a_template_is_found_by_exactly_what_it_is_of() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().join("templates"));
        templates.trim(0).unwrap();
        assert_eq!(templates.find(&kind(1)), None);
        let template = made(&templates, &kind(1));
        assert!(templates.commit(template.clone(), &kind(2)).is_err());
        let template = templates.commit(template, &kind(1)).unwrap();
        assert_eq!(templates.find(&kind(1)), Some(template.clone()));
        assert_eq!(templates.find(&kind(2)), None);
        let second = templates.commit(made(&templates, &kind(1)), &kind(1)).unwrap();
        assert_eq!(second, template, "the first one stays");
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_makes_room() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().to_owned());
        for memory in [1, 2, 3] {
            templates.commit(made(&templates, &kind(memory)), &kind(memory)).unwrap();
        }
        for memory in [2, 3, 1] {
            assert!(templates.find(&kind(memory)).is_some());
        }
        let (making, abandoned) = (templates.begin().unwrap(), templates.begin().unwrap());
        let long_ago = SystemTime::now() - 2 * ABANDONED;
        fs::File::open(&abandoned).unwrap().set_modified(long_ago).unwrap();
        templates.trim(2).unwrap();
        let left = [1, 2, 3].map(|memory| templates.find(&kind(memory)).is_some());
        assert_eq!((left, making.exists(), abandoned.exists()), ([true, false, true], true, false));
    }

    #[test]
    fn a_template_that_was_written_to_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().to_owned());
        for file in [Template::memory, Template::state] {
            let template = templates.commit(made(&templates, &kind(1)), &kind(1)).unwrap();
            // File systems tell times in steps of the kernel's clock.
            std::thread::sleep(Duration::from_millis(10));
            let mut spoilt = fs::OpenOptions::new().write(true).open(file(&template)).unwrap();
            spoilt.write_all(b"SPOILT").unwrap();
            assert_eq!(templates.find(&kind(1)), None);
            assert!(!template.path.exists(), "it is of no use to anybody");
        }
    }

    #[test]
    fn half_a_template_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().to_owned());
        let half = Template { path: templates.begin().unwrap() };
        fs::write(half.memory(), "memory").unwrap();
        assert!(matches!(templates.commit(half, &kind(1)), Err(MachineError::Mismatch { .. })));
    }
}
