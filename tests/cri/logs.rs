//! What our server promises of logs besides.

use std::fs;

use lambdalet::runtime::types::LogSource;
use lambdalet_proto::cri::v1;

use crate::support::World;

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
