//! The microVM driver's parts: each sandbox is a virtual machine with a kernel of its own.
//!
//! * [`machine`] runs the machines: one VMM process each, its directory, its jail, templates it is restored from.

pub mod machine;
