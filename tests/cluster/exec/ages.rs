//! Clients and API servers of other ages: a kubectl of 1.32, and an API server that speaks SPDY to every node.
//!
//! Since 1.36 an API server passes WebSockets on to nodes that declare `ExtendWebSocketsToKubelet`, as ours do. Before, it
//! made SPDY of exec and attach over WebSocket (`StreamTranslator`), and took the SPDY of port-forward out of its tunnel.

use std::ffi::{OsStr, OsString};
use std::process::Command;

use serde_json::json;

use super::terminal::is_a_terminal;
use super::{ECHO, Kubectl, PROTOCOLS, bytes, comes_back, forward_by, is_echoed, joins, kubectl, run_command, text};
use crate::debug::debug;
use crate::harness::{Case, DEBIAN, on_shared_node};

/// A kubectl of 1.32; `None`, and a word about it, without one.
fn old_kubectl() -> Option<OsString> {
    let program = std::env::var_os("LAMBDALET_TEST_KUBECTL_1_32");
    if program.is_none() {
        println!(
            "skipped: LAMBDALET_TEST_KUBECTL_1_32 is not set to a kubectl of 1.32 (hack/build-tools kubectl-1.32)"
        );
    }
    program
}

/// The same command line and environment for another kubectl.
fn of_program(program: &OsStr, command: &Command) -> Command {
    let mut other = Command::new(program);
    other.args(command.get_args());
    for (name, value) in command.get_envs() {
        other.env(name, value.unwrap_or_default());
    }
    other
}

/// The Pod `p`, which echoes.
async fn echoing(t: &Case) {
    t.pod("p", json!({"containers": [{"name": "main", "image": DEBIAN, "command": ["perl", "-e", ECHO]}]})).await;
    t.log_with("p", "main", "up").await;
}

/// A command has its streams and its exit code.
fn runs_a_command(kubectl: Kubectl<'_>, how: &str) {
    let script = "cat; echo to err >&2; exit 7";
    let ended = run_command(kubectl(&["exec", "-i", "p", "--", "sh", "-c", script]), b"hello\n");
    assert_eq!((text(&ended.stdout), ended.status.code()), ("hello\n".to_owned(), Some(7)), "{how}");
    // Beside what kubectl itself has to say: that of 1.32 complains of an empty message that was faster than its streams.
    let said = text(&ended.stderr);
    assert!(said.lines().any(|line| line == "to err"), "{how}: {said}");
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_kubectl_of_1_32_is_served_too() {
    let Some(program) = old_kubectl() else { return };
    on_shared_node(async |t| {
        echoing(t).await;
        for (protocol, websockets) in PROTOCOLS {
            let old = |args: &[&str]| of_program(&program, &kubectl(t, websockets, args));
            let version = text(&old(&["version", "--client"]).output().unwrap().stdout);
            assert!(version.contains("v1.32."), "{version}");
            runs_a_command(&old, protocol);
            assert_eq!(text(&old(&["logs", "p"]).output().unwrap().stdout), "up\n", "{protocol}");

            let folder = tempfile::tempdir().unwrap();
            let local = |name: &str| folder.path().join(name).display().to_string();
            let sent = bytes(5_000_003);
            std::fs::write(local("sent"), &sent).unwrap();
            for (from, to) in [(local("sent"), "p:/tmp/file".to_owned()), ("p:/tmp/file".to_owned(), local("came"))] {
                let copied = old(&["cp", &from, &to]).output().unwrap();
                assert!(copied.status.success(), "{protocol}: {}", text(&copied.stderr));
            }
            assert!(std::fs::read(local("came")).unwrap() == sent, "{protocol}");

            let (_child, _lines, port) = forward_by(&old, "p", 8080).await;
            is_echoed(port, &sent[..100_000], protocol).await;
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_kubectl_of_1_32_attaches_debugs_and_has_a_terminal() {
    let Some(program) = old_kubectl() else { return };
    on_shared_node(async |t| {
        echoing(t).await;
        for (protocol, websockets) in PROTOCOLS {
            let old = |args: &[&str]| of_program(&program, &kubectl(t, websockets, args));
            let name = protocol.to_lowercase();
            joins(t, &old, &name, protocol).await;
            is_a_terminal(&old, "p", protocol).await;
            let debugger = format!("debugger-{name}");
            let script = "read line; echo \"got $line\"";
            let arguments = debug(&debugger, &["-i", "--target=main", "--", "sh", "-c", script]);
            let debugged = run_command(old(&arguments), b"cheese\n");
            assert!(text(&debugged.stdout).contains("got cheese"), "{protocol}: {debugged:?}");
        }
    });
}

/// What an API server has counted: commands that it translated, ports that it tunnelled, and WebSockets that it passed
/// on as they were.
fn counted(kubectl: Kubectl<'_>) -> [f64; 3] {
    let answer = kubectl(&["get", "--raw", "/metrics"]).output().unwrap();
    assert!(answer.status.success(), "{}", text(&answer.stderr));
    let metrics = text(&answer.stdout);
    let sum = |name: &str, label: &str| {
        let of_it = |line: &&str| line.starts_with(&format!("{name}{{")) && line.contains(label);
        metrics.lines().filter(of_it).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    [
        sum("apiserver_stream_translator_requests_total", r#"code="200""#),
        sum("apiserver_stream_tunnel_requests_total", r#"code="101""#),
        sum("apiserver_websocket_streaming_requests_total", r#"proxy_type="proxied_to_kubelet""#),
    ]
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_api_server_that_speaks_spdy_to_nodes_is_served_too() {
    on_shared_node(async |t| {
        let server = t.cluster.older_apiserver();
        echoing(t).await;
        let current = t.cluster.kubectl(&[]).get_program().to_owned();
        for (age, program) in [("of now", Some(current)), ("of 1.32", old_kubectl())] {
            let Some(program) = program else { continue };
            for (number, (protocol, websockets)) in PROTOCOLS.into_iter().enumerate() {
                let how = format!("kubectl {age}, {protocol}");
                let through = |args: &[&str]| {
                    let args = [&["--server", server.as_str()], args].concat();
                    of_program(&program, &kubectl(t, websockets, &args))
                };
                let [commands, tunnels, _] = counted(&through);
                runs_a_command(&through, &how);
                comes_back(&through, "p", &bytes(24 << 20), &how);
                let name = format!("joined-{}-{number}", age.replace(['.', ' '], "-"));
                joins(t, &through, &name, &how).await;
                is_a_terminal(&through, "p", &how).await;
                let (_child, _lines, port) = forward_by(&through, "p", 8080).await;
                for number in 0..20 {
                    is_echoed(port, &bytes(100_000 + number), &how).await;
                }
                let [commands_now, tunnels_now, passed_on] = counted(&through);
                if protocol == "WebSocket" {
                    assert!(commands_now >= commands + 4.0, "{how}: {commands} and {commands_now} were translated");
                    assert!(tunnels_now > tunnels, "{how}: {tunnels} and {tunnels_now} were tunnelled");
                }
                assert!(passed_on == 0.0, "{how}: {passed_on} WebSockets went to nodes");
            }
        }
    });
}
