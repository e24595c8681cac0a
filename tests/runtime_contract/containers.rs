//! Promises about containers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::join;
use lambdalet::runtime::Kind;
use lambdalet::runtime::stats::StatsScope;
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, ImageId, Resources, SandboxConfig, SandboxId,
};
use tokio::time::timeout;

use crate::bench::Bench;
use crate::machines::says;

pub(crate) async fn a_container_is_created_then_runs_then_has_exited(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", bench.idles());
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.started_at, status.finished_at), (ContainerState::Created, None, None));
    assert_eq!((&status.id, &status.sandbox, &status.pod), (&id, &sandbox, &bench.pod("p")));
    assert_eq!((status.name.as_str(), status.attempt, status.pid), ("c", 0, None));

    bench.runtime.start_container(&id).await.unwrap();
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.finished_at), (ContainerState::Running, None));
    assert!(status.started_at >= Some(status.created_at) && status.pid.is_some());

    bench.runtime.stop_container(&id, Duration::from_secs(30)).await.unwrap();
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.pid, status.oom_killed), (ContainerState::Exited, None, false));
    assert!(status.finished_at >= status.started_at);
}

pub(crate) async fn creating_the_same_attempt_again_returns_it(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", bench.idles());
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    assert_eq!(bench.runtime.create_container(&sandbox, &config).await.unwrap(), id);
    let next = ContainerConfig { attempt: 1, ..config.clone() };
    assert_ne!(bench.runtime.create_container(&sandbox, &next).await.unwrap(), id);
    assert_eq!(bench.runtime.list_containers(None).await.unwrap().len(), 2);

    let other = SandboxConfig { attempt: 1, ..bench.sandbox_config("p") };
    let other = bench.runtime.run_pod_sandbox(&other).await.unwrap();
    let error = bench.runtime.create_container(&other, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "it is in the first sandbox");
}

pub(crate) async fn a_container_needs_a_sandbox_that_is_there_and_ready(bench: &Bench) {
    let config = bench.container_config("p", "c", bench.idles());
    let nowhere = SandboxId::from("f".repeat(64));
    let error = bench.runtime.create_container(&nowhere, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    let sandbox = bench.sandbox("p").await;
    bench.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    let error = bench.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(bench.runtime.list_containers(None).await.unwrap().is_empty());
}

pub(crate) async fn a_container_needs_an_image_that_is_there(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let image = ImageId::from(format!("sha256:{}", "0".repeat(64)));
    let config = ContainerConfig { image, ..bench.container_config("p", "c", bench.idles()) };
    let error = bench.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

pub(crate) async fn starting_a_running_container_is_fine_and_an_exited_one_is_not(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    bench.runtime.start_container(&id).await.unwrap();
    bench.runtime.stop_container(&id, Duration::from_secs(30)).await.unwrap();
    assert_eq!(bench.runtime.start_container(&id).await.unwrap_err().kind(), Kind::Invalid);
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Exited);
}

pub(crate) async fn a_start_that_nobody_waits_for_does_not_fail_the_container(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    for (attempt, milliseconds) in (0..).zip([0, 2, 5, 10, 20, 40, 80]) {
        let config = ContainerConfig { attempt, ..bench.container_config("p", "c", bench.idles()) };
        let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
        let _ = timeout(Duration::from_millis(milliseconds), bench.runtime.start_container(&id)).await;
        let listed = bench.runtime.list_containers(Some(&bench.pod("p").uid)).await.unwrap();
        let state = listed.iter().find(|one| one.id == id).map(|one| one.state);
        assert!(
            matches!(state, Some(ContainerState::Created | ContainerState::Running)),
            "{milliseconds} ms: {state:?}"
        );
        bench.runtime.start_container(&id).await.unwrap();
        assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
    }
}

pub(crate) async fn a_container_that_joined_the_processes_of_another_ends_with_it(bench: &Bench) {
    let target = bench.started("target", bench.idles()).await;
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "debugger", bench.stubborn());
    let config = ContainerConfig { pid_target: Some(target.clone()), ..config };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
    bench.runtime.stop_container(&target, Duration::from_secs(30)).await.unwrap();
    assert_eq!(bench.exited(&id).await.exit_code, 137);
}

pub(crate) async fn a_target_must_be_there_and_run(bench: &Bench) {
    let target = bench.started("target", bench.idles()).await;
    let sandbox = bench.sandbox("p").await;
    let joining = |target: &ContainerId| ContainerConfig {
        pid_target: Some(target.clone()),
        ..bench.container_config("p", "debugger", bench.idles())
    };
    bench.runtime.stop_container(&target, Duration::from_secs(30)).await.unwrap();
    let ended = bench.runtime.create_container(&sandbox, &joining(&target)).await.unwrap_err();
    assert_eq!(ended.kind(), Kind::Invalid);
    assert!(ended.to_string().contains("target container target does not run"), "{ended}");
    let nobody = ContainerId::from("f".repeat(64));
    let absent = bench.runtime.create_container(&sandbox, &joining(&nobody)).await.unwrap_err();
    assert_eq!(absent.kind(), Kind::NotFound, "{absent}");
    // One of another Pod is none of its business.
    let elsewhere = bench.sandbox("q").await;
    let config = bench.container_config("q", "c", bench.idles());
    let other = bench.runtime.create_container(&elsewhere, &config).await.unwrap();
    bench.runtime.start_container(&other).await.unwrap();
    let foreign = bench.runtime.create_container(&sandbox, &joining(&other)).await.unwrap_err();
    assert_eq!(foreign.kind(), Kind::NotFound, "{foreign}");
    assert_eq!(bench.runtime.list_containers(Some("uid-p")).await.unwrap().len(), 1, "nothing was made");
}

async fn fails_to_start(bench: &Bench, command: Vec<String>, code: i32) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", command);
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    let error = bench.runtime.start_container(&id).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.exit_code), (ContainerState::Exited, code));
    assert!(!status.message.is_empty());
    assert!(error.to_string().contains(&status.message), "{error} lacks {}", status.message);
    assert!(status.started_at.is_none() && status.finished_at.is_some());
    assert_eq!(bench.runtime.start_container(&id).await.unwrap_err().kind(), Kind::Invalid, "again");
}

pub(crate) async fn a_command_that_does_not_exist_exits_with_127_and_says_so(bench: &Bench) {
    fails_to_start(bench, bench.missing(), 127).await;
}

pub(crate) async fn a_command_that_may_not_run_exits_with_128_and_says_so(bench: &Bench) {
    fails_to_start(bench, bench.refused(), 128).await;
}

pub(crate) async fn the_exit_code_is_the_process_own(bench: &Bench) {
    for code in [0, 3, 255] {
        let id = bench.started(&format!("c{code}"), bench.exits(code)).await;
        let status = bench.exited(&id).await;
        assert_eq!((status.exit_code, status.oom_killed, status.message.as_str()), (code, false, ""));
    }
}

pub(crate) async fn a_stop_lets_the_process_end_by_itself(bench: &Bench) {
    let id = bench.started("c", bench.listens()).await;
    says(bench, &id, "ready").await;
    let begun = Instant::now();
    bench.runtime.stop_container(&id, Duration::from_secs(30)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.exit_code), (ContainerState::Exited, 143));
}

pub(crate) async fn a_process_that_ignores_the_signal_is_killed_after_the_grace(bench: &Bench) {
    let deaf = bench.says("stubborn|print|ready|idle", "trap '' TERM; echo ready; while :; do sleep 1; done");
    let id = bench.started("c", deaf).await;
    says(bench, &id, "ready").await;
    let begun = Instant::now();
    bench.runtime.stop_container(&id, Duration::from_millis(600)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(600), "{:?}", begun.elapsed());
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.exit_code), (ContainerState::Exited, 137));
}

pub(crate) async fn no_grace_kills_at_once(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    bench.runtime.stop_container(&id, Duration::ZERO).await.unwrap();
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().exit_code, 137);
}

pub(crate) async fn stopping_what_does_not_run_is_fine(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "created", bench.idles());
    let created = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.stop_container(&created, Duration::from_secs(5)).await.unwrap();
    assert_eq!(bench.runtime.container_status(&created).await.unwrap().state, ContainerState::Created);
    let exited = bench.started("exited", bench.exits(4)).await;
    bench.exited(&exited).await;
    bench.runtime.stop_container(&exited, Duration::from_secs(5)).await.unwrap();
    assert_eq!(bench.runtime.container_status(&exited).await.unwrap().exit_code, 4);
}

pub(crate) async fn a_running_container_can_be_removed_and_is_gone(bench: &Bench) {
    let id = bench.started("c", bench.stubborn()).await;
    for _ in 0..2 {
        bench.runtime.remove_container(&id).await.unwrap();
        assert_eq!(bench.runtime.container_status(&id).await.unwrap_err().kind(), Kind::NotFound);
    }
    assert!(bench.runtime.list_containers(None).await.unwrap().is_empty());
}

pub(crate) async fn two_removals_at_once_both_succeed(bench: &Bench) {
    let id: ContainerId = bench.started("c", bench.stubborn()).await;
    let (one, other) = join!(bench.runtime.remove_container(&id), bench.runtime.remove_container(&id));
    one.unwrap();
    other.unwrap();
    assert_eq!(bench.runtime.container_status(&id).await.unwrap_err().kind(), Kind::NotFound);
}

pub(crate) async fn what_the_caller_wrote_on_a_container_reads_back(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let annotations =
        BTreeMap::from([("hash".to_owned(), "1a2b".to_owned()), ("odd/key".to_owned(), "ä \"=\n".to_owned())]);
    let config = ContainerConfig {
        attempt: 7,
        image_ref: "what the user wrote".into(),
        annotations: annotations.clone(),
        ..bench.container_config("p", "c", bench.idles())
    };
    bench.runtime.create_container(&sandbox, &config).await.unwrap();
    let listed = bench.runtime.list_containers(Some("uid-p")).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].attempt, listed[0].image_ref.as_str()), (7, "what the user wrote"));
    assert_eq!((&listed[0].annotations, &listed[0].image), (&annotations, &bench.image));
}

pub(crate) async fn a_container_is_given_other_limits_as_it_runs(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let limits = Resources {
        cpu_shares: Some(128),
        cpu_quota: Some(20_000),
        cpu_period: Some(100_000),
        memory_limit: Some(32 << 20),
        ..Resources::default()
    };
    let config = ContainerConfig { resources: limits.clone(), ..bench.container_config("p", "c", bench.idles()) };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    let before = bench.runtime.container_status(&id).await.unwrap();
    let told = |status: &ContainerStatus| {
        let told = status.resources.clone().unwrap();
        (told.cpu_shares, told.cpu_quota, told.memory_limit)
    };
    assert_eq!(told(&before), (Some(128), Some(20_000), Some(32 << 20)));
    // Up, and one of them down again.
    for (shares, quota, memory) in [(256, 50_000, 64 << 20), (512, 50_000, 48 << 20)] {
        let more = Resources {
            cpu_shares: Some(shares),
            cpu_quota: Some(quota),
            memory_limit: Some(memory),
            oom_score_adj: Some(-998),
            ..limits.clone()
        };
        bench.runtime.update_container_resources(&id, &more).await.unwrap();
        let after = bench.runtime.container_status(&id).await.unwrap();
        assert_eq!(told(&after), (Some(shares), Some(quota), Some(memory)));
        assert_eq!(
            (after.state, after.pid, after.started_at),
            (ContainerState::Running, before.pid, before.started_at)
        );
        let stats = bench.runtime.list_pod_sandbox_stats(StatsScope::All).await.unwrap();
        let in_kernel = stats[0].containers[0].usage.limits.unwrap();
        assert_eq!((in_kernel.cpu_quota, in_kernel.memory), (Some(quota as u64), Some(memory as u64)));
    }
    // What is not named stays.
    let memory = Resources { memory_limit: Some(40 << 20), ..Resources::default() };
    bench.runtime.update_container_resources(&id, &memory).await.unwrap();
    let after = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!(told(&after), (Some(512), Some(50_000), Some(40 << 20)));
}

pub(crate) async fn what_has_exited_or_never_was_is_given_no_limits(bench: &Bench) {
    let limits = Resources { cpu_shares: Some(128), ..Resources::default() };
    let id = bench.started("c", bench.exits(0)).await;
    bench.exited(&id).await;
    let error = bench.runtime.update_container_resources(&id, &limits).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    for id in ["nobody", bench.sandbox("p").await.as_str()] {
        let error = bench.runtime.update_container_resources(&id.into(), &limits).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
    }
    let error = bench.runtime.update_pod_sandbox_resources(&"nothing".into(), &limits).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
}
