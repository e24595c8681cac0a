//! ConfigMaps, Secrets and Services by name, fetched when asked for and remembered for a second.
//!
//! A node's identity may get the objects that its Pods name, not list all there are. A ReplicaSet of
//! thirty Pods asks once: whoever comes while a request is under way waits for its answer.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};

/// How long an answer is believed.
pub const DEFAULT_TTL: Duration = Duration::from_secs(1);
/// Longest wait for one answer of the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits after a refusal. The authorizer learns from a watch of its own which objects a newly bound Pod names, and is
/// usually some milliseconds behind; 1.5 s in all.
const AFTER_FORBIDDEN: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(750),
];
/// Answers remembered per kind before the outdated ones are dropped.
const MANY: usize = 256;

/// Kinds of objects that volumes show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

/// One object of the API.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Objects that were used, and the `resourceVersion` of each; `None` for one that does not exist.
pub type Uses = BTreeMap<ObjectName, Option<String>>;

/// An object could not be fetched. That it does not exist is no error but `None`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("failed to get {kind} {namespace}/{name}")]
pub struct ObjectError {
    kind: &'static str,
    namespace: String,
    name: String,
    #[source]
    source: Arc<kube::Error>,
}

impl ObjectError {
    /// Whether the API server refused: this identity may not read that object.
    pub fn is_forbidden(&self) -> bool {
        is_status(&self.source, 403)
    }
}

/// Objects by name. Needs the right to `get` what Pods of this node name (the Node authorizer gives it).
pub struct Objects {
    config_maps: Slots<ConfigMap>,
    secrets: Slots<Secret>,
    services: Slots<Service>,
}

impl Objects {
    /// Answers are believed for `ttl` ([`DEFAULT_TTL`]).
    pub fn new(client: Client, ttl: Duration) -> Self {
        Self {
            config_maps: Slots::new(client.clone(), "configmap", ttl),
            secrets: Slots::new(client.clone(), "secret", ttl),
            services: Slots::new(client, "service", ttl),
        }
    }

    /// The ConfigMap, `None` if there is none of that name.
    ///
    /// # Errors
    /// The API server does not answer or refuses.
    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        self.config_maps.get(namespace, name).await
    }

    /// The Secret, `None` if there is none of that name.
    ///
    /// # Errors
    /// The API server does not answer or refuses.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Arc<Secret>>, ObjectError> {
        self.secrets.get(namespace, name).await
    }

    /// What is remembered of the object is believed no more.
    pub fn outdate(&self, name: &ObjectName) {
        match name.kind {
            Kind::ConfigMap => self.config_maps.forget(&name.namespace, &name.name),
            Kind::Secret => self.secrets.forget(&name.namespace, &name.name),
        }
    }

    /// The Service, `None` if there is none of that name.
    ///
    /// # Errors
    /// The API server does not answer or refuses.
    pub async fn service(&self, namespace: &str, name: &str) -> Result<Option<Arc<Service>>, ObjectError> {
        self.services.get(namespace, name).await
    }
}

type Answer<K> = Result<Option<Arc<K>>, ObjectError>;
/// The lock is held while the request is under way, which is what makes others wait for its answer.
type Slot<K> = Arc<tokio::sync::Mutex<Option<(Instant, Answer<K>)>>>;

struct Slots<K> {
    client: Client,
    kind: &'static str,
    ttl: Duration,
    slots: Mutex<HashMap<(String, String), Slot<K>>>,
}

impl<K> Slots<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    fn new(client: Client, kind: &'static str, ttl: Duration) -> Self {
        Self { client, kind, ttl, slots: Mutex::new(HashMap::new()) }
    }

    async fn get(&self, namespace: &str, name: &str) -> Answer<K> {
        let slot = self.slot(namespace, name);
        let mut slot = slot.lock().await;
        if let Some((fetched, answer)) = slot.as_ref().filter(|(fetched, _)| fetched.elapsed() < self.ttl) {
            tracing::trace!(kind = self.kind, namespace, name, age = ?fetched.elapsed(), "remembered");
            return answer.clone();
        }
        let answer = self.fetch(namespace, name).await;
        *slot = Some((Instant::now(), answer.clone()));
        answer
    }

    fn slot(&self, namespace: &str, name: &str) -> Slot<K> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MANY {
            slots.retain(|_, slot| match slot.try_lock() {
                Ok(slot) => slot.as_ref().is_some_and(|(fetched, _)| fetched.elapsed() < self.ttl),
                Err(_) => true,
            });
        }
        Arc::clone(slots.entry((namespace.to_owned(), name.to_owned())).or_default())
    }

    /// Whoever waits for an answer still gets it; whoever asks from now on gets a new one.
    fn forget(&self, namespace: &str, name: &str) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.remove(&(namespace.to_owned(), name.to_owned()));
    }

    async fn fetch(&self, namespace: &str, name: &str) -> Answer<K> {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let mut waits = AFTER_FORBIDDEN.iter();
        loop {
            let request = timeout(REQUEST_TIMEOUT, api.get_opt(name));
            let result = request.await.unwrap_or_else(|elapsed| Err(kube::Error::Service(elapsed.into())));
            let source = match result {
                Ok(object) => return Ok(object.map(Arc::new)),
                Err(error) => error,
            };
            match waits.next() {
                Some(wait) if is_status(&source, 403) => sleep(*wait).await,
                _ => {
                    return Err(ObjectError {
                        kind: self.kind,
                        namespace: namespace.to_owned(),
                        name: name.to_owned(),
                        source: Arc::new(source),
                    });
                }
            }
        }
    }
}

fn is_status(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}
