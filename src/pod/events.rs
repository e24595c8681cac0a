//! Events on Pods, with the kubelet's reasons: bounded, off the Pod's path, never a reason for a Pod to wait.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::Resource as _;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::telemetry::chain;

/// Most events waiting to be written; more are dropped and counted. 110 Pods starting at once make about 400.
const QUEUE: usize = 2048;
/// Longest note the API takes, in bytes.
const MAX_NOTE: usize = 1024;
/// Longest time one event may take to write.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Takes events. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<(Event, ObjectReference)>,
    dropped: Counter,
}

/// Writes what [`Events`] takes.
pub struct EventWriter {
    queue: mpsc::Receiver<(Event, ObjectReference)>,
    recorder: Recorder,
}

/// Counts events that were dropped since too many waited.
pub fn dropped_counter(registry: &mut Registry) -> Counter {
    let counter = Counter::default();
    registry.register("events_dropped", "Events dropped since too many waited to be written", counter.clone());
    counter
}

/// A queue and its writer. `node` names the reporting node.
pub fn events(client: kube::Client, node: &str, dropped: Counter) -> (Events, EventWriter) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let reporter = Reporter { controller: "lambdalet".to_owned(), instance: Some(node.to_owned()) };
    let writer = EventWriter { queue: receiver, recorder: Recorder::new(client, reporter) };
    (Events { queue: sender, dropped }, writer)
}

impl Events {
    /// A Normal event on the Pod, or on one of its containers.
    pub fn normal(&self, pod: &Pod, container: Option<&str>, reason: &str, note: impl Into<String>) {
        self.put(EventType::Normal, (pod, container), reason, note.into());
    }

    /// A Warning event on the Pod, or on one of its containers.
    pub fn warning(&self, pod: &Pod, container: Option<&str>, reason: &str, note: impl Into<String>) {
        let note = note.into();
        tracing::warn!(pod = pod.metadata.name, namespace = pod.metadata.namespace, reason, "{note}");
        self.put(EventType::Warning, (pod, container), reason, note);
    }

    fn put(&self, type_: EventType, (pod, container): (&Pod, Option<&str>), reason: &str, note: String) {
        let mut reference = pod.object_ref(&());
        reference.resource_version = None;
        reference.field_path = container.map(|name| field_path(pod, name));
        let note = Some(shorten(note));
        let event = Event { type_, reason: reason.to_owned(), note, action: reason.to_owned(), secondary: None };
        if self.queue.try_send((event, reference)).is_err() {
            self.dropped.inc();
        }
    }
}

impl EventWriter {
    /// Writes until `stop`, or until every [`Events`] is gone. An event that cannot be written is logged and dropped, as
    /// a kubelet does.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let (event, reference) = tokio::select! {
                // Cancel-safe: an event not taken stays in the queue.
                next = self.queue.recv() => match next {
                    Some(next) => next,
                    None => return,
                },
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return,
            };
            match tokio::time::timeout(TIMEOUT, self.recorder.publish(&event, &reference)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(reason = event.reason, error = chain(&error), "failed to write event");
                }
                Err(_) => tracing::debug!(reason = event.reason, "writing an event took longer than {TIMEOUT:?}"),
            }
        }
    }
}

fn field_path(pod: &Pod, container: &str) -> String {
    let init = pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten()).any(|c| c.name == container);
    format!("spec.{}{{{container}}}", if init { "initContainers" } else { "containers" })
}

fn shorten(mut note: String) -> String {
    if note.len() > MAX_NOTE {
        let mut end = MAX_NOTE - "…".len();
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_cut_at_a_character() {
        let long = shorten("ä".repeat(1000));
        assert!(long.len() <= MAX_NOTE && long.ends_with('…'));
        assert_eq!(shorten("short".to_owned()), "short");
    }
}
