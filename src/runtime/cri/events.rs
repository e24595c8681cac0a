//! The runtime's events as ours; where it has none, the differences between one list and the next.

use std::collections::HashMap;
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::Code;
use tracing::debug;

use super::client::{CriClient, ask};
use super::{CriRuntime, spec};
use crate::runtime::labels;
use crate::runtime::types::{EventKind, RuntimeEvent};
use crate::runtime::{Result, RuntimeError};

/// Events that may wait for a reader; then the runtime holds them back.
const WAITING: usize = 256;
/// How often a runtime without events is asked for lists, as a kubelet does.
const RELIST: Duration = Duration::from_secs(1);

/// Whether things run, by id, and whose they are.
type Seen = HashMap<String, (String, bool)>;

impl CriRuntime {
    pub(super) async fn subscribe(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let (client, owner, selector) = (self.client.clone(), self.owner().to_owned(), self.selector(&[]));
        // What is there now, for a runtime that has no events.
        let before = lists(&client, &selector).await?;
        let mut task = JoinSet::new();
        let (mut events, request) = (client.runtime.clone(), v1::GetEventsRequest {});
        let follow = client.clone();
        let since = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or_default();
        let mut call = Box::pin(async move { events.get_container_events(request).await });
        // Sent now: it is answered when the first event is there, so nobody waits for that.
        let answered = futures::poll!(&mut call);
        task.spawn(async move {
            let answer = match answered {
                Poll::Ready(answer) => answer,
                Poll::Pending => call.await,
            };
            match answer {
                Ok(told) => pass_on(told.into_inner(), (owner.as_str(), since), before, &sender).await,
                Err(status) if status.code() == Code::Unimplemented => {
                    relist(&follow, &selector, before, &sender).await
                }
                Err(status) => debug!(%status, "the container runtime tells no events"),
            }
        });
        // The subscription went first on the same connection: once this is answered it stands.
        self.client.unmet().await?;
        // With the stream the task ends.
        let events = stream::unfold((receiver, task), |(mut receiver, task)| async move {
            Some((receiver.recv().await?, (receiver, task)))
        });
        Ok(events.boxed())
    }
}

/// What happened at or after `since` (nanoseconds since 1970): containerd begins with what it told in the last minutes.
async fn pass_on(
    mut told: tonic::Streaming<v1::ContainerEventResponse>,
    (owner, since): (&str, i64),
    known: Seen,
    sender: &mpsc::Sender<RuntimeEvent>,
) {
    let mut pods = known.into_iter().map(|(id, (uid, _))| (id, uid)).collect();
    loop {
        match told.message().await {
            Ok(Some(event)) => {
                if let Some(ours) = translate(owner, &mut pods, &event)
                    && event.created_at >= since
                    && sender.send(ours).await.is_err()
                {
                    return;
                }
            }
            Ok(None) => return,
            Err(status) => return debug!(%status, "the event stream ended"),
        }
    }
}

/// `None` for what is not ours, and for creations, which nobody is told of. `pods` are the UIDs of those whose objects
/// there are: of a sandbox that was removed the runtime tells nothing but the id.
fn translate(
    owner: &str,
    pods: &mut HashMap<String, String>,
    event: &v1::ContainerEventResponse,
) -> Option<RuntimeEvent> {
    let told = event.pod_sandbox_status.as_ref();
    let told = told.and_then(|sandbox| spec::facts(owner, &sandbox.labels, &sandbox.annotations));
    let pod_uid = match told {
        Some(facts) => facts.pod.uid,
        None => pods.get(&event.container_id)?.clone(),
    };
    let kind = match event.container_event_type() {
        v1::ContainerEventType::ContainerCreatedEvent => {
            pods.insert(event.container_id.clone(), pod_uid);
            return None;
        }
        v1::ContainerEventType::ContainerStartedEvent => EventKind::Started,
        v1::ContainerEventType::ContainerStoppedEvent => EventKind::Exited,
        v1::ContainerEventType::ContainerDeletedEvent => {
            pods.remove(&event.container_id);
            EventKind::Removed
        }
    };
    Some(RuntimeEvent { pod_uid, kind })
}

async fn relist(
    client: &CriClient,
    selector: &HashMap<String, String>,
    mut before: Seen,
    sender: &mpsc::Sender<RuntimeEvent>,
) {
    loop {
        sleep(RELIST).await;
        let Ok(now) = lists(client, selector).await else { return };
        for event in differences(&before, &now) {
            if sender.send(event).await.is_err() {
                return;
            }
        }
        before = now;
    }
}

/// What must have happened between two looks.
fn differences(before: &Seen, now: &Seen) -> Vec<RuntimeEvent> {
    let event = |pod_uid: &str, kind| RuntimeEvent { pod_uid: pod_uid.to_owned(), kind };
    let mut events = Vec::new();
    for (id, (uid, runs)) in now {
        let ran = before.get(id).map(|(_, ran)| *ran);
        if *runs && ran != Some(true) {
            events.push(event(uid, EventKind::Started));
        }
        if !*runs && ran == Some(true) {
            events.push(event(uid, EventKind::Exited));
        }
    }
    let gone = before.iter().filter(|(id, _)| !now.contains_key(*id));
    events.extend(gone.map(|(_, (uid, _))| event(uid, EventKind::Removed)));
    events
}

async fn lists(client: &CriClient, selector: &HashMap<String, String>) -> Result<Seen, RuntimeError> {
    let tried = || "failed to list what the container runtime has".to_owned();
    let filter = v1::PodSandboxFilter { label_selector: selector.clone(), ..v1::PodSandboxFilter::default() };
    let sandboxes = ask!(client.runtime, list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }), tried);
    let filter = v1::ContainerFilter { label_selector: selector.clone(), ..v1::ContainerFilter::default() };
    let containers = ask!(client.runtime, list_containers(v1::ListContainersRequest { filter: Some(filter) }), tried);
    let (sandboxes, containers) = futures::try_join!(sandboxes, containers)?;
    let uid = |labels: &HashMap<String, String>| labels.get(labels::POD_UID).cloned().unwrap_or_default();
    let sandboxes = sandboxes.items.into_iter().map(|one| {
        let ready = one.state() == v1::PodSandboxState::SandboxReady;
        (one.id, (uid(&one.labels), ready))
    });
    let containers = containers.containers.into_iter().map(|one| {
        let running = one.state() == v1::ContainerState::ContainerRunning;
        (one.id, (uid(&one.labels), running))
    });
    Ok(sandboxes.chain(containers).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(all: &[(&str, &str, bool)]) -> Seen {
        all.iter().map(|(id, uid, runs)| ((*id).to_owned(), ((*uid).to_owned(), *runs))).collect()
    }

    #[test]
    fn two_lists_tell_what_happened_between_them() {
        let before = seen(&[("a", "u1", false), ("b", "u2", true), ("c", "u3", false), ("d", "u4", true)]);
        let now =
            seen(&[("a", "u1", true), ("b", "u2", false), ("d", "u4", true), ("e", "u5", false), ("f", "u6", true)]);
        let mut told: Vec<_> =
            differences(&before, &now).into_iter().map(|event| (event.pod_uid, event.kind)).collect();
        told.sort_by(|a, b| a.0.cmp(&b.0));
        let wanted = [
            ("u1", EventKind::Started),
            ("u2", EventKind::Exited),
            ("u3", EventKind::Removed),
            ("u6", EventKind::Started),
        ];
        assert_eq!(told, wanted.map(|(uid, kind)| (uid.to_owned(), kind)));
        assert!(differences(&now, &now).is_empty());
    }

    #[test]
    fn an_event_of_somebody_elses_is_none_of_ours() {
        let labels =
            [(labels::OWNER, "o"), ("lambdalet.dev/kind", "sandbox"), (labels::POD_UID, "u"), (labels::ATTEMPT, "0")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let status = v1::PodSandboxStatus { labels, ..v1::PodSandboxStatus::default() };
        let event = |kind: v1::ContainerEventType, status: Option<&v1::PodSandboxStatus>| v1::ContainerEventResponse {
            container_id: "c".to_owned(),
            container_event_type: kind.into(),
            pod_sandbox_status: status.cloned(),
            ..v1::ContainerEventResponse::default()
        };
        use v1::ContainerEventType::{ContainerCreatedEvent, ContainerDeletedEvent, ContainerStoppedEvent};
        let mut pods = HashMap::new();
        let stopped = event(ContainerStoppedEvent, Some(&status));
        let wanted = |kind| Some(RuntimeEvent { pod_uid: "u".to_owned(), kind });
        assert_eq!(translate("o", &mut pods, &stopped), wanted(EventKind::Exited));
        assert_eq!(translate("another", &mut pods, &stopped), None);
        let gone = event(ContainerDeletedEvent, None);
        assert_eq!(translate("o", &mut pods, &gone), None, "nobody knows whose it was");
        assert_eq!(translate("o", &mut pods, &event(ContainerCreatedEvent, Some(&status))), None);
        assert_eq!(translate("o", &mut pods, &gone), wanted(EventKind::Removed));
        assert!(pods.is_empty());
    }
}
