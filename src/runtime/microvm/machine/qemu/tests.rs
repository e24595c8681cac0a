//! Real machines under the host's QEMU, with the little guest of `hack/tiny-guest`, which answers lines on the agent's
//! port: `LAMBDALET_TEST_TINY_GUEST` names its directory.

mod in_guest;
mod isolation;
mod network;

use std::env;
use std::pin::Pin;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

use super::*;
use crate::runtime::microvm::machine::template::Templates;
use crate::runtime::microvm::machine::{TapLink, VmDirs, VmId};
use crate::runtime::session::Duplex;

/// Under TCG on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A place for machines, and what they are made of.
pub(super) struct Bench {
    place: tempfile::TempDir,
    guest: PathBuf,
    dirs: VmDirs,
    pub(super) qemu: Qemu,
    cgroup: String,
}

impl Bench {
    /// What is needed, or why there are no machines here.
    pub(super) fn new() -> Option<Self> {
        let Some(guest) = env::var_os("LAMBDALET_TEST_TINY_GUEST").map(PathBuf::from) else {
            println!("skipped: LAMBDALET_TEST_TINY_GUEST names no guest (hack/tiny-guest makes one)");
            return None;
        };
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: a VMM is jailed by root");
            return None;
        }
        let place = tempfile::tempdir().unwrap();
        let dirs = VmDirs::new(place.path(), "default").unwrap();
        let choice = AccelChoice::default();
        let qemu = Qemu::new("/usr/bin/qemu-system-x86_64".into(), VmmUser::default(), choice);
        let cgroup = format!("lambdalet-test-{}", VmId::random());
        Some(Self { place, guest, dirs, qemu, cgroup })
    }

    pub(super) fn spec(&self) -> MachineSpec {
        let dir = self.dirs.of(&VmId::random());
        let VmmUser { uid, gid } = self.qemu.user;
        dir.create(uid, gid).unwrap();
        let scratch = dir.inside().join("scratch.img");
        File::create(&scratch).unwrap().set_len(32 << 20).unwrap();
        MachineSpec {
            dir,
            kernel: Asset::open(&self.guest.join("vmlinux")).unwrap(),
            initramfs: Asset::open(&self.guest.join("initramfs.cpio")).unwrap(),
            kernel_args: Vec::new(),
            memory: 128 << 20,
            vcpus: 1,
            cpus: None,
            numa_node: None,
            tap: None,
            scratch,
            image_slots: 8,
            cgroup_parent: self.cgroup.clone(),
            template: None,
        }
    }

    /// A file of so many bytes that begins with this text, as an image.
    fn image(&self, name: &str, text: &str, size: u64) -> PathBuf {
        let path = self.place.path().join(name);
        fs::write(&path, text).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// A template made of a booted guest.
    async fn template(&self, templates: &Templates) -> Template {
        let spec = MachineSpec { template: Some(templates.begin().unwrap()), ..self.spec() };
        let machine = self.qemu.boot(&spec).await.unwrap();
        Guest::of(machine.as_ref()).await.ready().await;
        let kind = self.qemu.template_kind(&spec).await.unwrap();
        templates.commit(machine.save().await.unwrap(), &kind).unwrap()
    }

    /// Cgroups of machines that are still there.
    fn cgroups(&self) -> Vec<PathBuf> {
        let trees = fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
        let parents = trees.map(|tree| tree.path().join(&self.cgroup));
        let machines = parents.flat_map(|parent| fs::read_dir(parent).into_iter().flatten().flatten());
        machines.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(tree.path().join(&self.cgroup));
        }
    }
}

/// A conversation with the little guest.
pub(super) struct Guest(BufReader<Pin<Box<dyn Duplex>>>);

impl Guest {
    pub(super) async fn of(machine: &dyn Machine) -> Self {
        Self(BufReader::new(machine.agent().await.unwrap()))
    }

    pub(super) async fn ready(&mut self) {
        let line = self.line().await;
        assert!(line.starts_with("READY"), "{line}");
    }

    pub(super) async fn ask(&mut self, request: &str) -> String {
        self.0.write_all(format!("{request}\n").as_bytes()).await.unwrap();
        self.line().await
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(PATIENCE, self.0.read_line(&mut line)).await.expect("the guest answers in time").unwrap();
        line.trim().to_owned()
    }
}

#[test]
fn newer_versions_only_read_a_template() {
    for (version, reads) in
        [("7.2.22 (Debian 1:7.2)", false), ("8.1.0", false), ("8.2.2", true), ("10.0.0", true), ("?", false)]
    {
        assert_eq!(can_map_what_it_reads(version), reads, "{version}");
    }
}

#[tokio::test]
async fn a_guest_boots_answers_and_its_own_end_is_told() {
    let Some(bench) = Bench::new() else { return };
    println!("{}", bench.qemu.check().await.unwrap());
    let spec = bench.spec();
    let begun = Instant::now();
    let machine = bench.qemu.boot(&spec).await.unwrap();
    println!("QEMU answers after {:?}", begun.elapsed());
    let mut guest = Guest::of(machine.as_ref()).await;
    guest.ready().await;
    println!("the guest answers after {:?}", begun.elapsed());
    assert_eq!(guest.ask("size scratch").await, "65536");
    assert_eq!(guest.ask("ro scratch").await, "0");
    assert_eq!(guest.ask("write scratch mark").await, "ok");
    assert!(fs::read_to_string(&spec.scratch).unwrap().starts_with("mark"));
    machine.pause().await.unwrap();
    machine.pause().await.unwrap();
    let asked = guest.ask("ping 1");
    let silent = timeout(Duration::from_millis(300), asked).await;
    assert!(silent.is_err(), "a paused guest says nothing: {silent:?}");
    machine.resume().await.unwrap();
    machine.resume().await.unwrap();
    assert_eq!(guest.line().await, "pong 1");
    guest.0.write_all(b"off\n").await.unwrap();
    let exit = timeout(PATIENCE, machine.exited()).await.expect("it ends");
    assert_eq!(exit, VmExit::Code(0));
    machine.kill().await.unwrap();
    assert!(bench.cgroups().is_empty(), "{:?}", bench.cgroups());
}

#[tokio::test]
async fn images_are_swapped_while_the_guest_runs() {
    let Some(bench) = Bench::new() else { return };
    let machine = bench.qemu.boot(&bench.spec()).await.unwrap();
    let mut guest = Guest::of(machine.as_ref()).await;
    guest.ready().await;
    let (small, large) = (bench.image("small", "small", 4096), bench.image("large", "large", 256 << 20));
    assert_eq!(guest.ask("size image0").await, "0");
    for round in 0..3 {
        for (image, sectors) in [(&small, "8"), (&large, "524288")] {
            let begun = Instant::now();
            machine.put_image(0, image).await.unwrap();
            println!("round {round}: {sectors} sectors put in {:?}", begun.elapsed());
            assert_eq!(guest.ask("size image0").await, sectors);
            assert_eq!(guest.ask("ro image0").await, "1");
            assert_eq!(guest.ask("read image0 5").await, image.file_name().unwrap().to_str().unwrap());
        }
    }
    machine.put_image(7, &small).await.unwrap();
    assert_eq!(guest.ask("read image7 5").await, "small");
    machine.take_image(0).await.unwrap();
    assert_eq!(guest.ask("size image0").await, "0");
    machine.put_image(0, &small).await.unwrap();
    assert_eq!(guest.ask("read image0 5").await, "small");
    let refused = machine.put_image(8, &small).await.unwrap_err();
    assert!(matches!(refused, MachineError::NoSlot { slot: 8, slots: 8, .. }), "{refused}");
    assert!(machine.put_image(1, Path::new("/nowhere")).await.is_err());
    assert_eq!(guest.ask("size image1").await, "0");
    machine.kill().await.unwrap();
    assert_eq!(machine.exited().await, VmExit::Signal(9));
    assert_eq!(fs::metadata(&small).unwrap().len(), 4096, "an image is only read");
}

#[tokio::test]
async fn a_machine_outlives_its_node_and_is_adopted() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    assert!(bench.qemu.adopt(&spec.dir).await.unwrap().is_none());
    let machine = bench.qemu.boot(&spec).await.unwrap();
    let pid = machine.pid();
    let mut guest = Guest::of(machine.as_ref()).await;
    guest.ready().await;
    drop(guest);
    drop(machine);
    let machine = bench.qemu.adopt(&spec.dir).await.unwrap().expect("it runs");
    assert_eq!(machine.pid(), pid);
    let mut guest = Guest::of(machine.as_ref()).await;
    assert_eq!(guest.ask("ping 2").await, "pong 2");
    machine.put_image(3, &bench.image("i", "after", 4096)).await.unwrap();
    assert_eq!(guest.ask("read image3 5").await, "after");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(machine.exited().await, VmExit::Signal(9));
    assert!(!bench.cgroups().is_empty(), "a VMM that was killed leaves its cgroup");
    drop(machine);
    assert!(bench.qemu.adopt(&spec.dir).await.unwrap().is_none());
    assert!(bench.cgroups().is_empty(), "whoever finds it removes it: {:?}", bench.cgroups());
}

#[tokio::test]
async fn a_kernel_that_is_none_is_told_in_qemus_words_and_leaves_nothing() {
    let Some(bench) = Bench::new() else { return };
    // With words for the kernel QEMU reads it after it was told them.
    for kernel_args in [vec![], vec!["VMID=one".to_owned()]] {
        let kernel = Asset::open(&bench.image("kernel", "no kernel", 4096)).unwrap();
        let error = bench.qemu.boot(&MachineSpec { kernel, kernel_args, ..bench.spec() }).await.unwrap_err();
        let MachineError::Ended { said, .. } = &error else { panic!("{error}") };
        assert!(said.contains("kernel"), "{said}");
        assert!(bench.cgroups().is_empty(), "{:?}", bench.cgroups());
    }
    let path = bench.image("private", "x", 512);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let kernel = Asset::open(&path).unwrap();
    let refused = bench.qemu.boot(&MachineSpec { kernel, ..bench.spec() }).await.unwrap_err();
    assert!(matches!(refused, MachineError::Refused { .. }), "{refused}");
}

#[tokio::test]
async fn clones_of_a_template_answer_at_once_and_share_its_memory() {
    let Some(bench) = Bench::new() else { return };
    let templates = Templates::new(bench.place.path().join("templates"));
    let begun = Instant::now();
    let template = bench.template(&templates).await;
    println!("made a template in {:?}", begun.elapsed());
    let image = bench.image("image", "inside", 8192);
    let mut clones = Vec::new();
    for number in 0..3 {
        let spec = bench.spec();
        let begun = Instant::now();
        let machine = bench.qemu.restore(&spec, &template).await.unwrap();
        let restored = begun.elapsed();
        let mut guest = Guest::of(machine.as_ref()).await;
        assert_eq!(guest.ask("ping 3").await, "pong 3");
        println!("clone {number}: restored in {restored:?}, answers after {:?}", begun.elapsed());
        machine.put_image(0, &image).await.unwrap();
        assert_eq!(guest.ask("read image0 6").await, "inside");
        assert_eq!(guest.ask(&format!("write scratch clone{number}")).await, "ok");
        assert!(fs::read_to_string(&spec.scratch).unwrap().starts_with(&format!("clone{number}")));
        clones.push((machine, guest));
    }
    for (machine, _) in &clones {
        let pss = pss(machine.pid());
        println!("PSS {} KiB", pss);
        // The target is 70 MB of a guest of 128.
        assert!(pss < 70 << 10, "{pss} KiB");
    }
    assert_eq!(templates.find(&bench.qemu.template_kind(&bench.spec()).await.unwrap()), Some(template.clone()));
    let larger = MachineSpec { memory: 256 << 20, ..bench.spec() };
    let refused = bench.qemu.restore(&larger, &template).await.unwrap_err();
    assert!(matches!(refused, MachineError::Mismatch { .. }), "{refused}");
    for (machine, _) in clones {
        machine.kill().await.unwrap();
    }
    assert!(bench.cgroups().is_empty(), "{:?}", bench.cgroups());
}

#[tokio::test]
async fn machines_that_come_and_go_together_leave_nothing() {
    let Some(bench) = Bench::new() else { return };
    let templates = Templates::new(bench.place.path().join("templates"));
    let template = bench.template(&templates).await;
    let one = |number: usize| {
        let (bench, template, spec) = (&bench, &template, bench.spec());
        async move {
            let machine = bench.qemu.restore(&spec, template).await.unwrap();
            let mut guest = Guest::of(machine.as_ref()).await;
            assert_eq!(guest.ask(&format!("ping {number}")).await, format!("pong {number}"));
            machine.kill().await.unwrap();
            spec.dir.remove().unwrap();
            machine.pid()
        }
    };
    let begun = Instant::now();
    let pids = futures::future::join_all((0..20).map(one)).await;
    println!("20 machines came and went in {:?}", begun.elapsed());
    assert!(bench.cgroups().is_empty(), "{:?}", bench.cgroups());
    assert_eq!(bench.dirs.list().unwrap().len(), 1, "that of the template's machine");
    let place = bench.place.path().to_str().unwrap();
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(place), "mounts are left");
    for pid in pids {
        // The number may be another's by now.
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(!line.contains("-sandbox"), "{pid} still runs: {line}");
    }
}

/// In KiB.
fn pss(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap()
}

/// A card for the guest, by hand.
pub(super) fn link(tap: crate::network::tap::Tap, mac: [u8; 6]) -> TapLink {
    TapLink { name: tap.name, mac, device: tap.device, namespace: tap.namespace }
}
