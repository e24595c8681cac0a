//! What a Pod asks for that this node does not do yet: said aloud, never passed over.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::addresses::host_ports;
use super::plan::restart_policy;
use super::status::Trouble;
use crate::function::labels;

/// Reason of the events and of the refusal.
pub const REASON: &str = "UnsupportedPodFeature";

/// Why the Pod cannot be run at all here, by whichever driver, if so: to run it without the feature would make it another
/// Pod.
pub fn refusal(pod: &Pod, spec: &PodSpec) -> Option<Trouble> {
    let text = if spec.host_users == Some(false) {
        "it asks for a user namespace of its own (hostUsers: false), and Docker can give one to all of its containers or \
         to none; hostUsers: false"
            .to_owned()
    } else if spec.host_network == Some(true) && labels::is_function(pod) {
        "it is a function, which answers at an address of its own; hostNetwork: true".to_owned()
    } else {
        return None;
    };
    Some(Trouble::new(REASON, format!("{text} is not supported by this node")))
}

/// Why an ephemeral container of a function Pod is not started.
pub fn ephemeral(name: &str) -> Trouble {
    let text = format!(
        "ephemeral container {name:?} is not started: this node does not debug function Pods yet; kubectl exec enters one \
         of its environments"
    );
    Trouble::new(REASON, text)
}

/// What is left out although the Pod runs, a sentence each.
pub fn omissions(pod: &Pod, spec: &PodSpec) -> Vec<String> {
    let mut list = Vec::new();
    let policy = restart_policy(spec);
    if policy != "Always" && labels::is_function(pod) {
        list.push(format!(
            "restartPolicy {policy} is treated as Always: a function ends with its Pod, not with a process"
        ));
    }
    for port in host_ports(spec).iter().filter(|_| labels::is_function(pod)) {
        let port = port.host_port;
        list.push(format!("hostPort {port} is not opened on the node: a function answers at the Pod's address only"));
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        list.push("resourceClaims are ignored: this node does not allocate devices yet".to_owned());
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(spec: serde_json::Value, annotations: serde_json::Value) -> Option<String> {
        let pod = serde_json::json!({ "metadata": { "annotations": annotations }, "spec": spec });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        refusal(&pod, pod.spec.as_ref().unwrap()).map(|trouble| trouble.message)
    }

    #[test]
    fn what_would_make_it_another_pod_is_refused_by_name() {
        let plain = serde_json::json!({ "containers": [] });
        assert_eq!(refused(plain, serde_json::json!({})), None);
        let user = refused(serde_json::json!({ "containers": [], "hostUsers": false }), serde_json::json!({})).unwrap();
        assert!(user.contains("hostUsers: false"), "{user}");
        let on_host = serde_json::json!({ "containers": [], "hostNetwork": true });
        assert_eq!(refused(on_host.clone(), serde_json::json!({})), None);
        let function = refused(on_host, serde_json::json!({ labels::MIN: "0" })).unwrap();
        assert!(function.contains("hostNetwork: true is not supported"), "{function}");
    }

    #[test]
    fn what_is_left_out_is_named() {
        let container = serde_json::json!({
            "name": "c", "ports": [{ "containerPort": 1, "hostPort": 80 }],
        });
        let spec = serde_json::json!({ "containers": [container], "restartPolicy": "OnFailure" });
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        let mut pod = Pod::default();
        let list = omissions(&pod, &spec).join("\n");
        assert!(list.is_empty(), "{list}");
        pod.metadata.labels = Some([(labels::MAX.to_owned(), "3".to_owned())].into());
        let list = omissions(&pod, &spec).join("\n");
        for part in ["restartPolicy OnFailure is treated as Always", "hostPort 80 is not opened"] {
            assert!(list.contains(part), "{part} is missing in {list}");
        }
    }
}
