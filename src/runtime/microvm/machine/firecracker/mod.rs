//! Machines of Firecracker, in its jailer, driven by its API.
//!
//! ```text
//! boot    jail made anew -> jailer -> PUT logger, metrics -> machine-config, boot-source, drives, network-interfaces, vsock
//!         -> InstanceStart
//! restore jail made anew -> jailer -> PUT logger, metrics -> pager, if one brings the memory -> snapshot/load, resumed
//! ```
//! Firecracker gives disks no serial of our choice: the guest tells them by their order, which the kernel argument
//! `lambdalet.disks=scratch,image0,...` names: the first is `/dev/vda`. The agent is reached by vsock at
//! [`AGENT_VSOCK_PORT`], which it is told by `lambdalet.agent=vsock`.
//!
//! Its network namespace is that of its tap, which it opens by name. This process has it open until the jailer has entered it;
//! then it lasts as long as the VMM, so nothing has to remember or remove it.

mod api;
mod faults;
mod jailer;
mod machine;
pub mod pager;
mod said;
#[cfg(test)]
mod tests;
mod vsock;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::OnceCell;

use api::{
    Action, Api, BackendType, BootSource, Drive, LogLevel, Logger, MachineConfig, MemoryBackend, NetworkInterface,
    NetworkOverride, SnapshotLoad, Vsock,
};
use machine::FirecrackerMachine;

use super::cgroup::{Limits, VmCgroup, joining};
use super::directory::{Checkpoint, LOG_FIFO, METRICS_FIFO};
use super::jail::{SHELL, VmmUser};
use super::process::{Process, start_time};
use super::template::TemplateKind;
use super::{
    Asset, Machine, MachineError, MachineManager, MachineSpec, Result, SCRATCH, SMALLEST_LARGEST_FILE, TapUse,
    Template, VmDir, VmExit, Why, host, slot_name,
};

/// Where the guest's agent listens.
pub const AGENT_VSOCK_PORT: u32 = 1024;

const NAME: &str = "firecracker";
/// The one guest behind each vsock device; they do not see each other.
const GUEST_CID: u32 = 3;
/// Files in the jail.
const API_SOCKET: &str = "firecracker.sock";
const VSOCK_SOCKET: &str = "vsock.sock";
const KERNEL: &str = "kernel";
const INITRAMFS: &str = "initramfs";
const SNAPSHOT: &str = "state";
const MEMORY: &str = "memory";
const PAGER_SOCKET: &str = "uffd.sock";
/// The guest's name for its network card, on the host's side of the API.
const INTERFACE: &str = "eth0";
/// Firecracker's limit on vCPUs.
const MOST_VCPUS: u32 = 32;
/// A disk of one sector is behind a slot without an image.
const BLANK_SIZE: u64 = 512;
/// How long the jailer and Firecracker may take until the API answers; some 20 ms on an idle host.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How often that is tried meanwhile: there is no event for "it listens now".
const START_PAUSE: Duration = Duration::from_millis(1);
/// How much of a console is shown with an error.
const SHOWN: u64 = 2000;

/// The manager of Firecracker's machines.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    jailer: PathBuf,
    user: VmmUser,
    memory: Memory,
    version: OnceCell<String>,
}

/// Where the memory of restored machines comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// The template's file, mapped copy-on-write: clones share what they do not write.
    File,
    /// A process beside each VMM that brings its pages: each clone has its own. This is the program, which is
    /// [started](pager::Arguments) as `PROGRAM pager ...`.
    Paged(PathBuf),
}

/// What a pager is started from.
#[derive(Debug)]
struct Paged {
    program: PathBuf,
    listener: UnixListener,
    memory: PathBuf,
}

// === impl Firecracker ===

impl Firecracker {
    /// `program` and `jailer` are those of version 1.10 or newer; `memory` is where that of restored machines comes from.
    pub fn new(program: PathBuf, jailer: PathBuf, user: VmmUser, memory: Memory) -> Self {
        Self { program, jailer, user, memory, version: OnceCell::new() }
    }

    async fn version(&self) -> Result<&str, Why> {
        let ask = || host::version_of(&self.program, "--version", "Firecracker ");
        self.version.get_or_try_init(ask).await.map(String::as_str)
    }

    /// A jail for nobody yet; its root. Nothing stays of one that was there: where it was used the jailer refuses to run again.
    fn make_jail(&self, spec: &MachineSpec) -> Result<PathBuf> {
        spec.dir.create(self.user.uid, self.user.gid)?;
        let root = jailer::root(&spec.dir, &self.program);
        jailer::make_root(&root, self.user).map(|()| root)
    }

    /// A Firecracker that answers, in this jail, with nothing configured.
    async fn start(&self, spec: &MachineSpec, root: PathBuf) -> Result<FirecrackerMachine> {
        spec.validate()?;
        let step = |action| MachineError::start(action, spec.dir.id());
        let largest_file = self.fill_jail(spec, &root)?;
        let listeners = said::listen(&spec.dir)?;
        let cgroup = VmCgroup::of_host(&spec.cgroup_parent, spec.dir.id());
        let limits = Limits::of(spec);
        let begun = Checkpoint::of_start(NAME, spec)?;
        spec.dir.write_checkpoint(&begun)?;
        let started = match cgroup.make(&limits) {
            Ok(()) => self.run_jailer(spec, (begun, &cgroup), (&root, largest_file)).await,
            Err(error) => Err(step("make a cgroup")(error)),
        };
        let process = match started {
            Ok(process) => process,
            Err(error) => {
                // Nothing runs in it, and half of it may be there; what cannot be removed now is found by its name.
                let _ = cgroup.remove().await;
                return Err(error);
            }
        };
        let machine = FirecrackerMachine {
            dir: spec.dir.clone(),
            api: Api::new(spec.dir.clone(), root.clone(), API_SOCKET),
            root,
            process,
            cgroup,
            image_slots: spec.image_slots,
            template: None,
            _listeners: listeners,
        };
        let finished = async {
            machine.cgroup.join_entered(machine.pid()).map_err(step("enter the cgroup"))?;
            answers(&machine).await?;
            let logger = Logger { log_path: LOG_FIFO.to_owned(), level: LogLevel::Info, show_level: true };
            machine.api.logger(&logger).await?;
            machine.api.metrics(METRICS_FIFO).await
        };
        let starting = machine.process.starting();
        match finished.await {
            Ok(()) => {
                starting.done();
                Ok(machine)
            }
            Err(error) => {
                // That it goes on is found by its checkpoint.
                let _ = machine.kill().await;
                Err(error)
            }
        }
    }

    /// Puts all files of a start in the jail; how large Firecracker may make one.
    fn fill_jail(&self, spec: &MachineSpec, root: &Path) -> Result<u64> {
        let VmmUser { uid, gid } = self.user;
        jailer::make_fifos(&spec.dir, root, self.user)?;
        jailer::show(&spec.kernel, root, KERNEL)?;
        jailer::show(&spec.initramfs, root, INITRAMFS)?;
        let scratch = spec.dir.give_inside(spec.scratch_name(), uid, gid)?;
        jailer::show(&Asset::open_beneath(&spec.dir.inside(), spec.scratch_name())?, root, SCRATCH)?;
        for slot in 0..spec.image_slots {
            jailer::make_blank(root, &blank(slot), BLANK_SIZE)?;
        }
        // A template's memory becomes a file.
        let memory = spec.template.as_ref().map_or(0, |_| spec.memory);
        Ok(scratch.max(memory).max(SMALLEST_LARGEST_FILE))
    }

    /// Runs the jailer to its end and writes the checkpoint of the Firecracker it left: on a thread, so that this is done
    /// even if the caller stops waiting. The thread is one of its own, which enters the cgroup before.
    async fn run_jailer(
        &self,
        spec: &MachineSpec,
        (begun, cgroup): (Checkpoint, &VmCgroup),
        (root, largest_file): (&Path, u64),
    ) -> Result<Process> {
        let console = spec.dir.open_console(self.user.uid, self.user.gid)?;
        let namespace = spec.tap.as_ref().and_then(|tap| tap.namespace.clone());
        let entered = namespace.as_deref().map(jailer::path_of);
        let arguments = jailer::arguments(&spec.dir, &self.program, self.user, largest_file, entered)?;
        let (dir, root, program, cgroup) = (spec.dir.clone(), root.to_owned(), self.program.clone(), cgroup.clone());
        let jailer = self.jailer.clone();
        let run = move || {
            let step = |action| MachineError::start(action, dir.id());
            let list = cgroup.enter().map_err(step("enter the cgroup"))?;
            if namespace.is_none() {
                // Without a network card it needs none of anybody's.
                part_from_networks(&dir)?;
            }
            let errors = console.try_clone().map_err(step("open the console"))?;
            let (join, output) = joining(list, Stdio::from(console));
            let mut command = Command::new(SHELL);
            command.args(["-c", &format!("{join} exec \"$0\" \"$@\"")]).arg(jailer).args(arguments);
            command.env_clear().process_group(0).stdin(Stdio::null()).stdout(output).stderr(errors);
            let status = command.status().map_err(step("run the jailer"))?;
            let Some(pid) = jailer::pid(&root, &program).filter(|_| status.success()) else {
                return Err(ended(&dir, status.code().map_or(VmExit::Unknown, VmExit::Code)));
            };
            dir.write_checkpoint(&Checkpoint { pid, start_time: start_time(pid).unwrap_or_default(), ..begun })?;
            Ok(pid)
        };
        let pid = on_thread("jailer", &spec.dir, run).await?;
        Process::open(pid).map_err(MachineError::start("watch the VMM", spec.dir.id()))
    }

    async fn configure(&self, api: &Api, spec: &MachineSpec) -> Result<()> {
        let vcpus = u8::try_from(spec.vcpus).ok().filter(|_| spec.vcpus <= MOST_VCPUS);
        let too_many = || MachineError::Invalid {
            what: format!("{} vCPUs", spec.vcpus),
            reason: format!("Firecracker has {MOST_VCPUS} at the most"),
        };
        let vcpu_count = vcpus.ok_or_else(too_many)?;
        api.machine_config(&MachineConfig { vcpu_count, mem_size_mib: spec.memory >> 20 }).await?;
        let source = BootSource {
            kernel_image_path: KERNEL.to_owned(),
            initrd_path: INITRAMFS.to_owned(),
            boot_args: kernel_line(spec),
        };
        api.boot_source(&source).await?;
        for drive in drives(spec.image_slots) {
            api.drive(&drive).await?;
        }
        if let Some(tap) = &spec.tap {
            let interface = NetworkInterface {
                iface_id: INTERFACE.to_owned(),
                host_dev_name: tap.name.clone(),
                guest_mac: tap.mac.map(|byte| format!("{byte:02x}")).join(":"),
            };
            api.network_interface(&interface).await?;
        }
        api.vsock(&Vsock { guest_cid: GUEST_CID, uds_path: VSOCK_SOCKET.to_owned() }).await
    }

    async fn load(&self, machine: &FirecrackerMachine, spec: &MachineSpec, paged: Option<Paged>) -> Result<()> {
        let (backend_type, path) = match paged {
            None => (BackendType::File, MEMORY),
            Some(paged) => {
                self.start_pager(machine, paged).await?;
                (BackendType::Uffd, PAGER_SOCKET)
            }
        };
        let tap = spec.tap.iter();
        let load = SnapshotLoad {
            snapshot_path: SNAPSHOT.to_owned(),
            mem_backend: MemoryBackend { backend_type, backend_path: path.to_owned() },
            resume_vm: true,
            network_overrides: tap
                .map(|tap| NetworkOverride { iface_id: INTERFACE.to_owned(), host_dev_name: tap.name.clone() })
                .collect(),
        };
        machine.api.load_snapshot(&load).await
    }

    /// Starts who brings the machine's memory; in its cgroup from the beginning, as the VMM is, and without any network.
    async fn start_pager(&self, machine: &FirecrackerMachine, paged: Paged) -> Result<()> {
        let step = |action| MachineError::start(action, machine.dir.id());
        let Paged { program, listener, memory } = paged;
        let console = machine.dir.open_console(self.user.uid, self.user.gid)?;
        let vmm = machine.pid();
        let vmm_started =
            start_time(vmm).ok_or_else(|| step("start the pager")(std::io::Error::other("it has ended")))?;
        let arguments = pager::Arguments { memory, vmm, vmm_started, user: self.user };
        let (dir, cgroup) = (machine.dir.clone(), machine.cgroup.clone());
        let run = move || {
            let step = |action| MachineError::start(action, dir.id());
            let (join, output) = joining(cgroup.enter().map_err(step("enter the cgroup"))?, Stdio::null());
            part_from_networks(&dir)?;
            let mut command = Command::new(SHELL);
            // Behind the shell, so that it is nobody's child whose end somebody has to wait for. What a shell starts behind it
            // has no input but one of another number.
            let start = format!("{join} exec 3<&0; {{ \"$0\" \"$@\" <&3 3<&- || kill -9 {vmm}; }} &");
            command.args(["-c", &start]).arg(program).args(arguments.words());
            command.env_clear().process_group(0).stdin(OwnedFd::from(listener)).stdout(output).stderr(console);
            let status = command.status().map_err(step("start the pager"))?;
            let failed = || step("start the pager")(std::io::Error::other(format!("the shell ended with {status}")));
            status.success().then_some(()).ok_or_else(failed)
        };
        on_thread("pager", &machine.dir, run).await
    }
}

#[async_trait]
impl MachineManager for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn tap_use(&self) -> TapUse {
        TapUse::Named { uid: self.user.uid }
    }

    async fn check(&self) -> Result<String, Why> {
        let version = self.version().await?;
        if !self.jailer.is_file() {
            return Err(Why(format!("{version} is there, but not its jailer, {}", self.jailer.display())));
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(Why("not root: the jailer needs it".to_owned()));
        }
        host::usable_kvm().map_err(|reason| Why(format!("Firecracker needs KVM: {reason}")))?;
        if self.memory != Memory::File && !host::has_userfaultfd() {
            let missing =
                "--microvm-memory uffd needs /dev/userfaultfd, or vm.unprivileged_userfaultfd=1: neither is here";
            return Err(Why(missing.to_owned()));
        }
        Ok(format!("Firecracker {version} with KVM"))
    }

    async fn template_kind(&self, spec: &MachineSpec) -> Result<TemplateKind> {
        let version = self.version().await.map_err(unsupported)?;
        TemplateKind::of(&format!("{NAME} {version}"), spec)
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>> {
        let kind = match spec.template {
            Some(_) => Some(self.template_kind(spec).await?),
            None => None,
        };
        let machine = self.start(spec, self.make_jail(spec)?).await?;
        let booted = async {
            self.configure(&machine.api, spec).await?;
            machine.api.action(Action::InstanceStart).await
        };
        if let Err(error) = booted.await {
            let _ = machine.kill().await;
            return Err(error);
        }
        let template = spec.template.clone().map(|path| Template { path }).zip(kind);
        Ok(Box::new(FirecrackerMachine { template, ..machine }))
    }

    async fn restore(&self, spec: &MachineSpec, template: &Template) -> Result<Box<dyn Machine>> {
        template.check(&self.template_kind(spec).await?)?;
        let root = self.make_jail(spec)?;
        jailer::show(&Asset::open(&template.state())?, &root, SNAPSHOT)?;
        jailer::show(&Asset::open(&template.memory())?, &root, MEMORY)?;
        let paged = match &self.memory {
            Memory::File => None,
            // While the jail is nobody's yet: a VMM could put something else under that name.
            Memory::Paged(program) => Some(Paged {
                program: program.clone(),
                listener: jailer::listen(&root, PAGER_SOCKET, self.user)
                    .map_err(MachineError::start("listen for the pager", spec.dir.id()))?,
                memory: template.memory(),
            }),
        };
        let machine = self.start(spec, root).await?;
        let starting = machine.process.starting();
        if let Err(error) = self.load(&machine, spec, paged).await {
            let _ = machine.kill().await;
            return Err(error);
        }
        starting.done();
        Ok(Box::new(machine))
    }

    async fn adopt(&self, dir: &VmDir) -> Result<Option<Box<dyn Machine>>> {
        let Some(checkpoint) = dir.read_checkpoint().filter(|checkpoint| checkpoint.manager == NAME) else {
            return Ok(None);
        };
        let cgroup = VmCgroup::of_host(&checkpoint.cgroup_parent, dir.id());
        let taken = Process::take_over(&checkpoint, &cgroup).await;
        let Some(process) = taken.map_err(MachineError::file("take over the VMM of", dir.path()))? else {
            return Ok(None);
        };
        let root = jailer::root(dir, &self.program);
        Ok(Some(Box::new(FirecrackerMachine {
            dir: dir.clone(),
            api: Api::new(dir.clone(), root.clone(), API_SOCKET),
            root,
            process,
            cgroup,
            image_slots: checkpoint.image_slots,
            template: None,
            _listeners: said::listen(dir)?,
        })))
    }
}

/// Runs the work on a thread that ends with it.
async fn on_thread<T: Send + 'static>(
    name: &str,
    dir: &VmDir,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let step = |action| MachineError::start(action, dir.id());
    let answered = crate::thread::begin(name, work, drop).map_err(step("start a thread"))?;
    answered.await.map_err(|error| step("wait for a thread")(std::io::Error::other(error)))?
}

/// Leaves this thread, and what it starts, in a network namespace that nothing else is in. To be called on a thread that ends
/// with it.
fn part_from_networks(dir: &VmDir) -> Result<()> {
    let failed = |errno: nix::Error| MachineError::start("make a network namespace", dir.id())(errno.into());
    unshare(CloneFlags::CLONE_NEWNET).map_err(failed)
}

/// Waits until the API answers.
async fn answers(machine: &FirecrackerMachine) -> Result<()> {
    let begun = Instant::now();
    loop {
        let error = match machine.api.instance().await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        if let Some(exit) = machine.process.try_ended() {
            return Err(ended(machine.dir(), exit));
        }
        if begun.elapsed() > START_PATIENCE {
            return Err(error);
        }
        tokio::time::sleep(START_PAUSE).await;
    }
}

/// In the order in which the guest sees them.
fn drives(image_slots: u8) -> Vec<Drive> {
    let drive = |drive_id: &str, path_on_host: String, is_read_only| Drive {
        drive_id: drive_id.to_owned(),
        path_on_host,
        is_root_device: false,
        is_read_only,
    };
    let mut drives = vec![drive(SCRATCH, SCRATCH.to_owned(), false)];
    drives.extend((0..image_slots).map(|slot| drive(&slot_name(slot), blank(slot), true)));
    drives
}

fn blank(slot: u8) -> String {
    format!("blank{slot}")
}

fn kernel_line(spec: &MachineSpec) -> String {
    let own = "console=ttyS0 reboot=k panic=-1 quiet pci=off i8042.noaux i8042.nomux i8042.dumbkbd random.trust_cpu=on";
    let disks: Vec<String> = drives(spec.image_slots).into_iter().map(|drive| drive.drive_id).collect();
    let mut words =
        vec![own.to_owned(), "lambdalet.agent=vsock".to_owned(), format!("lambdalet.disks={}", disks.join(","))];
    words.extend(spec.kernel_args.iter().cloned());
    words.join(" ")
}

fn ended(dir: &VmDir, exit: VmExit) -> MachineError {
    let said = dir.console_tail(SHOWN).trim().to_owned();
    MachineError::Ended { vmm: "Firecracker", id: dir.id().to_string(), exit, said }
}

fn unsupported(why: Why) -> MachineError {
    MachineError::Unsupported { vmm: "Firecracker", what: format!("run here: {why}") }
}
