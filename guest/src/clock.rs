//! The guest's clock.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Nanoseconds since 1970 UTC.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds since the kernel started.
pub(crate) fn uptime_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| u64::try_from(Duration::from(time).as_nanos()).unwrap_or(0))
}

/// Sets the clock.
///
/// # Errors
/// A time that the kernel refuses.
pub(crate) fn set(time_ns: u64) -> io::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(io::Error::from)
}
