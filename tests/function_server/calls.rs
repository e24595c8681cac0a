//! The two calls: what they do, what they refuse, and what is left when somebody vanishes.

use std::sync::Arc;
use std::time::Duration;

use lambdalet::function_server::{Replicas, Supply};
use lambdalet_proto::functionserver::CreateRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{Node, PATIENCE, Remembered, request};

#[tokio::test]
async fn a_replica_is_created_and_released_once() {
    let replicas = Remembered::new(8);
    let node = Node::new(&replicas).await;
    let mut client = node.client().await;
    let (first, second) = (client.create().await.unwrap(), client.create().await.unwrap());
    assert_eq!((first.as_str(), second.as_str()), ("vm0", "vm1"));
    client.release(&first).await.unwrap();
    for unknown in [first.as_str(), "vm7", "", "../vm1", &"x".repeat(1000)] {
        let status = client.release(unknown).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::NotFound, "VM setup is not assigned"), "{unknown}");
    }
    assert_eq!(replicas.events(), ["create vm0 128 MiB", "made vm0", "create vm1 128 MiB", "made vm1", "release vm0"]);
    node.end().await;
    assert_eq!(replicas.count(), 1, "replicas go on when the server ends");
}

#[tokio::test]
async fn bad_input_is_refused_by_the_name_of_its_field_and_reaches_nobody() {
    let replicas = Remembered::new(8);
    let node = Node::new(&replicas).await;
    let mut client = node.client().await.0;
    let text = |text: &str| text.to_owned();
    for (field, bad) in [
        ("kernelImagePath", CreateRequest::default()),
        ("kernelImagePath", CreateRequest { kernel_image_path: text("../vmlinux"), ..request() }),
        ("initrdPath", CreateRequest { initrd_path: text(""), ..request() }),
        ("kernelArgs", CreateRequest { kernel_args: text("quiet\nroot=/dev/sda"), ..request() }),
        ("kernelArgs", CreateRequest { kernel_args: "x".repeat(5000), ..request() }),
        ("imageName", CreateRequest { image_name: text("nginx:1.2"), ..request() }),
        ("imageName", CreateRequest { image_name: "/".repeat(5000), ..request() }),
        ("imageStoragePrefix", CreateRequest { image_storage_prefix: text("images"), ..request() }),
        ("inetDev", CreateRequest { inet_dev: text("eth0; reboot"), ..request() }),
        ("nameServer", CreateRequest { name_server: text("8.8.8"), ..request() }),
        ("awsSecretAccessKey", CreateRequest { aws_access_key_id: text("id"), ..request() }),
        ("awsAccessKeyID", CreateRequest { aws_secret_access_key: text("key"), ..request() }),
        ("cpu", CreateRequest { cpu: i64::MIN, ..request() }),
        ("mem", CreateRequest { mem: i64::MAX, ..request() }),
        ("numReplica", CreateRequest { num_replica: u32::MAX, ..request() }),
        ("vmType", CreateRequest { vm_type: text("osv"), ..request() }),
    ] {
        let status = client.create_replica(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert!(status.message().starts_with(&format!("{field}: ")), "{field}: {status:?}");
    }
    let large = CreateRequest { kernel_args: "x".repeat(200_000), ..request() };
    assert!(client.create_replica(large).await.is_err(), "a message is bounded");
    assert!(replicas.events().is_empty(), "{:?}", replicas.events());
}

#[tokio::test]
async fn what_is_no_grpc_hurts_nobody() {
    let replicas = Remembered::new(8);
    let node = Node::new(&replicas).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        &[0; 100],
    ] {
        let mut tcp = TcpStream::connect(node.address).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        // It says something in its own protocol, or nothing, and hangs up.
        let ended = timeout(PATIENCE, tcp.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "{garbage:?}");
    }
    node.client().await.create().await.unwrap();
}

#[tokio::test]
async fn an_empty_pool_says_when_to_try_again() {
    let replicas = Remembered::new(1);
    let node = Node::new(&replicas).await;
    let mut client = node.client().await;
    let id = client.create().await.unwrap();
    let status = client.create().await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.message(), "as many replicas run as this node allows; try again in 1 s");
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1500");
    client.release(&id).await.unwrap();
    client.create().await.unwrap();
}

#[tokio::test]
async fn without_a_driver_it_says_what_is_missing_until_there_is_one() {
    let node = Node::with(None, |_| {}).await;
    let mut client = node.client().await;
    for status in [client.create().await.unwrap_err(), client.release("vm0").await.unwrap_err()] {
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "there is no driver here"));
    }
    let replicas = Remembered::new(1);
    node.supply.send_replace(Supply::Ready(Arc::clone(&replicas) as Arc<dyn Replicas>));
    assert_eq!(client.create().await.unwrap(), "vm0");
}

#[tokio::test]
async fn a_client_that_vanishes_gives_its_replica_back() {
    let replicas = Remembered::new(1);
    let node = Node::with(Some(&replicas), |params| params.limits.connections = 1).await;
    let mut client = node.abandoned(&replicas).await;
    // What was begun is neither dropped half way nor kept for nobody.
    replicas.happened("release vm0").await;
    assert_eq!(replicas.count(), 0);
    client.create().await.unwrap();
}

#[tokio::test]
async fn a_deadline_that_passes_gives_the_replica_back() {
    let replicas = Remembered::new(1);
    let node = Node::with(Some(&replicas), |params| params.limits.create = Duration::from_millis(50)).await;
    replicas.hold();
    let status = node.client().await.create().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_eq!(replicas.count(), 1, "it goes on being started");
    replicas.go_on();
    replicas.happened("release vm0").await;
    assert_eq!(replicas.count(), 0);
}

#[tokio::test]
async fn no_more_are_started_at_once_than_allowed() {
    let replicas = Remembered::new(8);
    let node = Node::with(Some(&replicas), |params| params.limits.creating = 1).await;
    replicas.hold();
    let mut first = node.client().await;
    let first = tokio::spawn(async move { first.create().await });
    replicas.happened("create vm0 128 MiB").await;
    let mut second = node.client().await;
    let status = second.create().await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.message(), "too many calls are under way; try again in 1 s");
    replicas.go_on();
    first.await.unwrap().unwrap();
    second.create().await.unwrap();
}

#[tokio::test]
async fn connections_are_bounded() {
    let replicas = Remembered::new(8);
    let node = Node::with(Some(&replicas), |params| params.limits.connections = 1).await;
    let mut client = node.client().await;
    client.create().await.unwrap();
    let mut second = TcpStream::connect(node.address).await.unwrap();
    let ended = timeout(PATIENCE, second.read_to_end(&mut Vec::new())).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "it is closed at once: {ended:?}");
    client.create().await.unwrap();
}

#[tokio::test]
async fn a_replica_that_ends_by_itself_gives_its_setup_back() {
    let replicas = Remembered::new(1);
    let node = Node::new(&replicas).await;
    let mut client = node.client().await;
    let id = client.create().await.unwrap();
    replicas.end(&id);
    replicas.happened("release vm0").await;
    assert_eq!(client.release(&id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.create().await.unwrap(), "vm1");
}

#[tokio::test]
async fn a_release_that_fails_is_tried_again_until_it_is_done() {
    let replicas = Remembered::new(1);
    let node = Node::new(&replicas).await;
    let mut client = node.client().await;
    let id = client.create().await.unwrap();
    replicas.stick(3);
    let status = client.release(&id).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    let again = client.release(&id).await.unwrap_err();
    assert_eq!(again.code(), Code::Unavailable, "it is not gone: {again:?}");
    assert!(again.message().contains("still being released"), "{again:?}");
    assert!(again.metadata().contains_key("grpc-retry-pushback-ms"), "{again:?}");
    replicas.happened("release vm0").await;
    assert_eq!(client.release(&id).await.unwrap_err().code(), Code::NotFound, "now it is");
    assert_eq!(replicas.events()[2..], ["stuck vm0", "stuck vm0", "stuck vm0", "release vm0"]);
    assert_eq!(client.create().await.unwrap(), "vm1", "its place is free");

    replicas.stick(usize::MAX);
    client.release("vm1").await.unwrap_err();
    node.end().await;
    assert_eq!(replicas.count(), 1, "the next process tries again");
}

#[tokio::test]
async fn a_server_that_ends_answers_what_is_under_way() {
    let replicas = Remembered::new(8);
    let node = Node::new(&replicas).await;
    replicas.hold();
    let mut client = node.client().await;
    let call = tokio::spawn(async move { client.create().await });
    replicas.happened("create vm0 128 MiB").await;
    let ending = tokio::spawn(node.end());
    replicas.go_on();
    assert_eq!(call.await.unwrap().unwrap(), "vm0");
    ending.await.unwrap();
    assert_eq!(replicas.count(), 1);
}
