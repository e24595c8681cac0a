//! What this node was told of microVMs.

use std::path::PathBuf;

/// Pods as microVMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicrovmSettings {
    /// Directory of the guest bundle: `vmlinux` and `initramfs.cpio`. Without them the node has no microVMs.
    pub guest_image: PathBuf,
    /// Whether the operator named it: only then is its absence worth a warning.
    pub guest_image_was_told: bool,
    /// Another kernel than the bundle's: an uncompressed ELF file.
    pub kernel_image: Option<PathBuf>,
    /// Directories beneath which Pods may name a kernel and an initramfs of their own; none lets them name none.
    pub asset_dirs: Vec<PathBuf>,
    /// What QEMU's guests run on.
    pub accel: MicrovmAccel,
    /// Where the memory of Firecracker's restored guests comes from.
    pub memory: MicrovmMemory,
    /// What runs the guests of Pods that do not say.
    pub vmm: VmmChoice,
    /// Whether each is held to CPUs of its own, as far as there are enough, and to the memory of their NUMA node.
    pub pin_cpus: bool,
    /// How many booted guests of each VMM in use wait, paused, for Pods to come.
    pub warm: usize,
    /// Host paths beneath these may be copied into guests, for reading.
    pub host_paths: Vec<PathBuf>,
    /// Below this are files that were made for sandboxes and that guests get copies of; `None` is the node's own place.
    pub files: Option<PathBuf>,
    /// Below this are Pods' directories, laid out as a kubelet's; `None` is the node's own place.
    pub pods: Option<PathBuf>,
}

impl Default for MicrovmSettings {
    fn default() -> Self {
        Self {
            guest_image: PathBuf::from("/usr/share/lambdalet/guest"),
            guest_image_was_told: false,
            kernel_image: None,
            asset_dirs: Vec::new(),
            accel: MicrovmAccel::default(),
            memory: MicrovmMemory::default(),
            vmm: VmmChoice::default(),
            pin_cpus: false,
            warm: 0,
            host_paths: Vec::new(),
            files: None,
            pods: None,
        }
    }
}

/// What QEMU's guests run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MicrovmAccel {
    /// KVM where it works, else QEMU's translator
    #[default]
    Auto,
    /// KVM, or nothing
    Kvm,
    /// The translator: anywhere, and some ten times slower
    Tcg,
}

/// Where the memory of Firecracker's restored guests comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MicrovmMemory {
    /// The template's file: guests share what they do not write
    #[default]
    File,
    /// A process beside each VMM that brings the pages its guest touches
    Uffd,
}

/// Which virtual machine monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum VmmChoice {
    /// QEMU if it works here, else Firecracker
    #[default]
    Auto,
    /// QEMU's microvm machine
    Qemu,
    /// Firecracker, which needs KVM
    Firecracker,
}
