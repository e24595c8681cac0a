//! The flags of microVMs.

use std::path::{Component, PathBuf};

use anyhow::ensure;
use clap::Args;

use crate::config::Settings;
use crate::config::microvm::{MicrovmAccel, MicrovmMemory, VmmChoice};

/// Pods as microVMs.
#[derive(Debug, Args)]
#[command(next_help_heading = "MicroVMs")]
pub(in crate::args) struct MicrovmArgs {
    /// Directory of the guest bundle (vmlinux, initramfs.cpio) that microVMs start from; without one the node has no
    /// microVMs [default: /usr/share/lambdalet/guest]
    #[arg(long, value_name = "DIR")]
    guest_image: Option<PathBuf>,
    /// Kernel for guests instead of the bundle's: an uncompressed ELF file with a PVH note
    #[arg(long, value_name = "FILE")]
    kernel_image: Option<PathBuf>,
    /// Directories beneath which Pods may name a kernel and an initramfs of their own (KERNEL_IMAGE_PATH, INITRD_PATH)
    /// [default: none, so Pods may name none]
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    vm_asset_dirs: Vec<PathBuf>,
    /// What QEMU's guests run on [default: auto]
    #[arg(long, value_enum, value_name = "NAME")]
    microvm_accel: Option<MicrovmAccel>,
    /// Where Firecracker has the memory of a guest from that starts from a template [default: file]
    #[arg(long, value_enum, value_name = "NAME")]
    microvm_memory: Option<MicrovmMemory>,
    /// What runs guests of Pods without the annotation lambdalet.dev/vmm [default: auto]
    #[arg(long, value_enum, value_name = "NAME")]
    vmm: Option<VmmChoice>,
    /// Hold each microVM to as many CPUs of the host as it has vCPUs, in turn, and to the memory of their NUMA node; those
    /// of one microVM are of one node [default: the host's scheduler decides]
    #[arg(long)]
    microvm_pin_cpus: bool,
    /// Booted guests that wait, paused, for Pods to come, of the sizes that are started; each takes some 60 MiB of memory
    /// [default: 0]
    #[arg(long, value_name = "N")]
    microvm_warm: Option<usize>,
    /// Directories of the host of which guests may get copies, read-only, through hostPath and claims [default: none]
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    microvm_host_paths: Vec<PathBuf>,
}

impl MicrovmArgs {
    pub(in crate::args) fn apply(self, settings: &mut Settings) -> anyhow::Result<()> {
        let Self {
            guest_image,
            kernel_image,
            vm_asset_dirs,
            microvm_accel,
            microvm_memory,
            vmm,
            microvm_pin_cpus,
            microvm_warm,
            microvm_host_paths,
        } = self;
        for (flag, dirs) in [("vm-asset-dirs", &vm_asset_dirs), ("microvm-host-paths", &microvm_host_paths)] {
            for dir in dirs {
                let plain = dir.is_absolute() && !dir.components().any(|part| part == Component::ParentDir);
                ensure!(plain, "--{flag} {}: it must be an absolute path without \"..\"", dir.display());
            }
        }
        let target = &mut settings.runtime.microvm;
        target.guest_image_was_told = guest_image.is_some();
        super::set(&mut target.guest_image, guest_image);
        target.kernel_image = kernel_image;
        target.asset_dirs = vm_asset_dirs;
        super::set(&mut target.accel, microvm_accel);
        super::set(&mut target.memory, microvm_memory);
        super::set(&mut target.vmm, vmm);
        target.pin_cpus = microvm_pin_cpus;
        super::set(&mut target.warm, microvm_warm);
        target.host_paths = microvm_host_paths;
        Ok(())
    }
}
