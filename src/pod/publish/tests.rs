//! Who waits for whom when the API server does not take statuses.

use std::convert::Infallible;

use http::{Request, Response, StatusCode};
use kube::client::Body;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::shutdown::owned;

/// How long anything may take that should happen at once.
const SOON: Duration = Duration::from_secs(5);

/// A publisher at work, and what it has asked for. Requests for Pods named `stuck` fail, those for `slow` ones wait for
/// `go`.
struct AtWork {
    publisher: Publisher,
    asked: mpsc::Receiver<String>,
    go: watch::Sender<bool>,
    _run: AbortOnDropHandle<()>,
}

impl AtWork {
    fn new() -> Self {
        let (path, asked) = mpsc::channel(64);
        let (go, goes) = watch::channel(false);
        let service = tower::service_fn(move |request: Request<Body>| {
            let name =
                request.uri().path().trim_end_matches("/status").rsplit('/').next().unwrap_or_default().to_owned();
            let _ = path.try_send(name.clone());
            answer(name, goes.clone())
        });
        let publisher = Publisher::new(kube::Client::new(service, "default"), PublishCounters::default());
        let running = publisher.clone();
        let run = owned(async move { running.run(CancellationToken::new()).await });
        Self { publisher, asked, go, _run: run }
    }

    fn publish(&self, name: &str) {
        let pod = PodRef { uid: name.to_owned(), namespace: "ns".to_owned(), name: name.to_owned() };
        self.publisher.publish(&pod, PodStatus::default());
    }

    /// As many as may be on their way at once.
    async fn occupy(&mut self, kind: &str) {
        (0..IN_FLIGHT).for_each(|at| self.publish(&format!("{kind}-{at}")));
        for _ in 0..IN_FLIGHT {
            self.asked.recv().await.unwrap();
        }
    }

    async fn flushed(&self, name: &str) {
        tokio::time::timeout(SOON, self.publisher.flushed(name)).await.expect("nothing of it waits");
    }
}

async fn answer(name: String, mut goes: watch::Receiver<bool>) -> Result<Response<Body>, Infallible> {
    if name.starts_with("slow") {
        let _ = goes.wait_for(|go| *go).await.map(drop);
    }
    let (status, body) = if name.starts_with("stuck") {
        let failure = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "", "code": 500 });
        (StatusCode::INTERNAL_SERVER_ERROR, failure)
    } else {
        (StatusCode::OK, json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "name": name } }))
    };
    let mut response = Response::new(Body::from(body.to_string().into_bytes()));
    *response.status_mut() = status;
    Ok(response)
}

#[tokio::test]
async fn statuses_that_keep_failing_hold_no_other_up() {
    let mut work = AtWork::new();
    work.occupy("stuck").await;
    work.publish("well");
    work.flushed("well").await;
}

#[tokio::test]
async fn one_that_is_withdrawn_while_it_waits_for_its_place_is_not_written() {
    let mut work = AtWork::new();
    work.occupy("slow").await;
    work.publish("late");
    let sends = || work.publisher.shared.lock().get("late").is_some_and(|slot| slot.sending);
    while !sends() {
        tokio::task::yield_now().await;
    }
    work.publisher.withdraw("late");
    assert!(work.asked.try_recv().is_err(), "so many are on their way and no more");
    work.go.send_replace(true);
    work.flushed("late").await;
    assert!(work.asked.try_recv().is_err(), "it was withdrawn");
}
