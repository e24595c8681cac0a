//! What a Pod may ask about itself: `fieldRef` and `resourceFieldRef`. Pure.
//!
//! The fields are those of "Downward API" in the Kubernetes documentation.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ResourceFieldSelector};

use crate::pod::PodContext;
use crate::quantity::Quantity;

/// The value of a `fieldRef` path.
///
/// # Errors
/// A text that names the path, if the field cannot be asked for.
pub fn field(ctx: &PodContext<'_>, path: &str) -> Result<String, String> {
    let meta = &ctx.pod.metadata;
    let spec = ctx.pod.spec.as_ref();
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => map_lines(meta.labels.as_ref()),
        "metadata.annotations" => map_lines(meta.annotations.as_ref()),
        "spec.nodeName" => ctx.node.name.clone(),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => ctx.node.addresses.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.hostIPs" => joined(&ctx.node.addresses),
        "status.podIP" => pod_addresses(ctx).first().map(IpAddr::to_string).unwrap_or_default(),
        "status.podIPs" => joined(pod_addresses(ctx)),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// The value of a `resourceFieldRef`, divided and rounded up. `own` is the container that asks, for a reference that
/// names none. A limit that is not set is what the node has to give.
///
/// # Errors
/// A text that names what is unknown or malformed.
pub fn resource(
    ctx: &PodContext<'_>,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
) -> Result<String, String> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let container = match named {
        Some(name) => find(ctx, name).ok_or_else(|| format!("container {name} not found"))?,
        None => own.ok_or("a resourceFieldRef in a volume must name its container")?,
    };
    let (list, resource) = selector.resource.split_once('.').unwrap_or((&selector.resource, ""));
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    if !known || !matches!(list, "limits" | "requests") {
        return Err(format!("unsupported container resource : {}", selector.resource));
    }
    let requirements = container.resources.as_ref();
    let lists = requirements.map(|requirements| (&requirements.limits, &requirements.requests));
    let stated =
        lists.and_then(|(limits, requests)| if list == "limits" { limits.as_ref() } else { requests.as_ref() });
    let amount = match stated.and_then(|stated| stated.get(resource)) {
        Some(quantity) => Quantity::try_from(quantity).map_err(|error| error.to_string())?,
        None if list == "limits" => ctx.node.allocatable.get(resource).copied().unwrap_or_default(),
        None => Quantity::ZERO,
    };
    let divisor = match &selector.divisor {
        Some(divisor) => Quantity::try_from(divisor).map_err(|error| error.to_string())?,
        None => Quantity::ZERO,
    };
    Ok(amount.divided_by(divisor).to_string())
}

/// The Pod's memory limit: the Pod's own, or the sum over its containers if each has one; else what the node has.
///
/// # Errors
/// A limit that is not a quantity.
pub fn memory_limit(ctx: &PodContext<'_>) -> Result<Option<Quantity>, String> {
    let node = ctx.node.allocatable.get("memory").copied();
    let Some(spec) = &ctx.pod.spec else { return Ok(node) };
    let of =
        |limits: Option<&BTreeMap<String, _>>| limits.and_then(|limits| limits.get("memory")).map(Quantity::try_from);
    let pod = of(spec.resources.as_ref().and_then(|resources| resources.limits.as_ref()));
    if let Some(limit) = pod {
        return limit.map(Some).map_err(|error| error.to_string());
    }
    let mut sum = Quantity::ZERO;
    for container in &spec.containers {
        match of(container.resources.as_ref().and_then(|resources| resources.limits.as_ref())) {
            Some(limit) => sum = sum + limit.map_err(|error| error.to_string())?,
            None => return Ok(node),
        }
    }
    Ok(Some(node.map_or(sum, |node| node.min(sum))))
}

fn find<'a>(ctx: &PodContext<'a>, name: &str) -> Option<&'a Container> {
    let spec = ctx.pod.spec.as_ref()?;
    let init = spec.init_containers.iter().flatten();
    spec.containers.iter().chain(init).find(|container| container.name == name)
}

/// On the host's network a Pod has the node's addresses.
fn pod_addresses<'a>(ctx: &PodContext<'a>) -> &'a [IpAddr] {
    let host_network = ctx.pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    if ctx.addresses.is_empty() && host_network { &ctx.node.addresses } else { ctx.addresses }
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

/// `metadata.labels['x']` as (`metadata.labels`, `x`).
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

/// One `key="value"` per line, by key.
fn map_lines(map: Option<&BTreeMap<String, String>>) -> String {
    let lines = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quoted(value)));
    lines.collect::<Vec<_>>().join("\n")
}

/// A Go string literal, which is what readers of these files parse.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{b}' => quoted.push_str("\\v"),
            '\u{c}' => quoted.push_str("\\f"),
            // Writing to a String cannot fail.
            c if c.is_ascii_control() => drop(write!(quoted, "\\x{:02x}", u32::from(c))),
            c if c.is_control() || (c.is_whitespace() && c != ' ') => drop(write!(quoted, "\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;
    use crate::node::NodeFacts;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1",
                "labels": {"app": "web", "b": "2"}, "annotations": {"note": "a\"b\\c\nd"}},
            "spec": {"serviceAccountName": "robot", "containers": [
                {"name": "main", "resources": {"limits": {"cpu": "1500m"}, "requests": {"cpu": "250m"}}},
                {"name": "side"}]}
        }))
        .unwrap()
    }

    fn node() -> NodeFacts {
        NodeFacts {
            name: "n1".into(),
            capacity: BTreeMap::new(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            allocatable: BTreeMap::from([
                ("cpu".into(), Quantity::from_units(4)),
                ("memory".into(), "8Gi".parse().unwrap()),
            ]),
        }
    }

    fn selector(value: serde_json::Value) -> ResourceFieldSelector {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn every_field_has_its_value() {
        let (pod, node) = (pod(), node());
        let addresses = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &addresses };
        for (path, value) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "app=\"web\"\nb=\"2\""),
            ("metadata.annotations", "note=\"a\\\"b\\\\c\\nd\""),
            ("spec.nodeName", "n1"),
            ("spec.serviceAccountName", "robot"),
            ("status.hostIP", "192.0.2.1"),
            ("status.hostIPs", "192.0.2.1,2001:db8::1"),
            ("status.podIP", "10.0.0.2"),
            ("status.podIPs", "10.0.0.2,fd00::2"),
        ] {
            assert_eq!(field(&ctx, path).unwrap(), value, "{path}");
        }
        assert!(field(&ctx, "spec.foo").unwrap_err().contains("spec.foo"));
        assert!(field(&ctx, "spec.x['y']").unwrap_err().contains("subscript"));
    }

    #[test]
    fn resources_are_divided_and_limits_default_to_the_node() {
        let (pod, node) = (pod(), node());
        let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &[] };
        let main = &pod.spec.as_ref().unwrap().containers[0];
        for (wanted, value) in [
            (json!({"resource": "limits.cpu"}), "2"),
            (json!({"resource": "limits.cpu", "divisor": "1m"}), "1500"),
            (json!({"resource": "limits.cpu", "divisor": "0"}), "2"),
            (json!({"resource": "requests.cpu", "divisor": "1m"}), "250"),
            (json!({"resource": "requests.memory"}), "0"),
            (json!({"resource": "limits.memory", "divisor": "1Mi"}), "8192"),
            (json!({"resource": "limits.cpu", "containerName": "side"}), "4"),
        ] {
            assert_eq!(resource(&ctx, Some(main), &selector(wanted.clone())).unwrap(), value, "{wanted}");
        }
        let error = resource(&ctx, None, &selector(json!({"resource": "limits.cpu", "containerName": "x"})));
        assert_eq!(error.unwrap_err(), "container x not found");
        assert!(resource(&ctx, Some(main), &selector(json!({"resource": "limits.gpu"}))).is_err());
    }

    #[test]
    fn the_memory_limit_is_the_sum_only_if_every_container_has_one() {
        let (mut pod, node) = (pod(), node());
        let limit =
            |pod: &Pod| memory_limit(&PodContext { key: "", pod, node: &node, addresses: &[] }).unwrap().unwrap();
        assert_eq!(limit(&pod), "8Gi".parse().unwrap());
        let limits = json!({"limits": {"memory": "1Gi"}});
        for container in &mut pod.spec.as_mut().unwrap().containers {
            container.resources = serde_json::from_value(limits.clone()).unwrap();
        }
        assert_eq!(limit(&pod), "2Gi".parse().unwrap());
    }
}
