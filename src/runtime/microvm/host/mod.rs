//! The driver's VMs on this host: machines, their taps on the node's bridge, the agents in them.
//!
//! ```text
//! launch   directory, scratch disk, tap -> restore from a template, or boot -> session -> configure -> lead the address
//!          one that waits (waiting) -> the Pod's cgroup -> it goes on -----------^
//! find     the machine that an earlier process left
//! destroy  kill, tap, directory
//! ```
//! The first guest of its size is booted; a template is made beside it, and what starts later is restored from that. A
//! launch that nobody waits for any more is carried to its end all the same, and whoever removes its VM waits for that:
//! so no VMM is started that nobody knows of.

mod guest;
mod identity;
mod scratch;
mod size;
mod told;
mod upkeep;
mod waiting;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{Mutex as AsyncMutex, OnceCell, oneshot};
use tokio::task::JoinSet;

use self::guest::HostVm;
use self::size::Size;
use self::waiting::Waiting;
use super::machine::pin::Pins;
use super::machine::template::Templates;
use super::machine::{
    Asset, AssetDirs, MAX_IMAGE_SLOTS, Machine, MachineError, MachineManager, MachineSpec, TapLink, TapUse, Template,
    VmDir, VmDirs, VmId, VmmUser, Why,
};
use super::vm::{Vm, Vms, fresh_name};
use crate::network::NetworkError;
use crate::network::tap::{Taps, mac_of};
use crate::runtime::types::{MachineFiles, Resources, SandboxConfig};
use crate::runtime::{Kind, Result, RuntimeError, blocking};
use crate::telemetry::chain;
use crate::turns::Turns;

/// How long a guest may take from its machine's start to its agent's first answer: some 0.2 s with KVM, some 5 s without
/// on an idle host.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// The same for one that is restored: a tenth of a second on an idle host.
const RESTORE_PATIENCE: Duration = Duration::from_secs(60);
/// Where the machines are that templates are made of: no sandbox's.
const MAKING: &str = "making";
/// Of the files below a guest bundle's directory.
const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs.cpio";

/// What guests are made from.
#[derive(Clone)]
pub struct HostOptions {
    /// Where machines have their directories, and the empty disk lies: `<root-dir>/microvm`.
    pub root: PathBuf,
    /// Where templates are kept; those of other nodes of this host may lie there too.
    pub templates: PathBuf,
    /// How many of them are kept, each of some 70 MiB and more on the disk; 0: every guest is booted.
    pub most_templates: usize,
    /// How many booted guests wait, paused, for Pods to come; each takes the memory that it has touched. 0: none.
    pub warm: usize,
    /// Directory of a guest bundle (`hack/guest`): `vmlinux`, `initramfs.cpio`.
    pub bundle: PathBuf,
    /// Another kernel than the bundle's.
    pub kernel: Option<PathBuf>,
    /// Where the files lie that a sandbox may name instead of these.
    pub assets: AssetDirs,
    /// Whom VMMs run as.
    pub user: VmmUser,
    /// Bytes of memory of a guest whose Pod has no limit.
    pub memory: u64,
    /// Bytes of what the containers of a guest can write; taken from the host as they are written.
    pub scratch: u64,
    /// How often a machine's console is looked at; its clock is set every thirtieth time.
    pub upkeep: Duration,
    /// The cgroup in which machines run that templates are made of, from the cgroup root: the node's own.
    pub cgroup: String,
    /// The node's Pod network; without it guests have no network card.
    pub taps: Option<Arc<dyn Taps>>,
    /// Which of the host's CPUs they run on.
    pub pins: Pins,
}

/// The VMs of this host.
pub struct HostVms {
    inner: Arc<Inner>,
    /// Launches, templates in the making, and who looks after what runs.
    tasks: Mutex<JoinSet<()>>,
}

struct Inner {
    options: HostOptions,
    manager: Arc<dyn MachineManager>,
    dirs: VmDirs,
    making: VmDirs,
    templates: Templates,
    /// One is made at a time.
    template_turn: AsyncMutex<()>,
    blank: OnceCell<PathBuf>,
    running: Mutex<HashMap<String, Arc<HostVm>>>,
    waiting: Waiting,
    /// Whoever starts or ends a VM has its turn.
    turns: Turns<String>,
}

// === impl HostOptions ===

impl HostOptions {
    /// Guests of this bundle: 512 MiB where there is no limit, 10 GiB to be written, without a network card.
    pub fn new(root: PathBuf, bundle: PathBuf) -> Self {
        Self {
            templates: root.join("templates"),
            most_templates: 16,
            warm: 0,
            root,
            bundle,
            kernel: None,
            assets: AssetDirs::default(),
            user: VmmUser::default(),
            memory: 512 << 20,
            scratch: 10 << 30,
            upkeep: Duration::from_secs(10),
            cgroup: "lambdalet".to_owned(),
            taps: None,
            pins: Pins::default(),
        }
    }
}

// === impl HostVms ===

impl HostVms {
    /// VMs of this manager. Ends the machines of templates that an earlier process did not finish.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the directories cannot be used.
    pub async fn open(options: HostOptions, manager: Arc<dyn MachineManager>) -> Result<Self> {
        let failed = |error: MachineError| error.during("failed to open the microVMs of this host");
        let base = options.root.join("vms");
        let inner = Inner {
            dirs: VmDirs::new(&base, super::machine::directory::DEFAULT_NAMESPACE).map_err(failed)?,
            making: VmDirs::new(&base, MAKING).map_err(failed)?,
            templates: Templates::new(options.templates.clone()),
            template_turn: AsyncMutex::default(),
            blank: OnceCell::new(),
            running: Mutex::default(),
            waiting: Waiting::new(options.warm),
            turns: Turns::default(),
            options,
            manager,
        };
        inner.templates.trim(inner.options.most_templates).map_err(failed)?;
        for dir in inner.making.list().map_err(failed)? {
            if let Err(error) = inner.end(&dir, None).await {
                // The next process tries again; until then it only takes room.
                tracing::warn!(machine = %dir.id(), error = chain(&error), "failed to remove half a template");
            }
        }
        let vms = Self { inner: Arc::new(inner), tasks: Mutex::default() };
        vms.spawn(upkeep::keep(Arc::clone(&vms.inner)));
        Ok(vms)
    }

    /// Makes the template for guests of Pods with these limits, unless there is one: then the first of them is not booted
    /// either.
    ///
    /// # Errors
    /// Why no guest can be booted.
    pub async fn prepare(&self, limits: &Resources) -> Result<()> {
        let size = Size::of(limits, self.inner.options.memory);
        self.inner.make_template(size).await
    }

    /// Runs a task that ends with the VMs' owner.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // A set of tasks is never half changed, so a panic elsewhere does not spoil it.
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

#[async_trait]
impl Vms for HostVms {
    async fn check(&self) -> Result<String> {
        let unusable = |Why(why)| RuntimeError::new(Kind::Unsupported, format!("no microVM can be run: {why}"));
        let manager = self.inner.manager.check().await.map_err(unusable)?;
        let no_guest = "no microVM can be run: its guest cannot be opened";
        self.inner.assets().map(|_| manager).map_err(|error| error.during(no_guest))
    }

    fn slots(&self) -> u8 {
        MAX_IMAGE_SLOTS
    }

    fn name(&self, config: &SandboxConfig) -> String {
        self.inner.promise(config).unwrap_or_else(fresh_name)
    }

    fn left(&self) -> Vec<String> {
        self.left_behind()
    }

    fn end_all(&self, ids: Vec<String>) {
        self.end_behind(ids);
    }

    async fn close(&self) {
        self.inner.end_waiting().await;
    }

    async fn launch(&self, id: &str, config: &SandboxConfig) -> Result<Arc<dyn Vm>> {
        let turn = self.inner.turns.turn(id).await;
        let (inner, id, config) = (Arc::clone(&self.inner), id.to_owned(), config.clone());
        let tried = format!("failed to start a microVM for {}", config.pod);
        let (told, launched) = oneshot::channel();
        self.spawn(async move {
            let outcome = inner.launch(&id, &config).await;
            drop(turn);
            let (launched, booted) = (outcome.is_ok(), matches!(outcome, Ok((_, Started::Booted))));
            // Whoever waited may be gone: what was started is found by its id.
            let _ = told.send(outcome);
            if booted {
                inner.want_template(Size::of(&config.resources, inner.options.memory)).await;
            }
            if launched {
                inner.keep_waiting(&config).await;
            }
        });
        let ending = |_| RuntimeError::new(Kind::Unavailable, format!("{tried}: the node is ending"));
        launched.await.map_err(ending)?.map(|(vm, _)| vm as Arc<dyn Vm>)
    }

    async fn find(&self, id: &str) -> Result<Option<Arc<dyn Vm>>> {
        let _turn = self.inner.turns.turn(id).await;
        let failed = |error: MachineError| error.during(format!("failed to look for microVM {id}"));
        if let Some(vm) = self.inner.running().get(id) {
            return Ok(Some(Arc::clone(vm) as Arc<dyn Vm>));
        }
        let dir = self.inner.dirs.of(&VmId::new(id).map_err(failed)?);
        let Some(machine) = self.inner.manager.adopt(&dir).await.map_err(failed)? else { return Ok(None) };
        let vm = Arc::new(HostVm::new(machine));
        self.inner.running().insert(id.to_owned(), Arc::clone(&vm));
        Ok(Some(vm))
    }

    async fn destroy(&self, id: &str) -> Result<()> {
        let _turn = self.inner.turns.turn(id).await;
        let failed = |error: MachineError| error.during(format!("failed to remove microVM {id}"));
        let dir = self.inner.dirs.of(&VmId::new(id).map_err(failed)?);
        let known = self.inner.running().get(id).cloned();
        self.inner.waiting.give_up(id).await.map_err(failed)?;
        let ended = self.inner.end(&dir, known.as_deref()).await.map_err(failed);
        ended.map(|()| drop(self.inner.running().remove(id)))
    }
}

/// How a machine came to run.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Started {
    Booted,
    Restored(Template),
    /// It has waited.
    Woken,
}

// === impl Inner ===

impl Inner {
    fn running(&self) -> MutexGuard<'_, HashMap<String, Arc<HostVm>>> {
        // Entries are inserted and removed whole, so a panic elsewhere does not spoil them.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kernel and initramfs, opened anew each time: they may be replaced by newer ones.
    fn assets(&self) -> super::machine::Result<(Asset, Asset)> {
        let HostOptions { kernel, bundle, .. } = &self.options;
        let kernel = Asset::open(&kernel.clone().unwrap_or_else(|| bundle.join(KERNEL)))?;
        Ok((kernel, Asset::open(&bundle.join(INITRAMFS))?))
    }

    /// With the files that the sandbox names, of those that the operator allows.
    fn with_files(&self, spec: MachineSpec, wanted: &MachineFiles) -> super::machine::Result<MachineSpec> {
        let open = |path: &PathBuf| self.options.assets.open(path);
        let kernel = wanted.kernel.as_ref().map(open).transpose()?.unwrap_or_else(|| spec.kernel.clone());
        let initramfs = wanted.initramfs.as_ref().map(open).transpose()?.unwrap_or_else(|| spec.initramfs.clone());
        Ok(MachineSpec { kernel, initramfs, kernel_args: wanted.kernel_args.clone(), ..spec })
    }

    async fn launch(&self, id: &str, config: &SandboxConfig) -> Result<(Arc<HostVm>, Started)> {
        let tried = || format!("failed to start a microVM for {}", config.pod);
        let failed = |error: MachineError| error.during(tried());
        let Some(&address) = config.network.addresses().first() else {
            let text = format!("{}: it has no part in the host's network, nor in one that CNI plugins make", tried());
            return Err(RuntimeError::new(Kind::Unsupported, text));
        };
        let begun = Instant::now();
        let dir = self.dirs.of(&VmId::new(id).map_err(failed)?);
        let woken = self.wake(&dir, &config.cgroup_parent).await.map_err(failed)?;
        let (machine, started) = match woken {
            Some(machine) => (machine, Started::Woken),
            None => {
                let size = Size::of(&config.resources, self.options.memory);
                let spec = self.spec(dir, size, Some(address), &config.cgroup_parent).await?;
                let spec = self.with_files(spec, &config.machine).map_err(failed)?;
                // The tap is to end with its VMM, and so neither it nor its namespace is to be kept.
                self.start(&spec).await.map_err(failed)?
            }
        };
        let vm = Arc::new(HostVm::new(machine));
        self.running().insert(id.to_owned(), Arc::clone(&vm));
        vm.weigh(&config.resources)?;
        let runs = begun.elapsed();
        self.introduce(&vm, &started, address, config).await?;
        tracing::debug!(machine = id, ?started, ?runs, ready = ?begun.elapsed(), "a microVM is there");
        Ok((vm, started))
    }

    /// Waits for the agent and tells it who it is; leads its address to it meanwhile.
    async fn introduce(&self, vm: &HostVm, started: &Started, address: IpAddr, config: &SandboxConfig) -> Result<()> {
        let id = vm.machine().dir().id().as_str();
        let configured = async {
            let agent = match started {
                Started::Booted => vm.agent_within(BOOT_PATIENCE).await?,
                Started::Woken => vm.agent_within(RESTORE_PATIENCE).await?,
                // Whoever tries again boots, and makes a new one.
                Started::Restored(template) => {
                    vm.agent_within(RESTORE_PATIENCE).await.inspect_err(|_| self.templates.discard(template))?
                }
            };
            agent.configure(self.identity(address, config).await?).await
        };
        let led = async {
            let Some(taps) = &self.options.taps else { return Ok(()) };
            let unled = |error| {
                let text = format!("failed to start a microVM for {}", config.pod);
                RuntimeError::new(Kind::Internal, text).with_source(error)
            };
            taps.lead(id, address).await.map_err(unled)
        };
        // To its end each, so that whoever removes what is left meets nobody at work.
        let (configured, led) = tokio::join!(configured, led);
        configured.and(led)
    }

    /// From a template of its kind, or from its kernel.
    async fn start(&self, spec: &MachineSpec) -> super::machine::Result<(Box<dyn Machine>, Started)> {
        let kind = self.manager.template_kind(spec).await?;
        // A template was booted without arguments of its own.
        let found = self.templates.find(&kind).filter(|_| spec.kernel_args.is_empty());
        if let Some(template) = found {
            match self.manager.restore(spec, &template).await {
                Ok(machine) => return Ok((machine, Started::Restored(template))),
                Err(error) => {
                    tracing::warn!(machine = %spec.dir.id(), error = chain(&error), "a template is of no use: booting");
                    self.templates.discard(&template);
                    // One that did not end at once: of a second in its directory nothing would be known.
                    if let Some(left) = self.manager.adopt(&spec.dir).await? {
                        left.kill().await?;
                    }
                }
            }
        }
        Ok((self.manager.boot(spec).await?, Started::Booted))
    }

    /// Makes what a machine of this size is started in: its directory, its scratch disk and, with an address, its tap.
    async fn spec(&self, dir: VmDir, size: Size, address: Option<IpAddr>, cgroup_parent: &str) -> Result<MachineSpec> {
        let id = dir.id().to_string();
        let tried = || format!("failed to prepare microVM {id}");
        let failed = |error: MachineError| error.during(tried());
        let (kernel, initramfs) = self.assets().map_err(failed)?;
        dir.create(self.options.user.uid, self.options.user.gid).map_err(failed)?;
        let disk = self.options.root.join("blank.ext4");
        let blank = self.blank.get_or_try_init(|| scratch::make_blank(disk, self.options.scratch)).await?.clone();
        let scratch = dir.inside().join(super::machine::SCRATCH);
        let (place, shown) = (scratch.clone(), blank.display().to_string());
        let copied =
            blocking(format!("failed to copy {shown} for microVM {id}"), move || scratch::copy(&blank, &place));
        let tapped = async {
            let Some(taps) = &self.options.taps else { return Ok(None) };
            self.tap(taps.as_ref(), &id, address).await.map(Some)
        };
        // To its end each, as above.
        let (copied, tap) = tokio::join!(copied, tapped);
        copied?;
        let internal = || RuntimeError::new(Kind::Internal, tried());
        let tap = tap.map_err(|error: NetworkError| internal().with_source(error))?;
        let held = self.options.pins.next(size.vcpus).map_err(|error| internal().with_source(error))?;
        Ok(MachineSpec {
            dir,
            kernel,
            initramfs,
            kernel_args: Vec::new(),
            memory: size.memory,
            vcpus: size.vcpus,
            cpus: held.cpus,
            numa_node: held.numa_node,
            tap,
            scratch,
            image_slots: MAX_IMAGE_SLOTS,
            cgroup_parent: cgroup_parent.to_owned(),
            template: None,
        })
    }

    async fn tap(&self, taps: &dyn Taps, id: &str, address: Option<IpAddr>) -> Result<TapLink, NetworkError> {
        let owner = match self.manager.tap_use() {
            TapUse::Handed => None,
            TapUse::Named { uid } => Some(uid),
        };
        let tap = taps.make_tap(id, owner).await?;
        // Nobody's, for a template: whoever is restored from it is told its own.
        let mac = mac_of(address.unwrap_or(IpAddr::from([0, 0, 0, 0])));
        Ok(TapLink { name: tap.name, mac, device: tap.device, namespace: tap.namespace })
    }

    /// Ends the machine of a directory if it runs, and removes what there is of it: the directory last, by which the rest
    /// is found.
    async fn end(&self, dir: &VmDir, known: Option<&HostVm>) -> super::machine::Result<()> {
        match known {
            Some(vm) => vm.machine().kill().await?,
            // Of one that has ended already its cgroup is removed by this.
            None => {
                if let Some(machine) = self.manager.adopt(dir).await? {
                    machine.kill().await?;
                }
            }
        }
        if let Some(taps) = &self.options.taps {
            let id = dir.id().to_string();
            let action = "remove the tap".to_owned();
            let removed = taps.remove_tap(&id).await.map_err(std::io::Error::other);
            removed.map_err(|source| MachineError::Start { action, id, source })?;
        }
        dir.remove()
    }

    /// Makes a template of a size that was asked for, unless one is being made.
    async fn want_template(&self, size: Size) {
        if self.options.most_templates == 0 || self.template_turn.try_lock().is_err() {
            // While one is made the next of that size wants it too.
            return;
        }
        if let Err(error) = self.make_template(size).await {
            tracing::warn!(error = chain(&error), "failed to make a template: guests go on being booted");
        }
    }

    async fn make_template(&self, size: Size) -> Result<()> {
        let _turn = self.template_turn.lock().await;
        let dir = self.making.of(&VmId::random());
        let made = self.boot_template(&dir, size).await;
        let removed = self.end(&dir, None).await;
        made?;
        removed.map_err(|error| error.during("failed to remove what a template was made in"))
    }

    /// Boots a guest that is told nothing, and keeps its state.
    async fn boot_template(&self, dir: &VmDir, size: Size) -> Result<()> {
        let tried = || format!("failed to make a template of {} MiB and {} CPUs", size.memory >> 20, size.vcpus);
        let failed = |error: MachineError| error.during(tried());
        let spec = self.spec(dir.clone(), size, None, &self.options.cgroup).await?;
        let kind = self.manager.template_kind(&spec).await.map_err(failed)?;
        if self.templates.find(&kind).is_some() {
            return Ok(());
        }
        let place = self.templates.begin().map_err(failed)?;
        let spec = MachineSpec { template: Some(place.clone()), ..spec };
        let made = async {
            let vm = HostVm::new(self.manager.boot(&spec).await.map_err(failed)?);
            let saved = async {
                // Answered once all that containers need is loaded.
                vm.agent_within(BOOT_PATIENCE).await?.stats(false).await?;
                vm.hang_up().await;
                vm.machine().save().await.map_err(failed)
            };
            let saved = saved.await;
            // Whoever removes its directory tries again.
            let _ = vm.kill().await;
            self.templates.commit(saved?, &kind).map_err(failed)?;
            self.templates.trim(self.options.most_templates).map_err(failed)
        };
        let made = made.await;
        if made.is_err() {
            // Half a template is none.
            let _ = std::fs::remove_dir_all(place);
        }
        made
    }
}

#[cfg(test)]
mod tests;
