//! What all verbs share: the driver, what is kept beside it, and what is found again after a restart.

use std::net::SocketAddr;
use std::sync::Arc;

use lambdalet_proto::cri::v1;
use tokio::sync::{OnceCell, oneshot};
use tonic::{Code, Status};
use tracing::{info, warn};

use super::events::Events;
use super::failure::status;
use super::logs::Logs;
use super::network::Network;
use super::shelf::{Key, Shelf};
use super::tickets::Desk;
use super::view::{Seen, View};
use super::{tell, translate};
use crate::runtime::Runtime;
use crate::runtime::types::{CgroupDriver, ContainerId, ContainerState, ContainerStatus, SandboxStatus};
use crate::shutdown::Tasks;
use crate::telemetry::chain;
use crate::turns::Turns;

/// What the runtime is called and what it is given.
#[derive(Clone, Debug)]
pub struct About {
    /// The handlers there are; the first is that of sandboxes that name none.
    pub handlers: Vec<String>,
    /// The cgroup of sandboxes whose client names none.
    pub cgroup_root: String,
    /// The host's name.
    pub hostname: String,
    /// Whether the host has SELinux.
    pub selinux: bool,
}

/// See the module.
pub(super) struct Core {
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) about: About,
    pub(super) sandboxes: Shelf<v1::RunPodSandboxRequest>,
    pub(super) containers: Shelf<v1::CreateContainerRequest>,
    pub(super) network: Network,
    pub(super) logs: Logs,
    pub(super) desk: Arc<Desk>,
    /// Where the streaming server listens.
    pub(super) streams: SocketAddr,
    pub(super) events: Events,
    pub(super) turns: Turns<Key>,
    pub(super) view: View,
    pub(super) tasks: Tasks,
    /// Where writable layers are, once somebody has asked.
    pub(super) mountpoint: OnceCell<String>,
    pub(super) adopted: OnceCell<()>,
}

impl Core {
    /// Finds again what an earlier process left: ids, addresses, logs. Before that no verb does anything.
    ///
    /// # Errors
    /// The runtime does not answer; the next call tries again.
    pub(super) async fn adopted(&self) -> Result<(), Status> {
        self.adopted.get_or_try_init(|| self.adopt()).await.map(|_| ())
    }

    async fn adopt(&self) -> Result<(), Status> {
        let (sandboxes, containers) =
            tokio::try_join!(self.runtime.list_pod_sandboxes(None), self.runtime.list_containers(None))?;
        self.network.adopt(&sandboxes).await;
        self.sandboxes.sweep(&sandboxes.iter().map(Key::from).collect::<Vec<_>>());
        self.containers.sweep(&containers.iter().map(Key::from).collect::<Vec<_>>());
        sandboxes.iter().for_each(|sandbox| self.sandboxes.found(sandbox.id.as_str(), sandbox.into()));
        for container in &containers {
            self.containers.found(container.id.as_str(), container.into());
            // One that has ended may have written what nobody has read.
            if container.state != ContainerState::Created {
                self.follow_log(container).await;
            }
        }
        if !sandboxes.is_empty() {
            info!(sandboxes = sandboxes.len(), containers = containers.len(), "found what runs already");
        }
        Ok(())
    }

    async fn follow_log(&self, container: &ContainerStatus) {
        let Some(target) = self.log_target(&container.into()) else { return };
        match self.logs.open(&container.id, target).await {
            Ok(pump) => self.logs.begin(pump),
            Err(error) => warn!(container = %container.id, error = chain(&error), "a container's log is not written"),
        }
    }

    /// Runs a verb to its end, though its client may go away: what it makes is then there as a whole, and listed.
    pub(super) async fn to_the_end<T: Send + 'static>(
        &self,
        verb: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let (done, answer) = oneshot::channel();
        self.tasks.spawn_finite("CRI verb", async move {
            // The client may have left.
            let _ = done.send(verb.await);
            Ok(())
        });
        answer.await.unwrap_or_else(|_| Err(status(Code::Unavailable, "the runtime is ending")))
    }

    /// The cgroup of sandboxes whose client names none, and how the engine names cgroups.
    pub(super) async fn cgroup_root(&self) -> Result<(&str, CgroupDriver), Status> {
        Ok((&self.about.cgroup_root, self.runtime.cgroup_driver().await?))
    }

    /// The driver that a client means.
    pub(super) fn handler(&self, asked: &str) -> Result<Option<String>, Status> {
        match asked {
            "" => Ok(None),
            known if self.about.handlers.iter().any(|handler| handler == known) => Ok(Some(known.to_owned())),
            other => {
                let known = self.about.handlers.join(", ");
                Err(translate::invalid(format!("there is no runtime handler {other:?}; there are: {known}")))
            }
        }
    }

    /// A sandbox of the list.
    pub(super) fn tell_sandbox(&self, sandbox: &SandboxStatus) -> v1::PodSandbox {
        tell::sandbox(sandbox, self.sandboxes.of(&sandbox.into()).as_deref())
    }

    /// The status of a sandbox.
    pub(super) fn tell_sandbox_status(&self, sandbox: &SandboxStatus) -> v1::PodSandboxStatus {
        tell::sandbox_status(sandbox, self.sandboxes.of(&sandbox.into()).as_deref())
    }

    /// A container of the list.
    pub(super) fn tell_container(&self, container: &ContainerStatus) -> v1::Container {
        tell::container(container, self.containers.of(&container.into()).as_deref())
    }

    /// The status of a container.
    pub(super) fn tell_container_status(&self, container: &ContainerStatus) -> v1::ContainerStatus {
        let key = container.into();
        let log = self.log_target(&key).map(|target| target.path.to_string_lossy().into_owned()).unwrap_or_default();
        tell::container_status(container, self.containers.of(&key).as_deref(), &log)
    }

    /// The status of all sandboxes and containers, or of those of one Pod; each container with its Pod's UID.
    pub(super) async fn all_of(
        &self,
        uid: Option<&str>,
    ) -> Result<(Vec<v1::PodSandboxStatus>, Vec<(String, v1::ContainerStatus)>), Status> {
        let (sandboxes, containers) = self.seen(uid).await?;
        let told =
            |container: &Arc<ContainerStatus>| (container.pod.uid.clone(), self.tell_container_status(container));
        Ok((
            sandboxes.iter().map(|sandbox| self.tell_sandbox_status(sandbox)).collect(),
            containers.iter().map(told).collect(),
        ))
    }

    /// What is there, all or of one Pod.
    pub(super) async fn seen(&self, uid: Option<&str>) -> Result<Seen, Status> {
        self.adopted().await?;
        Ok(self.view.seen(self.runtime.as_ref(), uid).await?)
    }

    /// Something was done to this Pod, of which drivers may say nothing.
    pub(super) fn happened(&self, uid: &str) {
        self.view.changed(uid);
        self.events.look(uid);
    }

    /// The container that a client means.
    pub(super) fn container_id(&self, asked: &str) -> ContainerId {
        ContainerId::from(self.containers.id(asked))
    }
}
