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

    /// A Pod was let in. Returns once what pools had borrowed of its share is given back. Where nothing is borrowed and
    /// Pods alone have more than there is, there is nothing to wait for: whoever let them in has decided so.
    pub(super) async fn bind(&self, uid: &str, spec: &PodSpec) {
        let recalls = self.inner().ledger.bind(uid, size(&pod_requests(spec)));
        self.recall(recalls);
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if self.inner().is_settled() {
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
        let (room, settled) = {
            let mut inner = self.inner();
            (inner.ledger.give_back(uid, replica), inner.is_settled())
        };
        if room {
            self.tell_freed();
        } else if settled {
            self.freed.notify_waiters();
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

impl Inner {
    /// Whether no pool owes a Pod anything.
    fn is_settled(&self) -> bool {
        self.ledger.shortage() == Size::default() || !self.ledger.lends()
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

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use serde_json::json;

    use super::*;
    use crate::quantity::Quantity;

    const CORE: Size = Size { cpu_millis: 1000, memory_bytes: 0 };

    fn of_cores(cores: i64) -> Capacity {
        Capacity::new(&[("cpu".to_owned(), Quantity::from_units(cores))].into())
    }

    fn asking(cpu: &str) -> PodSpec {
        let resources = json!({ "requests": { "cpu": cpu } });
        serde_json::from_value(json!({ "containers": [{ "name": "c", "resources": resources }] })).unwrap()
    }

    #[test]
    fn nobody_waits_for_what_no_pool_can_give_back() {
        let capacity = of_cores(4);
        capacity.adopt("found after a restart", &asking("8"));
        assert!(capacity.bind("late", &asking("0")).now_or_never().is_some());
    }

    #[test]
    fn a_pod_waits_as_long_as_a_pool_has_borrowed_of_what_is_short() {
        for (adopted, why) in [("3", "that leaves room enough"), ("8", "the rest is not owed by a pool")] {
            let capacity = of_cores(4);
            assert!(capacity.lend("pool", ReplicaId(0), CORE));
            capacity.adopt("found after a restart", &asking(adopted));
            let late = asking("1");
            let mut bound = Box::pin(capacity.bind("late", &late));
            assert!((&mut bound).now_or_never().is_none());
            capacity.give_back("pool", ReplicaId(0));
            assert!((&mut bound).now_or_never().is_some(), "{why}");
        }
    }
}
