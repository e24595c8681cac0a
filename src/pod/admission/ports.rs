//! Ports of the host: two Pods that want the same one cannot both have it. The rule is the scheduler's `NodePorts`.

use std::net::IpAddr;
use std::sync::PoisonError;

use k8s_openapi::api::core::v1::PodSpec;

use super::{Admission, predicate};
use crate::network::ports::HostPort;
use crate::pod::addresses::asked_ports;
use crate::pod::status::Trouble;

impl Admission {
    /// No Pod that is in has a port of the host that this one asks for.
    pub(super) fn check_ports(&self, spec: &PodSpec) -> Result<(), Trouble> {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |wanted: &HostPort| ports.values().flatten().any(|port| conflict(wanted, port));
        if asked_ports(spec).iter().any(taken) {
            return Err(predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
        }
        Ok(())
    }

    /// The Pod has the ports that it asks for.
    pub(super) fn take_ports(&self, uid: &str, spec: &PodSpec) {
        let asked = asked_ports(spec);
        if !asked.is_empty() {
            self.ports.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.to_owned(), asked);
        }
    }

    /// The Pod's ports are free.
    pub(super) fn free_ports(&self, uid: &str) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// Whether one process cannot listen where the other does: every address includes each.
fn conflict(one: &HostPort, other: &HostPort) -> bool {
    let every = |ip: &Option<IpAddr>| ip.is_none_or(|ip| ip == IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
    let addresses = every(&one.host_ip) || every(&other.host_ip) || one.host_ip == other.host_ip;
    one.protocol == other.protocol && one.host_port == other.host_port && addresses
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    use super::super::NodeView;
    use super::*;
    use crate::quantity::Quantity;

    fn pod(uid: &str, spec: Value) -> Pod {
        serde_json::from_value(json!({ "metadata": { "uid": uid }, "spec": spec })).unwrap()
    }

    fn asking(uid: &str, port: Value) -> Pod {
        pod(uid, json!({ "containers": [{ "name": "c", "ports": [port] }] }))
    }

    fn node() -> NodeView {
        let allocatable = [("pods".to_owned(), Quantity::from_units(10))].into();
        NodeView { allocatable, ..NodeView::default() }
    }

    #[test]
    fn a_port_of_the_host_is_had_by_one_pod_at_a_time() {
        let admission = Admission::default();
        let refused = |port: Value| {
            let verdict = admission.admit(&asking("other", port), &node());
            admission.leave("other");
            verdict.err().map(|trouble| (trouble.reason, trouble.message))
        };
        let port = |number: i32| json!({ "containerPort": 80, "hostPort": number });
        admission.admit(&asking("first", port(8080)), &node()).unwrap();
        let text = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        assert_eq!(refused(port(8080)), Some(("NodePorts".to_owned(), text.to_owned())));
        assert_eq!(refused(port(8081)), None);
        assert_eq!(refused(json!({ "containerPort": 8080 })), None);
        assert_eq!(refused(json!({ "containerPort": 80, "hostPort": 8080, "protocol": "UDP" })), None);
        assert!(refused(json!({ "containerPort": 80, "hostPort": 8080, "hostIP": "127.0.0.1" })).is_some());
        let on_host =
            pod("other", json!({ "hostNetwork": true, "containers": [{ "name": "c", "ports": [port(8080)] }] }));
        assert_eq!(admission.admit(&on_host, &node()).unwrap_err().reason, "NodePorts");
        admission.vacate("first");
        assert_eq!(refused(port(8080)), None);
    }

    #[test]
    fn addresses_keep_ports_apart() {
        let admission = Admission::default();
        let at = |ip: &str| json!({ "containerPort": 80, "hostPort": 8080, "hostIP": ip });
        admission.admit(&asking("first", at("10.0.0.1")), &node()).unwrap();
        admission.admit(&asking("second", at("10.0.0.2")), &node()).unwrap();
        assert!(admission.admit(&asking("third", at("10.0.0.1")), &node()).is_err());
        assert!(admission.admit(&asking("third", at("0.0.0.0")), &node()).is_err());
        admission.leave("first");
        admission.admit(&asking("third", at("10.0.0.1")), &node()).unwrap();
    }
}
