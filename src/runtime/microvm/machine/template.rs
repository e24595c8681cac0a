//! Templates: the state of a booted guest, from which others start in a moment.
//!
//! A template is a directory with the guest's memory, the state of its devices and a description of what it was made
//! of, written last: without that it is none. Templates are found by what they are of, so those of an older kernel,
//! guest or VMM are never found again, and [`Templates::sweep`] removes them.
//!
//! Nobody is to write to a template's memory again. Firecracker opens it to read, as does QEMU since 8.2; an older QEMU
//! opens for writing even what it maps privately, so a VMM that its guest has taken over could: that is noticed before
//! the next machine is made of it, not undone in those that run.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::directory::write_json;
use super::error::{MachineError, Result};
use super::{MachineSpec, VmId};

const DESCRIPTION: &str = "template.json";

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
    /// Whether it has a network card.
    pub network: bool,
}

/// The description of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    kind: TemplateKind,
    /// Of the memory's file, which never changes again.
    memory_seal: String,
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
    /// [`MachineError::File`] if its kernel or initramfs cannot be looked at.
    pub fn of(vmm: &str, spec: &MachineSpec) -> Result<Self> {
        let identity = |asset: &super::Asset| asset.identity().map_err(MachineError::file("look at", asset.path()));
        Ok(Self {
            vmm: vmm.to_owned(),
            kernel: identity(&spec.kernel)?,
            initramfs: identity(&spec.initramfs)?,
            memory: spec.memory,
            vcpus: spec.vcpus,
            image_slots: spec.image_slots,
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
        let memory_seal = seal(&self.memory()).map_err(MachineError::file("look at", &self.memory()))?;
        let path = self.path.join(DESCRIPTION);
        write_json(&path, &Description { kind, memory_seal }).map_err(MachineError::file("write", &path))
    }

    /// # Errors
    /// [`MachineError::Mismatch`] if it is of something else, is not whole, or its memory was written to since.
    pub(super) fn check(&self, kind: &TemplateKind) -> Result<()> {
        let mismatch = |what: &str| MachineError::Mismatch { template: self.path.clone(), what: what.to_owned() };
        let text = fs::read(self.path.join(DESCRIPTION)).map_err(|_| mismatch("it has no description"))?;
        let description: Description =
            serde_json::from_slice(&text).map_err(|_| mismatch("its description cannot be read"))?;
        if description.kind != *kind {
            return Err(mismatch(&format!("it is of {:?}, not of {kind:?}", description.kind)));
        }
        match seal(&self.memory()) {
            Ok(seal) if seal == description.memory_seal => Ok(()),
            _ => Err(mismatch("its memory was changed after it was made")),
        }
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
            Ok(()) => Some(template),
            Err(error) => {
                if template.path.exists() {
                    tracing::warn!(error = crate::telemetry::chain(&error), "removing a template");
                    self.discard(&template.path);
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
            Err(_) if place.exists() => self.discard(&made.path),
            result => result.map_err(MachineError::file("rename", &made.path))?,
        }
        let template = Template { path: place };
        template.check(kind)?;
        Ok(template)
    }

    /// Removes whatever is of none of these kinds: templates of older kernels and guests, and what is half made. To be
    /// called when no template is being made.
    ///
    /// # Errors
    /// [`MachineError::File`] if they cannot be listed.
    pub fn sweep(&self, keep: &[TemplateKind]) -> Result<()> {
        let keep: Vec<String> = keep.iter().map(TemplateKind::directory).collect();
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(MachineError::file("list", &self.path))?,
        };
        for entry in entries.flatten() {
            if !entry.file_name().to_str().is_some_and(|name| keep.iter().any(|kept| kept == name)) {
                self.discard(&entry.path());
            }
        }
        Ok(())
    }

    /// Machines that were restored from it keep their memory.
    fn discard(&self, path: &Path) {
        if let Err(error) = fs::remove_dir_all(path) {
            tracing::warn!(%error, path = %path.display(), "failed to remove a template");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// A kind that differs from others by the guest's memory.
    pub(in super::super) fn kind(memory: u64) -> TemplateKind {
        TemplateKind {
            vmm: "qemu 7.2 tcg".to_owned(),
            kernel: "k".to_owned(),
            initramfs: "i".to_owned(),
            memory,
            vcpus: 1,
            image_slots: 8,
            network: true,
        }
    }

    fn made(templates: &Templates, kind: &TemplateKind) -> Template {
        let template = Template { path: templates.begin().unwrap() };
        fs::write(template.memory(), "memory").unwrap();
        template.describe(kind.clone()).unwrap();
        template
    }

    #[test]
    fn a_template_is_found_by_exactly_what_it_is_of() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().join("templates"));
        templates.sweep(&[]).unwrap();
        assert_eq!(templates.find(&kind(1)), None);
        let template = made(&templates, &kind(1));
        assert!(templates.commit(template.clone(), &kind(2)).is_err());
        let template = templates.commit(template, &kind(1)).unwrap();
        assert_eq!(templates.find(&kind(1)), Some(template.clone()));
        assert_eq!(templates.find(&kind(2)), None);
        let second = templates.commit(made(&templates, &kind(1)), &kind(1)).unwrap();
        assert_eq!(second, template, "the first one stays");
        templates.commit(made(&templates, &kind(2)), &kind(2)).unwrap();
        templates.begin().unwrap();
        templates.sweep(&[kind(2)]).unwrap();
        assert_eq!(fs::read_dir(directory.path().join("templates")).unwrap().count(), 1);
        assert!(templates.find(&kind(2)).is_some());
    }

    #[test]
    fn a_template_whose_memory_was_written_to_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(directory.path().to_owned());
        let template = templates.commit(made(&templates, &kind(1)), &kind(1)).unwrap();
        // File systems tell times in steps of the kernel's clock.
        std::thread::sleep(std::time::Duration::from_millis(10));
        let mut memory = fs::OpenOptions::new().write(true).open(template.memory()).unwrap();
        memory.write_all(b"MEMORY").unwrap();
        assert_eq!(templates.find(&kind(1)), None);
        assert!(!template.path.exists(), "it is of no use to anybody");
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
