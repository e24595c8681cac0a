//! What happens to containers and sandboxes, told to those who listen (`GetContainerEvents`).
//!
//! A driver says which Pod something happened to. What it was follows from a look at the Pod, and from what it was like at
//! the look before: so nothing is told twice, and after a gap all that changed in it is told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::debug;

use super::core::Core;
use super::failure::status;
use super::tell::nanoseconds;
use crate::runtime::types::RuntimeEvent;
use crate::telemetry::chain;

/// Events that a slow listener may be behind. One that is further behind is told so and asked to list.
const BEHIND: usize = 1024;
/// Events that may wait until the logs of what ended are whole; then looks wait too.
const WAITING: usize = 1024;
/// Pods that wait for a look. If there are more, the next look is at all.
const PODS_WAITING: usize = 256;
/// How often all is looked at, should an event ever be missing.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Until an engine that went away, or did not answer, is asked again.
const PAUSE: Duration = Duration::from_secs(1);

type Told = v1::ContainerEventResponse;

/// Where a thing is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Created,
    Started,
    Stopped,
}

/// The way to those who listen.
#[derive(Debug)]
pub(super) struct Events {
    told: broadcast::Sender<Told>,
    looks: mpsc::Sender<String>,
    /// More Pods than can wait wanted a look.
    crowded: AtomicBool,
}

impl Events {
    /// The way, and the end of it that [`run`] works at.
    pub(super) fn new() -> (Self, mpsc::Receiver<String>) {
        let (looks, wanted) = mpsc::channel(PODS_WAITING);
        (Self { told: broadcast::Sender::new(BEHIND), looks, crowded: AtomicBool::new(false) }, wanted)
    }

    /// Something was done to this Pod of which drivers say nothing.
    pub(super) fn look(&self, pod_uid: &str) {
        if self.looks.try_send(pod_uid.to_owned()).is_err() {
            // Noticed with the next of those that wait.
            self.crowded.store(true, Ordering::SeqCst);
        }
    }

    /// What happens from now on, until `end`.
    pub(super) fn listen(&self, end: CancellationToken) -> BoxStream<'static, Result<Told, Status>> {
        let receiver = self.told.subscribe();
        let next = |(mut receiver, end): (broadcast::Receiver<Told>, CancellationToken)| async move {
            if end.is_cancelled() {
                return None;
            }
            let received = tokio::select! {
                // Cancel-safe: an event is taken or left.
                received = receiver.recv() => received,
                // Cancel-safe: a token stays cancelled.
                () = end.cancelled() => return None,
            };
            match received {
                Ok(event) => Some((Ok(event), (receiver, end))),
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    end.cancel();
                    let text = format!("{lost} events were lost: list, and listen again");
                    Some((Err(status(Code::ResourceExhausted, &text)), (receiver, end)))
                }
                Err(broadcast::error::RecvError::Closed) => None,
            }
        };
        futures::stream::unfold((receiver, end.child_token()), next).boxed()
    }
}

/// Looks at what drivers and this process's own verbs point to, until `end`.
pub(super) async fn run(core: Arc<Core>, looks: mpsc::Receiver<String>, end: CancellationToken) {
    let (happened, told) = mpsc::channel(WAITING);
    let watch = Watch { core: Arc::clone(&core), known: HashMap::new(), begun: false, owed: None, happened };
    tokio::join!(watch.run(looks, end), tell(&core, told));
}

/// Tells what happened, one after the other; of what has ended when its log is whole, for who sees the end reads it.
async fn tell(core: &Core, mut happened: mpsc::Receiver<(Instant, Told)>) {
    while let Some((seen, event)) = happened.recv().await {
        if event.container_event_type() == v1::ContainerEventType::ContainerStoppedEvent {
            core.log_whole(&event.container_id, seen).await;
        }
        // Nobody listening is fine.
        let _ = core.events.told.send(event);
    }
}

/// What is there, as it was at the last look.
struct Watch {
    core: Arc<Core>,
    /// By id: whose it is, and how far in its life.
    known: HashMap<String, (String, Stage)>,
    /// What is there at the first look did not happen now.
    begun: bool,
    /// When all is to be looked at, because a look failed.
    owed: Option<Instant>,
    /// To [`tell`]: what happened, and when that was seen.
    happened: mpsc::Sender<(Instant, Told)>,
}

impl Watch {
    async fn run(mut self, mut looks: mpsc::Receiver<String>, end: CancellationToken) {
        while !end.is_cancelled() {
            let events = self.core.runtime.events().await;
            // After the subscription, so that nothing happens in between.
            self.core.view.watched(events.is_ok());
            self.look(None).await;
            match events {
                Ok(events) => self.follow(events, &mut looks, &end).await,
                Err(error) => debug!(error = chain(&error), "failed to listen for events"),
            }
            self.core.view.watched(false);
            tokio::select! {
                // Cancel-safe: it only waits.
                () = sleep(PAUSE) => {}
                // Cancel-safe: a token stays cancelled.
                () = end.cancelled() => {}
            }
        }
    }

    async fn follow(
        &mut self,
        mut events: BoxStream<'static, RuntimeEvent>,
        looks: &mut mpsc::Receiver<String>,
        end: &CancellationToken,
    ) {
        let mut all = interval(LOOK_EVERY);
        // The first is at once, and was done.
        all.tick().await;
        loop {
            let uid = tokio::select! {
                // Cancel-safe: an event is taken or left.
                event = events.next() => match event {
                    Some(event) => {
                        self.core.view.changed(&event.pod_uid);
                        Some(event.pod_uid)
                    }
                    None => return,
                },
                // Cancel-safe: a Pod is taken or left.
                Some(uid) = looks.recv() => Some(uid),
                // Cancel-safe: a tick is taken or left.
                _ = all.tick() => {
                    self.core.view.watched(true);
                    None
                }
                // Cancel-safe: it only waits.
                () = owed(self.owed) => None,
                // Cancel-safe: a token stays cancelled.
                () = end.cancelled() => return,
            };
            let crowded = self.core.events.crowded.swap(false, Ordering::SeqCst);
            self.look(uid.as_deref().filter(|_| !crowded)).await;
        }
    }

    /// Looks at one Pod, or at all, and tells what is different. If that fails, at all a moment later.
    async fn look(&mut self, uid: Option<&str>) {
        let (sandboxes, containers) = match self.core.all_of(uid).await {
            Ok(found) => found,
            Err(error) => {
                debug!(error = error.message(), "failed to look at what happened");
                self.owed = Some(Instant::now() + PAUSE);
                return;
            }
        };
        if uid.is_none() {
            self.owed = None;
            self.core.are_all(&sandboxes);
        }
        let mut now = HashMap::new();
        for sandbox in &sandboxes {
            let stage = match sandbox.state() {
                v1::PodSandboxState::SandboxReady => Stage::Started,
                v1::PodSandboxState::SandboxNotready => Stage::Stopped,
            };
            let uid = sandbox.metadata.as_ref().map(|metadata| metadata.uid.clone()).unwrap_or_default();
            now.insert(sandbox.id.clone(), (uid, stage));
        }
        for (pod, container) in &containers {
            let stage = match container.state() {
                v1::ContainerState::ContainerCreated => Stage::Created,
                v1::ContainerState::ContainerRunning => Stage::Started,
                v1::ContainerState::ContainerExited | v1::ContainerState::ContainerUnknown => Stage::Stopped,
            };
            now.insert(container.id.clone(), (pod.clone(), stage));
        }
        let before = self.known.iter().filter(|(_, (pod, _))| uid.is_none_or(|uid| uid == pod));
        let before: HashMap<String, (String, Stage)> = before.map(|(id, known)| (id.clone(), known.clone())).collect();
        if self.begun {
            for (id, pod, kind) in difference(&before, &now) {
                if kind == v1::ContainerEventType::ContainerDeletedEvent {
                    self.core.vanished(&id);
                }
                self.note(id, &pod, kind, (&sandboxes[..], &containers[..])).await;
            }
        }
        self.known.retain(|id, _| !before.contains_key(id));
        self.known.extend(now);
        self.begun = true;
    }

    async fn note(
        &self,
        id: String,
        pod: &str,
        kind: v1::ContainerEventType,
        (sandboxes, containers): (&[v1::PodSandboxStatus], &[(String, v1::ContainerStatus)]),
    ) {
        let of_pod = |sandbox: &&v1::PodSandboxStatus| sandbox.metadata.as_ref().is_some_and(|about| about.uid == pod);
        // The latest, where a Pod has had several.
        let sandbox = sandboxes.iter().filter(of_pod).max_by_key(|sandbox| sandbox.created_at).cloned();
        let members = containers.iter().filter(|(owner, _)| owner == pod).map(|(_, container)| container.clone());
        let event = Told {
            container_id: id,
            container_event_type: kind.into(),
            created_at: nanoseconds(Some(Timestamp::now())),
            pod_sandbox_status: sandbox,
            containers_statuses: members.collect(),
        };
        // It waits for all that is sent.
        let _ = self.happened.send((Instant::now(), event)).await;
    }
}

/// Until then; without an end if there is no such time.
async fn owed(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What happened between two looks, in an order in which it can have happened.
fn difference(
    before: &HashMap<String, (String, Stage)>,
    now: &HashMap<String, (String, Stage)>,
) -> Vec<(String, String, v1::ContainerEventType)> {
    use v1::ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    let steps = [
        (Stage::Created, ContainerCreatedEvent),
        (Stage::Started, ContainerStartedEvent),
        (Stage::Stopped, ContainerStoppedEvent),
    ];
    let mut happened = Vec::new();
    for (id, (pod, stage)) in now {
        let since = before.get(id).map(|(_, stage)| *stage);
        let passed = steps.iter().filter(|(step, _)| since.is_none_or(|since| *step > since) && step <= stage);
        happened.extend(passed.map(|(_, kind)| (id.clone(), pod.clone(), *kind)));
    }
    let gone = before.iter().filter(|(id, _)| !now.contains_key(*id));
    for (id, (pod, stage)) in gone {
        if *stage == Stage::Started {
            happened.push((id.clone(), pod.clone(), ContainerStoppedEvent));
        }
        happened.push((id.clone(), pod.clone(), ContainerDeletedEvent));
    }
    happened
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::ContainerEventType as Kind;

    fn at(stages: &[(&str, Stage)]) -> HashMap<String, (String, Stage)> {
        stages.iter().map(|(id, stage)| ((*id).to_owned(), ("pod".to_owned(), *stage))).collect()
    }

    #[test]
    fn what_was_missed_between_two_looks_is_told_in_order() {
        let kinds = |before: &[(&str, Stage)], now: &[(&str, Stage)]| -> Vec<Kind> {
            difference(&at(before), &at(now)).into_iter().map(|(_, _, kind)| kind).collect()
        };
        use Kind::{ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent};
        let all = [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent];
        assert_eq!(kinds(&[], &[("c", Stage::Stopped)]), all);
        assert_eq!(kinds(&[("c", Stage::Created)], &[("c", Stage::Started)]), [ContainerStartedEvent]);
        assert_eq!(kinds(&[("c", Stage::Started)], &[("c", Stage::Started)]), []);
        assert_eq!(kinds(&[("c", Stage::Started)], &[]), [ContainerStoppedEvent, ContainerDeletedEvent]);
        assert_eq!(kinds(&[("c", Stage::Stopped)], &[]), [ContainerDeletedEvent]);
    }
}
