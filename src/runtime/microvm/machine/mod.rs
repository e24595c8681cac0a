//! Machines: one VMM process each, started by a [`MachineManager`] and held as a [`Machine`].
//!
//! ```text
//! MachineSpec --boot-----> Machine --agent---> byte stream to the guest's agent (framing is the agent's affair)
//!             --restore-->         --put_image-> a read-only block image behind a slot, while the guest runs
//! Template <--save--------         --exited--> told by the kernel (pidfd)
//! VmDir ----adopt-------->         (a machine outlives this process; its checkpoint is in its directory)
//! ```
//!
//! The list of a guest's disks is fixed at boot, since the machines have no hotplug: [`SCRATCH`], then `image0` to
//! `imageN`. Each disk's serial is its name. A slot without an image has no bytes. So every guest of one size looks
//! the same from inside, and a template fits each of them.
//!
//! Nothing here knows Pods or containers. All a guest or a VMM can write (its directory, its sockets) is taken for
//! hostile: sockets are opened without following links, answers are bounded.

pub mod arguments;
pub mod asset;
mod cgroup;
pub mod directory;
pub mod error;
pub mod firecracker;
mod host;
mod jail;
pub mod pin;
pub mod pool;
mod process;
pub mod qemu;
pub mod template;
pub mod warm;

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;

pub use asset::{Asset, AssetDirs};
pub use directory::{VmDir, VmDirs, VmId, trim_consoles};
pub use error::{MachineError, Result};
pub use jail::VmmUser;
pub use template::{Template, TemplateKind};

use crate::runtime::session::Duplex;

/// Serial of the writable disk that every guest has.
pub const SCRATCH: &str = "scratch";

/// Most image slots of a machine. With a scratch disk, a network card, the agent's port and a random number generator
/// that leaves half of the 24 transports of QEMU's `microvm` machine.
pub const MAX_IMAGE_SLOTS: u8 = 8;

/// The largest file a VMM may write where the scratch disk is smaller: its console is one.
const SMALLEST_LARGEST_FILE: u64 = 64 << 20;

/// Serial of an image slot, counted from 0.
pub fn slot_name(slot: u8) -> String {
    format!("image{slot}")
}

/// What a machine is to be made of.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Where it lives; its id is the machine's.
    pub dir: VmDir,
    /// An uncompressed ELF kernel with a PVH note.
    pub kernel: Asset,
    /// Its initramfs, whose `/init` is the agent.
    pub initramfs: Asset,
    /// Added to the manager's own kernel arguments, in this order.
    pub kernel_args: Vec<String>,
    /// Of the guest, in bytes; a multiple of 1 MiB.
    pub memory: u64,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// The host's CPUs that all threads of the VMM are held to; `None`: all.
    pub cpus: Option<Vec<u32>>,
    /// The host's NUMA node that the guest's memory comes from; `None`: any.
    pub numa_node: Option<u32>,
    /// Its network card; without one the guest has none.
    pub tap: Option<TapLink>,
    /// A raw file that becomes the disk [`SCRATCH`], in the directory's [`VmDir::inside`].
    pub scratch: PathBuf,
    /// How many image slots it gets, up to [`MAX_IMAGE_SLOTS`].
    pub image_slots: u8,
    /// Path below the cgroup root that the VMM's own cgroup is made in.
    pub cgroup_parent: String,
    /// The directory that [`Machine::save`] will leave a template in; it exists, and is empty at boot. `None` for a
    /// machine that is there to run.
    pub template: Option<PathBuf>,
}

/// The host's end of a guest's network card.
#[derive(Clone, Debug)]
pub struct TapLink {
    /// The interface on the host.
    pub name: String,
    /// Hardware address of the card in the guest.
    pub mac: [u8; 6],
    /// The open device, for a VMM that is handed it; `None` for one that opens it by name.
    pub device: Option<Arc<OwnedFd>>,
    /// The network namespace that the device is in, for a VMM that opens it by name; until that is in it too, this is what
    /// keeps it.
    pub namespace: Option<Arc<OwnedFd>>,
}

/// How a VMM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// By itself, with this code; 0 after the guest powered off.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was started by an earlier process of this node, which alone could have been told.
    Unknown,
}

/// Why a manager cannot work on this host, in words for `lambdalet check`: what is missing, and what that means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why(pub String);

impl MachineSpec {
    /// The scratch disk's name in its directory.
    fn scratch_name(&self) -> &str {
        // Whatever else it is, `validate` has refused it.
        self.scratch.file_name().and_then(OsStr::to_str).unwrap_or(SCRATCH)
    }

    /// Whether a machine could be like that at all.
    ///
    /// # Errors
    /// [`MachineError::Invalid`], with the value.
    pub fn validate(&self) -> Result<()> {
        let invalid = |what: String, reason: &str| Err(MachineError::Invalid { what, reason: reason.to_owned() });
        if self.memory == 0 || !self.memory.is_multiple_of(1 << 20) {
            return invalid(format!("memory of {} bytes", self.memory), "it must be whole MiB");
        }
        if self.vcpus == 0 {
            return invalid("0 vCPUs".to_owned(), "there must be one");
        }
        if self.image_slots > MAX_IMAGE_SLOTS {
            return invalid(format!("{} image slots", self.image_slots), "a machine has 8 at the most");
        }
        let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        let named = self.scratch.file_name().and_then(OsStr::to_str).is_some_and(plain);
        if !named || self.scratch.parent() != Some(self.dir.inside().as_path()) {
            let reason = "it must lie in what the VMM sees of the machine's directory";
            return invalid(format!("scratch disk {}", self.scratch.display()), reason);
        }
        if let Some(argument) = self.kernel_args.iter().find(|argument| argument.contains(['\0', '\n'])) {
            return invalid(format!("kernel argument {argument:?}"), "it must be one line");
        }
        Ok(())
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who opens the tap device of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapUse {
    /// The node, and hands it over; it goes away with the VMM.
    Handed,
    /// The VMM by its name, as this user, in a network namespace that goes away with the VMM.
    Named {
        /// The user the device belongs to.
        uid: u32,
    },
}

/// Starts machines of one kind.
#[async_trait]
pub trait MachineManager: Send + Sync {
    /// As flags and annotations name it.
    fn name(&self) -> &'static str;

    /// How its machines get their network card.
    fn tap_use(&self) -> TapUse;

    /// What it will use on this host, in words.
    ///
    /// # Errors
    /// Why it will not work here.
    async fn check(&self) -> Result<String, Why>;

    /// What a template of such a machine is of.
    ///
    /// # Errors
    /// [`MachineError::Unsupported`] if the VMM does not work here.
    async fn template_kind(&self, spec: &MachineSpec) -> Result<TemplateKind>;

    /// Starts a machine from its kernel. It runs when this returns; its agent may not answer yet.
    ///
    /// # Errors
    /// Nothing is left running on an error; files stay in its directory, for whoever wants to know why.
    async fn boot(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>>;

    /// Starts a machine from a template of the same kernel, initramfs, memory, CPUs and slots. It runs when this
    /// returns, with the template's clock, random numbers and addresses: the agent has to be told its own.
    ///
    /// # Errors
    /// As [`boot`](Self::boot); [`MachineError::Mismatch`] if the template is of something else.
    async fn restore(&self, spec: &MachineSpec, template: &Template) -> Result<Box<dyn Machine>>;

    /// The machine that an earlier process of this node left running in that directory; `None` if there is none.
    async fn adopt(&self, dir: &VmDir) -> Result<Option<Box<dyn Machine>>>;
}

/// A machine that was started. Dropping it lets the VMM go on; whoever started one waits for [`exited`](Self::exited)
/// or calls [`kill`](Self::kill) in the end, or the ended process stays in the process table.
#[async_trait]
pub trait Machine: Send + Sync + fmt::Debug {
    /// The VMM's process on the host.
    fn pid(&self) -> i32;

    /// Its directory.
    fn dir(&self) -> &VmDir;

    /// A byte stream to the guest's agent. There is one at a time: drop what was open before. What was on its way then
    /// may still come.
    async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>>;

    /// Puts an image behind a slot, in the place of what was there; the guest sees its size before this returns or
    /// soon after. The guest must not use the slot meanwhile.
    ///
    /// # Errors
    /// [`MachineError::NoSlot`]; and the image's or the VMM's. The slot is then empty or as it was.
    async fn put_image(&self, slot: u8, image: &Path) -> Result<()>;

    /// Empties a slot. The guest must not use it any more.
    async fn take_image(&self, slot: u8) -> Result<()>;

    /// Stops the guest's CPUs. Pausing a paused machine is Ok.
    async fn pause(&self) -> Result<()>;

    /// Lets them run again. Resuming a running machine is Ok.
    async fn resume(&self) -> Result<()>;

    /// Makes a template of the machine in its [`MachineSpec::template`], and ends the machine. Its slots are to be empty,
    /// its scratch disk without a mark of anybody.
    ///
    /// # Errors
    /// [`MachineError::Unsupported`] if it was not booted for that. What is half written has no description, and is no
    /// template.
    async fn save(&self) -> Result<Template>;

    /// Weighs the CPU time of its Pod beside that of others, on the scale of cgroup v1 (2 to 262144, 1024 is one core).
    ///
    /// # Errors
    /// [`MachineError::Start`] if the host's kernel refuses.
    fn weigh(&self, shares: u64) -> Result<()>;

    /// Has the VMM run in the cgroup that `spec` names, of which the machine is otherwise, with the same limits; its own is
    /// removed. Memory that it has taken stays with the cgroup above that.
    ///
    /// # Errors
    /// [`MachineError::Start`] if the host's kernel refuses. Then it may be in either, and has to be ended.
    async fn move_to(&mut self, spec: &MachineSpec) -> Result<()>;

    /// Has the VMM end, and waits for nothing: for whoever cannot. What there is of it on the host stays.
    fn kill_unwaited(&self);

    /// Ends the VMM at once, and returns when it has ended and its cgroup is gone. Killing an ended one is Ok.
    ///
    /// # Errors
    /// [`MachineError::Late`] if it has not ended after 20 s, [`MachineError::Start`] if its cgroup cannot be removed. Its
    /// directory has to stay until this is tried again.
    async fn kill(&self) -> Result<()>;

    /// Returns once it has ended, however often it is asked.
    async fn exited(&self) -> VmExit;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small machine that is never started.
    pub(super) fn spec() -> MachineSpec {
        let dirs = VmDirs::new(Path::new("/run/vms"), "default").unwrap();
        let dir = dirs.of(&VmId::new("one").unwrap());
        let kernel = Asset::open(Path::new("/proc/version")).unwrap();
        MachineSpec {
            scratch: dir.inside().join("scratch.img"),
            dir,
            initramfs: kernel.clone(),
            kernel,
            kernel_args: vec!["VMID=one".to_owned()],
            memory: 128 << 20,
            vcpus: 1,
            cpus: None,
            numa_node: None,
            tap: None,
            image_slots: 1,
            cgroup_parent: "l/pod".to_owned(),
            template: None,
        }
    }

    #[test]
    fn a_machine_that_cannot_be_is_refused() {
        spec().validate().unwrap();
        let scratch = |name: &str| MachineSpec { scratch: spec().dir.inside().join(name), ..spec() };
        for bad in [
            MachineSpec { memory: 0, ..spec() },
            MachineSpec { memory: (1 << 20) + 1, ..spec() },
            MachineSpec { vcpus: 0, ..spec() },
            MachineSpec { image_slots: MAX_IMAGE_SLOTS + 1, ..spec() },
            MachineSpec { kernel_args: vec!["a\nb".to_owned()], ..spec() },
            MachineSpec { scratch: "/etc/passwd".into(), ..spec() },
            scratch("../scratch"),
            scratch("below/scratch"),
            scratch("a,readonly=on"),
        ] {
            assert!(matches!(bad.validate(), Err(MachineError::Invalid { .. })), "{bad:?}");
        }
    }
}
