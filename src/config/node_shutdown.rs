//! How long Pods have when the host goes down (`shutdownGracePeriod` and its kin).

use std::collections::BTreeMap;
use std::time::Duration;

/// From this priority on a Pod is critical (`system-cluster-critical`).
const CRITICAL: i32 = 2_000_000_000;

/// What the node was told; all zero is nothing: the host goes down without it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShutdownGrace {
    /// How long all Pods have together (`shutdownGracePeriod`).
    pub all: Duration,
    /// How much of that is for critical Pods, after the others (`shutdownGracePeriodCriticalPods`).
    pub critical: Duration,
    /// By priority, in place of the two (`shutdownGracePeriodByPodPriority`): Pods of this priority and above, up to the
    /// next one, have so long; the lowest go first.
    pub by_priority: BTreeMap<i32, Duration>,
}

impl ShutdownGrace {
    /// The lowest priority of each group and how long it has, in the order in which they go; empty is off.
    pub fn groups(&self) -> Vec<(i32, Duration)> {
        if !self.by_priority.is_empty() {
            return self.by_priority.iter().map(|(priority, period)| (*priority, *period)).collect();
        }
        if self.all.is_zero() {
            return Vec::new();
        }
        vec![(0, self.all.saturating_sub(self.critical)), (CRITICAL, self.critical)]
    }

    /// How long the host has to wait at most.
    pub fn total(&self) -> Duration {
        self.groups().iter().map(|(_, period)| *period).sum()
    }
}
