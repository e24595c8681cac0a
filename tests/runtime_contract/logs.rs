//! Promises about logs.

use std::time::Duration;

use futures::StreamExt;
use lambdalet::runtime::Kind;
use lambdalet::runtime::types::{ContainerId, LogOptions, LogSource};

use crate::bench::{Bench, text};

fn tail(lines: u64) -> LogOptions {
    LogOptions { tail: Some(lines), ..LogOptions::default() }
}

pub(crate) async fn binary_bytes_arrive_as_they_were_written(bench: &Bench) {
    let mut bytes: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
    bytes.push(b'\n');
    bytes.extend(b"\xff\xfe\x00 not UTF-8\n\n\r\n");
    let id = bench.wrote("binary", &bytes).await;
    if bench.drops_carriage_returns {
        assert!(bytes.ends_with(b"\r\n"));
        bytes.truncate(bytes.len() - 2);
        bytes.push(b'\n');
    }
    assert_eq!(text(&bench.log(&id, LogOptions::default()).await), bytes);
}

/// A line of 40,000 bytes, one of exactly one record with its newline, one of exactly one without, a short one.
fn long_lines() -> [Vec<u8>; 4] {
    let line = |letter: u8, length: usize| {
        let mut line = vec![letter; length];
        line.push(b'\n');
        line
    };
    [line(b'a', 40_000), line(b'b', 16_383), line(b'c', 16_384), line(b'd', 3)]
}

pub(crate) async fn a_long_line_arrives_whole_in_parts(bench: &Bench) {
    let id = bench.wrote("long", &long_lines().concat()).await;
    let chunks = bench.log(&id, LogOptions::default()).await;
    assert_eq!(text(&chunks), long_lines().concat());
    let starts: Vec<u8> = chunks.iter().filter(|chunk| chunk.line_start).map(|chunk| chunk.bytes[0]).collect();
    assert_eq!(starts, b"abcd");
}

pub(crate) async fn the_last_line_needs_no_newline(bench: &Bench) {
    let id = bench.wrote("prompt", b"first\nprompt> ").await;
    assert_eq!(text(&bench.log(&id, LogOptions::default()).await), b"first\nprompt> ");
    assert_eq!(text(&bench.log(&id, tail(1)).await), b"prompt> ");
}

pub(crate) async fn a_tail_counts_lines_and_not_records(bench: &Bench) {
    let lines = long_lines();
    let id = bench.wrote("tail", &lines.concat()).await;
    for wanted in 1..=5 {
        let expected = lines[lines.len().saturating_sub(wanted)..].concat();
        let seen = bench.log(&id, tail(wanted as u64)).await;
        assert!(text(&seen) == expected, "tail of {wanted}: {} bytes, not {}", text(&seen).len(), expected.len());
        assert!(seen[0].line_start);
    }
}

pub(crate) async fn a_tail_of_nothing_is_nothing(bench: &Bench) {
    let id = bench.wrote("some", b"one\ntwo\n").await;
    assert!(bench.log(&id, tail(0)).await.is_empty());
    assert!(bench.log(&id, LogOptions { follow: true, ..tail(0) }).await.is_empty());
}

pub(crate) async fn both_streams_are_told_apart(bench: &Bench) {
    let id = bench.started("speaks", bench.speaks()).await;
    bench.exited(&id).await;
    let seen: Vec<_> = bench
        .log(&id, LogOptions::default())
        .await
        .into_iter()
        .map(|chunk| (chunk.source, String::from_utf8_lossy(&chunk.bytes).into_owned()))
        .collect();
    let expected = [(LogSource::Stdout, "one\n"), (LogSource::Stderr, "two\n"), (LogSource::Stdout, "three\n")]
        .map(|(source, line)| (source, line.to_owned()));
    assert_eq!(seen, expected);
    assert_eq!(text(&bench.log(&id, tail(2)).await), b"two\nthree\n");
    assert_eq!(text(&bench.log(&id, tail(1)).await), b"three\n");
}

pub(crate) async fn since_is_exact_below_the_second(bench: &Bench) {
    let id = bench.started("speaks", bench.speaks()).await;
    bench.exited(&id).await;
    let all = bench.log(&id, LogOptions::default()).await;
    assert_eq!(all.len(), 3);
    for (at, chunk) in all.iter().enumerate() {
        let since = LogOptions { since: Some(chunk.time), ..LogOptions::default() };
        assert_eq!(bench.log(&id, since).await, all[at..]);
        let after = chunk.time + jiff::SignedDuration::from_nanos(1);
        let since = LogOptions { since: Some(after), ..LogOptions::default() };
        assert_eq!(bench.log(&id, since.clone()).await, all[at + 1..]);
        let both = LogOptions { tail: Some(2), ..since };
        assert_eq!(bench.log(&id, both).await, all[(at + 1).max(1)..], "with a tail of two");
    }
}

pub(crate) async fn following_ends_when_the_container_has_exited(bench: &Bench) {
    let id = bench.started("speaks", bench.speaks()).await;
    let follow = LogOptions { follow: true, ..LogOptions::default() };
    assert_eq!(text(&bench.log(&id, follow.clone()).await), b"one\ntwo\nthree\n");
    bench.exited(&id).await;
    assert_eq!(text(&bench.log(&id, follow).await), b"one\ntwo\nthree\n", "after the exit");
}

pub(crate) async fn following_from_a_tail_misses_nothing(bench: &Bench) {
    let id = bench.started("speaks", bench.speaks()).await;
    // Until the first line is there.
    let first = LogOptions { follow: true, ..LogOptions::default() };
    let mut stream = bench.runtime.logs(&id, &first).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().bytes.as_ref(), b"one\n");
    let follow = LogOptions { follow: true, ..tail(1) };
    let seen = tokio::time::timeout(Duration::from_secs(30), bench.log(&id, follow)).await.unwrap();
    let seen = String::from_utf8(text(&seen)).unwrap();
    assert!("one\ntwo\nthree\n".ends_with(&seen) && seen.ends_with("three\n"), "{seen:?}");
}

pub(crate) async fn a_container_that_never_started_has_an_empty_log(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", bench.missing());
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    assert!(bench.log(&id, LogOptions::default()).await.is_empty());
    bench.runtime.start_container(&id).await.unwrap_err();
    assert!(bench.log(&id, LogOptions { follow: true, ..tail(5) }).await.is_empty());
}

pub(crate) async fn an_unknown_container_has_no_log(bench: &Bench) {
    let id = ContainerId::from("f".repeat(64));
    let error = bench.runtime.logs(&id, &LogOptions::default()).await.err().unwrap();
    assert_eq!(error.kind(), Kind::NotFound);
    let removed = bench.wrote("some", b"one\n").await;
    bench.runtime.remove_container(&removed).await.unwrap();
    assert!(bench.runtime.logs(&removed, &LogOptions::default()).await.is_err());
}
