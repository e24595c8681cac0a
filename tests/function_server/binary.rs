//! The program as an operator starts it.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lambdalet_proto::functionserver::function_client::FunctionClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::support::{Client, PATIENCE};

/// Ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Not at once: it takes its mounts away.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_node_without_a_pool_says_so_to_whoever_wants_a_replica() {
    if !geteuid().is_root() {
        println!("skipped: a node mounts a directory for secrets, which takes root");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("pods")).unwrap();
    let mut ports = Vec::new();
    for _ in 0..2 {
        ports.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let ports: Vec<u16> = ports.into_iter().map(|listener| listener.local_addr().unwrap().port()).collect();
    let path = |name: &str| root.path().join(name).display().to_string();
    let child = Command::new(env!("CARGO_BIN_EXE_lambdalet"))
        .args(["run", "--runtime", "fake", "--node-name", "alone", "--node-ip", "192.0.2.1", "--address", "127.0.0.1"])
        .args(["--pod-manifest-path", &path("pods"), "--root-dir", &path("root"), "--pod-cidr", "10.187.0.0/24"])
        .args(["--port", &ports[0].to_string(), "--drain-on-exit"])
        .env("FUNCTIONSERVER_PORT", ports[1].to_string())
        .env_remove("KUBECONFIG")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut process = Process(child.unwrap());
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", ports[1])).unwrap();
    let connected = timeout(PATIENCE, async {
        loop {
            match endpoint.connect().await {
                Ok(channel) => return channel,
                Err(error) => {
                    let ended = process.0.try_wait().unwrap();
                    assert!(ended.is_none(), "the node ended: {ended:?}, {error}");
                    // There is no event for "it listens now" in another process.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    });
    let mut client = Client(FunctionClient::new(connected.await.expect("it listens")));
    let told = timeout(PATIENCE, async {
        loop {
            let status = client.create().await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            if status.message() != "the node is starting" {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let status = told.await.expect("it knows some time");
    assert!(status.message().contains("it has no Pod network"), "{status:?}");
}
