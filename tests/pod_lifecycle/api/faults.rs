//! Faults a test asks for, and what a user of the cluster does.

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::Api;
use super::store::State;

/// What happens to one request.
pub(crate) enum Fault {
    /// It is refused with this code.
    Fail(u16),
    /// It is answered once the sender is dropped.
    Hang(oneshot::Receiver<()>),
    /// A LIST answers its first object and says that there is more.
    FirstPage,
}

/// Keeps a request hanging; dropping it lets the request go on.
pub(crate) struct Hold {
    // Never sent: its being dropped is the signal.
    _release: oneshot::Sender<()>,
}

impl State {
    pub(super) fn take_fault(&mut self, verb: &str, path: &str) -> Option<Fault> {
        let at = self.faults.iter().position(|(of, part, _)| *of == verb && path.contains(part))?;
        Some(self.faults.remove(at).2)
    }

    /// How many faults have met no request yet.
    pub(crate) fn faults_left(&self) -> usize {
        self.faults.len()
    }

    /// How many requests there were of this verb whose path has this part.
    pub(crate) fn count(&self, verb: &str, part: &str) -> usize {
        let asked = |line: &&String| line.split_once(' ').is_some_and(|(of, path)| of == verb && path.contains(part));
        self.log.iter().filter(asked).count()
    }

    /// Reasons of the events on a Pod, by its name.
    pub(crate) fn reasons(&self, name: &str) -> Vec<String> {
        let of_pod = self.events.iter().filter(|event| event["involvedObject"]["name"] == name);
        of_pod.filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect()
    }
}

impl Api {
    /// The next request of this verb whose path has this part meets the fault; several wait in order.
    pub(crate) fn fault_next(&self, verb: &'static str, part: &str, fault: Fault) {
        self.state().faults.push((verb, part.to_owned(), fault));
    }

    /// The next such request hangs until the [`Hold`] is dropped.
    pub(crate) fn hang_next(&self, verb: &'static str, part: &str) -> Hold {
        let (release, released) = oneshot::channel();
        self.fault_next(verb, part, Fault::Hang(released));
        Hold { _release: release }
    }

    /// Ends every watch; they may go on from where they were.
    pub(crate) fn cut_watches(&self) {
        self.change(|state| state.cut += 1);
    }

    /// Ends every watch and forgets what happened: they must list again.
    pub(crate) fn expire_watches(&self) {
        self.change(|state| {
            let version = state.next_version();
            state.forgotten = version;
            state.cut += 1;
        });
    }

    /// From now on everything is refused, and watches are over.
    pub(crate) fn go_down(&self) {
        self.state().down = true;
        self.cut_watches();
    }

    /// Answers again.
    pub(crate) fn come_back(&self) {
        self.state().down = false;
    }

    /// Creates an object as a user does; its UID.
    pub(crate) fn create(&self, kind: &str, object: Value) -> String {
        self.change(|state| state.create(kind, object))
    }

    /// Changes a Pod as somebody else does.
    pub(crate) fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        self.change(|state| {
            let mut pod = state.get("pods", "default", name).expect("the Pod is there");
            edit(&mut pod);
            state.put("pods", pod, "MODIFIED");
        });
    }

    /// Deletes a Pod as kubectl does.
    pub(crate) fn delete(&self, name: &str, grace_seconds: i64) {
        let options = json!({ "gracePeriodSeconds": grace_seconds });
        assert!(self.change(|state| state.delete("default", name, &options)).is_ok(), "there is no Pod {name}");
    }

    /// Removes a Pod object without a word of warning, as the garbage collector of a dead node does.
    pub(crate) fn remove(&self, name: &str) {
        self.change(|state| state.remove("pods", "default", name)).expect("the Pod is there");
    }

    /// The Pod, as the API server has it.
    pub(crate) fn pod(&self, name: &str) -> Option<Value> {
        self.state().get("pods", "default", name)
    }

    /// Its phase; empty if there is none.
    pub(crate) fn phase(&self, name: &str) -> String {
        let pod = self.pod(name).unwrap_or_default();
        pod["status"]["phase"].as_str().unwrap_or_default().to_owned()
    }

    /// The status of its container at that place.
    pub(crate) fn container(&self, name: &str, place: usize) -> Value {
        self.pod(name).unwrap_or_default()["status"]["containerStatuses"][place].clone()
    }

    /// Status of a condition.
    pub(crate) fn condition(&self, name: &str, type_: &str) -> String {
        let pod = self.pod(name).unwrap_or_default();
        let all = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = all.iter().find(|condition| condition["type"] == type_);
        found.and_then(|condition| condition["status"].as_str()).unwrap_or_default().to_owned()
    }
}
