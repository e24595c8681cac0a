//! Waiting for what the API server, or the host, will show; never longer than told, and never without saying what was
//! seen last.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::watch_object;
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Long enough for what should take a second or two on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Watches the object until `done` holds; `None` stands for "does not exist".
///
/// # Panics
/// After `within`, showing the object as last seen.
pub(crate) async fn watch_until<K>(
    api: Api<K>,
    name: &str,
    what: &str,
    within: Duration,
    mut done: impl FnMut(Option<&K>) -> bool,
) -> Option<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Serialize + Send + 'static,
{
    let (mut last, mut trouble) = (None, None);
    let mut changes = pin!(watch_object(api, name).default_backoff());
    let reached = tokio::time::timeout(within, async {
        while let Some(change) = changes.next().await {
            match change {
                Ok(object) => {
                    last = object;
                    if done(last.as_ref()) {
                        return true;
                    }
                }
                Err(error) => trouble = Some(error),
            }
        }
        false
    })
    .await;
    if reached != Ok(true) {
        let seen = last.as_ref().map_or_else(|| "nothing: it does not exist".to_owned(), show);
        panic!("{name}: not {what} within {within:?}; last watch error: {trouble:?}; last seen: {seen}");
    }
    last
}

/// The object without what only machines read.
pub(crate) fn show<K: Serialize>(object: &K) -> String {
    let mut value = serde_json::to_value(object).unwrap();
    if let Some(metadata) = value["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    if value["status"].is_object() {
        // What was asked for stands in the test.
        value["spec"].take();
    }
    serde_json::to_string_pretty(&value).unwrap()
}

/// Asks again and again until `look` has an answer: for what nobody announces (the host's mounts, links, files).
///
/// # Panics
/// After `within`, showing why the last look was not good enough.
pub(crate) async fn poll<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = tokio::time::Instant::now() + within;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if tokio::time::Instant::now() >= deadline => {
                panic!("not {what} within {within:?}; last seen: {seen}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
