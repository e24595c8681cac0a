//! Limits changed while containers run.

use bollard::models::{ContainerInspectResponse, ContainerUpdateBody};

use super::DockerRuntime;
use super::container::state_of;
use super::failure::failed;
use crate::runtime::types::{ContainerId, ContainerState, Resources, SandboxId};
use crate::runtime::{Kind, Result, RuntimeError, blocking};

impl DockerRuntime {
    pub(super) async fn set_limits(&self, id: &ContainerId, limits: &Resources) -> Result<()> {
        let tried = format!("failed to change the limits of container {id}");
        let refused = |kind, why: &str| Err(RuntimeError::new(kind, format!("{tried}: {why}")));
        match self.see(id.as_str()).await?.filter(|seen| !seen.facts.sandbox_itself) {
            None => return refused(Kind::NotFound, "it does not exist"),
            Some(seen) => {
                let state = seen.inspect.state.unwrap_or_default();
                if state_of(&state) == ContainerState::Exited {
                    return refused(Kind::Invalid, "it has exited");
                }
            }
        }
        let body = ContainerUpdateBody {
            cpu_shares: limits.cpu_shares,
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_quota.and(limits.cpu_period),
            memory: limits.memory_limit,
            // Docker checks the one against the other, so both change at once; see `spec`.
            memory_swap: limits.memory_limit,
            ..ContainerUpdateBody::default()
        };
        self.docker.update_container(id.as_str(), body).await.map_err(|error| failed(tried, error))
    }

    pub(super) async fn set_sandbox_limits(&self, id: &SandboxId, limits: &Resources) -> Result<()> {
        let seen = self.see(id.as_str()).await?.filter(|seen| seen.facts.sandbox_itself);
        let seen = seen.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("there is no sandbox {id}")))?;
        let (cgroups, path, limits) = (self.cgroups.clone(), seen.facts.cgroup, limits.clone());
        blocking(format!("failed to change the limits of cgroup {path}"), move || cgroups.ensure(&path, &limits)).await
    }
}

/// What Docker says a container may use; zero is no limit to it.
pub(super) fn limits_of(inspect: &ContainerInspectResponse) -> Option<Resources> {
    let config = inspect.host_config.as_ref()?;
    let set = |limit: Option<i64>| limit.filter(|limit| *limit != 0);
    Some(Resources {
        cpu_shares: set(config.cpu_shares),
        cpu_quota: set(config.cpu_quota),
        cpu_period: set(config.cpu_period),
        memory_limit: set(config.memory),
        oom_score_adj: config.oom_score_adj,
        pids_limit: set(config.pids_limit),
    })
}
