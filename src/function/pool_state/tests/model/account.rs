//! The model's own account of what goes in.

use super::*;

impl World {
    /// The model's own account of an event.
    pub(super) fn note(&mut self, event: &Event) {
        match event {
            Event::CallArrived { call } => {
                let call_now = Call { place: Place::Waiting, since: self.now, client_gone: false };
                self.calls.insert(*call, call_now);
                self.queue.push_back(*call);
            }
            Event::CallEnded { call, reuse } => self.note_end(*call, *reuse),
            Event::CallLost { call } => {
                if let Some(Place::Running(id)) = self.calls.get(call).map(|call| call.place) {
                    self.environments.get_mut(&id).unwrap().broke.get_or_insert(self.now);
                }
                self.note_end(*call, false);
            }
            Event::ClientGone { call } => self.note_gone(*call),
            Event::VisitArrived { visit } => {
                self.visits.insert(*visit, (self.now, None));
            }
            Event::VisitEnded { visit } => {
                self.visits.remove(visit);
            }
            Event::ReplicaStarted { replica } => {
                if let Some(known) = self.replicas.get_mut(replica).filter(|r| r.phase == Phase::Starting) {
                    known.phase = Phase::Ready;
                }
            }
            Event::ReplicaDenied { replica } => self.note_denied(*replica),
            Event::ReplicaFailed { replica, .. } => self.note_replica_failed(*replica),
            Event::ReplicaStopped { replica } => {
                self.replicas.remove(replica);
                self.denied = None;
            }
            Event::EnvironmentReady { environment } => {
                if let Some(e) = self.environments.get_mut(environment) {
                    e.state = State::Ready;
                    e.used = self.now;
                    e.ready.get_or_insert(self.now);
                }
            }
            Event::EnvironmentProbed { environment, ready } => {
                if let Some(e) = self.environments.get_mut(environment) {
                    e.unready = !ready;
                }
            }
            Event::EnvironmentDied { environment, .. } => self.note_died(*environment),
            Event::EnvironmentStopped { environment } => {
                self.environments.remove(environment);
            }
            Event::CapacityFreed => self.denied = None,
            Event::GiveBack { replica } => {
                if let Some(known) = self.replicas.get_mut(replica) {
                    known.sent_away = true;
                }
            }
            Event::SettingsChanged(settings) => self.settings = *settings,
            Event::Outdated => self.note_outdated(),
            Event::Drain { until } => self.drain = Some(self.drain.map_or(*until, |before| before.min(*until))),
            Event::Tick => {}
        }
    }

    fn note_gone(&mut self, call: CallId) {
        let Some(known) = self.calls.get_mut(&call) else { return };
        known.client_gone = true;
        if known.place == Place::Waiting {
            known.place = Place::Done;
            self.queue.retain(|waiting| *waiting != call);
        }
    }

    pub(super) fn note_outdated(&mut self) {
        self.replicas.values_mut().for_each(|replica| replica.sent_away = true);
        (self.crashes, self.last_crash, self.hold) = (0, None, None);
    }

    pub(super) fn note_denied(&mut self, replica: ReplicaId) {
        if self.replicas.get(&replica).is_some_and(|r| r.phase == Phase::Starting) {
            self.denied = Some(self.now + Duration::from_secs(5));
            self.owed = 0;
        } else {
            self.denied = None;
        }
        self.replicas.remove(&replica);
    }

    pub(super) fn note_end(&mut self, call: CallId, reuse: bool) {
        let Some(Place::Running(id)) = self.calls.get(&call).map(|call| call.place) else { return };
        self.calls.get_mut(&call).unwrap().place = Place::Done;
        let kept = self.is_kept(id.replica);
        let environment = self.environments.get_mut(&id).unwrap();
        environment.used = self.now;
        if !reuse && !environment.spent {
            environment.spent = true;
            self.owed += usize::from(kept);
        }
        if reuse && self.last_crash.is_some_and(|crash| environment.started >= crash) {
            (self.crashes, self.last_crash, self.hold) = (0, None, None);
        }
    }

    pub(super) fn drop_calls_without_client(&mut self, gone: impl Fn(EnvironmentId) -> bool) {
        for call in self.calls.values_mut().filter(|call| call.client_gone) {
            if let Place::Running(id) = call.place
                && gone(id)
            {
                call.place = Place::Done;
            }
        }
    }

    pub(super) fn note_replica_failed(&mut self, replica: ReplicaId) {
        let busy = self.within(replica).filter(|(id, _)| self.calls_in(*id) > 0).count();
        self.owed += if self.is_kept(replica) { busy } else { 0 };
        let living = self.within(replica).filter(|(_, e)| e.state != State::Dead);
        let started = living.map(|(_, e)| e.started).max();
        let started = started.unwrap_or(self.replicas[&replica].started).max(self.replicas[&replica].started);
        self.note_crash(started, self.now);
        self.replicas.get_mut(&replica).unwrap().failed = true;
        self.drop_calls_without_client(|id| id.replica == replica);
    }

    pub(super) fn note_died(&mut self, id: EnvironmentId) {
        let Some(environment) = self.environments.get(&id).copied() else { return };
        self.environments.get_mut(&id).unwrap().broke = None;
        if environment.is_gone() {
            if let Some(broke) = environment.broke {
                self.note_crash(environment.started, broke);
            }
            return;
        }
        self.owed += usize::from(self.calls_in(id) > 0 && self.is_kept(id.replica));
        if environment.state != State::Unknown {
            self.note_crash(environment.started, environment.broke.unwrap_or(self.now));
        }
        self.drop_calls_without_client(|other| other == id);
        self.environments.get_mut(&id).unwrap().state = State::Dead;
    }

    /// The first restart at once, then 10 s, 20 s, ... 300 s; what was started before the last crash is part of it.
    pub(super) fn note_crash(&mut self, started: Instant, at: Instant) {
        self.crashed += 1;
        if self.last_crash.is_some_and(|last| started < last) {
            return;
        }
        if self.last_crash.is_some_and(|last| at - last > Duration::from_secs(600)) {
            self.crashes = 0;
        }
        let wait = [0, 10, 20, 40, 80, 160, 300][self.crashes.min(6) as usize];
        self.hold = (wait > 0).then(|| at + Duration::from_secs(wait));
        self.crashes += 1;
        self.last_crash = Some(at);
    }
}
