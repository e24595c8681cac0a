//! `kubectl logs`, seen from the other end of the connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use jiff::Timestamp;
use lambdalet::runtime::types::{ContainerId, LogChunk, LogSource};
use lambdalet::runtime::{Kind, RuntimeError};

use crate::support::{Node, Setup, eventually};

const LOG: &str = "/containerLogs/ns/p/c";

fn chunk(source: LogSource, time: &str, bytes: impl Into<Bytes>) -> LogChunk {
    LogChunk { source, time: time.parse().unwrap(), line_start: true, bytes: bytes.into() }
}

fn out(bytes: impl Into<Bytes>) -> LogChunk {
    chunk(LogSource::Stdout, "2026-01-02T03:04:05.1Z", bytes)
}

/// Three lines: out, err, out, a second apart.
fn three(node: &Node) {
    node.world.set_log(|| {
        let lines = vec![
            Ok(chunk(LogSource::Stdout, "2026-01-02T03:04:05.000000001Z", "one\n")),
            Ok(chunk(LogSource::Stderr, "2026-01-02T03:04:06Z", "two\n")),
            Ok(chunk(LogSource::Stdout, "2026-01-02T03:04:07.5Z", "three\n")),
        ];
        Ok(stream::iter(lines).boxed())
    });
}

#[tokio::test]
async fn every_option_shows() {
    let node = Node::start(Setup::default()).await;
    three(&node);
    let stamped = "2026-01-02T03:04:05.000000001Z one\n2026-01-02T03:04:06.000000000Z two\n\
                   2026-01-02T03:04:07.500000000Z three\n";
    for (query, wanted) in [
        ("", "one\ntwo\nthree\n"),
        ("?timestamps=true", stamped),
        ("?timestamps=true&limitBytes=50", &stamped[..50]),
        ("?limitBytes=5", "one\nt"),
        ("?limitBytes=1", "o"),
        ("?limitBytes=14", "one\ntwo\nthree\n"),
        ("?limitBytes=99999999999", "one\ntwo\nthree\n"),
        ("?stream=Stdout", "one\nthree\n"),
        ("?stream=Stderr", "two\n"),
        ("?stream=All&tailLines=9", "one\ntwo\nthree\n"),
        ("?sinceTime=2026-01-02T03:04:05.000000001Z", "one\ntwo\nthree\n"),
        ("?sinceTime=2026-01-02T03:04:05.000000002Z", "two\nthree\n"),
        ("?sinceTime=2026-01-02T05%3A04%3A07%2B02%3A00", "three\n"),
        ("?follow=true", "one\ntwo\nthree\n"),
    ] {
        assert_eq!(node.get(&format!("{LOG}{query}")).await, (200, wanted.to_owned()), "{query}");
    }
}

#[tokio::test]
async fn the_runtime_is_asked_for_no_more_than_is_wanted() {
    let node = Node::start(Setup::default()).await;
    three(&node);
    let before = Timestamp::now();
    node.get(&format!("{LOG}?follow=1&previous=true&tailLines=0&sinceSeconds=60")).await;
    let (id, options) = node.world.asked.lock().unwrap().clone().unwrap();
    assert_eq!(id, ContainerId::from("before"));
    assert!(options.follow);
    assert_eq!(options.tail, Some(0));
    let ago = before.as_second() - options.since.unwrap().as_second();
    assert!((58..=60).contains(&ago), "{ago}");
}

#[tokio::test]
async fn errors_have_the_status_and_words_of_their_kind() {
    let node = Node::start(Setup::default()).await;
    three(&node);
    for (path, status, words) in [
        ("/containerLogs/ns/none/c", 404, "pod \"none\" not found"),
        ("/containerLogs/other/p/c", 404, "pod \"p\" not found"),
        ("/containerLogs/ns/p/none", 404, "container \"none\" not found in pod \"p\""),
        ("/containerLogs/ns/p/new", 400, "waiting to start: ContainerCreating"),
        ("/containerLogs/ns/p/new?previous=true", 400, "previous terminated container \"new\""),
        ("/containerLogs/ns/p/c?tailLines=x", 400, "tailLines"),
        ("/containerLogs/ns/p/c?sinceTime=now", 400, "sinceTime"),
        ("/containerLogs/ns/p/c?tailLines=-1", 422, "tailLines"),
        ("/containerLogs/ns/p/c?limitBytes=0", 422, "limitBytes"),
        ("/containerLogs/ns/p/c?sinceSeconds=1&sinceTime=2026-01-02T03:04:05Z", 422, "at most one"),
        ("/containerLogs/ns/none/c?sinceSeconds=-1", 422, "sinceSeconds"),
    ] {
        let (answered, body) = node.get(path).await;
        assert_eq!(answered, status, "{path}: {body}");
        assert!(body.contains(words), "{path}: {body}");
    }
    for (kind, status) in [
        (Kind::NotFound, 404),
        (Kind::Invalid, 400),
        (Kind::Unsupported, 501),
        (Kind::Unavailable, 503),
        (Kind::Internal, 500),
    ] {
        node.world.set_log(move || Err(RuntimeError::new(kind, "the engine says no")));
        let (answered, body) = node.get(LOG).await;
        assert_eq!(answered, status);
        assert!(body.contains("container \"c\" in pod \"p\"") && body.contains("the engine says no"), "{body}");
    }
}

#[tokio::test]
async fn following_delivers_each_line_as_it_comes_and_ends_with_the_log() {
    let node = Node::start(Setup::default()).await;
    let (sender, receiver) = tokio::sync::mpsc::channel::<LogChunk>(1);
    let receiver = std::sync::Mutex::new(Some(receiver));
    node.world.set_log(move || {
        let receiver = receiver.lock().unwrap().take().unwrap();
        Ok(tokio_stream::wrappers::ReceiverStream::new(receiver).map(Ok).boxed())
    });
    let mut client = node.api_server().await;
    let mut body = client.open(&format!("{LOG}?follow=true"), None).await.unwrap().into_body();
    for line in ["a\n", "b\n"] {
        sender.send(out(line)).await.unwrap();
        let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.unwrap();
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), line);
    }
    drop(sender);
    assert!(tokio::time::timeout(Duration::from_secs(10), body.frame()).await.unwrap().is_none());
    // The connection is good for the next request.
    assert_eq!(client.status("/healthz", None).await, 200);
}

/// An endless log that counts what was taken from it, and notes its end.
fn endless(node: &Node, size: usize) -> (Arc<AtomicUsize>, Arc<AtomicBool>) {
    let (taken, dropped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counter, flag) = (taken.clone(), dropped.clone());
    let line = Bytes::from(vec![b'x'; size]);
    node.world.set_log(move || {
        let (counter, note, line) = (counter.clone(), Note(flag.clone()), line.clone());
        let lines = stream::repeat_with(move || {
            let _ = &note;
            counter.fetch_add(line.len(), Ordering::SeqCst);
            Ok(out(line.clone()))
        });
        Ok(lines.boxed())
    });
    (taken, dropped)
}

struct Note(Arc<AtomicBool>);

impl Drop for Note {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_slow_reader_holds_the_log_back() {
    let node = Node::start(Setup::default()).await;
    let (taken, dropped) = endless(&node, 64 << 10);
    let mut client = node.api_server().await;
    let body = client.open(LOG, None).await.unwrap().into_body();
    // Until nothing moves: what the sockets and the two ends hold.
    let mut before = usize::MAX;
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = taken.load(Ordering::SeqCst);
        if now == before {
            break;
        }
        before = now;
    }
    assert_eq!(taken.load(Ordering::SeqCst), before);
    assert!(before < 16 << 20, "{before} bytes taken for a client that reads none");
    assert_eq!(node.get("/healthz").await.0, 200);
    assert!(!dropped.load(Ordering::SeqCst));
    drop((body, client));
    assert!(eventually(2, || dropped.load(Ordering::SeqCst)).await);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_runtimes_stream_at_once() {
    let node = Node::start(Setup::default()).await;
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = dropped.clone();
    node.world.set_log(move || {
        let note = Note(flag.clone());
        let silent = stream::poll_fn(move |_| {
            let _ = &note;
            std::task::Poll::Pending
        });
        Ok(silent.boxed())
    });
    let mut client = node.api_server().await;
    let body = client.open(&format!("{LOG}?follow=true"), None).await.unwrap().into_body();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!dropped.load(Ordering::SeqCst));
    drop((body, client));
    assert!(eventually(10, || dropped.load(Ordering::SeqCst)).await);
}

#[tokio::test]
async fn long_lines_and_any_byte_arrive_intact() {
    let node = Node::start(Setup::default()).await;
    let mut long: Vec<u8> = (0..10usize << 20).map(|index| (index * 7 % 251) as u8).collect();
    long.push(b'\n');
    let every: Vec<u8> = (0..=255).collect();
    let (first, second) = (Bytes::from(long), Bytes::from(every));
    let wanted = [&first[..], &second[..], &first[..]].concat();
    node.world.set_log(move || {
        // The long line once whole and once in the parts an engine cuts it into.
        let mut chunks = vec![Ok(out(first.clone())), Ok(out(second.clone()))];
        let parts = (0..first.len()).step_by(16 << 10).map(|from| {
            let bytes = first.slice(from..first.len().min(from + (16 << 10)));
            Ok(LogChunk { line_start: from == 0, ..out(bytes) })
        });
        chunks.extend(parts);
        Ok(stream::iter(chunks).boxed())
    });
    let (status, body) = node.api_server().await.get(LOG, None).await.unwrap();
    assert_eq!(status, 200);
    assert!(body == wanted, "{} of {} bytes", body.len(), wanted.len());
    let (_, body) = node.api_server().await.get(&format!("{LOG}?limitBytes=10485000"), None).await.unwrap();
    assert!(body == wanted[..10_485_000]);
}

#[tokio::test]
async fn a_log_that_breaks_off_does_not_look_complete() {
    let node = Node::start(Setup::default()).await;
    node.world.set_log(|| {
        let broken = RuntimeError::new(Kind::Unavailable, "engine went away");
        Ok(stream::iter(vec![Ok(out("a\n")), Err(broken)]).boxed())
    });
    let mut client = node.api_server().await;
    let mut body = client.open(LOG, None).await.unwrap().into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "a\n");
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test]
async fn a_followed_log_does_not_hold_up_shutdown() {
    let mut node = Node::start(Setup::default()).await;
    let (_, dropped) = endless(&node, 10);
    let mut client = node.api_server().await;
    let _body = client.open(LOG, None).await.unwrap();
    node.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(4), node.tasks.join_next()).await;
    assert!(ended.unwrap().unwrap().is_ok());
    assert!(dropped.load(Ordering::SeqCst));
}

#[tokio::test]
async fn two_hundred_followers_each_get_every_line() {
    let node = Node::start(Setup::default()).await;
    let (sender, _) = tokio::sync::broadcast::channel::<LogChunk>(16);
    let source = sender.clone();
    node.world.set_log(move || {
        let lines = stream::unfold(source.subscribe(), async |mut lines| Some((Ok(lines.recv().await.ok()?), lines)));
        Ok(lines.boxed())
    });
    let mut followers = Vec::new();
    for _ in 0..200 {
        let mut client = node.api_server().await;
        let body = client.open(&format!("{LOG}?follow=true&timestamps=true"), None).await.unwrap().into_body();
        followers.push((client, body));
    }
    sender.send(out("hello\n")).unwrap();
    for (_, body) in &mut followers {
        let frame = tokio::time::timeout(Duration::from_secs(5), body.frame()).await.unwrap();
        let text = frame.unwrap().unwrap().into_data().unwrap();
        assert_eq!(text, "2026-01-02T03:04:05.100000000Z hello\n");
    }
    // Who follows does not keep others from asking, and who leaves leaves nothing.
    assert_eq!(node.get("/healthz").await.0, 200);
    drop(followers);
    assert!(eventually(2, || sender.receiver_count() == 0).await);
}
