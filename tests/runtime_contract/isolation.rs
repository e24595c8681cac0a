//! What a workload that means harm can do to its own guest, to others and to the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use lambdalet::runtime::stats::StatsScope;
use lambdalet::runtime::types::{ContainerId, ContainerState, Resources, SandboxId, SandboxState};

use crate::bench::{Bench, PATIENCE, SCRATCH};
use crate::machines::{says, sh, vmm};

/// Idles in a machine of its own, to see whether others notice.
async fn neighbour(bench: &Bench) -> ContainerId {
    let sandbox = bench.sandbox("n").await;
    let config = bench.container_config("n", "idle", bench.idles());
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    id
}

/// A figure of the cgroup that a VMM is in; `None` where cgroups are not of version 1.
fn of_cgroup(pid: i32, tree: &str, file: &str) -> Option<u64> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let of_tree = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|name| name == tree).then(|| path.to_owned())
    };
    let path = cgroups.lines().find_map(of_tree)?;
    Some(fs::read_to_string(format!("/sys/fs/cgroup/{tree}{path}/{file}")).unwrap().trim().parse().unwrap())
}

/// That a machine which was misused does its work again.
async fn works(bench: &Bench, sandbox: &SandboxId) {
    assert_eq!(bench.runtime.pod_sandbox_status(sandbox).await.unwrap().state, SandboxState::Ready);
    let after = bench.started("after", bench.script("echo well")).await;
    assert_eq!(bench.exited(&after).await.exit_code, 0);
    says(bench, &after, "well").await;
}

/// Of a guest its own cgroups are believed, beside others the host's decide.
pub(crate) async fn a_machine_has_the_weight_of_its_pod(bench: &mut Bench) {
    let sandbox = bench.sandbox("p").await;
    let pid = vmm(bench, &sandbox).await;
    let Some(shares) = of_cgroup(pid, "cpu", "../cpu.shares") else {
        println!("skipped: cgroups are not of version 1");
        return;
    };
    assert_eq!(shares, 128);
    let limits = Resources { cpu_shares: Some(512), ..Resources::default() };
    bench.runtime.update_pod_sandbox_resources(&sandbox, &limits).await.unwrap();
    assert_eq!(of_cgroup(pid, "cpu", "../cpu.shares"), Some(512));
}

pub(crate) async fn a_fork_bomb_stays_in_its_guest(bench: &mut Bench) {
    let neighbour = neighbour(bench).await;
    let script = "echo lit; bomb() { bomb & bomb & wait; }; bomb 2>/dev/null";
    let bomb = bench.started("bomb", bench.script(script)).await;
    let sandbox = bench.sandbox("p").await;
    says(bench, &bomb, "lit").await;
    // Until there are many, or it has ended itself.
    let (begun, mut most) = (Instant::now(), 0);
    while most < 300 && bench.runtime.container_status(&bomb).await.unwrap().state == ContainerState::Running {
        assert!(begun.elapsed() < PATIENCE, "it has {most} processes only");
        let stats = bench.runtime.list_pod_sandbox_stats(StatsScope::All).await.unwrap();
        let of_pod = stats.iter().find(|stats| stats.id == sandbox).and_then(|stats| stats.usage.tasks);
        most = most.max(of_pod.unwrap_or_default());
    }
    let tasks = of_cgroup(vmm(bench, &sandbox).await, "pids", "pids.current").unwrap_or_default();
    assert!(tasks <= 256, "{tasks} tasks on the host");
    let begun = Instant::now();
    assert_eq!(sh(bench, &neighbour, "echo calm").await, ("calm\n".to_owned(), 0));
    println!("{most} tasks in the guest, {tasks} on the host; its neighbour answers after {:?}", begun.elapsed());
    let begun = Instant::now();
    bench.runtime.stop_container(&bomb, Duration::ZERO).await.unwrap();
    println!("stopped after {:?}", begun.elapsed());
    assert_eq!(bench.runtime.container_status(&bomb).await.unwrap().state, ContainerState::Exited);
    works(bench, &sandbox).await;
}

pub(crate) async fn a_memory_bomb_ends_its_container_alone(bench: &mut Bench) {
    let sandbox = bench.sandbox("p").await;
    let idle = bench.started("idle", bench.idles()).await;
    // More than its Pod may have: the guest has that, and a little more.
    let bomb = bench.container_config("p", "bomb", vec!["/bin/tail".into(), "/dev/zero".into()]);
    let bomb = bench.runtime.create_container(&sandbox, &bomb).await.unwrap();
    bench.runtime.start_container(&bomb).await.unwrap();
    let status = bench.exited(&bomb).await;
    assert_eq!((status.exit_code, status.oom_killed), (137, true));
    assert_eq!(sh(bench, &idle, "echo calm").await, ("calm\n".to_owned(), 0));
    let (pid, tree) = (vmm(bench, &sandbox).await, "memory");
    let used = of_cgroup(pid, tree, "memory.max_usage_in_bytes");
    let limit = of_cgroup(pid, tree, "memory.limit_in_bytes");
    println!("the VMM took {:?} MiB of {:?}", used.map(|used| used >> 20), limit.map(|limit| limit >> 20));
    assert!(used <= limit, "{used:?} of {limit:?}");
    works(bench, &sandbox).await;
}

pub(crate) async fn a_full_disk_is_its_guests_own(bench: &mut Bench) {
    let sandbox = bench.sandbox("p").await;
    let idle = bench.started("idle", bench.idles()).await;
    // Told by a file in memory, since a log may find no place.
    let script = "busybox dd if=/dev/zero of=/big bs=1M 2>/dev/null; : >/dev/shm/full; while :; do sleep 1; done";
    let fills = bench.started("fills", bench.script(script)).await;
    let begun = Instant::now();
    while sh(bench, &fills, "test -e /dev/shm/full").await.1 != 0 {
        assert!(begun.elapsed() < PATIENCE, "it is not full yet");
    }
    let entries = fs::read_dir(bench.root().join("vms/default")).unwrap().flatten();
    let taken: u64 = entries.map(|entry| fs::metadata(entry.path().join("vmm/scratch")).unwrap().blocks() * 512).sum();
    println!("{} MiB of the host's disk are taken", taken >> 20);
    assert!(taken > SCRATCH / 2 && taken <= SCRATCH + (1 << 20), "{taken}");
    assert_eq!(sh(bench, &idle, "echo calm").await, ("calm\n".to_owned(), 0));
    bench.runtime.stop_container(&fills, Duration::ZERO).await.unwrap();
    bench.runtime.remove_container(&fills).await.unwrap();
    works(bench, &sandbox).await;
}
