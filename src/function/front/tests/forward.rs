//! What HTTP says a gateway does, seen on the wire.

use std::io::{Read as _, Write as _};
use std::sync::atomic::Ordering;

use super::super::*;
use super::support::*;

#[tokio::test]
async fn a_call_reaches_the_environment_with_its_own_fields_only() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    let got = client
        .call("GET /a/b?c=d HTTP/1.1\r\nHost: example.test\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nX-Theirs: 2\r\nKeep-Alive: 1\r\n\r\n")
        .await;
    assert_eq!(got.status, 200);
    assert_eq!(
        got.text(),
        "GET /a/b?c=d HTTP/1.1\r\nhost: example.test\r\nx-theirs: 2\r\nx-forwarded-for: 127.0.0.1\r\n\r\n"
    );
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
    assert_eq!(front.calls("Answered"), 1);
}

#[tokio::test]
async fn connections_on_both_sides_serve_call_after_call() {
    let front = start(Limits::default()).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    for n in 0..50 {
        assert_eq!(client.invoke(&n.to_string()).await.text(), format!("echo: {n}"));
    }
    assert_eq!(rie.connections.load(Ordering::SeqCst), 1);
    assert!(!rie.crashed.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_costs_no_call() {
    let front = start(Limits::default()).await;
    let closed = Arc::new(tokio::sync::Notify::new());
    let server_closed = closed.clone();
    // Says nothing of closing, and closes.
    let address = server(move |mut client| {
        let closed = server_closed.clone();
        async move {
            client.head().await;
            client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
            drop(client);
            closed.notify_one();
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    for _ in 0..5 {
        assert_eq!(client.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.text(), "ok");
        within(closed.notified()).await;
    }
    for _ in 0..5 {
        assert_eq!(front.pool.outcome().await, Outcome::Answered);
    }
}

#[tokio::test]
async fn a_close_that_the_runtime_has_not_seen_costs_no_call() {
    let front = start(Limits::default()).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    front.environment(listener.local_addr().unwrap());
    let (close, closes) = std::sync::mpsc::channel();
    let (say, closed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 1024];
            assert!(stream.read(&mut head).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
            if closes.recv().is_err() {
                return;
            }
            drop(stream);
            say.send(()).unwrap();
        }
    });
    // Between two calls the server closes, and the runtime has no time to look at its sockets.
    let mut calls = 0;
    let before = move || {
        calls += 1;
        if calls > 1 {
            close.send(()).unwrap();
            // Not for ever: a lost call leaves the server waiting for a connection.
            let _ = closed.recv_timeout(Duration::from_secs(2));
        }
    };
    *front.pool.before.lock().unwrap() = Some(Box::new(before));
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\n\r\n".repeat(5)).await;
    for _ in 0..5 {
        assert_eq!(client.receive().await.status, 200);
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    let requests: String = (0..10).map(|n| format!("GET /{n} HTTP/1.1\r\nHost: f\r\n\r\n")).collect();
    client.send(requests).await;
    for n in 0..10 {
        let got = client.receive().await;
        assert!(got.text().starts_with(&format!("GET /{n} ")), "{}", got.text());
    }
}

#[tokio::test]
async fn an_old_client_gets_an_answer_that_ends_with_its_connection() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        let head = client.head().await;
        assert!(head.starts_with("GET / HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("\r\nhost: 127.0.0.1:"), "{head}");
        client.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
        tokio::task::yield_now().await;
        client.send("3\r\ndef\r\n0\r\n\r\n").await;
        client.more().await;
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let all = String::from_utf8(client.rest().await).unwrap();
    assert!(all.starts_with("HTTP/1.0 200 OK\r\n"), "{all}");
    assert!(all.ends_with("\r\n\r\nabcdef"), "{all}");
    assert!(!all.to_lowercase().contains("chunked"), "{all}");
}

#[tokio::test]
async fn an_old_server_is_no_reason_to_close() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end").await;
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    for _ in 0..2 {
        let got = client.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
        assert_eq!((got.text(), got.field("server")), ("until the end", Some("old")));
        assert!(got.head.starts_with("HTTP/1.1 200"), "{}", got.head);
    }
}

#[tokio::test]
async fn head_answers_keep_their_length_and_have_no_body() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        loop {
            let head = client.head().await;
            let body = if head.starts_with("HEAD") { "" } else { "hello" };
            client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{body}")).await;
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("HEAD / HTTP/1.1\r\nHost: f\r\n\r\nGET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    let head = client.head().await;
    assert!(head.to_lowercase().contains("\r\ncontent-length: 5\r\n"), "{head}");
    assert_eq!(client.receive().await.text(), "hello");
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
}

#[tokio::test]
async fn answers_stream_as_they_come() {
    let front = start(Limits::default()).await;
    let (next, gate) = (Arc::new(tokio::sync::Semaphore::new(0)), Arc::new(tokio::sync::Notify::new()));
    let (server_next, server_gate) = (next.clone(), gate.clone());
    let address = server(move |mut client| {
        let (next, gate) = (server_next.clone(), server_gate.clone());
        async move {
            client.head().await;
            client.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
            for _ in 0..3 {
                client.send("4\r\ntick\r\n").await;
                gate.notify_one();
                next.acquire().await.unwrap().forget();
            }
            client.send("0\r\n\r\n").await;
            client.more().await;
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await;
    client.head().await;
    for _ in 0..3 {
        // The server sends the next only when the client has this one.
        assert_eq!(client.exactly(9).await, b"4\r\ntick\r\n");
        assert!(front.pool.is_idle());
        next.add_permits(1);
    }
    assert_eq!(client.exactly(5).await, b"0\r\n\r\n");
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
}

#[tokio::test]
async fn requests_stream_as_they_come_with_their_trailers() {
    let front = start(Limits::default()).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let address = server(move |mut client| {
        let sender = sender.clone();
        async move {
            sender.send(client.head().await).await.unwrap();
            loop {
                let line = client.line().await;
                sender.send(line.clone()).await.unwrap();
                if line == "\r\n" {
                    break;
                }
            }
            client
                .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n")
                .await;
            client.more().await;
        }
    })
    .await;
    front.environment(address);
    let mut receiver = receiver;
    let mut client = front.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: f\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nTrailer: x-end\r\n\r\n";
    client.send(head).await;
    let got = within(receiver.recv()).await.unwrap();
    assert!(got.contains("transfer-encoding: chunked") && got.contains("te: trailers"), "{got}");
    client.send("3\r\nabc\r\n").await;
    assert_eq!(within(receiver.recv()).await.unwrap(), "3\r\n");
    assert_eq!(within(receiver.recv()).await.unwrap(), "abc\r\n");
    client.send("0\r\nX-End: 1\r\n\r\n").await;
    let mut rest = String::new();
    while !rest.ends_with("\r\n\r\n") {
        rest += &within(receiver.recv()).await.unwrap();
    }
    assert_eq!(rest, "0\r\nx-end: 1\r\n\r\n");
    client.head().await;
    assert_eq!(client.exactly(7).await, b"2\r\nok\r\n");
    let mut rest = client.line().await;
    while !rest.ends_with("\r\n\r\n") {
        rest += &client.line().await;
    }
    assert_eq!(rest, "0\r\nx-sum: 7\r\n\r\n");
}

#[tokio::test]
async fn a_client_that_waits_to_be_told_is_told_when_an_environment_wants_its_body() {
    let front = start(Limits::default()).await;
    let mut client = front.connect().await;
    let head = format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    client.send(&head).await;
    within(front.pool.waits.notified()).await;
    let rie = Rie::open().await;
    front.environment(rie.address);
    assert_eq!(client.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(client.call("hi").await.text(), "echo: hi");
    // And one who gets no environment need not send it.
    let refusal = TryAgain { reason: Reason::QueueFull, retry_after: Duration::from_secs(3) };
    *front.pool.refusal.lock().unwrap() = Some(refusal);
    let got = client.call(&head).await;
    assert_eq!((got.status, got.field("retry-after")), (429, Some("3")));
}

#[tokio::test]
async fn an_upgraded_connection_carries_bytes_both_ways_and_holds_its_lease() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        let head = client.head().await;
        assert!(head.contains("upgrade: echo") && head.contains("connection: upgrade"), "{head}");
        // The first bytes of the new protocol come with the answer's head.
        client.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello").await;
        loop {
            let bytes = client.exactly(4).await;
            client.send(bytes).await;
        }
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    client.send("GET /chat HTTP/1.1\r\nHost: f\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("upgrade: echo"), "{head}");
    assert_eq!(client.exactly(5).await, b"hello");
    for word in ["ping", "pong"] {
        client.send(word).await;
        assert_eq!(client.exactly(4).await, word.as_bytes());
    }
    assert!(front.pool.is_idle());
    assert_eq!(front.node.open(), 1);
    drop(client);
    assert_eq!(front.pool.outcome().await, Outcome::Answered);
}

#[tokio::test]
async fn a_refused_upgrade_is_an_ordinary_answer() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    let got = client.call("GET / HTTP/1.1\r\nHost: f\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").await;
    assert_eq!(got.status, 200);
    assert_eq!(client.call("GET /2 HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 200);
}

#[tokio::test]
async fn two_lengths_or_two_hosts_reach_no_environment() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    for head in [
        "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "GET / HTTP/1.1\r\nHost: f\r\nHost: g\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: f\r\nNot a field\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: f\r\nTransfer-Encoding: gzip\r\n\r\n",
    ] {
        let mut client = front.connect().await;
        assert_eq!(client.call(head).await.status, 400, "{head:?}");
    }
    let mut client = front.connect().await;
    assert_eq!(client.call("CONNECT f:1 HTTP/1.1\r\nHost: f:1\r\n\r\n").await.status, 501);
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_length_beside_chunks_is_not_passed_on() {
    let front = start(Limits::default()).await;
    let address = server(|mut client| async move {
        let head = client.head().await.to_lowercase();
        assert!(head.contains("chunked") != head.contains("content-length"), "{head}");
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok").await;
    })
    .await;
    front.environment(address);
    let mut client = front.connect().await;
    let text =
        "POST / HTTP/1.1\r\nHost: f\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
    client.send(text).await;
    // Either it is taken as chunks alone or not at all (RFC 9112, 6.3).
    let got = client.receive().await;
    assert!(matches!(got.status, 200 | 400), "{}", got.head);
}

#[tokio::test]
async fn who_begins_with_http_2_is_left_and_wakes_nothing() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(client.rest().await.is_empty(), "no HTTP/1.1 to who would not understand it");
    assert_eq!(front.pool.leased.load(Ordering::SeqCst), 0);
}
