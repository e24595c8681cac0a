//! Pods as microVMs, each in a kernel of its own.
//!
//! * [`image`]: a reference becomes a read-only block image, one for all VMs.

pub mod image;
