//! What a network answers: the addresses of a sandbox. Pure.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

/// What of a result (section 5 of the specification) matters here; versions 0.3.0 to 1.1.0 write it alike.
#[derive(Debug, Deserialize)]
struct Shape {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    /// Empty on the host.
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct Ip {
    /// With the length of its prefix.
    address: String,
    /// Its place in `interfaces`.
    interface: Option<usize>,
}

/// The addresses inside the sandbox, at most one of each family, in the network's order.
///
/// # Errors
/// What is wrong with the result.
pub(super) fn addresses(result: &Value) -> Result<Vec<IpAddr>, String> {
    let shape = Shape::deserialize(result).map_err(|error| error.to_string())?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in &shape.ips {
        let on_host = match ip.interface {
            None => false,
            Some(at) => shape.interfaces.get(at).is_none_or(|interface| interface.sandbox.is_empty()),
        };
        let text = ip.address.split('/').next().unwrap_or_default();
        let address: IpAddr = text.parse().map_err(|_| format!("{:?} is no address", ip.address))?;
        if !on_host && !addresses.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(result: Value) -> Vec<String> {
        addresses(&result).unwrap().iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn the_first_address_of_each_family_inside_the_sandbox_counts() {
        let interfaces = json!([{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}]);
        let result = json!({"cniVersion": "0.4.0", "interfaces": interfaces, "ips": [
            {"version": "4", "address": "192.0.2.1/24", "interface": 0},
            {"version": "6", "address": "fd00::5/64", "interface": 2},
            {"version": "4", "address": "10.1.0.5/16", "interface": 2},
            {"version": "4", "address": "10.1.0.6/16", "interface": 2},
            {"version": "4", "address": "10.1.0.7/16", "interface": 9},
        ]});
        assert_eq!(texts(result), ["fd00::5", "10.1.0.5"]);
        assert_eq!(texts(json!({"ips": [{"address": "10.1.0.5/16"}]})), ["10.1.0.5"]);
        assert!(texts(json!({})).is_empty());
    }

    #[test]
    fn what_is_no_result_is_refused() {
        assert!(addresses(&json!({"ips": [{"address": "ten"}]})).unwrap_err().contains("\"ten\""));
        assert!(addresses(&json!({"ips": 3})).is_err());
        assert!(addresses(&json!("text")).is_err());
    }
}
