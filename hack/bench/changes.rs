//! What becomes of Pods, whatever becomes of the connection: a watch that ends is opened again where it was, and where
//! that is no longer possible the Pods are listed anew.

use std::collections::{HashSet, VecDeque};

use futures::StreamExt as _;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};

/// Something that a watch told.
pub(crate) enum Change {
    /// The Pod is new, or changed.
    Seen(Box<Pod>),
    /// No Pod of that name exists any more.
    Gone(String),
}

/// The changes of the Pods of one namespace.
pub(crate) struct Changes {
    events: BoxStream<'static, watcher::Result<Event<Pod>>>,
    known: HashSet<String>,
    listed: HashSet<String>,
    gone: VecDeque<String>,
    troubles: usize,
}

impl Changes {
    pub(crate) fn of(pods: Api<Pod>) -> Self {
        let events = watcher(pods, watcher::Config::default()).default_backoff().boxed();
        Self { events, known: HashSet::new(), listed: HashSet::new(), gone: VecDeque::new(), troubles: 0 }
    }

    /// How often the watch had to begin again; the times measured then are too long.
    pub(crate) fn troubles(&self) -> usize {
        self.troubles
    }

    /// The next change. Dropping it loses nothing.
    pub(crate) async fn next(&mut self) -> Change {
        loop {
            if let Some(name) = self.gone.pop_front() {
                return Change::Gone(name);
            }
            // The stream never ends; it tries again after each error.
            match self.events.next().await {
                Some(Ok(event)) => {
                    if let Some(change) = self.digest(event) {
                        return change;
                    }
                }
                Some(Err(error)) => {
                    self.troubles += 1;
                    eprintln!("the watch begins again: {error}");
                }
                None => return std::future::pending().await,
            }
        }
    }

    fn digest(&mut self, event: Event<Pod>) -> Option<Change> {
        match event {
            Event::Apply(pod) | Event::InitApply(pod) => {
                let name = pod.metadata.name.clone().unwrap_or_default();
                self.listed.insert(name.clone());
                self.known.insert(name);
                Some(Change::Seen(Box::new(pod)))
            }
            Event::Delete(pod) => {
                let name = pod.metadata.name.unwrap_or_default();
                self.known.remove(&name);
                Some(Change::Gone(name))
            }
            Event::Init => {
                self.listed.clear();
                None
            }
            Event::InitDone => {
                self.gone.extend(self.known.difference(&self.listed).cloned());
                self.known.retain(|name| self.listed.contains(name));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    fn pod(name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.to_owned());
        pod
    }

    #[tokio::test]
    async fn what_was_missed_while_there_was_no_watch_is_told_after_it() {
        let events = [
            Ok(Event::Init),
            Ok(Event::InitApply(pod("a"))),
            Ok(Event::InitApply(pod("b"))),
            Ok(Event::InitDone),
            Err(watcher::Error::NoResourceVersion),
            Ok(Event::Init),
            Ok(Event::InitApply(pod("b"))),
            Ok(Event::InitApply(pod("c"))),
            Ok(Event::InitDone),
            Ok(Event::Delete(pod("c"))),
        ];
        let mut changes = Changes {
            events: stream::iter(events).boxed(),
            known: HashSet::new(),
            listed: HashSet::new(),
            gone: VecDeque::new(),
            troubles: 0,
        };
        let mut told = Vec::new();
        for _ in 0..6 {
            told.push(match changes.next().await {
                Change::Seen(pod) => format!("+{}", pod.metadata.name.unwrap()),
                Change::Gone(name) => format!("-{name}"),
            });
        }
        assert_eq!(told, ["+a", "+b", "+b", "+c", "-a", "-c"]);
        assert_eq!(changes.troubles(), 1);
    }
}
