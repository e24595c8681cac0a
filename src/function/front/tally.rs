//! One call in the counters, exactly once.

use std::sync::Arc;

use super::meters::{Ended, FunctionMeters};

/// Counts its call as left by the client if nothing else was said of it.
pub(super) struct Tally(Option<Arc<FunctionMeters>>);

impl Tally {
    pub(super) fn new(meters: Arc<FunctionMeters>) -> Self {
        Self(Some(meters))
    }

    /// Only the first word counts.
    pub(super) fn ended(&mut self, how: Ended) {
        if let Some(meters) = self.0.take() {
            meters.ended(how);
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.ended(Ended::ClientGone);
    }
}
