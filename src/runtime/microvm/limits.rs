//! Other limits for what runs.

use super::MicrovmRuntime;
use crate::runtime::types::{ContainerId, ContainerState, Resources, SandboxId};
use crate::runtime::{Kind, Result, RuntimeError};

impl MicrovmRuntime {
    pub(super) async fn limit(&self, id: &ContainerId, wanted: &Resources) -> Result<()> {
        let failed = |what| RuntimeError::new(Kind::Invalid, format!("failed to limit container {id}: {what}"));
        let sandbox = self.known_container(id)?;
        let _turn = sandbox.turn.lock().await;
        if self.status(id).await?.state == ContainerState::Exited {
            return Err(failed("it has exited"));
        }
        let vm = sandbox.vm().ok_or_else(|| failed("its microVM has ended"))?;
        let known = sandbox.record().containers.get(id.as_str()).map(|one| one.resources.clone());
        let limits = changed(&known.unwrap_or_default(), wanted);
        vm.limit(id.as_str(), &limits).await?;
        let note = |one: &mut super::checkpoint::ContainerRecord| one.resources = limits;
        sandbox.change(|record| record.containers.get_mut(id.as_str()).map(note)).await.map(drop)
    }

    pub(super) async fn limit_sandbox(&self, id: &SandboxId, wanted: &Resources) -> Result<()> {
        let failed = |kind, what| RuntimeError::new(kind, format!("failed to limit sandbox {id}: {what}"));
        let sandbox = self.sandbox(id.as_str()).ok_or_else(|| failed(Kind::NotFound, "there is no such sandbox"))?;
        let _turn = sandbox.turn.lock().await;
        let vm = sandbox.vm().ok_or_else(|| failed(Kind::Invalid, "its microVM has ended"))?;
        let limits = changed(&sandbox.record().resources, wanted);
        vm.limit_all(&limits).await?;
        sandbox.change(|record| record.resources = limits).await
    }
}

/// What is named changes, but for the OOM score.
fn changed(known: &Resources, wanted: &Resources) -> Resources {
    Resources {
        cpu_shares: wanted.cpu_shares.or(known.cpu_shares),
        cpu_quota: wanted.cpu_quota.or(known.cpu_quota),
        cpu_period: wanted.cpu_period.or(known.cpu_period),
        memory_limit: wanted.memory_limit.or(known.memory_limit),
        oom_score_adj: known.oom_score_adj,
        pids_limit: wanted.pids_limit.or(known.pids_limit),
    }
}
