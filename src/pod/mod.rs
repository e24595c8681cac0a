//! The life of a Pod on this node.

pub mod files;
pub mod inputs;
pub mod volumes;

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::node::NodeFacts;

/// What inputs and volumes are computed from.
#[derive(Clone, Copy, Debug)]
pub struct PodContext<'a> {
    /// The Pod, its latest spec.
    pub pod: &'a Pod,
    /// The node it runs on.
    pub node: &'a NodeFacts,
    /// The Pod's addresses; empty before the sandbox has one.
    pub addresses: &'a [IpAddr],
}
