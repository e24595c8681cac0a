//! What always holds.

use super::*;

impl World {
    pub(super) fn check_state(&self) {
        let summary = self.pool.summary(self.now);
        let running = self.calls.values().filter(|call| matches!(call.place, Place::Running(_))).count();
        assert_eq!((summary.queued, summary.running), (self.queue.len(), running));
        assert_eq!((summary.replicas, summary.crashes), (self.replicas.len(), self.crashed));
        for id in self.environments.keys() {
            assert!(
                self.calls_in(*id) <= self.settings.calls as usize || self.was_lowered(),
                "{id} has too many calls"
            );
        }
        assert!(self.queue.is_empty() || self.with_room().is_empty(), "a call waits beside an idle environment");
        if self.coming() < self.wanted() {
            let frozen = |(id, e): (&EnvironmentId, &Environment)| e.state == State::Frozen && self.is_kept(id.replica);
            assert!(!self.environments.iter().any(frozen), "a call waits beside a frozen environment");
        }
        assert!(!self.lacks() || self.cannot_start(true), "something is lacking and nothing is started");
        if self.kept() < self.min() {
            assert!(self.cannot_start(false), "below the minimum, and nothing is started");
        }
        if self.drain.is_some() && self.queue.is_empty() {
            for id in self.replicas.keys().filter(|id| self.replicas[id].phase != Phase::Stopping) {
                let busy = self.calls_in_replica(*id) > 0 || self.within(*id).any(|(_, e)| e.state == State::Unknown);
                assert!(busy, "a drained replica stays");
            }
        }
    }

    /// Whether calls at once were lowered while some ran; then there may be too many for a while.
    pub(super) fn was_lowered(&self) -> bool {
        self.environments.keys().any(|id| self.calls_in(*id) > self.settings.calls as usize)
    }

    pub(super) fn cannot_start(&self, in_replicas: bool) -> bool {
        let environments = self.settings.environments as usize;
        let used = |id: ReplicaId| self.pool.replicas.get(&id).map_or(0, |replica| replica.environments.len());
        let room = in_replicas && self.replicas.keys().any(|id| self.is_kept(*id) && used(*id) < environments);
        self.held() || (!room && (self.is_denied() || self.replicas.len() >= self.settings.max as usize))
    }

    /// What time alone must not break, between events: whoever goes by `next_deadline` misses nothing.
    pub(super) fn check_time(&self) {
        if let Some(call) = self.queue.front() {
            assert!(self.calls[call].since + self.settings.queue_timeout > self.now, "a call waits too long");
        }
        let waiting = self.visits.values().filter(|(_, place)| place.is_none());
        for (since, _) in waiting {
            assert!(*since + self.settings.queue_timeout > self.now, "a visitor waits too long");
        }
        if self.kept() > self.min()
            && let Some((since, _)) = self.idle().first()
        {
            assert!(*since + self.settings.idle_timeout > self.now, "a replica is idle too long");
        }
        if let (Some(after), None) = (self.settings.freeze_after, self.drain) {
            for (id, e) in
                self.environments.iter().filter(|(id, e)| e.state == State::Ready && self.is_kept(id.replica))
            {
                let visited = self.visits.values().any(|(_, place)| *place == Some(*id));
                let idle = self.calls_in(*id) == 0 && !visited && !e.unready;
                assert!(!idle || e.used + after > self.now, "{id} should be frozen");
            }
        }
        if self.drain.is_some_and(|until| until <= self.now) {
            assert!(self.queue.is_empty() && self.calls.values().all(|call| call.place == Place::Done));
            assert!(self.replicas.values().all(|replica| replica.phase == Phase::Stopping), "the grace period is over");
        }
        let starts = self.lacks() && !self.cannot_start(true);
        assert!(!starts && (self.kept() >= self.min() || self.cannot_start(false)), "a start is due");
    }
}
