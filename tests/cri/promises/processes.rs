//! What is promised of the processes of containers: what they are given, their terminals and their input.

use futures::{SinkExt as _, StreamExt as _};
use lambdalet_proto::cri::v1;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{WebSocketStream, client_async};

use super::real::{prints, real, shell, starts};
use super::streams::parts;
use crate::support::{PATIENCE, World};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[tokio::test]
async fn a_process_has_the_arguments_the_environment_and_the_directory_that_it_is_given() {
    let Some(mut world) = real().await else { return };
    let variable = |key: &str, value: &str| v1::KeyValue { key: key.into(), value: value.into() };
    let main = v1::ContainerConfig {
        command: words(&["sh", "-c", "echo $0 $1; echo $PLAIN; echo \"$SPACED\"; pwd"]),
        args: words(&["zero", "one"]),
        envs: vec![variable("PLAIN", "plain"), variable("SPACED", "two  words=there")],
        working_dir: "/tmp".into(),
        ..world.container("main", "exit 0")
    };
    let sandbox = world.config("a");
    assert_eq!(prints(&mut world, sandbox, main).await, ["zero one", "plain", "two  words=there", "/tmp"]);
}

/// That of busybox is a shell without words of its own.
#[tokio::test]
async fn arguments_alone_take_the_place_of_the_images_own_command() {
    let Some(mut world) = real().await else { return };
    let main = world.container("main", "exit 0");
    let main = v1::ContainerConfig { command: Vec::new(), args: words(&["echo", "alone"]), ..main };
    let sandbox = world.config("a");
    assert_eq!(prints(&mut world, sandbox, main).await, ["alone"]);
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_made_to_work_in() {
    let Some(mut world) = real().await else { return };
    let main = v1::ContainerConfig { working_dir: "/made/here".into(), ..shell(&world, "main", "pwd") };
    let sandbox = world.config("a");
    assert_eq!(prints(&mut world, sandbox, main).await, ["/made/here"]);
}

#[tokio::test]
async fn a_process_has_the_score_that_it_is_given_for_want_of_memory() {
    let Some(mut world) = real().await else { return };
    let resources = v1::LinuxContainerResources { oom_score_adj: 500, ..Default::default() };
    let linux = v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() };
    let main = v1::ContainerConfig { linux: Some(linux), ..shell(&world, "main", "cat /proc/self/oom_score_adj") };
    let sandbox = world.config("a");
    assert_eq!(prints(&mut world, sandbox, main).await, ["500"]);
}

const TERMINAL: &str = "test -t 0 && test -t 1 && test -t 2 && echo a terminal";

#[tokio::test]
async fn a_process_has_a_terminal_where_that_is_wanted() {
    let Some(mut world) = real().await else { return };
    let main = v1::ContainerConfig { tty: true, stdin: true, ..shell(&world, "main", TERMINAL) };
    let sandbox = world.config("a");
    let lines = prints(&mut world, sandbox, main).await;
    assert_eq!(lines.first().map(|line| line.trim_end()), Some("a terminal"), "{lines:?}");
}

#[tokio::test]
async fn a_command_has_a_terminal_where_that_is_wanted() {
    let Some(mut world) = real().await else { return };
    let container_id = world.started("a", "sleep 60000").await;
    let request = v1::ExecRequest {
        container_id,
        cmd: words(&["sh", "-c", TERMINAL]),
        tty: true,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let url = world.runtime.exec(request).await.unwrap().into_inner().url;
    hears(&mut open(&url).await, "a terminal").await;
}

type Socket = WebSocketStream<TcpStream>;

/// Opens the streams behind a URL.
async fn open(url: &str) -> Socket {
    let (address, path) = parts(url);
    let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", "v4.channel.k8s.io".parse().unwrap());
    client_async(request, TcpStream::connect(address).await.unwrap()).await.unwrap().0
}

/// Waits until this came on standard output.
async fn hears(socket: &mut Socket, wanted: &str) {
    let mut all = Vec::new();
    let heard = async {
        while !String::from_utf8_lossy(&all).contains(wanted) {
            let message = socket.next().await.expect("it does not end before").unwrap();
            if let Message::Binary(bytes) = message
                && bytes.first() == Some(&1)
            {
                all.extend_from_slice(&bytes[1..]);
            }
        }
    };
    timeout(PATIENCE, heard).await.unwrap_or_else(|_| panic!("{wanted:?} does not come"));
}

/// Joins the container, writes a word to it that comes back, and leaves.
async fn echo(world: &mut World, id: &str, word: &str) {
    let request = v1::AttachRequest { container_id: id.into(), stdin: true, stdout: true, ..Default::default() };
    let url = world.runtime.attach(request).await.unwrap().into_inner().url;
    let mut socket = open(&url).await;
    let line = [&[0], word.as_bytes(), b"\n"].concat();
    socket.send(Message::binary(line)).await.unwrap();
    hears(&mut socket, word).await;
    socket.close(None).await.unwrap();
}

/// A container that prints what it reads.
async fn reader(world: &mut World, stdin_once: bool) -> String {
    let sandbox = world.sandbox("a").await;
    let (of_sandbox, main) = (world.config("a"), world.container("main", "exit 0"));
    let main = v1::ContainerConfig { command: words(&["cat"]), stdin: true, stdin_once, ..main };
    starts(world, (&sandbox, &of_sandbox), main).await
}

#[tokio::test]
async fn an_input_for_one_client_ends_with_it() {
    let Some(mut world) = real().await else { return };
    let id = reader(&mut world, true).await;
    echo(&mut world, &id, "once").await;
    assert_eq!(world.ended(&id).await.exit_code, 0);
    assert_eq!(world.lines("main.log", 1).await, ["stdout F once"]);
}

#[tokio::test]
async fn an_input_for_all_stays_open_for_the_next_client() {
    let Some(mut world) = real().await else { return };
    let id = reader(&mut world, false).await;
    for word in ["first", "second"] {
        echo(&mut world, &id, word).await;
    }
    assert_eq!(world.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
}

#[tokio::test]
async fn without_an_input_a_process_reads_its_end() {
    let Some(mut world) = real().await else { return };
    let (main, sandbox) = (shell(&world, "main", "cat; echo read"), world.config("a"));
    assert_eq!(prints(&mut world, sandbox, main).await, ["read"]);
}
