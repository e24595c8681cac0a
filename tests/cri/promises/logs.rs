//! What is promised of the files that containers' logs are in.

use std::fs;

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{World, refused};

#[tokio::test]
async fn a_log_is_in_cri_format_where_the_config_says() {
    let mut world = World::new().await;
    let id = world.started("a", "print out warn err exit 0").await;
    let status = world.ended(&id).await;
    assert_eq!(status.log_path, world.logs().join("main.log").display().to_string());
    world.lines("main.log", 2).await;
    let text = fs::read_to_string(&status.log_path).unwrap();
    let mut lines: Vec<Vec<&str>> = text.lines().map(|line| line.splitn(4, ' ').collect()).collect();
    assert!(lines.iter().all(|line| line[0].parse::<jiff::Timestamp>().is_ok()), "{text}");
    // Two streams have no order.
    lines.sort_by_key(|line| line[1]);
    assert_eq!(lines.iter().map(|line| line[1..].join(" ")).collect::<Vec<_>>(), ["stderr F err", "stdout F out"]);
}

#[tokio::test]
async fn who_sees_a_container_ended_finds_its_whole_log() {
    let mut world = World::new().await;
    let id = world.started("a", "print one print two print three exit 0").await;
    let status = world.ended(&id).await;
    assert_eq!(fs::read_to_string(&status.log_path).unwrap().lines().count(), 3);
}

#[tokio::test]
async fn a_log_is_reopened_where_it_was_moved_away() {
    let mut world = World::new().await;
    let id = world.started("a", "print one sleep 60000").await;
    assert_eq!(world.lines("main.log", 1).await, ["stdout F one"]);
    fs::rename(world.logs().join("main.log"), world.logs().join("main.log.1")).unwrap();
    world.reopen(&id).await.unwrap();
    assert_eq!(fs::read_to_string(world.logs().join("main.log")).unwrap(), "");
    assert_eq!(world.lines("main.log.1", 1).await, ["stdout F one"]);
}

#[tokio::test]
async fn what_is_written_after_it_was_reopened_is_in_the_new_file() {
    let mut world = World::new().await;
    let id = world.started("a", "print one sleep 1500 print later sleep 60000").await;
    world.lines("main.log", 1).await;
    fs::rename(world.logs().join("main.log"), world.logs().join("main.log.1")).unwrap();
    world.reopen(&id).await.unwrap();
    assert_eq!(world.lines("main.log", 1).await, ["stdout F later"]);
    assert_eq!(world.lines("main.log.1", 1).await, ["stdout F one"]);
}

#[tokio::test]
async fn a_log_of_what_does_not_run_is_not_reopened() {
    let mut world = World::new().await;
    let id = world.started("a", "exit 0").await;
    let log = world.ended(&id).await.log_path;
    fs::remove_file(&log).unwrap();
    refused(world.reopen(&id).await);
    assert!(!std::path::Path::new(&log).exists(), "an error makes no file");
    assert_eq!(refused(world.reopen("never-was").await), Code::NotFound);
}

/// A kubelet takes such a line for a container's message, and must not find more in it than was written.
#[tokio::test]
async fn a_last_line_without_a_newline_is_none_that_has_one() {
    let mut world = World::new().await;
    if world.is_in_memory() {
        return println!("skipped: the runtime in memory writes whole lines");
    }
    let sandbox = world.sandbox("a").await;
    let command = ["printf", "one\\nlast"].map(str::to_owned).to_vec();
    let config = v1::ContainerConfig { command, ..world.container("main", "exit 0") };
    let id = world.create_from(&sandbox, config).await.unwrap();
    world.start(&id).await.unwrap();
    world.ended(&id).await;
    assert_eq!(world.lines("main.log", 2).await, ["stdout F one", "stdout P last"]);
}

#[tokio::test]
async fn a_removed_container_leaves_its_log() {
    let mut world = World::new().await;
    let id = world.started("a", "print last sleep 60000").await;
    world.lines("main.log", 1).await;
    world.remove(&id).await.unwrap();
    assert_eq!(world.lines("main.log", 1).await, ["stdout F last"]);
}
