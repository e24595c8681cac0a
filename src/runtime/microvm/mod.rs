//! The microVM driver's parts: each sandbox is a virtual machine with a kernel of its own.
//!
//! * [`agent`] is the client of the agent in a guest.

pub mod agent;
