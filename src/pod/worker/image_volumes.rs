//! Volumes that show an image.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{Worker, trouble};
use crate::pod::backoff;
use crate::pod::images::Wanted;

impl Worker {
    /// Fetches the images that volumes of this container show, and their files; `None` puts the container on hold.
    pub(super) async fn show_images(&mut self, pod: &Pod, container: &Container) -> Option<()> {
        let mounted = |name: &str| container.volume_mounts.iter().flatten().any(|mount| mount.name == name);
        let in_guest = self.is_in_guests(pod).await;
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        for volume in volumes.filter(|volume| mounted(&volume.name)) {
            let Some(source) = &volume.image else { continue };
            let image = self.fetched(Wanted::by_volume(pod, source), &container.name).await?;
            if in_guest {
                // It is given the image itself.
                self.memory.places.get_or_insert_default().images.insert(volume.name.clone(), image.id);
                continue;
            }
            let shared = self.shared.clone();
            let whose = (self.reference.uid.as_str(), volume.name.as_str());
            match shared.volumes.images().mount(shared.runtime.as_ref(), &image.id, whose).await {
                Ok(path) => {
                    let places = self.memory.places.get_or_insert_default();
                    places.volumes.insert(volume.name.clone(), (path, true));
                }
                Err(error) => {
                    let trouble = trouble("CreateContainerError", &error);
                    let text = format!("Error: {}", trouble.message);
                    shared.events.warning(pod, Some(&container.name), "Failed", text);
                    self.hold(&container.name, trouble, Timestamp::now() + backoff::RETRY);
                    return None;
                }
            }
        }
        Some(())
    }
}
