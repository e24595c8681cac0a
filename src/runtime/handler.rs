//! Several drivers as one: each sandbox is the affair of the driver that its handler names.
//!
//! ```text
//! run_pod_sandbox(handler "microvm") --> microvm     its ids become "microvm.<id>"
//! every other verb, by its id        --> whose it is
//! images                             --> one store for all: a driver brings over what it needs from there, and what it
//!                                        has of its own counts too
//! ```
//! The ids of the node's own driver stay as they are, so what ran before there was a second one is found again.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::future::{ready, try_join_all};
use futures::stream::{self, BoxStream};

use super::session::{AttachRequest, Duplex, ExecRequest, Session};
use super::stats::{ImageFs, SandboxStats, StatsScope};
use super::types::{
    CgroupDriver, ContainerConfig, ContainerId, ContainerStatus, Grace, Image, ImageId, LogChunk, LogOptions,
    RegistryAuth, Resources, RuntimeEvent, RuntimeVersion, SandboxConfig, SandboxId, SandboxStatus,
};
use super::{ImageStore, Kind, Result, Runtime, RuntimeError, SandboxRuntime};
use crate::telemetry::chain;

/// The handlers that there are; each may be followed by `-` and a word that makes a choice within it (`microvm-qemu`).
const FAMILIES: [&str; 2] = ["docker", "microvm"];

/// The handler without the choice within it.
pub fn family(handler: &str) -> &str {
    handler.split_once('-').map_or(handler, |(family, _)| family)
}

/// The handler before an id that is not the node's own driver's, and the id as its driver wrote it.
fn foreign(id: &str) -> Option<(&str, &str)> {
    id.split_once('.').filter(|(handler, _)| FAMILIES.contains(&family(handler)))
}

/// The handler whose sandbox or container this is, where `own` is that of the node's own driver.
pub fn handler_of<'a>(own: &'a str, id: &'a str) -> &'a str {
    foreign(id).map_or(own, |(handler, _)| handler)
}

/// A container's id as the API writes it, `HANDLER://ID`, where `own` is the handler of the node's own driver.
pub fn with_scheme(own: &str, id: &ContainerId) -> String {
    match foreign(id.as_str()) {
        Some((handler, id)) => format!("{handler}://{id}"),
        None => format!("{own}://{id}"),
    }
}

/// A driver, and what RuntimeClasses call it.
#[derive(Clone)]
pub struct Named {
    /// The handler (`docker`, `microvm`): letters, digits and `-`.
    pub handler: String,
    /// The driver.
    pub runtime: Arc<dyn Runtime>,
}

impl fmt::Debug for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Named").field(&self.handler).finish()
    }
}

/// Drivers side by side.
#[derive(Debug)]
pub struct Handlers {
    /// For sandboxes that name none.
    own: Named,
    others: Vec<Named>,
    /// Whose images those of the node are, by its handler.
    images: Named,
}

/// A driver as it is reached here, and how its ids are written above.
#[derive(Clone, Copy)]
struct Via<'a> {
    runtime: &'a Arc<dyn Runtime>,
    /// Before each of its ids; `None` for the node's own driver.
    prefix: Option<&'a str>,
}

impl Via<'_> {
    fn above(&self, id: &str) -> String {
        match self.prefix {
            Some(prefix) => format!("{prefix}.{id}"),
            None => id.to_owned(),
        }
    }

    fn sandbox(&self, status: SandboxStatus) -> SandboxStatus {
        SandboxStatus { id: self.above(status.id.as_str()).into(), ..status }
    }

    fn container(&self, status: ContainerStatus) -> ContainerStatus {
        let (id, sandbox) = (self.above(status.id.as_str()).into(), self.above(status.sandbox.as_str()).into());
        ContainerStatus { id, sandbox, ..status }
    }

    fn stats(&self, mut stats: SandboxStats) -> SandboxStats {
        stats.id = self.above(stats.id.as_str()).into();
        for container in &mut stats.containers {
            container.id = self.above(container.id.as_str()).into();
        }
        stats
    }
}

impl Handlers {
    /// `own` runs what names no handler. The images of all are those of the driver whose handler is `images`, or of `own`
    /// if there is none of that name.
    pub fn new(own: Named, others: Vec<Named>, images: &str) -> Self {
        let images = others.iter().find(|other| other.handler == images).unwrap_or(&own).clone();
        Self { own, others, images }
    }

    fn via<'a>(&'a self, other: &'a Named) -> Via<'a> {
        Via { runtime: &other.runtime, prefix: Some(&other.handler) }
    }

    fn all(&self) -> Vec<Via<'_>> {
        let own = Via { runtime: &self.own.runtime, prefix: None };
        std::iter::once(own).chain(self.others.iter().map(|other| self.via(other))).collect()
    }

    /// The drivers whose images are not the node's.
    fn beside_images(&self) -> Vec<Via<'_>> {
        let mut all = self.all();
        all.retain(|via| !Arc::ptr_eq(via.runtime, &self.images.runtime));
        all
    }

    /// The driver that an id belongs to, and the id as that knows it.
    fn of<'i>(&self, id: &'i str) -> (Via<'_>, &'i str) {
        let of_other = |other: &Named| id.strip_prefix(other.handler.as_str())?.strip_prefix('.');
        let found = self.others.iter().find_map(|other| Some((self.via(other), of_other(other)?)));
        found.unwrap_or((Via { runtime: &self.own.runtime, prefix: None }, id))
    }

    fn of_sandbox(&self, id: &SandboxId) -> (Via<'_>, SandboxId) {
        let (via, id) = self.of(id.as_str());
        (via, id.into())
    }

    fn of_container(&self, id: &ContainerId) -> (Via<'_>, ContainerId) {
        let (via, id) = self.of(id.as_str());
        (via, id.into())
    }

    fn handling(&self, handler: Option<&str>) -> Result<Via<'_>> {
        match handler.filter(|handler| *handler != self.own.handler) {
            None => Ok(Via { runtime: &self.own.runtime, prefix: None }),
            Some(handler) => {
                let found = self.others.iter().find(|other| other.handler == handler);
                found.map(|other| self.via(other)).ok_or_else(|| {
                    RuntimeError::new(Kind::Unsupported, format!("this node has no handler {handler:?}"))
                })
            }
        }
    }
}

/// What a driver has that does not answer, as one that this host cannot run: nothing.
fn passed_over<T: Default>(error: &RuntimeError) -> T {
    tracing::debug!(error = chain(error), "the images of a driver are not counted");
    T::default()
}

#[async_trait]
impl SandboxRuntime for Handlers {
    async fn version(&self) -> Result<RuntimeVersion> {
        self.own.runtime.version().await
    }

    async fn cgroup_driver(&self) -> Result<CgroupDriver> {
        self.own.runtime.cgroup_driver().await
    }

    /// The node is as ready as its own driver. A Pod of another fails to start with that one's reason.
    async fn ready(&self) -> Result<()> {
        self.own.runtime.ready().await
    }

    async fn close(&self) {
        for driver in self.others.iter().chain([&self.own]) {
            driver.runtime.close().await;
        }
    }

    async fn run_pod_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        let via = self.handling(config.handler.as_deref())?;
        let id = via.runtime.run_pod_sandbox(config).await?;
        Ok(via.above(id.as_str()).into())
    }

    async fn stop_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        let (via, id) = self.of_sandbox(id);
        via.runtime.stop_pod_sandbox(&id).await
    }

    async fn remove_pod_sandbox(&self, id: &SandboxId) -> Result<()> {
        let (via, id) = self.of_sandbox(id);
        via.runtime.remove_pod_sandbox(&id).await
    }

    async fn pod_sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        let (via, id) = self.of_sandbox(id);
        Ok(via.sandbox(via.runtime.pod_sandbox_status(&id).await?))
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        let lists = self.all().into_iter().map(|via| async move {
            let list = via.runtime.list_pod_sandboxes(pod_uid).await?;
            Ok::<_, RuntimeError>(list.into_iter().map(|status| via.sandbox(status)).collect::<Vec<_>>())
        });
        Ok(try_join_all(lists).await?.concat())
    }

    async fn create_container(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        let (via, sandbox) = self.of_sandbox(sandbox);
        let pid_target = config.pid_target.as_ref().map(|target| self.of_container(target).1);
        let config = ContainerConfig { pid_target, ..config.clone() };
        let id = via.runtime.create_container(&sandbox, &config).await?;
        Ok(via.above(id.as_str()).into())
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.start_container(&id).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.stop_container(&id, grace).await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.remove_container(&id).await
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        let lists = self.all().into_iter().map(|via| async move {
            let list = via.runtime.list_containers(pod_uid).await?;
            Ok::<_, RuntimeError>(list.into_iter().map(|status| via.container(status)).collect::<Vec<_>>())
        });
        Ok(try_join_all(lists).await?.concat())
    }

    async fn container_status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        let (via, id) = self.of_container(id);
        Ok(via.container(via.runtime.container_status(&id).await?))
    }

    async fn logs(&self, id: &ContainerId, options: &LogOptions) -> Result<BoxStream<'static, Result<LogChunk>>> {
        let (via, id) = self.of_container(id);
        via.runtime.logs(&id, options).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<Session> {
        let (via, id) = self.of_container(id);
        via.runtime.exec(&id, request).await
    }

    async fn attach(&self, id: &ContainerId, request: &AttachRequest) -> Result<Session> {
        let (via, id) = self.of_container(id);
        via.runtime.attach(&id, request).await
    }

    async fn port_forward(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let (via, id) = self.of_sandbox(id);
        via.runtime.port_forward(&id, port).await
    }

    async fn pause_container(&self, id: &ContainerId) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.pause_container(&id).await
    }

    async fn unpause_container(&self, id: &ContainerId) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.unpause_container(&id).await
    }

    async fn update_container_resources(&self, id: &ContainerId, resources: &Resources) -> Result<()> {
        let (via, id) = self.of_container(id);
        via.runtime.update_container_resources(&id, resources).await
    }

    async fn update_pod_sandbox_resources(&self, id: &SandboxId, resources: &Resources) -> Result<()> {
        let (via, id) = self.of_sandbox(id);
        via.runtime.update_pod_sandbox_resources(&id, resources).await
    }

    async fn list_pod_sandbox_stats(&self, scope: StatsScope) -> Result<Vec<SandboxStats>> {
        let lists = self.all().into_iter().map(|via| async move {
            let list = via.runtime.list_pod_sandbox_stats(scope).await?;
            Ok::<_, RuntimeError>(list.into_iter().map(|stats| via.stats(stats)).collect::<Vec<_>>())
        });
        Ok(try_join_all(lists).await?.concat())
    }

    /// Ends with the first of them, so that the caller lists and subscribes again.
    async fn events(&self) -> Result<BoxStream<'static, RuntimeEvent>> {
        let streams = self.all().into_iter().map(|via| async move { via.runtime.events().await });
        let streams = try_join_all(streams).await?;
        let until_end = streams.into_iter().map(|events| events.map(Some).chain(stream::once(async { None })));
        Ok(stream::select_all(until_end.map(StreamExt::boxed))
            .take_while(|event| ready(event.is_some()))
            .filter_map(ready)
            .boxed())
    }
}

#[async_trait]
impl ImageStore for Handlers {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        self.images.runtime.pull_image(reference, auths).await
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        self.images.runtime.image_status(reference).await
    }

    /// Those of the node, then what another driver has brought over and only that has left.
    async fn list_images(&self) -> Result<Vec<Image>> {
        let mut images = self.images.runtime.list_images().await?;
        for via in self.beside_images() {
            let more = via.runtime.list_images().await.unwrap_or_else(|error| passed_over(&error));
            let known: BTreeSet<_> = images.iter().map(|image| image.id.clone()).collect();
            images.extend(more.into_iter().filter(|image| !known.contains(&image.id)));
        }
        Ok(images)
    }

    /// Where those of the node are, and what all take.
    async fn image_fs_info(&self) -> Result<ImageFs> {
        let mut info = self.images.runtime.image_fs_info().await?;
        let mut counted = BTreeSet::from([info.path.clone()]);
        for via in self.beside_images() {
            let more = via.runtime.image_fs_info().await.unwrap_or_else(|error| passed_over(&error));
            // Drivers of one kind share their images.
            if counted.insert(more.path) {
                info.used = info.used.map(|used| used.saturating_add(more.used.unwrap_or_default()));
            }
        }
        Ok(info)
    }

    async fn unpack_image(&self, id: &ImageId, into: &Path) -> Result<()> {
        self.images.runtime.unpack_image(id, into).await
    }

    /// From every driver: first from those that brought it over, any of which may have it in use.
    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        for via in self.beside_images() {
            via.runtime.remove_image(id).await?;
        }
        self.images.runtime.remove_image(id).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::fake::FakeRuntime;
    use crate::runtime::verb::Verb;

    fn handlers(own: &FakeRuntime, other: &FakeRuntime) -> Handlers {
        let named = |handler: &str, runtime: &FakeRuntime| Named {
            handler: handler.to_owned(),
            runtime: Arc::new(runtime.clone()),
        };
        Handlers::new(named("docker", own), vec![named("microvm", other)], "docker")
    }

    #[test]
    fn ids_of_others_have_their_handler_before_them() {
        let (own, other) = (FakeRuntime::new(), FakeRuntime::new());
        let handlers = handlers(&own, &other);
        for (above, prefix, below) in [
            ("microvm.a.b", Some("microvm"), "a.b"),
            ("microvm", None, "microvm"),
            ("microvms.a", None, "microvms.a"),
            ("docker.a", None, "docker.a"),
            ("", None, ""),
        ] {
            let (via, id) = handlers.of(above);
            assert_eq!((via.prefix, id), (prefix, below), "{above}");
            assert_eq!(via.above(id), above);
        }
    }

    #[test]
    fn the_api_is_told_whose_a_container_is() {
        for (id, own, shown) in [
            ("0123", "docker", "docker://0123"),
            ("microvm.ab.cd", "docker", "microvm://ab.cd"),
            ("microvm-firecracker.ab.cd", "docker", "microvm-firecracker://ab.cd"),
            ("ab.cd", "microvm", "microvm://ab.cd"),
            ("docker.0123", "microvm", "docker://0123"),
            ("fake.1", "fake", "fake://fake.1"),
        ] {
            assert_eq!(with_scheme(own, &id.into()), shown);
            assert!(shown.starts_with(handler_of(own, id)), "{id}");
        }
    }

    #[tokio::test]
    async fn a_handler_that_is_not_there_is_unsupported() {
        let (own, other) = (FakeRuntime::new(), FakeRuntime::new());
        let handlers = handlers(&own, &other);
        assert_eq!(handlers.handling(Some("kata")).err().map(|error| error.kind()), Some(Kind::Unsupported));
        assert!(handlers.handling(Some("docker")).is_ok_and(|via| via.prefix.is_none()));
        assert!(handlers.handling(Some("microvm")).is_ok_and(|via| via.prefix == Some("microvm")));
    }

    #[tokio::test]
    async fn an_image_that_only_another_driver_has_is_listed_once_and_can_be_removed() {
        let (own, other) = (FakeRuntime::new(), FakeRuntime::new());
        let handlers = handlers(&own, &other);
        let both = own.add_image("both:1");
        assert_eq!(other.add_image("both:1"), both);
        let left = other.add_image("left:1");
        let listed =
            async || handlers.list_images().await.unwrap().into_iter().map(|image| image.id).collect::<Vec<_>>();
        assert_eq!(listed().await, [both.clone(), left.clone()]);
        handlers.remove_image(&left).await.unwrap();
        assert_eq!(listed().await, std::slice::from_ref(&both));
        handlers.remove_image(&both).await.unwrap();
        assert!(listed().await.is_empty() && other.list_images().await.unwrap().is_empty());
        // One that this host cannot run hides nothing of the others.
        let own_one = own.add_image("own:1");
        other.fail_next(Verb::ListImages, RuntimeError::new(Kind::Unsupported, "it cannot be run"));
        assert_eq!(listed().await, [own_one]);
    }

    #[tokio::test]
    async fn the_events_of_all_are_told_until_one_of_them_ends() {
        use crate::runtime::types::EventKind;
        let (own, other) = (FakeRuntime::new(), FakeRuntime::new());
        let handlers = handlers(&own, &other);
        let mut events = handlers.events().await.unwrap();
        for (runtime, uid) in [(&own, "a"), (&other, "b")] {
            runtime.emit(RuntimeEvent { pod_uid: uid.to_owned(), kind: EventKind::Started });
            assert_eq!(events.next().await.map(|event| event.pod_uid).as_deref(), Some(uid));
        }
        other.end_events();
        assert_eq!(events.next().await, None);
    }
}
