//! Promises about sandboxes.

use std::net::IpAddr;
use std::time::Duration;

use futures::future::join_all;
use lambdalet::runtime::Kind;
use lambdalet::runtime::stats::StatsScope;
use lambdalet::runtime::types::{
    ContainerId, ContainerState, Resources, SandboxConfig, SandboxId, SandboxNetwork, SandboxState,
};

use crate::bench::Bench;

pub(crate) async fn a_sandbox_that_runs_is_ready_and_says_whose_it_is(bench: &Bench) {
    let id = bench.sandbox("p").await;
    let status = bench.runtime.pod_sandbox_status(&id).await.unwrap();
    assert_eq!((status.state, status.address()), (SandboxState::Ready, Some(IpAddr::from([10, 99, 0, 7]))));
    assert_eq!((status.id, status.pod, status.attempt), (id, bench.pod("p"), 0));
    assert!(status.pid.is_some());
    let age = jiff::Timestamp::now().duration_since(status.created_at);
    assert!(age < jiff::SignedDuration::from_secs(60), "{age}");
    bench.runtime.ready().await.unwrap();
    assert!(!bench.runtime.version().await.unwrap().name.is_empty());
}

pub(crate) async fn running_a_ready_sandbox_again_returns_it(bench: &Bench) {
    let id = bench.sandbox("p").await;
    assert_eq!(bench.sandbox("p").await, id);
    assert_eq!(bench.runtime.list_pod_sandboxes(None).await.unwrap().len(), 1);
}

pub(crate) async fn a_stopped_sandbox_gives_way_to_a_new_one(bench: &Bench) {
    let id = bench.sandbox("p").await;
    bench.runtime.stop_pod_sandbox(&id).await.unwrap();
    assert_eq!(bench.runtime.pod_sandbox_status(&id).await.unwrap().state, SandboxState::NotReady);
    let next = bench.sandbox("p").await;
    assert_ne!(next, id);
    let listed = bench.runtime.list_pod_sandboxes(None).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].id, listed[0].state), (&next, SandboxState::Ready));
}

pub(crate) async fn each_attempt_is_a_sandbox_of_its_own(bench: &Bench) {
    let first = bench.sandbox("p").await;
    let config = SandboxConfig { attempt: 1, ..bench.sandbox_config("p") };
    let second = bench.runtime.run_pod_sandbox(&config).await.unwrap();
    assert_ne!(first, second);
    assert_eq!(bench.runtime.pod_sandbox_status(&second).await.unwrap().attempt, 1);
}

pub(crate) async fn stopping_a_sandbox_ends_what_runs_in_it_and_may_be_repeated(bench: &Bench) {
    let container = bench.started("c", bench.stubborn()).await;
    let id = bench.sandbox("p").await;
    for _ in 0..2 {
        bench.runtime.stop_pod_sandbox(&id).await.unwrap();
        let status = bench.runtime.container_status(&container).await.unwrap();
        assert_eq!((status.state, status.exit_code), (ContainerState::Exited, 137));
        let sandbox = bench.runtime.pod_sandbox_status(&id).await.unwrap();
        assert_eq!((sandbox.state, sandbox.pid), (SandboxState::NotReady, None));
    }
}

pub(crate) async fn removing_a_sandbox_takes_its_containers_along(bench: &Bench) {
    let running = bench.started("a", bench.stubborn()).await;
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "b", bench.idles());
    let created = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    for _ in 0..2 {
        bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    }
    for id in [running, created] {
        assert_eq!(bench.runtime.container_status(&id).await.unwrap_err().kind(), Kind::NotFound);
    }
    assert!(bench.runtime.list_pod_sandboxes(None).await.unwrap().is_empty());
    assert!(bench.runtime.list_containers(None).await.unwrap().is_empty());
}

pub(crate) async fn unknown_ids_may_be_stopped_and_removed_but_have_no_status(bench: &Bench) {
    let sandbox = SandboxId::from("f".repeat(64));
    bench.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert_eq!(bench.runtime.pod_sandbox_status(&sandbox).await.unwrap_err().kind(), Kind::NotFound);
    let container = ContainerId::from("f".repeat(64));
    bench.runtime.stop_container(&container, Duration::from_secs(1)).await.unwrap();
    bench.runtime.remove_container(&container).await.unwrap();
    assert_eq!(bench.runtime.container_status(&container).await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(bench.runtime.start_container(&container).await.unwrap_err().kind(), Kind::NotFound);
}

pub(crate) async fn a_list_can_be_narrowed_to_one_pod(bench: &Bench) {
    for pod in ["p", "q"] {
        let sandbox = bench.sandbox(pod).await;
        let config = bench.container_config(pod, "c", bench.idles());
        bench.runtime.create_container(&sandbox, &config).await.unwrap();
    }
    assert_eq!(bench.runtime.list_pod_sandboxes(None).await.unwrap().len(), 2);
    assert_eq!(bench.runtime.list_containers(None).await.unwrap().len(), 2);
    let sandboxes = bench.runtime.list_pod_sandboxes(Some("uid-q")).await.unwrap();
    assert_eq!(sandboxes.iter().map(|status| status.pod.clone()).collect::<Vec<_>>(), [bench.pod("q")]);
    let containers = bench.runtime.list_containers(Some("uid-q")).await.unwrap();
    assert_eq!(containers.iter().map(|status| status.pod.clone()).collect::<Vec<_>>(), [bench.pod("q")]);
    assert!(bench.runtime.list_containers(Some("uid-none")).await.unwrap().is_empty());
}

pub(crate) async fn a_sandbox_on_the_hosts_network_has_no_address(bench: &Bench) {
    let config = SandboxConfig { network: SandboxNetwork::Host, ..bench.sandbox_config("p") };
    if !bench.has_host_network {
        let error = bench.runtime.run_pod_sandbox(&config).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
        return;
    }
    let id = bench.runtime.run_pod_sandbox(&config).await.unwrap();
    let status = bench.runtime.pod_sandbox_status(&id).await.unwrap();
    assert_eq!((status.state, status.address()), (SandboxState::Ready, None));
    let container = bench.container_config("p", "c", bench.exits(0));
    let container = bench.runtime.create_container(&id, &container).await.unwrap();
    bench.runtime.start_container(&container).await.unwrap();
    assert_eq!(bench.exited(&container).await.exit_code, 0);
}

pub(crate) async fn a_run_that_was_dropped_can_be_repeated(bench: &Bench) {
    for milliseconds in [0, 2, 5, 10, 20, 40, 80] {
        let config = bench.sandbox_config(&format!("dropped-{milliseconds}"));
        let run = bench.runtime.run_pod_sandbox(&config);
        let _ = tokio::time::timeout(Duration::from_millis(milliseconds), run).await;
        let id = bench.runtime.run_pod_sandbox(&config).await.unwrap();
        let listed = bench.runtime.list_pod_sandboxes(Some(&config.pod.uid)).await.unwrap();
        let seen: Vec<_> = listed.iter().map(|status| (&status.id, status.state)).collect();
        assert_eq!(seen, [(&id, SandboxState::Ready)]);
    }
}

pub(crate) async fn many_sandboxes_can_be_run_at_once(bench: &Bench) {
    let configs: Vec<_> = (0..8).map(|number| bench.sandbox_config(&format!("many-{number}"))).collect();
    let made = join_all(configs.iter().map(|config| bench.runtime.run_pod_sandbox(config))).await;
    let made: Vec<SandboxId> = made.into_iter().map(Result::unwrap).collect();
    assert_eq!(bench.runtime.list_pod_sandboxes(None).await.unwrap().len(), made.len());
    let removed = join_all(made.iter().map(|id| bench.runtime.remove_pod_sandbox(id))).await;
    assert!(removed.iter().all(Result::is_ok));
}

pub(crate) async fn a_sandbox_is_given_other_limits_as_it_runs(bench: &Bench) {
    let id = bench.sandbox("p").await;
    bench.started("c", bench.idles()).await;
    for (quota, memory) in [(50_000, 300 << 20), (20_000, 200 << 20)] {
        let limits = Resources {
            cpu_quota: Some(quota),
            cpu_period: Some(100_000),
            memory_limit: Some(memory),
            ..Resources::default()
        };
        bench.runtime.update_pod_sandbox_resources(&id, &limits).await.unwrap();
        let stats = bench.runtime.list_pod_sandbox_stats(StatsScope::All).await.unwrap();
        let in_kernel = stats[0].usage.limits.unwrap();
        assert_eq!((in_kernel.cpu_quota, in_kernel.memory), (Some(quota as u64), Some(memory as u64)));
        let shares = in_kernel.cpu_shares.unwrap();
        assert!((100..=128).contains(&shares), "what is not named stays, but for rounding: {shares}");
    }
}
