//! A node that is short of something takes no Pod that would make it worse.

use std::sync::PoisonError;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::Admission;
use crate::node::object::Pressure;
use crate::pod::eviction::{REASON, is_critical};
use crate::pod::qos::qos_class;
use crate::pod::status::Trouble;

/// The taint that a node under memory pressure bears.
const MEMORY_TAINT: &str = "node.kubernetes.io/memory-pressure";

impl Admission {
    /// What the node is short of from now on.
    pub fn set_pressure(&self, pressure: Pressure) {
        *self.pressure.lock().unwrap_or_else(PoisonError::into_inner) = pressure;
    }

    /// Under memory pressure only what requests memory is let in, under any other nothing; critical Pods always are.
    pub(super) fn check_pressure(&self, pod: &Pod, spec: &PodSpec) -> Result<(), Trouble> {
        let pressure = *self.pressure.lock().unwrap_or_else(PoisonError::into_inner);
        let memory_only = !pressure.disk && !pressure.pids;
        if pressure == Pressure::default() || is_critical(pod) || (memory_only && endures(spec)) {
            return Ok(());
        }
        let all =
            [("MemoryPressure", pressure.memory), ("DiskPressure", pressure.disk), ("PIDPressure", pressure.pids)];
        let names: Vec<_> = all.iter().filter(|(_, holds)| *holds).map(|(name, _)| *name).collect();
        Err(Trouble::new(REASON, format!("The node had condition: [{}]. ", names.join(" "))))
    }
}

fn endures(spec: &PodSpec) -> bool {
    let mut tolerations = spec.tolerations.iter().flatten();
    qos_class(spec) != "BestEffort"
        || tolerations.any(|toleration| {
            let all = toleration.operator.as_deref() == Some("Exists");
            let key = toleration.key.as_deref().unwrap_or_default();
            let effect = toleration.effect.as_deref().is_none_or(|effect| effect == "NoSchedule" || effect.is_empty());
            effect && ((all && key.is_empty()) || key == MEMORY_TAINT)
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn verdict(pressure: Pressure, spec: Value) -> Option<String> {
        let admission = Admission::default();
        admission.set_pressure(pressure);
        let pod: Pod = serde_json::from_value(json!({ "metadata": {}, "spec": spec })).unwrap();
        admission.check_pressure(&pod, pod.spec.as_ref().unwrap()).err().map(|trouble| trouble.message)
    }

    #[test]
    fn memory_pressure_keeps_out_what_requests_nothing() {
        let memory = Pressure { memory: true, ..Pressure::default() };
        let plain = json!({ "containers": [{ "name": "c" }] });
        assert_eq!(verdict(memory, plain.clone()).as_deref(), Some("The node had condition: [MemoryPressure]. "));
        assert_eq!(verdict(Pressure::default(), plain.clone()), None);
        let requests = json!({ "containers": [{ "name": "c", "resources": { "requests": { "memory": "1Mi" } } }] });
        assert_eq!(verdict(memory, requests.clone()), None);
        let mut tolerant = plain;
        tolerant["tolerations"] = json!([{ "key": MEMORY_TAINT, "operator": "Exists", "effect": "NoSchedule" }]);
        assert_eq!(verdict(memory, tolerant), None);
        let disk = Pressure { disk: true, memory: true, ..Pressure::default() };
        let text = "The node had condition: [MemoryPressure DiskPressure]. ";
        assert_eq!(verdict(disk, requests.clone()).as_deref(), Some(text));
        let mut critical = requests;
        critical["priority"] = json!(2_000_000_000);
        assert_eq!(verdict(disk, critical), None);
    }
}
