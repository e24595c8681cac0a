//! What a file says of swap: that a node with swap may run at all, and that Pods get none of it.

use serde::{Deserialize, Serialize};

use super::{ConfigError, KubeletConfiguration, Overlay};
use crate::config::values::ValueError;

/// `memorySwap`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct MemorySwap {
    swap_behavior: Option<String>,
}

impl Overlay {
    /// Docker is told for each container with a memory limit that there is no swap beside it, which is `NoSwap`; a share
    /// of the host's swap, as `LimitedSwap` gives, is refused and not passed over.
    pub(super) fn swap(&mut self, fields: &KubeletConfiguration) -> Result<(), ConfigError> {
        if fields.fail_swap_on == Some(true) {
            // A kubelet would not start then. This node does, and Pods get no swap all the same.
            self.ignored.push("failSwapOn".to_owned());
        }
        let behavior = fields.memory_swap.as_ref().and_then(|swap| swap.swap_behavior.as_deref()).unwrap_or_default();
        let known = match behavior {
            "" | "NoSwap" => Ok(()),
            "LimitedSwap" => {
                Err(ValueError::new("LimitedSwap is not supported by this node: Pods get no swap (NoSwap)"))
            }
            other => Err(ValueError::new(format!("{other:?} is not NoSwap, which is what this node has"))),
        };
        self.check("memorySwap.swapBehavior", known)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{applied, refused_field};

    #[test]
    fn pods_get_no_swap_and_a_file_that_wants_some_for_them_is_refused() {
        assert_eq!(applied("failSwapOn: false\nmemorySwap: {swapBehavior: NoSwap}\n").1, Vec::<String>::new());
        assert!(applied("failSwapOn: true\n").1[0].ends_with("fields failSwapOn"));
        for (behavior, part) in [("LimitedSwap", "not supported"), ("UnlimitedSwap", "is not NoSwap")] {
            let error = refused_field(&format!("memorySwap: {{swapBehavior: {behavior}}}\n"));
            assert!(error.contains("memorySwap.swapBehavior") && error.contains(part), "{error}");
        }
    }
}
