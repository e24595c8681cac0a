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

/// Whether it is a resource that somebody else has added to the Node (Kubernetes documentation, "Extended Resources").
fn is_extended(resource: &str) -> bool {
    resource.contains('/') && !resource.contains("kubernetes.io/")
}

/// What there is not enough of for these requests beside what is taken. Extended resources that the node knows nothing of
/// are the scheduler's alone to count, as with a kubelet.
pub(super) fn lacks(
    requests: &ResourceList,
    taken: &BTreeMap<String, ResourceList>,
    allocatable: &ResourceList,
) -> Vec<Lack> {
    let place = |name: &str| ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
    let counts = |name: &str| allocatable.contains_key(name) || !is_extended(name);
    let mut names: Vec<_> =
        requests.iter().filter(|(name, wanted)| **wanted > Quantity::default() && counts(name)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(&str, &str)]) -> ResourceList {
        entries.iter().map(|(name, amount)| ((*name).to_owned(), amount.parse().unwrap())).collect()
    }

    #[test]
    fn what_only_the_scheduler_knows_of_is_not_counted() {
        let allocatable = list(&[("cpu", "2"), ("example.com/known", "1")]);
        let refused = |name: &str, amount: &str| {
            let refused = check(&list(&[(name, amount)]), &BTreeMap::new(), &allocatable).err();
            refused.map(|trouble| trouble.reason)
        };
        assert_eq!(refused("scheduling.k8s.io/foo", "5"), None);
        assert_eq!(refused("example.com/known", "1"), None);
        assert_eq!(refused("example.com/known", "2").as_deref(), Some("OutOfexample.com/known"));
        assert_eq!(refused("hugepages-2Mi", "2Mi").as_deref(), Some("OutOfhugepages-2Mi"));
        assert_eq!(refused("cpu", "3").as_deref(), Some("OutOfcpu"));
    }
}
