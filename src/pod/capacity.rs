//! The node's capacity between the Pods that request it and the function pools that borrow what is left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use k8s_openapi::api::core::v1::PodSpec;
use tokio::sync::Notify;

use super::qos::{ResourceList, pod_requests};
use crate::function::ledger::{Ledger, Recall};
use crate::function::pool_state::ReplicaId;
use crate::function::service::Service;
use crate::function::settings::Size;

/// The ledger, and the pools that go by it.
pub struct Capacity {
    inner: Mutex<Inner>,
    /// Something was given back.
    freed: Notify,
}

struct Inner {
    ledger: Ledger,
    pools: HashMap<String, Weak<Service>>,
}

impl Capacity {
    /// The capacity of a node with so much for Pods.
    pub fn new(allocatable: &ResourceList) -> Self {
        let ledger = Ledger::new(size(allocatable));
        Self { inner: Mutex::new(Inner { ledger, pools: HashMap::new() }), freed: Notify::new() }
    }

    /// A Pod was let in. Returns once what pools had borrowed of its share is given back.
    pub(super) async fn bind(&self, uid: &str, spec: &PodSpec) {
        let recalls = self.inner().ledger.bind(uid, size(&pod_requests(spec)));
        self.recall(recalls);
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if self.inner().ledger.shortage() == Size::default() {
                return;
            }
            freed.await;
        }
    }

    /// A Pod runs already, after a restart of the node agent.
    pub(super) fn adopt(&self, uid: &str, spec: &PodSpec) {
        let recalls = self.inner().ledger.bind(uid, size(&pod_requests(spec)));
        self.recall(recalls);
    }

    /// A Pod has ended, and its pool with it.
    pub(super) fn leave(&self, uid: &str) {
        let mut inner = self.inner();
        inner.ledger.leave(uid);
        inner.pools.remove(uid);
        drop(inner);
        self.tell_freed();
    }

    /// The Pod object is gone: its share is free for the next Pod, though its processes still end.
    pub(super) fn vacate(&self, uid: &str) {
        let recalls = self.inner().ledger.bind(uid, Size::default());
        self.recall(recalls);
        self.tell_freed();
    }

    /// A pool that borrows from now on. It is told what was recalled of its replicas before, while they were adopted.
    pub(super) fn register(&self, uid: &str, service: &Arc<Service>) {
        let recalled = {
            let mut inner = self.inner();
            inner.pools.insert(uid.to_owned(), Arc::downgrade(service));
            inner.ledger.recalled(uid)
        };
        recalled.into_iter().for_each(|replica| service.give_back(replica));
    }

    /// A pool starts a replica; false if there is no room.
    pub(super) fn lend(&self, uid: &str, replica: ReplicaId, size: Size) -> bool {
        match self.inner().ledger.lend(uid, replica, size) {
            Ok(()) => true,
            Err(denied) => {
                tracing::debug!(uid, %replica, %denied, "a replica has to wait");
                false
            }
        }
    }

    /// A pool has a replica from before a restart.
    pub(super) fn adopt_replica(&self, uid: &str, replica: ReplicaId, size: Size) {
        let recalls = self.inner().ledger.adopt(uid, replica, size);
        self.recall(recalls);
    }

    /// A replica is gone.
    pub(super) fn give_back(&self, uid: &str, replica: ReplicaId) {
        let room = self.inner().ledger.give_back(uid, replica);
        if room {
            self.tell_freed();
        }
    }

    /// A replica has become idle, or busy.
    pub(super) fn set_idle(&self, uid: &str, replica: ReplicaId, since: Option<Instant>) {
        self.inner().ledger.set_idle(uid, replica, since);
    }

    fn recall(&self, recalls: Vec<Recall>) {
        for Recall { pool, replica } in recalls {
            // Not under the lock: the pool asks for capacity in its turn.
            let service = self.inner().pools.get(&pool).and_then(Weak::upgrade);
            if let Some(service) = service {
                service.give_back(replica);
            }
        }
    }

    fn tell_freed(&self) {
        self.freed.notify_waiters();
        let pools: Vec<_> = self.inner().pools.values().filter_map(Weak::upgrade).collect();
        for service in pools.iter().filter(|service| service.summary_now().limited) {
            service.capacity_freed();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // The ledger notes each change in one go.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of a list of resources a ledger counts.
fn size(list: &ResourceList) -> Size {
    let whole = |number: i64| u64::try_from(number).unwrap_or(0);
    Size {
        cpu_millis: list.get("cpu").map_or(0, |cpu| whole(cpu.milli_value())),
        memory_bytes: list.get("memory").map_or(0, |memory| whole(memory.value())),
    }
}
