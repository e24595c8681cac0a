//! Measures how microVMs start and what they take: from a template and from their kernel, beside the same guest under a
//! bare QEMU, with the network of a node, yet without Docker and without a cluster. What a container in one adds is in
//! `guests`.
//!
//! `hack/bench/microvm` makes the guest and runs this as root, in a network namespace of its own.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

#[path = "guests.rs"]
mod guests;
#[path = "../../tests/runtime_contract/registry.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "a test's, of which this needs a part")]
mod registry;

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use futures::future::try_join_all;
use lambdalet::network::bridge::Bridge;
use lambdalet::runtime::microvm::agent::Agent;
use lambdalet::runtime::microvm::host::{HostOptions, HostVms};
use lambdalet::runtime::microvm::image;
use lambdalet::runtime::microvm::logs::LogLimits;
use lambdalet::runtime::microvm::machine::directory::DEFAULT_NAMESPACE;
use lambdalet::runtime::microvm::machine::pool::{HostSetups, SetupPool};
use lambdalet::runtime::microvm::machine::qemu::{AccelChoice, Qemu};
use lambdalet::runtime::microvm::machine::{TapUse, VmDirs, VmmUser};
use lambdalet::runtime::microvm::volumes::Places;
use lambdalet::runtime::microvm::{MicrovmOptions, MicrovmRuntime};
use lambdalet::runtime::stats::StatsScope;
use lambdalet::runtime::types::{
    MachineFiles, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxId, SandboxNetwork,
};
use lambdalet::runtime::{SandboxRuntime as _, remove_cgroup_root};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use registry::Registry;
use rustix::fs::inotify;
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::net::UnixStream;

/// As the node has it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const GATEWAY: [u8; 4] = [10, 99, 0, 1];
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Parser)]
struct Args {
    /// Directory of a guest bundle (hack/guest)
    #[arg(long)]
    guest: PathBuf,
    /// Program that becomes an image: a function that answers HTTP on port 8080 (hack/bench/function.c)
    #[arg(long)]
    function: PathBuf,
    /// Sandboxes restored, one after the other
    #[arg(long, default_value_t = 20)]
    restored: u8,
    /// Sandboxes booted, and guests under a bare QEMU, in turn
    #[arg(long, default_value_t = 5)]
    booted: u8,
    /// Sandboxes at once
    #[arg(long, default_value_t = 20)]
    many: u8,
    /// MiB of memory of each guest
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Calls of the function, directly and through its front in turn
    #[arg(long, default_value_t = 2000)]
    calls: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // For the client of the registry; an error only says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Silent, unless RUST_LOG wants to know where the time goes: lambdalet=debug.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("only root can make a network for this")?;
    ensure!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success(), "there is no loopback");
    // Threads of this runtime begin in the namespace too.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure(&args))
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let place = tempfile::tempdir()?;
    let bridge = Bridge::ensure("lbbench", GATEWAY.into(), "10.99.0.0/24".parse()?).await?;
    let function = fs::read(&args.function).with_context(|| format!("no function {}", args.function.display()))?;
    let registry = Registry::of_file("function", (0o755, &function), None).await;
    let owner = format!("bench-microvm-{}", std::process::id());
    let bench = Bench { args, place: place.path(), bridge, owner, registry };
    println!("{:<58}{:>10}{:>10}{:>12}", "", "p50", "max", "budget p50");
    let measured = bench.all().await;
    if measured.is_err() {
        end_machines(bench.place);
    }
    let removed = remove_cgroup_root(&bench.owner);
    measured?;
    Ok(removed?)
}

/// What a measurement that failed has left: VMMs outlive their driver, as those of a node do.
fn end_machines(place: &Path) {
    let below = |directory: PathBuf| fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let machines = below(place.to_owned()).flat_map(|driver| below(driver.join("vms"))).flat_map(below);
    for machine in machines {
        let record = fs::read_to_string(machine.join("machine.json")).unwrap_or_default();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap_or_default();
        let pid = record["pid"].as_i64().and_then(|pid| pid.try_into().ok()).and_then(rustix::process::Pid::from_raw);
        let Some(process) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { continue };
        let _ = pidfd_send_signal(&process, rustix::process::Signal::KILL);
        let _ = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    }
}

struct Bench<'a> {
    args: &'a Args,
    place: &'a Path,
    bridge: Bridge,
    owner: String,
    registry: Registry,
}

impl Bench<'_> {
    async fn all(&self) -> anyhow::Result<()> {
        self.setups().await?;
        self.woken().await?;
        self.boots().await?;
        let restores = self.driver("restores", (1, 0)).await?;
        self.restores(&restores).await?;
        self.many(&restores).await?;
        self.pods(restores).await
    }

    /// A driver that keeps so many templates, and has so many guests wait; with templates the first is there when this
    /// returns.
    async fn driver(&self, name: &str, (most_templates, warm): (usize, usize)) -> anyhow::Result<MicrovmRuntime> {
        let root = self.place.join(name);
        let options = HostOptions {
            memory: self.args.memory << 20,
            most_templates,
            warm,
            cgroup: self.owner.clone(),
            taps: Some(Arc::new(self.bridge.clone())),
            ..HostOptions::new(root.clone(), self.args.guest.clone())
        };
        let vms = HostVms::open(options, Arc::new(qemu())).await?;
        if most_templates > 0 {
            let begun = Instant::now();
            vms.prepare(&Resources::default()).await?;
            row("a template made", &[begun.elapsed()], None);
        }
        let images =
            image::Options { insecure_registries: vec![self.registry.host.clone()], ..image::Options::default() };
        let images = image::Store::open(&root.join("images"), images).await?;
        let (owner, places) = (self.owner.clone(), Places::default());
        let options = MicrovmOptions { owner, root, places, logs: LogLimits::default() };
        Ok(MicrovmRuntime::open(options, Arc::new(vms), Arc::new(images)).await?)
    }

    fn config(&self, number: u8) -> SandboxConfig {
        let name = format!("p{number}");
        SandboxConfig {
            pod: PodRef { uid: format!("uid-{name}"), namespace: "bench".into(), name: name.clone() },
            handler: None,
            attempt: 0,
            hostname: name.clone(),
            network: SandboxNetwork::Pod { address: address(number).into() },
            ipc: NamespaceMode::Pod,
            pid: NamespaceMode::Container,
            sysctls: BTreeMap::new(),
            cgroup_parent: format!("/{}/pod-{name}", self.owner),
            resources: Resources::default(),
            machine: MachineFiles::default(),
        }
    }

    /// What a machine is started in, made ahead of time: its directory and its tap.
    async fn setups(&self) -> anyhow::Result<()> {
        let dirs = VmDirs::new(&self.place.join("setups"), DEFAULT_NAMESPACE)?;
        let setups = HostSetups::new(dirs, Arc::new(self.bridge.clone()), VmmUser::default(), TapUse::Handed);
        let number = usize::from(self.args.many);
        let pool = SetupPool::new(setups, number);
        let begun = Instant::now();
        pool.fill(number).await?;
        row(&format!("{number} setups made ahead of time, all"), &[begun.elapsed()], None);
        let (mut ids, mut times) = (Vec::new(), Vec::new());
        for _ in 0..number {
            let begun = Instant::now();
            let setup = pool.get().await?;
            times.push(begun.elapsed());
            ids.push(setup.dir.id().clone());
        }
        row("a setup taken from the pool", &times, Some(Duration::from_millis(1)));
        // From here on it keeps none.
        pool.drain().await?;
        for id in &ids {
            pool.give_back(id).await?;
        }
        Ok(())
    }

    /// Ours and bare ones in turn, so that both meet the same host.
    async fn boots(&self) -> anyhow::Result<()> {
        let driver = self.driver("boots", (0, 0)).await?;
        let (mut ours, mut before, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        // The first makes files and asks QEMU for its version.
        for round in 0..=self.args.booted {
            let watch = Watch::new()?;
            let begun = Instant::now();
            let id = driver.run_pod_sandbox(&self.config(0)).await?;
            let took = begun.elapsed();
            let started = watch.opened()?;
            let pid = driver.pod_sandbox_status(&id).await?.pid.context("its VMM runs")?;
            let line = Line::of(pid)?;
            driver.remove_pod_sandbox(&id).await?;
            let floor = self.bare(&line).await?;
            if round > 0 {
                ours.push(took);
                before.push(started.saturating_duration_since(begun));
                bare.push(floor);
            }
        }
        let floor = row("a bare QEMU, from its start to the agent's answer", &bare, None);
        row("RunPodSandbox by a boot", &ours, Some(floor.mul_f64(1.15)));
        row("  of it before the VMM's program is opened", &before, Some(Duration::from_millis(15)));
        println!("  {:.2} times the bare QEMU (budget 1.15)", median(&ours).as_secs_f64() / floor.as_secs_f64());
        Ok(())
    }

    /// The least there is: kernel, initramfs, a scratch disk, a network card that leads nowhere, the agent's port.
    async fn bare(&self, line: &Line) -> anyhow::Result<Duration> {
        let place = tempfile::tempdir_in(self.place)?;
        let socket = place.path().join("agent.sock");
        fs::File::create(place.path().join("scratch"))?.set_len(1 << 30)?;
        let begun = Instant::now();
        let mut qemu = self.bare_command(line, place.path(), &socket)?;
        let answered = async {
            let stream = loop {
                match UnixStream::connect(&socket).await {
                    Ok(stream) => break stream,
                    Err(error) => ensure!(begun.elapsed() < PATIENCE, "no socket of QEMU: {error}"),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            let (agent, _) = Agent::connect(stream, PATIENCE).await?;
            let took = begun.elapsed();
            agent.close();
            Ok(took)
        };
        let answered = answered.await;
        qemu.kill()?;
        qemu.wait()?;
        answered
    }

    fn bare_command(&self, line: &Line, place: &Path, socket: &Path) -> anyhow::Result<Child> {
        let mut command = Command::new(QEMU);
        command.args(["-M", "microvm,x-option-roms=off,acpi=on,rtc=on,isa-serial=on"]);
        command.args(["-accel", &line.accel, "-cpu", &line.cpu, "-append", &line.kernel]);
        command.args(["-smp", "1", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]);
        command.arg("-m").arg(format!("{}m", self.args.memory));
        command.arg("-kernel").arg(self.args.guest.join("vmlinux"));
        command.arg("-initrd").arg(self.args.guest.join("initramfs.cpio"));
        command.arg("-serial").arg(format!("file:{}", place.join("console").display()));
        command.args(["-device", "virtio-serial-device", "-device", "virtserialport,chardev=p0,name=agent"]);
        command.arg("-chardev").arg(format!("socket,path={},id=p0,server=on,wait=off", socket.display()));
        command.arg("-drive").arg(format!("id=s,file={},format=raw,if=none", place.join("scratch").display()));
        command.args(["-device", "virtio-blk-device,drive=s,serial=scratch"]);
        command.args(["-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-device,netdev=n0"]);
        let said = fs::File::create(place.join("said"))?;
        Ok(command.stdin(Stdio::null()).stderr(said).spawn()?)
    }

    async fn restores(&self, driver: &MicrovmRuntime) -> anyhow::Result<()> {
        let (mut ran, mut removed) = (Vec::new(), Vec::new());
        for round in 0..=self.args.restored {
            let begun = Instant::now();
            let id = driver.run_pod_sandbox(&self.config(0)).await?;
            let took = begun.elapsed();
            let begun = Instant::now();
            driver.remove_pod_sandbox(&id).await?;
            if round > 0 {
                ran.push(took);
                removed.push(begun.elapsed());
            }
        }
        row("RunPodSandbox from a template", &ran, Some(Duration::from_millis(250)));
        row("RemovePodSandbox", &removed, None);
        Ok(())
    }

    /// A guest that waits, one after the other.
    async fn woken(&self) -> anyhow::Result<()> {
        let driver = self.driver("woken", (1, 1)).await?;
        let machines = self.place.join("woken/vms/default");
        let (begun, mut times) = (Instant::now(), Vec::new());
        while times.len() < usize::from(self.args.restored) {
            ensure!(begun.elapsed() < PATIENCE, "no guest waits");
            let before: Vec<_> = fs::read_dir(&machines).into_iter().flatten().flatten().collect();
            let run = Instant::now();
            let id = driver.run_pod_sandbox(&self.config(0)).await?;
            let took = run.elapsed();
            // One that was there before has waited.
            if before.iter().any(|entry| entry.file_name() == id.as_str()) {
                times.push(took);
            }
            driver.remove_pod_sandbox(&id).await?;
            // The next one is restored meanwhile, and may take the host for itself.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        driver.close().await;
        row("RunPodSandbox of a guest that waits (--microvm-warm)", &times, None);
        Ok(())
    }

    async fn many(&self, driver: &MicrovmRuntime) -> anyhow::Result<()> {
        let number = usize::from(self.args.many);
        let alone = own_kib(std::process::id().try_into()?)?;
        let begun = Instant::now();
        let one = |number: u8| async move {
            let id = driver.run_pod_sandbox(&self.config(number)).await?;
            anyhow::Ok((id, begun.elapsed()))
        };
        let started: Vec<(SandboxId, Duration)> = try_join_all((0..self.args.many).map(one)).await?;
        let all = begun.elapsed();
        let times: Vec<Duration> = started.iter().map(|(_, took)| *took).collect();
        row(&format!("{number} at once from a template, each"), &times, None);
        row(&format!("{number} at once from a template, all"), &[all], None);
        let begun = Instant::now();
        // Whoever does not answer in time is left out, and all that have just begun share the host's processors.
        loop {
            let answered = driver.list_pod_sandbox_stats(StatsScope::CpuAndMemory).await?.len();
            if answered == number {
                break;
            }
            ensure!(begun.elapsed() < PATIENCE, "{answered} of {number} guests answer");
        }
        row(&format!("{number} say what they use, all"), &[begun.elapsed()], None);
        let mut sizes = Vec::new();
        for (id, _) in &started {
            let pid = driver.pod_sandbox_status(id).await?.pid.context("its VMM runs")?;
            sizes.push(own_kib(pid)?);
        }
        size_row("  memory of one above the template, its VMM included", &mut sizes, Some(70));
        let grown = own_kib(std::process::id().try_into()?)?.saturating_sub(alone);
        size_row("  memory of this process for one", &mut [grown / u64::from(self.args.many)], Some(1));
        let begun = Instant::now();
        try_join_all(started.iter().map(|(id, _)| driver.remove_pod_sandbox(id))).await?;
        row(&format!("{number} at once removed"), &[begun.elapsed()], None);
        let left = fs::read_dir(self.place.join("restores/vms/default"))?.count();
        ensure!(left == 0, "{left} machines are left");
        Ok(())
    }
}

/// Prints a row and returns its median.
fn row(name: &str, times: &[Duration], budget: Option<Duration>) -> Duration {
    let milliseconds = |time: Duration| {
        let decimals = if time < Duration::from_millis(10) { 2 } else { 1 };
        format!("{:.decimals$} ms", time.as_secs_f64() * 1e3)
    };
    let most = times.iter().max().copied().unwrap_or_default();
    let budget = budget.map_or_else(String::new, milliseconds);
    println!("{name:<58}{:>10}{:>10}{budget:>12}", milliseconds(median(times)), milliseconds(most));
    median(times)
}

/// The same for sizes in KiB, and a budget in MB.
fn size_row(name: &str, sizes: &mut [u64], budget: Option<u64>) {
    sizes.sort_unstable();
    let megabytes = |kib: u64| format!("{:.1} MB", kib as f64 / 1024.0);
    let (half, most) = (megabytes(sizes[sizes.len() / 2]), megabytes(sizes[sizes.len() - 1]));
    let budget = budget.map_or_else(String::new, |budget| format!("{budget} MB"));
    println!("{name:<58}{half:>10}{most:>10}{budget:>12}");
}

fn qemu() -> Qemu {
    Qemu::new(QEMU.into(), VmmUser::default(), AccelChoice::Auto)
}

/// Where the guest of that number is reached.
fn address(number: u8) -> [u8; 4] {
    [10, 99, 0, 10 + number]
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}

/// Sees when QEMU's program is opened to be run: the first time from now on.
struct Watch(JoinHandle<rustix::io::Result<Instant>>);

impl Watch {
    fn new() -> anyhow::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&events, QEMU, inotify::WatchFlags::OPEN)?;
        Ok(Self(thread::spawn(move || {
            let mut buffer = [MaybeUninit::uninit(); 512];
            inotify::Reader::new(events, &mut buffer).next().map(|_| Instant::now())
        })))
    }

    fn opened(self) -> anyhow::Result<Instant> {
        let seen = self.0.join().map_err(|_| anyhow::anyhow!("nobody watched for QEMU"))?;
        Ok(seen?)
    }
}

/// How a VMM of ours runs its guest.
struct Line {
    accel: String,
    cpu: String,
    kernel: String,
}

impl Line {
    fn of(pid: i32) -> anyhow::Result<Self> {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        let after = |option: &str| {
            let value = line.split('\0').skip_while(|word| *word != option).nth(1);
            value.map(str::to_owned).with_context(|| format!("QEMU runs without {option}"))
        };
        Ok(Self { accel: after("-accel")?, cpu: after("-cpu")?, kernel: after("-append")? })
    }
}

/// What is a clone's own, in KiB: its share of all it has mapped, but of the template's memory only what it wrote to.
fn own_kib(pid: i32) -> anyhow::Result<u64> {
    let (mut sum, mut of_template) = (0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        if !name.ends_with(':') {
            of_template = line.ends_with("/memory") || line.ends_with("/memory (deleted)");
        } else if name == if of_template { "Anonymous:" } else { "Pss:" } {
            sum += value.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
    }
    Ok(sum)
}
