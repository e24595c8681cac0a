//! What the runtime holds of one Pod.

use std::collections::BTreeMap;

use crate::runtime::types::{ContainerId, ContainerState, ContainerStatus, SandboxId, SandboxState, SandboxStatus};

/// Every sandbox and container of one Pod that still exists, as last seen.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Sandboxes, oldest attempt first.
    sandboxes: Vec<SandboxStatus>,
    /// Attempts of each container by name, oldest first.
    containers: BTreeMap<String, Vec<ContainerStatus>>,
}

impl Observed {
    /// From what the runtime's list verbs gave.
    pub fn new(mut sandboxes: Vec<SandboxStatus>, containers: Vec<ContainerStatus>) -> Self {
        sandboxes.sort_by_key(|s| s.attempt);
        let mut observed = Self { sandboxes, containers: BTreeMap::new() };
        for status in containers {
            observed.put_container(status);
        }
        observed
    }

    /// Whether nothing is left of the Pod.
    pub fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.containers.is_empty()
    }

    /// The latest sandbox.
    pub fn sandbox(&self) -> Option<&SandboxStatus> {
        self.sandboxes.last()
    }

    /// The latest sandbox if containers can be started in it.
    pub fn ready_sandbox(&self) -> Option<&SandboxStatus> {
        self.sandbox().filter(|s| s.state == SandboxState::Ready)
    }

    /// Ids of all sandboxes.
    pub fn sandbox_ids(&self) -> impl Iterator<Item = &SandboxId> {
        self.sandboxes.iter().map(|s| &s.id)
    }

    /// The attempt number of the next sandbox.
    pub fn next_sandbox_attempt(&self) -> u32 {
        self.sandbox().map_or(0, |s| s.attempt + 1)
    }

    /// The attempts of one container, oldest first.
    pub fn attempts(&self, name: &str) -> &[ContainerStatus] {
        self.containers.get(name).map_or(&[], Vec::as_slice)
    }

    /// The newest attempt of one container.
    pub fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.attempts(name).last()
    }

    /// The newest attempt of one container, if it lives in the latest sandbox.
    pub fn current(&self, name: &str) -> Option<&ContainerStatus> {
        let sandbox = self.sandbox()?;
        self.latest(name).filter(|c| c.sandbox == sandbox.id)
    }

    /// Every attempt of every container.
    pub fn containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.containers.values().flatten()
    }

    /// Every attempt whose process runs.
    pub fn running(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.containers().filter(|c| c.state == ContainerState::Running)
    }

    /// Puts a sandbox in, replacing what was known of it.
    pub fn put_sandbox(&mut self, status: SandboxStatus) {
        self.sandboxes.retain(|s| s.id != status.id);
        self.sandboxes.push(status);
        self.sandboxes.sort_by_key(|s| s.attempt);
    }

    /// Puts a container attempt in, replacing what was known of it.
    pub fn put_container(&mut self, status: ContainerStatus) {
        let attempts = self.containers.entry(status.name.clone()).or_default();
        attempts.retain(|c| c.id != status.id);
        attempts.push(status);
        attempts.sort_by_key(|c| (c.attempt, c.created_at));
    }

    /// Forgets a container attempt.
    pub fn drop_container(&mut self, id: &ContainerId) {
        for attempts in self.containers.values_mut() {
            attempts.retain(|c| &c.id != id);
        }
        self.containers.retain(|_, attempts| !attempts.is_empty());
    }

    /// Forgets a sandbox and every container in it that was never started (an exited one still tells how it ended).
    pub fn drop_sandbox(&mut self, id: &SandboxId) {
        self.sandboxes.retain(|s| &s.id != id);
    }
}
