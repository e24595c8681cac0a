//! What an earlier process left of a function Pod: running environments are taken over, everything else is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all, ready};

use super::{Crew, Errand, Part, part};
use crate::function::pool_state::{EnvironmentId, Found, ReplicaId};
use crate::function::protocol::Protocol;
use crate::function::service::{Adopted, Replicas as _};
use crate::pod::plan::is_outdated;
use crate::pod::volumes::VolumeError;
use crate::runtime::RuntimeError;
use crate::runtime::types::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};
use crate::telemetry::chain;

/// Between two looks whether an adopted environment is idle.
const LOOK: Duration = Duration::from_millis(50);
/// States of `/proc/net/tcp` in which somebody may wait for an answer: ESTABLISHED, and CLOSE_WAIT, which is what a
/// connection is in once the process that had asked is gone.
const WAITING: [&str; 2] = ["01", "08"];

/// What an earlier process left cannot be told.
#[derive(Debug, thiserror::Error)]
pub(in crate::pod) enum AdoptError {
    #[error("failed to list the environments")]
    Runtime(#[from] RuntimeError),
    #[error("failed to list the replicas' directories")]
    Disk(#[from] VolumeError),
}

impl Crew {
    /// Takes over what runs and removes the rest.
    pub(in crate::pod) async fn adopt(&self) -> Result<Vec<Adopted>, AdoptError> {
        let whole = self.whole().await?;
        let mut replicas: BTreeSet<ReplicaId> = whole.keys().map(|id| id.replica).collect();
        let mut found = Vec::new();
        for replica in replicas.clone() {
            self.shared.capacity.adopt_replica(&self.uid, replica, self.taken());
            if let Err(exit) = self.furnish(replica).await {
                tracing::warn!(uid = self.uid, %replica, %exit, "a replica's volumes could not be set up again");
                replicas.remove(&replica);
                self.shared.capacity.give_back(&self.uid, replica);
            }
        }
        for (id, (sandbox, found_as)) in whole {
            let (true, Some(address), Some(pid)) = (replicas.contains(&id.replica), sandbox.address(), sandbox.pid)
            else {
                continue;
            };
            self.claim_replica(id.replica).await;
            let statuses = self.hire(id, Errand::Adopt);
            let address = SocketAddr::new(address, self.settings.borrow().port);
            let (ended, idle) = (Self::end(&statuses), self.idle(&sandbox, pid, address.port()));
            found.push(Adopted { environment: id, address, ended, found: found_as, idle });
        }
        let kept: BTreeSet<EnvironmentId> = found.iter().map(|adopted| adopted.environment).collect();
        self.remove_the_rest(&replicas, &kept).await?;
        Ok(found)
    }

    /// Environments with a ready sandbox, in which every container runs, of the image that the Pod names now. Only idle ones are ever frozen.
    async fn whole(&self) -> Result<BTreeMap<EnvironmentId, (SandboxStatus, Found)>, AdoptError> {
        let spec = self.derived().spec.clone().unwrap_or_default();
        let names: Vec<String> = spec.containers.iter().map(|container| container.name.clone()).collect();
        let mut whole = BTreeMap::new();
        for sandbox in self.shared.runtime.list_pod_sandboxes(None).await? {
            let Some(Part::Environment(id)) = part(&self.uid, &sandbox.pod.uid) else { continue };
            let containers = self.shared.runtime.list_containers(Some(&sandbox.pod.uid)).await?;
            let runs = |name: &String| {
                let here = |c: &&ContainerStatus| c.state == ContainerState::Running && c.sandbox == sandbox.id;
                containers.iter().filter(here).any(|c| c.name == *name && !is_outdated(&spec, c))
            };
            if sandbox.state == SandboxState::Ready && names.iter().all(runs) {
                let frozen = containers.iter().any(|container| container.frozen);
                if !frozen && self.shared.drivers.has_in_guest(&sandbox.id) && self.takes_one_call() {
                    // Whether a call is under way only the guest's own kernel knows, and a second one would crash it.
                    continue;
                }
                whole.insert(id, (sandbox, if frozen { Found::Frozen } else { Found::Unknown }));
            }
        }
        Ok(whole)
    }

    /// Whether a second call at once would be the end of an environment.
    fn takes_one_call(&self) -> bool {
        self.settings.borrow().protocol == Protocol::Rie
    }

    /// Resolves once no call is under way in the environment. Those in guests that are taken over bear another one.
    fn idle(&self, sandbox: &SandboxStatus, pid: i32, port: u16) -> BoxFuture<'static, ()> {
        if self.shared.drivers.has_in_guest(&sandbox.id) { ready(()).boxed() } else { idle(pid, port) }
    }

    async fn remove_the_rest(
        &self,
        replicas: &BTreeSet<ReplicaId>,
        kept: &BTreeSet<EnvironmentId>,
    ) -> Result<(), AdoptError> {
        let mut keys = self.shared.volumes.uids().await?;
        keys.extend(self.shared.addresses.held().into_iter().map(|(_, key)| key));
        keys.extend(self.shared.runtime.list_pod_sandboxes(None).await?.into_iter().map(|s| s.pod.uid));
        keys.extend(self.shared.runtime.list_containers(None).await?.into_iter().map(|c| c.pod.uid));
        let mut loose = Vec::new();
        let mut empty = Vec::new();
        for key in &keys {
            match part(&self.uid, key) {
                Some(Part::Environment(id)) if !kept.contains(&id) => loose.push(id),
                Some(Part::Replica(id)) if !replicas.contains(&id) => empty.push(key),
                _ => {}
            }
        }
        join_all(loose.into_iter().map(|id| self.stop_environment(id))).await;
        for key in empty {
            self.tear_down(key).await;
        }
        Ok(())
    }
}

/// Resolves once no call is under way in the network namespace of that process. A Lambda runtime keeps its caller's
/// connection until it has answered, also when the caller is gone.
fn idle(pid: i32, port: u16) -> BoxFuture<'static, ()> {
    async move {
        while is_busy(pid, port) {
            tokio::time::sleep(LOOK).await;
        }
    }
    .boxed()
}

fn is_busy(pid: i32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| match std::fs::read_to_string(format!("/proc/{pid}/net/{table}")) {
        Ok(text) => waits(&text, port),
        Err(error) => {
            tracing::debug!(pid, error = chain(&error), "no table of connections");
            false
        }
    })
}

/// Whether a table of connections has one on the port that somebody may wait on.
fn waits(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _peer, state) = (words.next(), words.next(), words.next());
        let local = local.and_then(|local| u16::from_str_radix(local.rsplit(':').next()?, 16).ok());
        local == Some(port) && state.is_some_and(|state| WAITING.contains(&state))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_waits_is_seen() {
        let table = "  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A\n   \
                     1: 0100007F:1F90 0100007F:D431 08\n";
        assert!(waits(table, 8080));
        assert!(!waits(table, 8081));
        assert!(!waits("  sl\n   0: 0100007F:1F90 00000000:0000 0A\n", 8080));
    }
}
