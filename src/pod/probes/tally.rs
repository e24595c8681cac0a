//! How often probes said what, for `/metrics/probes`.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::machine::{Kind, Outcome};
use crate::kubelet_api::targets::ProbeCount;
use crate::runtime::types::PodRef;

/// Counts by Pod UID, container and probe; those of a Pod go with it.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<String, OfPod>>);

#[derive(Debug)]
struct OfPod {
    pod: PodRef,
    counts: BTreeMap<(String, Kind), [u64; 3]>,
}

impl Tally {
    pub(super) fn note(&self, pod: &PodRef, container: &str, kind: Kind, outcome: Outcome) {
        let mut tally = self.inner();
        let of_pod =
            tally.entry(pod.uid.clone()).or_insert_with(|| OfPod { pod: pod.clone(), counts: BTreeMap::default() });
        let counts = of_pod.counts.entry((container.to_owned(), kind)).or_default();
        counts[outcome as usize] += 1;
    }

    pub(in crate::pod) fn forget(&self, uid: &str) {
        self.inner().remove(uid);
    }

    pub(in crate::pod) fn counts(&self) -> Vec<ProbeCount> {
        let names = ["successful", "failed", "unknown"];
        let tally = self.inner();
        let all = tally.values().flat_map(|of_pod| of_pod.counts.iter().map(move |entry| (&of_pod.pod, entry)));
        let each = all.flat_map(|(pod, ((container, kind), counts))| {
            let told = names.into_iter().zip(*counts).filter(|(_, count)| *count > 0);
            told.map(move |(result, count)| ProbeCount {
                pod: pod.clone(),
                container: container.clone(),
                probe: kind.name(),
                result,
                count,
            })
        });
        each.collect()
    }

    fn inner(&self) -> MutexGuard<'_, BTreeMap<String, OfPod>> {
        // Counts are never half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_by_result_and_go_with_their_pod() {
        let pod = PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        let tally = Tally::default();
        for outcome in [Outcome::Success, Outcome::Failure, Outcome::Success] {
            tally.note(&pod, "c", Kind::Liveness, outcome);
        }
        let counts: Vec<_> = tally.counts().into_iter().map(|c| (c.probe, c.result, c.count)).collect();
        assert_eq!(counts, [("Liveness", "successful", 2), ("Liveness", "failed", 1)]);
        tally.forget("u");
        assert!(tally.counts().is_empty());
    }
}
