//! Pure: how large a guest is. Sizes come in steps, so that few templates serve all Pods.

use crate::runtime::microvm::machine::TemplateKind;
use crate::runtime::types::Resources;

/// What the guest's own kernel and agent need besides its Pod, in bytes.
const OVERHEAD: u64 = 128 << 20;
/// The smallest guest, and the largest.
const SMALLEST: u64 = 128 << 20;
const LARGEST: u64 = 1 << 40;
const MOST_CPUS: u32 = 32;

/// Memory and CPUs of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Size {
    /// Bytes, whole MiB.
    pub(super) memory: u64,
    /// At least 1.
    pub(super) vcpus: u32,
}

impl Size {
    /// For a Pod with these limits; one without a limit of memory gets `default` bytes, without one of CPU time one CPU.
    /// The limits themselves hold in the guest.
    pub(super) fn of(resources: &Resources, default: u64) -> Self {
        let positive =
            |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0);
        let memory = positive(resources.memory_limit).map_or(default, |limit| limit.saturating_add(OVERHEAD));
        let cpus = match (positive(resources.cpu_quota), positive(resources.cpu_period)) {
            (Some(quota), Some(period)) => u32::try_from(quota.div_ceil(period)).unwrap_or(MOST_CPUS),
            _ => 1,
        };
        Self { memory: step(memory), vcpus: cpus.clamp(1, MOST_CPUS).next_power_of_two() }
    }

    /// Whether guests of this kind have it.
    pub(super) fn is_of(self, kind: &TemplateKind) -> bool {
        (self.memory, self.vcpus) == (kind.memory, kind.vcpus)
    }
}

/// The next power of two, or the one before it and a half.
fn step(bytes: u64) -> u64 {
    let power = bytes.clamp(SMALLEST, LARGEST).next_power_of_two();
    if power > SMALLEST && bytes <= power / 4 * 3 { power / 4 * 3 } else { power }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(memory: Option<i64>, quota: Option<i64>) -> (u64, u32) {
        let limits =
            Resources { memory_limit: memory, cpu_quota: quota, cpu_period: Some(100_000), ..Resources::default() };
        let size = Size::of(&limits, 512 << 20);
        (size.memory >> 20, size.vcpus)
    }

    #[test]
    fn limits_are_rounded_up_to_a_step() {
        assert_eq!(size(None, None), (512, 1));
        assert_eq!(size(Some(0), Some(-1)), (512, 1));
        assert_eq!(size(Some(256 << 20), Some(50_000)), (384, 1));
        assert_eq!(size(Some(1), Some(100_001)), (192, 2));
        assert_eq!(size(Some(300 << 20), Some(250_000)), (512, 4));
        assert_eq!(size(Some(i64::MAX), Some(i64::MAX)), (1 << 20, 32));
    }

    proptest! {
        #[test]
        fn a_guest_has_what_its_pod_may_use_and_not_twice_that(limit in 1_i64..1 << 39, quota in 1_i64..3_200_000) {
            let limits =
                Resources { memory_limit: Some(limit), cpu_quota: Some(quota), cpu_period: Some(100_000), ..Resources::default() };
            let size = Size::of(&limits, 0);
            let needed = u64::try_from(limit).unwrap() + OVERHEAD;
            prop_assert!(size.memory >= needed && size.memory < 2 * needed && size.memory.is_multiple_of(1 << 20));
            prop_assert!(i64::from(size.vcpus) * 100_000 >= quota);
        }
    }
}
