//! What a container needs from the API: ConfigMaps, Secrets, service variables, pull secrets.
//!
//! ```text
//! Objects (get, one second) --+
//! Services (watch)           -+--> env: (name, value) in order --> expand: command, args
//! pull secrets                --> registry: credentials for an image
//! ```

pub mod downward;
pub mod env;
pub mod expand;
pub mod following;
pub mod objects;
pub mod registry;
pub mod services;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Container, Pod, Service};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::PodContext;
use super::static_pods::is_static;
use crate::runtime::types::RegistryAuth;
use env::Environment;
use objects::{ObjectError, Objects};

/// Longest wait for the first list of Services.
const SERVICES_TIMEOUT: Duration = Duration::from_secs(10);

/// What a container needs could not be had. The container waits with reason [`InputError::REASON`].
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Something the Pod names is missing, wrong or not supported; in the kubelet's words.
    #[error("{message}")]
    Refused {
        /// What, and its name.
        message: String,
    },
    /// An object could not be read.
    #[error("failed to prepare {what}")]
    Object {
        /// What it was needed for.
        what: String,
        /// Which object, and why.
        #[source]
        source: ObjectError,
    },
    /// Services are not known yet.
    #[error("services have not been read at least once, so the environment cannot be made")]
    ServicesUnknown,
}

impl InputError {
    /// The reason a container waits with.
    pub const REASON: &'static str = "CreateContainerConfigError";
}

/// Credentials for an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistryAuths {
    /// To be tried in this order, then none.
    pub auths: Vec<RegistryAuth>,
    /// Secrets that are missing or malformed, one text each, for an event (`FailedToRetrieveImagePullSecret`).
    pub warnings: Vec<String>,
}

/// Fetches what containers need.
///
/// Needs the rights to `get` what Pods name, and to `list` and `watch` Services. Dropping it ends the watch.
pub struct Inputs {
    client: Client,
    objects: Arc<Objects>,
    services: OnceCell<Services>,
    services_timeout: Duration,
}

/// The Services of the cluster, and the task that keeps them current.
struct Services {
    store: Store<Service>,
    _watch: JoinSet<()>,
}

// === impl Inputs ===

impl Inputs {
    /// Fetches by `client`; shares `objects` with the volumes.
    pub fn new(client: Client, objects: Arc<Objects>) -> Self {
        Self { client, objects, services: OnceCell::new(), services_timeout: SERVICES_TIMEOUT }
    }

    /// The container's environment. The first call for a Pod with service links (the default) starts the watch of
    /// Services and waits for its list, ten seconds at most.
    ///
    /// # Errors
    /// What is missing and not optional, or cannot be read.
    pub async fn env(&self, ctx: PodContext<'_>, container: &Container) -> Result<Environment, InputError> {
        let sources = self.sources(ctx, container);
        let (services, sources) = futures::try_join!(self.service_variables(ctx.pod, &container.name), sources)?;
        env::environment(&ctx, container, &sources, services).map_err(|message| InputError::Refused { message })
    }

    /// A command or its arguments with `$(VAR)` replaced from the container's environment.
    pub fn expand(&self, words: &[String], environment: &[(String, String)]) -> Vec<String> {
        let lookup =
            |name: &str| environment.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        words.iter().map(|word| expand::expand(word, lookup)).collect()
    }

    /// The credentials that the Pod's `imagePullSecrets` hold for an image (admission has put in those of its service
    /// account). A missing or malformed secret is reported, not an error: the image may be public.
    ///
    /// # Errors
    /// A secret cannot be read.
    pub async fn registry_auths(&self, pod: &Pod, image: &str) -> Result<RegistryAuths, InputError> {
        let namespace = namespace(pod);
        let named = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
        let mut keys = registry::Keys::new();
        let mut warnings = Vec::new();
        for name in named.map(|reference| reference.name.as_str()).filter(|name| !name.is_empty()) {
            let found = self
                .objects
                .secret(namespace, name)
                .await
                .map_err(|source| InputError::Object { what: format!("the pull of {image}"), source })?;
            match found.as_deref().map(registry::keys) {
                Some(Ok(more)) => keys.extend(more),
                Some(Err(reason)) => {
                    warnings.push(format!("image pull secret {namespace}/{name} is not usable: {reason}"))
                }
                None => warnings.push(format!("image pull secret {namespace}/{name} not found")),
            }
        }
        Ok(RegistryAuths { auths: registry::select(&keys, image), warnings })
    }

    /// Every object that the container's environment names.
    async fn sources(&self, ctx: PodContext<'_>, container: &Container) -> Result<env::Sources, InputError> {
        let namespace = namespace(ctx.pod);
        let failed = |source| environment_error(&container.name, source);
        let mut sources = env::Sources::default();
        for name in env::config_maps(container) {
            let found = self.objects.config_map(namespace, name).await.map_err(failed)?;
            sources.config_maps.extend(found.map(|found| (name.to_owned(), found)));
        }
        for name in env::secrets(container) {
            let found = self.objects.secret(namespace, name).await.map_err(failed)?;
            sources.secrets.extend(found.map(|found| (name.to_owned(), found)));
        }
        Ok(sources)
    }

    async fn service_variables(&self, pod: &Pod, container: &str) -> Result<Vec<(String, String)>, InputError> {
        let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
        if !links && is_static(pod) {
            // It must start where there is no API server to ask.
            return Ok(Vec::new());
        }
        let variables = if links {
            let services = self.services().await?;
            services::variables(services.iter().map(Arc::as_ref), namespace(pod), true)
        } else {
            let (namespace, name) = (services::MASTER_NAMESPACE, services::MASTER_SERVICE);
            let found = self.objects.service(namespace, name).await;
            let found = found.map_err(|source| environment_error(container, source))?;
            services::variables(found.as_deref(), namespace, false)
        };
        Ok(variables.into_iter().collect())
    }

    async fn services(&self) -> Result<Vec<Arc<Service>>, InputError> {
        let services = self.services.get_or_init(|| async { Services::watch(self.client.clone()) }).await;
        match tokio::time::timeout(self.services_timeout, services.store.wait_until_ready()).await {
            Ok(Ok(())) => Ok(services.store.state()),
            Ok(Err(_)) | Err(_) => Err(InputError::ServicesUnknown),
        }
    }
}

impl Services {
    fn watch(client: Client) -> Self {
        let (store, writer) = reflector::store();
        let events =
            watcher(Api::<Service>::all(client), watcher::Config::default()).default_backoff().modify(|service| {
                // Only names, addresses and ports are looked at; a cluster's Services can carry much else.
                service.metadata.managed_fields = None;
                service.metadata.annotations = None;
                service.status = None;
            });
        let mut watch = JoinSet::new();
        watch.spawn(reflector::reflector(writer, events).for_each(|event| async {
            match event {
                Ok(_) => debug!("services changed"),
                Err(error) => {
                    warn!(error = crate::telemetry::chain(&error), "the watch of services failed; it goes on")
                }
            }
        }));
        Self { store, _watch: watch }
    }
}

fn environment_error(container: &str, source: ObjectError) -> InputError {
    InputError::Object { what: format!("the environment of container {container}"), source }
}

fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

#[cfg(test)]
mod tests;
