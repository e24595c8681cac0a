//! The Lambda path: what the RIE needs and what it cannot do.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::*;
use super::support::*;

#[tokio::test]
async fn never_two_calls_in_one_environment() {
    let front = start(Limits::default()).await;
    let mut servers = Vec::new();
    for _ in 0..4 {
        let rie = Rie::open().await;
        front.environment(rie.address);
        servers.push(rie);
    }
    let clients: Vec<_> = (0..40)
        .map(|n| {
            let address = front.address;
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                for call in 0..25 {
                    let got = client.invoke(&format!("{n}-{call}")).await;
                    assert_eq!((got.status, got.text()), (200, format!("echo: {n}-{call}").as_str()));
                }
            })
        })
        .collect();
    for client in clients {
        within(client).await.unwrap();
    }
    let invoked: usize = servers.iter().map(|rie| rie.invoked.load(Ordering::SeqCst)).sum();
    assert_eq!(invoked, 1000);
    assert!(servers.iter().all(|rie| !rie.crashed.load(Ordering::SeqCst)));
    assert_eq!(front.calls("Answered"), 1000);
}

#[tokio::test]
async fn a_client_that_leaves_does_not_free_its_environment_before_the_call_has_ended() {
    let front = start(Limits::default()).await;
    let rie = Rie::shut().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    client.begin("a").await;
    within(rie.begun.notified()).await;
    drop(client);
    let mut next = front.connect().await;
    next.begin("b").await;
    within(async {
        while front.pool.waiting.load(Ordering::SeqCst) == 0 || front.calls("ClientGone") == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(rie.invoked.load(Ordering::SeqCst), 1);
    rie.gate.add_permits(2);
    assert_eq!(front.pool.outcome().await, Outcome::ClientGone);
    assert_eq!(next.receive().await.text(), "echo: b");
    assert!(!rie.crashed.load(Ordering::SeqCst));
    assert_eq!((front.calls("ClientGone"), front.calls("Answered")), (1, 1));
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_takes_no_environment() {
    let front = start(Limits::default()).await;
    let mut client = front.connect().await;
    client.begin("a").await;
    within(front.pool.waits.notified()).await;
    drop(client);
    within(async {
        while front.pool.waiting.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
    assert_eq!(front.calls("ClientGone"), 1);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_its_payload_invokes_nothing() {
    let front = start(Limits::default()).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    client.send(format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: 9\r\n\r\nhalf")).await;
    within(async {
        while front.pool.leased.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(client);
    assert_eq!(front.pool.outcome().await, Outcome::CutOff { begun: false });
    assert_eq!(front.connect().await.invoke("x").await.text(), "echo: x");
    assert_eq!(rie.invoked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_payload_above_the_limit_is_413_and_one_at_the_limit_is_not() {
    let front = start(Limits::default()).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let most = usize::try_from(LAMBDA_PAYLOAD).unwrap();
    let mut client = front.connect().await;
    let got = client.invoke(&"x".repeat(most)).await;
    assert_eq!((got.status, got.body.len()), (200, most + 6));
    let got = client.invoke(&"x".repeat(most + 1)).await;
    assert_eq!(got.status, 413);
    let json: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(json["errorType"], "RequestEntityTooLarge");
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 1);
    assert_eq!(rie.invoked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_payload_of_unknown_length_is_cut_off_at_the_limit() {
    let front = start(Limits::default()).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    client.send(format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nTransfer-Encoding: chunked\r\n\r\n")).await;
    let chunk = format!("100000\r\n{}\r\n", "x".repeat(1 << 20));
    for _ in 0..7 {
        client.send(&chunk).await;
    }
    client.send("0\r\n\r\n").await;
    assert_eq!(client.receive().await.status, 413);
    assert_eq!(front.pool.outcome().await, Outcome::CutOff { begun: false });
    assert_eq!(rie.invoked.load(Ordering::SeqCst), 0);
    assert_eq!(front.connect().await.invoke("x").await.text(), "echo: x");
}

#[tokio::test]
async fn a_refusal_has_lambdas_shape() {
    let front = start(Limits::default()).await;
    let mut client = front.connect().await;
    for (reason, status) in [(Reason::Deadline, 429), (Reason::CannotStart("no image".into()), 503)] {
        *front.pool.refusal.lock().unwrap() = Some(TryAgain { reason, retry_after: Duration::ZERO });
        let got = client.invoke("{}").await;
        assert_eq!((got.status, got.field("retry-after")), (status, Some("1")));
        let json: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
        assert!(json["errorType"].is_string() && json["errorMessage"].is_string(), "{json}");
    }
    assert_eq!((front.calls("Busy"), front.calls("Unavailable")), (1, 1));
}

/// An emulator with managed concurrency whose runtime is not ready for the first `refused` calls it is sent.
async fn managed(refused: usize) -> (std::net::SocketAddr, Arc<Mutex<Vec<usize>>>) {
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let seen = sizes.clone();
    let address = server(move |mut client| {
        let seen = seen.clone();
        async move {
            while let Ok(head) = next_head(&mut client).await {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let payload = client.exactly(length.unwrap()).await;
                let calls = {
                    let mut seen = seen.lock().unwrap();
                    seen.push(payload.len());
                    seen.len()
                };
                let answer = if calls <= refused {
                    "HTTP/1.1 400 Bad Request\r\nError-Type: Runtime.Unavailable\r\nContent-Length: 2\r\n\r\n{}"
                        .to_owned()
                } else {
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", payload.len(), "y".repeat(payload.len()))
                };
                client.send(answer).await;
            }
        }
    })
    .await;
    (address, sizes)
}

/// The next head, or nothing when the connection ends.
async fn next_head(client: &mut Client) -> Result<String, ()> {
    if client.ended().await { Err(()) } else { Ok(client.head().await) }
}

#[tokio::test]
async fn a_call_that_a_managed_runtime_is_not_ready_for_is_sent_again_until_it_is() {
    let front = start(Limits::default()).await;
    let (address, sizes) = managed(3).await;
    front.environment(address);
    let payload = "x".repeat(200 << 10);
    let got = front.connect().await.invoke(&payload).await;
    assert_eq!((got.status, got.body.len()), (200, payload.len()));
    assert_eq!(*sizes.lock().unwrap(), [payload.len(); 4]);
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
    assert!(front.pool.is_idle(), "it ended once");
    assert_eq!(front.calls("Answered"), 1);
}

#[tokio::test]
async fn a_managed_runtime_that_does_not_become_ready_costs_the_call_and_not_the_environment() {
    let front = start(Limits { ready_wait: Duration::from_millis(30), ..Limits::default() }).await;
    let (address, sizes) = managed(usize::MAX).await;
    front.environment(address);
    let got = front.connect().await.invoke("{}").await;
    assert_eq!((got.status, got.field("retry-after")), (503, Some("1")));
    assert!(got.text().contains("asked for no other call"), "{}", got.text());
    assert!(sizes.lock().unwrap().len() > 1);
    assert_eq!(front.pool.outcome().await, Outcome::CutOff { begun: false });
    assert_eq!(front.calls("Unavailable"), 1);
}

#[tokio::test]
async fn a_payload_too_large_to_be_kept_is_sent_once() {
    let front = start(Limits::default()).await;
    let (address, sizes) = managed(1).await;
    front.environment(address);
    let large = "x".repeat(1 << 20);
    let mut client = front.connect().await;
    assert_eq!(client.invoke(&large).await.status, 503);
    assert_eq!(client.invoke(&large).await.status, 200);
    assert_eq!(*sizes.lock().unwrap(), [large.len(); 2]);
}
