//! Which events tell of a change of the Node's conditions. Pure.

use k8s_openapi::api::core::v1::NodeCondition;

/// The reasons of the events, a kubelet's: one for each condition that is not what it was.
pub(super) fn news(before: &[NodeCondition], now: &[NodeCondition]) -> Vec<&'static str> {
    let same = |one: &&NodeCondition| before.iter().any(|two| two.type_ == one.type_ && two.status == one.status);
    now.iter().filter(|condition| !same(condition)).filter_map(reason).collect()
}

fn reason(condition: &NodeCondition) -> Option<&'static str> {
    let reasons = match condition.type_.as_str() {
        "MemoryPressure" => ["NodeHasInsufficientMemory", "NodeHasSufficientMemory"],
        "DiskPressure" => ["NodeHasDiskPressure", "NodeHasNoDiskPressure"],
        "PIDPressure" => ["NodeHasInsufficientPID", "NodeHasSufficientPID"],
        "Ready" => ["NodeReady", "NodeNotReady"],
        _ => return None,
    };
    match condition.status.as_str() {
        "True" => Some(reasons[0]),
        "False" => Some(reasons[1]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(list: &[(&str, &str)]) -> Vec<NodeCondition> {
        let condition = |(type_, status): &(&str, &str)| NodeCondition {
            type_: (*type_).to_owned(),
            status: (*status).to_owned(),
            ..NodeCondition::default()
        };
        list.iter().map(condition).collect()
    }

    #[test]
    fn what_is_new_or_has_changed_is_told_and_nothing_else() {
        let well = conditions(&[
            ("MemoryPressure", "False"),
            ("DiskPressure", "False"),
            ("PIDPressure", "False"),
            ("Ready", "True"),
        ]);
        let first = ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID", "NodeReady"];
        assert_eq!(news(&[], &well), first);
        assert!(news(&well, &well).is_empty());
        let ill = conditions(&[
            ("MemoryPressure", "True"),
            ("DiskPressure", "False"),
            ("PIDPressure", "False"),
            ("Ready", "False"),
        ]);
        assert_eq!(news(&well, &ill), ["NodeHasInsufficientMemory", "NodeNotReady"]);
        let silent = conditions(&[("Ready", "Unknown")]);
        assert!(news(&silent, &well).contains(&"NodeReady"), "it was taken for dead");
    }
}
