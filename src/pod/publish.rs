//! The only writer of Pod status, and of the final deletion of a Pod object.
//!
//! Statuses are coalesced per Pod UID: while one PATCH is on its way the newest status waits, older ones are dropped.
//! Every PATCH carries the UID, so a Pod recreated under the same name never gets the old one's status. What fails is
//! tried again until it is through or the Pod is gone, however long the API server is away; meanwhile it takes no place
//! from others.

mod mirrored;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use prometheus_client::metrics::counter::Counter;
use serde_json::{Map, Value, json};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use self::mirrored::Mirrors;
use super::resize;
use crate::metrics::Metrics;
use crate::runtime::types::PodRef;
use crate::telemetry::chain;

/// Most PATCHes on their way at once.
const IN_FLIGHT: usize = 8;
/// Longest time one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Wait after the first failure; doubled up to [`MAX_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait between two tries: an API server that returns is told within this time.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// How often statuses were written, and how often that failed.
#[derive(Clone, Debug, Default)]
pub struct PublishCounters {
    /// PATCHes accepted.
    pub written: Counter,
    /// PATCHes that failed and were tried again.
    pub failed: Counter,
    /// PATCHes given up since the Pod is gone.
    pub gone: Counter,
}

impl PublishCounters {
    /// Counters that `/metrics` shows.
    pub fn registered(metrics: &Metrics) -> Self {
        let counters = Self::default();
        metrics.register(|registry| {
            let Self { written, failed, gone } = &counters;
            registry.register("pod_status_writes", "Pod statuses written", written.clone());
            registry.register(
                "pod_status_write_failures",
                "Pod status writes that failed and were retried",
                failed.clone(),
            );
            registry.register("pod_status_drops", "Pod statuses dropped since the Pod was gone", gone.clone());
        });
        counters
    }
}

/// Hands statuses to the writer. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
}

struct Shared {
    client: kube::Client,
    slots: Mutex<HashMap<String, Slot>>,
    mirrors: Mutex<Mirrors>,
    /// So many more PATCHes may be on their way.
    places: Semaphore,
    /// Something waits to be sent.
    work: Notify,
    /// Something was sent or dropped.
    done: Notify,
    counters: PublishCounters,
}

struct Slot {
    pod: PodRef,
    waiting: Option<PodStatus>,
    sending: bool,
    /// What fails is not sent again.
    withdrawn: bool,
}

impl Publisher {
    /// A publisher; nothing is written until [`Publisher::run`] is driven.
    pub fn new(client: kube::Client, counters: PublishCounters) -> Self {
        let slots = Mutex::new(HashMap::new());
        let (work, done, mirrors) = (Notify::new(), Notify::new(), Mutex::default());
        let places = Semaphore::new(IN_FLIGHT);
        Self { shared: Arc::new(Shared { client, slots, mirrors, places, work, done, counters }) }
    }

    /// Writes `status` soon, in place of any that waits.
    pub fn publish(&self, pod: &PodRef, status: PodStatus) {
        if let Some(target) = self.target(pod, &status) {
            self.enqueue(&target, status);
        }
    }

    fn enqueue(&self, pod: &PodRef, status: PodStatus) {
        let mut slots = self.shared.lock();
        let new = || Slot { pod: pod.clone(), waiting: None, sending: false, withdrawn: false };
        let slot = slots.entry(pod.uid.clone()).or_insert_with(new);
        slot.waiting = Some(status);
        slot.withdrawn = false;
        drop(slots);
        self.shared.work.notify_one();
    }

    /// Writes nothing more of this Pod than what is on its way: its object is being removed.
    pub fn withdraw(&self, uid: &str) {
        let mut slots = self.shared.lock();
        if let Some(slot) = slots.get_mut(uid) {
            slot.waiting = None;
            slot.withdrawn = true;
            if !slot.sending {
                slots.remove(uid);
            }
        }
        drop(slots);
        self.shared.done.notify_waiters();
    }

    /// Returns once nothing waits for this Pod: all was written, or the Pod is gone.
    pub async fn flushed(&self, uid: &str) {
        loop {
            let mut done = std::pin::pin!(self.shared.done.notified());
            done.as_mut().enable();
            if !self.shared.lock().contains_key(uid) {
                return;
            }
            done.await;
        }
    }

    /// Removes the Pod object for good (grace 0), unless it is another Pod of that name. Tries until it is gone.
    pub async fn delete(&self, pod: &PodRef) {
        let api: Api<Pod> = Api::namespaced(self.shared.client.clone(), &pod.namespace);
        let preconditions = Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default().grace_period(0) };
        let mut wait = FIRST_WAIT;
        loop {
            match tokio::time::timeout(TIMEOUT, api.delete(&pod.name, &params)).await {
                Ok(Ok(_)) => return,
                Ok(Err(kube::Error::Api(status))) if status.code == 404 || status.code == 409 => return,
                Ok(Err(error)) => tracing::warn!(%pod, error = chain(&error), "failed to delete Pod; trying again"),
                Err(_) => tracing::warn!(%pod, "deleting Pod took longer than {TIMEOUT:?}; trying again"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
    }

    /// Writes until `stop`; what still waits then is written once more, briefly.
    pub async fn run(&self, stop: CancellationToken) {
        let mut sending = FuturesUnordered::new();
        loop {
            // One for each Pod at most.
            while let Some((pod, status)) = self.shared.take() {
                sending.push(self.shared.send(pod, status, &stop));
            }
            if stop.is_cancelled() && sending.is_empty() {
                return;
            }
            tokio::select! {
                // Cancel-safe: a finished send has already put its slot right.
                Some(()) = sending.next() => {}
                // Cancel-safe: a permit not taken stays stored.
                () = self.shared.work.notified() => {}
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled(), if !stop.is_cancelled() => {}
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next status to send; its slot is marked as sending.
    fn take(&self) -> Option<(PodRef, PodStatus)> {
        let mut slots = self.lock();
        let slot = slots.values_mut().find(|s| !s.sending && s.waiting.is_some())?;
        slot.sending = true;
        let status = slot.waiting.take()?;
        Some((slot.pod.clone(), status))
    }

    async fn send(&self, pod: PodRef, mut status: PodStatus, stop: &CancellationToken) {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let mut wait = FIRST_WAIT;
        loop {
            // Nobody closes the semaphore.
            let place = self.places.acquire().await;
            if self.renew(&pod.uid, &mut status) {
                break;
            }
            let patch = patch(&pod, &status);
            let params = PatchParams::default();
            let request = api.patch_status(&pod.name, &params, &patch);
            let answer = tokio::time::timeout(TIMEOUT, request).await;
            drop(place);
            match answer {
                Ok(Ok(_)) => {
                    self.counters.written.inc();
                    break;
                }
                Ok(Err(kube::Error::Api(answer))) if is_gone(&answer) => {
                    self.counters.gone.inc();
                    self.lock().entry(pod.uid.clone()).and_modify(|slot| slot.waiting = None);
                    break;
                }
                Ok(Err(error)) => tracing::warn!(%pod, error = chain(&error), "failed to write Pod status"),
                Err(_) => tracing::warn!(%pod, "writing Pod status took longer than {TIMEOUT:?}"),
            }
            self.counters.failed.inc();
            if stop.is_cancelled() {
                break;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
        self.finish(&pod.uid, stop.is_cancelled());
    }

    /// Puts the newest status in place of one that has not been accepted; true if none is to be sent any more.
    fn renew(&self, uid: &str, status: &mut PodStatus) -> bool {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(uid) else { return false };
        if let Some(newer) = slot.waiting.take() {
            *status = newer;
        }
        slot.withdrawn
    }

    fn finish(&self, uid: &str, stopping: bool) {
        let mut slots = self.lock();
        if let Some(slot) = slots.get_mut(uid) {
            slot.sending = false;
            if slot.waiting.is_none() || stopping {
                slots.remove(uid);
            }
        }
        drop(slots);
        self.done.notify_waiters();
    }
}

/// Whether the answer says that this Pod (by UID) is not there any more.
fn is_gone(answer: &kube::core::Status) -> bool {
    answer.code == 404 || (answer.code == 409 && answer.message.contains("UID"))
}

/// A strategic merge patch of the whole status. Fields we own and do not set are cleared; conditions of others stay,
/// since conditions merge by type.
fn patch(pod: &PodRef, status: &PodStatus) -> Patch<Value> {
    let mut body = serde_json::to_value(status).unwrap_or_default();
    if let Value::Object(fields) = &mut body {
        for name in ["reason", "message"] {
            fields.entry(name).or_insert(Value::Null);
        }
        for condition in fields.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Value::Object(condition) = condition {
                condition.entry("reason").or_insert(Value::Null);
                condition.entry("message").or_insert(Value::Null);
            }
        }
        forget_conditions(fields);
    }
    Patch::Strategic(json!({ "metadata": { "uid": pod.uid }, "status": body }))
}

/// Conditions that are there only while they hold go where they do not.
fn forget_conditions(fields: &mut Map<String, Value>) {
    let Some(conditions) = fields.get_mut("conditions").and_then(Value::as_array_mut) else { return };
    for type_ in [resize::PENDING, resize::IN_PROGRESS] {
        if conditions.iter().all(|condition| condition["type"] != type_) {
            conditions.push(json!({ "type": type_, "$patch": "delete" }));
        }
    }
}

#[cfg(test)]
mod tests;
