//! A real machine from the real pool, on a real bridge: with the little guest of `hack/tiny-guest`, in a network of its own.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::*;
use crate::network::bridge::Bridge;
use crate::runtime::microvm::machine::pin::Hold;
use crate::runtime::microvm::machine::qemu::{AccelChoice, Qemu};

/// Under TCG on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the test on a thread with a network of its own, as if that were a host.
fn on_a_host(test: impl Future<Output = ()> + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    };
    std::thread::spawn(run).join().unwrap();
}

/// What is needed, or why there are no machines here.
fn guest() -> Option<PathBuf> {
    let Some(guest) = std::env::var_os("LAMBDALET_TEST_TINY_GUEST").map(PathBuf::from) else {
        println!("skipped: LAMBDALET_TEST_TINY_GUEST names no guest (hack/tiny-guest makes one)");
        return None;
    };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: a VMM is jailed by root");
        return None;
    }
    Some(guest)
}

/// One line asked, one answered.
async fn ask(guest: &mut BufReader<Pin<Box<dyn Duplex>>>, request: &str) -> String {
    if !request.is_empty() {
        guest.write_all(format!("{request}\n").as_bytes()).await.unwrap();
    }
    let mut line = String::new();
    tokio::time::timeout(PATIENCE, guest.read_line(&mut line)).await.expect("the guest answers").unwrap();
    line.trim().to_owned()
}

/// What the host shows of a VMM: where it may run, and nothing of what its guest's kernel is told.
fn seen_from_the_host(pid: i32, held: &Hold) {
    let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(arguments.contains("-kernel") && !arguments.contains("A=1"), "{arguments}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(line("Cpus_allowed_list:"), held.cpus.as_ref().unwrap()[0].to_string());
    assert_eq!(line("Mems_allowed_list:"), held.numa_node.unwrap().to_string());
}

#[test]
fn a_real_replica_runs_on_its_image_and_gives_all_of_it_back() {
    let Some(guest) = guest() else { return };
    on_a_host(async move {
        let bench = Bench::new("10.79.0.0/24");
        let (gateway, range) = (bench.ipam.gateway(), "10.79.0.0/24".parse().unwrap());
        let taps = Arc::new(Bridge::ensure("lbfs", gateway, range).await.unwrap());
        let (user, dirs) = (VmmUser::default(), bench.dirs());
        fs::write(bench.asset("image"), format!("{:<512}", "a function")).unwrap();
        let setups = HostSetups::new(dirs.clone(), taps.clone(), user, TapUse::Handed);
        let manager = Qemu::new("/usr/bin/qemu-system-x86_64".into(), user, AccelChoice::default());
        let cgroup_parent = format!("lambdalet-test-{}", VmId::random());
        let params = PooledParams {
            pool: SetupPool::new(setups, 1),
            dirs,
            manager: Arc::new(manager),
            taps: taps.clone(),
            ipam: Arc::clone(&bench.ipam),
            assets: AssetDirs::new(vec![bench.place.path().join("assets"), guest.clone()]),
            services: Services::default(),
            cgroup_parent: cgroup_parent.clone(),
            pins: Pins::of_host(),
            most: 1,
            memory: 256 << 20,
        };
        let replicas = PooledReplicas::open(params).await.unwrap();
        replicas.inner.params.pool.fill(1).await.unwrap();
        let wish = ReplicaWish {
            kernel: guest.join("vmlinux"),
            initrd: guest.join("initramfs.cpio"),
            cpus: 1,
            memory: 128 << 20,
            ..bench.wish()
        };
        let turns = Pins::of_host();
        for round in 0..2 {
            let replica = replicas.create(&wish).await.unwrap();
            let id = VmId::new(replica.id.as_str()).unwrap();
            let machine = Arc::clone(&locked(&replicas.inner.running)[&id].machine);
            let mut line = BufReader::new(machine.agent().await.unwrap());
            assert!(ask(&mut line, "").await.starts_with("READY"), "round {round}");
            seen_from_the_host(machine.pid(), &turns.next(1).unwrap());
            assert_eq!(ask(&mut line, "size image0").await, "1");
            assert_eq!(ask(&mut line, "read image0 10").await, "a function");
            let told = ask(&mut line, "sh cat /proc/cmdline").await;
            assert!(
                told.contains(&format!("quiet --env=A=1 --env=OS=linux --env=VMID={id} ip={}::", replica.address)),
                "{told}"
            );
            assert_eq!(ask(&mut line, "write scratch mine").await, "ok", "of the replica before nothing is left");
            drop((line, machine));
            replicas.release(&replica.id).await.unwrap();
            replica.ended.await;
            assert!(bench.leftovers().is_empty());
        }
        drop(replicas);
        assert_eq!(taps.remove_other_taps(&[]).await.unwrap(), 1, "that of the idle setup");
        for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(tree.path().join(&cgroup_parent));
        }
    });
}
