//! Promises about exec, attach and port-forward.

use std::time::{Duration, Instant};

use futures::future::join_all;
use futures::{StreamExt, join};
use lambdalet::runtime::Kind;
use lambdalet::runtime::session::{AttachRequest, ExecRequest, Session, TerminalSize};
use lambdalet::runtime::types::{ContainerConfig, ContainerId, ContainerState, LogSource, SandboxId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::bench::{Bench, PATIENCE};

/// All streams, no terminal.
pub(crate) fn request(command: Vec<String>) -> ExecRequest {
    ExecRequest { command, tty: false, stdin: true, stdout: true, stderr: true }
}

pub(crate) async fn exec(bench: &Bench, id: &ContainerId, request: ExecRequest) -> Session {
    bench.runtime.exec(id, &request).await.unwrap()
}

/// Standard output, standard error, and the code, once all of them have ended.
pub(crate) async fn finish(session: Session) -> (Vec<u8>, Vec<u8>, i32) {
    let Session { stdin, mut output, terminal, exit } = session;
    drop(stdin);
    let reading = async {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(piece) = output.next().await {
            let piece = piece.unwrap();
            assert!(!piece.bytes.is_empty());
            if piece.source == LogSource::Stdout { &mut out } else { &mut err }.extend_from_slice(&piece.bytes);
        }
        (out, err)
    };
    let ((out, err), code) = timeout(PATIENCE, async { join!(reading, exit) }).await.expect("it ends");
    drop(terminal);
    (out, err, code.unwrap())
}

/// Reads standard output until it has so much.
pub(crate) async fn read_until(session: &mut Session, wanted: &str) -> String {
    let mut seen = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&seen).into_owned();
        if text.contains(wanted) {
            return text;
        }
        let piece = timeout(PATIENCE, session.output.next()).await.expect("it writes");
        seen.extend_from_slice(&piece.unwrap_or_else(|| panic!("{wanted} is not in {text}")).unwrap().bytes);
    }
}

pub(crate) async fn write(session: &mut Session, bytes: &[u8]) {
    session.stdin.as_mut().unwrap().write_all(bytes).await.unwrap();
    session.stdin.as_mut().unwrap().flush().await.unwrap();
}

pub(crate) async fn an_exec_tells_both_streams_apart_and_its_code(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let command = bench.says("print|one|warn|two|exit|3", "echo one; echo two >&2; exit 3");
    let (out, err, code) = finish(exec(bench, &id, request(command)).await).await;
    assert_eq!((out, err, code), (b"one\n".to_vec(), b"two\n".to_vec(), 3));
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
}

pub(crate) async fn what_is_written_to_an_exec_comes_back_to_the_last_byte(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let mut session = exec(bench, &id, request(bench.says("copy|exit|0", "exec cat"))).await;
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|at| (at % 251) as u8).collect();
    let mut stdin = session.stdin.take().unwrap();
    let writing = async {
        stdin.write_all(&bytes).await.unwrap();
        stdin.shutdown().await.unwrap();
    };
    let ((), (out, err, code)) = join!(writing, finish(session));
    assert!(out == bytes, "{} bytes came back", out.len());
    assert_eq!((err.len(), code), (0, 0));
}

pub(crate) async fn an_exec_delivers_only_what_was_asked_for(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let command = bench.says("print|one|warn|two|exit|3", "echo one; echo two >&2; exit 3");
    for (stdout, stderr) in [(true, false), (false, true), (false, false)] {
        let request = ExecRequest { stdout, stderr, stdin: false, ..request(command.clone()) };
        let session = exec(bench, &id, request).await;
        assert!(session.stdin.is_none());
        let (out, err, code) = finish(session).await;
        assert_eq!((out.is_empty(), err.is_empty(), code), (!stdout, !stderr, 3));
    }
}

pub(crate) async fn an_exec_without_stdin_reads_its_end(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let request = ExecRequest { stdin: false, ..request(bench.says("copy|exit|0", "exec cat")) };
    assert_eq!(finish(exec(bench, &id, request).await).await, (Vec::new(), Vec::new(), 0));
}

pub(crate) async fn what_cannot_be_executed_is_invalid_and_says_why(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    for (command, words) in [(bench.missing(), "o such file|not found"), (bench.refused(), "permission denied")] {
        for tty in [false, true] {
            let request = ExecRequest { tty, ..request(command.clone()) };
            let error = bench.runtime.exec(&id, &request).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{error}");
            assert!(words.split('|').any(|words| error.to_string().contains(words)), "{error} lacks {words}");
        }
    }
}

pub(crate) async fn streams_need_a_container_that_runs(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let created = bench.container_config("p", "created", bench.idles());
    let created = bench.runtime.create_container(&sandbox, &created).await.unwrap();
    let exited = bench.started("exited", bench.exits(0)).await;
    bench.exited(&exited).await;
    let unknown = ContainerId::from("f".repeat(64));
    let attach = AttachRequest { stdout: true, ..AttachRequest::default() };
    for (id, kind) in [(created, Kind::Invalid), (exited, Kind::Invalid), (unknown, Kind::NotFound)] {
        let error = bench.runtime.exec(&id, &request(bench.exits(0))).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let error = bench.runtime.attach(&id, &attach).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let error = bench.runtime.pause_container(&id).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let error = bench.runtime.unpause_container(&id).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

pub(crate) async fn a_terminal_has_the_size_it_was_given(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    // With CRI a size and what is typed take streams of their own, and the second may be quicker.
    let script = "read x; for try in $(seq 100); do [ \"$(busybox stty size)\" = '33 99' ] && break; sleep 0.05; done; \
                  busybox stty size; echo end >&2; exit 5";
    let command = bench.says("line|size|warn|end|exit|5", script);
    let mut session = exec(bench, &id, ExecRequest { tty: true, ..request(command) }).await;
    session.terminal.resize(TerminalSize { width: 99, height: 33 }).await.unwrap();
    session.terminal.resize(TerminalSize { width: 0, height: 0 }).await.unwrap();
    write(&mut session, b"go\n").await;
    let Session { stdin, output, terminal, exit } = session;
    let (out, err, code) = finish(Session { stdin: None, output, terminal, exit }).await;
    drop(stdin);
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("33 99") && out.contains("end"), "{out:?}");
    assert_eq!((err.len(), code), (0, 5), "all is standard output");
}

pub(crate) async fn the_end_of_input_reaches_a_process_at_a_terminal(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    for typed in ["whole\n", "half"] {
        let command = bench.says("copy|exit|4", "echo ready; cat; exit 4");
        let mut session = exec(bench, &id, ExecRequest { tty: true, ..request(command) }).await;
        if !bench.is_fake() {
            read_until(&mut session, "ready").await;
        }
        write(&mut session, typed.as_bytes()).await;
        session.stdin.as_mut().unwrap().shutdown().await.unwrap();
        session.terminal.resize(TerminalSize { width: 80, height: 24 }).await.unwrap();
        let (out, _, code) = finish(session).await;
        assert!(String::from_utf8_lossy(&out).contains(typed.trim()), "{out:?}");
        assert_eq!(code, 4);
    }
}

pub(crate) async fn an_exit_code_does_not_wait_for_its_output_to_be_read(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let session = exec(bench, &id, request(bench.says("print|late|exit|2", "echo late; exit 2"))).await;
    let Session { exit, output, terminal, .. } = session;
    assert_eq!(timeout(PATIENCE, exit).await.expect("it ends").unwrap(), 2);
    terminal.resize(TerminalSize { width: 80, height: 24 }).await.unwrap();
    let late: Vec<_> = output.map(|piece| piece.unwrap().bytes).collect().await;
    assert_eq!(late.concat(), b"late\n");
}

pub(crate) async fn a_process_may_run_on_after_it_closed_its_streams(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let command = bench.says("print|one|close|sleep|400|exit|6", "echo one; exec >&- 2>&-; busybox sleep 0.4; exit 6");
    let begun = Instant::now();
    let (out, _, code) = finish(exec(bench, &id, request(command)).await).await;
    assert_eq!((out.as_slice(), code), (b"one\n".as_slice(), 6));
    assert!(begun.elapsed() >= Duration::from_millis(400));
}

pub(crate) async fn a_removed_container_ends_its_execs(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let session = exec(bench, &id, request(bench.idles())).await;
    let (ended, removed) = join!(finish(session), bench.runtime.remove_container(&id));
    removed.unwrap();
    assert_eq!(ended.2, 137);
}

pub(crate) async fn many_execs_run_at_once(bench: &Bench) {
    let id = bench.started("c", bench.idles()).await;
    let one = |code: i32| {
        let command = bench.says(&format!("print|{code}|exit|{code}"), &format!("echo {code}; exit {code}"));
        let id = &id;
        async move { assert_eq!(finish(exec(bench, id, request(command)).await).await.2, code) }
    };
    join_all((0..12).map(one)).await;
}

async fn attachable(bench: &Bench, once: bool, command: Vec<String>) -> ContainerId {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", command);
    let config = ContainerConfig { stdin: true, stdin_once: once, ..config };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    id
}

async fn attach(bench: &Bench, id: &ContainerId) -> Session {
    let request = AttachRequest { stdin: true, stdout: true, stderr: true };
    bench.runtime.attach(id, &request).await.unwrap()
}

pub(crate) async fn an_attached_client_speaks_with_the_process(bench: &Bench) {
    let command = bench.says("line|copy|warn|end|exit|9", "read x; cat; echo end >&2; exit 9");
    let id = attachable(bench, true, command).await;
    let mut session = attach(bench, &id).await;
    write(&mut session, b"go\nhello\n").await;
    session.stdin.as_mut().unwrap().shutdown().await.unwrap();
    assert_eq!(finish(session).await, (b"hello\n".to_vec(), b"end\n".to_vec(), 9));
    assert_eq!(bench.exited(&id).await.exit_code, 9);
}

/// Says `ready` on both streams until it is told something, then goes on.
const UNTIL_TOLD: &str = "rm -f /told; \
                          (while [ ! -e /told ]; do echo ready; echo ready >&2; busybox sleep 0.05; done) & \
                          read x; : >/told; wait";

/// Waits until the client gets these streams: a runtime may hand on what is typed before it adds the client to those who
/// listen, and there is no other sign.
async fn listens(bench: &Bench, session: &mut Session, sources: &[LogSource]) {
    // In memory it does both at once, and such a process is not easily said.
    let mut missing = if bench.is_fake() { Vec::new() } else { sources.to_vec() };
    while !missing.is_empty() {
        let piece = timeout(PATIENCE, session.output.next()).await.expect("it writes").expect("it runs").unwrap();
        missing.retain(|source| *source != piece.source);
    }
}

/// Without what a process said until it was told.
fn told(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap().split_inclusive('\n').filter(|line| *line != "ready\n").collect()
}

pub(crate) async fn standard_input_stays_open_for_the_next_client(bench: &Bench) {
    let script = format!("{UNTIL_TOLD}; echo first; {UNTIL_TOLD}; echo second; exit 1");
    let id = attachable(bench, false, bench.says("line|print|first|line|print|second|exit|1", &script)).await;
    let mut session = attach(bench, &id).await;
    listens(bench, &mut session, &[LogSource::Stdout]).await;
    write(&mut session, b"a\n").await;
    session.stdin.as_mut().unwrap().shutdown().await.unwrap();
    read_until(&mut session, "first").await;
    drop(session);
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
    let mut session = attach(bench, &id).await;
    listens(bench, &mut session, &[LogSource::Stdout]).await;
    write(&mut session, b"b\n").await;
    let (out, err, code) = finish(session).await;
    assert_eq!((told(out).as_str(), told(err).as_str(), code), ("second\n", "", 1));
}

pub(crate) async fn a_client_attached_without_input_only_listens(bench: &Bench) {
    let script = format!("{UNTIL_TOLD}; echo one; echo two >&2");
    let id = attachable(bench, false, bench.says("line|print|one|warn|two|exit|0", &script)).await;
    let request = AttachRequest { stdin: false, stdout: false, stderr: true };
    let mut listener = bench.runtime.attach(&id, &request).await.unwrap();
    assert!(listener.stdin.is_none());
    listens(bench, &mut listener, &[LogSource::Stderr]).await;
    let mut speaker = attach(bench, &id).await;
    listens(bench, &mut speaker, &[LogSource::Stdout, LogSource::Stderr]).await;
    write(&mut speaker, b"go\n").await;
    let ((out, err, code), said) = join!(finish(listener), finish(speaker));
    assert_eq!((out.len(), told(err).as_str(), code), (0, "two\n", 0));
    assert_eq!((told(said.0).as_str(), told(said.1).as_str(), said.2), ("one\n", "two\n", 0));
}

pub(crate) async fn an_attached_client_hears_the_last_words(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let command = bench.says("line|print|one|warn|two|exit|0", &format!("{UNTIL_TOLD}; echo one; echo two >&2"));
    let heard = async |name: String| {
        let config = ContainerConfig { stdin: true, ..bench.container_config("p", &name, command.clone()) };
        let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
        bench.runtime.start_container(&id).await.unwrap();
        let mut session = attach(bench, &id).await;
        listens(bench, &mut session, &[LogSource::Stdout, LogSource::Stderr]).await;
        write(&mut session, b"go\n").await;
        let (out, err, code) = finish(session).await;
        (told(out), told(err), code)
    };
    // Several: what ends first, its input or one of its outputs, is chance.
    let heard = join_all((0..8).map(|number| heard(format!("c{number}")))).await;
    assert_eq!(heard, vec![("one\n".to_owned(), "two\n".to_owned(), 0); 8]);
}

async fn echoed(bench: &Bench, sandbox: &SandboxId, port: u16, bytes: &[u8]) {
    let connection = bench.runtime.port_forward(sandbox, port).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(connection);
    let writing = async {
        writer.write_all(bytes).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut seen = Vec::new();
    let reading = timeout(PATIENCE, reader.read_to_end(&mut seen));
    let ((), read) = join!(writing, reading);
    read.expect("the other side closes too").unwrap();
    assert!(seen == bytes, "{} bytes of {} came back", seen.len(), bytes.len());
}

pub(crate) async fn a_port_is_reached_and_each_direction_is_closed_by_itself(bench: &Bench) {
    let sandbox = bench.echoes("p", 8080).await;
    echoed(bench, &sandbox, 8080, b"hello").await;
    echoed(bench, &sandbox, 8080, &vec![7; 2_000_000]).await;
}

pub(crate) async fn hundreds_of_connections_can_be_open_at_once(bench: &Bench) {
    let sandbox = bench.echoes("p", 8080).await;
    let connect = || async { bench.runtime.port_forward(&sandbox, 8080).await.unwrap() };
    let mut connections = join_all((0..300).map(|_| connect())).await;
    for (number, connection) in connections.iter_mut().enumerate() {
        let bytes = (number as u32).to_be_bytes();
        connection.write_all(&bytes).await.unwrap();
        let mut seen = [0; 4];
        timeout(PATIENCE, connection.read_exact(&mut seen)).await.expect("it answers").unwrap();
        assert_eq!(seen, bytes);
    }
}

pub(crate) async fn a_port_where_nothing_listens_is_invalid_and_says_so(bench: &Bench) {
    let sandbox = bench.echoes("p", 8080).await;
    let error = bench.runtime.port_forward(&sandbox, 8081).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Invalid);
    let text = error.to_string();
    assert!(text.contains("failed to connect to localhost:8081 inside namespace"), "{text}");
    assert!(text.contains("connection refused"), "{text}");
    let error = bench.runtime.port_forward(&SandboxId::from("f".repeat(64)), 8080).await.err().unwrap();
    assert_eq!(error.kind(), Kind::NotFound);
}

pub(crate) async fn a_paused_container_waits_until_it_is_thawed(bench: &Bench) {
    let command = bench.says("line|print|two|exit|0", "read x; echo two");
    let id = attachable(bench, false, command).await;
    let mut session = attach(bench, &id).await;
    for _ in 0..2 {
        bench.runtime.pause_container(&id).await.unwrap();
    }
    write(&mut session, b"go\n").await;
    // What it would take to answer, and more.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
    let error = bench.runtime.exec(&id, &request(bench.exits(0))).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    for _ in 0..2 {
        match bench.runtime.unpause_container(&id).await {
            Ok(()) => {}
            // It may have ended by now.
            Err(error) => assert_eq!(error.kind(), Kind::Invalid),
        }
    }
    assert_eq!(finish(session).await, (b"two\n".to_vec(), Vec::new(), 0));
    assert_eq!(bench.exited(&id).await.exit_code, 0);
}

pub(crate) async fn a_paused_container_can_be_stopped_and_removed(bench: &Bench) {
    let stopped = bench.started("stopped", bench.idles()).await;
    bench.runtime.pause_container(&stopped).await.unwrap();
    bench.runtime.stop_container(&stopped, Duration::ZERO).await.unwrap();
    assert_eq!(bench.runtime.container_status(&stopped).await.unwrap().state, ContainerState::Exited);
    let removed = bench.started("removed", bench.idles()).await;
    bench.runtime.pause_container(&removed).await.unwrap();
    bench.runtime.remove_container(&removed).await.unwrap();
    let sandboxed = bench.started("sandboxed", bench.idles()).await;
    bench.runtime.pause_container(&sandboxed).await.unwrap();
    bench.runtime.remove_pod_sandbox(&bench.sandbox("p").await).await.unwrap();
}
