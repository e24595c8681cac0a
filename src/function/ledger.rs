//! Who uses what of the node: Pods by what they request, pools by what they borrow beyond that.
//!
//! The scheduler counts Pod specs only, and so does admission. A function Pod's request pays for its first replicas;
//! what its replicas use beyond it is *borrowed* from what nobody has requested. When a Pod is bound that needs the room,
//! replicas are recalled, idle ones first, and the Pod starts once [`Ledger::shortage`] is nothing. So the node is never
//! used beyond its allocatable, and never lends what a Pod waits for.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Instant;

use super::pool_state::ReplicaId;
use super::settings::Size;

/// The UID of a Pod. A pool goes by that of its Pod.
pub type Uid = String;

/// The node's capacity as pools see it.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    allocatable: Size,
    pods: BTreeMap<Uid, Size>,
    loans: BTreeMap<Uid, BTreeMap<ReplicaId, Loan>>,
}

#[derive(Clone, Copy, Debug)]
struct Loan {
    size: Size,
    idle_since: Option<Instant>,
    recalled: bool,
}

/// A replica whose pool is to give it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recall {
    /// The pool.
    pub pool: Uid,
    /// Its replica.
    pub replica: ReplicaId,
}

/// The node has no room for a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node cannot lend {}m CPU and {} bytes of memory, it lacks {}m and {} bytes",
    wanted.cpu_millis, wanted.memory_bytes, missing.cpu_millis, missing.memory_bytes)]
pub struct Denied {
    /// What the replica needs.
    pub wanted: Size,
    /// How much of it is not there.
    pub missing: Size,
}

impl Ledger {
    /// A ledger of a node with so much for Pods.
    pub fn new(allocatable: Size) -> Self {
        Self { allocatable, ..Self::default() }
    }

    /// The node's allocatable has changed. Returns what is to be given back.
    pub fn set_allocatable(&mut self, allocatable: Size) -> Vec<Recall> {
        self.allocatable = allocatable;
        self.recall()
    }

    /// A Pod was let in, function or not, with so much requested; again: its request has changed. Returns what is to
    /// be given back before it may start.
    pub fn bind(&mut self, pod: &str, requests: Size) -> Vec<Recall> {
        self.pods.insert(pod.to_owned(), requests);
        self.recall()
    }

    /// A Pod has ended, with all its replicas.
    pub fn leave(&mut self, pod: &str) {
        self.pods.remove(pod);
        self.loans.remove(pod);
    }

    /// A pool starts a replica.
    ///
    /// # Errors
    /// There is no room: nothing is noted. There is none for a replica beyond its Pod's request while anything is
    /// recalled, too.
    pub fn lend(&mut self, pool: &str, replica: ReplicaId, size: Size) -> Result<(), Denied> {
        let before = self.borrowed(pool);
        self.note(pool, replica, size);
        let missing = self.shortage();
        // What its own Pod requested is its right, whatever others owe.
        if missing == Size::default() || self.borrowed(pool) == before {
            return Ok(());
        }
        self.give_back(pool, replica);
        Err(Denied { wanted: size, missing })
    }

    /// A pool has adopted a replica, which uses what it uses, room or not. Returns what is to be given back.
    pub fn adopt(&mut self, pool: &str, replica: ReplicaId, size: Size) -> Vec<Recall> {
        self.note(pool, replica, size);
        self.recall()
    }

    /// The replicas that a pool is to give back and still has.
    pub fn recalled(&self, pool: &str) -> Vec<ReplicaId> {
        let loans = self.loans.get(pool).into_iter().flatten();
        loans.filter(|(_, loan)| loan.recalled).map(|(id, _)| *id).collect()
    }

    /// A replica is gone. True if that leaves room for others: tell the pools that were denied.
    pub fn give_back(&mut self, pool: &str, replica: ReplicaId) -> bool {
        let Some(loans) = self.loans.get_mut(pool) else { return false };
        let gone = loans.remove(&replica).is_some();
        if loans.is_empty() {
            self.loans.remove(pool);
        }
        gone && self.shortage() == Size::default()
    }

    /// A replica has become idle, or busy (`None`).
    pub fn set_idle(&mut self, pool: &str, replica: ReplicaId, since: Option<Instant>) {
        if let Some(loan) = self.loans.get_mut(pool).and_then(|loans| loans.get_mut(&replica)) {
            loan.idle_since = since;
        }
    }

    /// How far use is beyond allocatable: a Pod that was bound last starts when this is nothing.
    pub fn shortage(&self) -> Size {
        excess(self.used(), self.allocatable)
    }

    /// What may still be lent.
    pub fn free(&self) -> Size {
        excess(self.allocatable, self.used())
    }

    /// What Pods request and pools borrow.
    pub fn used(&self) -> Size {
        let requested = self.pods.values().copied();
        requested.chain(self.loans.keys().map(|pool| self.borrowed(pool))).fold(Size::default(), sum)
    }

    /// What a pool uses beyond its Pod's request.
    pub fn borrowed(&self, pool: &str) -> Size {
        self.borrowed_of(pool, |_| true)
    }

    /// Whether any pool has borrowed anything.
    pub fn lends(&self) -> bool {
        self.loans.keys().any(|pool| self.borrowed(pool) != Size::default())
    }

    fn borrowed_of(&self, pool: &str, counts: impl Fn(&Loan) -> bool) -> Size {
        let loans = self.loans.get(pool).into_iter().flat_map(BTreeMap::values);
        let uses = loans.filter(|loan| counts(loan)).map(|loan| loan.size).fold(Size::default(), sum);
        excess(uses, self.pods.get(pool).copied().unwrap_or_default())
    }

    fn note(&mut self, pool: &str, replica: ReplicaId, size: Size) {
        let loan = Loan { size, idle_since: None, recalled: false };
        self.loans.entry(pool.to_owned()).or_default().insert(replica, loan);
    }

    /// Recalls replicas until what is left after they are gone fits: the longest idle first, then busy ones, the
    /// youngest first, since they are the likeliest to be extra. None that would not help.
    fn recall(&mut self) -> Vec<Recall> {
        let mut recalls = Vec::new();
        loop {
            let lacking = self.shortage_after_recalls();
            if lacking == Size::default() {
                return recalls;
            }
            let loans =
                self.loans.iter().flat_map(|(pool, loans)| loans.iter().map(move |(id, loan)| (pool, *id, loan)));
            let helpful = loans.filter(|(pool, _, loan)| !loan.recalled && self.helps(pool, loan.size, lacking));
            let first = helpful.min_by_key(|(_, id, loan)| (loan.idle_since.is_none(), loan.idle_since, Reverse(*id)));
            let Some((pool, replica, _)) = first else { return recalls };
            let pool = pool.clone();
            if let Some(loan) = self.loans.get_mut(&pool).and_then(|loans| loans.get_mut(&replica)) {
                loan.recalled = true;
            }
            recalls.push(Recall { pool, replica });
        }
    }

    /// What would be lacking still if all that is recalled were gone.
    fn shortage_after_recalls(&self) -> Size {
        let requested = self.pods.values().copied();
        let left = self.loans.keys().map(|pool| self.borrowed_of(pool, |loan| !loan.recalled));
        excess(requested.chain(left).fold(Size::default(), sum), self.allocatable)
    }

    /// Whether a pool borrows less of what is lacking when it gives back a replica of this size.
    fn helps(&self, pool: &str, size: Size, lacking: Size) -> bool {
        let borrowed = self.borrowed_of(pool, |loan| !loan.recalled);
        let cpu = lacking.cpu_millis > 0 && borrowed.cpu_millis > 0 && size.cpu_millis > 0;
        cpu || (lacking.memory_bytes > 0 && borrowed.memory_bytes > 0 && size.memory_bytes > 0)
    }
}

fn sum(a: Size, b: Size) -> Size {
    Size {
        cpu_millis: a.cpu_millis.saturating_add(b.cpu_millis),
        memory_bytes: a.memory_bytes.saturating_add(b.memory_bytes),
    }
}

/// How far `a` is beyond `b`, each by itself.
fn excess(a: Size, b: Size) -> Size {
    Size {
        cpu_millis: a.cpu_millis.saturating_sub(b.cpu_millis),
        memory_bytes: a.memory_bytes.saturating_sub(b.memory_bytes),
    }
}

#[cfg(test)]
mod tests;
