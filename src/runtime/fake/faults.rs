//! Faults a test asks for: the next call of a verb fails, hangs or panics.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;

use tokio::sync::oneshot;

use super::locked;
use crate::runtime::verb::Verb;
use crate::runtime::{Result, RuntimeError};

/// Keeps a call hanging; dropping it lets the call go on.
#[derive(Debug)]
pub struct Hold {
    // Never sent: its being dropped is the signal.
    _release: oneshot::Sender<()>,
}

#[derive(Debug)]
enum Fault {
    Fail(RuntimeError),
    Panic,
    Hang(oneshot::Receiver<()>),
}

/// The faults asked for, and how often each verb was called.
#[derive(Debug, Default)]
pub(super) struct Faults {
    waiting: Mutex<HashMap<Verb, VecDeque<Fault>>>,
    late: Mutex<HashMap<Verb, oneshot::Receiver<()>>>,
    cut: Mutex<HashSet<Verb>>,
    calls: Mutex<HashMap<Verb, u64>>,
}

impl Faults {
    pub(super) fn fail(&self, verb: Verb, error: RuntimeError) {
        locked(&self.waiting).entry(verb).or_default().push_back(Fault::Fail(error));
    }

    pub(super) fn panic(&self, verb: Verb) {
        locked(&self.waiting).entry(verb).or_default().push_back(Fault::Panic);
    }

    pub(super) fn hang(&self, verb: Verb) -> Hold {
        let (release, released) = oneshot::channel();
        locked(&self.waiting).entry(verb).or_default().push_back(Fault::Hang(released));
        Hold { _release: release }
    }

    pub(super) fn late(&self, verb: Verb) -> Hold {
        let (release, released) = oneshot::channel();
        locked(&self.late).insert(verb, released);
        Hold { _release: release }
    }

    pub(super) fn cut(&self, verb: Verb) {
        locked(&self.cut).insert(verb);
    }

    pub(super) fn is_cut(&self, verb: Verb) -> bool {
        locked(&self.cut).remove(&verb)
    }

    pub(super) fn calls(&self, verb: Verb) -> u64 {
        locked(&self.calls).get(&verb).copied().unwrap_or(0)
    }

    /// Before a verb answers.
    pub(super) async fn leave(&self, verb: Verb) {
        let late = locked(&self.late).remove(&verb);
        if let Some(released) = late {
            let _ = released.await;
        }
    }

    /// At the beginning of each verb.
    pub(super) async fn enter(&self, verb: Verb) -> Result<()> {
        *locked(&self.calls).entry(verb).or_default() += 1;
        let fault = locked(&self.waiting).get_mut(&verb).and_then(VecDeque::pop_front);
        match fault {
            None => Ok(()),
            Some(Fault::Fail(error)) => Err(error),
            Some(Fault::Panic) => panic!("{} panics, as a test asked for", verb.name()),
            Some(Fault::Hang(released)) => {
                let _ = released.await;
                Ok(())
            }
        }
    }
}
