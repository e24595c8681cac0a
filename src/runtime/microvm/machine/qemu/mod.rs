//! Machines of QEMU's `microvm` type, with KVM or, where there is none, QEMU's own translator.
//!
//! ```text
//! boot    jail (user, namespaces, cgroup) -> QEMU -> QMP answers -> libraries taken away -> Machine
//! restore the same, and its memory is a private view of a template's; the state comes by `migrate-incoming`
//! ```
//! QEMU is asked over QMP, by a connection for each request. What it opens later, images, it is handed open.

mod command;
mod machine;
mod qmp;
mod slots;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::OnceCell;

use command::{Accel, CONSOLE, INITRAMFS, KERNEL, MEMORY, Memory, VM, arguments, blank_file, untold};
use machine::QemuMachine;
use qmp::Qmp;

use super::cgroup::{Limits, VmCgroup};
use super::directory::Checkpoint;
use super::jail::{Bind, BindKind, Failed, Jail, SHELL, Source, VmmUser, strip};
use super::process::{Process, start_time};
use super::template::TemplateKind;
use super::{
    Asset, Machine, MachineError, MachineManager, MachineSpec, Result, SMALLEST_LARGEST_FILE, TapUse, Template, VmDir,
    VmExit, Why, host,
};

const NAME: &str = "qemu";
/// QEMU's libraries and firmware, where distributions have them. They are taken away once it runs.
const PROGRAMS: [&str; 9] = [
    SHELL,
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/etc/ld.so.cache",
];
/// How long QEMU may take from exec to an answer; some 0.1 s on an idle host.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// For a QEMU that broke off to be gone.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often its socket is tried meanwhile: there is no event for "it listens now".
const START_PAUSE: Duration = Duration::from_millis(1);
/// How long writing or reading a template's state may take; some 0.1 s for a small guest.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(60);
/// How much of a console is shown with an error.
const SHOWN: u64 = 2000;

/// What the guest's instructions are to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// KVM where it works, else the translator.
    #[default]
    Auto,
    /// KVM, or nothing.
    Kvm,
    /// The translator, KVM or not.
    Tcg,
}

/// The manager of QEMU's machines.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    user: VmmUser,
    choice: AccelChoice,
    version: OnceCell<String>,
    /// It stays the same until the host is booted again, and may take thousands of messages of the kernel to find out.
    tsc_khz: OnceLock<Option<u64>>,
}

// === impl Qemu ===

impl Qemu {
    /// `program` is `qemu-system-x86_64` of version 7.2 or newer.
    pub fn new(program: PathBuf, user: VmmUser, choice: AccelChoice) -> Self {
        Self { program, user, choice, version: OnceCell::new(), tsc_khz: OnceLock::new() }
    }

    fn accel(&self) -> Result<Accel> {
        self.choose().map_err(unsupported)
    }

    fn choose(&self) -> Result<Accel, Why> {
        match (self.choice, host::usable_kvm()) {
            (AccelChoice::Auto | AccelChoice::Kvm, Ok(())) => Ok(Accel::Kvm),
            (AccelChoice::Kvm, Err(reason)) => Err(Why(reason)),
            (AccelChoice::Auto | AccelChoice::Tcg, _) => {
                let unknown = || Why("the rate of this host's clock is not to be found out".to_owned());
                Ok(Accel::Tcg { tsc_khz: self.tsc_khz.get_or_init(host::tsc_khz).ok_or_else(unknown)? })
            }
        }
    }

    /// As it says of itself: `7.2.22 (Debian …)`.
    async fn version(&self) -> Result<&str, Why> {
        let ask = || host::version_of(&self.program, "-version", "QEMU emulator version ");
        self.version.get_or_try_init(ask).await.map(String::as_str)
    }

    /// With a `state`, the guest goes on from there.
    async fn start(
        &self,
        spec: &MachineSpec,
        memory: Memory,
        template: Option<&Template>,
        state: Option<&File>,
    ) -> Result<QemuMachine> {
        spec.validate()?;
        let accel = self.accel()?;
        let cgroup = VmCgroup::of_host(&spec.cgroup_parent, spec.dir.id());
        let jail = Jail { cgroup: Some(cgroup.clone()), ..self.jail(spec, accel, memory, template)? };
        let limits = Limits::of(spec);
        let begun = Checkpoint::of_start(NAME, spec)?;
        spec.dir.write_checkpoint(&begun)?;
        if let Err(error) = cgroup.make(&limits) {
            // Half of it may be there; what cannot be removed now is found by its name.
            let _ = cgroup.remove().await;
            return Err(MachineError::start("make a cgroup", spec.dir.id())(error));
        }
        let started = match jail.start().await {
            Ok(pid) => Process::of_child(pid).map_err(|source| Failed { step: "watch the VMM".to_owned(), source }),
            Err(failed) => Err(failed),
        };
        let process = match started {
            Ok(process) => process,
            Err(Failed { step, source }) => {
                // Nothing is in it; what cannot be removed now is found by its name.
                let _ = cgroup.remove().await;
                return Err(MachineError::start(&step, spec.dir.id())(source));
            }
        };
        // From here on its end is that of the machine; nothing is waited for before its checkpoint is written.
        let machine = QemuMachine::new(spec.dir.clone(), process, cgroup, spec.image_slots);
        let starting = machine.process.starting();
        match self.finish_start(&machine, (spec, begun), (untold(spec, accel, memory), state)).await {
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

    /// From a process to a QEMU that answers, and that has nothing left of what it was started from.
    async fn finish_start(
        &self,
        machine: &QemuMachine,
        (spec, begun): (&MachineSpec, Checkpoint),
        (kernel_line, state): (Option<String>, Option<&File>),
    ) -> Result<()> {
        let step = |action| MachineError::start(action, spec.dir.id());
        machine.cgroup.join_entered(machine.pid()).map_err(step("enter the cgroup"))?;
        let gone = || io::Error::other("the VMM has ended");
        let checkpoint = Checkpoint {
            pid: machine.pid(),
            start_time: start_time(machine.pid()).ok_or_else(gone).map_err(step("look at the VMM"))?,
            ..begun
        };
        spec.dir.write_checkpoint(&checkpoint)?;
        let mut qmp = answers(machine).await?;
        if let Some(kernel_line) = &kernel_line
            && let Err(error) = qmp.configure(kernel_line).await
        {
            // If that was its end it says why.
            let end = tokio::time::timeout(LAST_WORDS, machine.process.ended()).await;
            return Err(end.map_or(error, |exit| ended(machine.dir(), exit)));
        }
        // QEMU answers commands once it has read all it starts from.
        let started_from = PROGRAMS.iter().chain(&[KERNEL, INITRAMFS, MEMORY]);
        let places = started_from.map(PathBuf::from).chain([self.program.clone()]).collect();
        let read = async {
            match state {
                Some(state) => read_state(&mut qmp, state).await,
                None => Ok(()),
            }
        };
        let (stripped, read) = tokio::join!(strip(machine.pid(), places), read);
        stripped.map_err(|Failed { step, source }| MachineError::start(&step, spec.dir.id())(source))?;
        read?;
        // The guest of a template has waited for this.
        if state.is_some() { qmp.cont().await } else { Ok(()) }
    }

    /// What it runs in; makes the files it needs.
    fn jail(&self, spec: &MachineSpec, accel: Accel, memory: Memory, template: Option<&Template>) -> Result<Jail> {
        let VmmUser { uid, gid } = self.user;
        spec.dir.create(uid, gid)?;
        let console = spec.dir.open_console(uid, gid)?;
        let root = spec.dir.path().join("root");
        fs::create_dir_all(&root).map_err(MachineError::file("make", &root))?;
        for slot in 0..spec.image_slots {
            own_file(&spec.dir.inside().join(blank_file(slot)), self.user)?;
        }
        let scratch = spec.dir.give_inside(spec.scratch_name(), uid, gid)?;
        let mut binds: Vec<Bind> = PROGRAMS.iter().map(|path| bind(Path::new(path), path, BindKind::Program)).collect();
        binds.push(Bind {
            what: Source::Path(self.program.clone()),
            at: self.program.clone(),
            kind: BindKind::Program,
        });
        let devices = ["/dev/null", "/dev/urandom", "/dev/kvm"];
        let devices = if accel == Accel::Kvm { &devices[..] } else { &devices[..2] };
        binds.extend(devices.iter().map(|path| bind(Path::new(path), path, BindKind::Device)));
        binds.push(bind(&spec.dir.inside(), VM, BindKind::Writable));
        binds.push(bind(&spec.dir.console(), CONSOLE, BindKind::Writable));
        binds.push(asset(&spec.kernel, KERNEL)?);
        binds.push(asset(&spec.initramfs, INITRAMFS)?);
        if let Some(template) = template {
            let kind =
                if memory == (Memory::Clone { read_only: true }) { BindKind::ReadOnly } else { BindKind::Writable };
            binds.push(bind(&template.memory(), MEMORY, kind));
        }
        Ok(Jail {
            root,
            binds,
            user: self.user,
            cpus: spec.cpus.clone(),
            largest_file: scratch.max(SMALLEST_LARGEST_FILE),
            program: self.program.clone(),
            directory: VM.into(),
            arguments: arguments(spec, accel, memory),
            input: spec.tap.as_ref().and_then(|tap| tap.device.clone()),
            console,
            cgroup: None,
        })
    }
}

#[async_trait]
impl MachineManager for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn tap_use(&self) -> TapUse {
        TapUse::Handed
    }

    async fn check(&self) -> Result<String, Why> {
        let version = self.version().await?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Why("not root: a VMM cannot be jailed".to_owned()));
        }
        Ok(match self.choose()? {
            Accel::Kvm => format!("QEMU {version} with KVM"),
            Accel::Tcg { .. } => match host::usable_kvm() {
                Ok(()) => format!("QEMU {version} without KVM, as it was told: guests are some ten times slower"),
                Err(reason) => format!("QEMU {version} without KVM ({reason}): guests are some ten times slower"),
            },
        })
    }

    async fn template_kind(&self, spec: &MachineSpec) -> Result<TemplateKind> {
        let accel = match self.accel()? {
            Accel::Kvm => "kvm",
            Accel::Tcg { .. } => "tcg",
        };
        let version = self.version().await.map_err(unsupported)?;
        TemplateKind::of(&format!("{NAME} {version} {accel}"), spec)
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>> {
        let Some(path) = &spec.template else {
            return Ok(Box::new(self.start(spec, Memory::Own, None, None).await?));
        };
        let template = Template { path: path.clone() };
        let kind = self.template_kind(spec).await?;
        own_file(&template.memory(), self.user)?.set_len(spec.memory).map_err(MachineError::file("size", path))?;
        let machine = self.start(spec, Memory::Template, Some(&template), None).await?;
        Ok(Box::new(machine.for_template(template, kind)))
    }

    async fn restore(&self, spec: &MachineSpec, template: &Template) -> Result<Box<dyn Machine>> {
        template.check(&self.template_kind(spec).await?)?;
        let path = template.state();
        let state = File::open(&path).map_err(MachineError::file("open", &path))?;
        let read_only = can_map_what_it_reads(self.version().await.map_err(unsupported)?);
        let memory = Memory::Clone { read_only };
        Ok(Box::new(self.start(spec, memory, Some(template), Some(&state)).await?))
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
        Ok(Some(Box::new(QemuMachine::new(dir.clone(), process, cgroup, checkpoint.image_slots))))
    }
}

/// Whether this version opens memory that it maps privately without asking to write (`rom=off` with `readonly=on`).
fn can_map_what_it_reads(version: &str) -> bool {
    let mut numbers = version.split(['.', ' ']).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (8, 2)
}

/// Reads a template's state.
async fn read_state(qmp: &mut Qmp, state: &File) -> Result<()> {
    qmp.migrate_without_shared_memory().await?;
    // It has nothing to announce: nobody has heard of it, and it is told its address afterwards.
    qmp.execute("migrate-set-parameters", json!({"announce-rounds": 0})).await?;
    qmp.get_fd("state", state).await?;
    qmp.execute("migrate-incoming", json!({"uri": "fd:state"})).await?;
    qmp.migrated(MIGRATION_PATIENCE).await
}

/// Waits until QEMU answers.
async fn answers(machine: &QemuMachine) -> Result<Qmp> {
    let begun = Instant::now();
    loop {
        let error = match Qmp::connect(machine.dir()).await {
            Ok(qmp) => return Ok(qmp),
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

fn ended(dir: &VmDir, exit: VmExit) -> MachineError {
    MachineError::Ended { vmm: "QEMU", id: dir.id().to_string(), exit, said: dir.console_tail(SHOWN).trim().to_owned() }
}

fn unsupported(why: Why) -> MachineError {
    MachineError::Unsupported { vmm: "QEMU", what: format!("run here: {why}") }
}

fn bind(what: &Path, at: &str, kind: BindKind) -> Bind {
    Bind { what: Source::Path(what.to_owned()), at: at.into(), kind }
}

/// A file that the VMM's user, who is nobody, can read.
fn asset(asset: &Asset, at: &str) -> Result<Bind> {
    let mode = asset.file().metadata().map_err(MachineError::file("look at", asset.path()))?.mode();
    if mode & 0o004 == 0 {
        let reason = "the VMM's user may not read it (chmod a+r)".to_owned();
        return Err(MachineError::Refused { path: asset.path().to_owned(), reason });
    }
    let what = Source::File(asset.path().to_owned(), asset.shared_file());
    Ok(Bind { what, at: at.into(), kind: BindKind::ReadOnly })
}

/// An empty file of the VMM's.
fn own_file(path: &Path, user: VmmUser) -> Result<File> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    // The directory is the VMM's: what lies there already may be a link.
    options.custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits());
    let file = options.open(path).map_err(MachineError::file("make", path))?;
    let given = std::os::unix::fs::fchown(&file, Some(user.uid), Some(user.gid));
    given.map_err(MachineError::file("give away", path))?;
    Ok(file)
}
