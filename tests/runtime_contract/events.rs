//! Promises about events.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use lambdalet::runtime::types::{EventKind, RuntimeEvent};

use crate::bench::Bench;

async fn next(events: &mut BoxStream<'static, RuntimeEvent>) -> RuntimeEvent {
    tokio::time::timeout(Duration::from_secs(30), events.next()).await.expect("an event").expect("the stream goes on")
}

pub(crate) async fn what_happens_to_a_container_is_told(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = bench.container_config("p", "c", bench.exits(0));
    let mut events = bench.runtime.events().await.unwrap();
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    bench.exited(&id).await;
    bench.runtime.remove_container(&id).await.unwrap();
    for kind in [EventKind::Started, EventKind::Exited, EventKind::Removed] {
        assert_eq!(next(&mut events).await, RuntimeEvent { pod_uid: "uid-p".into(), kind });
    }
}

pub(crate) async fn an_owner_is_told_of_its_own_objects_only(bench: &Bench) {
    let mut events = bench.runtime.events().await.unwrap();
    let foreign = bench.stranger.run_pod_sandbox(&bench.sandbox_config("foreign")).await.unwrap();
    let own = bench.sandbox("own").await;
    assert_eq!(next(&mut events).await.pod_uid, "uid-own");
    assert!(bench.runtime.list_pod_sandboxes(Some("uid-foreign")).await.unwrap().is_empty());
    assert!(bench.runtime.pod_sandbox_status(&foreign).await.is_err());
    // Nor may it end what is not its own.
    bench.runtime.remove_pod_sandbox(&foreign).await.unwrap();
    bench.runtime.remove_pod_sandbox(&own).await.unwrap();
    assert!(bench.stranger.pod_sandbox_status(&foreign).await.is_ok());
}
