//! Moments and periods of a worker.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// The moment on the timers' clock; one that has passed is now.
pub(super) fn at(moment: Timestamp) -> Instant {
    Instant::now() + Duration::try_from(moment.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO)
}

/// Without its fraction of a second.
pub(super) fn whole_second(moment: Timestamp) -> Timestamp {
    Timestamp::from_second(moment.as_second()).unwrap_or(moment)
}

/// The period and up to half as much again, so that many Pods do not act at once.
pub(super) fn spread(period: Duration) -> Duration {
    period + period.mul_f64(rand::random_range(0.0..0.5))
}
