//! Events on Pods and on the Node, with the kubelet's reasons: bounded, off everybody's path, never a reason to wait.
//!
//! They are `v1` Events whose source is the component `kubelet`, since that is what tools and Kubernetes' own
//! conformance tests select on. An event that is told again counts up instead of making a new object. (kube's recorder
//! is not used: it takes two events of one reason for the same whatever they say, and shows only the first text.)

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Resource as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::telemetry::chain;

/// Most events waiting to be written; more are dropped and counted. 110 Pods starting at once make about 400.
const QUEUE: usize = 2048;
/// Longest note the API takes, in bytes.
const MAX_NOTE: usize = 1024;
/// Longest time one event may take to write.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How many written events are remembered, so that telling them again counts them up.
const REMEMBERED: usize = 1024;
/// What the field calls the component that runs Pods on a node.
const COMPONENT: &str = "kubelet";
/// Where events on objects are that are in no namespace.
const DEFAULT_NAMESPACE: &str = "default";

/// Takes events. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Told>,
    node: Arc<str>,
    dropped: Counter,
}

/// Writes what [`Events`] takes.
pub struct EventWriter {
    queue: mpsc::Receiver<Told>,
    client: Client,
    node: String,
    written: Written,
}

/// What was told, once; equal ones are counted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Told {
    warning: bool,
    about: About,
    reason: String,
    note: String,
}

/// What it is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum About {
    Pod {
        namespace: String,
        name: String,
        uid: String,
        field_path: Option<String>,
    },
    /// The node itself.
    Node,
}

/// The events written last, oldest first.
#[derive(Default)]
struct Written {
    objects: HashMap<Told, (String, i32)>,
    order: VecDeque<Told>,
}

/// Counts events that were dropped since too many waited.
pub fn dropped_counter(registry: &mut Registry) -> Counter {
    let counter = Counter::default();
    registry.register("events_dropped", "Events dropped since too many waited to be written", counter.clone());
    counter
}

/// A queue and its writer. `node` names the reporting node.
pub fn events(client: Client, node: &str, dropped: Counter) -> (Events, EventWriter) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let writer = EventWriter { queue: receiver, client, node: node.to_owned(), written: Written::default() };
    (Events { queue: sender, node: node.into(), dropped }, writer)
}

impl Events {
    /// A Normal event on the Pod, or on one of its containers.
    pub fn normal(&self, pod: &Pod, container: Option<&str>, reason: &str, note: impl Into<String>) {
        self.put(About::pod(pod, container), false, reason, note.into());
    }

    /// A Warning event on the Pod, or on one of its containers; also a line in the log.
    pub fn warning(&self, pod: &Pod, container: Option<&str>, reason: &str, note: impl Into<String>) {
        let note = note.into();
        tracing::warn!(pod = pod.metadata.name, namespace = pod.metadata.namespace, reason, "{note}");
        self.put(About::pod(pod, container), true, reason, note);
    }

    /// A Normal event on the Node.
    pub fn node_normal(&self, reason: &str, note: impl Into<String>) {
        self.put(About::Node, false, reason, note.into());
    }

    /// A Warning event on the Node; also a line in the log.
    pub fn node_warning(&self, reason: &str, note: impl Into<String>) {
        let note = note.into();
        tracing::warn!(reason, "{note}");
        self.put(About::Node, true, reason, note);
    }

    /// A Normal event that the Node has come into this condition, which is its reason.
    pub fn node_is_now(&self, condition: &str) {
        self.node_normal(condition, format!("Node {} status is now: {condition}", self.node));
    }

    fn put(&self, about: About, warning: bool, reason: &str, note: String) {
        let told = Told { warning, about, reason: reason.to_owned(), note: shorten(note) };
        if self.queue.try_send(told).is_err() {
            self.dropped.inc();
        }
    }
}

impl About {
    fn pod(pod: &Pod, container: Option<&str>) -> Self {
        let meta = &pod.metadata;
        Self::Pod {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            field_path: container.map(|name| field_path(pod, name)),
        }
    }

    fn namespace(&self) -> &str {
        match self {
            Self::Pod { namespace, .. } => namespace,
            Self::Node => DEFAULT_NAMESPACE,
        }
    }

    /// The object, `node` being this node's name. A kubelet gives its Node the name in place of the UID, and that is
    /// what `kubectl describe node` looks for.
    fn object(&self, node: &str) -> ObjectReference {
        match self.clone() {
            Self::Pod { namespace, name, uid, field_path } => ObjectReference {
                api_version: Some(Pod::api_version(&()).into_owned()),
                kind: Some(Pod::kind(&()).into_owned()),
                namespace: Some(namespace),
                name: Some(name),
                uid: Some(uid),
                field_path,
                ..ObjectReference::default()
            },
            Self::Node => ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(node.to_owned()),
                uid: Some(node.to_owned()),
                ..ObjectReference::default()
            },
        }
    }
}

impl EventWriter {
    /// Writes until `stop`, also when nobody is left to tell anything. An event that cannot be written is logged and
    /// dropped, as a kubelet does.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let told = tokio::select! {
                // Cancel-safe: an event not taken stays in the queue.
                Some(next) = self.queue.recv() => next,
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled() => return,
            };
            let reason = told.reason.clone();
            match tokio::time::timeout(TIMEOUT, self.write(told)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(reason, error = chain(&error), "failed to write event"),
                Err(_) => tracing::debug!(reason, "writing an event took longer than {TIMEOUT:?}"),
            }
        }
    }

    async fn write(&mut self, told: Told) -> kube::Result<()> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), told.about.namespace());
        let now = Timestamp::now();
        if let Some((name, count)) = self.written.again(&told) {
            let patch = json!({ "count": count, "lastTimestamp": Time(now) });
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => {}
                answer => return answer.map(drop),
            }
        }
        let event = event(&told, &self.node, now);
        api.create(&PostParams::default(), &event).await?;
        self.written.put(told, event.metadata.name.unwrap_or_default());
        Ok(())
    }
}

impl Written {
    /// Name and new count of the object that tells this already.
    fn again(&mut self, told: &Told) -> Option<(String, i32)> {
        let (name, count) = self.objects.get_mut(told)?;
        *count += 1;
        Some((name.clone(), *count))
    }

    fn put(&mut self, told: Told, name: String) {
        if self.objects.insert(told.clone(), (name, 1)).is_none() {
            self.order.push_back(told);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.objects.remove(&oldest);
        }
    }
}

fn event(told: &Told, node: &str, now: Timestamp) -> Event {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    // Unique among the Pod's events, also over restarts of this process, as kubelet's names are.
    let number = now.as_nanosecond().unsigned_abs() + u128::from(NUMBER.fetch_add(1, Ordering::Relaxed));
    let object = told.about.object(node);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{number:x}", object.name.as_deref().unwrap_or_default())),
            namespace: Some(told.about.namespace().to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: object,
        type_: Some(if told.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(told.reason.clone()),
        message: Some(told.note.clone()),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(node.to_owned()) }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node.to_owned()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    }
}

fn field_path(pod: &Pod, container: &str) -> String {
    let init = pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten()).any(|c| c.name == container);
    let list = match init {
        true => "initContainers",
        false if is_ephemeral(pod, container) => "ephemeralContainers",
        false => "containers",
    };
    format!("spec.{list}{{{container}}}")
}

fn is_ephemeral(pod: &Pod, container: &str) -> bool {
    pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten()).any(|c| c.name == container)
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

    fn told(note: &str) -> Told {
        Told {
            warning: true,
            about: About::Pod { namespace: "ns".into(), name: "p".into(), uid: "u".into(), field_path: None },
            reason: "Failed".into(),
            note: note.into(),
        }
    }

    #[test]
    fn a_long_note_is_cut_at_a_character() {
        let long = shorten("ä".repeat(1000));
        assert!(long.len() <= MAX_NOTE && long.ends_with('…'));
        assert_eq!(shorten("short".to_owned()), "short");
    }

    #[test]
    fn the_same_event_counts_up_and_another_text_is_another_event() {
        let mut written = Written::default();
        assert_eq!(written.again(&told("a")), None);
        written.put(told("a"), "p.1".into());
        assert_eq!(written.again(&told("a")), Some(("p.1".into(), 2)));
        assert_eq!(written.again(&told("a")), Some(("p.1".into(), 3)));
        assert_eq!(written.again(&told("b")), None);
    }

    #[test]
    fn an_event_on_the_node_is_where_describe_node_looks_for_it() {
        let told = Told { about: About::Node, ..told("Node n status is now: NodeReady") };
        let event = event(&told, "n", Timestamp::UNIX_EPOCH);
        let object = &event.involved_object;
        assert_eq!((object.kind.as_deref(), object.name.as_deref()), (Some("Node"), Some("n")));
        assert_eq!((object.uid.as_deref(), object.namespace.as_deref()), (Some("n"), None));
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        assert!(event.metadata.name.unwrap().starts_with("n."));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut written = Written::default();
        for number in 0..REMEMBERED + 10 {
            written.put(told(&number.to_string()), format!("p.{number}"));
        }
        assert_eq!((written.objects.len(), written.order.len()), (REMEMBERED, REMEMBERED));
        assert_eq!(written.again(&told("0")), None);
    }
}
