//! The life of Pods: the real Pod loop between an API server in memory and the fake runtime, with faults on both sides.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

mod admission;
mod api;
mod drain;
mod drivers;
mod ending;
mod ephemeral;
mod eviction;
mod faults;
mod functions;
mod hooks;
mod image_volumes;
mod images;
mod interrupted;
mod node_shutdown;
mod pods;
mod probes;
mod resize;
mod restart;
mod server;
mod sidecars;
mod start;
mod statics;
mod statuses;
mod sweeping;
mod watching;
mod world;
