//! CRI v1 as a client meets it: a real socket, a real gRPC client, and a runtime in memory. One test for each promise.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod containers;
mod events;
mod images;
mod logs;
mod robustness;
mod sandboxes;
mod streams;
mod support;
mod whole;
