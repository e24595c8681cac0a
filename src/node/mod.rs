//! The Node object: registered, kept fresh, and its lease.

use std::net::IpAddr;

/// Facts about this node that Pods may ask for.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// The node's name.
    pub name: String,
    /// Its InternalIPs, the primary first.
    pub addresses: Vec<IpAddr>,
    /// What Pods may use of it: `cpu`, `memory`, `ephemeral-storage`, `pods` (and `hugepages-*`), to a quantity each.
    pub allocatable: std::collections::BTreeMap<String, crate::quantity::Quantity>,
}
