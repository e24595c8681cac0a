//! The verbs of sandboxes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::future::join_all;
use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use tokio::time::Instant;
use tonic::{Code, Status};
use tracing::warn;

use super::core::{About, Core};
use super::failure::status;
use super::shelf::Key;
use super::translate::{self, Place, invalid};
use super::{files, filter, tell};
use crate::runtime::types::{ContainerState, SandboxId, SandboxState, SandboxStatus};
use crate::telemetry::chain;

impl Core {
    /// Makes a sandbox; the same request again finds the same sandbox.
    pub(super) async fn run_pod_sandbox(self: Arc<Self>, request: v1::RunPodSandboxRequest) -> Result<String, Status> {
        self.adopted().await?;
        let config = request.config.clone().ok_or_else(|| invalid("the request has no config"))?;
        let (pod, attempt) = translate::pod(&config)?;
        let handler = self.handler(&request.runtime_handler)?;
        let key = Key { uid: pod.uid.clone(), container: String::new(), attempt };
        let _turn = self.turns.turn(&Key::of_sandboxes(&pod.uid)).await;
        if self.sandboxes.of(&key).is_some_and(|known| *known != request) && self.has_sandbox(&key).await? {
            let text = format!("sandbox {attempt} of {pod} ({}) is there, made from another config", pod.uid);
            return Err(status(Code::AlreadyExists, &text));
        }
        let made = self.make(request, &key, handler).await;
        if let Ok(id) = &made {
            // One that had stopped gave way to it, with all that was in it.
            self.forget_members(&pod.uid, |sandbox| {
                self.sandboxes.key_of(sandbox).as_ref() == Some(&key) && sandbox != id
            });
            self.sandboxes.named(id, key);
            self.happened(&pod.uid);
        } else if let Err(error) = self.settle(&key).await {
            // What is left of it is found by the next look at all.
            warn!(pod = %pod, error = error.message(), "failed to look what is left of a sandbox that could not be made");
        }
        made
    }

    async fn make(
        &self,
        request: v1::RunPodSandboxRequest,
        key: &Key,
        handler: Option<String>,
    ) -> Result<String, Status> {
        let config = request.config.clone().unwrap_or_default();
        let ports = translate::host_ports(&config)?;
        let on_host = translate::on_host_network(&config)?;
        // Before it has anything: whoever has a record is looked for when the engine is back, and gives it up.
        self.sandboxes.keep(key, request)?;
        let address = if on_host { None } else { Some(self.network.allot(key).await?) };
        let cgroup_root = self.cgroup_root().await?;
        let About { hostname, selinux, .. } = &self.about;
        let place = Place { handler, address, cgroup_root, hostname, selinux: *selinux };
        let asked = translate::sandbox(&config, place)?;
        files::write(&self.sandboxes.place(key), &config, (&asked.hostname, address))?;
        let id = self.runtime.run_pod_sandbox(&asked).await?;
        let Some(address) = address else { return Ok(id.to_string()) };
        if let Err(error) = self.network.open_ports(key, address, ports).await {
            if let Err(error) = self.runtime.remove_pod_sandbox(&id).await {
                warn!(sandbox = %id, error = chain(&error), "failed to remove a sandbox whose ports could not be opened");
            }
            return Err(error.into());
        }
        Ok(id.to_string())
    }

    async fn has_sandbox(&self, key: &Key) -> Result<bool, Status> {
        let found = self.runtime.list_pod_sandboxes(Some(&key.uid)).await?;
        Ok(found.iter().any(|sandbox| sandbox.attempt == key.attempt))
    }

    /// After something was done to a sandbox, in the same turn: one that is gone is forgotten with all that was in it, and
    /// one that is not ready has neither ports nor an address. One that is there although its making or removal failed keeps
    /// its record.
    async fn settle(&self, key: &Key) -> Result<(), Status> {
        let left = self.runtime.list_pod_sandboxes(Some(&key.uid)).await?;
        let found = left.iter().find(|sandbox| sandbox.attempt == key.attempt);
        if found.is_none() {
            self.sandboxes.forget(key);
        }
        self.forget_members(&key.uid, |sandbox| !left.iter().any(|known| known.id.as_str() == sandbox));
        if found.is_none_or(|sandbox| sandbox.state != SandboxState::Ready) {
            self.network.leave(key).await;
        }
        self.happened(&key.uid);
        Ok(())
    }

    /// The sandbox of this id is not there any more. If no client removed it, what is kept of it goes all the same.
    pub(super) fn vanished(self: &Arc<Self>, id: &str) {
        if let Some(key) = self.sandboxes.key_of(id) {
            self.settle_soon(key);
        }
    }

    /// These sandboxes are all there are. What is kept of another goes: it could not be made, while the runtime did not tell
    /// what was left of it.
    pub(super) fn are_all(self: &Arc<Self>, there: &[v1::PodSandboxStatus]) {
        let of =
            |metadata: &v1::PodSandboxMetadata| Key { attempt: metadata.attempt, ..Key::of_sandboxes(&metadata.uid) };
        let there: HashSet<Key> = there.iter().filter_map(|sandbox| sandbox.metadata.as_ref().map(of)).collect();
        self.sandboxes.keys().into_iter().filter(|key| !there.contains(key)).for_each(|key| self.settle_soon(key));
    }

    /// In its turn: one that is just being made is then there.
    fn settle_soon(self: &Arc<Self>, key: Key) {
        let core = Arc::clone(self);
        self.tasks.spawn_finite("CRI sandbox that is not there", async move {
            let _turn = core.turns.turn(&Key::of_sandboxes(&key.uid)).await;
            if let Err(error) = core.settle(&key).await {
                warn!(pod = key.uid, error = error.message(), "failed to look what is left of a sandbox");
            }
            Ok(())
        });
    }

    /// Forgets the containers of a Pod that were in such sandboxes, by what their records say: the driver may have removed
    /// one that was made while it was asked what is there.
    fn forget_members(&self, uid: &str, is_gone: impl Fn(&str) -> bool) {
        for key in self.containers.keys().iter().filter(|key| key.uid == uid) {
            if self.containers.of(key).is_some_and(|record| is_gone(&record.pod_sandbox_id)) {
                self.containers.forget(key);
            }
        }
    }

    /// Stops a sandbox and all in it. One that is stopped or gone is Ok.
    pub(super) async fn stop_pod_sandbox(self: Arc<Self>, asked: String) -> Result<(), Status> {
        self.adopted().await?;
        let Some(sandbox) = self.find_sandbox(&asked).await? else { return Ok(()) };
        let _turn = self.turns.turn(&Key::of_sandboxes(&sandbox.pod.uid)).await;
        self.runtime.stop_pod_sandbox(&sandbox.id).await?;
        self.settle(&(&sandbox).into()).await
    }

    /// Removes a sandbox and all in it; the files of their logs stay. One that is gone is Ok.
    pub(super) async fn remove_pod_sandbox(self: Arc<Self>, asked: String) -> Result<(), Status> {
        self.adopted().await?;
        let Some(sandbox) = self.find_sandbox(&asked).await? else {
            // One that went by itself has left its record.
            let Some(key) = self.sandboxes.key_of(&self.sandboxes.id(&asked)) else { return Ok(()) };
            let _turn = self.turns.turn(&Key::of_sandboxes(&key.uid)).await;
            return self.settle(&key).await;
        };
        let _turn = self.turns.turn(&Key::of_sandboxes(&sandbox.pod.uid)).await;
        let members = self.runtime.list_containers(Some(&sandbox.pod.uid)).await?;
        let members: Vec<_> = members.into_iter().filter(|member| member.sandbox == sandbox.id).collect();
        if members.iter().any(|member| member.state == ContainerState::Running) {
            self.runtime.stop_pod_sandbox(&sandbox.id).await?;
        }
        // What they wrote last is read before the driver forgets it, of those too that ended just before.
        self.logs.all_written(members.iter()).await;
        self.runtime.remove_pod_sandbox(&sandbox.id).await?;
        members.iter().for_each(|member| self.logs.end(&member.id));
        self.settle(&(&sandbox).into()).await
    }

    async fn find_sandbox(&self, asked: &str) -> Result<Option<SandboxStatus>, Status> {
        if asked.is_empty() {
            return Err(invalid("the request names no sandbox"));
        }
        match self.runtime.pod_sandbox_status(&self.sandbox_id(asked)).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The sandbox that a client means.
    pub(super) fn sandbox_id(&self, asked: &str) -> SandboxId {
        SandboxId::from(self.sandboxes.id(asked))
    }

    /// The sandbox now, and the containers in it.
    pub(super) async fn pod_sandbox_status(
        &self,
        asked: &str,
        verbose: bool,
    ) -> Result<v1::PodSandboxStatusResponse, Status> {
        self.adopted().await?;
        let sandbox = self.runtime.pod_sandbox_status(&self.sandbox_id(asked)).await?;
        let members = self.runtime.list_containers(Some(&sandbox.pod.uid)).await?;
        let members: Vec<_> = members.iter().filter(|member| member.sandbox == sandbox.id).collect();
        let ended = members.iter().filter(|member| member.state == ContainerState::Exited);
        let seen = Instant::now();
        join_all(ended.map(|member| self.log_whole(member.id.as_str(), seen))).await;
        Ok(v1::PodSandboxStatusResponse {
            status: Some(self.tell_sandbox_status(&sandbox)),
            info: if verbose { self.sandbox_info(&sandbox) } else { HashMap::new() },
            containers_statuses: members.into_iter().map(|member| self.tell_container_status(member)).collect(),
            timestamp: tell::nanoseconds(Some(Timestamp::now())),
        })
    }

    fn sandbox_info(&self, sandbox: &SandboxStatus) -> HashMap<String, String> {
        let kept = self.sandboxes.of(&sandbox.into());
        let config = kept.as_ref().and_then(|kept| kept.config.as_ref());
        let info = serde_json::json!({
            "pid": sandbox.pid,
            "runtimeHandler": kept.as_ref().map(|kept| kept.runtime_handler.clone()),
            "hostname": config.map(|config| config.hostname.clone()),
            "logDirectory": config.map(|config| config.log_directory.clone()),
            "cgroupParent": config.and_then(|config| Some(config.linux.as_ref()?.cgroup_parent.clone())),
        });
        HashMap::from([("info".to_owned(), info.to_string())])
    }

    /// The sandboxes that a client wants.
    pub(super) async fn list_pod_sandbox(
        &self,
        wanted: Option<v1::PodSandboxFilter>,
    ) -> Result<Vec<v1::PodSandbox>, Status> {
        self.adopted().await?;
        // After what was there at the start was found: only then are ids known.
        let wanted = wanted.map(|filter| v1::PodSandboxFilter { id: self.sandboxes.id(&filter.id), ..filter });
        // Mostly a kubelet asks for one Pod by a label: then the driver is asked for no other.
        let uid = wanted.as_ref().and_then(|filter| self.sandboxes.only_pod(&filter.label_selector));
        let (found, _) = self.seen(uid.as_deref()).await?;
        let told = found.iter().map(|sandbox| self.tell_sandbox(sandbox));
        Ok(told.filter(|sandbox| filter::sandbox(sandbox, wanted.as_ref())).collect())
    }

    /// Gives a sandbox other limits.
    pub(super) async fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), Status> {
        self.adopted().await?;
        let limits = translate::whole(request.resources.as_ref(), request.overhead.as_ref())?;
        let id = self.sandbox_id(&request.pod_sandbox_id);
        Ok(self.runtime.update_pod_sandbox_resources(&id, &limits).await?)
    }
}
