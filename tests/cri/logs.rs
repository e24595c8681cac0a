//! What is promised of the files that containers' logs are in.

use std::fs;

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::support::{PATIENCE, World, refused};

async fn reopen(world: &mut World, id: &str) -> Result<(), tonic::Status> {
    let request = v1::ReopenContainerLogRequest { container_id: id.into() };
    world.runtime.reopen_container_log(request).await.map(|_| ())
}

/// The log's lines without their times, once there are as many as wanted.
async fn lines(world: &World, file: &str, wanted: usize) -> Vec<String> {
    let path = world.logs().join(file);
    let read = async {
        loop {
            let text = fs::read_to_string(&path).unwrap_or_default();
            if text.ends_with('\n') && text.lines().count() >= wanted {
                return text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect();
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("the lines come")
}

#[tokio::test]
async fn who_sees_a_container_ended_finds_its_whole_log_in_cri_format() {
    let mut world = World::new().await;
    let id = world.started("a", "print out warn err exit 0").await;
    let status = world.ended(&id).await;
    let text = fs::read_to_string(&status.log_path).unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.splitn(4, ' ').collect()).collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!((&lines[0][1..], &lines[1][1..]), (&["stdout", "F", "out"][..], &["stderr", "F", "err"][..]));
    for line in lines {
        assert!(line[0].parse::<jiff::Timestamp>().is_ok() && line[0].len() == 30, "{line:?}");
    }
    assert_eq!(status.log_path, world.logs().join("main.log").display().to_string());
}

#[tokio::test]
async fn a_log_is_reopened_where_it_was_moved_away() {
    let mut world = World::new().await;
    let id = world.started("a", "print one sleep 60000").await;
    assert_eq!(lines(&world, "main.log", 1).await, ["stdout F one"]);
    fs::rename(world.logs().join("main.log"), world.logs().join("main.log.1")).unwrap();
    reopen(&mut world, &id).await.unwrap();
    assert_eq!(fs::read_to_string(world.logs().join("main.log")).unwrap(), "");
    world.fake.append_log(&id.as_str().into(), lambdalet::runtime::types::LogSource::Stdout, b"later\n");
    assert_eq!(lines(&world, "main.log", 1).await, ["stdout F later"]);
    assert_eq!(lines(&world, "main.log.1", 1).await, ["stdout F one"]);
}

#[tokio::test]
async fn a_log_of_what_does_not_run_is_not_reopened() {
    let mut world = World::new().await;
    let id = world.started("a", "exit 0").await;
    let log = world.ended(&id).await.log_path;
    fs::remove_file(&log).unwrap();
    assert_eq!(refused(reopen(&mut world, &id).await), Code::FailedPrecondition);
    assert!(!std::path::Path::new(&log).exists(), "an error makes no file");
    assert_eq!(refused(reopen(&mut world, "never-was").await), Code::NotFound);
}

#[tokio::test]
async fn a_restart_loses_no_line_and_writes_none_twice() {
    let mut world = World::new().await;
    let id = world.started("a", "print one sleep 60000").await;
    let source = lambdalet::runtime::types::LogSource::Stdout;
    lines(&world, "main.log", 1).await;
    let mut world = world.restarted().await;
    world.fake.append_log(&id.as_str().into(), source, b"two\n");
    // The first call finds what runs.
    world.status(&id).await.unwrap();
    assert_eq!(lines(&world, "main.log", 2).await, ["stdout F one", "stdout F two"]);
    // And again, right after the file was moved away.
    fs::rename(world.logs().join("main.log"), world.logs().join("main.log.1")).unwrap();
    reopen(&mut world, &id).await.unwrap();
    let mut world = world.restarted().await;
    world.fake.append_log(&id.as_str().into(), source, b"three\n");
    world.status(&id).await.unwrap();
    assert_eq!(lines(&world, "main.log", 1).await, ["stdout F three"]);
}

#[tokio::test]
async fn a_removed_container_leaves_its_log() {
    let mut world = World::new().await;
    let id = world.started("a", "print last sleep 60000").await;
    world.runtime.remove_container(v1::RemoveContainerRequest { container_id: id }).await.unwrap();
    assert_eq!(lines(&world, "main.log", 1).await, ["stdout F last"]);
}
