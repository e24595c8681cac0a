//! The replicas over setups of this host and machines that are only remembered.

mod real;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::network::tap::{Surroundings, Tap};
use crate::runtime::microvm::machine::pool::HostSetups;
use crate::runtime::microvm::machine::{TapUse, Template, TemplateKind, VmDir, VmExit, VmmUser, Why};
use crate::runtime::session::Duplex;

type Made<T> = crate::runtime::microvm::machine::Result<T>;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Boot,
    Image,
    Lead,
    Adopt,
}

/// Machines and taps of nothing.
#[derive(Default)]
struct Stage {
    fault: Mutex<Option<Fault>>,
    specs: Mutex<Vec<MachineSpec>>,
    /// What each image that was put in a slot held.
    images: Mutex<Vec<(u8, String)>>,
    led: Mutex<Vec<(String, IpAddr)>>,
    /// By their directories: those that run.
    machines: Mutex<HashMap<PathBuf, Actor>>,
    /// Machines that were killed.
    killed: AtomicBool,
    /// Machines do not end when they are killed.
    stuck: AtomicBool,
}

/// A machine.
#[derive(Clone, Debug)]
struct Actor {
    dir: VmDir,
    ended: CancellationToken,
    stage: StageRef,
}

#[derive(Clone)]
struct StageRef(Arc<Stage>);

impl std::fmt::Debug for StageRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stage")
    }
}

fn fault() -> MachineError {
    MachineError::Invalid { what: "this".to_owned(), reason: "a fault".to_owned() }
}

impl StageRef {
    fn check(&self, here: Fault) -> Made<()> {
        if *self.0.fault.lock().unwrap() == Some(here) { Err(fault()) } else { Ok(()) }
    }
}

#[async_trait]
impl MachineManager for StageRef {
    fn name(&self) -> &'static str {
        "stage"
    }

    fn tap_use(&self) -> TapUse {
        TapUse::Handed
    }

    async fn check(&self) -> Result<String, Why> {
        Ok("nothing".to_owned())
    }

    async fn template_kind(&self, _spec: &MachineSpec) -> Made<TemplateKind> {
        Err(fault())
    }

    async fn boot(&self, spec: &MachineSpec) -> Made<Box<dyn Machine>> {
        spec.validate()?;
        self.check(Fault::Boot)?;
        assert!(spec.scratch.is_file());
        self.0.specs.lock().unwrap().push(spec.clone());
        let actor = Actor { dir: spec.dir.clone(), ended: CancellationToken::new(), stage: self.clone() };
        self.0.machines.lock().unwrap().insert(spec.dir.path().to_owned(), actor.clone());
        Ok(Box::new(actor))
    }

    async fn restore(&self, _spec: &MachineSpec, _template: &Template) -> Made<Box<dyn Machine>> {
        Err(fault())
    }

    async fn adopt(&self, dir: &VmDir) -> Made<Option<Box<dyn Machine>>> {
        self.check(Fault::Adopt)?;
        let machine = self.0.machines.lock().unwrap().get(dir.path()).cloned();
        Ok(machine.map(|machine| Box::new(machine) as Box<dyn Machine>))
    }
}

#[async_trait]
impl Machine for Actor {
    fn pid(&self) -> i32 {
        1
    }

    fn dir(&self) -> &VmDir {
        &self.dir
    }

    async fn agent(&self) -> Made<Pin<Box<dyn Duplex>>> {
        panic!("no agent is in there");
    }

    async fn put_image(&self, slot: u8, image: &Path) -> Made<()> {
        self.stage.check(Fault::Image)?;
        self.stage.0.images.lock().unwrap().push((slot, fs::read_to_string(image).unwrap()));
        Ok(())
    }

    async fn take_image(&self, _slot: u8) -> Made<()> {
        Ok(())
    }

    async fn pause(&self) -> Made<()> {
        Ok(())
    }

    async fn resume(&self) -> Made<()> {
        Ok(())
    }

    async fn save(&self) -> Made<Template> {
        Err(fault())
    }

    fn weigh(&self, _shares: u64) -> Made<()> {
        Ok(())
    }

    async fn move_to(&mut self, _: &MachineSpec) -> Made<()> {
        Ok(())
    }

    fn kill_unwaited(&self) {
        self.ended.cancel();
    }

    async fn kill(&self) -> Made<()> {
        if self.stage.0.stuck.load(Ordering::SeqCst) {
            return Err(fault());
        }
        self.stage.0.machines.lock().unwrap().remove(self.dir.path());
        self.stage.0.killed.store(true, Ordering::SeqCst);
        self.ended.cancel();
        Ok(())
    }

    async fn exited(&self) -> VmExit {
        self.ended.cancelled().await;
        VmExit::Code(0)
    }
}

#[async_trait]
impl Taps for StageRef {
    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        Err(NetworkError::BadName { name: "stage".to_owned() })
    }

    async fn make_tap(&self, sandbox: &str, _owner: Option<u32>) -> Result<Tap, NetworkError> {
        Ok(Tap { name: sandbox.to_owned(), device: None, namespace: None })
    }

    async fn lead(&self, sandbox: &str, address: IpAddr) -> Result<(), NetworkError> {
        let refused = |_| NetworkError::BadName { name: sandbox.to_owned() };
        self.check(Fault::Lead).map_err(refused)?;
        self.0.led.lock().unwrap().push((sandbox.to_owned(), address));
        Ok(())
    }

    async fn remove_tap(&self, _sandbox: &str) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn remove_other_taps(&self, _sandboxes: &[String]) -> Result<usize, NetworkError> {
        Ok(0)
    }
}

/// A host.
struct Bench {
    place: tempfile::TempDir,
    stage: StageRef,
    ipam: Arc<Ipam>,
}

impl Bench {
    fn new(range: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("assets")).unwrap();
        for name in ["vmlinux", "initrd", "image"] {
            fs::write(place.path().join("assets").join(name), name).unwrap();
        }
        fs::write(place.path().join("secret"), "secret").unwrap();
        let ipam = Ipam::open(&place.path().join("addresses"), range.parse().unwrap(), Duration::ZERO).unwrap();
        Self { place, stage: StageRef(Arc::default()), ipam: Arc::new(ipam) }
    }

    fn dirs(&self) -> VmDirs {
        VmDirs::new(&self.place.path().join("vms"), "functions").unwrap()
    }

    /// At most 3 replicas of 256 MiB together, and one idle setup.
    async fn replicas(&self) -> PooledReplicas<HostSetups> {
        let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let taps = Arc::new(self.stage.clone());
        let setups = HostSetups::new(self.dirs(), taps.clone(), user, TapUse::Handed);
        let params = PooledParams {
            pool: SetupPool::new(setups, 1),
            dirs: self.dirs(),
            manager: Arc::new(self.stage.clone()),
            taps,
            ipam: Arc::clone(&self.ipam),
            assets: AssetDirs::new(vec![self.place.path().join("assets")]),
            services: Services { resource_manager: "10.0.0.9:50052".to_owned(), ..Services::default() },
            cgroup_parent: "l".to_owned(),
            pins: Pins::default(),
            most: 3,
            memory: 256 << 20,
        };
        PooledReplicas::open(params).await.unwrap()
    }

    fn asset(&self, name: &str) -> PathBuf {
        self.place.path().join("assets").join(name)
    }

    fn wish(&self) -> ReplicaWish {
        ReplicaWish {
            kernel: self.asset("vmlinux"),
            initrd: self.asset("initrd"),
            kernel_args: "quiet --env=A=1".to_owned(),
            image: Some(self.asset("image")),
            inet_dev: None,
            name_server: IpAddr::from([9, 9, 9, 9]),
            cpus: 2,
            memory: 64 << 20,
        }
    }

    /// Files below the directories of setups.
    fn leftovers(&self) -> Vec<PathBuf> {
        let inside =
            |dir: VmDir| fs::read_dir(dir.inside()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        self.dirs().list().unwrap().into_iter().flat_map(inside).collect()
    }

    fn set(&self, fault: Option<Fault>) {
        *self.stage.0.fault.lock().unwrap() = fault;
    }
}

#[tokio::test]
async fn a_replica_is_a_machine_with_its_image_its_address_and_its_arguments() {
    let bench = Bench::new("10.1.0.0/16");
    let replicas = bench.replicas().await;
    replicas.inner.params.pool.fill(1).await.unwrap();
    let replica = replicas.create(&bench.wish()).await.unwrap();
    assert_eq!(replica.address, IpAddr::from([10, 1, 0, 2]));
    let spec = bench.stage.0.specs.lock().unwrap()[0].clone();
    let id = &replica.id;
    let expected = [
        "quiet --env=A=1".to_owned(),
        "--env=RES_MNGR_ADDR=10.0.0.9:50052".to_owned(),
        "--env=OS=linux".to_owned(),
        format!("--env=VMID={id}"),
        "ip=10.1.0.2::10.1.0.1:255.255.0.0::eth0:off:9.9.9.9".to_owned(),
    ];
    assert_eq!(spec.kernel_args, expected);
    assert_eq!((spec.memory, spec.vcpus, spec.image_slots), (64 << 20, 2, 1));
    assert_eq!(spec.tap.unwrap().mac, mac_of(replica.address), "from another it could not send");
    assert_eq!(*bench.stage.0.images.lock().unwrap(), [(0, "image".to_owned())]);
    assert_eq!(*bench.stage.0.led.lock().unwrap(), [(id.clone(), replica.address)]);

    replicas.release(id).await.unwrap();
    replica.ended.await;
    assert_eq!((replicas.count(), bench.leftovers()), (0, Vec::new()));
    for unknown in [id.as_str(), "", "../x", "one"] {
        assert!(matches!(replicas.release(unknown).await, Err(Refusal::NotAssigned)), "{unknown}");
    }
    assert!(bench.ipam.held().is_empty());
    let again = replicas.create(&bench.wish()).await.unwrap();
    assert_ne!(again.id, *id, "a late release of the one before does not reach it");
    assert!(matches!(replicas.release(id).await, Err(Refusal::NotAssigned)));
    assert_eq!(replicas.count(), 1);
}

#[tokio::test]
async fn a_file_that_may_not_be_named_is_refused_by_its_field() {
    let bench = Bench::new("10.1.0.0/16");
    let replicas = bench.replicas().await;
    std::os::unix::fs::symlink("../secret", bench.asset("link")).unwrap();
    let (wish, secret) = (bench.wish(), bench.place.path().join("secret"));
    for (name, bad) in [
        ("kernelImagePath", ReplicaWish { kernel: secret.clone(), ..wish.clone() }),
        ("initrdPath", ReplicaWish { initrd: bench.asset("missing"), ..wish.clone() }),
        ("imageName", ReplicaWish { image: Some(bench.asset("link")), ..wish.clone() }),
        ("imageName", ReplicaWish { image: Some(bench.asset("../secret")), ..wish.clone() }),
        ("imageName", ReplicaWish { image: Some("/dev/zero".into()), ..wish.clone() }),
        ("inetDev", ReplicaWish { inet_dev: Some("none0".to_owned()), ..wish.clone() }),
        ("mem", ReplicaWish { memory: 512 << 20, ..wish.clone() }),
    ] {
        match replicas.create(&bad).await {
            Err(Refusal::Invalid { field, .. }) => assert_eq!(field, name),
            Err(other) => panic!("{name}: {other:?}"),
            Ok(_) => panic!("{name} was taken"),
        }
    }
    assert!(bench.dirs().list().unwrap().is_empty(), "no setup was made for it");
    replicas.create(&wish).await.unwrap();
}

fn why(refused: Result<Replica, Refusal>) -> Reason {
    match refused {
        Err(Refusal::TryAgain(TryAgain { reason, .. })) => reason,
        Err(other) => panic!("{other:?}"),
        Ok(replica) => panic!("{} was made", replica.id),
    }
}

#[tokio::test]
async fn there_are_as_many_as_the_node_has_places_memory_and_addresses_for() {
    let bench = Bench::new("10.1.0.0/16");
    let replicas = bench.replicas().await;
    let large = ReplicaWish { memory: 192 << 20, ..bench.wish() };
    let first = replicas.create(&large).await.unwrap();
    assert_eq!(why(replicas.create(&large).await), Reason::Memory);
    replicas.release(&first.id).await.unwrap();
    for _ in 0..3 {
        replicas.create(&bench.wish()).await.unwrap();
    }
    assert_eq!(why(replicas.create(&bench.wish()).await), Reason::Replicas);

    let small = Bench::new("10.1.0.0/30");
    let replicas = small.replicas().await;
    let only = replicas.create(&small.wish()).await.unwrap();
    assert_eq!(why(replicas.create(&small.wish()).await), Reason::Address);
    assert_eq!(small.leftovers().len(), 1, "the other setup is clean again");
    replicas.release(&only.id).await.unwrap();
    replicas.create(&small.wish()).await.unwrap();
}

#[tokio::test]
async fn whatever_fails_leaves_nothing_and_takes_nothing() {
    let bench = Bench::new("10.1.0.0/16");
    let replicas = bench.replicas().await;
    // Of memory and places there are enough for 4 and 3: a lost share would show.
    for fault in [Fault::Boot, Fault::Image, Fault::Lead].into_iter().cycle().take(12) {
        bench.set(Some(fault));
        let failed = replicas.create(&bench.wish()).await.err().unwrap();
        assert!(matches!(failed, Refusal::Failed { .. }), "{fault:?}: {failed:?}");
        assert!(bench.stage.0.machines.lock().unwrap().is_empty(), "{fault:?}: a machine runs");
        assert!(bench.ipam.held().is_empty(), "{fault:?}: an address is held");
        assert_eq!(bench.leftovers(), Vec::<PathBuf>::new(), "{fault:?}");
    }
    bench.set(None);
    for _ in 0..3 {
        replicas.create(&bench.wish()).await.unwrap();
    }
    assert_eq!(replicas.count(), 3);
    replicas.end().await;
    assert!(bench.stage.0.machines.lock().unwrap().is_empty() && bench.ipam.held().is_empty());
    assert!(bench.dirs().list().unwrap().is_empty(), "nothing stays on the host");
}

#[tokio::test]
async fn what_does_not_end_keeps_its_setup_until_it_does() {
    let bench = Bench::new("10.1.0.0/16");
    let replicas = bench.replicas().await;
    let stuck = |stuck| bench.stage.0.stuck.store(stuck, Ordering::SeqCst);
    let machines = || bench.stage.0.machines.lock().unwrap().len();
    let replica = replicas.create(&bench.wish()).await.unwrap();
    stuck(true);
    assert!(matches!(replicas.release(&replica.id).await, Err(Refusal::Failed { .. })));
    assert_eq!((replicas.count(), machines(), bench.ipam.held().len()), (1, 1, 1));
    bench.set(Some(Fault::Lead));
    assert!(matches!(replicas.create(&bench.wish()).await, Err(Refusal::Failed { .. })));
    assert_eq!((replicas.count(), machines(), bench.ipam.held().len()), (2, 2, 2));
    bench.set(None);
    replicas.inner.release_orphans().await;
    assert_eq!(replicas.count(), 2, "it does not end yet");
    // Neither's setup nor address is another's.
    let other = replicas.create(&bench.wish()).await.unwrap();
    assert_eq!((replicas.count(), bench.dirs().list().unwrap().len()), (3, 3));
    assert_ne!(other.address, replica.address);
    assert_eq!(why(replicas.create(&bench.wish()).await), Reason::Replicas);

    stuck(false);
    replicas.inner.release_orphans().await;
    assert_eq!((replicas.count(), machines(), bench.ipam.held().len()), (2, 2, 2), "the one that nobody knows");
    replicas.release(&replica.id).await.unwrap();
    replica.ended.await;
    replicas.end().await;
    assert_eq!((replicas.count(), machines()), (0, 0));
    assert!(bench.ipam.held().is_empty() && bench.dirs().list().unwrap().is_empty());
}

#[tokio::test]
async fn the_next_process_goes_on_with_what_runs_and_cleans_up_the_rest() {
    let bench = Bench::new("10.1.0.0/16");
    let before = bench.replicas().await;
    before.inner.params.pool.fill(1).await.unwrap();
    let (kept, crashed) = (before.create(&bench.wish()).await.unwrap(), before.create(&bench.wish()).await.unwrap());
    let dir = bench.dirs().of(&VmId::new(crashed.id.as_str()).unwrap());
    bench.stage.0.machines.lock().unwrap().remove(dir.path());
    drop(before);

    let replicas = bench.replicas().await;
    let adopted = replicas.adopted();
    let seen: Vec<_> = adopted.iter().map(|replica| (replica.id.clone(), replica.address)).collect();
    assert_eq!(seen, [(kept.id.clone(), kept.address)]);
    assert!(replicas.adopted().is_empty(), "once");
    assert!(matches!(replicas.release(&crashed.id).await, Err(Refusal::NotAssigned)));
    assert!(!bench.ipam.held().iter().any(|(address, _)| *address == crashed.address));
    // It has its share: 64 of 256 MiB.
    let large = ReplicaWish { memory: 224 << 20, ..bench.wish() };
    assert_eq!(why(replicas.create(&large).await), Reason::Memory);
    replicas.release(&kept.id).await.unwrap();
    assert!(bench.stage.0.killed.load(Ordering::SeqCst));
    assert!(bench.leftovers().is_empty() && bench.ipam.held().is_empty());
}

#[tokio::test]
async fn the_address_of_a_released_replica_rests() {
    let bench = Bench::new("10.1.0.0/30");
    let rest = Duration::from_secs(3600);
    let ipam = Ipam::open(&bench.place.path().join("resting"), "10.1.0.0/29".parse().unwrap(), rest).unwrap();
    let bench = Bench { ipam: Arc::new(ipam), ..bench };
    let replicas = bench.replicas().await;
    replicas.inner.params.pool.fill(1).await.unwrap();
    let mut seen = Vec::new();
    // Of 8 addresses 5 are for replicas.
    for _ in 0..5 {
        let replica = replicas.create(&bench.wish()).await.unwrap();
        replicas.release(&replica.id).await.unwrap();
        assert!(!seen.contains(&replica.address), "{} has not rested", replica.address);
        seen.push(replica.address);
    }
    assert_eq!(why(replicas.create(&bench.wish()).await), Reason::Address);
}

#[tokio::test]
async fn one_that_cannot_be_taken_over_hides_no_other_and_keeps_its_directory() {
    let bench = Bench::new("10.1.0.0/16");
    let before = bench.replicas().await;
    let replica = before.create(&bench.wish()).await.unwrap();
    drop(before);
    bench.set(Some(Fault::Adopt));
    let replicas = bench.replicas().await;
    bench.set(None);
    assert!(replicas.adopted().is_empty());
    assert_eq!(bench.dirs().list().unwrap().len(), 1);
    replicas.create(&bench.wish()).await.unwrap();
    replicas.end().await;
    drop(replicas);
    assert_eq!(bench.replicas().await.adopted()[0].id, replica.id, "the next process does better");
}

#[tokio::test]
async fn consoles_are_kept_short() {
    let bench = Bench::new("10.1.0.0/16");
    let before = bench.replicas().await;
    let replica = before.create(&bench.wish()).await.unwrap();
    drop(before);
    let console = bench.dirs().of(&VmId::new(replica.id.as_str()).unwrap()).console();
    fs::write(&console, vec![b'x'; 2 << 20]).unwrap();
    let _replicas = bench.replicas().await;
    let shortened = async {
        while fs::metadata(&console).unwrap().len() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), shortened).await.expect("it is looked at");
}
