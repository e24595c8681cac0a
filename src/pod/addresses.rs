//! The addresses of Pods, and the ports of the host that lead there: none is given away that a sandbox of an earlier process still has.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerPort, PodSpec};
use tokio::sync::OnceCell;

use super::qos::is_sidecar;
use crate::network::NetworkError;
use crate::network::bridge::Bridge;
use crate::network::ipam::Ipam;
use crate::network::ports::{HostPort, Protocol};
use crate::runtime::{RuntimeError, SandboxRuntime};
use crate::telemetry::chain;

/// Why a Pod gets no address.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// It is not known which addresses are in use.
    #[error("failed to list the sandboxes that have addresses")]
    Runtime(#[from] RuntimeError),
    /// There is none, or its record cannot be written.
    #[error("failed to give the Pod an address")]
    Network(#[from] NetworkError),
}

/// Who has which address.
pub struct Addresses {
    /// One of each family, the first one first; none where CNI plugins give the addresses, and take them back with the
    /// sandbox.
    ipams: Vec<Arc<Ipam>>,
    bridge: Option<Bridge>,
    adopted: OnceCell<()>,
}

impl Addresses {
    /// The addresses of `ipam`, one for each Pod.
    pub fn new(ipam: Arc<Ipam>) -> Self {
        Self::of_each(vec![ipam])
    }

    /// One of each of these for each Pod, in this order; they are of different families.
    pub fn of_each(ipams: Vec<Arc<Ipam>>) -> Self {
        Self { ipams, bridge: None, adopted: OnceCell::new() }
    }

    /// Those that CNI plugins give: nothing is remembered here, and ports of the host are theirs too.
    pub fn by_plugins() -> Self {
        Self::of_each(Vec::new())
    }

    /// Whether CNI plugins give the addresses.
    pub fn are_by_plugins(&self) -> bool {
        self.ipams.is_empty()
    }

    /// The same on a network on which ports of the host can lead to Pods. Without one they lead nowhere.
    pub fn on(self, bridge: Option<Bridge>) -> Self {
        Self { bridge, ..self }
    }

    /// Makes the `hostPort`s of the Pod lead to it; nothing to do for a Pod without any.
    ///
    /// # Errors
    /// The packet filter refuses.
    pub async fn open_ports(&self, pod_uid: &str, addresses: &[IpAddr], spec: &PodSpec) -> Result<(), NetworkError> {
        let ports = host_ports(spec);
        match &self.bridge {
            Some(bridge) if !ports.is_empty() => bridge.open_ports(pod_uid, addresses, ports).await,
            _ => Ok(()),
        }
    }

    /// No port of the host leads to the Pod any more.
    ///
    /// # Errors
    /// The packet filter refuses.
    pub async fn close_ports(&self, pod_uid: &str) -> Result<(), NetworkError> {
        match &self.bridge {
            Some(bridge) => bridge.close_ports(pod_uid).await,
            None => Ok(()),
        }
    }

    /// The Pod's addresses, one of each family that the node has; the same for every sandbox it ever has. Before the
    /// first one is given, those of the sandboxes that are there are noted: their records may be lost or unreadable, and
    /// none may be given twice.
    ///
    /// # Errors
    /// The runtime does not answer, no address is free, or a record could not be written.
    pub async fn allot(&self, runtime: &dyn SandboxRuntime, pod_uid: &str) -> Result<Vec<IpAddr>, AddressError> {
        self.adopted.get_or_try_init(|| self.adopt(runtime)).await?;
        Ok(self.ipams.iter().map(|ipam| ipam.allocate(pod_uid)).collect::<Result<_, _>>()?)
    }

    async fn adopt(&self, runtime: &dyn SandboxRuntime) -> Result<(), AddressError> {
        for sandbox in runtime.list_pod_sandboxes(None).await? {
            for address in sandbox.addresses {
                let same = |ipam: &&Arc<Ipam>| ipam.gateway().is_ipv4() == address.is_ipv4();
                match self.ipams.iter().find(same).map_or(Ok(()), |ipam| ipam.adopt(&sandbox.pod.uid, address)) {
                    Err(error @ NetworkError::Refused { .. }) => {
                        tracing::warn!(pod = %sandbox.pod, error = chain(&error), "a sandbox has an address that is not its own");
                    }
                    adopted => adopted?,
                }
            }
        }
        Ok(())
    }

    /// Starts the cool-down of the Pod's address: the Pod object is gone.
    ///
    /// # Errors
    /// The record could not be written; the Pod then still holds the address.
    pub fn release(&self, pod_uid: &str) -> Result<(), NetworkError> {
        self.ipams.iter().try_for_each(|ipam| ipam.release(pod_uid))
    }

    /// The address can be given away at once: nobody outside this node was ever told of it.
    ///
    /// # Errors
    /// The record could not be removed.
    pub fn discard(&self, key: &str) -> Result<(), NetworkError> {
        self.ipams.iter().try_for_each(|ipam| ipam.discard(key))
    }

    /// The addresses that Pods hold, with the Pod's UID.
    pub fn held(&self) -> Vec<(IpAddr, String)> {
        self.ipams.iter().flat_map(|ipam| ipam.held()).collect()
    }
}

/// The ports of the host that are to lead to a Pod with an address of its own, of sidecars too. On the host's network
/// they are the container's own.
pub fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    if spec.host_network == Some(true) { Vec::new() } else { asked_ports(spec) }
}

/// The ports of the host that a Pod asks for, of sidecars too.
pub fn asked_ports(spec: &PodSpec) -> Vec<HostPort> {
    let number = |port: Option<i32>| port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    let sidecars = spec.init_containers.iter().flatten().filter(|container| is_sidecar(container));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let wanted = |port: &ContainerPort| {
        let protocol = match port.protocol.as_deref() {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        };
        let host_ip = port.host_ip.as_deref().and_then(|ip| ip.parse().ok());
        Some(HostPort {
            protocol,
            host_ip,
            host_port: number(port.host_port)?,
            pod_port: number(Some(port.container_port))?,
        })
    };
    ports.filter_map(wanted).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ports(spec: serde_json::Value) -> Vec<(Protocol, u16, u16)> {
        let spec = serde_json::from_value(spec).unwrap();
        host_ports(&spec).iter().map(|port| (port.protocol, port.host_port, port.pod_port)).collect()
    }

    #[test]
    fn only_what_lasts_and_has_an_address_of_its_own_opens_ports() {
        let container = |port: i32| json!({"name": "c", "ports": [{"containerPort": 80, "hostPort": port, "protocol": "UDP"}, {"containerPort": 1}]});
        let mut sidecar = container(3);
        sidecar["restartPolicy"] = json!("Always");
        let spec = json!({"containers": [container(1)], "initContainers": [container(2), sidecar]});
        assert_eq!(ports(spec.clone()), [(Protocol::Udp, 1, 80), (Protocol::Udp, 3, 80)]);
        let mut on_host = spec;
        on_host["hostNetwork"] = json!(true);
        assert!(ports(on_host).is_empty());
    }
}
