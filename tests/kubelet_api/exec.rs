//! exec and attach over SPDY, as the API server's client speaks it, and run.

use std::time::{Duration, Instant};

use http::Method;
use lambdalet::kubelet_api::Limits;
use serde_json::{Value, json};

use crate::spdy::{Answer, ServerFrame, Spdy, ask};
use crate::support::{Node, Setup, eventually, request, tls};

const V4: &[&str] =
    &["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const ALL: &str = "input=1&output=1&error=1";

async fn start() -> Node {
    Node::start(Setup::default()).await
}

fn path(streams: &str, words: &[&str]) -> String {
    let command: String = words.iter().map(|word| format!("&command={}", word.replace(' ', "%20"))).collect();
    format!("/exec/ns/p/c?{streams}{command}")
}

fn status(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

async fn refused(node: &Node, path: &str, protocols: &[&str]) -> (u16, String) {
    let Err(Answer { status, rest, .. }) = Spdy::connect(node, path, protocols).await else { panic!("upgraded") };
    (status, String::from_utf8(rest.to_vec()).unwrap())
}

#[tokio::test]
async fn output_and_exit_code_reach_the_client() {
    let node = start().await;
    let mut spdy =
        Spdy::connect(&node, &path("output=1&error=1", &["both", "to out", "to err"]), V4).await.ok().unwrap();
    let [errors, stdout, stderr] = spdy.streams(["error", "stdout", "stderr"]).await;
    let came = spdy.reader.until_ended(&[errors, stdout, stderr]).await;
    assert_eq!((&came[&stdout][..], &came[&stderr][..]), (&b"to out"[..], &b"to err"[..]));
    let status = status(&came[&errors]);
    assert_eq!((&status["status"], &status["reason"]), (&json!("Failure"), &json!("NonZeroExitCode")));
    assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
}

#[tokio::test]
async fn sixteen_mebibytes_go_there_and_back() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path(ALL, &["cat"]), V4).await.ok().unwrap();
    let [errors, stdin, stdout, stderr] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
    let sent: Vec<u8> = (0..16_u32 << 20).map(|n| u8::try_from((n * 7 + n / 251) % 256).unwrap()).collect();
    let Spdy { mut reader, mut writer } = spdy;
    let send = async {
        for piece in sent.chunks(32 << 10) {
            writer.data(stdin, piece, false).await;
        }
        writer.data(stdin, &[], true).await;
    };
    let ids = [errors, stdout, stderr];
    let (came, ()) = tokio::join!(reader.until_ended(&ids), send);
    assert!(came[&stdout] == sent, "{} bytes came", came[&stdout].len());
    assert_eq!(status(&came[&errors]), json!({"metadata": {}, "status": "Success"}));
}

#[tokio::test]
async fn older_protocols_say_errors_in_words() {
    let node = start().await;
    for protocol in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        let mut spdy = Spdy::connect(&node, &path("output=1", &["exit", "2"]), &[protocol]).await.ok().unwrap();
        let [errors, stdout] = spdy.streams(["error", "stdout"]).await;
        let came = spdy.reader.until_ended(&[errors, stdout]).await;
        assert_eq!(came[&errors], b"command terminated with non-zero exit code: 2", "{protocol}");
    }
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("input=1&output=1&tty=1", &["size"]), V4).await.ok().unwrap();
    let [errors, _, stdout, resize] = spdy.streams(["error", "stdin", "stdout", "resize"]).await;
    spdy.writer.data(resize, br#"{"Width":132,"Hei"#, false).await;
    spdy.writer.data(resize, br#"ght":50}"#, false).await;
    assert_eq!(spdy.reader.until_ended(&[errors, stdout]).await[&stdout], b"132x50");
}

#[tokio::test]
async fn a_command_that_cannot_be_run_is_told_on_the_error_stream() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["missing"]), V4).await.ok().unwrap();
    let [errors, stdout] = spdy.streams(["error", "stdout"]).await;
    let status = status(&spdy.reader.until_ended(&[errors, stdout]).await[&errors]);
    assert_eq!((&status["reason"], &status["code"]), (&json!("InternalError"), &json!(500)));
    let message = "Internal error occurred: error executing command in container: no such file \"missing\"";
    assert_eq!(status["message"], message);
}

#[tokio::test]
async fn attach_joins_and_judges_nothing() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, "/attach/ns/p/u/c?input=1&output=1", V4).await.ok().unwrap();
    let [errors, stdin, stdout] = spdy.streams(["error", "stdin", "stdout"]).await;
    spdy.writer.data(stdin, b"hello", true).await;
    let came = spdy.reader.until_ended(&[errors, stdout]).await;
    assert_eq!(came[&stdout], b"hello");
    assert_eq!(status(&came[&errors])["status"], "Success");
}

#[tokio::test]
async fn a_client_that_vanishes_ends_the_process_within_a_second() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path(ALL, &["sleep"]), V4).await.ok().unwrap();
    let [_, stdin, ..] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
    assert!(eventually(5, || node.world.processes.running() == 1).await);
    drop(spdy);
    assert!(eventually(10, || node.world.processes.running() == 0).await);
    // Also while nobody reads what it sent.
    let mut spdy = Spdy::connect(&node, &path(ALL, &["sleep"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
    // With nothing left to read the client's kernel has no reason for a reset when it closes.
    for _ in 0..4 {
        assert!(matches!(spdy.reader.next().await, Some(ServerFrame::Reply(_))));
    }
    let flood = async {
        loop {
            spdy.writer.data(stdin, &[0; 32 << 10], false).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(500), flood).await;
    assert_eq!(node.world.processes.running(), 1);
    drop(spdy);
    assert!(eventually(10, || node.world.processes.running() == 0).await);
    assert!(node.get("/metrics").await.1.contains("lambdalet_api_streams{kind=\"Exec\"} 0"));
}

#[tokio::test]
async fn a_slow_client_holds_up_the_process_and_not_memory() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["flood"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    let written = || node.world.processes.written.load(std::sync::atomic::Ordering::SeqCst);
    let mut before = usize::MAX;
    // Until it stands still.
    let stuck = async {
        while before != written() || before == 0 {
            before = written();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stuck).await.unwrap();
    // What the kernel holds of a TCP connection on one host, and a megabyte here.
    assert!((1..16 << 20).contains(&before), "{before} bytes were taken from the process");
    let mut more = 0;
    while more < 2 * before {
        if let Some(ServerFrame::Data { bytes, .. }) = spdy.reader.next().await {
            more += bytes.len();
        }
    }
    assert!(written() > before);
}

#[tokio::test]
async fn pings_are_answered_while_a_command_runs() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    for id in [1, 3, 5] {
        spdy.writer.frames.ping(id);
    }
    spdy.writer.send().await;
    let mut pings = Vec::new();
    while pings.len() < 3 {
        if let ServerFrame::Ping(id) = spdy.reader.next().await.unwrap() {
            pings.push(id);
        }
    }
    assert_eq!(pings, [1, 3, 5]);
}

#[tokio::test]
async fn streams_that_a_command_does_not_have_are_reset() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    let [_, twice, strange, _] = spdy.streams(["error", "error", "video", "stdout"]).await;
    let late = spdy.writer.open(&[("streamtype", "stdin")]);
    spdy.writer.send().await;
    let mut reset = Vec::new();
    while reset.len() < 3 {
        if let ServerFrame::Reset { id, .. } = spdy.reader.next().await.unwrap() {
            reset.push(id);
        }
    }
    assert_eq!(reset, [twice, strange, late]);
}

#[tokio::test]
async fn a_connection_on_which_nothing_happens_ends() {
    let limits = Limits { stream_idle: Duration::from_millis(300), ..Limits::default() };
    let node = Node::start(Setup { limits, ..Setup::default() }).await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    let began = Instant::now();
    // Pings, as every client sends them, are nothing either.
    let pings = async {
        loop {
            spdy.writer.frames.ping(1);
            if spdy.writer.try_send().await.is_err() {
                return std::future::pending().await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = async { while spdy.reader.next().await.is_some() {} } => {}
        () = pings => {}
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(eventually(10, || node.world.processes.running() == 0).await);
}

#[tokio::test]
async fn noise_ends_the_connection_and_the_process() {
    let node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    assert!(eventually(5, || node.world.processes.running() == 1).await);
    spdy.writer.frames.out.extend_from_slice(&[0xff; 64]);
    spdy.writer.send().await;
    while spdy.reader.next().await.is_some() {}
    assert!(eventually(10, || node.world.processes.running() == 0).await);
}

#[tokio::test]
async fn what_is_wrong_is_said_before_the_upgrade() {
    let node = start().await;
    let table = [
        (path("", &["true"]), 400, "you must specify at least 1 of stdin, stdout, stderr\n"),
        ("/exec/ns/p/c?output=1".to_owned(), 400, "you must specify a command\n"),
        (path("output=1", &["true"]).replace("/p/", "/q/"), 404, "pod \"q\" not found\n"),
        (path("output=1", &["true"]).replace("/p/c", "/p/other/c"), 404, "pod \"p\" not found\n"),
        (path("output=1", &["true"]).replace("/p/c", "/p/new"), 500, "container not found (\"new\")\n"),
    ];
    for (path, status, text) in table {
        assert_eq!(refused(&node, &path, V4).await, (status, text.to_owned()), "{path}");
    }
    assert_eq!(refused(&node, &path("output=1", &["true"]), &[]).await.0, 400);
    let (status, text) = refused(&node, &path("output=1", &["true"]), &["v9.channel.k8s.io"]).await;
    assert_eq!(status, 403);
    assert!(text.contains("client supports [\"v9.channel.k8s.io\"]"), "{text}");
    assert_eq!(node.get(&path("output=1", &["true"])).await.0, 400);
}

#[tokio::test]
async fn exec_needs_the_right_to_create_or_get_proxy() {
    let node = start().await;
    node.cluster.granted.lock().unwrap().clear();
    assert_eq!(refused(&node, &path("output=1", &["true"]), V4).await.0, 403);
    let last = node.cluster.last.lock().unwrap()["resourceAttributes"].clone();
    assert_eq!((&last["verb"], &last["subresource"]), (&json!("create"), &json!("proxy")));
}

#[tokio::test]
async fn when_all_streams_are_in_use_a_newcomer_is_told() {
    let node = Node::start(Setup { limits: Limits { streams: 1, ..Limits::default() }, ..Setup::default() }).await;
    let spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    let full = (503, "too many open streams: all 1 are in use\n".to_owned());
    assert_eq!(refused(&node, &path("output=1", &["true"]), V4).await, full);
    assert_eq!(node.get("/healthz").await.0, 200);
    drop(spdy);
    let mut freed = false;
    for _ in 0..100 {
        freed = Spdy::connect(&node, &path("output=1", &["true"]), V4).await.is_ok();
        if freed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(freed);
}

#[tokio::test]
async fn shutdown_ends_what_runs() {
    let mut node = start().await;
    let mut spdy = Spdy::connect(&node, &path("output=1", &["sleep"]), V4).await.ok().unwrap();
    spdy.streams(["error", "stdout"]).await;
    assert!(eventually(5, || node.world.processes.running() == 1).await);
    node.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), node.tasks.join_next()).await.unwrap();
    assert_eq!(node.world.processes.running(), 0);
}

#[tokio::test]
async fn run_answers_with_the_output() {
    let node = start().await;
    let mut client = node.api_server().await;
    let mut post = async |path: &str| {
        let response = client.send(request(Method::POST, path, None)).await.unwrap();
        let status = response.status().as_u16();
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    };
    assert_eq!(post("/run/ns/p/c?cmd=echo%20hi").await, (200, "hi".to_owned()));
    assert_eq!(post("/run/ns/p/u/c?cmd=exit%204").await, (500, "command terminated with exit code 4: \n".to_owned()));
    assert_eq!(post("/run/ns/p/c?cmd=missing").await.0, 400);
    assert_eq!(post("/run/ns/p/c").await.0, 400);
    assert_eq!(post("/run/ns/p/new?cmd=true").await.0, 500);
    assert_eq!(node.get("/run/ns/p/c?cmd=true").await.0, 405);
}

#[tokio::test]
async fn frames_that_come_with_the_request_are_not_lost() {
    let node = start().await;
    let mut io =
        tls(node.address, Some(node.authority.api_server()), rustls::ALL_VERSIONS, &["http/1.1"]).await.unwrap();
    let mut frames = crate::spdy::ClientFrames::default();
    frames.syn_stream(1, &[("streamtype", "error")], false);
    frames.syn_stream(3, &[("streamtype", "stdout")], false);
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: SPDY/3.1\r\nx-stream-protocol-version: v4.channel.k8s.io\r\n\r\n",
        path("output=1", &["echo", "early"])
    );
    let all = [head.as_bytes(), &frames.out].concat();
    tokio::io::AsyncWriteExt::write_all(&mut io, &all).await.unwrap();
    let mut answer = Vec::new();
    let _ =
        tokio::time::timeout(Duration::from_secs(10), tokio::io::AsyncReadExt::read_to_end(&mut io, &mut answer)).await;
    assert!(answer.windows(5).any(|window| window == b"early"));
}

#[tokio::test]
async fn http_that_asks_for_no_upgrade_is_told_to() {
    let node = start().await;
    let mut io =
        tls(node.address, Some(node.authority.api_server()), rustls::ALL_VERSIONS, &["http/1.1"]).await.unwrap();
    let answer = ask(&mut io, &Method::POST, &path("output=1", &["true"]), &[]).await;
    assert_eq!(answer.status, 400);
    assert!(String::from_utf8_lossy(&answer.rest).contains("upgrade request required"));
    // The connection stays what it was.
    assert_eq!(ask(&mut io, &Method::GET, "/healthz", &[]).await.status, 200);
}
