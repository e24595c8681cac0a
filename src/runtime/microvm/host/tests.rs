//! Guests that mean harm, in machines that are none: what they say comes from the test.

mod waiting;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::result::Result;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use lambdalet_proto::session::link::serve_sessions;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::*;
use crate::runtime::microvm::machine::{TemplateKind, VmExit};
use crate::runtime::session::Duplex;
use crate::runtime::types::{MachineFiles, NamespaceMode, PodRef, SandboxNetwork};

/// What a guest says to whoever connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    /// Nothing: it hangs up.
    Nothing,
    /// Nothing: it waits.
    Silence,
    /// Any bytes, without an end.
    Garbage,
    /// That it is there; then it hangs up.
    Goodbye,
}

#[derive(Debug, Default)]
struct Counted {
    started: AtomicU32,
    asked: AtomicU32,
    killed: AtomicU32,
    /// So many of the next kills come too late.
    late: AtomicU32,
}

#[derive(Debug)]
struct Hostile {
    says: Says,
    counted: Arc<Counted>,
}

#[derive(Debug)]
struct HostileMachine {
    dir: VmDir,
    says: Says,
    counted: Arc<Counted>,
    ended: Notify,
}

#[async_trait]
impl MachineManager for Hostile {
    fn name(&self) -> &'static str {
        "hostile"
    }

    fn tap_use(&self) -> TapUse {
        TapUse::Handed
    }

    async fn check(&self) -> Result<String, Why> {
        Ok("hostile".to_owned())
    }

    async fn template_kind(&self, spec: &MachineSpec) -> Result<TemplateKind, MachineError> {
        TemplateKind::of("hostile", spec)
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        self.counted.started.fetch_add(1, Ordering::Relaxed);
        let (dir, counted) = (spec.dir.clone(), Arc::clone(&self.counted));
        Ok(Box::new(HostileMachine { dir, says: self.says, counted, ended: Notify::new() }))
    }

    async fn restore(&self, spec: &MachineSpec, _: &Template) -> Result<Box<dyn Machine>, MachineError> {
        self.boot(spec).await
    }

    async fn adopt(&self, _: &VmDir) -> Result<Option<Box<dyn Machine>>, MachineError> {
        Ok(None)
    }
}

#[async_trait]
impl Machine for HostileMachine {
    fn pid(&self) -> i32 {
        1
    }

    fn dir(&self) -> &VmDir {
        &self.dir
    }

    // The task ends with the stream.
    #[allow(clippy::disallowed_methods)]
    async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>, MachineError> {
        self.counted.asked.fetch_add(1, Ordering::Relaxed);
        let (ours, mut guests) = UnixStream::pair().unwrap();
        let says = self.says;
        tokio::spawn(async move {
            match says {
                Says::Nothing => {}
                Says::Silence => drop(tokio::io::copy(&mut guests, &mut tokio::io::sink()).await),
                Says::Garbage => while guests.write_all(&rand::random::<[u8; 4096]>()).await.is_ok() {},
                Says::Goodbye => {
                    let (reader, mut writer) = guests.split();
                    let hang_up = Notify::new();
                    let sessions = serve_sessions(reader, &mut writer, |mut io| {
                        let hang_up = &hang_up;
                        async move {
                            // What a peer of HTTP/2 begins with: a SETTINGS frame, of nothing.
                            let _ = io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
                            hang_up.notify_one();
                        }
                    });
                    // Neither is needed any more once the other has ended.
                    tokio::select! {
                        _ = sessions => {}
                        () = hang_up.notified() => {}
                    }
                }
            }
        });
        Ok(Box::pin(ours))
    }

    async fn put_image(&self, _: u8, _: &std::path::Path) -> Result<(), MachineError> {
        Ok(())
    }

    async fn take_image(&self, _: u8) -> Result<(), MachineError> {
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }

    async fn resume(&self) -> Result<(), MachineError> {
        Ok(())
    }

    async fn save(&self) -> Result<Template, MachineError> {
        Err(MachineError::Unsupported { vmm: "hostile", what: "save".to_owned() })
    }

    fn weigh(&self, _: u64) -> Result<(), MachineError> {
        Ok(())
    }

    async fn move_to(&mut self, _: &MachineSpec) -> Result<(), MachineError> {
        Ok(())
    }

    fn kill_unwaited(&self) {
        self.ended.notify_one();
    }

    async fn kill(&self) -> Result<(), MachineError> {
        let late = self.counted.late.load(Ordering::Relaxed);
        if late > 0 {
            self.counted.late.store(late - 1, Ordering::Relaxed);
            return Err(MachineError::Late { what: "the end".to_owned(), id: self.dir.id().to_string(), seconds: 20 });
        }
        self.counted.killed.fetch_add(1, Ordering::Relaxed);
        self.ended.notify_one();
        Ok(())
    }

    async fn exited(&self) -> VmExit {
        self.ended.notified().await;
        VmExit::Signal(9)
    }
}

fn config() -> SandboxConfig {
    SandboxConfig {
        pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() },
        handler: None,
        attempt: 0,
        hostname: "p".into(),
        network: SandboxNetwork::Pod { address: [10, 0, 0, 2].into() },
        ipc: NamespaceMode::Pod,
        pid: NamespaceMode::Container,
        sysctls: BTreeMap::new(),
        cgroup_parent: "/l/p".into(),
        resources: Resources::default(),
        machine: MachineFiles::default(),
    }
}

/// A host of such machines.
struct Bench {
    vms: HostVms,
    counted: Arc<Counted>,
    place: tempfile::TempDir,
}

impl Bench {
    async fn new(says: Says) -> Self {
        let place = tempfile::tempdir().unwrap();
        for file in [KERNEL, INITRAMFS] {
            std::fs::write(place.path().join(file), file).unwrap();
        }
        let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let root = place.path().join("microvm");
        let options = HostOptions { user, scratch: 16 << 20, ..HostOptions::new(root, place.path().to_owned()) };
        let counted = Arc::<Counted>::default();
        let vms = HostVms::open(options, Arc::new(Hostile { says, counted: Arc::clone(&counted) })).await.unwrap();
        Self { vms, counted, place }
    }
}

#[tokio::test]
async fn a_guest_that_talks_nonsense_is_an_error_in_bounds_and_leaves_nothing() {
    for says in [Says::Nothing, Says::Garbage] {
        let Bench { vms, counted, place: _place } = Bench::new(says).await;
        for _ in 0..3 {
            let begun = Instant::now();
            let error = vms.launch("vm", &config()).await.err().expect("it is no guest");
            println!("{says:?} after {:?}: {}", begun.elapsed(), chain(&error));
            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
            assert!(begun.elapsed() < BOOT_PATIENCE / 2, "{:?}", begun.elapsed());
            vms.destroy("vm").await.unwrap();
            vms.destroy("vm").await.unwrap();
            assert!(vms.find("vm").await.unwrap().is_none());
            assert!(vms.inner.dirs.list().unwrap().is_empty());
        }
        let count = |counter: &AtomicU32| counter.load(Ordering::Relaxed);
        assert_eq!((count(&counted.started), count(&counted.asked), count(&counted.killed)), (3, 3, 3));
    }
}

#[tokio::test]
async fn what_does_not_end_is_found_again_by_its_directory() {
    let bench = Bench::new(Says::Nothing).await;
    let counted = &bench.counted;
    bench.vms.launch("vm", &config()).await.err().expect("it is no guest");
    counted.late.store(2, Ordering::Relaxed);
    for _ in 0..2 {
        let error = bench.vms.destroy("vm").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal, "{}", chain(&error));
        assert_eq!(bench.vms.inner.dirs.list().unwrap().len(), 1);
        assert!(bench.vms.find("vm").await.unwrap().is_some());
    }
    bench.vms.destroy("vm").await.unwrap();
    assert!(bench.vms.inner.dirs.list().unwrap().is_empty());
    assert_eq!(counted.killed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn nobody_waits_longer_for_a_silent_guest_than_he_has_patience() {
    let place = tempfile::tempdir().unwrap();
    let dir = VmDirs::new(place.path(), "default").unwrap().of(&VmId::random());
    let counted = Arc::<Counted>::default();
    let (says, ended) = (Says::Silence, Notify::new());
    let vm = HostVm::new(Box::new(HostileMachine { dir, says, counted: Arc::clone(&counted), ended }));
    let begun = Instant::now();
    let (patient, other) = (vm.agent_within(Duration::from_secs(2)), vm.agent_within(Duration::from_millis(10)));
    let other = async { (other.await, begun.elapsed()) };
    let (first, (second, waited)) = tokio::join!(patient, other);
    // It has waited for its turn.
    assert!(waited < Duration::from_secs(2), "{waited:?}");
    let third = vm.agent_within(RESTORE_PATIENCE).await;
    assert!(begun.elapsed() < RESTORE_PATIENCE, "he who comes next knows");
    for answer in [first, second, third] {
        assert_eq!(answer.expect_err("it is silent").kind(), Kind::Unavailable);
    }
    assert_eq!(counted.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn of_ten_thousand_sessions_that_break_nothing_is_left() {
    let place = tempfile::tempdir().unwrap();
    let dir = VmDirs::new(place.path(), "default").unwrap().of(&VmId::random());
    let counted = Arc::<Counted>::default();
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = alive();
    let begun = Instant::now();
    for (says, rounds) in [(Says::Nothing, 5_000), (Says::Goodbye, 5_000)] {
        let (dir, counted) = (dir.clone(), Arc::clone(&counted));
        let vm = HostVm::new(Box::new(HostileMachine { dir, says, counted, ended: Notify::new() }));
        let mut most = 0;
        for _ in 0..rounds {
            let error = vm.agent_within(RESTORE_PATIENCE).await.expect_err("it is no guest");
            assert_eq!(error.kind(), Kind::Unavailable, "{}", chain(&error));
            most = most.max(alive());
        }
        println!("{says:?}: {rounds} sessions after {:?}, {most} tasks at the most", begun.elapsed());
        assert!(most < before + 16, "{most} tasks");
    }
    assert_eq!(counted.asked.load(Ordering::Relaxed), 10_000);
    // Those of the last session see its end when they are next run.
    while alive() > before {
        assert!(begun.elapsed() < BOOT_PATIENCE, "{} tasks, {before} before", alive());
        tokio::task::yield_now().await;
    }
}
