//! What our server promises of logs besides.

use std::fs;
use std::time::Duration;

use lambdalet::runtime::SandboxRuntime;
use lambdalet::runtime::fake::Hold;
use lambdalet::runtime::types::{ContainerState, LogSource};
use lambdalet::runtime::verb::Verb;
use lambdalet_proto::cri::v1;
use tokio::time::timeout;

use crate::support::{PATIENCE, World, refused};

/// Longer than an answer takes that waits for nothing, and shorter than a log is waited for.
const AT_ONCE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn times_have_nine_digits() {
    let mut world = World::inside().await;
    let id = world.started("a", "print out exit 0").await;
    let text = fs::read_to_string(world.ended(&id).await.log_path).unwrap();
    assert_eq!(text.split(' ').next().map(str::len), Some("2026-11-21T07:15:43.359877326Z".len()), "{text}");
}

#[tokio::test]
async fn a_restart_loses_no_line_and_writes_none_twice() {
    let mut world = World::inside().await;
    let id = world.started("a", "print one sleep 60000").await;
    let source = LogSource::Stdout;
    world.lines("main.log", 1).await;
    let mut world = world.restarted().await;
    world.fake().append_log(&id.as_str().into(), source, b"two\n");
    // The first call finds what runs.
    world.status(&id).await.unwrap();
    assert_eq!(world.lines("main.log", 2).await, ["stdout F one", "stdout F two"]);
    // And again, right after the file was moved away.
    fs::rename(world.logs().join("main.log"), world.logs().join("main.log.1")).unwrap();
    world.reopen(&id).await.unwrap();
    let mut world = world.restarted().await;
    world.fake().append_log(&id.as_str().into(), source, b"three\n");
    world.status(&id).await.unwrap();
    assert_eq!(world.lines("main.log", 1).await, ["stdout F three"]);
}

#[tokio::test]
async fn a_removed_sandbox_leaves_the_logs_of_what_ran_in_it() {
    let mut world = World::inside().await;
    world.started("a", "print last sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(world.lines("main.log", 1).await, ["stdout F last"]);
}

/// A container that has written a line, of which nothing is in its file as long as the log is held.
async fn unread(world: &mut World) -> (String, Hold) {
    let hold = world.fake().hang_next(Verb::Logs);
    let id = world.started("a", "sleep 60000").await;
    world.fake().append_log(&id.as_str().into(), LogSource::Stdout, b"last\n");
    (id, hold)
}

#[tokio::test]
async fn a_sandbox_that_was_stopped_and_is_removed_leaves_the_last_line_too() {
    let mut world = World::inside().await;
    let (_, hold) = unread(&mut world).await;
    let pod_sandbox_id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.stop_sandbox(&pod_sandbox_id).await.unwrap();
    let mut client = world.runtime.clone();
    let removal = v1::RemovePodSandboxRequest { pod_sandbox_id };
    let mut removal = tokio::spawn(async move { client.remove_pod_sandbox(removal).await.map(drop) });
    assert!(timeout(AT_ONCE, &mut removal).await.is_err(), "it waits for what is not read yet");
    drop(hold);
    timeout(PATIENCE, removal).await.expect("it ends").unwrap().unwrap();
    assert_eq!(world.lines("main.log", 1).await, ["stdout F last"]);
}

#[tokio::test]
async fn who_sees_an_end_in_the_status_of_a_sandbox_finds_the_whole_log() {
    let mut world = World::inside().await;
    let (id, hold) = unread(&mut world).await;
    let pod_sandbox_id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.fake().exit_container(&id.as_str().into(), 0);
    let mut client = world.runtime.clone();
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id, verbose: false };
    let mut status = tokio::spawn(async move { client.pod_sandbox_status(request).await });
    assert!(timeout(AT_ONCE, &mut status).await.is_err(), "it waits for what is not read yet");
    drop(hold);
    let status = timeout(PATIENCE, status).await.expect("it comes").unwrap().unwrap().into_inner();
    assert_eq!(status.containers_statuses[0].state(), v1::ContainerState::ContainerExited);
    let text = fs::read_to_string(world.logs().join("main.log")).unwrap();
    assert!(text.ends_with("stdout F last\n"), "{text}");
}

#[tokio::test]
async fn who_sees_an_end_before_the_start_is_answered_finds_the_whole_log() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "print last exit 0").await.unwrap();
    let hold = world.fake().answer_next_start_late();
    let mut client = world.runtime.clone();
    let request = v1::StartContainerRequest { container_id: id.clone() };
    let started = tokio::spawn(async move { client.start_container(request).await });
    let runtime: &dyn SandboxRuntime = world.fake();
    while runtime.container_status(&id.as_str().into()).await.unwrap().state != ContainerState::Exited {
        tokio::task::yield_now().await;
    }
    let mut client = world.runtime.clone();
    let request = v1::ContainerStatusRequest { container_id: id, verbose: false };
    let mut status = tokio::spawn(async move { client.container_status(request).await });
    assert!(timeout(AT_ONCE, &mut status).await.is_err(), "it waits for what is not read yet");
    drop(hold);
    timeout(PATIENCE, status).await.expect("it comes").unwrap().unwrap();
    let text = fs::read_to_string(world.logs().join("main.log")).unwrap();
    assert!(text.ends_with("stdout F last\n"), "{text}");
    started.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_log_that_ends_before_its_last_line_is_there_is_read_again() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "print last exit 0").await.unwrap();
    world.fake().cut_next_log();
    world.start(&id).await.unwrap();
    let text = fs::read_to_string(world.ended(&id).await.log_path).unwrap();
    assert!(text.ends_with("stdout F last\n"), "{text}");
}

#[tokio::test]
async fn who_is_told_of_an_end_finds_the_whole_log() {
    let mut world = World::inside().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    let (id, hold) = unread(&mut world).await;
    world.fake().exit_container(&id.as_str().into(), 0);
    let log = world.logs().join("main.log");
    let mut stopped = tokio::spawn(async move {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.container_event_type() == v1::ContainerEventType::ContainerStoppedEvent {
                return fs::read_to_string(&log).unwrap();
            }
        }
    });
    assert!(timeout(AT_ONCE, &mut stopped).await.is_err(), "it waits for what is not read yet");
    drop(hold);
    let text = timeout(PATIENCE, stopped).await.expect("it is told").unwrap();
    assert!(text.ends_with("stdout F last\n"), "{text}");
}

#[tokio::test]
async fn a_log_that_cannot_be_read_holds_nobody_up_for_long() {
    let mut world = World::inside().await;
    let (id, _hold) = unread(&mut world).await;
    world.fake().exit_container(&id.as_str().into(), 3);
    let status = timeout(PATIENCE, world.status(&id)).await.expect("it comes").unwrap();
    assert_eq!(status.exit_code, 3);
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    timeout(PATIENCE, world.remove_sandbox(&sandbox)).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn a_start_that_is_repeated_leaves_the_log_alone() {
    let mut world = World::inside().await;
    let id = world.started("a", "print one sleep 60000").await;
    world.lines("main.log", 1).await;
    // As if half of a line were written just now.
    let log = world.logs().join("main.log");
    let whole = fs::read_to_string(&log).unwrap();
    let half = format!("{whole}{}", &whole[..whole.len() / 2]);
    fs::write(&log, &half).unwrap();
    world.start(&id).await.unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), half);
    // Nor has it a file made anew that has ended.
    world.stop(&id, 5).await.unwrap();
    world.ended(&id).await;
    fs::remove_file(&log).unwrap();
    refused(world.start(&id).await);
    assert!(!log.exists(), "a refusal makes no file");
}
