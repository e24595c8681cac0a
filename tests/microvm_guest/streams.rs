//! Streams: commands, attach, ports, logs.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use lambdalet::runtime::Kind;
use lambdalet::runtime::session::{AttachRequest, ExecRequest, Output, Session, TerminalSize};
use lambdalet::runtime::types::LogSource;
use lambdalet_proto::agent::v1::ContainerSpec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bench::{Bench, PATIENCE, script};

fn command(script: &str) -> ExecRequest {
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecRequest { command, stdin: true, stdout: true, stderr: true, tty: false }
}

/// Standard output and error of a session to their end.
async fn all(session: Session) -> (String, String, i32) {
    let output: Vec<Output> =
        tokio::time::timeout(PATIENCE, session.output.try_collect()).await.expect("it ends").unwrap();
    let of = |source| {
        let pieces = output.iter().filter(|piece| piece.source == source).flat_map(|piece| piece.bytes.to_vec());
        String::from_utf8(pieces.collect()).unwrap()
    };
    (of(LogSource::Stdout), of(LogSource::Stderr), session.exit.await.unwrap())
}

/// Reads until some text has come.
async fn says(session: &mut Session, wanted: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.contains(wanted) {
            let piece = session.output.next().await.expect("it goes on").unwrap();
            text.push_str(&String::from_utf8_lossy(&piece.bytes));
        }
    };
    let came = tokio::time::timeout(PATIENCE, read).await;
    assert!(came.is_ok(), "{wanted:?} does not come in {text:?}");
    text
}

pub(crate) async fn a_command_has_its_streams_and_its_exit_code(bench: &mut Bench) {
    bench.start(ContainerSpec { env: vec!["X=of the container".into()], ..script("host", "sleep 1000") }).await;
    let mut session = bench.agent.exec("host", &command("echo $X; wc -c; echo bad >&2; exit 9")).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    let bytes = vec![b'x'; 300_000];
    stdin.write_all(&bytes).await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(all(session).await, ("of the container\n300000\n".into(), "bad\n".into(), 9));
    // More output than windows hold.
    let quiet = ExecRequest { stdin: false, ..command("cat; head -c 3000000 /dev/zero | tr '\\0' y") };
    let (out, err, code) = all(bench.agent.exec("host", &quiet).await.unwrap()).await;
    assert_eq!((out.len(), err.as_str(), code), (3_000_000, "", 0));
    let missing = ExecRequest { command: vec!["no-such".into()], ..command("") };
    assert_eq!(bench.agent.exec("host", &missing).await.unwrap_err().kind(), Kind::Invalid);
    assert!(bench.agent.exec("nobody", &command("true")).await.unwrap_err().is_not_found());
    // What it leaves behind does not keep its output.
    let leaves = ExecRequest { stdin: false, ..command("sleep 1000 & echo left") };
    assert_eq!(all(bench.agent.exec("host", &leaves).await.unwrap()).await, ("left\n".into(), String::new(), 0));
}

pub(crate) async fn a_command_that_has_closed_its_outputs_reads_on(bench: &mut Bench) {
    let quiet = |script| ExecRequest { stdin: false, ..command(script) };
    let mut session = bench.agent.exec("host", &command("exec cat > /kept 2>&1")).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"begins, ").await.unwrap();
    stdin.flush().await.unwrap();
    let begun = bench.agent.exec("host", &quiet("until [ -s /kept ]; do sleep 0.05; done")).await.unwrap();
    assert_eq!(all(begun).await.2, 0);
    stdin.write_all(b"ends").await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(all(session).await.2, 0);
    assert_eq!(all(bench.agent.exec("host", &quiet("cat /kept")).await.unwrap()).await.0, "begins, ends");
}

pub(crate) async fn a_command_that_is_given_up_while_it_starts_ends(bench: &mut Bench) {
    let sleeps = command("exec sleep 4322");
    for step in 0..40 {
        // Each a little further on its way.
        let soon = Duration::from_micros(250 * step);
        let _ = tokio::time::timeout(soon, bench.agent.exec("host", &sleeps)).await;
    }
    let gone = command("while grep -qs '[s]leep.4322' /proc/[0-9]*/cmdline; do sleep 0.05; done");
    let looks = bench.agent.exec("host", &ExecRequest { stdin: false, ..gone }).await.unwrap();
    assert_eq!(all(looks).await.2, 0);
}

pub(crate) async fn a_pipe_in_the_place_of_the_users_holds_up_no_command(bench: &mut Bench) {
    let quiet = |script| ExecRequest { stdin: false, ..command(script) };
    let lays = bench.agent.exec("host", &quiet("rm /etc/passwd /etc/group; mkfifo /etc/passwd /etc/group")).await;
    assert_eq!(all(lays.unwrap()).await.2, 0);
    assert_eq!(all(bench.agent.exec("host", &quiet("true")).await.unwrap()).await.2, 0);
}

pub(crate) async fn a_command_with_a_terminal_has_a_size(bench: &mut Bench) {
    let request =
        ExecRequest { tty: true, stderr: false, ..command("tty; while read line; do stty size; done; exit 5") };
    let mut session = bench.agent.exec("host", &request).await.unwrap();
    says(&mut session, "/dev/pts/").await;
    session.terminal.resize(TerminalSize { width: 99, height: 33 }).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"size?\n").await.unwrap();
    says(&mut session, "33 99").await;
    // Control-D.
    stdin.shutdown().await.unwrap();
    assert_eq!(all(session).await.2, 5);
}

pub(crate) async fn a_command_ends_with_whoever_waits_for_it(bench: &mut Bench) {
    let gone = command("while grep -qs '[s]leep.4321' /proc/[0-9]*/cmdline; do sleep 0.05; done");
    for keep_output in [false, true] {
        let session = bench.agent.exec("host", &command("echo on; exec sleep 4321")).await.unwrap();
        let Session { mut output, exit, .. } = session;
        output.next().await.unwrap().unwrap();
        // Either the whole session goes, or what waits for the exit.
        drop(exit);
        let output = keep_output.then_some(output);
        let looks = bench.agent.exec("host", &ExecRequest { stdin: false, ..gone.clone() }).await.unwrap();
        assert_eq!(all(looks).await.2, 0);
        drop(output);
    }
    bench.agent.remove("host").await.unwrap();
}

pub(crate) async fn an_attached_client_speaks_to_the_process(bench: &mut Bench) {
    let spec = ContainerSpec {
        stdin: true,
        stdin_once: true,
        ..script("reads", "echo ready; while read line; do echo got $line; echo err >&2; done; exit 6")
    };
    bench.start(spec).await;
    bench.log_says("reads", "ready").await;
    let request = AttachRequest { stdin: true, stdout: true, stderr: false };
    let mut session = bench.agent.attach("reads", &request).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"one\n").await.unwrap();
    // What was said before is not told again.
    assert_eq!(says(&mut session, "got one\n").await, "got one\n");
    stdin.write_all(b"two\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(all(session).await, ("got two\n".into(), String::new(), 6));
    assert_eq!(bench.agent.attach("reads", &request).await.unwrap_err().kind(), Kind::Invalid);
    bench.agent.remove("reads").await.unwrap();

    bench
        .start(ContainerSpec {
            stdin: true,
            tty: true,
            ..script("shell", "echo $TERM; echo ready; read x; stty size; echo bye")
        })
        .await;
    bench.log_says("shell", "ready").await;
    let mut session =
        bench.agent.attach("shell", &AttachRequest { stdin: true, stdout: true, stderr: false }).await.unwrap();
    session.terminal.resize(TerminalSize { width: 81, height: 23 }).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
    says(&mut session, "bye").await;
    assert_eq!(tokio::time::timeout(PATIENCE, session.exit).await.unwrap().unwrap(), 0);
    let said = bench.log("shell").await;
    assert!(said.starts_with("xterm\r\n") && said.contains("23 81"), "{said:?}");
    bench.agent.remove("shell").await.unwrap();
}

pub(crate) async fn a_port_is_reached_and_each_direction_closed(bench: &mut Bench) {
    bench.start(script("serves", "nc -l -p 8080 -e sh -c 'wc -c; echo answered'")).await;
    let mut stream = loop {
        // Until it listens.
        match bench.agent.port_forward(8080).await {
            Ok(stream) => break stream,
            Err(error) => assert_eq!(error.kind(), Kind::Invalid, "{error}"),
        }
    };
    stream.write_all(&vec![b'q'; 200_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("it ends").unwrap();
    assert_eq!(answer, "200000\nanswered\n");
    bench.agent.remove("serves").await.unwrap();
    assert_eq!(bench.agent.port_forward(8080).await.err().unwrap().kind(), Kind::Invalid);
}

pub(crate) async fn a_port_of_the_other_loopback_address_is_reached(bench: &mut Bench) {
    bench.start(script("serves", "echo answered >/tmp/file; exec httpd -f -p '[::1]:8081' -h /tmp")).await;
    let begun = std::time::Instant::now();
    let mut stream = loop {
        match bench.agent.port_forward(8081).await {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
    };
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("it ends").unwrap();
    assert!(answer.starts_with("HTTP/1") && answer.ends_with("answered\n"), "{answer}");
    bench.agent.remove("serves").await.unwrap();
}

pub(crate) async fn a_log_is_followed_and_read_again_from_an_offset(bench: &mut Bench) {
    let spec = ContainerSpec {
        log_limit: 64 << 10,
        ..script(
            "talks",
            "i=0; while [ $i -lt 1500 ]; do i=$((i+1)); echo line $i ----------------------------------------; done",
        )
    };
    bench.agent.create_container(spec).await.unwrap();
    let mut followed = bench.agent.logs("talks", 0, true).await.unwrap();
    bench.agent.start("talks").await.unwrap();
    let (mut lost, mut bytes, mut next, mut last) = (0, 0, 0, Vec::new());
    while let Some(batch) = tokio::time::timeout(PATIENCE, followed.next()).await.expect("it ends") {
        let batch = batch.unwrap();
        lost += batch.lost;
        bytes += batch.records.iter().map(|record| record.bytes.len() + 16).sum::<usize>() as u64;
        (next, last) = (batch.next, batch.records.last().map_or(last, |record| record.bytes.to_vec()));
    }
    assert_eq!((lost + bytes, last.starts_with(b"line 1500 ")), (next, true));
    let again: Vec<_> = bench.agent.logs("talks", 0, false).await.unwrap().try_collect().await.unwrap();
    assert!(again[0].lost > 0 && again.last().unwrap().next == next);
    assert!(bench.agent.logs("talks", next, true).await.unwrap().next().await.is_none());
    assert!(bench.agent.logs("nobody", 0, false).await.err().unwrap().is_not_found());
    bench.agent.remove("talks").await.unwrap();
}
