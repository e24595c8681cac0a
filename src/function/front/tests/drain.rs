//! How a front ends.

use super::super::*;
use super::support::*;

#[tokio::test]
async fn a_drain_lets_calls_end_and_takes_no_new_ones() {
    let front = start(Limits::default()).await;
    let rie = Rie::shut().await;
    front.environment(rie.address);
    let mut idle = front.connect().await;
    let mut busy = front.connect().await;
    busy.begin("a").await;
    within(rie.begun.notified()).await;
    front.drain.send(Some(Instant::now() + PATIENCE)).unwrap();
    assert!(idle.rest().await.is_empty());
    assert!(tokio::net::TcpStream::connect(front.address).await.is_err());
    rie.gate.add_permits(1);
    let got = busy.receive().await;
    assert_eq!((got.text(), got.field("connection")), ("echo: a", Some("close")));
    assert_eq!(within(front.task).await.unwrap().unwrap(), Drained { cut: 0 });
    assert_eq!(front.node.open(), 0);
}

#[tokio::test]
async fn the_deadline_cuts_off_what_is_left() {
    let front = start(Limits::default()).await;
    let (rie, other) = (Rie::shut().await, Rie::shut().await);
    let mut clients = Vec::new();
    for rie in [&rie, &other] {
        front.environment(rie.address);
        let mut client = front.connect().await;
        client.begin("a").await;
        within(rie.begun.notified()).await;
        clients.push(client);
    }
    // One waits for its answer, one has left.
    drop(clients.pop());
    within(async {
        while front.calls("ClientGone") == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    front.drain.send(Some(Instant::now() + PATIENCE)).unwrap();
    // A deadline can be moved.
    front.drain.send(Some(Instant::now())).unwrap();
    assert_eq!(within(front.task).await.unwrap().unwrap(), Drained { cut: 2 });
    assert!(clients[0].rest().await.is_empty());
    assert_eq!([front.pool.outcome().await, front.pool.outcome().await], [Outcome::Dropped, Outcome::Dropped]);
}

#[tokio::test]
async fn a_front_that_is_dropped_closes_everything() {
    let front = start(Limits::default()).await;
    let rie = Rie::shut().await;
    front.environment(rie.address);
    let mut client = front.connect().await;
    client.begin("a").await;
    within(rie.begun.notified()).await;
    front.task.abort();
    assert!(client.rest().await.is_empty());
    // The call itself may go on in the environment, of which the pool hears.
    assert_eq!(front.pool.outcome().await, Outcome::Dropped);
}

#[tokio::test]
async fn a_restarted_front_listens_at_once() {
    let front = start(Limits::default()).await;
    front.environment(mirror().await);
    let mut client = front.connect().await;
    assert_eq!(client.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 200);
    front.task.abort();
    assert!(client.rest().await.is_empty());
    // The front closed first, so its side of the connection lingers in TIME_WAIT.
    let listeners = listen_in(None, vec![front.address]).await.unwrap();
    let again = serve_on(listeners, Limits::default());
    again.environment(mirror().await);
    assert_eq!(again.connect().await.call("GET / HTTP/1.1\r\nHost: f\r\n\r\n").await.status, 200);
}
