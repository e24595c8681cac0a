//! Statuses of static Pods: the API server knows them by their mirrors, which come and go.

use std::collections::HashMap;
use std::sync::PoisonError;

use k8s_openapi::api::core::v1::{Pod, PodStatus};

use super::Publisher;
use crate::pod::status::same_as_reported;
use crate::pod::translate::pod_ref;
use crate::runtime::types::PodRef;

/// By the static Pods' UIDs.
pub(super) type Mirrors = HashMap<String, Mirror>;

/// One static Pod's mirror.
#[derive(Default)]
pub(super) struct Mirror {
    /// As the API server knows it, while it is there.
    target: Option<PodRef>,
    /// What is to be written to it.
    last: Option<PodStatus>,
}

impl Publisher {
    /// From now on statuses of the Pod of this UID go to its mirror; they wait until there is one.
    pub fn expect_mirror(&self, uid: &str) {
        self.mirrors().entry(uid.to_owned()).or_default();
    }

    /// The mirror as the API server has it now, or `None` if there is none. One that does not say what it should, since
    /// it is new or somebody else wrote it, is written again.
    pub fn mirror(&self, uid: &str, mirror: Option<&Pod>) {
        let again = {
            let mut mirrors = self.mirrors();
            let Some(known) = mirrors.get_mut(uid) else { return };
            known.target = mirror.map(pod_ref);
            let stale = |status: &&PodStatus| mirror.is_some_and(|mirror| !same_as_reported(mirror, status));
            known.target.clone().zip(known.last.as_ref().filter(stale).cloned())
        };
        if let Some((target, status)) = again {
            self.enqueue(&target, status);
        }
    }

    /// The Pod of this UID is gone.
    pub fn forget_mirror(&self, uid: &str) {
        self.mirrors().remove(uid);
    }

    /// Whose status it is on the API server; `None` while nobody's.
    pub(super) fn target(&self, pod: &PodRef, status: &PodStatus) -> Option<PodRef> {
        match self.mirrors().get_mut(&pod.uid) {
            None => Some(pod.clone()),
            Some(mirror) => {
                mirror.last = Some(status.clone());
                mirror.target.clone()
            }
        }
    }

    fn mirrors(&self) -> std::sync::MutexGuard<'_, Mirrors> {
        // Each entry is written whole.
        self.shared.mirrors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
