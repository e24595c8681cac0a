//! The rooms under test, taken from the crate file by file: they name nothing else of it, so they build in seconds,
//! and instrumented all through.

#[path = "../../src/kubelet_api/streaming/websocket/channels.rs"]
pub mod channels;
#[path = "../../src/runtime/microvm/agent/said.rs"]
pub mod said;
#[path = "../../src/spdy/mod.rs"]
pub mod spdy;
