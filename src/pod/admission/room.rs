//! Whether there is enough of everything for one more Pod, as the scheduler and a kubelet count it. Pure.

use std::collections::BTreeMap;

use crate::pod::qos::ResourceList;
use crate::pod::status::Trouble;
use crate::quantity::Quantity;

/// What is looked at first, in this order; the rest follows by name.
const ORDER: [&str; 4] = ["pods", "cpu", "memory", "ephemeral-storage"];

/// What there is not enough of. Cpu is counted in thousandths, everything else in whole units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) resource: String,
    requested: i64,
    used: i64,
    capacity: i64,
}

impl Lack {
    /// How much is missing.
    pub(super) fn amount(&self) -> i64 {
        self.requested.saturating_sub(self.capacity.saturating_sub(self.used))
    }

    /// Why the Pod is refused.
    pub(super) fn trouble(&self) -> Trouble {
        let Self { resource, requested, used, capacity } = self;
        let message = format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        );
        Trouble::new(format!("OutOf{resource}"), message)
    }
}

/// An amount as a kubelet counts it here.
pub(super) fn number(resource: &str, amount: Quantity) -> i64 {
    if resource == "cpu" { amount.milli_value() } else { amount.value() }
}

/// What there is not enough of for these requests beside what is taken.
pub(super) fn lacks(
    requests: &ResourceList,
    taken: &BTreeMap<String, ResourceList>,
    allocatable: &ResourceList,
) -> Vec<Lack> {
    let place = |name: &str| ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
    let mut names: Vec<_> = requests.iter().filter(|(_, wanted)| **wanted > Quantity::default()).collect();
    names.sort_by_key(|(name, _)| place(name));
    let lack = |(name, wanted): (&String, &Quantity)| {
        let used = taken.values().filter_map(|list| list.get(name)).fold(Quantity::default(), |sum, q| sum + *q);
        let capacity = allocatable.get(name).copied().unwrap_or_default();
        (used + *wanted > capacity).then(|| Lack {
            resource: name.clone(),
            requested: number(name, *wanted),
            used: number(name, used),
            capacity: number(name, capacity),
        })
    };
    names.into_iter().filter_map(lack).collect()
}

/// Whether there is room.
///
/// # Errors
/// The first thing that there is not enough of.
pub(super) fn check(
    requests: &ResourceList,
    taken: &BTreeMap<String, ResourceList>,
    allocatable: &ResourceList,
) -> Result<(), Trouble> {
    lacks(requests, taken, allocatable).first().map_or(Ok(()), |lack| Err(lack.trouble()))
}
