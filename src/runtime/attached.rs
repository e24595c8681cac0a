//! What a sandbox is attached to.

use std::net::IpAddr;

use crate::network::cni::Wish;

/// The network a sandbox gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxNetwork {
    /// The host's own network namespace (`hostNetwork: true`).
    Host,
    /// A network namespace of its own on the node's Pod network, with this address.
    Pod {
        /// The Pod's address, allotted by [`crate::network::ipam::Ipam`].
        address: IpAddr,
    },
    /// The same with an address of each family, the Pod's first one first.
    Dual {
        /// They too are allotted.
        addresses: [IpAddr; 2],
    },
    /// A network namespace of its own, to which CNI plugins give addresses of their choice.
    Plugins {
        /// What they are told of the Pod.
        wish: Wish,
    },
}

impl SandboxNetwork {
    /// The addresses it is to have, the first one first; none where it is not this node that gives them.
    pub fn addresses(&self) -> &[IpAddr] {
        match self {
            Self::Pod { address } => std::slice::from_ref(address),
            Self::Dual { addresses } => addresses,
            Self::Host | Self::Plugins { .. } => &[],
        }
    }
}
