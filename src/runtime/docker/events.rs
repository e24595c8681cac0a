//! Docker's events as ours.

use std::collections::HashMap;

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use hyper::Method;
use jiff::Timestamp;
use serde::Deserialize;

use super::{DockerRuntime, http, labels};
use crate::runtime::types::{EventKind, RuntimeEvent};
use crate::runtime::{Kind, Result, RuntimeError};

const TRIED: &str = "failed to subscribe to Docker's events";

/// The part of an event that is read; Docker adds kinds and fields freely.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(rename = "Action", default)]
    action: String,
    #[serde(rename = "Actor", default)]
    actor: Actor,
}

#[derive(Debug, Default, Deserialize)]
struct Actor {
    #[serde(rename = "ID", default)]
    id: String,
    #[serde(rename = "Attributes", default)]
    attributes: HashMap<String, String>,
}

impl DockerRuntime {
    pub(super) async fn subscribe(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        let mut filters = labels::filter(self.owner(), &[]);
        filters.insert("type".into(), vec!["container".into()]);
        filters.insert("event".into(), ["start", "die", "oom", "destroy"].map(String::from).into());
        let filters = serde_json::to_string(&filters)
            .map_err(|error| RuntimeError::new(Kind::Internal, TRIED).with_source(error))?;
        // The daemon answers a moment before it listens; what falls in between it repeats because of "since".
        let since = super::io::unix_time(Timestamp::now());
        let target = format!("/events?since={since}&filters={}", http::query_value(&filters));
        let body = http::request(&self.options.socket, TRIED, Method::GET, &target, None).await?;
        let events = http::json_lines::<Event>(body, "failed to read Docker's events");
        let verdicts = self.verdicts.clone();
        let ours = events
            .inspect_err(|error| {
                tracing::debug!(error = crate::telemetry::chain(error), "the event stream ended");
            })
            // An event that cannot be read ends the stream as a lost connection does: the caller lists again.
            .take_while(|event| std::future::ready(event.is_ok()))
            .filter_map(move |event| {
                let told = event.ok().and_then(|event| {
                    let id = event.actor.id.clone();
                    let ours = translate(event)?;
                    if ours.kind == EventKind::OutOfMemory {
                        verdicts.convict(&id);
                    }
                    Some(ours)
                });
                std::future::ready(told)
            });
        Ok(ours.boxed())
    }
}

fn translate(mut event: Event) -> Option<RuntimeEvent> {
    let kind = match event.action.as_str() {
        "start" => EventKind::Started,
        "die" => EventKind::Exited,
        "oom" => EventKind::OutOfMemory,
        "destroy" => EventKind::Removed,
        _ => return None,
    };
    Some(RuntimeEvent { pod_uid: event.actor.attributes.remove(labels::POD_UID)?, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_skipped() {
        let event = |json: &str| translate(serde_json::from_str(json).unwrap());
        assert_eq!(event(r#"{"Type":"new kind","Action":"exec_start: sh"}"#), None);
        let json = r#"{"Action":"die","Actor":{"Attributes":{"lambdalet.dev/pod-uid":"u1","exitCode":"3"}}}"#;
        assert_eq!(event(json), Some(RuntimeEvent { pod_uid: "u1".into(), kind: EventKind::Exited }));
        assert_eq!(event(r#"{"Action":"die"}"#), None);
    }
}
