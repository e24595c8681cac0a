//! What comes out, held against the rules and carried out.

use super::super::super::{Reason, TryAgain};
use super::*;

impl World {
    pub(super) fn obey(&mut self, action: &Action, all: &[Action]) {
        match action {
            Action::StartReplica { replica } => self.obey_start_replica(*replica),
            Action::StopReplica { replica, why } => self.obey_stop_replica(*replica, *why),
            Action::StartEnvironment { environment, warm_up } => self.obey_start(*environment, *warm_up),
            Action::StopEnvironment { environment } => self.obey_stop(*environment),
            Action::FreezeEnvironment { environment } => {
                let e = self.environments[environment];
                assert_eq!((e.state, self.calls_in(*environment)), (State::Ready, 0), "only the idle are frozen");
                assert!(!e.unready, "its probes could not see it recover");
                assert!(e.used + self.settings.freeze_after.unwrap() <= self.now, "not before its time");
                assert!(self.visits.values().all(|(_, place)| *place != Some(*environment)), "not under a visitor");
                self.environments.get_mut(environment).unwrap().state = State::Frozen;
            }
            Action::ThawEnvironment { environment } => {
                let e = self.environments.get_mut(environment).unwrap();
                assert_eq!(e.state, State::Frozen);
                e.state = State::Thawing;
                assert!(self.coming() <= self.wanted(), "no more are thawed than are wanted");
            }
            Action::Grant { call, environment } => self.obey_grant(*call, *environment),
            Action::Refuse { call, try_again } => self.obey_refuse(*call, *try_again),
            Action::FailCall { call, .. } => {
                let known = self.calls.get_mut(call).unwrap();
                let Place::Running(id) = known.place else { panic!("{call:?} is not running: {known:?}") };
                assert!(!known.client_gone, "nobody is there to be told");
                known.place = Place::Done;
                let ended = self.drain.is_some_and(|until| until <= self.now);
                let dies = Action::StopEnvironment { environment: id };
                let replica = id.replica;
                let fails = Action::StopReplica { replica, why: Why::Failed };
                assert!(ended || all.contains(&dies) || all.contains(&fails), "{call:?} fails without a reason");
            }
            Action::Enter { visit, environment } => {
                let e = self.environments[environment];
                assert!(e.state == State::Ready && self.replicas[&environment.replica].phase == Phase::Ready);
                let open =
                    |id: &EnvironmentId| self.replicas[&id.replica].phase == Phase::Ready && !self.drains(id.replica);
                let ready = self.environments.iter().filter(|(id, e)| e.state == State::Ready && !e.spent && open(id));
                assert_eq!(ready.map(|(id, e)| (e.ready, *id)).min().unwrap().1, *environment, "the oldest");
                assert_eq!(self.visits.insert(*visit, (self.now, Some(*environment))).unwrap().1, None);
            }
            Action::RefuseVisit { visit, .. } => assert_eq!(self.visits.remove(visit).unwrap().1, None),
        }
    }

    pub(super) fn obey_start_replica(&mut self, id: ReplicaId) {
        assert!(self.used_ids.iter().all(|used| used.replica < id), "numbers are not used twice");
        assert!(self.replicas.len() < self.settings.max as usize, "never above the maximum, starting ones included");
        assert!(!self.held(), "no start while the back-off lasts");
        assert!(!self.is_denied(), "no asking for capacity right after it was denied");
        self.used_ids.insert(EnvironmentId { replica: id, ordinal: 0 });
        let wanted = self.wanted() > 0 || self.owed > 0 || self.kept() < self.min();
        assert!(wanted, "a replica starts although nobody wants it");
        let replica = Replica { phase: Phase::Starting, started: self.now, sent_away: false, failed: false };
        self.replicas.insert(id, replica);
        assert!(
            self.coming() <= self.wanted().max(self.owed) || self.kept() <= self.min(),
            "no more starts than are wanted"
        );
    }

    pub(super) fn obey_start(&mut self, id: EnvironmentId, warm_up: bool) {
        assert_eq!(self.replicas[&id.replica].phase, Phase::Ready, "environments start in replicas that have");
        let there = self.within(id.replica).filter(|(_, e)| e.state != State::Dead).count();
        assert!(there < self.settings.environments as usize, "never more environments than the labels say");
        assert!(id.ordinal == 0 || self.used_ids.insert(id), "numbers are not used twice");
        self.used_ids.insert(id);
        assert!(!warm_up || (self.settings.warm_up && self.queue.is_empty()), "a no-op must not delay a call");
        let environment = Environment::new(State::Starting, self.now);
        assert!(self.environments.insert(id, environment).is_none());
    }

    pub(super) fn obey_stop(&mut self, id: EnvironmentId) {
        assert_eq!(self.calls_in(id), 0, "no environment is stopped under a call");
        let environment = self.environments.get_mut(&id).unwrap();
        assert!(environment.state != State::Stopping, "once");
        let stays = self.pool.replicas.get(&id.replica).is_some_and(|replica| replica.phase != pool::Phase::Stopping);
        assert!(!stays || self.pool.broke(id) == environment.broke.is_some(), "who stops it knows what to listen for");
        if environment.state != State::Dead {
            environment.state = State::Stopping;
        }
    }

    pub(super) fn obey_stop_replica(&mut self, id: ReplicaId, why: Why) {
        let over = self.drain.is_some_and(|until| until <= self.now);
        if over {
            self.drop_calls_without_client(|_| true);
        }
        assert_eq!(self.calls_in_replica(id), 0, "no replica is stopped under a call");
        assert_ne!(self.replicas[&id].phase, Phase::Stopping, "once");
        let idle = self.idle();
        match why {
            Why::Failed => assert!(self.replicas[&id].failed),
            Why::GivenBack | Why::Outdated => assert!(self.replicas[&id].sent_away),
            Why::Drained => assert!(over || (self.drain.is_some() && self.queue.is_empty())),
            Why::Surplus => {}
            Why::Empty => assert!(self.has_nothing(id) && self.queue.is_empty()),
            Why::Idle => {
                let (since, oldest) = *idle.first().expect("it is idle");
                assert_eq!(oldest, id, "the longest idle first");
                assert!(since + self.settings.idle_timeout <= self.now, "not before its time");
            }
        }
        self.replicas.get_mut(&id).unwrap().phase = Phase::Stopping;
        self.environments.retain(|environment, _| environment.replica != id);
        if matches!(why, Why::Idle | Why::Empty) {
            assert!(self.kept() >= self.min(), "never below the minimum");
        }
    }

    pub(super) fn obey_grant(&mut self, call: CallId, id: EnvironmentId) {
        assert_eq!(self.queue.pop_front(), Some(call), "first come, first served");
        let best = self.with_room().last().copied().expect("it has room");
        assert_eq!(best.2, id, "those in use first, then the one used last");
        self.environments.get_mut(&id).unwrap().used = self.now;
        let known = self.calls.get_mut(&call).unwrap();
        assert_eq!(known.place, Place::Waiting, "every call is answered once");
        known.place = Place::Running(id);
    }

    pub(super) fn obey_refuse(&mut self, call: CallId, try_again: TryAgain) {
        assert!(try_again.retry_after >= Duration::from_secs(1));
        let known = self.calls.get_mut(&call).unwrap();
        assert_eq!(known.place, Place::Waiting, "every call is answered once");
        known.place = Place::Done;
        let deadline = known.since + self.settings.queue_timeout;
        let arrived = known.since == self.now && self.queue.back() == Some(&call);
        let late = deadline <= self.now;
        let over = self.drain.is_some_and(|until| until <= self.now);
        match try_again.reason {
            Reason::QueueFull => {
                assert!(arrived && self.queue.len() > self.settings.queue_length as usize);
                self.queue.pop_back();
                return;
            }
            Reason::ShuttingDown => {
                assert!(self.drain.is_some() && (arrived || late || over), "who waits is served still");
                if arrived && !over && !late {
                    self.queue.pop_back();
                    return;
                }
            }
            Reason::CrashLoop => {
                let hopeless = self.hold.is_some_and(|until| until > self.now && deadline <= until);
                assert!(hopeless || (late && self.last_crash.is_some()), "it could have been served in time");
            }
            Reason::Starting => {
                assert!(late && self.pool.last_crash().is_none(), "a reason that is known is named");
            }
            Reason::Busy | Reason::NoCapacity => assert!(late, "not before its time"),
        }
        assert_eq!(self.queue.pop_front(), Some(call), "who came first is refused first");
    }
}
