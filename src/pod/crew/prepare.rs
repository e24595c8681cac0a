//! Environments that are ready before they are asked for: volumes, sandbox and containers are there, and nothing of them
//! runs but the sandbox's holder.
//!
//! What an environment waits for is mostly made by then, so that its start is that of its processes. It holds an address
//! and a few megabytes of memory, and no capacity of the node's: nothing of the user's runs. What it was made of is
//! compared with what it would be made of once it is started, so it may be old; one made for other labels, or another
//! image, is made anew.
//!
//! After a crash of this process nobody knows what one was made of: it is removed with what else does not run.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{Mutex, OwnedSemaphorePermit, watch};

use super::verdict::verdict;
use super::{Crew, Errand, replica_key};
use crate::function::pool_state::{EnvironmentId, ReplicaId};
use crate::function::service::Replicas as _;
use crate::function::settings::Size;

/// Most environments that are prepared on a node, of all functions together: each has a process that holds its sandbox,
/// and a supervisor of that. Functions that ask when there are so many start as if nothing was prepared.
pub(super) const MOST: usize = 32;

/// Which environments are prepared. Locked while one is removed, so that it is not asked for meanwhile.
#[derive(Default)]
pub(super) struct Reserve(Mutex<Books>);

#[derive(Default)]
struct Books {
    prepared: BTreeMap<EnvironmentId, Prepared>,
    /// Replicas that the pool has asked for: theirs is what is prepared in them, and not they themselves.
    started: BTreeSet<ReplicaId>,
}

struct Prepared {
    made_of: Arc<Pod>,
    size: Size,
    _permit: OwnedSemaphorePermit,
}

impl Crew {
    /// The pool has asked for the replica: it goes when the pool says so.
    pub(super) async fn claim_replica(&self, id: ReplicaId) {
        self.reserve.0.lock().await.started.insert(id);
    }

    /// Starts an environment if it is prepared, and tells how it is from then on. One in which something went wrong, or
    /// that is not of what the Pod is now, is removed, so that another can be begun in its place.
    pub(super) async fn claim(&self, id: EnvironmentId) -> Option<watch::Receiver<Option<PodStatus>>> {
        let mut books = self.reserve.0.lock().await;
        // Of another image, it is about to be dismissed.
        let fresh = is_made_of(&books.prepared.remove(&id)?.made_of, &self.derived());
        {
            let members = self.members();
            let member = members.get(&id)?;
            if fresh && member.statuses.borrow().as_ref().is_none_or(|status| verdict(status).is_none()) {
                member.go.send_replace(true);
                return Some(member.statuses.clone());
            }
        }
        self.stop_environment(id).await;
        None
    }

    pub(super) async fn prepare_one(&self, id: EnvironmentId) {
        let mut books = self.reserve.0.lock().await;
        if self.members().contains_key(&id) {
            return;
        }
        if let Entry::Vacant(place) = books.prepared.entry(id) {
            let Ok(permit) = Arc::clone(&self.shared.environments.prepared).try_acquire_owned() else {
                tracing::debug!(uid = self.uid, environment = %id, "the node has prepared as much as it may");
                return;
            };
            let size = self.settings.borrow().size;
            place.insert(Prepared { made_of: self.derived(), size, _permit: permit });
        }
        // Dropped in here, what there is of it is known by now.
        match self.furnish(id.replica).await {
            Ok(()) => drop(self.hire(id, Errand::Prepare)),
            Err(exit) => {
                tracing::debug!(uid = self.uid, environment = %id, %exit, "an environment could not be prepared");
            }
        }
    }

    pub(super) async fn dismiss_others(&self, kept: &BTreeSet<EnvironmentId>) {
        let mut books = self.reserve.0.lock().await;
        let (pod, size) = (self.derived(), self.settings.borrow().size);
        let stale = |id: &EnvironmentId, it: &Prepared, started: &BTreeSet<ReplicaId>| {
            !is_made_of(&it.made_of, &pod) || (it.size != size && !started.contains(&id.replica))
        };
        let going = books.prepared.iter().filter(|(id, it)| !kept.contains(id) || stale(id, it, &books.started));
        let going: Vec<_> = going.map(|(id, _)| *id).collect();
        for id in going {
            self.dismiss(id, &mut books).await;
        }
    }

    /// Nothing that is prepared in the replica is left; it is the pool's no more.
    pub(super) async fn dismiss_replica(&self, replica: ReplicaId) {
        let mut books = self.reserve.0.lock().await;
        let within: Vec<_> = books.prepared.keys().filter(|id| id.replica == replica).copied().collect();
        for id in within {
            self.dismiss(id, &mut books).await;
        }
        books.started.remove(&replica);
    }

    async fn dismiss(&self, id: EnvironmentId, books: &mut Books) {
        self.stop_environment(id).await;
        books.prepared.remove(&id);
        let shared = books.prepared.keys().any(|other| other.replica == id.replica);
        if !shared && !books.started.contains(&id.replica) {
            drop(self.replicas().remove(&id.replica));
            self.tear_down(&replica_key(&self.uid, id.replica)).await;
        }
    }
}

/// Whether a container made of one would be the same made of the other, as far as the Pod goes.
fn is_made_of(one: &Pod, other: &Pod) -> bool {
    let (a, b) = (&one.metadata, &other.metadata);
    one.spec == other.spec && a.labels == b.labels && a.annotations == b.annotations
}
