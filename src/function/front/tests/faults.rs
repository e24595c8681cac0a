//! Environments that end, break off, or are not there.

use std::sync::atomic::Ordering;

use super::super::*;
use super::support::*;

#[tokio::test]
async fn a_replica_that_dies_in_a_call_is_502_with_the_exit_reason() {
    let front = start(Limits::default()).await;
    let mut rie = Rie::shut().await;
    let environment = front.environment(rie.address);
    let mut client = front.connect().await;
    client.begin("{}").await;
    within(rie.begun.notified()).await;
    // The connection breaks first; why is known a moment later.
    rie.kill().await;
    environment.lose("exit status 137 (OOMKilled)");
    let got = client.receive().await;
    assert_eq!(got.status, 502);
    let json: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(json["errorType"], "Runtime.ExitError");
    assert!(json["errorMessage"].as_str().unwrap().ends_with("exit status 137 (OOMKilled)"), "{json}");
    assert_eq!(front.pool.outcome().await, Outcome::Lost("exit status 137 (OOMKilled)".into()));
    // Its client's connection is as good as before.
    let next = Rie::open().await;
    front.environment(next.address);
    assert_eq!(client.invoke("x").await.text(), "echo: x");
    assert_eq!(front.calls("Lost"), 1);
}

#[tokio::test]
async fn an_environment_can_be_given_up_while_it_says_nothing() {
    let front = start(Limits::default()).await;
    let rie = Rie::shut().await;
    let environment = front.environment(rie.address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    within(rie.begun.notified()).await;
    environment.lose("removed");
    let got = client.receive().await;
    assert_eq!((got.status, got.text()), (502, "the function ended without an answer: removed\n"));
}

#[tokio::test]
async fn a_connection_that_breaks_for_no_known_reason_says_so() {
    let limits = Limits { exit_wait: Duration::from_millis(10), ..Limits::default() };
    let front = start(limits).await;
    let address = server(|mut client| async move {
        client.head().await;
    })
    .await;
    front.environment(address);
    let got = front.connect().await.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    assert_eq!(got.status, 502);
    assert!(matches!(front.pool.outcome().await, Outcome::Lost(_)));
}

#[tokio::test]
async fn an_environment_that_is_not_there_costs_no_call() {
    let front = start(Limits::default()).await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let rie = Rie::open().await;
    front.environment(rie.address);
    front.environment(nobody);
    assert_eq!(front.connect().await.invoke("x").await.text(), "echo: x");
    assert!(matches!(front.pool.outcome().await, Outcome::Unreachable(_)));
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
    for _ in 0..3 {
        front.environment(nobody);
    }
    // The idle one is the last in the list, so it is out of the way first.
    *front.pool.refusal.lock().unwrap() = None;
    let got = front.connect().await.invoke("x").await;
    assert_eq!(got.status, 502);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_seen_to_do_so() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\nConnection: close\r\n\r\n").await;
    let all = String::from_utf8(client.rest().await).unwrap();
    // Whatever came, no last chunk did.
    assert!(!all.contains("0\r\n\r\n") || all.starts_with("HTTP/1.1 502"), "{all}");
    assert!(matches!(front.pool.outcome().await, Outcome::Lost(_)));
    assert_eq!(front.calls("Lost"), 1);
}

#[tokio::test]
async fn an_endless_answer_is_not_read_on_for_ever() {
    let limits = Limits { linger: Duration::from_millis(50), ..Limits::default() };
    let front = start(limits).await;
    let (sender, mut closed) = tokio::sync::mpsc::channel(1);
    let address = server(move |mut client| {
        let sender = sender.clone();
        async move {
            client.head().await;
            client.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ntick\r\n").await;
            assert_eq!(client.more().await, 0);
            sender.send(()).await.unwrap();
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    client.head().await;
    drop(client);
    assert_eq!(front.pool.outcome().await, Outcome::Dropped);
    within(closed.recv()).await.unwrap();
}

#[tokio::test]
async fn a_protocol_change_that_nobody_asked_for_is_502() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n").await;
        client.more().await;
    })
    .await;
    front.environment(address);
    assert_eq!(front.connect().await.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 502);
    assert!(matches!(front.pool.outcome().await, Outcome::Lost(_)));
}

#[tokio::test]
async fn an_early_answer_is_passed_on_though_the_request_goes_on() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 413 Payload Too Large\r\nContent-Length: 3\r\n\r\nno!").await;
        while client.more().await > 0 {}
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    let got = client.call("POST /up HTTP/1.1\r\nHost: f\r\nContent-Length: 1000000\r\n\r\nbegin").await;
    assert_eq!((got.status, got.text()), (413, "no!"));
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 1);
}
