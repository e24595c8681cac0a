//! The verbs of containers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use lambdalet_proto::cri::v1;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use super::core::Core;
use super::failure::{CriError, status};
use super::logs::{PATIENCE, Target};
use super::shelf::Key;
use super::translate::{self, Surroundings, invalid};
use super::{files, filter};
use crate::runtime::types::{ContainerConfig, ContainerId, ContainerState, ContainerStatus, Grace, PodRef};

impl Core {
    /// Makes a container; the same request again finds the same container.
    pub(super) async fn create_container(
        self: Arc<Self>,
        request: v1::CreateContainerRequest,
    ) -> Result<String, Status> {
        self.adopted().await?;
        let config = request.config.clone().ok_or_else(|| invalid("the request has no config"))?;
        let sandbox = self.sandbox_id(&request.pod_sandbox_id);
        let found = self.runtime.pod_sandbox_status(&sandbox).await?;
        let made = self.translated(&config, &(&found).into(), found.pod.clone()).await?;
        let key = Key { uid: made.pod.uid.clone(), container: made.name.clone(), attempt: made.attempt };
        let _turn = self.turns.turn(&key).await;
        let record = self.record(request, config, &key, found.id.as_str());
        if self.containers.of(&key).is_some_and(|known| *known != record) && self.has_container(&key).await? {
            let text =
                format!("container {} {} of {} is there, made from another config", made.name, made.attempt, made.pod);
            return Err(status(Code::AlreadyExists, &text));
        }
        make_directories(&made).await?;
        self.containers.keep(&key, record)?;
        let created = self.runtime.create_container(&sandbox, &made).await;
        match created {
            Ok(id) => {
                self.containers.named(id.as_str(), key);
                self.happened(&made.pod.uid);
                Ok(id.to_string())
            }
            Err(error) => {
                if matches!(self.has_container(&key).await, Ok(false)) {
                    self.containers.forget(&key);
                }
                Err(error.into())
            }
        }
    }

    async fn translated(
        &self,
        config: &v1::ContainerConfig,
        sandbox: &Key,
        pod: PodRef,
    ) -> Result<ContainerConfig, Status> {
        let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
        if name.is_empty() {
            return Err(invalid("the container has no image"));
        }
        let image = self.runtime.image_status(name).await?;
        let image = image.ok_or_else(|| status(Code::NotFound, &format!("image {name} is not present")))?;
        let kept = self.sandboxes.of(sandbox);
        let of_sandbox = kept.as_ref().and_then(|kept| kept.config.clone()).unwrap_or_default();
        let around = Surroundings {
            cgroup_parent: translate::cgroup(&of_sandbox, &pod.uid, self.cgroup_root().await?)?,
            pod,
            image: image.id,
            image_user: image.user,
            files: files::mounts(&self.sandboxes.place(sandbox)),
            selinux: self.about.selinux,
        };
        let made = translate::container(config, around)?;
        let target = made.pid_target.as_ref().map(|id| self.container_id(id.as_str()));
        Ok(ContainerConfig { pid_target: target, ..made })
    }

    /// What is kept of a request: not what may be secret.
    fn record(
        &self,
        request: v1::CreateContainerRequest,
        config: v1::ContainerConfig,
        key: &Key,
        sandbox: &str,
    ) -> v1::CreateContainerRequest {
        let kept = self.sandboxes.key_of(sandbox).and_then(|key| self.sandboxes.of(&key)?.config.clone());
        let of_sandbox = request.sandbox_config.filter(|config| !config.log_directory.is_empty()).or(kept);
        let metadata = v1::PodSandboxMetadata { uid: key.uid.clone(), ..Default::default() };
        v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(v1::ContainerConfig { envs: Vec::new(), command: Vec::new(), args: Vec::new(), ..config }),
            sandbox_config: Some(v1::PodSandboxConfig {
                metadata: Some(metadata),
                log_directory: of_sandbox.map(|config| config.log_directory).unwrap_or_default(),
                ..Default::default()
            }),
        }
    }

    async fn has_container(&self, key: &Key) -> Result<bool, Status> {
        let found = self.runtime.list_containers(Some(&key.uid)).await?;
        Ok(found.iter().any(|container| Key::from(container) == *key))
    }

    /// Where a container's log goes, if it goes anywhere.
    pub(super) fn log_target(&self, key: &Key) -> Option<Target> {
        let kept = self.containers.of(key)?;
        let (file, folder) = (&kept.config.as_ref()?.log_path, &kept.sandbox_config.as_ref()?.log_directory);
        let wanted = !file.is_empty() && !folder.is_empty();
        wanted.then(|| Target { path: Path::new(folder).join(file), place: self.containers.place(key) })
    }

    /// Starts a container, and the writing of its log, unless that is written already or will not be any more.
    pub(super) async fn start_container(self: Arc<Self>, asked: String) -> Result<(), Status> {
        self.adopted().await?;
        let id = self.container_id(&asked);
        let key = self.containers.key_of(id.as_str());
        let _turn = match &key {
            Some(key) => Some(self.turns.turn(key).await),
            None => None,
        };
        let pump = match key.as_ref().and_then(|key| self.log_target(key)) {
            Some(target) if self.may_open_log(&id).await? => Some(self.logs.open(&id, target).await?),
            _ => None,
        };
        let started = self.runtime.start_container(&id).await;
        self.changed(&id);
        started?;
        if let Some(pump) = pump {
            self.logs.begin(pump);
        }
        Ok(())
    }

    /// A file that is written is not to be looked through by another, and a client may have removed that of an ended one.
    async fn may_open_log(&self, id: &ContainerId) -> Result<bool, Status> {
        Ok(!self.logs.is_written(id) && self.runtime.container_status(id).await?.state != ContainerState::Exited)
    }

    /// Waits for the whole log of a container whose end was seen then: one that is still being started has hardly begun one.
    pub(super) async fn log_whole(&self, id: &str, seen: Instant) {
        let Some(key) = self.containers.key_of(id) else { return };
        let begun = timeout_at(seen + PATIENCE, self.turns.turn(&key)).await;
        drop(begun);
        self.logs.written_by(&id.into(), seen + PATIENCE).await;
    }

    /// Stops a container. One that is stopped or gone is Ok.
    pub(super) async fn stop_container(&self, asked: &str, seconds: i64) -> Result<(), Status> {
        self.adopted().await?;
        let id = self.named_container(asked)?;
        let grace = Grace::from_secs(u64::try_from(seconds).unwrap_or(0));
        let stopped = self.runtime.stop_container(&id, grace).await;
        self.changed(&id);
        Ok(stopped?)
    }

    /// Who lists now finds the container as it has become; the driver's own event may come later.
    fn changed(&self, id: &ContainerId) {
        if let Some(key) = self.containers.key_of(id.as_str()) {
            self.view.changed(&key.uid);
        }
    }

    /// Removes a container, running or not; its log's file stays. One that is gone is Ok.
    pub(super) async fn remove_container(self: Arc<Self>, asked: String) -> Result<(), Status> {
        self.adopted().await?;
        let id = self.named_container(&asked)?;
        let key = self.containers.key_of(id.as_str());
        let _turn = match &key {
            Some(key) => Some(self.turns.turn(key).await),
            None => None,
        };
        // What it wrote last is read before the driver forgets it.
        self.runtime.stop_container(&id, Grace::ZERO).await?;
        self.logs.written(&id).await;
        self.runtime.remove_container(&id).await?;
        self.logs.end(&id);
        if let Some(key) = key {
            self.containers.forget(&key);
            self.happened(&key.uid);
        }
        Ok(())
    }

    fn named_container(&self, asked: &str) -> Result<ContainerId, Status> {
        if asked.is_empty() { Err(invalid("the request names no container")) } else { Ok(self.container_id(asked)) }
    }

    /// The container now.
    pub(super) async fn container_status(
        &self,
        asked: &str,
        verbose: bool,
    ) -> Result<v1::ContainerStatusResponse, Status> {
        self.adopted().await?;
        let container = self.runtime.container_status(&self.container_id(asked)).await?;
        if container.state == ContainerState::Exited {
            self.log_whole(container.id.as_str(), Instant::now()).await;
        }
        let info = serde_json::json!({ "pid": container.pid, "sandboxID": container.sandbox.as_str() });
        Ok(v1::ContainerStatusResponse {
            status: Some(self.tell_container_status(&container)),
            info: if verbose { HashMap::from([("info".to_owned(), info.to_string())]) } else { HashMap::new() },
        })
    }

    /// The containers that a client wants.
    pub(super) async fn list_containers(
        &self,
        wanted: Option<v1::ContainerFilter>,
    ) -> Result<Vec<v1::Container>, Status> {
        self.adopted().await?;
        let wanted = wanted.map(|filter| v1::ContainerFilter {
            id: self.containers.id(&filter.id),
            pod_sandbox_id: self.sandboxes.id(&filter.pod_sandbox_id),
            ..filter
        });
        let of_sandbox = wanted.as_ref().and_then(|filter| self.sandboxes.key_of(&filter.pod_sandbox_id));
        let labelled = wanted.as_ref().and_then(|filter| self.containers.only_pod(&filter.label_selector));
        let uid = of_sandbox.map(|key| key.uid).or(labelled);
        let (_, found) = self.seen(uid.as_deref()).await?;
        let told = found.iter().map(|container| self.tell_container(container));
        Ok(told.filter(|container| filter::container(container, wanted.as_ref())).collect())
    }

    /// Gives a container other limits.
    pub(super) async fn update_container_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<(), Status> {
        self.adopted().await?;
        let limits = request.linux.as_ref().ok_or_else(|| invalid("the request has no limits for Linux"))?;
        let id = self.container_id(&request.container_id);
        let updated = self.runtime.update_container_resources(&id, &translate::resources(limits)?).await;
        self.changed(&id);
        Ok(updated?)
    }

    /// Opens a container's log anew.
    pub(super) async fn reopen_container_log(&self, asked: &str) -> Result<(), Status> {
        self.adopted().await?;
        let container = self.running(asked).await?;
        self.logs.reopen(&container.id).await.map_err(|error| match error {
            Some(error) => Status::from(error),
            None => status(Code::FailedPrecondition, &format!("no log of container {} is written", container.id)),
        })
    }

    /// The container, if it runs.
    pub(super) async fn running(&self, asked: &str) -> Result<ContainerStatus, Status> {
        let container = self.runtime.container_status(&self.container_id(asked)).await?;
        if container.state == ContainerState::Running {
            return Ok(container);
        }
        Err(status(Code::FailedPrecondition, &format!("container {} does not run", container.id)))
    }
}

/// Directories of the host that are mounted and are not there: CRI runtimes make them.
async fn make_directories(config: &ContainerConfig) -> Result<(), CriError> {
    for mount in &config.mounts {
        let path = &mount.host_path;
        if !tokio::fs::try_exists(path).await.unwrap_or(true) {
            tokio::fs::create_dir_all(path).await.map_err(CriError::file("make", path))?;
        }
    }
    Ok(())
}
