//! Clients that take time, room or places.

use std::sync::atomic::Ordering;

use super::super::*;
use super::support::*;

const SHORT: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_connection_without_bytes_takes_no_lease() {
    let limits = Limits { idle_timeout: SHORT, ..Limits::default() };
    let front = start(limits).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    for _ in 0..10 {
        drop(front.connect().await);
    }
    assert!(front.connect().await.rest().await.is_empty());
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
    assert_eq!(rie.connections.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_off() {
    let limits = Limits { head_timeout: SHORT, ..Limits::default() };
    let front = start(limits).await;
    let client = front.connect().await;
    let began = Instant::now();
    let trickle = async {
        loop {
            if client.stream.writable().await.is_err() || client.stream.try_write(b"X").is_err() {
                break;
            }
            let mut byte = [0; 1];
            match timeout(Duration::from_millis(10), client.stream.readable()).await {
                Ok(_) if matches!(client.stream.try_read(&mut byte), Ok(0) | Err(_)) => break,
                _ => {}
            }
        }
    };
    within(trickle).await;
    assert!(began.elapsed() >= SHORT);
    within(async {
        while !front.counted("lambdalet_function_connections_lost_total{reason=\"SlowHead\"} 1") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_second_request_may_come_later_than_a_head_may_take() {
    let limits = Limits { head_timeout: SHORT, ..Limits::default() };
    let front = start(limits).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    tokio::time::sleep(3 * SHORT).await;
    assert_eq!(client.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 200);
    tokio::time::sleep(3 * SHORT).await;
    assert_eq!(client.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 200);
}

#[tokio::test]
async fn a_long_call_outlives_every_time_out() {
    let limits = Limits {
        head_timeout: SHORT,
        body_timeout: SHORT,
        idle_timeout: SHORT,
        write_timeout: SHORT,
        linger: SHORT,
        ..Limits::default()
    };
    let front = start(limits).await;
    let rie = Rie::shut().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    client.begin("a").await;
    within(rie.begun.notified()).await;
    tokio::time::sleep(5 * SHORT).await;
    rie.gate.add_permits(1);
    assert_eq!(client.receive().await.text(), "echo: a");
}

#[tokio::test]
async fn a_payload_that_does_not_come_is_408_and_takes_no_environment() {
    let limits = Limits { body_timeout: SHORT, ..Limits::default() };
    let front = start(limits).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let head = format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: 9\r\n\r\n");
    assert_eq!(front.connect().await.call(&head).await.status, 408);
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
    // One that stops half-way does, until it is late.
    assert_eq!(front.connect().await.call(head + "half").await.status, 408);
    assert_eq!(front.pool.outcome().await, Outcome::CutOff { begun: false });
    assert_eq!(front.connect().await.invoke("x").await.text(), "echo: x");
    assert_eq!(front.calls("Refused"), 2);
}

#[tokio::test]
async fn a_client_that_takes_no_answer_is_held_to_have_left() {
    let limits = Limits { write_timeout: SHORT, ..Limits::default() };
    let front = start(limits).await;
    let address = server(|mut client| async move {
        client.head().await;
        let length = 256 << 20;
        client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")).await;
        for _ in 0..length >> 16 {
            client.send([0; 1 << 16]).await;
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    // The environment is read on, so it is soon free again.
    assert_eq!(front.pool.outcome().await, Outcome::ClientGone);
    assert_eq!(front.calls("ClientGone"), 1);
}

#[tokio::test]
async fn header_bombs_are_431_and_bogus_paths_leave_nothing_behind() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let bomb = format!("GET / HTTP/1.1\r\nHost: f\r\nX: {}\r\n\r\n", "y".repeat(70 << 10));
    assert_eq!(front.connect().await.call(bomb).await.status, 431);
    let many: String = (0..200).map(|n| format!("X-{n}: 1\r\n")).collect();
    assert_eq!(front.connect().await.call(format!("GET / HTTP/1.1\r\nHost: f\r\n{many}\r\n")).await.status, 431);
    let mut client = front.connect().await;
    let before = front.metrics.encode().unwrap().lines().count();
    for n in 0..500 {
        assert_eq!(client.call(format!("GET /{n}?{n} HTTP/1.1\r\nHost: f{n}\r\n\r\n")).await.status, 200);
    }
    assert_eq!(front.metrics.encode().unwrap().lines().count(), before);
}

#[tokio::test]
async fn an_idle_connection_gives_way_and_a_busy_one_does_not() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let front = start(limits).await;
    let rie = Rie::shut().await;
    front.environment(rie.address);
    let mut busy = front.connect().await;
    busy.begin("a").await;
    within(rie.begun.notified()).await;
    let mut idle = front.connect().await;
    let mut second = front.connect().await;
    assert!(idle.rest().await.is_empty());
    second.begin("b").await;
    within(async {
        while front.pool.waiting.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let got = front.connect().await.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    assert_eq!((got.status, got.field("retry-after"), got.field("connection")), (503, Some("1"), Some("close")));
    rie.gate.add_permits(2);
    assert_eq!(busy.receive().await.text(), "echo: a");
    assert_eq!(second.receive().await.text(), "echo: b");
}

#[tokio::test]
async fn ten_times_too_much_is_answered_and_nothing_is_left() {
    let limits = Limits { connections: 50, ..Limits::default() };
    let front = start(limits).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let clients: Vec<_> = (0..500)
        .map(|_| {
            let address = front.address;
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let request = format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: 1\r\n\r\nx");
                let _ = client.stream.try_write(request.as_bytes());
                String::from_utf8_lossy(&client.some().await).split(' ').nth(1).map(str::to_owned)
            })
        })
        .collect();
    let mut answers = std::collections::BTreeMap::<_, usize>::new();
    for client in clients {
        *answers.entry(within(client).await.unwrap()).or_default() += 1;
    }
    let answered = answers.get(&Some("200".to_owned())).copied().unwrap_or(0);
    assert!(answered >= 50, "{answers:?}");
    let known = [None, Some("200".to_owned()), Some("503".to_owned())];
    assert!(answers.keys().all(|answer| known.contains(answer)), "{answers:?}");
    assert_eq!(rie.invoked.load(Ordering::SeqCst), answered);
    assert!(!rie.crashed.load(Ordering::SeqCst));
    within(async {
        while front.node.open() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
