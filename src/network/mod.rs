//! The node's Pod network: who has which address ([`ipam`]) and the cable from the sandbox to the host ([`bridge`]).
//!
//! Every driver shares it, so Docker and microVM Pods live on one network and an address is never handed out twice.

pub mod bridge;
pub mod ipam;
