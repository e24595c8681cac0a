//! Limits changed while containers run, and containers frozen and thawed, for which CRI has no call: the kernel's own
//! files are written.

use lambdalet_proto::cri::v1;

use super::client::ask;
use super::{CriRuntime, spec};
use crate::runtime::types::{ContainerId, Resources, SandboxId};
use crate::runtime::{Kind, Result, RuntimeError, blocking};

impl CriRuntime {
    pub(super) async fn set_limits(&self, id: &ContainerId, limits: &Resources) -> Result<()> {
        let tried = format!("failed to change the limits of container {id}");
        let refused = |kind, why: &str| Err(RuntimeError::new(kind, format!("{tried}: {why}")));
        match self.look_at(id).await? {
            None => return refused(Kind::NotFound, "it does not exist"),
            Some(looked) if looked.status.state() == v1::ContainerState::ContainerExited => {
                return refused(Kind::Invalid, "it has exited");
            }
            Some(_) => {}
        }
        // Zero leaves a limit as it is; the OOM score is never changed by this call.
        let linux = v1::LinuxContainerResources { oom_score_adj: 0, ..spec::resources(limits) };
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.to_string(),
            linux: Some(linux),
            ..v1::UpdateContainerResourcesRequest::default()
        };
        ask!(self.client.runtime, update_container_resources(request), || tried.clone()).await.map(drop)
    }

    pub(super) async fn set_sandbox_limits(&self, id: &SandboxId, limits: &Resources) -> Result<()> {
        let Some((_, seen)) = self.look_at_sandbox(id.as_str()).await? else {
            return Err(RuntimeError::new(Kind::NotFound, format!("there is no sandbox {id}")));
        };
        let (cgroups, path, limits) = (self.cgroups.clone(), seen.facts.cgroup, limits.clone());
        blocking(format!("failed to change the limits of cgroup {path}"), move || cgroups.ensure(&path, &limits)).await
    }

    pub(super) async fn set_frozen(&self, id: &ContainerId, frozen: bool) -> Result<()> {
        let tried = format!("failed to {} container {id}", if frozen { "pause" } else { "unpause" });
        let looked = self.look_closely(id).await?;
        let place = match looked {
            None => return Err(RuntimeError::new(Kind::NotFound, format!("{tried}: it does not exist"))),
            Some(looked) if looked.running() => self.place(id.as_str()).await?,
            Some(_) => None,
        };
        let place = place.ok_or_else(|| RuntimeError::new(Kind::Invalid, format!("{tried}: it does not run")))?;
        let cgroups = self.cgroups.clone();
        blocking(tried, move || {
            if cgroups.is_frozen(place.cgroup.path()) == frozen {
                return Ok(());
            }
            let done = cgroups.set_frozen(place.cgroup.path(), frozen);
            if frozen && done.is_err() {
                // Nor is it to freeze later, when nobody expects it any more.
                let _ = cgroups.set_frozen(place.cgroup.path(), false);
            }
            done
        })
        .await
    }

    /// Thaws a container that is frozen, if it runs: no signal reaches it before.
    pub(super) async fn thaw(&self, id: &str) -> Result<()> {
        let Some(place) = self.place(id).await? else { return Ok(()) };
        let cgroups = self.cgroups.clone();
        blocking(format!("failed to thaw container {id}"), move || {
            if cgroups.is_frozen(place.cgroup.path()) { cgroups.set_frozen(place.cgroup.path(), false) } else { Ok(()) }
        })
        .await
    }
}
