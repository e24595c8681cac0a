//! RuntimeClasses by name: which handler each means. Looked up when a Pod that names one is to run, as a kubelet does.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, Client};
use tokio::time::{Instant, timeout};

use crate::telemetry::chain;

/// How long a class is believed to be as it was: its handler never changes, it can only be made anew.
const TTL: Duration = Duration::from_secs(10);
/// Longest wait for the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Classes remembered before all are looked up anew.
const MANY: usize = 64;
/// What the names of this project's own classes begin with (`manifests/runtimeclasses.yaml`).
const OWN: &str = "lambdalet-";

/// The classes of the cluster. Needs the right to `get` them (which the Node authorizer gives).
pub struct RuntimeClasses {
    client: Option<Client>,
    known: Mutex<HashMap<String, (Instant, String)>>,
}

impl RuntimeClasses {
    /// Those of this API server.
    pub fn new(client: Client) -> Self {
        Self { client: Some(client), known: Mutex::default() }
    }

    /// Where there is no API server: `lambdalet-docker` and `lambdalet-microvm`, as this project's manifests have them.
    pub fn of_manifests() -> Self {
        Self { client: None, known: Mutex::default() }
    }

    /// The handler of the class.
    ///
    /// # Errors
    /// In the kubelet's words: there is no such class, or it could not be looked up.
    pub async fn handler(&self, name: &str) -> Result<String, String> {
        let absent = || format!("runtimeclass.node.k8s.io {name:?} not found");
        let Some(client) = &self.client else {
            return name.strip_prefix(OWN).map(str::to_owned).ok_or_else(absent);
        };
        if let Some((at, handler)) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name)
            && at.elapsed() < TTL
        {
            return Ok(handler.clone());
        }
        let failed = |error: &(dyn std::error::Error + 'static)| {
            format!("failed to lookup RuntimeClass {name}: {}", chain(error))
        };
        let classes: Api<RuntimeClass> = Api::all(client.clone());
        let found = timeout(REQUEST_TIMEOUT, classes.get_opt(name)).await.map_err(|late| failed(&late))?;
        let handler = found.map_err(|error| failed(&error))?.ok_or_else(absent)?.handler;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MANY {
            known.clear();
        }
        known.insert(name.to_owned(), (Instant::now(), handler.clone()));
        Ok(handler)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_an_api_server_the_manifests_classes_are_known() {
        let classes = RuntimeClasses::of_manifests();
        assert_eq!(classes.handler("lambdalet-microvm").await.as_deref(), Ok("microvm"));
        assert_eq!(classes.handler("gvisor").await.unwrap_err(), "runtimeclass.node.k8s.io \"gvisor\" not found");
    }
}
