//! Clients of other languages (hack/grpc-clients), built from the published field numbers and not from our files.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use tokio::process::Command;
use tokio::time::timeout;

use crate::support::{ADDRESS, Node, PATIENCE, Remembered, files};
use crate::tls::Authority;

/// The directory of clients, or why there is none.
fn clients() -> Option<PathBuf> {
    let found = std::env::var_os("LAMBDALET_TEST_GRPC").map(PathBuf::from);
    if found.is_none() {
        println!("skipped: LAMBDALET_TEST_GRPC names no clients (hack/grpc-clients makes them)");
    }
    found
}

fn python(clients: &Path) -> Command {
    let mut command = Command::new(clients.join("python/bin/python"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/grpc-client/client.py"));
    command
}

fn go(clients: &Path) -> Command {
    Command::new(clients.join("go-client"))
}

/// What a client prints.
async fn said(mut command: Command) -> Vec<String> {
    // gRPC takes a proxy for loopback too.
    for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy", "all_proxy", "ALL_PROXY"] {
        command.env_remove(variable);
    }
    let output = command.kill_on_drop(true).stdin(Stdio::null()).output();
    let output = timeout(PATIENCE, output).await.expect("a client ends").unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(str::to_owned).collect()
}

/// The same for every language: each field arrives as what it is.
async fn converse(replicas: &Arc<Remembered>, command: Command) {
    let said = said(command).await;
    let expected = [
        format!("create OK {ADDRESS} vm0"),
        "create RESOURCE_EXHAUSTED 1500 as many replicas run as this node allows; try again in 1 s".to_owned(),
        "release OK".to_owned(),
        "release NOT_FOUND - VM setup is not assigned".to_owned(),
        "create INVALID_ARGUMENT - awsSecretAccessKey: it is required with awsAccessKeyID".to_owned(),
        "create INVALID_ARGUMENT - awsAccessKeyID: it is required with awsSecretAccessKey".to_owned(),
        "create INVALID_ARGUMENT - numReplica: 2 at once: a call makes one replica".to_owned(),
        "create INVALID_ARGUMENT - vmType: \"osv\": machines of this node boot linux and nothing else".to_owned(),
        "create INVALID_ARGUMENT - cpu: -1: it must be 1 to 32, or 0 for 1".to_owned(),
    ];
    assert_eq!(said, expected);
    let wish = replicas.wishes()[0].clone();
    assert_eq!((wish.kernel.to_str(), wish.initrd.to_str()), (Some("/a/vmlinux"), Some("/a/initrd")));
    assert_eq!(wish.kernel_args, "quiet --env=A=1");
    assert_eq!(wish.image, Some(PathBuf::from("/a/images/f/image")));
    assert_eq!((wish.inet_dev.as_deref(), wish.name_server.to_string().as_str()), (Some("eth9"), "10.0.0.53"));
    assert_eq!((wish.cpus, wish.memory), (2, 128 << 20));
}

async fn without_tls(client: fn(&Path) -> Command) {
    let Some(clients) = clients() else { return };
    let replicas = Remembered::new(1);
    let node = Node::new(&replicas).await;
    let mut command = client(&clients);
    command.arg(node.address.to_string());
    converse(&replicas, command).await;
    node.end().await;
}

async fn with_tls(client: fn(&Path) -> Command) {
    let Some(clients) = clients() else { return };
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    authority.install(directory.path());
    let (certificate, key) = authority.pair("manager");
    std::fs::write(directory.path().join("client.crt"), certificate).unwrap();
    std::fs::write(directory.path().join("client.key"), key).unwrap();
    let replicas = Remembered::new(1);
    let node = Node::with(Some(&replicas), |params| params.tls = Some(files(directory.path()))).await;
    let mut command = client(&clients);
    command.arg(node.address.to_string());
    command.args(["ca.crt", "client.crt", "client.key"].map(|name| directory.path().join(name)));
    converse(&replicas, command).await;
    node.end().await;
}

#[tokio::test]
async fn a_client_in_python_is_understood() {
    without_tls(python).await;
}

#[tokio::test]
async fn a_client_in_go_is_understood() {
    without_tls(go).await;
}

#[tokio::test]
async fn a_client_in_python_proves_who_it_is() {
    with_tls(python).await;
}

#[tokio::test]
async fn a_client_in_go_proves_who_it_is() {
    with_tls(go).await;
}
