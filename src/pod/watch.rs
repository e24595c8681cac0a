//! Watches the Pods bound to this node and keeps one worker per Pod UID.
//!
//! After each complete LIST, and never before, what this node still holds of Pods that are not in it is handed to
//! workers of its own that end it: a deletion that happened while this process was away is carried out, and an API
//! server that is unreachable or answers half a list deletes nothing.

mod statics;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch as channel;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::statics::Statics;
use super::directory::HEARTBEAT;
use super::static_pods::mirrored;
use super::worker::{Desired, Past, Signal, Worker};
use super::{Shared, crew, fakecloud};
use crate::network::ipam::NO_POD;
use crate::retry::{Delays, Retry};
use crate::runtime::types::{PodRef, RuntimeEvent};
use crate::telemetry::chain;

/// Wait before the runtime's events are asked for again.
const SUBSCRIBE_AGAIN: Duration = Duration::from_secs(1);
/// How long the runtime may take to begin with its events; the loop does nothing else meanwhile.
const SUBSCRIBE_PATIENCE: Duration = Duration::from_secs(5);
/// Wait before a worker that panicked is replaced.
const REPLACE_AFTER: Duration = Duration::from_secs(1);
/// Annotation of a container with the Pod's grace period in seconds, for Pods whose object is gone after a restart.
pub(super) const GRACE_ANNOTATION: &str = "grace-seconds";

/// Why what earlier Pods left cannot be told.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("failed to list what the runtime holds")]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error("failed to list the Pods' directories")]
    Disk(#[from] super::volumes::VolumeError),
}

type Guarded = DeserializeGuard<Pod>;

/// What belongs to Pods on this node, by UID.
type Found = Result<BTreeMap<String, Pod>, LookError>;

/// The Pod loop.
pub struct PodLoop {
    shared: Arc<Shared>,
    client: kube::Client,
    workers: HashMap<String, Handle>,
    running: JoinSet<String>,
    /// UIDs of the Pods that exist, those of objects that do not parse too: of the LIST under way, or of the last one
    /// and the watch since.
    listing: HashSet<String>,
    /// When to look for what belongs to no Pod; only set after a complete LIST.
    sweep_at: Option<Instant>,
    /// The look for it, while it is under way: a runtime that does not answer holds nothing else up.
    sweeping: Option<BoxFuture<'static, Found>>,
    drain: channel::Sender<bool>,
    statics: Statics,
    /// There is no API server, and so no other Pods than static ones.
    alone: bool,
}

struct Handle {
    desired: channel::Sender<Desired>,
    signal: channel::Sender<Signal>,
}

impl PodLoop {
    /// A loop over the Pods of the node that `shared` knows. `drain` is the sender of [`Shared::draining`].
    pub fn new(shared: Arc<Shared>, client: kube::Client, drain: channel::Sender<bool>) -> Self {
        Self {
            shared,
            client,
            workers: HashMap::new(),
            running: JoinSet::new(),
            listing: HashSet::new(),
            sweep_at: None,
            sweeping: None,
            drain,
            statics: Statics::none(),
            alone: false,
        }
    }

    /// Runs until `stop`, then leaves every Pod running, or with `drain_on_exit` ends them all first.
    pub async fn run(mut self, stop: CancellationToken, drain_on_exit: bool) {
        let mut pods = self.begin();
        let mut broken = Retry::new("watch Pods");
        let mut events = subscribe(&self.shared).await;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let shared = Arc::clone(&self.shared);
        let (mut freed, mut evicted) = (shared.admission.freed(), shared.evictions.given());
        let mut leaving = false;
        loop {
            tokio::select! {
                // Cancel-safe: a stream item is taken whole or not at all.
                Some(event) = pods.next() => match event {
                    Ok(event) => {
                        // The first event of a try says only that there will be one.
                        if !matches!(event, Event::Init) { broken.succeeded(); }
                        self.pod_event(event).await;
                    }
                    Err(error) => {
                        // The stream itself waits before its next try; a new one does not.
                        let pause = broken.failed(chain(&error));
                        if is_expired(&error) { pods = self.watch_after(pause); }
                    }
                },
                // Cancel-safe: likewise.
                event = next(&mut events) => match event {
                    Some(event) => self.runtime_event(&event),
                    None => events = self.resubscribe().await,
                },
                // Cancel-safe: a finished worker stays in the set until it is taken.
                Some(ended) = self.running.join_next() => self.worker_ended(ended),
                // Cancel-safe: a timer.
                () = sleep_until(self.sweep_at), if self.sweeping.is_none() => self.sweep(),
                // Cancel-safe: the look goes on the next time round.
                found = look(&mut self.sweeping) => self.swept(found),
                // Cancel-safe: a change not taken stays unseen.
                Ok(()) = freed.changed() => self.wake(&shared.admission.waiting()),
                // Cancel-safe: likewise.
                Ok(()) = evicted.changed() => self.wake(&shared.evictions.open()),
                // Cancel-safe: likewise.
                () = self.statics.changed() => self.apply_statics(),
                // Cancel-safe: a tick not taken comes at once.
                _ = heartbeat.tick() => self.shared.directory.beat(),
                // Cancel-safe: a token stays cancelled.
                () = stop.cancelled(), if !leaving => {
                    if !drain_on_exit {
                        return;
                    }
                    leaving = true;
                    self.start_drain();
                }
                // Cancel-safe: asked anew each time round.
                () = shared.admission.emptied(), if leaving && !self.ends_orphans() => return self.clear().await,
            }
        }
    }

    /// These Pods look what has changed for them.
    fn wake(&self, uids: &[String]) {
        let handles = uids.iter().filter_map(|uid| self.workers.get(uid));
        handles.for_each(|handle| handle.signal.send_modify(|signal| signal.events += 1));
    }

    /// Tells every worker to end its Pod.
    fn start_drain(&mut self) {
        tracing::info!(pods = self.workers.len(), "draining: ending every Pod");
        let _ = self.drain.send(true);
        self.workers.values().for_each(|h| h.signal.send_modify(|s| s.events += 1));
    }

    /// Whether Pods are being ended whose objects are gone.
    fn ends_orphans(&self) -> bool {
        self.workers.values().any(|h| h.desired.borrow().gone)
    }

    /// Removes what Pods that had ended before the drain kept for their logs: nobody could ask for them any more.
    async fn clear(mut self) {
        self.running.shutdown().await;
        for uid in self.workers.keys() {
            while let Err(error) = self.shared.remove_from_runtime(uid).await {
                tracing::warn!(uid, error = chain(&error), "failed to remove a Pod that had ended; trying again");
                tokio::time::sleep(SUBSCRIBE_AGAIN).await;
            }
        }
    }

    /// After a gap in the events everything is listed again.
    async fn resubscribe(&mut self) -> Option<BoxStream<'static, RuntimeEvent>> {
        let stream = subscribe(&self.shared).await;
        if stream.is_some() {
            self.workers.values().for_each(|h| h.signal.send_modify(|s| s.relists += 1));
            self.shared.environments.relist();
        }
        stream
    }

    fn watch_after(&self, pause: Duration) -> BoxStream<'static, Result<Event<Guarded>, watcher::Error>> {
        let watch = self.watch();
        let rest = async move {
            tokio::time::sleep(pause).await;
            watch
        };
        rest.flatten_stream().boxed()
    }

    /// The watch; without an API server what there is of Pods is known at once, and nothing comes.
    fn begin(&mut self) -> BoxStream<'static, Result<Event<Guarded>, watcher::Error>> {
        if !self.alone {
            return self.watch();
        }
        self.listed();
        futures::stream::pending().boxed()
    }

    fn watch(&self) -> BoxStream<'static, Result<Event<Guarded>, watcher::Error>> {
        let api: Api<Guarded> = Api::all(self.client.clone());
        let selector = format!("spec.nodeName={}", self.shared.facts.borrow().name);
        watcher(api, watcher::Config::default().fields(&selector)).backoff(Delays::default()).boxed()
    }

    async fn pod_event(&mut self, event: Event<Guarded>) {
        match event {
            Event::Init => {
                self.listing.clear();
                self.statics.begin_list();
                self.sweep_at = None;
                self.sweeping = None;
            }
            Event::InitApply(DeserializeGuard(pod)) => {
                self.listing.extend(uid_of(&pod));
                self.apply(pod, Past::Unknown);
            }
            Event::Apply(DeserializeGuard(pod)) => {
                // After a LIST that did not have it: no earlier process has seen it either.
                let is_new = uid_of(&pod).is_some_and(|uid| self.listing.insert(uid));
                self.apply(pod, if is_new { Past::None } else { Past::Unknown });
            }
            Event::InitDone => self.listed(),
            Event::Delete(DeserializeGuard(pod)) => {
                let uid = uid_of(&pod).unwrap_or_default();
                self.listing.remove(&uid);
                if let Ok(mirror) = &pod
                    && mirrored(mirror).is_some()
                {
                    return self.mirror_gone(mirror);
                }
                if !self.workers.contains_key(&uid) {
                    // It never parsed, and may have left something here in the life of another process.
                    self.sweep_at = Some(Instant::now());
                }
                self.gone(&uid);
            }
        }
    }

    /// Gives the Pod's worker its newest spec. An object that does not parse keeps its last one.
    fn apply(&mut self, pod: Result<Pod, InvalidObject>, past: Past) {
        let mut pod = match pod {
            Ok(pod) => pod,
            Err(invalid) => return self.refuse(&invalid),
        };
        // Nobody here reads it, and it is the larger half of many objects.
        pod.metadata.managed_fields = None;
        if mirrored(&pod).is_some() {
            return self.mirror_seen(pod);
        }
        fakecloud::adapt(&mut pod);
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let pod = Arc::new(pod);
        match self.workers.get(&uid) {
            Some(handle) => handle.desired.send_modify(|d| d.pod = pod),
            None => self.hire(Duration::ZERO, uid, Desired { pod, gone: false }, past),
        }
    }

    fn refuse(&self, invalid: &InvalidObject) {
        let meta = &invalid.metadata;
        tracing::error!(
            pod = meta.name,
            namespace = meta.namespace,
            error = chain(invalid),
            "a Pod object does not parse; it is left as it is until it does"
        );
        let pod = Pod { metadata: meta.clone(), ..Pod::default() };
        let text = format!("This node cannot read the Pod object: {}", chain(invalid));
        self.shared.events.warning(&pod, None, "InvalidPod", text);
    }

    fn gone(&mut self, uid: &str) {
        // Before the next Pod is seen, which the scheduler may have given this one's place.
        self.shared.admission.vacate(uid);
        self.shared.capacity.vacate(uid);
        if let Some(handle) = self.workers.get(uid) {
            handle.desired.send_modify(|d| d.gone = true);
        }
    }

    fn hire(&mut self, pause: Duration, uid: String, desired: Desired, past: Past) {
        let (desired, desired_seen) = channel::channel(desired);
        let (signal, signal_seen) = channel::channel(Signal::default());
        let worker = Worker::new(self.shared.clone(), desired_seen, signal_seen, past);
        self.workers.insert(uid.clone(), Handle { desired, signal });
        self.running.spawn(async move {
            tokio::time::sleep(pause).await;
            worker.run().await;
            uid
        });
    }

    fn worker_ended(&mut self, ended: Result<String, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                self.workers.remove(&uid);
                self.static_ended(&uid);
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "a Pod's worker was lost");
                self.rehire_lost();
            }
        }
    }

    /// A worker that panicked is replaced: its Pod must not be left without an owner. Not at once, since what made it
    /// panic may still be there.
    fn rehire_lost(&mut self) {
        let lost: Vec<_> = self.workers.iter().filter(|(_, h)| h.desired.is_closed()).map(|(u, _)| u.clone()).collect();
        for uid in lost {
            if let Some(handle) = self.workers.remove(&uid) {
                let last = handle.desired.borrow().clone();
                self.hire(REPLACE_AFTER, uid, last, Past::Unknown);
            }
        }
    }

    fn runtime_event(&self, event: &RuntimeEvent) {
        use crate::runtime::types::EventKind;
        // A start is always our own doing, and was looked at then.
        if event.kind == EventKind::Started {
            return;
        }
        match self.workers.get(&event.pod_uid) {
            Some(handle) => handle.signal.send_modify(|s| s.events += 1),
            None => self.shared.environments.signal(&event.pod_uid),
        }
    }

    /// A complete LIST is in: Pods that are not in it are gone.
    fn listed(&mut self) {
        let absent = self.workers.keys().filter(|uid| !self.listing.contains(*uid) && !self.statics.has(uid));
        let absent: Vec<_> = absent.cloned().collect();
        absent.iter().for_each(|uid| self.gone(uid));
        self.mirrors_listed();
        self.shared.admission.expect(self.workers.keys().cloned());
        self.shared.directory.expect(self.workers.keys().cloned());
        self.sweep_at = Some(Instant::now());
    }

    /// Begins to look for what belongs to no Pod.
    fn sweep(&mut self) {
        if !self.statics.are_known() {
            self.sweep_at = Some(Instant::now() + SUBSCRIBE_AGAIN);
            return;
        }
        self.sweep_at = None;
        self.sweeping = Some(belongings(Arc::clone(&self.shared)).boxed());
    }

    /// Ends what belongs to no Pod.
    fn swept(&mut self, found: Found) {
        self.sweeping = None;
        match found {
            Ok(found) => found.into_iter().for_each(|(uid, pod)| self.adopt_orphan(uid, pod)),
            Err(error) => {
                self.sweep_at = Some(Instant::now() + SUBSCRIBE_AGAIN);
                tracing::warn!(error = chain(&error), "failed to look for what earlier Pods left; trying again");
            }
        }
    }

    fn adopt_orphan(&mut self, uid: String, pod: Pod) {
        // An environment is its function Pod's, for as long as that is there.
        let owner = crew::base(&uid);
        let known = self.workers.contains_key(&uid) || self.workers.contains_key(owner);
        if known || self.listing.contains(owner) || self.statics.has(owner) {
            return;
        }
        tracing::info!(uid, pod = pod.metadata.name, namespace = pod.metadata.namespace, "ending a Pod that is gone");
        self.hire(Duration::ZERO, uid, Desired { pod: Arc::new(pod), gone: true }, Past::Unknown);
    }
}

/// The runtime's events, if it begins with them in time.
async fn subscribe(shared: &Shared) -> Option<BoxStream<'static, RuntimeEvent>> {
    match tokio::time::timeout(SUBSCRIBE_PATIENCE, shared.runtime.events()).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => {
            tracing::warn!(error = chain(&error), "failed to subscribe to the runtime's events; trying again");
        }
        Err(_) => tracing::warn!("the runtime sent no events within {SUBSCRIBE_PATIENCE:?}; trying again"),
    }
    None
}

/// Everything on this node that belongs to a Pod: in the runtime, on disk, and among the addresses.
async fn belongings(shared: Arc<Shared>) -> Found {
    let mut found = BTreeMap::new();
    for sandbox in shared.runtime.list_pod_sandboxes(None).await? {
        found.entry(sandbox.pod.uid.clone()).or_insert_with(|| ghost(&sandbox.pod));
    }
    for container in shared.runtime.list_containers(None).await? {
        let pod = found.entry(container.pod.uid.clone()).or_insert_with(|| ghost(&container.pod));
        let grace = container.annotations.get(GRACE_ANNOTATION).and_then(|s| s.parse().ok());
        let spec = pod.spec.get_or_insert_default();
        spec.termination_grace_period_seconds = spec.termination_grace_period_seconds.max(grace);
    }
    let on_disk = shared.volumes.uids().await?;
    let addressed = shared.addresses.held().into_iter().map(|(_, uid)| uid).filter(|uid| !uid.starts_with(NO_POD));
    let uids: BTreeSet<String> = on_disk.into_iter().chain(addressed).collect();
    for uid in uids {
        found
            .entry(uid.clone())
            .or_insert_with(|| ghost(&PodRef { uid, namespace: String::new(), name: String::new() }));
    }
    Ok(found)
}

/// What the look found; never, while none is under way.
async fn look(sweeping: &mut Option<BoxFuture<'static, Found>>) -> Found {
    match sweeping {
        Some(look) => look.await,
        None => std::future::pending().await,
    }
}

/// Returns at that moment; never without one.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Whether the watch can never go on from where it was: the library lists anew when it is told so inside a watch, but
/// not when the server refuses to begin one.
fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(answer)) if answer.code == 410)
}

fn uid_of(pod: &Result<Pod, InvalidObject>) -> Option<String> {
    match pod {
        Ok(pod) => pod.metadata.uid.clone(),
        Err(invalid) => invalid.metadata.uid.clone(),
    }
}

/// A Pod of which nothing but its name is known.
fn ghost(pod: &PodRef) -> Pod {
    let metadata = ObjectMeta {
        uid: Some(pod.uid.clone()),
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        ..ObjectMeta::default()
    };
    Pod { metadata, spec: Some(PodSpec::default()), status: None }
}

/// The next event; without a stream, the end of one after a while.
async fn next(events: &mut Option<BoxStream<'static, RuntimeEvent>>) -> Option<RuntimeEvent> {
    match events {
        Some(stream) => {
            let event = stream.next().await;
            if event.is_none() {
                *events = None;
            }
            event
        }
        None => {
            tokio::time::sleep(SUBSCRIBE_AGAIN).await;
            None
        }
    }
}
