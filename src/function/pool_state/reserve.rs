//! What is worth having ready before it is asked for.
//!
//! A prepared environment is no replica: it runs nothing, takes no call, borrows no capacity, and counts towards neither
//! minimum nor maximum. So the pool does not own it. It says what it would start next, and when it starts that, somebody
//! may have it ready.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Instant;

use super::replica::{State, each};
use super::{EnvironmentId, Pool, ReplicaId, Reserve};

impl Pool {
    /// What it would start next, as of the last event.
    pub fn reserve(&self) -> &Arc<Reserve> {
        &self.reserve
    }

    /// None while the pool drains, while the node has no capacity to lend, and below the minimum, where what is next is
    /// wanted already.
    pub(super) fn plan_reserve(&mut self, now: Instant) {
        let denied = self.denied.is_some_and(|until| until > now);
        let none = self.drain.is_some() || denied || self.kept() < self.minimum();
        let environments = if none { Vec::new() } else { self.next_in_line() };
        let calm = self.crash.is_none() && self.coming() == 0 && !self.wants_start();
        let starting = each(&self.replicas).filter(|(_, _, e)| matches!(e.state, State::Cold | State::Starting));
        let starting = starting.map(|(id, ..)| id).collect();
        let reserve = Reserve { environments, starting, calm };
        if *self.reserve != reserve {
            self.reserve = Arc::new(reserve);
        }
    }

    /// What [`Pool::grow`] would start for calls, one after the other: the fullest replica that has room gets the next,
    /// and is the fullest still; then come new replicas.
    fn next_in_line(&self) -> Vec<EnvironmentId> {
        let most = self.settings.environments;
        let used = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let room = self.replicas.iter().filter(|(_, r)| r.is_kept() && used(r.environments.len()) < most);
        let mut room: Vec<_> = room.collect();
        room.sort_by_key(|(id, replica)| (Reverse(replica.environments.len()), **id));
        let inside = room.into_iter().flat_map(|(id, replica)| {
            (0..most - used(replica.environments.len()))
                .map(|n| EnvironmentId { replica: *id, ordinal: replica.next_ordinal().saturating_add(n) })
        });
        let more = (self.settings.max as usize).saturating_sub(self.replicas.len()) as u64;
        let beyond = (self.next_replica..self.next_replica.saturating_add(more)).map(ReplicaId);
        let beyond = beyond.flat_map(|replica| (0..most).map(move |ordinal| EnvironmentId { replica, ordinal }));
        inside.chain(beyond).take(self.settings.reserve as usize).collect()
    }
}
