//! Execs of a real engine: what becomes of their processes.

use std::time::{Duration, Instant};

use bollard::exec::{CreateExecOptions, StartExecOptions};
use futures::{FutureExt, StreamExt};
use lambdalet::runtime::Kind;
use lambdalet::runtime::session::{ExecRequest, Session};
use lambdalet::runtime::types::{ContainerId, SandboxConfig, SandboxNetwork};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::bench::{Bench, PATIENCE};
use crate::streams::{exec, finish, read_until, request, write};

/// Whether a process with these words runs in the container.
async fn runs(bench: &Bench, id: &ContainerId, words: &str) -> bool {
    let script = format!("busybox ps -o args | busybox grep -v grep | busybox grep -q '{words}'");
    finish(exec(bench, id, request(bench.script(&script))).await).await.2 == 0
}

async fn ends(bench: &Bench, id: &ContainerId, words: &str) {
    let begun = Instant::now();
    while runs(bench, id, words).await {
        // Each look is an exec too, on a machine that may be busy; the commands sleep for a quarter of an hour.
        assert!(begun.elapsed() < PATIENCE, "{words} still runs");
        sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn a_session_that_is_dropped_ends_its_process_and_children(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    for (tty, script) in [
        (false, "busybox sleep 1001 & echo ready; busybox sleep 1002"),
        (true, "busybox sleep 1001 & echo ready; busybox sleep 1002"),
        (false, "trap '' HUP; busybox sleep 1001 & echo ready; busybox sleep 1002; busybox sleep 1003"),
    ] {
        let mut session = exec(bench, &id, ExecRequest { tty, ..request(bench.script(script)) }).await;
        read_until(&mut session, "ready").await;
        assert!(runs(bench, &id, "sleep 100[123]").await);
        drop(session);
        ends(bench, &id, "sleep 100[123]").await;
    }
    assert!(runs(bench, &id, "sleep 0.05").await, "the container's own process was spared");
}

pub(crate) async fn a_process_that_left_the_session_on_purpose_is_spared(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let script = "busybox setsid sh -c 'echo ready; exec busybox sleep 1004' & busybox sleep 1005";
    let mut session = exec(bench, &id, request(bench.script(script))).await;
    read_until(&mut session, "ready").await;
    drop(session);
    ends(bench, &id, "sleep 1005").await;
    assert!(runs(bench, &id, "sleep 1004").await);
}

pub(crate) async fn an_exec_that_nobody_waits_for_leaves_nothing(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let request = request(bench.script("busybox sleep 1006"));
    for milliseconds in [0, 1, 3, 10, 30, 60] {
        // Dropped at some point between the first request and the session.
        let _ = timeout(Duration::from_millis(milliseconds), bench.runtime.exec(&id, &request)).await;
    }
    // Those dropped early may yet be started.
    sleep(Duration::from_secs(1)).await;
    ends(bench, &id, "sleep 1006").await;
}

/// To Docker a process that was killed differs from one that is still there by its open connection only, and a driver that
/// starts does not look at that.
pub(crate) async fn what_an_earlier_process_left_running_is_ended_and_no_exec_of_others(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    for (tty, script) in [
        (false, "busybox sleep 1011 & echo ready; busybox sleep 1012"),
        (true, "trap '' HUP; busybox sleep 1011 & echo ready; busybox sleep 1012; busybox sleep 1013"),
    ] {
        let docker = bench.docker.as_ref().unwrap();
        let options = CreateExecOptions {
            cmd: Some(vec!["/bin/busybox", "sleep", "1014"]),
            tty: Some(tty),
            detach_keys: Some("ctrl-p,ctrl-q"),
            ..CreateExecOptions::default()
        };
        let foreign = docker.create_exec(id.as_str(), options).await.unwrap().id;
        docker.start_exec(&foreign, Some(StartExecOptions { detach: true, ..Default::default() })).await.unwrap();
        let mut session = exec(bench, &id, ExecRequest { tty, ..request(bench.script(script)) }).await;
        read_until(&mut session, "ready").await;
        let _anew = bench.again().await;
        ends(bench, &id, "sleep 101[123]").await;
        assert!(runs(bench, &id, "sleep 1014").await, "somebody else's exec was spared");
        assert!(runs(bench, &id, "sleep 0.05").await, "the container's own process was spared");
    }
}

pub(crate) async fn an_exec_ends_although_its_child_holds_the_streams(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let begun = Instant::now();
    let session = exec(bench, &id, request(bench.script("busybox sleep 1007 & echo hi; exit 3"))).await;
    assert_eq!(finish(session).await, (b"hi\n".to_vec(), Vec::new(), 3));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(runs(bench, &id, "sleep 1007").await, "what was left in the background on purpose runs on");
}

pub(crate) async fn a_slow_reader_loses_nothing(bench: &Bench) {
    // The daemon takes the streams away two seconds after the end; this is enough to fill its own buffer before.
    let id = bench.started("c", bench.idles()).await;
    for tty in [false, true] {
        for length in [1_300_000, 1_400_000] {
            let command = bench.script(&format!("busybox dd if=/dev/zero bs={length} count=1 2>/dev/null"));
            let request = ExecRequest { tty, stdin: false, ..request(command) };
            let Session { mut output, mut exit, terminal, .. } = exec(bench, &id, request).await;
            let mut seen = 0;
            // As slow as the end allows.
            while (&mut exit).now_or_never().is_none() {
                let Some(piece) = timeout(PATIENCE, output.next()).await.unwrap() else {
                    // Its end may be seen before the code is known.
                    timeout(PATIENCE, &mut exit).await.unwrap().unwrap();
                    break;
                };
                seen += piece.unwrap().bytes.len();
                sleep(Duration::from_millis(2)).await;
            }
            sleep(Duration::from_millis(2500)).await;
            while let Some(piece) = output.next().await {
                seen += piece.unwrap().bytes.len();
            }
            assert_eq!(seen, length, "tty: {tty}");
            drop(terminal);
        }
    }
}

pub(crate) async fn nothing_is_read_ahead_of_a_client(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let mut session = exec(bench, &id, request(bench.script("busybox yes | busybox tee /count >/dev/stderr"))).await;
    let written = |size: &'static str| async move {
        let script = format!("[ $(busybox stat -c %s /count) -lt {size} ]");
        finish(exec(bench, &id_of(bench).await, request(bench.script(&script))).await).await.2 == 0
    };
    assert!(session.output.next().await.is_some());
    sleep(Duration::from_millis(500)).await;
    assert!(written("8000000").await, "the process was not held up");
}

async fn id_of(bench: &Bench) -> ContainerId {
    bench.runtime.list_containers(None).await.unwrap().remove(0).id
}

pub(crate) async fn a_terminals_bytes_arrive_as_they_are(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    // Each looks like the beginning of a frame to a client that guesses.
    for bytes in ["\\001hello world", "\\001\\000\\000\\000\\000\\000\\000\\005hello", "\\002\\000"] {
        let command = bench.script(&format!("busybox printf '{bytes}'"));
        let (out, ..) = finish(exec(bench, &id, ExecRequest { tty: true, ..request(command) }).await).await;
        let plain = bench.script(&format!("busybox printf '{bytes}'"));
        assert_eq!(out, finish(exec(bench, &id, request(plain)).await).await.0);
    }
    // And no key is kept for something else: Control-P and Control-Q let go of a container by default.
    let command = bench.script("busybox stty raw -echo; echo ready; busybox head -c 6 | busybox od -An -tx1");
    let mut session = exec(bench, &id, ExecRequest { tty: true, ..request(command) }).await;
    read_until(&mut session, "ready").await;
    for key in [b"\x10", b"\x11", b"\x10", b"\x1e", b"\x00", b"\x03"] {
        write(&mut session, key).await;
        sleep(Duration::from_millis(20)).await;
    }
    let seen = read_until(&mut session, "03").await;
    assert!(seen.contains("10 11 10 1e 00 03"), "{seen}");
}

pub(crate) async fn a_process_that_stops_reading_is_told_to_the_writer(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let mut session = exec(bench, &id, request(bench.script("busybox head -c 1 >/dev/null; exit 2"))).await;
    let mut stdin = session.stdin.take().unwrap();
    let writing = timeout(PATIENCE, async { while stdin.write_all(&[0; 65536]).await.is_ok() {} });
    let (writing, (.., code)) = futures::join!(writing, finish(session));
    writing.expect("a write fails once the process is gone");
    assert_eq!(code, 2);
}

pub(crate) async fn a_port_of_the_other_loopback_address_is_reached(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let pid = bench.runtime.pod_sandbox_status(&sandbox).await.unwrap().pid.unwrap();
    bench.listen(pid, "[::1]:8082".parse().unwrap());
    let mut connection = bench.runtime.port_forward(&sandbox, 8082).await.unwrap();
    connection.write_all(b"six").await.unwrap();
    let mut seen = [0; 3];
    connection.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"six");
}

pub(crate) async fn a_port_of_the_hosts_network_is_reached(bench: &Bench) {
    let config = SandboxConfig { network: SandboxNetwork::Host, ..bench.sandbox_config("p") };
    let sandbox = bench.runtime.run_pod_sandbox(&config).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (connection, accepted) = futures::join!(bench.runtime.port_forward(&sandbox, port), listener.accept());
    drop(connection.unwrap());
    accepted.unwrap();
    let error = bench.runtime.port_forward(&bench.sandbox("q").await, port).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Invalid, "not from a sandbox of its own: {error}");
}

/// Not run by itself: `LAMBDALET_TEST_DOCKER=1 cargo test --test runtime_contract gigabyte -- --ignored --nocapture`.
pub(crate) async fn a_gigabyte_goes_through_an_exec_both_ways(bench: &Bench) {
    const SIZE: usize = 1 << 30;
    let id = bench.started("c", bench.idles()).await;
    let mut session = exec(bench, &id, request(bench.script("exec cat"))).await;
    let mut stdin = session.stdin.take().unwrap();
    let begun = Instant::now();
    let pattern: Vec<u8> = (0..(251 * 1024)).map(|at| (at % 251) as u8).collect();
    let writing = async {
        let mut left = SIZE;
        while left > 0 {
            let piece = &pattern[..left.min(pattern.len())];
            stdin.write_all(piece).await.unwrap();
            left -= piece.len();
        }
        stdin.shutdown().await.unwrap();
    };
    let reading = async {
        let mut seen = 0;
        while let Some(piece) = session.output.next().await {
            let bytes = piece.unwrap().bytes;
            let (start, bytes) = (seen % 251, bytes.as_ref());
            assert!(bytes == &pattern[start..start + bytes.len()], "differs after {seen}");
            seen += bytes.len();
        }
        assert_eq!(seen, SIZE);
    };
    futures::join!(writing, reading);
    assert_eq!(session.exit.await.unwrap(), 0);
    let megabytes = SIZE as f64 / 1e6 / begun.elapsed().as_secs_f64();
    println!("1 GiB in and out: {:?}, {megabytes:.0} MB/s each way", begun.elapsed());
}
