//! What a worker says of its Pod, and when.

use std::borrow::Cow;
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::time::Instant;

use super::Worker;
use super::clock::whole_second;
use super::function::NUMBERS;
use crate::pod::plan::{self, FunctionPhase, Goal};
use crate::pod::status::{Shown, StatusInput, Trouble, function, pod_status, without_load};

impl Worker {
    /// The status now.
    pub(super) fn status(&self, goal: Goal) -> PodStatus {
        let facts = self.shared.facts.borrow();
        let health = self.probes.health();
        let finished = self.pod.spec.as_ref().is_some_and(|s| plan::finished(s, &self.observed, health).is_some());
        // A container in the sandbox proves that the volumes are there, also right after a restart of this process.
        let has_volumes = self.memory.places.is_some() || self.observed.containers().next().is_some();
        let ready_to_start = self.observed.ready_sandbox().is_some() && (has_volumes || self.function.is_some());
        let shown = self.function.as_ref().map(|function| function.shown(&self.pod, self.observed.sandbox()));
        let waiting = self.waiting(shown.as_ref());
        let mut notes = self.memory.resize.notes();
        notes.extend(self.memory.disruption.clone());
        pod_status(&StatusInput {
            pod: &self.pod,
            told: self.memory.sent.as_ref(),
            observed: shown.as_ref().map_or(&self.observed, |shown| &shown.observed),
            ready_to_start: ready_to_start && !self.memory.released,
            addresses: &self.memory.addresses,
            host_addresses: &facts.addresses,
            waiting: &waiting,
            messages: &self.memory.messages,
            health,
            ended: self.memory.ended.as_ref(),
            terminal: (goal != Goal::Run || finished) && !self.is_up(),
            runtime_name: if shown.is_some() { function::SCHEME } else { &self.shared.runtime_name },
            notes: &notes,
            cpu_quota: self.shared.host.cpu_quota,
            unready: shown.as_ref().is_some_and(|shown| shown.unready),
            replicas: shown
                .as_ref()
                .and_then(|shown| shown.replicas.as_ref())
                .map(|(holds, text)| (*holds, text.as_str())),
            // The API keeps whole seconds: with more, what comes back would differ from what was sent.
            start_time: whole_second(self.memory.start_time),
            now: whole_second(Timestamp::now()),
        })
    }

    /// Tells the directory, and the API server if it is urgent. Returns what it was not told.
    pub(super) fn report(&mut self, status: PodStatus, urgent: bool) -> Option<PodStatus> {
        if self.is_vanishing() {
            self.shared.publisher.withdraw(&self.reference.uid);
        }
        if let Some(seat) = &self.seat {
            self.shared.directory.pools.note(seat.key(), &self.observed);
        }
        let reassert = self.memory.reassert_at.is_some_and(|at| at <= Instant::now());
        if self.memory.sent.as_ref() == Some(&status) && !reassert {
            return None;
        }
        if let Some(seat) = &self.seat {
            seat.report(&status);
            self.memory.sent = Some(status);
            return None;
        }
        self.shared.directory.put(&self.pod, &status, &self.observed);
        if self.gone || self.is_vanishing() {
            return None;
        }
        if !urgent {
            return Some(status);
        }
        if !reassert && self.only_numbers(&status) && self.numbers_due().is_some_and(|due| due > Instant::now()) {
            return None;
        }
        self.memory.reassert_at = None;
        self.memory.sent = Some(status.clone());
        self.memory.sent_at = Some(Instant::now());
        self.shared.publisher.publish(&self.reference, status);
        None
    }

    /// Whether the API server is removing the object this very moment, as it does after a deletion by force.
    ///
    /// Nobody would read a status written now, and it could cost another Pod its life. A deletion with grace 0 takes two
    /// writes: the object is marked, then removed. Whatever updates it in between makes the API server remove it there
    /// and then (`ShouldDeleteDuringUpdate`, `deleteWithoutFinalizers` in apiserver's `registry/store.go`, read at 1.36),
    /// by its name alone: the UID in a PATCH is compared with the marked object and is no precondition of that removal
    /// (`Preconditions` in `registry/rest/update.go` knows that of a PUT only). If the first deletion gets there before
    /// and the Pod is made anew, the new one is removed.
    ///
    /// A PATCH that is under way when the mark is set can still meet that moment, as a kubelet's can: only a resource
    /// version would exclude it, and with that every status would be refused that follows a change not yet seen.
    fn is_vanishing(&self) -> bool {
        let meta = &self.pod.metadata;
        meta.deletion_grace_period_seconds == Some(0) && meta.finalizers.as_ref().is_none_or(Vec::is_empty)
    }

    /// Why containers wait; every one of a function for the same reason.
    fn waiting(&self, shown: Option<&Shown>) -> Cow<'_, BTreeMap<String, Trouble>> {
        let Some(trouble) = shown.and_then(|shown| shown.trouble.as_ref()) else {
            return Cow::Borrowed(&self.memory.waiting);
        };
        let names = self.pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.clone());
        let mut waiting = self.memory.waiting.clone();
        waiting.extend(names.map(|name| (name, trouble.clone())));
        Cow::Owned(waiting)
    }

    /// Whether anything of the Pod runs.
    fn is_up(&self) -> bool {
        let serves = |phase| matches!(phase, FunctionPhase::Serving(_) | FunctionPhase::Outdated(_));
        self.function.as_ref().is_some_and(|function| serves(function.phase(&self.pod)))
            || self.observed.running().next().is_some()
    }

    /// Whether a status differs from the one sent by nothing but how busy a function is.
    fn only_numbers(&self, status: &PodStatus) -> bool {
        let Some(sent) = self.memory.sent.as_ref().filter(|_| self.function.is_some()) else { return false };
        without_load(sent) == without_load(status)
    }

    /// When the numbers of a function may be written again.
    pub(super) fn numbers_due(&self) -> Option<Instant> {
        self.function.as_ref()?;
        self.memory.sent_at.map(|at| at + NUMBERS)
    }
}
