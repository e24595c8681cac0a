//! Promises about statistics.

use std::time::{Duration, Instant};

use lambdalet::runtime::stats::{SandboxStats, StatsScope};
use lambdalet::runtime::types::{ContainerConfig, LogOptions, Resources, SandboxConfig, SandboxNetwork};

use crate::bench::{Bench, PATIENCE};

async fn stats(bench: &Bench, scope: StatsScope) -> Vec<SandboxStats> {
    bench.runtime.list_pod_sandbox_stats(scope).await.unwrap()
}

pub(crate) async fn what_runs_is_told_with_what_it_uses(bench: &Bench) {
    assert!(stats(bench, StatsScope::All).await.is_empty());
    let id = bench.started("c", bench.idles()).await;
    let exited = bench.started("exited", bench.exits(0)).await;
    bench.exited(&exited).await;
    let status = bench.runtime.container_status(&id).await.unwrap();
    for scope in [StatsScope::CpuAndMemory, StatsScope::Usage, StatsScope::All] {
        let all = stats(bench, scope).await;
        assert_eq!(all.len(), 1);
        let (sandbox, more) = (&all[0], scope > StatsScope::CpuAndMemory);
        assert_eq!((&sandbox.id, &sandbox.pod), (&status.sandbox, &bench.pod("p")));
        assert_eq!((sandbox.network.is_some(), sandbox.usage.tasks.is_some()), (more, more));
        assert_eq!(sandbox.containers.len(), 1, "what has exited uses nothing");
        let container = &sandbox.containers[0];
        assert_eq!((&container.id, container.name.as_str(), container.attempt), (&id, "c", 0));
        assert_eq!((container.started_at, &container.image_ref), (status.started_at, &bench.image_ref));
        for usage in [sandbox.usage, container.usage] {
            assert!(usage.cpu.unwrap().total > 0 && usage.memory.unwrap().usage > 0, "{usage:?}");
            assert!(usage.memory.unwrap().working_set <= usage.memory.unwrap().usage);
        }
        assert!(container.cgroup.starts_with(&sandbox.cgroup) && container.cgroup != sandbox.cgroup);
    }
    let containers = stats(bench, StatsScope::Containers).await.remove(0).containers;
    let used = containers.iter().all(|one| one.usage.cpu.unwrap().total > 0 && one.usage.memory.unwrap().usage > 0);
    assert!(used && containers.iter().map(|one| &one.id).eq([&id]), "{containers:?}");
    bench.runtime.stop_pod_sandbox(&status.sandbox).await.unwrap();
    assert!(stats(bench, StatsScope::All).await.is_empty());
}

pub(crate) async fn statistics_follow_what_comes_and_goes(bench: &Bench) {
    let one = bench.started("one", bench.idles()).await;
    let names = async || {
        let all = stats(bench, StatsScope::CpuAndMemory).await;
        let mut names: Vec<_> = all.iter().flat_map(|pod| &pod.containers).map(|c| c.name.clone()).collect();
        names.sort();
        (all.len(), names.join(" "))
    };
    assert_eq!(names().await, (1, "one".to_owned()));
    bench.started("two", bench.idles()).await;
    assert_eq!(names().await, (1, "one two".to_owned()));
    bench.runtime.stop_container(&one, Duration::ZERO).await.unwrap();
    assert_eq!(names().await, (1, "two".to_owned()));
    if !bench.has_host_network {
        return;
    }
    let host = SandboxConfig { network: SandboxNetwork::Host, ..bench.sandbox_config("q") };
    let host = bench.runtime.run_pod_sandbox(&host).await.unwrap();
    assert_eq!(names().await, (2, "two".to_owned()));
    let all = stats(bench, StatsScope::All).await;
    assert!(all.iter().find(|sandbox| sandbox.id == host).unwrap().network.is_none());
    bench.runtime.remove_pod_sandbox(&bench.sandbox("p").await).await.unwrap();
    assert_eq!(names().await, (1, String::new()));
}

pub(crate) async fn the_kernels_figures_are_told(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let resources = Resources {
        cpu_shares: Some(64),
        cpu_quota: Some(10_000),
        cpu_period: Some(100_000),
        memory_limit: Some(64 << 20),
        ..Resources::default()
    };
    let script = "busybox dd if=/dev/zero of=/written bs=1M count=3 2>/dev/null; echo said; \
                  echo end; exec busybox sha256sum /dev/zero";
    let config = ContainerConfig { resources, ..bench.container_config("p", "c", bench.script(script)) };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    let begun = Instant::now();
    while bench.log(&id, LogOptions::default()).await.len() < 2 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The first question begins the walk.
    let container = loop {
        let container = stats(bench, StatsScope::All).await[0].containers[0].clone();
        let cpu = container.usage.cpu.as_ref();
        let throttled = cpu.is_some_and(|cpu| cpu.total > 100_000_000 && cpu.throttled_periods > 0);
        if container.writable_layer.is_some() && container.log.is_some() && throttled {
            break container;
        }
        assert!(begun.elapsed() < PATIENCE, "{container:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let (layer, log) = (container.writable_layer.unwrap(), container.log.unwrap());
    assert!((3 << 20..4 << 20).contains(&layer.bytes) && layer.inodes >= 1, "{layer:?}");
    assert!(log.bytes > 0 && log.inodes >= 1, "{log:?}");
    let limits = container.usage.limits.unwrap();
    assert_eq!((limits.cpu_quota, limits.cpu_period, limits.memory), (Some(10_000), Some(100_000), Some(64 << 20)));
    assert!(container.usage.tasks.unwrap() >= 1);
    let brief = stats(bench, StatsScope::Usage).await[0].containers[0].clone();
    assert_eq!(brief.usage.limits.and_then(|limits| limits.memory), Some(64 << 20));
    let again = bench.again().await.list_pod_sandbox_stats(StatsScope::CpuAndMemory).await.unwrap();
    assert_eq!(again[0].containers[0].id, id, "after a restart of the process too");
}
