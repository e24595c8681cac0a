//! Clients and nodes that are killed: what they had started does not stay behind.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::{PROTOCOLS, background, forward, kubectl};
use crate::harness::node::Options;
use crate::harness::pods::sleeper;
use crate::harness::wait::{SOON, poll};
use crate::harness::{DEBIAN, on_own_node, on_shared_node};

/// What a client had running is gone this long after the client: a second of the node's own (the tests of its API), and what
/// a busy API server needs to see and tell it.
const PROMISE: Duration = Duration::from_secs(5);

/// Says when a connection to port 8080 comes and when it is closed, one after the other.
const WITNESS: &str = r#"use IO::Socket::INET; $| = 1;
my $listener = IO::Socket::INET->new(Listen => 9, LocalPort => 8080, ReuseAddr => 1) or die $!;
print "up\n";
for (my $number = 0; my $client = $listener->accept; $number++) {
  print "begun $number\n";
  1 while sysread $client, my $bytes, 65536;
  print "ended $number\n";
}"#;

/// Whether a process with these words, one after the other, runs anywhere on this host.
fn runs_on_host(words: [&str; 2]) -> bool {
    let wanted: Vec<u8> = words.iter().flat_map(|word| word.bytes().chain([0])).collect();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path().join("cmdline")));
    processes.filter_map(|path| std::fs::read(path).ok()).any(|line| line == wanted)
}

/// Why a process with these words is not gone.
fn gone(words: [&str; 2]) -> Result<(), String> {
    if runs_on_host(words) { Err(format!("{words:?} still runs")) } else { Ok(()) }
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_client_that_is_killed_takes_its_command_along() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            for input in [&["exec", "p"][..], &["exec", "-i", "p"]] {
                let number = rand::random_range(100_000_000..1_000_000_000_u32).to_string();
                let script = format!("echo up; exec sleep {number}");
                let mut command = kubectl(t, websockets, &[input, &["--", "sh", "-c", &script]].concat());
                // Held open until kubectl is dead: it is not the end of its input that ends the command.
                command.stdin(Stdio::piped());
                let (mut child, _lines, _up) = background(command).await;
                let runs = async || gone(["sleep", &number]).err().ok_or_else(|| "not begun".to_owned());
                poll("running", SOON, runs).await;
                child.kill().await.unwrap();
                let what = format!("free of what {input:?} started over {protocol}");
                poll(&what, PROMISE, async || gone(["sleep", &number])).await;
            }
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_client_that_is_killed_takes_its_forwarded_connections_along() {
    on_shared_node(async |t| {
        let main = json!({"name": "main", "image": DEBIAN, "command": ["perl", "-e", WITNESS]});
        t.pod("p", json!({"containers": [main]})).await;
        t.log_with("p", "main", "up").await;
        for (number, (protocol, websockets)) in PROTOCOLS.into_iter().enumerate() {
            let (mut child, _lines, port) = forward(t, websockets, "p", 8080).await;
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            t.log_with("p", "main", &format!("begun {number}")).await;
            child.kill().await.unwrap();
            poll(&format!("closed in the Pod, over {protocol}"), PROMISE, async || {
                let log = t.log("p", "main").await;
                if log.contains(&format!("ended {number}")) { Ok(()) } else { Err(log) }
            })
            .await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn no_command_outlives_the_node_that_ran_it() {
    on_own_node("execs", Options::default(), async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        // The second one is deaf to a hang-up.
        for (number, deaf) in [("192837465", ""), ("192837466", "trap '' HUP; ")] {
            let script = format!("{deaf}echo up; exec sleep {number}");
            let start = || background(kubectl(t, "true", &["exec", "-i", "p", "--", "sh", "-c", &script]));
            // The shell that says so becomes the sleep a moment later.
            let runs = async || gone(["sleep", number]).err().ok_or_else(|| "not begun".to_owned());
            let (_child, _lines, _up) = start().await;
            poll("running", SOON, runs).await;
            t.node.stop(Duration::from_secs(15)).await;
            assert!(!runs_on_host(["sleep", number]), "a node that was told to end ends what clients had started");
            t.node.spawn(&[]);
            t.node.adopted(&t.client).await;
            t.log_with("p", "main", "up").await;

            let (_child, _lines, _up) = start().await;
            poll("running", SOON, runs).await;
            t.node.kill9();
            assert!(runs_on_host(["sleep", number]), "nobody was there to end it");
            t.node.spawn(&[]);
            t.node.adopted(&t.client).await;
            poll("free of the command", Duration::from_secs(5), async || gone(["sleep", number])).await;
            t.log_with("p", "main", "up").await;
        }
    });
}
