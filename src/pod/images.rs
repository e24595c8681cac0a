//! The image a container needs: present, pulled, or a reason why not.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, Pod};
use tokio::sync::Semaphore;

use super::status::Trouble;
use crate::events::Events;
use crate::runtime::types::{Image, RegistryAuth};
use crate::runtime::{Kind, Runtime, RuntimeError};
use crate::telemetry::chain;

/// Fetches images, so many at once.
#[derive(Debug)]
pub struct Images {
    pulls: Semaphore,
}

/// An image that is wanted.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// For events.
    pub pod: &'a Pod,
    /// The container that runs it; `None` if a volume shows it.
    pub container: Option<&'a str>,
    /// As the user wrote it.
    pub reference: &'a str,
    /// When it is fetched: `Always`, `IfNotPresent` or `Never`.
    pub policy: &'a str,
}

impl<'a> Wanted<'a> {
    /// The image that a container runs.
    pub fn by_container(pod: &'a Pod, container: &'a Container) -> Self {
        let reference = container.image.as_deref().unwrap_or_default();
        let policy = pull_policy(container.image_pull_policy.as_deref(), reference);
        Self { pod, container: Some(&container.name), reference, policy }
    }

    /// The image that a volume shows.
    pub fn by_volume(pod: &'a Pod, source: &'a ImageVolumeSource) -> Self {
        let reference = source.reference.as_deref().unwrap_or_default();
        Self { pod, container: None, reference, policy: pull_policy(source.pull_policy.as_deref(), reference) }
    }
}

/// What is known without asking a registry.
pub enum Local {
    /// It is here and may be used.
    Present(Image),
    /// It must be fetched first.
    MustPull,
}

impl Images {
    /// At most `parallel` pulls at once (`maxParallelImagePulls`; 1 is `serializeImagePulls`).
    pub fn new(parallel: usize) -> Self {
        Self { pulls: Semaphore::new(parallel.max(1)) }
    }

    /// Looks for the image on this node, by its pull policy.
    ///
    /// # Errors
    /// The waiting state of the container: `ErrImageNeverPull`, `InvalidImageName`, `ImageInspectError`.
    pub async fn look(&self, runtime: &dyn Runtime, wanted: Wanted<'_>, events: &Events) -> Result<Local, Trouble> {
        let reference = wanted.reference;
        let present = match runtime.image_status(reference).await {
            Ok(present) => present,
            Err(error) if error.kind() == Kind::Invalid => return Err(invalid_name(reference, &error)),
            Err(error) => {
                let text = format!("Failed to inspect image {reference:?}: {}", chain(&error));
                return Err(Trouble::new("ImageInspectError", text));
            }
        };
        match (wanted.policy, present) {
            ("Never", None) => {
                let text = format!("Container image {reference:?} is not present with pull policy of Never");
                Err(Trouble::new("ErrImageNeverPull", text))
            }
            ("Never" | "IfNotPresent", Some(image)) => {
                let text = format!("Container image {reference:?} already present on machine");
                events.normal(wanted.pod, wanted.container, "Pulled", text);
                Ok(Local::Present(image))
            }
            _ => Ok(Local::MustPull),
        }
    }

    /// Fetches the image.
    ///
    /// # Errors
    /// The waiting state of the container: `ErrImagePull`, `RegistryUnavailable`, `InvalidImageName`.
    pub async fn pull(
        &self,
        runtime: &dyn Runtime,
        wanted: Wanted<'_>,
        auths: &[RegistryAuth],
        events: &Events,
    ) -> Result<Image, Trouble> {
        let reference = wanted.reference;
        let container = wanted.container;
        let asked = Instant::now();
        let Ok(_permit) = self.pulls.acquire().await else {
            return Err(Trouble::new("ErrImagePull", "this node is shutting down"));
        };
        events.normal(wanted.pod, container, "Pulling", format!("Pulling image {reference:?}"));
        let began = Instant::now();
        let pulled = runtime.pull_image(reference, auths).await;
        let image = match pulled {
            Ok(id) => runtime.image_status(id.as_str()).await,
            Err(error) => Err(error),
        };
        match image {
            Ok(Some(image)) => {
                let (took, all) = (seconds(began.elapsed()), seconds(asked.elapsed()));
                let text = format!(
                    "Successfully pulled image {reference:?} in {took} ({all} including waiting). Image size: {} bytes.",
                    image.size
                );
                events.normal(wanted.pod, container, "Pulled", text);
                Ok(image)
            }
            Ok(None) => Err(failed(wanted, events, "the image vanished right after it was pulled")),
            Err(error) if error.kind() == Kind::Invalid => Err(invalid_name(reference, &error)),
            Err(error) => Err(failed(wanted, events, &chain(&error))),
        }
    }
}

fn failed(wanted: Wanted<'_>, events: &Events, cause: &str) -> Trouble {
    let text = format!("Failed to pull image {:?}: {cause}", wanted.reference);
    events.warning(wanted.pod, wanted.container, "Failed", text);
    Trouble::new("ErrImagePull", cause)
}

fn invalid_name(reference: &str, error: &RuntimeError) -> Trouble {
    let text = format!("Failed to apply default image tag {reference:?}: couldn't parse image name: {}", chain(error));
    Trouble::new("InvalidImageName", text)
}

/// The API server fills the policy in; this is its rule for a Pod that came another way.
fn pull_policy<'a>(told: Option<&'a str>, reference: &str) -> &'a str {
    match told {
        Some(policy) if !policy.is_empty() => policy,
        _ if reference.ends_with(":latest") || !reference.contains(':') => "Always",
        _ => "IfNotPresent",
    }
}

fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{}ms", time.as_millis())
    } else {
        format!("{:.3}s", time.as_secs_f64())
    }
}
