//! The variables that tell a container of the Services of its namespace. Pure.
//!
//! "Accessing the Service" in the Kubernetes documentation: `{NAME}_SERVICE_HOST`, `{NAME}_SERVICE_PORT`, and the older
//! `{NAME}_PORT_…` form of Docker links.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Service, ServicePort};

/// Where the API server's own Service is; every container gets its variables.
pub const MASTER_NAMESPACE: &str = "default";
/// That Service's name.
pub const MASTER_SERVICE: &str = "kubernetes";

/// The variables for a Pod of `namespace`: all Services of it if `links`, and always the API server's.
pub fn variables<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let Some(name) = service.metadata.name.as_deref().filter(|_| cluster_ip(service).is_some()) else { continue };
        let home = service.metadata.namespace.as_deref().unwrap_or_default();
        if links && home == namespace {
            chosen.insert(name, service);
        } else if home == MASTER_NAMESPACE && name == MASTER_SERVICE {
            chosen.entry(name).or_insert(service);
        }
    }
    let mut variables = BTreeMap::new();
    for (name, service) in chosen {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
        if let (Some(ip), Some(first)) = (cluster_ip(service), ports.first()) {
            let name = variable_name(name);
            variables.insert(format!("{name}_SERVICE_HOST"), ip.to_owned());
            variables.insert(format!("{name}_SERVICE_PORT"), first.port.to_string());
            for port in ports.iter().filter(|port| port.name.as_deref().is_some_and(|name| !name.is_empty())) {
                let port_name = variable_name(port.name.as_deref().unwrap_or_default());
                variables.insert(format!("{name}_SERVICE_PORT_{port_name}"), port.port.to_string());
            }
            link(&mut variables, &name, ip, ports);
        }
    }
    variables
}

fn link(variables: &mut BTreeMap<String, String>, name: &str, ip: &str, ports: &[ServicePort]) {
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    for (position, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        let prefix = format!("{name}_PORT_{}_{}", port.port, protocol.to_uppercase());
        if position == 0 {
            variables.insert(format!("{name}_PORT"), url.clone());
        }
        variables.insert(format!("{prefix}_PROTO"), protocol.to_lowercase());
        variables.insert(format!("{prefix}_PORT"), port.port.to_string());
        variables.insert(format!("{prefix}_ADDR"), ip.to_owned());
        variables.insert(prefix, url);
    }
}

/// `None` for a headless Service.
fn cluster_ip(service: &Service) -> Option<&str> {
    let ip = service.spec.as_ref()?.cluster_ip.as_deref()?;
    (!ip.is_empty() && ip != "None").then_some(ip)
}

fn variable_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(namespace: &str, name: &str, ip: &str, ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name},
            "spec": {"clusterIP": ip, "ports": ports}}))
        .unwrap()
    }

    #[test]
    fn a_service_gives_every_documented_variable() {
        let redis = service("shop", "redis-primary", "10.0.0.11", json!([{"port": 6379, "protocol": "TCP"}]));
        let variables = variables([&redis], "shop", true);
        let text: Vec<String> = variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            text,
            [
                "REDIS_PRIMARY_PORT=tcp://10.0.0.11:6379",
                "REDIS_PRIMARY_PORT_6379_TCP=tcp://10.0.0.11:6379",
                "REDIS_PRIMARY_PORT_6379_TCP_ADDR=10.0.0.11",
                "REDIS_PRIMARY_PORT_6379_TCP_PORT=6379",
                "REDIS_PRIMARY_PORT_6379_TCP_PROTO=tcp",
                "REDIS_PRIMARY_SERVICE_HOST=10.0.0.11",
                "REDIS_PRIMARY_SERVICE_PORT=6379",
            ]
        );
    }

    #[test]
    fn named_ports_and_ipv6() {
        let ports = json!([{"port": 53, "protocol": "UDP", "name": "dns-udp"}, {"port": 53, "name": "dns"}]);
        let variables = variables([&service("a", "dns", "fd00::a", ports)], "a", true);
        assert_eq!(variables["DNS_SERVICE_PORT_DNS_UDP"], "53");
        assert_eq!(variables["DNS_PORT"], "udp://[fd00::a]:53");
        assert_eq!(variables["DNS_PORT_53_TCP_ADDR"], "fd00::a");
    }

    #[test]
    fn other_namespaces_headless_services_and_switched_off_links_are_left_out() {
        let port = || json!([{"port": 1}]);
        let all = [
            service("default", "kubernetes", "10.0.0.1", port()),
            service("shop", "web", "10.0.0.2", port()),
            service("shop", "headless", "None", port()),
            service("shop", "external", "", port()),
            service("other", "db", "10.0.0.3", port()),
        ];
        let hosts = |namespace, links| {
            let names = variables(&all, namespace, links).into_keys();
            names.filter(|name| name.ends_with("_SERVICE_HOST")).collect::<Vec<_>>()
        };
        assert_eq!(hosts("shop", true), ["KUBERNETES_SERVICE_HOST", "WEB_SERVICE_HOST"]);
        assert_eq!(hosts("shop", false), ["KUBERNETES_SERVICE_HOST"]);
        let own = [service("shop", "kubernetes", "10.9.9.9", port()), all[0].clone()];
        assert_eq!(variables(&own, "shop", true)["KUBERNETES_SERVICE_HOST"], "10.9.9.9");
        assert_eq!(variables(&own, "shop", false)["KUBERNETES_SERVICE_HOST"], "10.0.0.1");
    }
}
