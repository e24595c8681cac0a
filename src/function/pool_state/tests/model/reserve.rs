//! What the pool says that it would start next.

use super::super::super::replica::each;
use super::*;

impl World {
    /// What was next in line when a call came is what that call starts; and the line is bounded.
    pub(super) fn check_reserve(&self, event: &Event, before: &Pool) {
        let there = |pool: &Pool| each(&pool.replicas).map(|(id, ..)| id).collect::<BTreeSet<_>>();
        let line = &before.reserve().environments;
        let fresh: Vec<_> = there(&self.pool).difference(&there(before)).copied().collect();
        if matches!(event, Event::CallArrived { .. }) && fresh.len() <= line.len() {
            assert_eq!(fresh, line[..fresh.len()], "what was ready is what is asked for");
        }
        let starting = |e: &pool::Environment| matches!(e.state, pool::State::Cold | pool::State::Starting);
        let starting = each(&self.pool.replicas).filter(|(_, _, e)| starting(e)).map(|(id, ..)| id);
        assert_eq!(self.pool.reserve().starting, starting.collect::<Vec<_>>(), "what is about to be used is kept");
        let line = &self.pool.reserve().environments;
        assert!(line.len() <= self.settings.reserve as usize);
        assert_eq!(line.iter().collect::<BTreeSet<_>>().len(), line.len(), "each once");
        assert!(line.iter().all(|id| !self.used_ids.contains(id) || id.ordinal == 0), "numbers are not used twice");
        assert!(there(&self.pool).is_disjoint(&line.iter().copied().collect()), "nothing that is there already");
        let fresh: BTreeSet<_> =
            line.iter().map(|id| id.replica).filter(|id| !self.replicas.contains_key(id)).collect();
        assert!(
            line.is_empty()
                || self.replicas.len() + fresh.len() <= self.settings.max.max(self.replicas.len() as u32) as usize
        );
        assert!(line.iter().all(|id| fresh.contains(&id.replica) || self.is_kept(id.replica)));
        assert!(line.is_empty() || (self.drain.is_none() && !self.is_denied()), "nobody is to start anything");
    }
}
