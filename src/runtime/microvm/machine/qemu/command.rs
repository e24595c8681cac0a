//! The command line of QEMU, made of nothing but its description.
//!
//! All paths in it are those of the jail. The order of devices decides which address each has in the guest, so it is
//! the same in every machine: a template could not be restored otherwise.

use crate::runtime::microvm::machine::{MachineSpec, SCRATCH, slot_name};

/// Where things are in the jail.
pub(super) const VM: &str = "/vm";
pub(super) const KERNEL: &str = "/kernel";
pub(super) const INITRAMFS: &str = "/initramfs";
pub(super) const CONSOLE: &str = "/console";
pub(super) const MEMORY: &str = "/memory";
pub(super) const FIRMWARE: &str = "/usr/share/qemu";
/// Sockets, in the VMM's own directory.
pub(super) const QMP_SOCKET: &str = "qmp.sock";
pub(super) const AGENT_SOCKET: &str = "agent.sock";

/// Name of the guest's end of the agent's channel, in `/sys/class/virtio-ports/*/name`.
pub(super) const AGENT_PORT: &str = "agent";

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accel {
    /// The host's processor.
    Kvm,
    /// A translator, where that is not to be had; `tsc_khz` is the rate of the host's time stamp counter.
    Tcg {
        /// Thousand ticks a second.
        tsc_khz: u64,
    },
}

/// Where the guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Nowhere but in the VMM.
    Own,
    /// In the file of a template that is being made.
    Template,
    /// A private view of a template's file: what is only read is shared by all.
    Clone {
        /// The file is opened to be read only, which QEMU can since 8.2.
        read_only: bool,
    },
}

/// The arguments of one machine.
pub(super) fn arguments(spec: &MachineSpec, accel: Accel, memory: Memory) -> Vec<String> {
    let mut line = Line::default();
    let id = spec.dir.id();
    line.add("-name", id.as_str());
    let backend = if memory == Memory::Own { "" } else { ",memory-backend=ram" };
    line.add("-machine", format!("microvm,x-option-roms=off,acpi=on,rtc=on,isa-serial=on{backend}"));
    match accel {
        Accel::Kvm => line.add("-accel", "kvm").add("-cpu", "host"),
        Accel::Tcg { .. } => line.add("-accel", "tcg,thread=multi,tb-size=64").add("-cpu", "Nehalem"),
    };
    line.add("-m", format!("{}k", spec.memory / 1024)).add("-smp", spec.vcpus.to_string());
    if memory != Memory::Own {
        let share = match memory {
            Memory::Template => "on",
            Memory::Own | Memory::Clone { read_only: false } => "off",
            Memory::Clone { read_only: true } => "off,readonly=on,rom=off",
        };
        line.add("-object", format!("memory-backend-file,id=ram,size={},mem-path={MEMORY},share={share}", spec.memory));
    }
    line.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot").add("-display", "none");
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    line.add("-L", FIRMWARE).add("-kernel", KERNEL).add("-initrd", INITRAMFS);
    match untold(spec, accel, memory) {
        Some(_) => line.flag("-preconfig"),
        None => line.add("-append", kernel_line(accel, &[])),
    };
    line.add("-chardev", format!("socket,id=qmp,path={QMP_SOCKET},server=on,wait=off"));
    line.add("-mon", "chardev=qmp,mode=control");
    line.add("-chardev", format!("file,id=console,path={CONSOLE},append=on")).add("-serial", "chardev:console");
    devices(&mut line, spec);
    if matches!(memory, Memory::Clone { .. }) {
        line.add("-incoming", "defer").flag("-S");
    }
    line.0
}

fn devices(line: &mut Line, spec: &MachineSpec) {
    line.add("-object", "rng-random,id=entropy,filename=/dev/urandom");
    line.add("-device", "virtio-rng-device,rng=entropy");
    line.add("-device", "virtio-serial-device,max_ports=2");
    line.add("-chardev", format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"));
    line.add("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
    let file = format!("driver=file,node-name=scratch-file,filename={VM}/{},discard=unmap", spec.scratch_name());
    line.add("-blockdev", file);
    line.add("-blockdev", "driver=raw,node-name=scratch,file=scratch-file,discard=unmap");
    line.add("-device", format!("virtio-blk-device,drive=scratch,serial={SCRATCH}"));
    for slot in 0..spec.image_slots {
        let (name, blank) = (slot_name(slot), blank_node(slot));
        line.add("-blockdev", format!("driver=file,node-name={blank},filename={VM}/{}", blank_file(slot)));
        line.add("-blockdev", format!("driver=raw,node-name={name},read-only=on,file={blank}"));
        line.add("-device", format!("virtio-blk-device,drive={name},serial={name}"));
    }
    if let Some(tap) = &spec.tap {
        // The open tap device is QEMU's standard input.
        line.add("-netdev", "tap,id=net,fd=0");
        line.add("-device", format!("virtio-net-device,netdev=net,mac={}", mac(tap.mac)));
    }
}

/// The file of nothing that is behind a slot without an image, and its node.
pub(super) fn blank_file(slot: u8) -> String {
    format!("blank{slot}")
}

pub(super) fn blank_node(slot: u8) -> String {
    format!("image{slot}-blank")
}

/// The kernel's command line where it is not among QEMU's arguments, which every user of the host can read: QEMU then
/// waits to be told. A clone's guest has read its own long ago.
pub(super) fn untold(spec: &MachineSpec, accel: Accel, memory: Memory) -> Option<String> {
    let told = spec.kernel_args.is_empty() || matches!(memory, Memory::Clone { .. });
    (!told).then(|| kernel_line(accel, &spec.kernel_args))
}

fn kernel_line(accel: Accel, more: &[String]) -> String {
    let mut words = vec!["console=ttyS0".to_owned(), "reboot=t".to_owned(), "panic=-1".to_owned(), "quiet".to_owned()];
    if let Accel::Tcg { tsc_khz } = accel {
        // Without the rate of the clock the kernel tries to measure it, and one boot in three never ends. What is
        // mitigated is faults of processors that a translator does not have.
        words.extend([format!("tsc_early_khz={tsc_khz}"), "mitigations=off".to_owned()]);
    }
    words.push("random.trust_cpu=on".to_owned());
    words.extend(more.iter().cloned());
    words.join(" ")
}

pub(super) fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Arguments in their order.
#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) -> &mut Self {
        self.0.extend([option.to_owned(), value.into()]);
        self
    }

    fn flag(&mut self, option: &str) -> &mut Self {
        self.0.push(option.to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::microvm::machine::TapLink;
    use crate::runtime::microvm::machine::tests::spec;

    const SMALL: &str = include_str!("golden/small.txt");
    const CLONE: &str = include_str!("golden/clone.txt");

    /// As in the files: an option and its value on one line.
    fn lines(arguments: &[String]) -> String {
        let mut text = String::new();
        for argument in arguments {
            let separator = if argument.starts_with('-') { "\n" } else { " " };
            text.push_str(separator);
            text.push_str(argument);
        }
        text.trim_start().to_owned() + "\n"
    }

    #[test]
    fn a_small_machine_without_a_network_has_this_command_line() {
        let plain = MachineSpec { kernel_args: Vec::new(), ..spec() };
        let line = lines(&arguments(&plain, Accel::Tcg { tsc_khz: 2_596_122 }, Memory::Own));
        assert_eq!(line, SMALL);
    }

    #[test]
    fn what_a_caller_tells_the_kernel_is_not_on_the_command_line() {
        let tcg = Accel::Tcg { tsc_khz: 1 };
        let arguments = arguments(&spec(), tcg, Memory::Own);
        assert!(!lines(&arguments).contains("VMID=one") && arguments.iter().any(|option| option == "-preconfig"));
        assert!(untold(&spec(), tcg, Memory::Own).unwrap().ends_with(" VMID=one"));
        assert_eq!(untold(&spec(), tcg, Memory::Clone { read_only: true }), None);
    }

    #[test]
    fn a_clone_with_kvm_two_cpus_and_a_network_has_this_command_line() {
        let tap = TapLink { name: "lt0".to_owned(), mac: [2, 108, 10, 1, 2, 255], device: None, namespace: None };
        let spec = MachineSpec { vcpus: 2, tap: Some(tap), image_slots: 2, ..spec() };
        assert_eq!(lines(&arguments(&spec, Accel::Kvm, Memory::Clone { read_only: false })), CLONE);
    }

    #[test]
    fn a_template_differs_from_its_clones_only_in_whose_memory_it_is() {
        let tcg = Accel::Tcg { tsc_khz: 1 };
        let spec = MachineSpec { kernel_args: Vec::new(), ..spec() };
        let mut clone = arguments(&spec, tcg, Memory::Clone { read_only: true });
        assert_eq!(clone.split_off(clone.len() - 3), ["-incoming", "defer", "-S"]);
        let template = arguments(&spec, tcg, Memory::Template);
        let differ: Vec<_> = clone.iter().zip(&template).filter(|(a, b)| a != b).collect();
        assert_eq!(clone.len(), template.len());
        assert_eq!(differ.len(), 1, "{differ:?}");
        assert!(differ[0].1.ends_with(",share=on"), "{differ:?}");
        assert!(differ[0].0.ends_with(",share=off,readonly=on,rom=off"), "{differ:?}");
    }
}
